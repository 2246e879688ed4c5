"""No network without being asked: the whole suite runs under the guard of tests/loopback; here it is tried itself."""

import socket
import subprocess
import sys

import pytest

from tests.conftest import CALLS
from tests.loopback.sitecustomize import is_here

ELSEWHERE = "192.0.2.1"  # of a net that is kept for examples: nobody answers there
CALLING = [
    f"socket.create_connection(('{ELSEWHERE}', 80), 0.1)",
    "socket.getaddrinfo('example.invalid', 80)",
    f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'a', ('{ELSEWHERE}', 53))",
    f"socket.socket().connect_ex(('{ELSEWHERE}', 80))",
    "__import__('urllib.request').request.urlopen('http://example.invalid/')",
    f"__import__('http.client').client.HTTPConnection('{ELSEWHERE}').connect()",
]


def calls_noted():
    """The calls so far, which are then forgotten: these were meant."""
    calls = CALLS.read_text("utf-8").splitlines() if CALLS.exists() else []
    CALLS.unlink(missing_ok=True)
    return calls


@pytest.mark.parametrize("call", CALLING)
def test_a_call_to_another_machine_fails_and_is_noted_even_where_it_is_forgiven(call, tally):
    with pytest.raises(RuntimeError, match="tests call no other machine"):
        exec(call)
    assert len(calls_noted()) == 1
    tally("calls to other machines")


def test_it_fails_in_other_processes_too(tally):
    program = "import socket\n" + "\n".join(f"try:\n    {call}\nexcept RuntimeError:\n    pass" for call in CALLING)
    subprocess.run([sys.executable, "-c", program], check=True)
    assert len(calls_noted()) == len(CALLING)
    tally("calls to other machines", len(CALLING))


def test_this_machine_may_be_called():
    with socket.create_server(("127.0.0.1", 0)) as server:
        for host in ("127.0.0.1", "localhost"):
            socket.create_connection((host, server.getsockname()[1])).close()
    here = [
        ("127.8.8.8", 1),
        ("::1", 1, 0, 0),
        "/tmp/a.socket",
        b"\0abstract",
        (None, 80),
        ("localhost", 80),
        ("0.0.0.0", 1),
    ]
    there = [(ELSEWHERE, 80), ("::2", 1, 0, 0), ("10.0.0.1", 1), ("kantu.example", 1)]
    assert all(map(is_here, here)) and not any(map(is_here, there))
