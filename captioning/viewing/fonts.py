"""Find an installed font that has the characters of a text, and fit text into a width.

Fonts are searched in the system's folders, in the package mplfonts (Chinese) and in matplotlib's data folder
(DejaVu Sans). Neither package is imported: only their files are read.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import ImageFont

MIN_SIZE = 9  # pixels; a word that is still too wide at this size is truncated

# Preferred fonts, best first, by the start of their file names. All but the last have Chinese and Latin characters.
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
EXTENSIONS = {".ttf", ".otf", ".ttc"}
SYSTEM_FOLDERS = (  # Linux, then macOS
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.fonts",
    "~/.local/share/fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
)
PACKAGE_FOLDERS = {"mplfonts": "fonts", "matplotlib": "mpl-data/fonts/ttf"}  # package -> its folder of fonts


class Font(NamedTuple):
    """A face of an installed font file."""

    path: str
    face: int  # index of the face in a font collection (.ttc); 0 for any other file


def find_font(text: str) -> Font:
    """Return the most preferred installed font that has every character of the text.

    If no font has them all, return the one that lacks the fewest: an emoji or a rare character then shows as an empty
    box. Raises LookupError, with the packages to install, if that font lacks more than half of the non-ASCII letters.
    """
    return _find_font(frozenset(char for char in text if char.isprintable() and not char.isspace()))


@functools.cache
def _find_font(characters: frozenset[str]) -> Font:
    best: Font | None = None
    missing = characters
    for path in _font_files():
        for face, supported in _read_faces(path):
            lacking = frozenset(char for char in characters if ord(char) not in supported)
            if best is None or len(lacking) < len(missing):
                best = Font(path, face)
                missing = lacking
        if best and not missing:
            return best
    letters = {char for char in characters if char.isalpha() and not char.isascii()}
    if best is None or 2 * len(missing & letters) > len(letters):
        raise LookupError(
            f"no installed font has the letters {''.join(sorted(missing & letters)[:8])}; install one that does; "
            "for Chinese: pip install mplfonts, or: apt install fonts-noto-cjk"
        )
    return best


@functools.cache
def _font_files() -> tuple[str, ...]:
    """Paths of all installed font files, preferred ones first."""
    files = {
        os.path.join(folder, name)
        for start in _font_folders()
        for folder, _, names in os.walk(start)  # os.walk skips folders without read permission
        for name in names
        if Path(name).suffix.lower() in EXTENSIONS
    }
    # The Last Resort font claims every character but renders each as a box.
    usable = [path for path in files if "lastresort" not in path.lower()]
    return tuple(sorted(usable, key=lambda path: (_preference(path), path)))


def _font_folders() -> Iterator[str]:
    for folder in SYSTEM_FOLDERS:
        yield os.path.expanduser(folder)
    for folder in os.environ.get("XDG_DATA_DIRS", "").split(":"):
        if folder:
            yield os.path.join(folder, "fonts")
    for package, folder in PACKAGE_FOLDERS.items():
        spec = importlib.util.find_spec(package)  # locates the package without importing it
        for location in (spec.submodule_search_locations if spec else None) or ():
            yield os.path.join(location, folder)


def _preference(path: str) -> tuple[int, bool]:
    """Sort key: the index of the font's family in PREFERRED, then regular styles before bold and italic ones."""
    name = re.sub(r"[^a-z0-9]", "", Path(path).stem.lower())
    family = next((index for index, start in enumerate(PREFERRED) if name.startswith(start)), len(PREFERRED))
    return family, bool(re.search("bold|black|heavy|thin|light|oblique|italic|condensed", name))


@functools.cache
def _read_faces(path: str) -> tuple[tuple[int, frozenset[int]], ...]:
    """Return (face index, code points) of each face in a font file, simplified Chinese first; () if unreadable."""
    from fontTools.ttLib import TTCollection, TTFont, TTLibError

    try:
        is_collection = Path(path).suffix.lower() == ".ttc"
        fonts = TTCollection(path, lazy=True).fonts if is_collection else [TTFont(path, lazy=True)]
        faces = sorted(enumerate(fonts), key=lambda face: " SC" not in str(face[1]["name"].getDebugName(1)))
        return tuple((index, frozenset(font.getBestCmap() or ())) for index, font in faces)
    except (OSError, KeyError, TTLibError):
        return ()


@functools.cache
def load_font(font: Font, size: int) -> ImageFont.FreeTypeFont:
    """Load the font at a size in pixels."""
    return ImageFont.truetype(font.path, size, font.face)


def fit_text(text: str, font: Font, size: int, width: float) -> tuple[str, ImageFont.FreeTypeFont]:
    """Fit a line into `width` pixels: shrink the font down to MIN_SIZE, then truncate the text with "...".

    Returns the text and the loaded font.
    """
    text = " ".join(text.split())
    while size > MIN_SIZE and load_font(font, size).getlength(text) > width:
        size -= 1
    loaded = load_font(font, size)
    if not text or loaded.getlength(text) <= width:
        return text, loaded
    prefix = text[:-1]
    while prefix and loaded.getlength(prefix + "...") > width:
        prefix = prefix[:-1]
    return prefix + "...", loaded


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Wrap the text into lines of at most `width` pixels.

    Lines break at spaces and between any two Chinese characters; a word wider than a line breaks anywhere.
    """
    lines: list[str] = []
    line = ""
    for chunk in re.findall(r"[\u2e80-\U0003ffff][，。、！？]*\s*|[^\s\u2e80-\U0003ffff]+\s*", " ".join(text.split())):
        fits = font.getlength(chunk.rstrip()) <= width
        for part in [chunk] if fits else chunk:
            if font.getlength((line + part).rstrip()) > width:
                lines.append(line.rstrip())
                line = ""
            line += part
    if line.strip():
        lines.append(line.rstrip())
    return lines
