"""Attention over photos, word by word, and a page of captioned photos. Drawn with Pillow: no display is needed.

Attention is a warm glow on a dimmed photo, as bright at each word's most watched place as at any other word's;
how much of the word's attention that one cell holds is printed beside the word.

Letters: T words, P cells (P = rows x columns of the grid).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from captioning.runtime.files import atomic_write
from captioning.viewing.fonts import Font, broken, find_font, fitted, load_font

View = Literal["smooth", "grid"]  # attention spread smoothly over the photo, or cell by cell

BACKGROUND, CARD, INK, MUTED = (244, 241, 235), (255, 255, 255), (40, 37, 34), (150, 143, 134)
GLOW = (255, 170, 60)
MARKS = {True: (70, 150, 100), False: (208, 82, 66)}  # a true caption, a false one
MARGIN, GAP = 56, 10  # pixels around the page; between panels
PANEL, THUMBNAIL, PHOTO = 208, 86, 196  # pixels of the longer side
CARD_WIDTH, PADDING = 1440, 26  # pixels
FRAME, TYPE = 480, 26  # pixels of a moving picture's longer side, and of its caption
PAUSE, LAST = 700, 2500  # milliseconds that a word is shown, and the last one


@dataclass(frozen=True)
class Entry:
    """A photo of the contact sheet. photo: an image or (H, W, 3) uint8; attention (T, P) or None; true: or unknown."""

    photo: Image.Image | np.ndarray
    caption: str
    words: Sequence[str]
    attention: np.ndarray | None
    grid: tuple[int, int]  # rows and columns of the attention
    true: bool | None = None


def overlay(photo: Image.Image, attention: np.ndarray, view: View = "smooth") -> Image.Image:
    """The photo with attention (rows, columns) as a glow; the same size."""
    spread = Image.Resampling.BICUBIC if view == "smooth" else Image.Resampling.NEAREST
    light = Image.fromarray(np.asarray(attention, np.float32)).resize(photo.size, spread)
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
    view: View = "smooth",
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
    heading = broken(title or "", load_font(font, 28), width - 2 * MARGIN)
    top = MARGIN + 42 * len(heading) + (22 if heading else 0)
    page = Image.new("RGB", (width, top + math.ceil((len(words) + 1) / columns) * line + MARGIN - 30), BACKGROUND)
    _write_lines(page, (MARGIN, MARGIN - 8), heading, load_font(font, 28), 42)
    page.paste(_rounded(photo, BACKGROUND), (MARGIN, top))
    for number, (word, weights) in enumerate(zip(words, attention, strict=True), start=1):
        corner = (MARGIN + number % columns * step, top + number // columns * line)
        _panel(page, corner, photo, word, weights, font, 19, view)
    _save(page, path)


def animate_attention(
    photo: Image.Image | np.ndarray,
    words: Sequence[str],
    attention: np.ndarray,
    grid: tuple[int, int],
    path: Path,
    title: str,
    view: View = "smooth",
) -> None:
    """Save a GIF: the photo, then a frame a word with what attention (T, P) saw, its word dark in the caption below.

    The title is the caption as a whole. Raises as `draw_attention` does.
    """
    attention = _in_rows(words, attention, grid)
    font, photo = find_font(" ".join([*words, title])), _shrunk(photo, FRAME)
    between = "" if title == "".join(words) else " "
    frames = [_frame(photo, words, None, font, between)]
    for number, weights in enumerate(attention):
        frames.append(_frame(overlay(photo, weights, view), words, (number, 1 - weights.sum()), font, between))
    durations = [PAUSE] * (len(frames) - 1) + [LAST]
    _save(frames[0], path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def contact_sheet(entries: Sequence[Entry], path: Path, title: str) -> None:
    """Save a PNG: a card an entry, with its photo, its caption and a strip of what each word saw.

    A card whose caption is known to be true or false has a green or a red dot. Raises as `draw_attention` does.
    """
    font = find_font(" ".join([title, *(entry.caption for entry in entries), *(w for e in entries for w in e.words)]))
    cards = [_card(entry, font) for entry in entries]
    top = MARGIN + 76
    height = top + sum(card.height + 24 for card in cards) + MARGIN - 24
    page = Image.new("RGB", (CARD_WIDTH + 2 * MARGIN, height), BACKGROUND)
    heading, fitting = fitted(title, font, 36, CARD_WIDTH)
    ImageDraw.Draw(page).text((MARGIN, MARGIN - 10), heading, INK, fitting)
    for card in cards:
        page.paste(card, (MARGIN, top))
        top += card.height + 24
    _save(page, path)


def draw_card(entry: Entry, path: Path) -> None:
    """Save a PNG: one card of a contact sheet. Raises as `draw_attention` does."""
    _save(_card(entry, find_font(" ".join([entry.caption, *entry.words]))), path)


# ---- their parts


def _card(entry: Entry, font: Font) -> Image.Image:
    """Photo on the left; caption and strip of thumbnails on the right."""
    photo, left = _shrunk(entry.photo, PHOTO), 2 * PADDING + PHOTO
    width = CARD_WIDTH - left - PADDING
    lines = broken(entry.caption, load_font(font, 25), width - 36)
    strip = PADDING + 38 * len(lines) + 14
    attention = [] if entry.attention is None else _in_rows(entry.words, entry.attention, entry.grid)
    small, columns = _shrunk(entry.photo, THUMBNAIL), (width + GAP) // (THUMBNAIL + GAP)
    line = small.height + 40
    foot = strip + math.ceil(len(attention) / columns) * line
    height = max(photo.height + 2 * PADDING, foot + PADDING - 12)
    card = _rounded(Image.new("RGB", (CARD_WIDTH, height), CARD), BACKGROUND, 18)
    card.paste(_rounded(photo, CARD), (PADDING + (PHOTO - photo.width) // 2, PADDING))
    _write_lines(card, (left, PADDING - 6), lines, load_font(font, 25), 38)
    if entry.true is not None:
        _dot(card, (CARD_WIDTH - PADDING - 8, PADDING + 12), MARKS[entry.true])
    for number, (word, weights) in enumerate(zip(entry.words, attention, strict=False)):
        corner = (left + number % columns * (THUMBNAIL + GAP), strip + number // columns * line)
        _panel(card, corner, small, word, weights, font, 16)
    return card


def _panel(
    page: Image.Image,
    corner: tuple[int, int],
    photo: Image.Image,
    word: str,
    weights: np.ndarray,
    font: Font,
    size: int,
    view: View = "smooth",
) -> None:
    """A word's overlay, and under it the word and the share of its attention that its most watched cell holds.

    Attention that sums to less than one leaves the rest to a sentinel: that share, beta, is written instead.
    """
    x, y = corner
    page.paste(_rounded(overlay(photo, weights, view), page.getpixel((x, y))), corner)
    pencil, foot, right = ImageDraw.Draw(page), y + photo.height + 8 + size, x + photo.width
    beta, small = 1 - weights.sum(), load_font(font, round(0.7 * size))
    share = f"β {beta:.2f}" if beta > 1e-3 else f"{weights.max():.0%}"
    pencil.text((right, foot), share, MUTED, small, anchor="rs")
    room = photo.width - pencil.textlength(share, small) - 6
    word, fitting = fitted(word, font, size, room)
    pencil.text((x, foot), word, INK, fitting, anchor="ls")


def _frame(
    picture: Image.Image, words: Sequence[str], said: tuple[int, float] | None, font: Font, between: str
) -> Image.Image:
    """A picture over its caption, in which one word is dark; said: its number, and the sentinel's share of it."""
    drawn, width = load_font(font, TYPE), FRAME - 2 * PADDING
    places, x, y = [], 0.0, 0
    for word in words:
        length = drawn.getlength(word)
        if x and x + length > width:
            x, y = 0.0, y + 36
        places.append((PADDING + x, picture.height + 12 + y))
        x += length + drawn.getlength(between)
    page = Image.new("RGB", (FRAME, picture.height + y + 72), BACKGROUND)
    page.paste(picture, ((FRAME - picture.width) // 2, 0))
    pencil = ImageDraw.Draw(page)
    for number, (word, place) in enumerate(zip(words, places, strict=True)):
        pencil.text(place, word, INK if said is None or number == said[0] else MUTED, drawn)
    if said and said[1] > 1e-3:
        pencil.text((FRAME - 8, page.height - 8), f"β {said[1]:.2f}", MUTED, load_font(font, 16), anchor="rs")
    return page


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


def _write_lines(
    page: Image.Image, corner: tuple[int, int], lines: Iterable[str], font: ImageFont.FreeTypeFont, leading: int
) -> None:
    for number, line in enumerate(lines):
        ImageDraw.Draw(page).text((corner[0], corner[1] + number * leading), line, INK, font)


def _save(page: Image.Image, path: Path, **options: object) -> None:
    """Whole or not at all, in the form that the ending names."""
    with atomic_write(path) as file:
        page.save(file, path.suffix[1:], **options)
