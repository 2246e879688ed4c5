"""Flickr30k's results.csv: image_name| comment_number| comment"""

from __future__ import annotations

from collections.abc import Iterator

from preprocess.annotations import Entry, LeftOut
from preprocess.content import Content, Text


class Flickr30kReader:
    """Reads results.csv of Flickr30k (Young et al., 2014), as Kaggle has it: columns between `|`, no quotes.

    One of its 158,915 rows lacks the separator before its caption. It is left out, like any row without a caption.
    """

    description = "Flickr30k's results.csv"

    def recognises(self, content: Content) -> bool:
        """Whether a content has this form: see AnnotationReader."""
        return _columns(content) is not None

    def read(self, content: Content) -> Iterator[Entry | LeftOut]:
        """Yield an entry for each row: see AnnotationReader."""
        columns = _columns(content)
        assert columns is not None and isinstance(content.data, Text)
        image, caption = columns
        for number, line in enumerate(content.data.lines[1:], 2):
            if not line.strip():
                continue
            cells = [cell.strip() for cell in line.split("|", max(columns))]
            where = f"{content.path}: line {number}"
            if len(cells) <= max(columns):
                yield LeftOut(where, "a row without the caption column", "caption")
            else:
                yield Entry(where, cells[image], cells[caption], may_repeat=True)


def _columns(content: Content) -> tuple[int, int] | None:
    """The numbers of the columns of photo and caption."""
    if not isinstance(content.data, Text) or "|" not in (content.data.lines or [""])[0]:
        return None
    names = [name.strip() for name in content.data.lines[0].split("|")]
    found = content.columns.find(names)
    return (names.index(found[0]), names.index(found[1])) if found else None
