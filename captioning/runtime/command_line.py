"""Turn a command's dataclass into its command line, and end every command in the same way.

tyro makes the flags; a field's comment is its help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from itertools import zip_longest
from types import FrameType
from typing import TypeVar

import tyro

from captioning.errors import LostProcessError, UserError
from captioning.runtime.library_errors import reason
from captioning.runtime.recipes import Recipe, requested_recipe
from captioning.runtime.signals import claim_report, is_interactive, line_start, stop_report, stop_signals
from captioning.runtime.usage_errors import unwrapped_errors, usage_error

DASHBOARD_URL = "http://127.0.0.1:8097"  # the value of --dashboard without an argument
Config = TypeVar("Config")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def parse(command: type[Config], arguments: list[str] | None = None) -> Config:
    """Parse the command line into a `command` dataclass. A usage error prints one line and exits with status 2.

    If `command` has a setting `recipe`, the flags of the recipe that is given are added, and printed.
    """
    errors = io.StringIO()
    arguments = sys.argv[1:] if arguments is None else arguments
    recipe = None
    if "recipe" in (field.name for field in dataclasses.fields(command)):  # type: ignore[arg-type]
        arguments, recipe = _add_recipe(arguments)
    arguments = _add_dashboard_url(arguments)
    try:
        wraps = "--help" in arguments or "-h" in arguments  # help is for a terminal, an error is one line
        with contextlib.redirect_stderr(errors), contextlib.nullcontext() if wraps else unwrapped_errors():
            parsed = tyro.cli(command, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if stop.code:
            message = usage_error(errors.getvalue())
            print(f"error: {one_line(recipe.locate(message) if recipe else message)}", file=sys.stderr)
        raise
    except UserError as error:
        if recipe is None:
            raise
        raise UserError(recipe.locate(str(error))) from None
    if recipe and os.environ.get("RANK", "0") == "0":  # set by torchrun
        print(f"recipe {one_line(recipe.name)}: {one_line(str(recipe))}", flush=True)
    return parsed


def _add_recipe(arguments: list[str]) -> tuple[list[str], Recipe | None]:
    """The arguments, completed by the recipe that they ask for, and what of it is used."""
    recipe = requested_recipe(arguments)
    if recipe is None:
        return arguments, None
    return recipe.complete(arguments), recipe.without(arguments)


def _add_dashboard_url(arguments: list[str]) -> list[str]:
    """Give --dashboard its default URL, the server on this machine, where it has no argument."""
    completed = []
    for argument, following in zip_longest(arguments, arguments[1:]):
        completed.append(argument)
        if argument == "--dashboard" and (following is None or following.startswith("--")):
            completed.append(DASHBOARD_URL)
    return completed


def run(command: type[Config], work: Callable[[Config], None]) -> None:
    """Parse the command line, call `work`, and report a mistake of the user in one line: "error: what, where, remedy".

    Exit status: 0 on success, 1 after an error, 2 after a usage error, 130 after Ctrl-C or SIGTERM.
    """
    handlers = _InterruptHandlers()
    environment = dict(os.environ)
    errors_of_stdout = getattr(sys.stdout, "errors", None)
    try:
        try:
            outcome = _outcome(command, work, handlers)
        except KeyboardInterrupt:  # a signal that arrived after the work had ended
            outcome = KeyboardInterrupt()
        handlers.ignore()  # from here on only the report is missing
        if outcome is not None:
            _exit(outcome)
    finally:  # nothing of ours stays in a session that goes on, such as IPython's after %run
        handlers.restore()
        _restore_environment(environment)
        _escape_in_stdout(errors_of_stdout)


def _outcome(
    command: type[Config], work: Callable[[Config], None], handlers: _InterruptHandlers
) -> BaseException | None:
    """Parse and work. Returns the error or the interrupt that ended the work, or None."""
    try:
        _escape_in_stdout("backslashreplace")
        config = parse(command)
        handlers.install()  # not before: Python's own parser, which tyro uses, turns an exception into a SystemError
        work(config)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return KeyboardInterrupt()  # a new one: the traceback would keep progress bars alive past the last line
    except (UserError, OSError) as error:
        return error
    return None


def _escape_in_stdout(errors: str | None) -> None:
    """Set what becomes of characters that stdout's encoding lacks."""
    with contextlib.suppress(AttributeError):  # stdout may be a stream of another kind
        sys.stdout.reconfigure(errors=errors)  # type: ignore[union-attr]


def _restore_environment(before: dict[str, str]) -> None:
    """Undo what the command, and the libraries that it called, changed in the environment."""
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _exit(outcome: BaseException) -> None:
    """Report the outcome and exit."""
    rank = os.environ.get("RANK", "0")  # set by torchrun
    prefix = "error: " if rank == "0" else f"error (process {rank}): "
    if isinstance(outcome, KeyboardInterrupt):
        print(stop_report(), end="", file=sys.stderr, flush=True)
        sys.exit(130)
    if isinstance(outcome, LostProcessError):  # all remaining processes notice the loss; one reports it
        if claim_report(without_torchrun=True):
            print(line_start() + one_line(f"{prefix}{outcome}"), file=sys.stderr, flush=True)
        sys.exit(1)
    if isinstance(outcome, OSError):
        _exit_after_system_error(outcome, prefix)
    else:
        sys.exit(one_line(f"{prefix}{outcome}"))


def _exit_after_system_error(error: OSError, prefix: str) -> None:
    """Report an OSError for which no other code had a better remedy: disk full, no permission, or an I/O error."""
    if isinstance(error, BrokenPipeError):  # the reader of the output, such as head, has ended
        _discard_stdout()
        return
    if not error.filename:
        _discard_stdout()
    what = f"{error.filename or 'the output'}: {reason(error)}"
    remedy = "free some space or check the permissions, and give the same command again"
    sys.exit(one_line(f"{prefix}{what}; {remedy}"))


def one_line(text: str) -> str:
    """Escape line breaks, control characters and lone surrogates: a file may have any name."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _discard_stdout() -> None:
    """Keep Python from writing its buffered output again, and failing again, when it exits."""
    if is_interactive():  # which does not exit
        return
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _InterruptHandlers:
    """Handlers that raise KeyboardInterrupt on Ctrl-C and on SIGTERM."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.previous: dict[signal.Signals, object] = {}

    def install(self) -> None:
        """Replace the handlers of the stop signals, and remember them."""
        self.previous = {number: signal.signal(number, self._interrupt) for number in stop_signals()}

    def ignore(self) -> None:
        """Ignore the stop signals from now on."""
        for number in self.previous:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Set the previous handlers again."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self.process:  # a worker that was just forked leaves it to the command to end it
            raise KeyboardInterrupt
