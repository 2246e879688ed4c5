"""Block the network in the tests: Python imports this module at startup in every process that the tests start.

Looking up or calling another machine raises RuntimeError. The call is also written to the file named by KANTU_CALLS,
which reveals code that ignores the error. An audit hook sees every socket of Python and cannot be removed.
"""

import ipaddress
import os
import sys

# Audit event -> index of the argument that is the address.
EVENTS = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0,
}
LOCAL_NAMES = (None, "", b"", "localhost", "ip6-localhost", "localhost.localdomain")


def is_local(address):
    """Whether an address (a host, a tuple that begins with a host, or a Unix socket's path) is on this machine."""
    if not isinstance(address, tuple):
        return True  # a Unix socket's path, or None if the socket is already connected
    host = address[0].decode() if isinstance(address[0], bytes) else address[0]
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except (ValueError, AttributeError):
        return host in LOCAL_NAMES
    return ip.is_loopback or ip.is_unspecified


def watch(event, arguments):
    if event in EVENTS:
        address = arguments[EVENTS[event]]
        if not is_local(address if EVENTS[event] else (address,)):
            with open(os.environ["KANTU_CALLS"], "a", encoding="utf-8") as calls:
                calls.write(f"{event} {address!r}\n")
            raise RuntimeError(f"{event} {address!r}: tests must not call other machines")


if "KANTU_CALLS" in os.environ:
    sys.addaudithook(watch)
