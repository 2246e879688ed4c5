"""Splits of photos: by lists beside the annotations, or by a hash of the id."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from captioning.errors import UserError
from preprocess.annotations import Annotations, LeftOut
from preprocess.content import Text, load_content
from preprocess.folders import is_hidden, photo_stem, split_in_name
from preprocess.photos import Located

MAX_HASH = 2**256


def assign_splits(photos: Sequence[Located], val_share: float, test_share: float) -> list[Located]:
    """Give the photos that have no split one by the hash of their id.

    The split of a photo depends on its id, not on the order of the photos, nor on photos that are added later. val gets
    the smallest hashes, and one photo at least; test the next ones. Photos that are one file, as Hugging Face's cache
    stores equal photos, have the hash of the first.
    """
    first_id: dict[str, str] = {}
    hashes: dict[str, int] = {}
    for photo in photos:
        if not photo.record.split:
            first = first_id.setdefault(photo.file or photo.record.image, photo.record.id)
            hashes[photo.record.id] = int(hashlib.sha256(first.encode()).hexdigest(), 16)
    if not hashes:
        return list(photos)
    val_limit = max(_limit(val_share), min(hashes.values())) if val_share else -1
    test_limit = _limit(val_share) + _limit(test_share) if test_share else -1

    def split_of(hash: int) -> str:
        return "val" if hash <= val_limit else "test" if hash <= test_limit else "train"

    return [
        replace(photo, record=replace(photo.record, split=split_of(hashes[photo.record.id])))
        if photo.record.id in hashes and not photo.record.split
        else photo
        for photo in photos
    ]


def _limit(share: float) -> int:
    return int(Fraction(str(share)) * MAX_HASH)


def check_splits(photos: Sequence[Located]) -> None:
    """Raise UserError for a photo, by its file, or an id that occurs twice."""
    by_file: dict[str, Located] = {}
    ids: set[str] = set()
    for photo in photos:
        record = photo.record
        other = by_file.setdefault(photo.file, photo).record if photo.file else record
        if other.split != record.split:
            raise UserError(
                f"{record.image}: the same photo is in {other.split or 'no split'} (as {other.id!r}) and in "
                f"{record.split or 'no split'} (as {record.id!r}); remove it from one of them"
            )
        if record.id in ids:
            raise UserError(
                f"{record.image}: image id {record.id!r} occurs twice; keep one entry with all its captions"
            )
        ids.add(record.id)


def apply_split_lists(path: Path, annotations: Annotations) -> Annotations:
    """Split the photos of a file without splits by the lists beside it, such as Flickr_8k.trainImages.txt.

    A list is a text file whose name says train, val, dev or test and whose lines name photos of the annotations, with
    or without ending. Photos that are in no list are left out, as the makers of the data set intend. The lists that
    are used are printed.
    """
    if any(record.split for record in annotations.records):
        return annotations
    known = {photo_stem(record.id) for record in annotations.records}
    split_of: dict[str, str] = {}
    used = []
    for file in sorted(path.parent.glob("*.txt")):
        split = split_in_name(file.stem)
        names = _read_list(file, known) if split and file != path else set()
        if split and names:
            used.append(file.name)
            for name in names:
                if split_of.setdefault(name, split) != split:
                    raise UserError(
                        f"{file}: {name} is in the list of {split_of[name]}, too; remove it from one of them"
                    )
    if not used:
        return annotations
    print(f"{path}: splits by the lists beside it: {', '.join(used)}")
    found = Annotations([], list(annotations.left_out))
    for record in annotations.records:
        if split := split_of.get(photo_stem(record.id)):
            found.records.append(replace(record, split=split))
        else:
            found.left_out.append(LeftOut(f"{path}: {record.id!r}", "a photo in none of the split lists", "marked"))
    return found


def _read_list(file: Path, known: set[str]) -> set[str]:
    """The names in a list of photos without their endings; none if it is something else."""
    if is_hidden(file.name):
        return set()
    try:
        content = load_content(file).data
    except UserError:  # some other file of the folder
        return set()
    lines = [line.strip() for line in content.lines if line.strip()] if isinstance(content, Text) else []
    names = {photo_stem(line) for line in lines}
    return names if names and 10 * len(names & known) >= 9 * len(names) else set()
