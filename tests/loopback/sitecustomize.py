"""No network: Python imports this by its name when it starts, in whatever process tests/conftest.py has as an ancestor.

What looks up or calls another machine than this one fails, and is written into the file that KANTU_CALLS names, so that
code that swallows the failure is found, too. An audit hook sees every socket of Python's, and cannot be taken away.
"""

import ipaddress
import os
import sys

# Which of an event's arguments is the address.
EVENTS = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0,
}
HERE = (None, "", b"", "localhost", "ip6-localhost", "localhost.localdomain")


def is_here(address):
    """Is this address (a host, or a tuple that begins with one; or that of a Unix socket) on this machine?"""
    if not isinstance(address, tuple):
        return True  # a Unix socket's path, or none: the socket was connected before
    host = address[0].decode() if isinstance(address[0], bytes) else address[0]
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except (ValueError, AttributeError):
        return host in HERE
    return ip.is_loopback or ip.is_unspecified


def watch(event, arguments):
    if event in EVENTS:
        address = arguments[EVENTS[event]]
        if not is_here(address if EVENTS[event] else (address,)):
            with open(os.environ["KANTU_CALLS"], "a", encoding="utf-8") as calls:
                calls.write(f"{event} {address!r}\n")
            raise RuntimeError(f"{event} {address!r}: tests call no other machine")


if "KANTU_CALLS" in os.environ:
    sys.addaudithook(watch)
