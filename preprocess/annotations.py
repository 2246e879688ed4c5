"""Annotation files -> records. The form of a file is recognised by its content, not by its name.

The forms are the entries of preprocess.ANNOTATION_READERS. A reader yields what a file has, as `Entry` objects; this
module checks them: one bad entry does not void the others, it is left out and listed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from captioning.errors import UserError
from preprocess import ANNOTATION_READERS
from preprocess.columns import Columns
from preprocess.content import Content, describe, load_content
from preprocess.folders import SPLIT_NAMES

if TYPE_CHECKING:
    from preprocess.readers.protocol import AnnotationReader

# A path that leads out of the image folder (absolute, with .. or backslashes), or that no file can have.
UNSAFE_PATH = re.compile(r"^/|^[A-Za-z]:|(^|/)\.\.(/|$)|[\\\0\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Record:
    """A photo with its captions as people wrote them.

    image: the path of its file. split: "" where the annotations name none.
    """

    image: str
    id: str
    split: str
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A photo with captions, as a reader found it: of any types, unchecked.

    where: the file and the place in it, for messages. name: the photo's path in the image folder. captions: a text, or
    a list of texts. id: None is the name. may_repeat: further entries of this photo hold more of its captions.
    """

    where: str
    name: object
    captions: object
    id: object = None
    split: object = None
    may_repeat: bool = False


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that is not used. where: its place. reason: one phrase. kind: what is lost by it.

    "marked" is what the makers of the data set, or its split lists, exclude: it is no fault, and no limit counts it.
    """

    where: str
    reason: str
    kind: Literal["photo", "caption", "marked"]


@dataclass(slots=True)
class Annotations:
    """The records of an annotation file, in its order, and what was left out."""

    records: list[Record] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def read_annotations(path: Path, images: Path, split: str | None, columns: Columns | None = None) -> Annotations:
    """Read an annotation file.

    images: the folder that holds the photos. split: the split of all records, or None for the splits that the file
    names. columns: of tables and JSON rows. Empty captions are kept beside others; tokenization drops them.

    Raises UserError for a file of unknown form or without a photo that has a caption, for an unsafe path, for an id
    that occurs twice, and for a file that names other splits than `split`.
    """
    if not images.is_dir():
        raise UserError(f"{images}: no such image folder; give the folder that holds the photos of {path}")
    content = load_content(path, columns)
    annotations = collect(content, find_reader(content), str(images))
    if split is not None:
        annotations.records = [_in_split(path, record, split) for record in annotations.records]
    return annotations


def read_references(path: Path, split: str) -> list[Record]:
    """The records of one split of an annotation file, with paths relative to the image folder.

    All records of a file without splits belong to the given split. An image that is listed more than once, as in the
    references of AI Challenger, becomes one record: its last entry. Raises UserError as `read_annotations` does.
    """
    content = load_content(path)
    annotations = collect(content, find_reader(content), "", keep_last=True)
    records = [record for record in annotations.records if record.split in ("", split)]
    if not records:
        raise UserError(f"{path}: holds no {split} images; give another --split or another file")
    return [Record(record.image, record.id, split, record.captions) for record in records]


def find_reader(content: Content) -> AnnotationReader:
    """The first registered reader that recognises the content. Raises UserError where none does."""
    readers: list[AnnotationReader] = [ANNOTATION_READERS[name]() for name in ANNOTATION_READERS]
    for reader in readers:
        if reader.recognises(content):
            return reader
    *others, last = [reader.description for reader in readers]
    columns = "name the columns with --image-column and --caption-column, or see docs/data.md"
    raise UserError(
        f"{content.path}: not of a known form: found {describe(content.data)}; "
        f"the known forms are {', '.join(others)} and {last}; {columns}"
    )


# ---- entries -> records


class _BadEntry(Exception):
    """An entry that cannot be used, and why."""


def collect(content: Content, reader: AnnotationReader, images: str = "", keep_last: bool = False) -> Annotations:
    """Check the entries of a reader.

    images: a folder that precedes each path. keep_last: of entries with one id, use the last instead of raising
    UserError. Raises UserError as `read_annotations` does.
    """
    path = content.path
    found = Annotations()
    entries: dict[str, Entry] = {}  # the first entry of each id
    records: dict[str, Record] = {}
    captions: dict[str, list[str]] = {}
    for entry in reader.read(content):
        if isinstance(entry, LeftOut):
            found.left_out.append(entry)
            continue
        try:
            record = _check(entry, images)
        except _BadEntry as bad:
            found.left_out.append(LeftOut(entry.where, str(bad), "photo"))
            continue
        id = record.id
        if id not in records or (keep_last and not entry.may_repeat):
            entries[id], records[id], captions[id] = entry, record, []
        elif not entry.may_repeat:
            raise UserError(f"{path}: image id {id[:60]!r} occurs twice; keep one entry with all its captions")
        elif (record.image, record.split) != (records[id].image, records[id].split):
            raise UserError(f"{entry.where}: image {id[:60]!r} is in two splits, or has two files; keep one of them")
        captions[id] += _texts(entry, found.left_out)
    for id, record in records.items():
        if any(map(str.strip, captions[id])):
            found.records.append(Record(record.image, id, record.split, tuple(captions[id])))
        else:
            found.left_out.append(LeftOut(f"{entries[id].where} ({record.image[-100:]!r})", "no caption", "photo"))
    _check_found(path, found)
    return found


def _check_found(path: Path, found: Annotations) -> None:
    """Raise UserError where no photo has a caption."""
    if found.records:
        return
    if not found.left_out:
        raise UserError(f"{path}: holds no images; give a file with captions")
    first = found.left_out[0]
    where = first.where.removeprefix(f"{path}: ")
    raise UserError(f"{path}: holds no photo with a caption: {where}: {first.reason}; give a file with captions")


def _check(entry: Entry, images: str) -> Record:
    """The photo of an entry, without captions. Raises _BadEntry, and UserError for a path out of the image folder."""
    name = entry.name
    if not isinstance(name, str):
        raise _BadEntry("no name of a photo" if name is None else f"the photo's name is {str(name)[:60]!r}, not text")
    name = name.replace("\\", "/")  # as Windows writes it
    while name.startswith("./"):
        name = name[2:]
    id = name if entry.id is None else entry.id
    if type(id) not in (str, int):  # not isinstance: true is no image id
        raise _BadEntry(f"id {str(id)[:60]!r} is neither text nor an integer")
    id = _short_text(id)
    if not name or not id or UNSAFE_PATH.search(name) or UNSAFE_PATH.search(id):
        raise UserError(
            f"{entry.where}: {id[:60]!r}, {name[:60]!r}: not a path in the image folder; correct or remove the entry"
        )
    return Record(os.path.join(images, name), id, _split_name(entry.split), ())


def _short_text(id: object) -> str:
    try:
        return str(id)
    except ValueError:  # Python refuses to write integers of thousands of digits
        raise _BadEntry("id is a number of too many digits") from None


def _split_name(split: object) -> str:
    """train, val, test, or "" for none."""
    if split is None or split == "":
        return ""
    known = SPLIT_NAMES.get(split.strip().lower()) if isinstance(split, str) else None
    if known is None:
        raise _BadEntry(f"split {str(split)[:60]!r} is none of {', '.join(SPLIT_NAMES)}")
    return known


def _texts(entry: Entry, left_out: list[LeftOut]) -> Iterator[str]:
    """The captions of an entry that are text; null is absent, and others are left out."""
    captions = entry.captions if isinstance(entry.captions, list) else [entry.captions]
    for caption in captions:
        if type(caption) is str:
            yield caption
        elif caption is not None:
            left_out.append(LeftOut(f"{entry.where} ({str(caption)[:60]!r})", "a caption that is not text", "caption"))
        elif len(captions) > 1 or entry.may_repeat:
            left_out.append(LeftOut(entry.where, "a caption that is null", "caption"))


def _in_split(path: Path, record: Record, split: str) -> Record:
    """The record in a split that the user gave. Raises UserError where the file names another."""
    if record.split not in ("", split):
        raise UserError(
            f"{path}: names the split of each photo, such as {record.split} of {record.id[:60]!r}; give it to --source "
            "(or, a Karpathy file, to --karpathy) instead"
        )
    return Record(record.image, record.id, split, record.captions)
