"""Rows of JSON, or of JSON Lines: [{"image": "1.jpg", "caption": "..."}, ...]

Hugging Face's metadata.jsonl (file_name, text), the lists of BLIP and LAVIS (a caption a row, or several in a list),
and rows of the same columns with a split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from preprocess.annotations import Entry
from preprocess.content import Content
from preprocess.readers.checks import FIRST_ENTRIES, as_dict


class RowsReader:
    """Reads lists of objects that hold a photo's path and a caption, or a list of captions."""

    description = "JSON rows (or lines) of photo and caption"

    def recognises(self, content: Content) -> bool:
        """Whether a content has this form: see AnnotationReader."""
        return _columns(content) is not None

    def read(self, content: Content) -> Iterator[Entry]:
        """Yield an entry for each row: see AnnotationReader."""
        columns = _columns(content)
        assert columns is not None
        image, caption, split = columns
        for index, row in enumerate(map(as_dict, _rows(content))):
            where = f"{content.path}: row {index + 1}"
            own_split = row.get(split) if split else None
            yield Entry(where, row.get(image), unpack_captions(row.get(caption)), split=own_split, may_repeat=True)


def unpack_captions(value: object) -> object:
    """The captions of a cell: the texts of sentence objects, or of a list that is written as JSON; else the cell."""
    if isinstance(value, str) and value[:2] in ('["', "['"):  # nlphuji/flickr30k has such cells
        try:
            texts = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else value
    if isinstance(value, list):
        return [_text(item) for item in value]
    return value


def _text(item: object) -> object:
    return item["raw"] if isinstance(item, dict) and isinstance(item.get("raw"), str) else item


def _rows(content: Content) -> list[object]:
    """The rows: a file of one line is a single object."""
    if isinstance(content.data, dict):
        return [content.data]
    return content.data if isinstance(content.data, list) else []


def _columns(content: Content) -> tuple[str, str, str | None] | None:
    """The columns of the first rows that have them."""
    for row in _rows(content)[:FIRST_ENTRIES]:
        if isinstance(row, dict) and (columns := content.columns.find(list(row))):
            return columns
    return None
