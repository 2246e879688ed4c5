"""Ctrl-C and SIGTERM: a question, asked at a moment when nothing is lost, and one line, at any other moment.

Every command imports this before anything else, so it imports nothing that takes time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

STOPS = (signal.SIGINT, signal.SIGTERM)
STOPPED = "stopped; nothing is lost: the same command (train.py: with --resume) goes on"


def asked_to_stop() -> list[signal.Signals]:
    """Ctrl-C and SIGTERM, which the main thread alone hears, but for one that a shell told its background to ignore."""
    both = STOPS if threading.current_thread() is threading.main_thread() else ()
    return [number for number in both if signal.getsignal(number) != signal.SIG_IGN]


def install_exit_handlers() -> None:
    """They end the process at once, with one line; while `command_line.run` works, it is that which ends it."""
    for number in asked_to_stop():
        signal.signal(number, _leave)


def _leave(*_: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{STOPPED}\n".encode())
    os._exit(130)


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a question that is asked between two steps, when everything can be saved.

    A second Ctrl-C does not wait; torchrun passes the first one on, so what follows within a second is the same one.
    """

    def __enter__(self) -> StopRequest:
        self.requested, self.number, self._noted = False, 0, 0.0
        self._before = {number: signal.signal(number, self._note) for number in asked_to_stop()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, *_: object) -> None:
        if self.requested and time.monotonic() - self._noted > 1:
            raise KeyboardInterrupt
        self.requested, self.number, self._noted = True, number, time.monotonic()

    def check(self) -> None:
        """Stop here if a stop was asked for."""
        if self.requested:
            raise KeyboardInterrupt


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """A stop waits until the block is done, and then goes to who listened before.

    For what calls Python from C++ and makes an error of its own of a KeyboardInterrupt, or ends the process.
    """
    with StopRequest() as stop:
        yield
    if stop.requested:
        os.kill(os.getpid(), stop.number)
