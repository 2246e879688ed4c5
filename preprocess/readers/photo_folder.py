"""A folder of photos with their captions beside them: 1.jpg and 1.txt, a caption a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from captioning.runtime.photo_formats import is_photo
from preprocess.annotations import Entry, LeftOut
from preprocess.content import Content, Folder, read_text
from preprocess.folders import has_photo_ending, split_in_name


class PhotoFolderReader:
    """Reads folders, also unpacked tars of webdataset's form. A folder named train, val or test says the split."""

    description = "a folder of 1.jpg beside 1.txt"

    def recognises(self, content: Content) -> bool:
        """Whether a content has this form: see AnnotationReader."""
        if not isinstance(content.data, Folder):
            return False
        names = set(content.data.files)
        return any(_text_name(name) in names and _is_photo(content, name) for name in content.data.files)

    def read(self, content: Content) -> Iterator[Entry | LeftOut]:
        """Yield an entry for each photo: see AnnotationReader."""
        assert isinstance(content.data, Folder)
        names = set(content.data.files)
        for name in content.data.files:
            text = _text_name(name)
            where = f"{content.path / name}"
            if name == text:
                continue
            if not _is_photo(content, name):
                yield LeftOut(where, "no photo", "marked")
                continue
            if text not in names:
                yield LeftOut(where, "no caption: no text file beside it", "photo")
                continue
            lines, _ = read_text(Path(content.path, text))
            splits = filter(None, map(split_in_name, PurePosixPath(name).parts[:-1]))
            captions: list[object] = [line.strip() for line in lines.splitlines() if line.strip()]
            yield Entry(where, name, captions, split=next(splits, None))


def _is_photo(content: Content, name: str) -> bool:
    """By its ending, or else by its content. A text is none."""
    return has_photo_ending(name) or (not name.endswith(".txt") and is_photo(content.path / name))


def _text_name(photo: str) -> str:
    return str(PurePosixPath(photo).with_suffix(".txt"))
