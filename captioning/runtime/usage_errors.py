"""A usage error as one line, from tyro's message: a box with a title, sections between rules, and a last one on --help.

tyro has no public interface to its errors. A section that is not known here is shown in tyro's own words.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

UNWRAPPED = "100000"  # columns of a terminal in which tyro breaks no line
BORDER = re.compile(r"[-─]+╯?")
MISSING_VALUE = re.compile(r"Missing value for argument '(.*)'\. Expected (\d+) values\.")
INVALID_CHOICE = re.compile(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)\.", re.DOTALL)
BAD_VALUE = re.compile(r"Error parsing (.*?): (.*)", re.DOTALL)
WRONG_TYPE = re.compile(
    r"no type matching .* could be instantiated from \[(?P<values>.*?)\]\..*"
    r"|invalid literal for int\(\) with base 10: (?P<integer>.*)"
    r"|could not convert string to float: (?P<number>.*)",
    re.DOTALL,
)


@contextlib.contextmanager
def unwrapped_errors() -> Iterator[None]:
    """Make tyro write each line of an error in one piece, so that no path in it is broken."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = UNWRAPPED
    try:
        yield
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def usage_error(box: str) -> str:
    """What is wrong, in one line. box: what tyro has written to stderr."""
    sections = _sections(box)
    parts = [_sentence(section, sections) for section in sections]
    return "; ".join([*filter(None, parts), "see --help"])


def _sections(box: str) -> list[list[str]]:
    """The lines of each section, without the title and the box, which is drawn in Unicode or ASCII characters."""
    sections: list[list[str]] = [[]]
    for line in box.rstrip("\n").split("\n")[1:]:
        content = (line.removesuffix("│") if line.startswith("│") else line)[2:].rstrip()
        if BORDER.fullmatch(content):
            sections.append([])
        elif content:
            sections[-1].append(content)
    return [section for section in sections if section]


def _sentence(section: list[str], sections: list[list[str]]) -> str:
    """One section in words, or nothing if another one has said it."""
    first = section[0]
    text = "\n".join(section)
    if first.startswith("Missing from "):
        return _missing(section[1:])
    if first.startswith("Unrecognized options:"):
        options = [first.partition(":")[2], *section[1:]]
        return f"unrecognized options: {', '.join(filter(None, map(str.strip, options)))}"
    if first.startswith(("Perhaps you meant:", "Arguments similar to ")):
        names = [line.split()[0] for line in section[1:] if _indent(line) == 4]
        return f"perhaps you meant {' or '.join(names)}"
    if first == "Argument helptext:" or first.startswith("For full helptext"):
        return ""
    if match := MISSING_VALUE.fullmatch(text):
        flag, count = match.groups()
        return f"{flag}: needs {'a value' if count == '1' else f'{count} values'}"
    if match := INVALID_CHOICE.fullmatch(text):
        value, flag, choices = match.groups()
        names = set(choices.replace("'", "").rstrip(",").split(", ")) - {"None"}
        return f"{flag} {value}: must be one of {', '.join(sorted(names))}"  # tyro may give them in any order
    if match := BAD_VALUE.fullmatch(text):
        return _bad_value(*match.groups(), sections)
    return " ".join(text.split())


def _missing(lines: list[str]) -> str:
    """The required options, each with its help text in the line below it."""
    parts: list[str] = []
    for line in lines:
        if _indent(line) == 4 or not parts:
            parts.append(f"{line.strip()} is required")
        else:
            parts[-1] += f" ({line.strip().removesuffix('(required)').strip()})"
    return "; ".join(parts)


def _bad_value(name: str, message: str, sections: list[list[str]]) -> str:
    """A value that cannot be read. The section with the option's help shows its type."""
    option = next((section[1] for section in sections if section[0] == "Argument helptext:"), "")  # --epochs INT
    type_name = re.sub(r"\{None\}\||[{}]", "", option.replace(name, "", 1)).strip()
    match = WRONG_TYPE.fullmatch(message)
    if match and type_name:
        return f"{name}: must be {type_name}, not {' '.join(filter(None, match.groups())) or 'nothing'}"
    return f"{name}: {' '.join(message.split())}"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
