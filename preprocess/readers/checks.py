"""Checks of the entries of an annotation file, shared by all readers."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TypeVar

from captioning.errors import UserError
from preprocess.annotations import Record

# A path that leads out of the image folder (absolute, with .. or backslashes), or that no file can have.
UNSAFE_PATH = re.compile(r"^/|^[A-Za-z]:|(^|/)\.\.(/|$)|[\\\0\ud800-\udfff]")
TYPE_NAMES = {str: "text", int: "an integer", list: "a list"}
Value = TypeVar("Value")


def first_has_key(entries: object, key: str) -> bool:
    """Whether `entries` is a list whose first item is an object with this key."""
    return isinstance(entries, list) and bool(entries) and isinstance(entries[0], dict) and key in entries[0]


def read_field(location: str, entry: object, key: str, wanted: type[Value]) -> Value:
    """entry[key]. Raises UserError where it is missing or not of the wanted type; location names the entry."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is wanted:  # not isinstance: true is no image id
        return value
    found = f"no {key!r}" if value is None else f"{key!r} is {str(value)[:60]!r}"
    raise UserError(f"{location}: {found}; {key!r} must be {TYPE_NAMES[wanted]}")


def make_record(location: str, images: str, name: str, id: str, split: str, captions: Sequence[object]) -> Record:
    """A record of the photo `name` in the folder `images`.

    Raises UserError, with the location of the entry, for an unsafe path or id, for captions that are not text, and
    where all captions are empty.
    """
    if not name or UNSAFE_PATH.search(name) or UNSAFE_PATH.search(id):
        raise UserError(f"{location}: {id!r}, {name!r}: not a path in the image folder; correct or remove the entry")
    texts = tuple(caption for caption in captions if type(caption) is str)
    if len(texts) < len(captions):
        raise UserError(f"{location} ({name!r}): a caption is not text; correct or remove it")
    if not any(map(str.strip, texts)):
        raise UserError(f"{location} ({name!r}): no caption; add one or remove the entry")
    return Record(os.path.join(images, name), id, split, texts)
