"""Annotation files -> records. The format of a file is recognised by its content, not by its name.

The formats are the entries of preprocess.ANNOTATION_READERS: AI Challenger, COCO and Karpathy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from captioning.errors import UserError
from captioning.runtime.library_errors import reason
from preprocess import ANNOTATION_READERS

if TYPE_CHECKING:
    from preprocess.readers.protocol import AnnotationReader

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Record:
    """A photo with its captions as people wrote them. `image` is the path of its file."""

    image: str
    id: str
    split: str
    captions: tuple[str, ...]


def read_annotations(path: Path, images: Path, split: str | None) -> list[Record]:
    """The records of an annotation file, in the order of the file.

    images: the folder that holds the photos. split: the split of all records, or None for a format that names a split
    for every photo. Empty captions are kept; tokenization drops them.

    Raises UserError for a file of unknown format, and for an entry without captions, with an unsafe path or with an id
    that occurs twice.
    """
    if not images.is_dir():
        raise UserError(f"{images}: no such image folder; give the folder that holds the photos of {path}")
    data = read_json(path)
    reader = _find_reader(path, data)
    if reader.has_splits and split is not None:
        raise UserError(f"{path}: {reader.description} files hold their own splits; use --karpathy {path} IMAGES")
    if not reader.has_splits and split is None:
        raise UserError(f"{path}: {reader.description} files hold no splits; use --train {path} IMAGES")
    records: dict[str, Record] = {}
    for record in reader.read(path, data, str(images), split or ""):
        if record.id in records:
            raise UserError(f"{path}: image id {record.id!r} occurs twice; keep one entry with all its captions")
        records[record.id] = record
    if not records:
        raise UserError(f"{path}: holds no images; give a file with captions")
    return list(records.values())


def read_references(path: Path, split: str) -> list[Record]:
    """The records of one split of an annotation file, with paths relative to the image folder.

    All records of a file without splits belong to the given split. An image that is listed more than once, as in the
    references of AI Challenger, becomes one record: its last entry. Raises UserError as `read_annotations` does.
    """
    data = read_json(path)
    reader = _find_reader(path, data)
    by_id = {record.id: record for record in reader.read(path, data, "", split)}
    records = [record for record in by_id.values() if record.split == split]
    if not records:
        raise UserError(f"{path}: holds no {split} images; give another --split or another file")
    return records


def read_json(path: Path) -> object:
    """The content of a JSON file. Raises UserError where it cannot be read or parsed."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give the JSON file (and after it the image folder)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); check the path and its permissions") from None
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: not JSON at {position} ({error.msg}); download or unpack it again") from None
    except (ValueError, RecursionError) as error:  # not Unicode, an integer of too many digits, nested too deeply
        raise UserError(f"{path}: not JSON ({error}); download or unpack it again") from None


def _find_reader(path: Path, data: object) -> AnnotationReader:
    """The first registered reader that recognises the data. Raises UserError where none does."""
    readers: list[AnnotationReader] = [ANNOTATION_READERS[name]() for name in ANNOTATION_READERS]
    for reader in readers:
        if reader.recognises(data):
            return reader
    *others, last = [reader.description for reader in readers]
    raise UserError(
        f"{path}: not an annotation file of a known format: found {_describe(data)}; "
        f"the known formats are {', '.join(others)} and {last}"
    )


def _describe(data: object) -> str:
    """A short description of a JSON value, for error messages."""
    if isinstance(data, dict):
        return f"an object with the keys {sorted(data)[:8]}" if data else "an empty object"
    if data == []:
        return "an empty list"
    if isinstance(data, list) and not isinstance(data[0], list):
        return f"a list whose first entry is {_describe(data[0])}"
    return f"a JSON {type(data).__name__}"
