"""captions.jsonl: one line per photo, the only file that the later stages read words from.

    {"image": "photos/1.jpg", "id": "1", "split": "train", "captions": [["a", "dog"], ["one", "brown", "dog"]]}

`image` is an absolute path, or a path relative to the folder of captions.jsonl, whatever folder a command runs in.
Files of earlier versions have paths relative to the folder that `python -m preprocess` ran in, usually one above the
data folder. So where the photo's folder is not found from the file's own, it is looked for from each folder above it,
and then from the working directory.

English data sets also have texts.jsonl, {"id": "1", "texts": ["A dog.", "One brown dog!"]}: their captions as they were
written, which scores by coco-caption's tokens need.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from captioning.errors import UserError
from captioning.runtime.files import atomic_text
from captioning.runtime.library_errors import reason
from preprocess.annotations import Record
from preprocess.folders import SPLITS

CAPTIONS_FILE = "captions.jsonl"
TEXTS_FILE = "texts.jsonl"
KEYS = ["image", "id", "split", "captions"]


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo with its tokenized captions."""

    image: str
    id: str
    split: str
    captions: tuple[tuple[str, ...], ...]


def stored_path(image: str, folder: str) -> str:
    """The path that captions.jsonl in `folder` has for a photo: one that is not absolute is told from `folder`."""
    if os.path.isabs(image):
        return image
    photos, name = os.path.split(image)
    return os.path.join(_stored_folder(photos, folder), name)


@functools.cache
def _stored_folder(photos: str, folder: str) -> str:
    relative = os.path.relpath(photos or ".", folder)
    try:
        if os.path.samefile(os.path.join(folder, relative), photos or "."):
            return "" if relative == "." else relative
    except OSError:
        pass
    return os.path.abspath(photos)  # `..` of a linked data folder leads elsewhere


def write_captions(path: Path, photos: Iterable[Photo]) -> None:
    """Write the photos, one line each. If iterating over `photos` raises, the file at `path` is unchanged."""
    encode = json.JSONEncoder(ensure_ascii=False).encode
    with atomic_text(path) as file:
        for photo in photos:
            line = {"image": photo.image, "id": photo.id, "split": photo.split, "captions": photo.captions}
            file.write(encode(line) + "\n")


def write_texts(path: Path, records: Iterable[Record]) -> None:
    """Write the captions of the records as they were written, one line each."""
    encode = json.JSONEncoder(ensure_ascii=False).encode
    with atomic_text(path) as file:
        for record in records:
            file.write(encode({"id": record.id, "texts": record.captions}) + "\n")


def read_texts(folder: Path, ids: Iterable[str]) -> dict[str, tuple[str, ...]] | None:
    """Read the captions of photos as they were written from `folder`/texts.jsonl, by photo.

    Returns None where the file is missing or lacks a photo. Raises UserError where it is damaged.
    """
    path = folder / TEXTS_FILE
    wanted = set(ids)
    texts: dict[str, tuple[str, ...]] = {}
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                id, captions = _parse_texts(f"{path}:{number}", line)
                if id in wanted:
                    texts[id] = captions
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); check the path and its permissions") from None
    return texts if len(texts) == len(wanted) else None


def _parse_texts(location: str, line: bytes) -> tuple[str, tuple[str, ...]]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        data = None
    is_valid = isinstance(data, dict) and data.keys() == {"id", "texts"} and isinstance(data["texts"], list)
    if not is_valid or not all(isinstance(text, str) for text in [data["id"], *data["texts"]]):
        raise UserError(f"{location}: not an object with the keys id, texts; delete the file, or preprocess again")
    return data["id"], tuple(data["texts"])


def read_captions(folder: Path) -> Iterator[Photo]:
    """Yield the photos of `folder`/captions.jsonl in the order of the file; equal words are the same object.

    Paths are absolute, or relative to the working directory.

    Raises UserError where the file is missing or empty, a line is malformed, or an id occurs twice.
    """
    path = folder / CAPTIONS_FILE
    seen: set[str] = set()
    photo_folder = functools.cache(functools.partial(_photo_folder, str(folder)))
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                photo = _parse_line(f"{path}:{number}", line)
                if not os.path.isabs(photo.image):
                    photos, name = os.path.split(photo.image)
                    photo = replace(photo, image=os.path.join(photo_folder(photos), name))
                if photo.id in seen:
                    raise UserError(f"{path}:{number}: id {photo.id!r} occurs twice; remove one of its lines")
                seen.add(photo.id)
                yield photo
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make it with: python -m preprocess {folder}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); check the path and its permissions") from None
    if not seen:
        raise UserError(f"{path}: is empty; make it again with: python -m preprocess {folder} --overwrite")


def _photo_folder(folder: str, photos: str) -> str:
    """The folder of photos whose path in captions.jsonl is `photos`: see the head of this module."""
    own = os.path.join(folder, photos) if photos else folder
    if not photos or os.path.isdir(own):
        short = os.path.normpath(own)  # data/x/../../photos is photos, unless data/x is a link
        return short if os.path.isdir(short) and os.path.samefile(short, own) else own
    above = (os.path.join(parent, photos) for parent in Path(os.path.abspath(folder)).parents)
    found = next(filter(os.path.isdir, above), photos if os.path.isdir(photos) else own)
    inside = os.path.relpath(found)
    return found if inside.startswith("..") else inside


def _parse_line(location: str, line: bytes) -> Photo:
    """The photo of one line. location: the file and the number of the line, for error messages."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{location}: not a line of JSON; correct it, or run python -m preprocess again") from None
    if not isinstance(data, dict) or data.keys() != set(KEYS):
        raise UserError(f"{location}: not an object with the keys {', '.join(KEYS)}; correct it")
    image, id, split, captions = (data[key] for key in KEYS)
    if not (isinstance(image, str) and isinstance(id, str) and image and id):
        raise UserError(f"{location}: image and id must be text, and not empty; correct it")
    if split not in SPLITS:
        raise UserError(f"{location}: split {split!r} is none of {', '.join(SPLITS)}; correct it")
    try:
        return Photo(image, id, split, _parse_captions(captions))
    except ValueError as error:
        raise UserError(f"{location}: {error}; correct or remove it") from None


def _parse_captions(captions: object) -> tuple[tuple[str, ...], ...]:
    """Raises ValueError unless the captions are a list of lists of words."""
    if not isinstance(captions, list) or not captions:
        raise ValueError("captions must be a list of at least one caption")
    if not all(isinstance(words, list) and words and all(words) for words in captions):
        raise ValueError("a caption must be a list of at least one word, none of them empty")
    try:
        return tuple(tuple(map(sys.intern, words)) for words in captions)
    except TypeError:
        raise ValueError("a word is not text") from None
