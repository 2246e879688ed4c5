"""Photos on disk: which annotated ones exist, where they are, and which are the same file."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from captioning.errors import UserError
from captioning.runtime.library_errors import reason
from preprocess.annotations import Record
from preprocess.folders import has_photo_ending, walk


@dataclass(frozen=True, slots=True)
class Located:
    """A record, and its file with all links resolved; None if there is no such file."""

    record: Record
    file: str | None


def locate_photos(records: Sequence[Record], folders: Iterable[Path]) -> list[Located]:
    """Find the file of each record.

    A name without an ending (COCO-CN) is that of a photo beside it with one. A name that is there in another case of
    letters, which is the same to Windows and macOS, is that photo if there is only one. A name that is not in its
    image folder is looked for in the folders below it, and used where it is unique. Links are followed: whoever laid
    them may. That an annotation names no path out of its folder has been checked on the text.
    """
    open_folder, find_below = functools.cache(_Folder), functools.cache(_index)
    roots = set(map(str, folders))
    located = []
    for record in records:
        path, name = os.path.split(record.image)
        folder = open_folder(path)
        if name not in folder.files and not has_photo_ending(name):
            name = folder.photos_by_stem.get(name, name)
        if name not in folder.files:
            name = folder.names_by_lower_case.get(name.lower()) or name
        image = os.path.join(path, name)
        if name not in folder.files and path in roots:
            image = find_below(path).get(name) or image
        resolved = open_folder(os.path.dirname(image)).files.get(os.path.basename(image))
        located.append(Located(record if image == record.image else replace(record, image=image), resolved))
    return located


class _Folder:
    """A folder, listed once: that is faster than asking the file system for each of up to 240,000 photos.

    Attributes: files: name -> path without links.
    """

    def __init__(self, path: str):
        self.files = _list_files(path)

    @functools.cached_property
    def photos_by_stem(self) -> dict[str, str]:
        """Name without its ending -> name of the photo: the first of several."""
        names: dict[str, str] = {}
        for name in filter(has_photo_ending, self.files):
            names.setdefault(os.path.splitext(name)[0], name)
        return names

    @functools.cached_property
    def names_by_lower_case(self) -> dict[str, str | None]:
        """Name in lower case -> name of the file; None where several differ only in the case of letters."""
        names: dict[str, str | None] = {}
        for name in self.files:
            names[name.lower()] = None if name.lower() in names else name
        return names


def _list_files(folder: str) -> dict[str, str]:
    """The names of the files in a folder, each with its path without links. Raises UserError if it cannot be read."""
    real_folder = os.path.realpath(folder or ".")
    try:
        with os.scandir(folder or ".") as entries:
            return {
                entry.name: os.path.realpath(entry.path)
                if entry.is_symlink()
                else os.path.join(real_folder, entry.name)
                for entry in entries
                if entry.is_file()
            }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({reason(error)}); check its permissions") from None


def _index(root: str) -> dict[str, str | None]:
    """Name, with and without its ending -> the path of the photo below `root`; None where several have the name."""
    paths: dict[str, str | None] = {}
    for folder, _, files in walk(root):
        for file in filter(has_photo_ending, files):
            for name in (file, os.path.splitext(file)[0]):
                paths[name] = None if name in paths else os.path.join(folder, file)
    return paths


def with_unique_ids(records: list[Record]) -> list[Record]:
    """The records of several files with different ids.

    Files that each count from 0, and folders that each hold 0001.jpg, share ids. If any is shared, every id becomes the
    path of the photo from the folder that holds all of them.
    """
    if len({record.id for record in records}) == len(records):
        return records
    images = {record.image for record in records}
    if len(images) < len(records):  # several files describe one photo
        images_of: dict[str, str] = {}
        for record in records:
            if images_of.setdefault(record.id, record.image) != record.image:
                break
        else:
            return records  # it has one id everywhere: see check_splits
    root = os.path.commonpath([os.path.dirname(os.path.abspath(image)) for image in images])
    return [replace(record, id=os.path.relpath(os.path.abspath(record.image), root)) for record in records]
