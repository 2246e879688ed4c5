"""What a file of annotations holds: JSON, JSON Lines or other text, in UTF-8, UTF-16 or GB18030."""

from __future__ import annotations

import codecs
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from captioning.errors import UserError
from captioning.runtime.library_errors import reason
from preprocess.columns import Columns
from preprocess.folders import walk
from preprocess.unpack import is_parquet, read_parquet


@dataclass(frozen=True, slots=True)
class Text:
    """The lines of a text that is not JSON, without their ends."""

    lines: list[str]

    def first_lines(self, count: int = 5) -> list[str]:
        """The first lines that are not empty."""
        return [line for line in self.lines[:1000] if line.strip()][:count]


@dataclass(frozen=True, slots=True)
class Folder:
    """The files below a folder, with / between the parts of their paths; and those that were passed over as hidden."""

    files: list[str]
    hidden: list[str]


@dataclass(frozen=True, slots=True)
class Content:
    """What `path` holds. data: parsed JSON (a list of objects for JSON Lines and Parquet), Text, or Folder."""

    path: Path
    data: object
    columns: Columns = field(default_factory=Columns)


def load_content(path: Path, columns: Columns | None = None, unpacked: Path | None = None) -> Content:
    """Read and parse a file or list a folder. unpacked: where photos inside a Parquet file are written.

    Raises UserError where it cannot be read, and for JSON that breaks off or is malformed.
    """
    columns = columns or Columns()
    if path.is_dir():
        return Content(path, _list_folder(path), columns)
    if is_parquet(path):
        return Content(path, read_parquet(path, columns, unpacked), columns)
    text, encoding = read_text(path)
    if encoding not in ("utf-8", "utf-8-sig"):
        print(f"{path}: read as {encoding.upper()}; it is not UTF-8")
    return Content(path, _parse(path, text), columns)


def _list_folder(path: Path) -> Folder:
    found = Folder([], [])
    for folder, _, files in walk(str(path), found.hidden):
        relative = os.path.relpath(folder, path)
        found.files.extend(files if relative == "." else [f"{relative}/{file}" for file in files])
    return found


def read_text(path: Path) -> tuple[str, str]:
    """The text of a file and its encoding. Raises UserError where it cannot be read or is no text."""
    return _decode(path, read_bytes(path))


def read_json(path: Path) -> object:
    """The content of a JSON file. Raises UserError where it cannot be read or parsed."""
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise _not_json(path, error) from None


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises UserError where it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give a file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); check the path and its permissions") from None


def _decode(path: Path, data: bytes) -> tuple[str, str]:
    """The text of a file, and the name of its encoding."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encodings = ["utf-32"]
    elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings = ["utf-16"]
    elif data[:2].count(0) == 1:  # an ASCII character in UTF-16, which no other text begins with
        encodings = ["utf-16-be" if data[0] == 0 else "utf-16-le"]
    else:
        encodings = ["utf-8-sig", "gb18030"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if encoding != "gb18030" or _is_chinese(text):
            return text, encoding
    raise UserError(f"{path}: neither UTF-8 nor UTF-16 nor GB18030 text; give a text file, or save it as UTF-8")


def _is_chinese(text: str) -> bool:
    """Whether at least 90 % of the characters beyond ASCII are common Chinese ones.

    GB18030 decodes nearly every text of a European encoding, too, but to rare characters.
    """
    foreign = [character for character in text if ord(character) > 127]
    common = sum(len(character.encode("gb2312", "ignore")) == 2 for character in foreign)
    return common >= 0.9 * len(foreign)


def _parse(path: Path, text: str) -> object:
    """Parsed JSON, the list of the rows of JSON Lines, or Text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        lines = text.split("\n")  # not splitlines: JSON strings and captions may hold U+2028
        if _is_object(next(filter(str.strip, lines), "")):
            return [_json_or_none(line) for line in lines if line.strip()]
        if text.lstrip()[:1] in ("{", "["):
            raise _not_json(path, error) from None
        return Text([line.rstrip("\r") for line in lines])
    except (ValueError, RecursionError) as error:
        raise _not_json(path, error) from None


def _not_json(path: Path, error: ValueError | RecursionError) -> UserError:
    """The error for a file that the json module has refused."""
    if isinstance(error, json.JSONDecodeError):
        problem = f"not JSON at line {error.lineno}, column {error.colno} ({error.msg})"
    else:  # not Unicode, an integer of too many digits, nested too deeply
        problem = f"not JSON ({reason(error)})"
    return UserError(f"{path}: {problem}; download or unpack it again")


def _is_object(line: str) -> bool:
    return isinstance(_json_or_none(line), dict)


def _json_or_none(line: str) -> object:
    """The parsed line, or None for one that is not JSON: as a row, it is left out and listed."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def describe(data: object) -> str:
    """A short description of a content, for error messages."""
    if isinstance(data, Folder):
        names = [name[:60] for name in data.files[:3]]
        return f"a folder of {len(data.files):,} files, such as {names}" if names else "an empty folder"
    if isinstance(data, Text):
        lines = data.first_lines(1)
        return f"text whose first line is {lines[0].strip()[:60]!r}" if lines else "an empty file"
    if isinstance(data, dict):
        return f"an object with the keys {[str(key)[:30] for key in sorted(data)[:8]]}" if data else "an empty object"
    if data == []:
        return "an empty list"
    if isinstance(data, list) and not isinstance(data[0], list):
        return f"a list whose first entry is {describe(data[0])}"
    return f"a JSON {type(data).__name__}"
