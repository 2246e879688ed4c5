"""Ctrl-C and SIGTERM: either a request to stop between two training steps, or one line and the end of the process.

Every command imports this module before anything else, so it imports nothing that takes time.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = "stopped; nothing is lost: the same command (train.py: with --resume) goes on"
REPEAT_SECONDS = 1.0  # a second signal within this time is the same request: torchrun forwards Ctrl-C to its processes
REPORT_SECONDS = 5.0  # how long to wait for the process that should report the stop; torchrun kills after 30 s


def stop_signals() -> list[signal.Signals]:
    """The stop signals to handle, except those the shell set to be ignored; none outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def is_interactive() -> bool:
    """Whether the interpreter lives on after the command, as after %run in IPython or Jupyter, or with python -i."""
    return hasattr(builtins, "__IPYTHON__") or bool(sys.flags.interactive)


def install_exit_handlers() -> None:
    """End the process at once, with one line, on a stop signal. `command_line.run` replaces these handlers."""
    for number in stop_signals():
        signal.signal(number, _exit_at_once)


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    _report_stop()
    os._exit(130)


def _report_stop() -> None:
    """Print the line of a stop, unless another process does; safe in any thread and in signal handlers."""
    with contextlib.suppress(OSError):
        os.write(2, stop_report().encode())


def stop_report() -> str:
    """The line of a stop; empty if another process prints it."""
    claimed = claim_report(without_torchrun=os.environ.get("RANK", "0") == "0")
    return f"{line_start()}{STOPPED}\n" if claimed else ""


def line_start() -> str:
    """The start of a report: a line break if rank 0, which may be lost, could have left a progress bar on the line."""
    return "" if os.environ.get("RANK", "0") == "0" else "\n"


def claim_report(without_torchrun: bool) -> bool:
    """Return whether this process prints the line that ends the job; True in only one process of each machine.

    The first process of the machine has REPORT_SECONDS to claim the line; then any other may, so that the line is
    printed even if the first one was killed. without_torchrun: the result where torchrun did not start this process.
    """
    claim = _claim_file()
    if claim is None:
        return without_torchrun
    deadline = time.monotonic() + (0 if os.environ.get("LOCAL_RANK") == "0" else REPORT_SECONDS)
    while time.monotonic() < deadline and not os.path.exists(claim):
        time.sleep(0.05)
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:  # torchrun has removed its folder: better twice than never
        return True
    return True


def _claim_file() -> str | None:
    """A path in torchrun's private folder for this machine and this attempt: .../attempt_0/LOCAL_RANK/error.json."""
    folder, name = os.path.split(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    attempt = os.path.dirname(folder)
    if name != "error.json" or not os.path.basename(attempt).startswith("attempt_"):
        return None
    return os.path.join(attempt, "kantu-stop-reported")


@contextlib.contextmanager
def report_stop_while_blocked() -> Iterator[None]:
    """Report a stop even if the main thread is blocked in a collective, where Python runs no signal handler.

    A thread receives the signals through `signal.set_wakeup_fd`. If the block has not ended REPORT_SECONDS after a
    stop signal, the thread prints the line. Without torchrun this does nothing.
    """
    if _claim_file() is None or not stop_signals():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ended = threading.Event()
    threading.Thread(target=_watch_signals, args=(reader, ended), daemon=True, name="signals").start()
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(previous)
        os.close(writer)  # ends the thread


def _watch_signals(reader: int, ended: threading.Event) -> None:
    """Read signal numbers, one byte each, until the other end of the pipe is closed."""
    with open(reader, "rb", buffering=0) as received:
        while number := received.read(1):
            if number[0] in STOP_SIGNALS and not ended.wait(REPORT_SECONDS):
                _report_stop()


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a request that is checked between two steps, when everything can be saved.

    A second Ctrl-C raises KeyboardInterrupt at once, unless it follows within REPEAT_SECONDS.
    """

    def __enter__(self) -> StopRequest:
        self.requested = False
        self.number = 0  # of the last signal
        self._received_at = 0.0
        self._previous = {number: signal.signal(number, self._receive) for number in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and time.monotonic() - self._received_at > REPEAT_SECONDS:
            raise KeyboardInterrupt
        self.requested = True
        self.number = number
        self._received_at = time.monotonic()

    def check(self) -> None:
        """Raise KeyboardInterrupt if a stop was requested."""
        if self.requested:
            raise KeyboardInterrupt


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Hold back stop signals until the block ends, then deliver them to the previous handlers.

    For C++ code that calls Python: it would turn KeyboardInterrupt into another error, or end the process.
    """
    with StopRequest() as stop:
        yield
    if stop.requested:
        signal.raise_signal(stop.number)  # to this thread: at once
