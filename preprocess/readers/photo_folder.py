"""A folder of photos with their captions beside them: 1.jpg and 1.txt, a caption a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

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
        return any(has_photo_ending(name) and _text_name(name) in names for name in names)

    def read(self, content: Content) -> Iterator[Entry | LeftOut]:
        """Yield an entry for each photo: see AnnotationReader."""
        assert isinstance(content.data, Folder)
        names = set(content.data.files)
        for name in filter(has_photo_ending, content.data.files):
            text = _text_name(name)
            where = f"{content.path / name}"
            if text not in names:
                yield LeftOut(where, "no caption: no text file beside it", "photo")
                continue
            lines, _ = read_text(Path(content.path, text))
            splits = filter(None, map(split_in_name, PurePosixPath(name).parts[:-1]))
            captions: list[object] = [line.strip() for line in lines.splitlines() if line.strip()]
            yield Entry(where, name, captions, split=next(splits, None))


def _text_name(photo: str) -> str:
    return str(PurePosixPath(photo).with_suffix(".txt"))
