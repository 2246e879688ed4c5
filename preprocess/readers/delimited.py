"""Tables: image,caption (Kaggle's Flickr8k, metadata.csv), filepath<TAB>title, or 1.jpg<TAB>caption."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from preprocess.annotations import Entry, LeftOut
from preprocess.content import Content, Text
from preprocess.folders import has_photo_ending
from preprocess.readers.rows import unpack_captions

DELIMITERS = ("\t", ",", ";")
MAX_LINES = 20  # of one quoted cell: a quote that is never closed must not swallow the rest of the file


class Layout(NamedTuple):
    """How a table is divided. image, caption, split: the numbers of these columns of `width`, the first is 0."""

    delimiter: str
    image: int
    caption: int
    split: int | None
    width: int
    has_header: bool


class DelimitedReader:
    """Reads rows between tabs, commas or semicolons. A header names the columns, in any order.

    Without a header, each row is a photo and its caption. Cells with separators are quoted, as RFC 4180 says.
    """

    description = "a table with the columns image and caption"

    def recognises(self, content: Content) -> bool:
        """Whether a content has this form: see AnnotationReader."""
        return _find_layout(content) is not None

    def read(self, content: Content) -> Iterator[Entry | LeftOut]:
        """Yield an entry for each row: see AnnotationReader."""
        layout = _find_layout(content)
        assert layout is not None and isinstance(content.data, Text)
        delimiter, image, caption, split, width, has_header = layout
        for number, cells in islice(_rows(content.data.lines, delimiter), int(has_header), None):
            where = f"{content.path}: line {number}"
            if caption == width - 1 and len(cells) > width:  # commas that should have been quoted
                cells[caption:] = [delimiter.join(cells[caption:])]
            if len(cells) <= max(image, caption):
                yield LeftOut(where, "a row without the caption column", "caption")
                continue
            own_split = cells[split].strip() if split is not None and split < len(cells) else None
            captions = unpack_captions(cells[caption].strip())
            yield Entry(where, cells[image].strip(), captions, split=own_split, may_repeat=True)


def _find_layout(content: Content) -> Layout | None:
    """The layout by a header, or else by rows that all begin with a photo; None for what is no such table."""
    if not isinstance(content.data, Text):
        return None
    first = next(filter(str.strip, content.data.lines), "")
    for delimiter in DELIMITERS:
        names = [name.strip() for name in _split(first, delimiter)]
        if len(names) > 1 and (found := content.columns.find(names)):
            image, caption, split = found
            split_number = names.index(split) if split else None
            return Layout(
                delimiter, names.index(image), names.index(caption), split_number, len(names), has_header=True
            )
    for delimiter in DELIMITERS[:2]:
        rows = [_split(line, delimiter) for line in content.data.first_lines()]
        if rows and all(len(cells) > 1 and has_photo_ending(cells[0].strip()) for cells in rows):
            return Layout(delimiter, image=0, caption=1, split=None, width=2, has_header=False)
    return None


def _rows(lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row that is not empty, and the number of its line."""
    start = 0
    while start < len(lines):
        if delimiter != "\t" and '"' in lines[start]:
            used, cells = _quoted_row(lines[start : start + MAX_LINES], delimiter)
        else:
            used, cells = 1, _split(lines[start], delimiter)
        if any(cells):
            yield start + 1, cells
        start += used


def _quoted_row(lines: list[str], delimiter: str) -> tuple[int, list[str]]:
    """The number of lines of the row at the head of these lines, and its cells."""
    if f'{delimiter}"' not in f"{delimiter}{lines[0]}":
        return 1, lines[0].split(delimiter)  # quotes within a cell mean nothing
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter)
    try:
        cells = next(reader)
    except csv.Error:  # a carriage return in the row, or a cell of more than 131,072 characters
        return 1, lines[0].split(delimiter)
    if reader.line_num == MAX_LINES and cells[-1].endswith("\n"):  # the quote is not closed
        return 1, lines[0].split(delimiter)
    return reader.line_num, cells


def _split(line: str, delimiter: str) -> list[str]:
    """The cells of a line. Between tabs a cell may be quoted, too, but ends with its line."""
    if delimiter == "\t":
        return [_unquote(cell) for cell in line.split("\t")]
    if '"' in line:
        with contextlib.suppress(csv.Error):  # a carriage return within the line
            return next(csv.reader([line], delimiter=delimiter), [])
    return line.split(delimiter)


def _unquote(cell: str) -> str:
    is_quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")
    return cell[1:-1].replace('""', '"') if is_quoted else cell
