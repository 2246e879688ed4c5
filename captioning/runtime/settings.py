"""Shared by the settings of all commands: checks that name the flag, and settings as plain data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from captioning.errors import UserError

# Names of train.py's settings in runs of older versions, which this version cannot read.
OLD_SETTINGS = frozenset(
    {
        "accumulate",
        "average",
        "best",
        "clip",
        "decay",
        "decay_every",
        "entropy",
        "freeze_words",
        "panel",
        "reinforce",
        "resident",
        "sampling_rise",
        "tie_words",
        "warm_up",
    }
)
SIZES = ("embedding_size", "attention_size", "hidden_size")
# Defaults of before they depended on the decoder: those in a run of then are what None means now
OLD_DEFAULTS = {"dropout": 0.5, "layers": 1, "positions": "learnt", **dict.fromkeys(SIZES, 512)}
OLDER_VERSION = "written by an older version of Kantu, with other names; start a new run"


def flag(name: str) -> str:
    """The flag of a setting: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def as_flag(name: str, value: object) -> list[str]:
    """The words of a command line that give a setting this value; none for an empty list, which no flag can give."""
    if isinstance(value, bool):
        return [flag(name if value else f"no_{name}")]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [flag(name), *map(str, values)] if values else []


def check(condition: bool, flag: str, value: object, wanted: str) -> None:
    """Raise UserError, which names the flag and its value, unless the condition holds."""
    if not condition:
        raise UserError(f"{flag} {value}: must be {wanted}")


def check_min(settings: object, minimum: int, *names: str) -> None:
    """Raise UserError if one of these settings is below the minimum; None passes."""
    for name in names:
        value = getattr(settings, name)
        check(value is None or value >= minimum, flag(name), value, f"{minimum} or more")


def check_fractions(settings: object, *names: str) -> None:
    """Raise UserError if one of these settings is not between 0 and 1; None passes."""
    for name in names:
        value = getattr(settings, name)
        check(value is None or 0 <= value <= 1, flag(name), value, "a fraction between 0 and 1")


def non_default(settings: object, *names: str) -> list[str]:
    """The flags of the settings that differ from their default."""
    return [flag(name) for name in names if getattr(settings, name) != getattr(type(settings), name)]


def as_plain_data(settings: object) -> dict:
    """Convert a settings dataclass to JSON-ready data for logs and checkpoints: paths to text, tuples to lists."""
    return {name: _plain(value) for name, value in dataclasses.asdict(settings).items()}  # type: ignore[call-overload]


def has_old_settings(config: object) -> bool:
    """Whether a run's settings, as plain data, have names of an older version."""
    return isinstance(config, dict) and not OLD_SETTINGS.isdisjoint(config)


def _plain(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
