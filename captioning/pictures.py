"""Attention over photos, word by word, and a page of captioned photos. Drawn with Pillow: no display is needed.

Attention is a warm glow on a dimmed photo, as bright at each word's most watched place as at any other word's;
how much of the word's attention that one cell holds is printed beside the word.

Letters: T words, P cells (P = rows x columns of the grid).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, CARD, INK, MUTED = (244, 241, 235), (255, 255, 255), (40, 37, 34), (150, 143, 134)
GLOW = (255, 170, 60)
MARKS = {True: (70, 150, 100), False: (208, 82, 66)}  # a true caption, a false one
MARGIN, GAP = 56, 10  # pixels around the page; between panels
PANEL, THUMBNAIL, PHOTO = 208, 86, 196  # pixels of the longer side
CARD_WIDTH, PADDING = 1440, 26  # pixels
SMALLEST = 9  # pixels of the type; a word that is still too wide is cut short

# Fonts that show Chinese and Latin side by side, the most pleasant first; known by how their files are called.
PREFERRED = ("notosanscjk", "sourcehansans", "notosanssc", "pingfang", "hiraginosansgb", "msyh", "wqy", "simhei",
             "dejavusans")  # fmt: skip


class Font(NamedTuple):
    path: str
    face: int  # in a collection of fonts (.ttc); 0 in any other file


@dataclass(frozen=True)
class Entry:
    """A photo of the contact sheet. photo: an image or (H, W, 3) uint8; attention (T, P) or None; true: or unknown."""

    photo: Image.Image | np.ndarray
    caption: str
    words: Sequence[str]
    attention: np.ndarray | None
    grid: tuple[int, int]  # rows and columns of the attention
    true: bool | None = None


# ---- fonts ----


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
def _type(font: Font, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font.path, size, font.face)


# ---- pictures ----


def overlay(photo: Image.Image, attention: np.ndarray) -> Image.Image:
    """The photo with attention (rows, columns) as a glow, upsampled smoothly; the same size."""
    light = Image.fromarray(np.asarray(attention, np.float32)).resize(photo.size, Image.Resampling.BICUBIC)
    light = np.clip(np.asarray(light) / max(np.max(light), 1e-9), 0, 1)[..., None]  # (H, W, 1)
    bright = np.asarray(photo.convert("RGB"), np.float32)  # (H, W, 3)
    dimmed = 0.2 * bright + 0.2 * bright.mean(-1, keepdims=True)
    seen = dimmed + light * (bright - dimmed)
    halo = light * (1 - 0.85 * light)  # warmest around what is watched, which keeps its own colours
    warm = seen + 0.9 * halo * (np.array(GLOW, np.float32) - seen)
    return Image.fromarray(warm.round().astype(np.uint8))


def draw_attention(
    photo: Image.Image | np.ndarray,
    words: Sequence[str],
    attention: np.ndarray,
    grid: tuple[int, int],
    path: Path,
    title: str | None = None,
) -> None:
    """Save a PNG: the title, the photo, and a panel a word with what attention (T, P) saw when it was written.

    photo: an image, or (H, W, 3) uint8; grid: rows and columns. Raises ValueError where the shapes disagree,
    LookupError where no font has the letters, OSError where the picture cannot be written.
    """
    attention = _in_rows(words, attention, grid)
    font = find_font(" ".join([*words, title or ""]))
    photo = _shrunk(photo, PANEL)
    step, line = PANEL + GAP, photo.height + 44  # from panel to panel
    columns = min(10, math.ceil(math.sqrt(2 * (len(words) + 1))))
    width = max(2 * MARGIN + columns * step - GAP, 640)
    heading = _lines(title or "", _type(font, 28), width - 2 * MARGIN)
    top = MARGIN + 42 * len(heading) + (22 if heading else 0)
    page = Image.new("RGB", (width, top + math.ceil((len(words) + 1) / columns) * line + MARGIN - 30), PAPER)
    _write_lines(page, (MARGIN, MARGIN - 8), heading, _type(font, 28), 42)
    page.paste(_rounded(photo, PAPER), (MARGIN, top))
    for number, (word, weights) in enumerate(zip(words, attention, strict=True), start=1):
        corner = (MARGIN + number % columns * step, top + number // columns * line)
        _panel(page, corner, photo, word, weights, font, 19)
    _save(page, path)


def contact_sheet(entries: Sequence[Entry], path: Path, title: str) -> None:
    """Save a PNG: a card an entry, with its photo, its caption and a strip of what each word saw.

    A card whose caption is known to be true or false has a green or a red dot. Raises as `draw_attention` does.
    """
    font = find_font(" ".join([title, *(entry.caption for entry in entries), *(w for e in entries for w in e.words)]))
    cards = [_card(entry, font) for entry in entries]
    top = MARGIN + 76
    height = top + sum(card.height + 24 for card in cards) + MARGIN - 24
    page = Image.new("RGB", (CARD_WIDTH + 2 * MARGIN, height), PAPER)
    heading, fitting = _fitted(title, font, 36, CARD_WIDTH)
    ImageDraw.Draw(page).text((MARGIN, MARGIN - 10), heading, INK, fitting)
    for card in cards:
        page.paste(card, (MARGIN, top))
        top += card.height + 24
    _save(page, path)


def draw_card(entry: Entry, path: Path) -> None:
    """Save a PNG: one card of a contact sheet. Raises as `draw_attention` does."""
    _save(_card(entry, find_font(" ".join([entry.caption, *entry.words]))), path)


# ---- their parts ----


def _card(entry: Entry, font: Font) -> Image.Image:
    """Photo on the left; caption and strip of thumbnails on the right."""
    photo, left = _shrunk(entry.photo, PHOTO), 2 * PADDING + PHOTO
    width = CARD_WIDTH - left - PADDING
    lines = _lines(entry.caption, _type(font, 25), width - 36)
    strip = PADDING + 38 * len(lines) + 14
    attention = [] if entry.attention is None else _in_rows(entry.words, entry.attention, entry.grid)
    small, columns = _shrunk(entry.photo, THUMBNAIL), (width + GAP) // (THUMBNAIL + GAP)
    line = small.height + 40
    foot = strip + math.ceil(len(attention) / columns) * line
    height = max(photo.height + 2 * PADDING, foot + PADDING - 12)
    card = _rounded(Image.new("RGB", (CARD_WIDTH, height), CARD), PAPER, 18)
    card.paste(_rounded(photo, CARD), (PADDING + (PHOTO - photo.width) // 2, PADDING))
    _write_lines(card, (left, PADDING - 6), lines, _type(font, 25), 38)
    if entry.true is not None:
        _dot(card, (CARD_WIDTH - PADDING - 8, PADDING + 12), MARKS[entry.true])
    for number, (word, weights) in enumerate(zip(entry.words, attention, strict=False)):
        corner = (left + number % columns * (THUMBNAIL + GAP), strip + number // columns * line)
        _panel(card, corner, small, word, weights, font, 16)
    return card


def _panel(
    page: Image.Image, corner: tuple[int, int], photo: Image.Image,
    word: str, weights: np.ndarray, font: Font, size: int,
) -> None:  # fmt: skip
    """A word's overlay, and under it the word and the share of its attention that its most watched cell holds.

    Attention that sums to less than one leaves the rest to a sentinel: that share, beta, is written instead.
    """
    x, y = corner
    page.paste(_rounded(overlay(photo, weights), page.getpixel((x, y))), corner)
    pencil, foot, right = ImageDraw.Draw(page), y + photo.height + 8 + size, x + photo.width
    beta, small = 1 - weights.sum(), _type(font, round(0.7 * size))
    share = f"β {beta:.2f}" if beta > 1e-3 else f"{weights.max():.0%}"
    pencil.text((right, foot), share, MUTED, small, anchor="rs")
    room = photo.width - pencil.textlength(share, small) - 6
    word, fitting = _fitted(word, font, size, room)
    pencil.text((x, foot), word, INK, fitting, anchor="ls")


def _in_rows(words: Sequence[str], attention: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Attention (T, P) -> (T, rows, columns)."""
    attention, expected = np.asarray(attention), (len(words), grid[0] * grid[1])
    if attention.shape != expected:
        raise ValueError(f"attention {attention.shape}: {len(words)} words on a grid of {grid} need {expected}")
    return attention.reshape(len(words), *grid)


def _shrunk(photo: Image.Image | np.ndarray, side: int) -> Image.Image:
    """The photo with its longer side `side` pixels; a thin one stays visible."""
    photo = photo if isinstance(photo, Image.Image) else Image.fromarray(photo)
    scale = side / max(photo.size)
    width, height = (max(side // 4, round(length * scale)) for length in photo.size)
    return photo.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _rounded(picture: Image.Image, behind: tuple[int, int, int], radius: int = 8) -> Image.Image:
    """Round its corners, smoothly: drawn four times larger, then shrunk."""
    mask = Image.new("L", (4 * picture.width, 4 * picture.height))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), 4 * radius, fill=255)
    return Image.composite(picture, Image.new("RGB", picture.size, behind), mask.reduce(4))


def _dot(page: Image.Image, centre: tuple[int, int], colour: tuple[int, int, int]) -> None:
    page.paste(_rounded(Image.new("RGB", (16, 16), colour), CARD, 8), (centre[0] - 8, centre[1] - 8))


def _fitted(text: str, font: Font, size: int, width: float) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text and a type in which it is no wider than `width`: smaller, and then cut short."""
    text = " ".join(text.split())
    while size > SMALLEST and _type(font, size).getlength(text) > width:
        size -= 1
    kept = text
    while kept and _type(font, size).getlength(text if kept == text else kept + "...") > width:
        kept = kept[:-1]
    return text if kept == text else kept + "...", _type(font, size)


def _lines(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text at its spaces, and between any two Chinese characters; a longer word anywhere."""
    lines, line, text = [], "", " ".join(text.split())
    for piece in re.findall(r"[\u2e80-\U0003ffff][，。、！？]*\s*|[^\s\u2e80-\U0003ffff]+\s*", text):
        for part in [piece] if font.getlength(piece.rstrip()) <= width else piece:
            if font.getlength((line + part).rstrip()) > width:
                lines, line = [*lines, line.rstrip()], ""
            line += part
    return [*lines, line.rstrip()] if line.strip() else lines


def _write_lines(
    page: Image.Image, corner: tuple[int, int], lines: Iterable[str], font: ImageFont.FreeTypeFont, leading: int
) -> None:
    for number, line in enumerate(lines):
        ImageDraw.Draw(page).text((corner[0], corner[1] + number * leading), line, INK, font)


def _save(page: Image.Image, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            page.save(file, "png")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
