"""What the settings of all commands share: checks in the words of the command line, and settings as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from captioning.errors import UserError


def flag(name: str) -> str:
    """A setting's name on the command line: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def check(condition: bool, flag: str, value: object, wanted: str) -> None:
    """Raises UserError, in the words of the command line, unless the condition holds."""
    if not condition:
        raise UserError(f"{flag} {value}: must be {wanted}")


def check_min(settings: object, minimum: int, *names: str) -> None:
    """Raises UserError where one of these settings is below the minimum; None passes."""
    for name in names:
        value = getattr(settings, name)
        check(value is None or value >= minimum, flag(name), value, f"{minimum} or more")


def check_fractions(settings: object, *names: str) -> None:
    """Raises UserError where one of these settings is not between 0 and 1."""
    for name in names:
        value = getattr(settings, name)
        check(0 <= value <= 1, flag(name), value, "a fraction between 0 and 1")


def check_choice(settings: object, name: str, choices: Collection[str]) -> None:
    """Raises UserError where the setting is not one of the choices."""
    value = getattr(settings, name)
    check(value in choices, flag(name), value, f"one of {', '.join(choices)}")


def non_default(settings: object, *names: str) -> list[str]:
    """The flags of those settings that differ from their default."""
    return [flag(name) for name in names if getattr(settings, name) != getattr(type(settings), name)]


def as_plain_data(settings: object) -> dict:
    """A settings dataclass as JSON-ready data, for logs and checkpoints: paths become text, tuples lists."""
    return {name: _plain(value) for name, value in dataclasses.asdict(settings).items()}  # type: ignore[call-overload]


def _plain(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
