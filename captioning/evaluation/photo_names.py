"""Which photo a results file means by an image_id: the id, a path that ends like the photo's, or the same number.

Results of other systems name a photo in many ways: 9, 000000000009, COCO_val2014_000000000009.jpg, /data/coco/9.jpg.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from captioning.errors import UserError
from captioning.runtime.files import atomic_text
from preprocess.captions import Photo
from preprocess.content import read_json
from preprocess.folders import photo_stem

NUMBER = re.compile(r"(?:COCO_[a-z0-9]+_)?0*(\d+)")  # COCO's files of 2014 are named COCO_val2014_000000000009.jpg
LISTED = 1000  # characters of an error message for names that fit no photo; all others go to a file


class Match(NamedTuple):
    """The photos that a name fits."""

    photos: list[Photo]  # none, one, or several that the name does not tell apart
    way: str  # how the name fits them


class PhotoFinder:
    """Finds a photo by its id, else by the end of its path, else by its number."""

    def __init__(self, photos: Iterable[Photo]):
        self._by_id: dict[str, Photo] = {}
        self._by_file: defaultdict[str, list[Photo]] = defaultdict(list)
        self._by_stem: defaultdict[str, list[Photo]] = defaultdict(list)
        self._by_number: defaultdict[str, list[Photo]] = defaultdict(list)
        self._by_file_number: defaultdict[str, list[Photo]] = defaultdict(list)
        for photo in photos:
            self._by_id[photo.id] = photo
            paths = {photo.id, photo.image}
            for file in {PurePosixPath(path).name for path in paths}:
                self._by_file[file].append(photo)
            for stem in {photo_name(path) for path in paths}:
                self._by_stem[stem].append(photo)
            if photo.id.isdecimal():
                self._by_number[_number(photo.id)].append(photo)
            for number in {_number(photo_name(path)) for path in paths} - {""}:
                self._by_file_number[number].append(photo)

    def find(self, name: str) -> Match:
        """The photo of this name, by the first way that fits any."""
        if name in self._by_id:
            return Match([self._by_id[name]], "id")
        match = self.find_file(name)
        if match.photos:
            return match
        number = _number(photo_name(_posix(name)))
        return Match(self._by_number.get(number) or self._by_file_number.get(number) or [], "number")

    def find_file(self, path: str) -> Match:
        """The photo whose id or path ends like this one; of several, that with which it shares most folders."""
        path = _posix(path)
        for way, photos in (
            ("file name", self._by_file.get(PurePosixPath(path).name)),
            ("file name without its ending", self._by_stem.get(photo_name(path))),
        ):
            if photos:
                shared = [_shared_folders(path, photo) for photo in photos]
                nearest = [photo for photo, folders in zip(photos, shared, strict=True) if folders == max(shared)]
                return Match(nearest, "end of the path" if max(shared) else way)
        return Match([], "")


def photo_name(path: str) -> str:
    """The file name without its folder and, if it is that of a photo, without its ending."""
    file = PurePosixPath(path)
    return photo_stem(file.name)


def _posix(path: str) -> str:
    """The path with / between its parts, also one of Windows."""
    return path.replace("\\", "/")


def _number(name: str) -> str:
    """The digits of a number without leading zeros, also of a file of COCO 2014; "" of another name."""
    match = NUMBER.fullmatch(name)
    return match[1] if match else ""


def _shared_folders(path: str, photo: Photo) -> int:
    """The number of folders, counted from the file, that the path shares with the photo's id or its path."""
    folders = PurePosixPath(path).parts[-2::-1]
    counts = []
    for other in (photo.id, photo.image):
        pairs = zip(folders, PurePosixPath(other).parts[-2::-1], strict=False)
        counts.append(len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))))
    return max(counts)


def check_found(path: Path, names: str, photo: str, matches: dict[str, Match], remedy: str) -> None:
    """Raise UserError if a name fits no photo, or several. All such names are in the message, or else in a file.

    path: the file that is at fault. names, photo: what is looked for, and in which of its things, in words.
    """
    faults = {
        f"fit no {photo}": [name for name, match in matches.items() if not match.photos],
        f"fit several {photo}s": [name for name, match in matches.items() if len(match.photos) > 1],
    }
    parts = [
        f"{len(found):,} of {len(matches):,} {names} {fault}: {_listing(path, fault.replace(' ', '_'), found)}"
        for fault, found in faults.items()
        if found
    ]
    if parts:
        raise UserError(f"{path}: {'; '.join([*parts, remedy])}")


def _listing(path: Path, fault: str, names: Sequence[str]) -> str:
    """The names, separated by commas. If they are long, only the first ones, and all in a file in this folder."""
    text = ", ".join(names)
    if len(text) <= LISTED:
        return text
    file = Path(f"{path.stem}.{fault}.txt")
    with atomic_text(file) as lines:
        lines.writelines(f"{name}\n" for name in names)
    return f"{text[: LISTED // 10].rsplit(', ', 1)[0]}, ... (all are in {file})"


def read_image_info(path: Path) -> list[Photo]:
    """Photos without captions, with the ids that a file of COCO gives them, such as image_info_test2017.json.

    Raises UserError if the file has another form.
    """
    data = read_json(path)
    images = data.get("images") if isinstance(data, dict) else None
    photos = {}
    for index, entry in enumerate(images if isinstance(images, list) else []):
        name, id = (entry.get(key) if isinstance(entry, dict) else None for key in ("file_name", "id"))
        if type(name) is not str or type(id) not in (int, str) or str(id) in photos:
            raise UserError(f"{path}: image {index} has no file_name, or no id of its own; download the file again")
        photos[str(id)] = Photo(name, str(id), "", ())
    if not photos:
        raise UserError(f"{path}: has no list of images; give COCO's image_info_test2017.json, or an annotation file")
    return list(photos.values())
