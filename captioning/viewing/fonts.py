"""A font of this machine that has the letters of a text, and text that fits where it is written."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from PIL import ImageFont

SMALLEST = 9  # pixels of the type; a word that is still too wide is cut short

# Fonts that show Chinese and Latin side by side, the most pleasant first; known by how their files are called.
PREFERRED = (
    "notosanscjk",
    "sourcehansans",
    "notosanssc",
    "pingfang",
    "hiraginosansgb",
    "msyh",
    "wqy",
    "simhei",
    "dejavusans",
)


class Font(NamedTuple):
    path: str
    face: int  # in a collection of fonts (.ttc); 0 in any other file


def find_font(text: str) -> Font:
    """The first of this machine's fonts, the most pleasant first, that has every character of the text.

    Where none has, the one that lacks the fewest: an emoji or a rare character does not spoil a picture, and
    shows as an empty box. Raises LookupError, saying what to install, when it lacks most of the letters beyond ASCII.
    """
    wanted = frozenset(character for character in text if character.isprintable() and not character.isspace())
    return _find_font(wanted)


@functools.cache
def _find_font(wanted: frozenset[str]) -> Font:
    best, lacking = None, wanted
    for path in _font_files():
        for face, characters in _faces(path):
            missing = {character for character in wanted if ord(character) not in characters}
            if best is None or len(missing) < len(lacking):
                best, lacking = Font(path, face), missing
        if best and not lacking:
            return best
    letters = {character for character in wanted if character.isalpha() and not character.isascii()}
    if best is None or 2 * len(lacking & letters) > len(letters):
        raise LookupError(
            f"no font here has the letters {''.join(sorted(lacking & letters)[:8])}; install one that does; "
            "for Chinese: pip install mplfonts, or: apt install fonts-noto-cjk"
        )
    return best


@functools.cache
def _font_files() -> tuple[str, ...]:
    """Font files of the system, of matplotlib and of the package mplfonts; the preferred ones first."""
    from matplotlib import font_manager, get_data_path  # here: it takes half a second, and most runs draw nothing

    files = set(font_manager.findSystemFonts()) | set(map(str, Path(get_data_path()).glob("fonts/ttf/*.ttf")))
    if package := importlib.util.find_spec("mplfonts"):
        files |= {str(path) for folder in package.submodule_search_locations for path in Path(folder).glob("fonts/*.*")}
    known = [path for path in files if "lastresort" not in path.lower()]  # it has every character: as a box
    return tuple(sorted(known, key=lambda path: (_rank(path), path)))


def _rank(path: str) -> tuple[int, bool]:
    name = re.sub(r"[^a-z0-9]", "", Path(path).stem.lower())
    family = next((rank for rank, start in enumerate(PREFERRED) if name.startswith(start)), len(PREFERRED))
    return family, bool(re.search("bold|black|heavy|thin|light|oblique|italic|condensed", name))


@functools.cache
def _faces(path: str) -> tuple[tuple[int, frozenset[int]], ...]:
    """The faces in a font file with their characters, simplified Chinese first; none where it cannot be read."""
    from fontTools.ttLib import TTCollection, TTFont, TTLibError

    try:
        collection = Path(path).suffix.lower() in (".ttc", ".otc")
        fonts = TTCollection(path, lazy=True).fonts if collection else [TTFont(path, lazy=True)]
        faces = sorted(enumerate(fonts), key=lambda face: " SC" not in str(face[1]["name"].getDebugName(1)))
        return tuple((number, frozenset(font.getBestCmap() or ())) for number, font in faces)
    except (OSError, KeyError, TTLibError):
        return ()


@functools.cache
def load_font(font: Font, size: int) -> ImageFont.FreeTypeFont:
    """The font at a size in pixels."""
    return ImageFont.truetype(font.path, size, font.face)


def fitted(text: str, font: Font, size: int, width: float) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text and a type in which it is no wider than `width`: smaller, and then cut short."""
    text = " ".join(text.split())
    while size > SMALLEST and load_font(font, size).getlength(text) > width:
        size -= 1
    kept = text
    while kept and load_font(font, size).getlength(text if kept == text else kept + "...") > width:
        kept = kept[:-1]
    return text if kept == text else kept + "...", load_font(font, size)


def broken(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines, broken at its spaces, and between any two Chinese characters; a longer word anywhere."""
    lines, line, text = [], "", " ".join(text.split())
    for piece in re.findall(r"[\u2e80-\U0003ffff][，。、！？]*\s*|[^\s\u2e80-\U0003ffff]+\s*", text):
        for part in [piece] if font.getlength(piece.rstrip()) <= width else piece:
            if font.getlength((line + part).rstrip()) > width:
                lines, line = [*lines, line.rstrip()], ""
            line += part
    return [*lines, line.rstrip()] if line.strip() else lines
