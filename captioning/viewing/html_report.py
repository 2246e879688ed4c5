"""A page of captioned photos: one HTML file that opens offline, without a script. Everything in it is a data URI.

Point at a word, or touch it, and the photo dims but for what attention (T, P) saw when the word was written: the map is
a picture of one pixel a cell, which the browser spreads over the photo, smoothly or cell by cell.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from captioning.caption import CaptionResult
from captioning.encoders.images import open_photo
from captioning.errors import PhotoError
from captioning.runtime.files import atomic_text
from preprocess.captions import Photo

THUMBNAIL = 256  # pixels of the longer side
DARKEST = 0.85  # share of the light that a cell without attention loses
HEAD = """<!doctype html>
<html lang="{language}"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; background: #f4f1eb; color: #282522; margin: 2em auto; max-width: 60em }}
article {{ background: #fff; border-radius: 12px; padding: 16px; margin: 16px 0; display: flex; gap: 20px;
          position: relative; content-visibility: auto; contain-intrinsic-size: auto 290px }}
article > :first-child {{ flex: none; width: 256px }}
.caption {{ font-size: 1.3em }}
.note, li {{ color: #77706a }}
b {{ font-weight: inherit; border-bottom: 2px solid #ffaa3c; cursor: default }}
b img {{ position: absolute; left: 16px; top: 16px; visibility: hidden; pointer-events: none }}
b:hover img, b:focus img {{ visibility: visible }}
body:has(#cells:checked) b img {{ image-rendering: pixelated }}
</style>
<h1>{title}</h1>
"""
HOW_TO = 'Point at a word to see where it looked. <label><input type="checkbox" id="cells"> cell by cell</label>\n'

Card = tuple[Photo, CaptionResult, float | None]  # a photo, its caption, and the caption's CIDEr-D


def write_page(path: Path, title: str, language: str, sections: Sequence[tuple[str, Sequence[Card]]]) -> None:
    """A section has a heading (or none) and its cards. Raises UserError where the page cannot be written."""
    attends = any(caption.attention is not None for _, cards in sections for _, caption, _ in cards)
    with atomic_text(path) as file:
        file.write(HEAD.format(title=html.escape(title), language=language) + (HOW_TO if attends else ""))
        for heading, cards in sections:
            file.write(f"<h2>{html.escape(heading)}</h2>\n" if heading else "")
            for card in cards:
                file.write("".join(_article(*card, " " if language == "en" else "")))


def _article(photo: Photo, caption: CaptionResult, cider: float | None, between: str) -> Iterator[str]:
    picture, size = _thumbnail(photo)
    yield f'<article>{picture}<div><div class="caption">{between.join(_words(caption, size))}</div>\n'
    notes = [html.escape(photo.id)]
    notes += [f"log-probability {caption.log_probability:.2f}"] if caption.log_probability is not None else []
    notes += ["unfinished"] if caption.finished is False else []
    notes += [f"CIDEr-D {cider:.1f}"] if cider is not None else []
    yield f'<div class="note">{" · ".join(notes)}</div>\n<ul>\n'
    yield from (f"<li>{html.escape(between.join(words))}</li>\n" for words in photo.captions)
    yield "</ul></div></article>\n"


def _thumbnail(photo: Photo) -> tuple[str, tuple[int, int]]:
    """The photo as an element of the page, and its size there; where it cannot be read, the reason."""
    try:
        image = open_photo(photo.image)
    except PhotoError as error:
        return f'<div class="note">{html.escape(str(error))}</div>', (0, 0)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    width, height = image.size
    return f'<div><img src="{_data_uri(image, "jpeg")}" width="{width}" height="{height}" alt=""></div>', image.size


def _words(caption: CaptionResult, size: tuple[int, int]) -> list[str]:
    """The words as elements: each with its map, where there is attention."""
    if caption.attention is None:
        return [*map(html.escape, caption.words)]
    betas = caption.sentinel or [None] * len(caption.words)
    maps = np.asarray(caption.attention).reshape(-1, *caption.grid)
    return [
        f'<b tabindex="0"{_title(beta)}>{html.escape(word)}'
        f'<img src="{_data_uri(_shade(weights), "png")}" width="{size[0]}" height="{size[1]}" alt=""></b>'
        for word, weights, beta in zip(caption.words, maps, betas, strict=True)
    ]


def _title(beta: float | None) -> str:
    return "" if beta is None else f' title="&beta; {beta:.2f}: the share of this word that came from language alone"'


def _shade(weights: np.ndarray) -> Image.Image:
    """Attention (rows, columns) -> black that lets light through where it is high; a pixel a cell."""
    light = weights / max(float(weights.max()), 1e-9)
    alpha = np.uint8(np.round(255 * DARKEST * (1 - light)))
    return Image.fromarray(np.stack([np.zeros_like(alpha), alpha], -1), "LA")


def _data_uri(image: Image.Image, form: str) -> str:
    file = io.BytesIO()
    image.save(file, form, quality=70)
    return f"data:image/{form};base64,{base64.b64encode(file.getvalue()).decode()}"


def extremes(cards: Sequence[Card], count: int = 50) -> list[tuple[str, list[Card]]]:
    """The cards of the lowest and of the highest CIDEr-D; none is in both, unless it is alone."""
    ordered = sorted(cards, key=lambda card: card[2])
    count = min(count, max(1, len(ordered) // 2))
    return [(f"The {count} worst", ordered[:count]), (f"The {count} best", ordered[::-1][:count])]
