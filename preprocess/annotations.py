"""Annotation files -> records. AI Challenger, COCO and Karpathy JSON are told apart by their content.

AI Challenger   [{"image_id": "8f00.jpg", "caption": ["...", ...]}, ...]
COCO            {"images": [{"id": 9, "file_name": "9.jpg"}], "annotations": [{"image_id": 9, "caption": "..."}]}
Karpathy        {"images": [{"filename": "9.jpg", "split": "train", "sentences": [{"raw": "..."}]}]}
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from captioning.errors import UserError

SPLITS = ("train", "val", "test")
FORMS = "the known forms are AI Challenger, COCO captions and Karpathy"

# A path out of the image folder (absolute, with .., with backslashes), or one that no file can have.
UNSAFE = re.compile(r"^/|^[A-Za-z]:|(^|/)\.\.(/|$)|[\\\0\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Record:
    """A photo with its captions as people wrote them. `image` is the path of its file."""

    image: str
    id: str
    split: str
    captions: tuple[str, ...]


def read_annotations(path: Path, images: Path, split: str | None) -> list[Record]:
    """The records of an annotation file, in its order; the photos lie in the folder `images`.

    `split` is that of the whole file, or None for Karpathy's form, which names a split for every photo.
    Empty captions stay in; tokenising drops them. Raises UserError for a file that is none of ours, and for
    an entry without captions, with an unsafe path or with the id of another.
    """
    if not images.is_dir():
        raise UserError(f"{images}: no such image folder; give the folder that holds the photos of {path}")
    data = read_json(path)
    read = _reader(path, data)
    if read is _read_karpathy and split is not None:
        raise UserError(f"{path}: in Karpathy's form, which holds its own splits; use --karpathy {path} IMAGES")
    if read is not _read_karpathy and split is None:
        raise UserError(f"{path}: not in Karpathy's form (no 'sentences'); use --train {path} IMAGES")
    records, seen = [], set()
    for record in read(path, data, str(images), split):
        if record.id in seen:
            raise UserError(f"{path}: image id {record.id!r} occurs twice; keep one entry with all its captions")
        seen.add(record.id)
        records.append(record)
    if not records:
        raise UserError(f"{path}: holds no images; give a file with captions")
    return records


def read_references(path: Path, split: str) -> list[Record]:
    """The photos that an annotation file is about, without their folder; of Karpathy's form those of the split.

    An image that is listed more than once, as in AI Challenger's own references, is one. Raises UserError as
    `read_annotations` does.
    """
    data = read_json(path)
    records = {record.id: record for record in _reader(path, data)(path, data, "", split)}
    found = [record for record in records.values() if record.split == split]
    if not found:
        raise UserError(f"{path}: holds no {split} images; give another --split or another file")
    return found


def read_json(path: Path) -> object:
    """What a JSON file holds. Raises UserError."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give the JSON file (and after it the image folder)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: not JSON at {place} ({error.msg}); download or unpack it again") from None
    except (ValueError, RecursionError) as error:  # not unicode, a monstrous number, a thousand brackets
        raise UserError(f"{path}: not JSON ({error}); download or unpack it again") from None


def _reader(path: Path, data: object) -> Callable[..., Iterator[Record]]:
    """The reader for the form that `data` has."""
    if _first_has(data, "image_id") and _first_has(data, "caption"):
        return _read_ai_challenger
    if isinstance(data, dict) and isinstance(data.get("images"), list) and isinstance(data.get("annotations"), list):
        return _read_coco
    if isinstance(data, dict) and _first_has(data.get("images"), "sentences"):
        return _read_karpathy
    raise UserError(f"{path}: no annotation file of a known form: found {_describe(data)}; {FORMS}")


def _first_has(entries: object, key: str) -> bool:
    return isinstance(entries, list) and bool(entries) and isinstance(entries[0], dict) and key in entries[0]


def _describe(data: object) -> str:
    """What a JSON file holds, in a few words."""
    if isinstance(data, dict):
        return f"an object with the keys {sorted(data)[:8]}" if data else "an empty object"
    if isinstance(data, list) and data and not isinstance(data[0], list):
        return f"a list whose first entry is {_describe(data[0])}"
    return "an empty list" if data == [] else f"a JSON {type(data).__name__}"


def _read_ai_challenger(path: Path, data: list, images: str, split: str) -> Iterator[Record]:
    for number, entry in enumerate(data):
        name = _field(path, "entry", number, entry, "image_id", str)
        captions = _field(path, "entry", number, entry, "caption", list)
        yield _record(f"{path}: entry {number}", images, name, name, split, captions)


def _read_coco(path: Path, data: dict, images: str, split: str) -> Iterator[Record]:
    captions: dict[int, list[str]] = {}
    for number, entry in enumerate(data["images"]):
        captions[_field(path, "image", number, entry, "id", int)] = []
    for number, entry in enumerate(data["annotations"]):
        if isinstance(entry, dict) and "caption" not in entry:
            raise UserError(f"{path}: annotation {number} has no caption; give captions_*.json, not instances_*.json")
        image = _field(path, "annotation", number, entry, "image_id", int)
        if image not in captions:
            raise UserError(f"{path}: annotation {number} is of image {image}, which 'images' does not list; mend it")
        captions[image].append(entry["caption"])
    for number, entry in enumerate(data["images"]):
        name = _field(path, "image", number, entry, "file_name", str)
        yield _record(f"{path}: image {number}", images, name, str(entry["id"]), split, captions[entry["id"]])


def _read_karpathy(path: Path, data: dict, images: str, split: None) -> Iterator[Record]:
    for number, entry in enumerate(data["images"]):
        name = _field(path, "image", number, entry, "filename", str)
        sentences = _field(path, "image", number, entry, "sentences", list)
        place = f"{path}: image {number}"
        split = _field(path, "image", number, entry, "split", str)
        split = "train" if split == "restval" else split  # COCO's left-over val photos: everybody trains on them
        if split not in SPLITS:
            raise UserError(f"{place} ({name!r}): split {split!r}; it must be train, restval, val or test")
        name = os.path.join(str(entry.get("filepath", "")), name)
        captions = [_sentence(place, sentence) for sentence in sentences]
        yield _record(place, images, name, str(entry.get("cocoid", entry["filename"])), split, captions)


def _sentence(place: str, sentence: object) -> str:
    """A sentence as it was written; its tokens side by side where only they are kept."""
    if isinstance(sentence, dict) and isinstance(sentence.get("raw"), str):
        return sentence["raw"]
    if isinstance(sentence, dict) and isinstance(sentence.get("tokens"), list):
        return " ".join(map(str, sentence["tokens"]))
    raise UserError(f"{place}: a sentence with neither 'raw' text nor 'tokens'; mend or remove it")


def _field(path: Path, kind: str, number: int, entry: object, key: str, wanted: type) -> object:
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is not wanted:  # not isinstance: true is no image id
        found = f"{key!r} is {str(value)[:60]!r}" if value is not None else f"no {key!r}"
        kinds = {str: "text", int: "a whole number", list: "a list"}
        raise UserError(f"{path}: {kind} {number}: {found}; {key!r} must be {kinds[wanted]}")
    return value


def _record(place: str, images: str, name: str, id: str, split: str, captions: list) -> Record:
    """A record, once its path is safe and its captions are text and not all empty."""
    if not name or UNSAFE.search(name) or UNSAFE.search(id):
        raise UserError(f"{place}: {id!r}, {name!r}: no path inside the image folder; mend or remove the entry")
    if any(type(caption) is not str for caption in captions):
        raise UserError(f"{place} ({name!r}): a caption that is not text; mend or remove it")
    if not any(map(str.strip, captions)):
        raise UserError(f"{place} ({name!r}): no caption; add one or remove the entry")
    return Record(os.path.join(images, name), id, split, tuple(captions))
