"""Recipes: files of flags that --recipe adds to a command line. Flags that are typed win.

A recipe holds flags as they are typed, one a line, and comments that begin with #. The command checks them as it checks
flags that are typed; an error names the file and the line.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from captioning.errors import UserError
from captioning.runtime.library_errors import reason

FOLDER = Path(__file__).parents[2] / "recipes"
SUFFIX = ".txt"
FLAG = re.compile(r"--[\w-]+")
WORDS = re.compile(r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^'"\\#]|(?<=\S)#)*""")  # what is before a comment


class RecipeFlag(NamedTuple):
    """A line of a recipe."""

    line: int  # its number, from 1
    words: list[str]  # the flag, then its values

    @property
    def name(self) -> str:
        """The flag as --help shows it."""
        return self.words[0]


class Recipe(NamedTuple):
    """The flags of a recipe, in the order of its lines."""

    name: str  # as given to --recipe
    path: Path
    flags: list[RecipeFlag]

    def without(self, typed: Sequence[str]) -> Recipe:
        """The recipe without the flags that are typed, or whose opposite is. typed: the words of a command line."""
        names = {flag_name(word) for word in typed}
        return self._replace(flags=[flag for flag in self.flags if not names & {flag.name, opposite(flag.name)}])

    def complete(self, typed: Sequence[str]) -> list[str]:
        """The words of a command line, and then those flags of the recipe that are not typed.

        --no-flip takes back the --flip of a recipe: both are left out, since no flag switches off what is off.
        """
        taken_back = {opposite(flag.name) for flag in self.flags} - {flag.name for flag in self.flags}
        kept = [word for word in typed if flag_name(word) not in taken_back]
        return kept + [word for flag in self.without(typed).flags for word in flag.words]

    def locate(self, message: str) -> str:
        """A message about a command line, after the file and the line if it is about a flag of the recipe."""
        said = message.removesuffix("see --help")
        subjects = FLAG.findall(said)[:1] or re.split(r"[\s;:,]+", said)  # a superfluous value has no flag
        for flag in self.flags:
            if not {*subjects}.isdisjoint(flag.words):
                return f"{self.path}, line {flag.line}: {message}"
        return message

    def __str__(self) -> str:
        return shlex.join(word for flag in self.flags for word in flag.words)


def requested_recipe(typed: Sequence[str]) -> Recipe | None:
    """The recipe that the words of a command line ask for. Raises UserError if there is none of this name."""
    name = None
    for word, following in zip_longest(typed, typed[1:]):
        if word.startswith("--recipe="):
            name = word.partition("=")[2]
        elif word == "--recipe":
            name = following
    return None if name is None else read_recipe(name)


def read_recipe(name: str) -> Recipe:
    """Read the recipe of this name, or a file. Raises UserError if it cannot be read, or a line is not a flag."""
    is_path = "/" in name or name.endswith(SUFFIX)
    path = Path(name) if is_path else FOLDER / (name + SUFFIX)
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # Windows editors begin a file with a byte order mark
    except FileNotFoundError:
        there = ", ".join(sorted(file.stem for file in FOLDER.glob("*" + SUFFIX)))
        raise UserError(
            f"--recipe {name}: no such recipe; give one of {there}, or a file of flags such as ./mine{SUFFIX}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe {name}: {path} cannot be read ({reason(error)}); give a file of flags") from None
    return Recipe(name, path, _read_flags(path, lines))


def flag_name(word: str) -> str:
    """The flag of a word such as --batch_size=512, as --help shows it: --batch-size. Other words stay."""
    return word.partition("=")[0].replace("_", "-") if word.startswith("--") else word


def opposite(flag: str) -> str:
    """--flip -> --no-flip, and --no-flip -> --flip."""
    return "--" + flag[5:] if flag.startswith("--no-") else "--no-" + flag[2:]


def _read_flags(path: Path, lines: Sequence[str]) -> list[RecipeFlag]:
    flags: dict[str, RecipeFlag] = {}
    for number, line in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        words = _split(line, place)
        if not words:
            continue
        name = flag_name(words[0])
        if not FLAG.fullmatch(name) or any(FLAG.match(word) for word in words[1:]):
            raise UserError(f"{place}: must be one flag and its value, such as --batch-size 32, not: {line.strip()}")
        if name == "--recipe":
            raise UserError(f"{place}: a recipe cannot use another one; copy its flags")
        if name in flags:
            raise UserError(f"{place}: {name} is given in line {flags[name].line} already; leave out one of them")
        value = words[0].partition("=")[2:] if "=" in words[0] else ()
        flags[name] = RecipeFlag(number, [name, *value, *words[1:]])
    return list(flags.values())


def _split(line: str, place: str) -> list[str]:
    """The words of a line, as a shell splits them, without its comment. To shlex, a#1 would hold a comment, too."""
    end = WORDS.match(line).end()  # type: ignore[union-attr]  # it matches the empty text, too
    try:
        return shlex.split(line[:end] if line[end:].startswith("#") else line)
    except ValueError as error:  # a quotation mark without its partner
        raise UserError(f"{place}: {reason(error)}; correct it") from None
