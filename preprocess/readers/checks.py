"""What several readers need."""

from __future__ import annotations

from pathlib import Path

from captioning.errors import UserError

FIRST_ENTRIES = 100  # that are looked at to recognise a list: one bad entry at its head must not hide its form


def first_object(entries: object) -> dict:
    """The first object in a list of objects; {} for anything else."""
    if not isinstance(entries, list):
        return {}
    return next((entry for entry in entries[:FIRST_ENTRIES] if isinstance(entry, dict) and entry), {})


def first_has_key(entries: object, key: str) -> bool:
    """Whether `entries` is a list whose first object has this key."""
    return key in first_object(entries)


def no_captions(path: Path) -> UserError:
    """The error for a list of photos to caption, such as a test split without its captions."""
    return UserError(
        f"{path}: lists photos without captions; caption them with generate.py RUN IMAGES, or give a file with captions"
    )


def as_dict(entry: object) -> dict:
    """The entry if it is an object, else {}: its fields are then missing, as those of an empty object are."""
    return entry if isinstance(entry, dict) else {}
