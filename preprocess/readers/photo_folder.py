"""A folder of photos with captions beside them: 1.jpg and 1.txt, a caption a line, or 1.json, {"caption": ...}."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from captioning.errors import UserError
from captioning.runtime.photo_formats import is_photo
from preprocess.annotations import Entry, LeftOut
from preprocess.columns import Columns
from preprocess.content import Content, Folder, read_text
from preprocess.folders import CAPTION_ENDINGS, has_photo_ending, split_in_folders
from preprocess.readers.rows import unpack_captions

NO_CAPTION = "no caption: no text file beside it, nor JSON that has one"


class PhotoFolderReader:
    """Reads folders, also unpacked tars of webdataset's form. A folder named train, val or test says the split."""

    description = "a folder of 1.jpg beside 1.txt or 1.json"

    def recognises(self, content: Content) -> bool:
        """Whether a content has this form: see AnnotationReader."""
        if not isinstance(content.data, Folder):
            return False
        names = set(content.data.files)
        return any(
            _is_photo(content.path / name)
            for name in content.data.files
            if not name.endswith(CAPTION_ENDINGS) and not names.isdisjoint(_beside(name))
        )

    def read(self, content: Content) -> Iterator[Entry | LeftOut]:
        """Yield an entry for each photo: see AnnotationReader. A text file precedes a JSON file unless it is empty."""
        assert isinstance(content.data, Folder)
        names = set(content.data.files)
        for name in content.data.files:
            if name.endswith(CAPTION_ENDINGS):
                continue
            where = str(content.path / name)
            if not _is_photo(content.path / name):
                yield LeftOut(where, "no photo", "marked")
                continue
            files = [Path(content.path, other) for other in _beside(name) if other in names]
            captions = next(filter(None, (_captions_in(file, content.columns) for file in files)), None)
            if captions is None:
                yield LeftOut(where, NO_CAPTION, "photo")
                continue
            yield Entry(where, name, captions, split=split_in_folders(name))


def _is_photo(file: Path) -> bool:
    """By its ending, or else by its content: only files without a photo's ending are opened."""
    return has_photo_ending(file.name) or is_photo(file)


def _beside(photo: str) -> list[str]:
    """The files that may hold the captions of a photo."""
    return [os.path.splitext(photo)[0] + ending for ending in CAPTION_ENDINGS]


def _captions_in(file: Path, columns: Columns) -> object:
    """The captions in a file: the lines of a text, or what a JSON object has under the name of a caption."""
    try:
        text, _ = read_text(file)
    except UserError:  # one file of many: its photo is left out
        return None
    if file.suffix == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return data if isinstance(data, (str, list)) else None
    column = columns.find_caption(list(data))
    return unpack_captions(data[column]) if column else None
