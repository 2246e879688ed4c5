"""A command's dataclass made into its command line, and the one way a command ends, whatever happens.

tyro makes the flags; a field's comment is its help.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from itertools import zip_longest
from typing import TypeVar

import tyro

from captioning.errors import UserError
from captioning.runtime.signals import STOPPED, asked_to_stop

DASHBOARD_URL = "http://127.0.0.1:8097"  # what --dashboard alone means
Config = TypeVar("Config")
UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def parse(command: type[Config], arguments: list[str] | None = None) -> Config:
    """The command line as a `command` dataclass. A usage error is one line on stderr and exit status 2."""
    said = io.StringIO()
    arguments = _with_urls(sys.argv[1:] if arguments is None else arguments)
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(command, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if stop.code:
            print(f"error: {_one_line(said.getvalue())}", file=sys.stderr)
        raise


def _with_urls(arguments: list[str]) -> list[str]:
    """--dashboard may stand alone: it then means the server on this machine."""
    words = []
    for this, after in zip_longest(arguments, arguments[1:]):
        words.append(this)
        if this == "--dashboard" and (after is None or after.startswith("--")):
            words.append(DASHBOARD_URL)
    return words


def _one_line(boxes: str) -> str:
    """tyro puts its errors under a title, between rules: keep the sentences of the first."""
    parts = re.split(r"^[-─]+$", re.sub(r"^[│ \t]+|[│ \t]+$", "", boxes, flags=re.MULTILINE), flags=re.MULTILINE)
    return " ".join(parts[1 if len(parts) > 1 else 0].split()) + "; see --help"


def run(command: type[Config], work: Callable[[Config], None]) -> None:
    """Parse, work, and end with one line whatever a user did: `error: what, where, what to do`, status 1."""
    rank = os.environ.get("RANK", "0")  # torchrun's
    error_of = "error: " if rank == "0" else f"error (process {rank}): "
    interrupt, before, stopped = functools.partial(_interrupt, os.getpid()), {}, False
    try:
        try:
            config = parse(command)  # before: an exception in Python's own parser, which tyro uses, is a SystemError
            before = {number: signal.signal(number, interrupt) for number in asked_to_stop()}
            with contextlib.suppress(AttributeError):  # a stream of another kind
                sys.stdout.reconfigure(errors="backslashreplace")  # whatever the terminal cannot show
            work(config)
            sys.stdout.flush()
        except KeyboardInterrupt:
            stopped = True  # it is said below, where nothing holds the bars: they have said their last before us
        if stopped:
            if rank == "0":
                print(STOPPED, file=sys.stderr)
            sys.exit(130)
    except UserError as error:
        sys.exit(one_line(f"{error_of}{error}"))
    except BrokenPipeError:  # the reader of our output, such as head, has left
        _say_no_more()
    except OSError as error:  # no room, no leave, a disk that is gone: where nobody knew a better remedy
        if not error.filename:
            _say_no_more()
        what = f"{error.filename or 'what is written'}: {error.strerror or error}"
        sys.exit(one_line(f"{error_of}{what}; make room or check the permissions, and give the same command again"))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def one_line(text: str) -> str:
    """The text with what would break its line, or is no text, as escapes: a file may be called anything."""
    return UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _say_no_more() -> None:
    """Python would try once more to say at its end what could not be said."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(process: int, *_: object) -> None:
    if os.getpid() == process:  # a worker that has just been forked leaves it to the command to end it
        raise KeyboardInterrupt
