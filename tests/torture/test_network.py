"""No call to another machine unless the user asks for it: tests of the block in tests/loopback, used by all tests."""

import socket
import subprocess
import sys

import pytest

from tests.conftest import CALLS
from tests.loopback.sitecustomize import is_local

ELSEWHERE = "192.0.2.1"  # reserved for documentation (RFC 5737): no machine answers
CALLING = [
    f"socket.create_connection(('{ELSEWHERE}', 80), 0.1)",
    "socket.getaddrinfo('example.invalid', 80)",
    f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'a', ('{ELSEWHERE}', 53))",
    f"socket.socket().connect_ex(('{ELSEWHERE}', 80))",
    "__import__('urllib.request').request.urlopen('http://example.invalid/')",
    f"__import__('http.client').client.HTTPConnection('{ELSEWHERE}').connect()",
]


def recorded_calls():
    """Return the recorded calls and clear the record, since these calls are intended."""
    calls = CALLS.read_text("utf-8").splitlines() if CALLS.exists() else []
    CALLS.unlink(missing_ok=True)
    return calls


@pytest.mark.parametrize("call", CALLING)
def test_a_call_to_another_machine_fails_and_is_recorded_even_if_the_error_is_ignored(call, tally):
    with pytest.raises(RuntimeError, match="tests must not call other machines"):
        exec(call)
    assert len(recorded_calls()) == 1
    tally("calls to other machines")


def test_calls_fail_in_child_processes_too(tally):
    program = "import socket\n" + "\n".join(f"try:\n    {call}\nexcept RuntimeError:\n    pass" for call in CALLING)
    subprocess.run([sys.executable, "-c", program], check=True)
    assert len(recorded_calls()) == len(CALLING)
    tally("calls to other machines", len(CALLING))


def test_calls_to_this_machine_are_allowed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        for host in ("127.0.0.1", "localhost"):
            socket.create_connection((host, server.getsockname()[1])).close()
    local = [
        ("127.8.8.8", 1),
        ("::1", 1, 0, 0),
        "/tmp/a.socket",
        b"\0abstract",
        (None, 80),
        ("localhost", 80),
        ("0.0.0.0", 1),
    ]
    remote = [(ELSEWHERE, 80), ("::2", 1, 0, 0), ("10.0.0.1", 1), ("kantu.example", 1)]
    assert all(map(is_local, local)) and not any(map(is_local, remote))
