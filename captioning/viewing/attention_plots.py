"""Plots of the attention over a photo, one panel per word, and contact sheets of captioned photos.

Pillow draws them: no display is needed. Attention shows as a warm glow on a dimmed photo. The glow is scaled per word,
so that every word's most attended cell is equally bright; the attention of that cell is printed next to the word. If
the decoder has a sentinel (Lu et al. 2017, https://arxiv.org/abs/1612.01887), its fraction, beta, is printed instead.

If the evidence of the words is known (captioning/evaluation/candidates.py), words that came from the photo are dark and
those said from habit pale.

Letters: T words, P cells (P = rows x columns of the grid).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from captioning.runtime.files import atomic_write
from captioning.viewing.fonts import Font, find_font, fit_text, load_font, wrap_text

View = Literal["smooth", "grid"]  # attention interpolated over the photo, or drawn cell by cell
Colour = tuple[int, int, int]

BACKGROUND: Colour = (244, 241, 235)
CARD: Colour = (255, 255, 255)
INK: Colour = (40, 37, 34)
MUTED: Colour = (150, 143, 134)
GLOW: Colour = (255, 170, 60)
MARKS: dict[bool, Colour] = {True: (70, 150, 100), False: (208, 82, 66)}  # correct captions green, wrong ones red

# All sizes are in pixels; that of a photo is its longer side.
MARGIN = 56  # around the page
GAP = 10  # between panels
PANEL = 208  # photo of a panel
THUMBNAIL = 86  # photo of a panel on a card
PHOTO = 196  # photo of a card
CARD_WIDTH = 1440
CARD_GAP = 24  # between cards
PADDING = 26  # inside a card
TITLE_SIZE, TITLE_LEADING = 28, 42
CAPTION_SIZE, CAPTION_LEADING = 25, 38
FRAME = 480  # photo of an animation
FRAME_TEXT_SIZE, FRAME_LEADING = 26, 36

WORD_DURATION = 700  # milliseconds per frame of an animation
LAST_DURATION = 2500  # milliseconds of the last frame
STRONG_EVIDENCE = 2.0  # nats, from which a word is as dark as it gets; at 0 and below it is as pale as it gets
MIN_BETA = 1e-3  # attention that sums to less than 1 - MIN_BETA has a sentinel


@dataclass(frozen=True)
class CaptionedImage:
    """An image with its caption and the attention of each word."""

    image: Image.Image | np.ndarray  # any mode and size; an array is (H, W, 3) uint8
    caption: str  # the text of the caption, or another title; "" for none
    words: Sequence[str]  # T
    attention: np.ndarray | None  # (T, P), or None to draw no panels
    grid: tuple[int, int]  # rows and columns of the attention
    correct: bool | None = None  # None: unknown
    evidence: Sequence[float] | None = None  # T, in nats; None: unknown

    def font(self) -> Font:
        """Raises LookupError if no installed font has the letters."""
        return find_font(" ".join([*self.words, self.caption]))

    def inks(self) -> list[Colour]:
        """The colour of each word, by its evidence: from MUTED to INK; INK if it is unknown."""
        if self.evidence is None:
            return [INK] * len(self.words)
        return [blend(MUTED, INK, evidence_strength(value)) for value in self.evidence]

    def attention_maps(self) -> np.ndarray:
        """Attention (T, P) as (T, rows, columns). Raises ValueError if the shapes disagree."""
        attention = np.asarray(self.attention)
        rows, columns = self.grid
        expected = (len(self.words), rows * columns)
        if attention.shape != expected:
            raise ValueError(
                f"attention {attention.shape}: {len(self.words)} words on a grid of {self.grid} need {expected}"
            )
        return attention.reshape(len(self.words), rows, columns)


def evidence_strength(evidence: float) -> float:
    """How much of a word came from the photo, 0 to 1, given its evidence in nats."""
    return min(max(evidence / STRONG_EVIDENCE, 0.0), 1.0)


def blend(start: Colour, end: Colour, fraction: float) -> Colour:
    """The colour at a fraction, 0 to 1, of the way between two."""
    red, green, blue = (round(a + fraction * (b - a)) for a, b in zip(start, end, strict=True))
    return red, green, blue


def overlay(image: Image.Image, attention: np.ndarray, view: View = "smooth") -> Image.Image:
    """Draw attention (rows, columns) as a glow over the image. Returns an RGB image of the same size."""
    resampling = Image.Resampling.BICUBIC if view == "smooth" else Image.Resampling.NEAREST
    light = np.asarray(Image.fromarray(np.asarray(attention, np.float32)).resize(image.size, resampling))
    light = np.clip(light / max(np.max(light), 1e-9), 0, 1)[..., None]  # (H, W, 1)
    bright = np.asarray(image.convert("RGB"), np.float32)  # (H, W, 3)
    dimmed = 0.2 * bright + 0.2 * bright.mean(-1, keepdims=True)
    lit = dimmed + light * (bright - dimmed)
    halo = light * (1 - 0.85 * light)  # strongest around the attended region, which keeps its own colours
    warm = lit + 0.9 * halo * (np.array(GLOW, np.float32) - lit)
    return Image.fromarray(warm.round().astype(np.uint8))


def draw_attention(captioned: CaptionedImage, path: Path, view: View = "smooth") -> None:
    """Save a PNG: the caption as the title, the image, and one panel per word with the word's attention.

    Raises ValueError if the attention's shape does not fit the words and the grid, LookupError if no installed font has
    the letters, and OSError if the file cannot be written.
    """
    maps = captioned.attention_maps()
    font = captioned.font()
    image = _shrink(captioned.image, PANEL)
    num_panels = len(maps) + 1  # the first one is the image itself
    columns = min(10, math.ceil(math.sqrt(2 * num_panels)))
    row_height = image.height + 44
    width = max(2 * MARGIN + columns * (PANEL + GAP) - GAP, 640)

    title = wrap_text(captioned.caption, load_font(font, TITLE_SIZE), width - 2 * MARGIN)
    top = MARGIN + TITLE_LEADING * len(title) + (22 if title else 0)
    page = Image.new("RGB", (width, top + math.ceil(num_panels / columns) * row_height + MARGIN - 30), BACKGROUND)
    _draw_lines(page, (MARGIN, MARGIN - 8), title, load_font(font, TITLE_SIZE), TITLE_LEADING)
    page.paste(_round_corners(image, BACKGROUND), (MARGIN, top))
    labels = zip(captioned.words, maps, captioned.inks(), strict=True)
    for index, (word, weights, ink) in enumerate(labels, start=1):
        corner = (MARGIN + index % columns * (PANEL + GAP), top + index // columns * row_height)
        page.paste(_round_corners(overlay(image, weights, view), BACKGROUND), corner)
        _draw_label(page, corner, image.size, word, weights, font, 19, ink)
    _save(page, path)


def animate_attention(captioned: CaptionedImage, path: Path, view: View = "smooth") -> None:
    """Save a GIF: the image, then one frame per word with its attention; the word is dark in the caption below.

    Raises the errors of `draw_attention`.
    """
    maps = captioned.attention_maps()
    font = captioned.font()
    image = _shrink(captioned.image, FRAME)
    separator = "" if captioned.caption == "".join(captioned.words) else " "
    frames = [_draw_frame(image, captioned.words, font, separator)]
    for index, weights in enumerate(maps):
        frame = _draw_frame(overlay(image, weights, view), captioned.words, font, separator, highlighted=index)
        _draw_frame_beta(frame, 1 - weights.sum(), font)
        frames.append(frame)
    durations = [WORD_DURATION] * (len(frames) - 1) + [LAST_DURATION]
    _save(frames[0], path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def contact_sheet(captioned: Sequence[CaptionedImage], path: Path, title: str) -> None:
    """Save a PNG: one card per image, with the image, its caption and a thumbnail of each word's attention.

    Cards of captions that are known to be correct or wrong have a green or a red dot. Raises the errors of
    `draw_attention`.
    """
    words = [word for item in captioned for word in item.words]
    font = find_font(" ".join([title, *(item.caption for item in captioned), *words]))
    cards = [_draw_card(item, font) for item in captioned]
    top = MARGIN + 76
    height = top + sum(card.height + CARD_GAP for card in cards) + MARGIN - CARD_GAP
    page = Image.new("RGB", (CARD_WIDTH + 2 * MARGIN, height), BACKGROUND)
    line, title_font = fit_text(title, font, 36, CARD_WIDTH)
    ImageDraw.Draw(page).text((MARGIN, MARGIN - 10), line, INK, title_font)
    for card in cards:
        page.paste(card, (MARGIN, top))
        top += card.height + CARD_GAP
    _save(page, path)


def draw_card(captioned: CaptionedImage, path: Path) -> None:
    """Save a PNG: one card of a contact sheet. Raises the errors of `draw_attention`."""
    _save(_draw_card(captioned, captioned.font()), path)


# ---- cards and panels


def _draw_card(captioned: CaptionedImage, font: Font) -> Image.Image:
    """The image on the left; the caption and the thumbnails on the right."""
    image = _shrink(captioned.image, PHOTO)
    thumbnail = _shrink(captioned.image, THUMBNAIL)
    maps = () if captioned.attention is None else captioned.attention_maps()
    left = 2 * PADDING + PHOTO
    width = CARD_WIDTH - left - PADDING
    lines = wrap_text(captioned.caption, load_font(font, CAPTION_SIZE), width - 36)
    top = PADDING + CAPTION_LEADING * len(lines) + 14  # of the thumbnails
    columns = (width + GAP) // (THUMBNAIL + GAP)
    row_height = thumbnail.height + 40
    bottom = top + math.ceil(len(maps) / columns) * row_height
    height = max(image.height + 2 * PADDING, bottom + PADDING - 12)

    card = _round_corners(Image.new("RGB", (CARD_WIDTH, height), CARD), BACKGROUND, 18)
    card.paste(_round_corners(image, CARD), (PADDING + (PHOTO - image.width) // 2, PADDING))
    _draw_lines(card, (left, PADDING - 6), lines, load_font(font, CAPTION_SIZE), CAPTION_LEADING)
    if captioned.correct is not None:
        dot = _round_corners(Image.new("RGB", (16, 16), MARKS[captioned.correct]), CARD)
        card.paste(dot, (CARD_WIDTH - PADDING - 16, PADDING + 4))
    inks = captioned.inks()
    for index, weights in enumerate(maps):
        corner = (left + index % columns * (THUMBNAIL + GAP), top + index // columns * row_height)
        card.paste(_round_corners(overlay(thumbnail, weights), CARD), corner)
        _draw_label(card, corner, thumbnail.size, captioned.words[index], weights, font, 16, inks[index])
    return card


def _draw_label(
    page: Image.Image,
    corner: tuple[int, int],
    panel_size: tuple[int, int],
    word: str,
    weights: np.ndarray,
    font: Font,
    size: int,
    ink: Colour,
) -> None:
    """Write the word under its panel, and next to it the attention of the most attended cell, in percent.

    Attention that sums to less than one leaves the rest to a sentinel: that fraction, beta, is written instead.
    """
    left, top = corner
    width, height = panel_size
    baseline = top + height + 8 + size
    beta = 1 - weights.sum()
    figure = f"β {beta:.2f}" if beta > MIN_BETA else f"{weights.max():.0%}"
    figure_font = load_font(font, round(0.7 * size))
    draw = ImageDraw.Draw(page)
    draw.text((left + width, baseline), figure, MUTED, figure_font, anchor="rs")
    available = width - draw.textlength(figure, figure_font) - 6
    word, word_font = fit_text(word, font, size, available)
    draw.text((left, baseline), word, ink, word_font, anchor="ls")


# ---- frames of an animation


def _draw_frame(
    image: Image.Image, words: Sequence[str], font: Font, separator: str, highlighted: int | None = None
) -> Image.Image:
    """The image above its caption. One word is dark and the others muted; without `highlighted` all are dark."""
    text_font = load_font(font, FRAME_TEXT_SIZE)
    positions, text_height = _flow_words(words, text_font, separator, FRAME - 2 * PADDING)
    frame = Image.new("RGB", (FRAME, image.height + text_height + 72), BACKGROUND)
    frame.paste(image, ((FRAME - image.width) // 2, 0))
    draw = ImageDraw.Draw(frame)
    for index, (word, (x, y)) in enumerate(zip(words, positions, strict=True)):
        colour = INK if highlighted in (None, index) else MUTED
        draw.text((PADDING + x, image.height + 12 + y), word, colour, text_font)
    return frame


def _flow_words(
    words: Sequence[str], font: ImageFont.FreeTypeFont, separator: str, width: int
) -> tuple[list[tuple[float, int]], int]:
    """Position (x, y) of each word in lines of at most `width` pixels, and y of the last line."""
    positions: list[tuple[float, int]] = []
    x = 0.0
    y = 0
    for word in words:
        length = font.getlength(word)
        if x and x + length > width:
            x = 0.0
            y += FRAME_LEADING
        positions.append((x, y))
        x += length + font.getlength(separator)
    return positions, y


def _draw_frame_beta(frame: Image.Image, beta: float, font: Font) -> None:
    """Write the sentinel's fraction of the attention in the lower right corner, if there is a sentinel."""
    if beta > MIN_BETA:
        corner = (FRAME - 8, frame.height - 8)
        ImageDraw.Draw(frame).text(corner, f"β {beta:.2f}", MUTED, load_font(font, 16), anchor="rs")


# ---- images and text


def _shrink(image: Image.Image | np.ndarray, size: int) -> Image.Image:
    """Resize so that the longer side is `size` pixels and the shorter one at least a quarter of it."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    scale = size / max(image.size)
    width, height = (max(size // 4, round(length * scale)) for length in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _round_corners(image: Image.Image, background: Colour, radius: int = 8) -> Image.Image:
    """Round the corners, antialiased: the mask is drawn at four times the size."""
    mask = Image.new("L", (4 * image.width, 4 * image.height))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), 4 * radius, fill=255)
    return Image.composite(image, Image.new("RGB", image.size, background), mask.reduce(4))


def _draw_lines(
    page: Image.Image, corner: tuple[int, int], lines: Iterable[str], font: ImageFont.FreeTypeFont, leading: int
) -> None:
    left, top = corner
    draw = ImageDraw.Draw(page)
    for index, line in enumerate(lines):
        draw.text((left, top + index * leading), line, INK, font)


def _save(page: Image.Image, path: Path, **options: Any) -> None:
    """Write the page atomically, in the format of the path's suffix."""
    with atomic_write(path) as file:
        page.save(file, path.suffix[1:], **options)
