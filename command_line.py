"""A command's dataclass made into its command line, and the one way a command ends, whatever happens.

tyro makes the flags; a field's comment is its help.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from itertools import zip_longest
from typing import TypeVar

import tyro

from config import DASHBOARD_URL, UserError

Config = TypeVar("Config")


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
    """tyro draws its errors in boxes: keep the sentences above the first rule."""
    sentences = []
    for line in boxes.splitlines():
        line = line.strip("│ \t")
        if line and set(line) == {"─"}:
            break
        if line and not line.startswith(("╭", "╰")):
            sentences.append(line)
    return " ".join(sentences) + "; see --help"


def run(command: type[Config], work: Callable[[Config], None]) -> None:
    """Parse, work, and end with one line whatever a user did: `error: what, where, what to do`, status 1."""
    rank = int(os.environ.get("RANK", 0))  # torchrun's
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        work(parse(command))
    except UserError as error:
        sys.exit(f"error{f' (process {rank})' if rank else ''}: {error}")
    except KeyboardInterrupt:
        if not rank:
            print("stopped; nothing is lost: the same command (train.py: with --resume) goes on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
