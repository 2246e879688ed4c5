"""captions.jsonl: a line an image, the one file that the later stages read captions from.

    {"image": "photos/1.jpg", "id": "1", "split": "train", "captions": [["a", "dog"], ["one", "brown", "dog"]]}

`image` is a path from the folder the command ran in, or absolute.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from captioning.errors import UserError
from captioning.runtime.files import atomic_text
from preprocess.annotations import SPLITS

CAPTIONS_FILE = "captions.jsonl"
KEYS = ["image", "id", "split", "captions"]


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo with its captions, cut into words."""

    image: str
    id: str
    split: str
    captions: tuple[tuple[str, ...], ...]


def write_captions(path: Path, photos: Iterable[Photo]) -> None:
    """Write the photos as they come, a line each. When `photos` raises, `path` stays as it was."""
    encode = json.JSONEncoder(ensure_ascii=False).encode
    with atomic_text(path) as file:
        for photo in photos:
            line = {"image": photo.image, "id": photo.id, "split": photo.split, "captions": photo.captions}
            file.write(encode(line) + "\n")


def read_captions(folder: Path) -> Iterator[Photo]:
    """The photos of `folder`/captions.jsonl, one at a time, in its order; equal words are one object.

    Raises UserError where the file is missing or empty, where a line is malformed, and for an id that
    occurs twice.
    """
    path = folder / CAPTIONS_FILE
    seen: set[str] = set()
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                photo = _photo(f"{path}:{number}", line)
                if photo.id in seen:
                    raise UserError(f"{path}:{number}: id {photo.id!r} occurs twice; remove one of its lines")
                seen.add(photo.id)
                yield photo
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make it with: python -m preprocess {folder}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    if not seen:
        raise UserError(f"{path}: is empty; make it again with: python -m preprocess {folder} --overwrite")


def _photo(place: str, line: bytes) -> Photo:
    """The photo of one line; `place` is its file and number."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{place}: not a line of JSON; mend it, or run python -m preprocess again") from None
    if not isinstance(data, dict) or data.keys() != set(KEYS):
        raise UserError(f"{place}: not an object with the keys {', '.join(KEYS)}; mend it")
    image, id, split, captions = (data[key] for key in KEYS)
    if not (isinstance(image, str) and isinstance(id, str) and image and id):
        raise UserError(f"{place}: image and id must be text, and not empty; mend it")
    if split not in SPLITS:
        raise UserError(f"{place}: split {split!r} is none of {', '.join(SPLITS)}; mend it")
    try:
        return Photo(image, id, split, _captions(captions))
    except ValueError as error:
        raise UserError(f"{place}: {error}; mend or remove it") from None


def _captions(captions: object) -> tuple[tuple[str, ...], ...]:
    if not isinstance(captions, list) or not captions:
        raise ValueError("captions must be a list of at least one caption")
    if not all(isinstance(words, list) and words and all(words) for words in captions):
        raise ValueError("a caption must be a list of at least one word, none of them empty")
    try:
        return tuple([tuple(map(sys.intern, words)) for words in captions])
    except TypeError:
        raise ValueError("a word that is not text") from None
