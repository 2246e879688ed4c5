"""Ctrl-C and SIGTERM, asked for at a moment when nothing is lost."""

from __future__ import annotations

import signal
import time


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a question that is asked between two steps, when everything can be saved.

    A second Ctrl-C does not wait; torchrun passes the first one on, so what follows within a second is the same one.
    """

    def __enter__(self) -> StopRequest:
        self.requested, self._noted = False, 0.0
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        if self.requested and time.monotonic() - self._noted > 1:
            raise KeyboardInterrupt
        self.requested, self._noted = True, time.monotonic()

    def check(self) -> None:
        """Stop here if a stop was asked for."""
        if self.requested:
            raise KeyboardInterrupt
