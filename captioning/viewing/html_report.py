"""An HTML report of captioned photos: one file that opens offline, without scripts. All images are data URIs.

Hovering over a word, or touching it, dims the photo except where the word's attention was. Each attention map is an
image of one pixel per cell, which the browser scales to the photo, smoothly or cell by cell. Words said from habit are
pale, if their evidence is known (captioning/evaluation/candidates.py).

Letters: T words, P cells.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from captioning.caption import CaptionResult
from captioning.encoders.images import open_photo
from captioning.errors import PhotoError
from captioning.runtime.files import atomic_text
from captioning.viewing.attention_plots import evidence_strength
from preprocess.captions import Photo
from preprocess.languages import LANGUAGES

THUMBNAIL = 256  # pixels of the longer side
PALEST = 0.35  # opacity of a word without evidence
MAX_SHADE = 0.85  # fraction of the light that a cell without attention loses
HEAD = """<!doctype html>
<html lang="{language}"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; background: #f4f1eb; color: #282522;
       margin: 2em auto; padding: 0 16px; max-width: 60em; overflow-wrap: anywhere }}
article {{ background: #fff; border-radius: 12px; padding: 16px; margin: 16px 0; display: flex; gap: 20px;
          position: relative; content-visibility: auto; contain-intrinsic-size: auto 290px }}
article > :first-child {{ flex: none; width: 256px }}
.caption {{ font-size: 1.3em }}
.note, li {{ color: #77706a }}
b {{ font-weight: inherit; border-bottom: 2px solid #ffaa3c; cursor: default }}
b img {{ position: absolute; left: 16px; top: 16px; visibility: hidden; pointer-events: none }}
b:hover img, b:focus img {{ visibility: visible }}
@media (max-width: 40em) {{ article {{ flex-wrap: wrap }} }}
body:has(#cells:checked) b img {{ image-rendering: pixelated }}
</style>
<h1>{title}</h1>
"""
INSTRUCTIONS = (
    'Point at a word to see its attention. <label><input type="checkbox" id="cells"> show the grid cells</label>\n'
)
PALE = "<p>Pale words come from habit, not from the photo.</p>\n"


class ReportEntry(NamedTuple):
    """A captioned photo of the report."""

    photo: Photo
    caption: CaptionResult
    cider: float | None  # CIDEr-D of the caption, times 100; None without references


def write_page(path: Path, title: str, language: str, sections: Sequence[tuple[str, Sequence[ReportEntry]]]) -> None:
    """Write a page of sections, each a heading ("" for none) and its entries.

    language: a name in preprocess.languages.LANGUAGES. A photo that cannot be read is replaced by the reason. Raises
    UserError if the page cannot be written.
    """
    has_attention = any(entry.caption.attention is not None for _, entries in sections for entry in entries)
    has_evidence = any(entry.caption.evidence is not None for _, entries in sections for entry in entries)
    separator = " " if LANGUAGES[language].has_spaces else ""
    with atomic_text(path) as file:
        file.write(HEAD.format(title=html.escape(title), language=language))
        if has_attention:
            file.write(INSTRUCTIONS)
        if has_evidence:
            file.write(PALE)
        for heading, entries in sections:
            if heading:
                file.write(f"<h2>{html.escape(heading)}</h2>\n")
            for entry in entries:
                file.writelines(_article(entry, separator))


def worst_and_best(entries: Sequence[ReportEntry], count: int = 50) -> list[tuple[str, list[ReportEntry]]]:
    """Sections with the `count` lowest and the `count` highest CIDEr-D scores, without overlap.

    Of fewer than 2 * count entries, each section has half; a single entry is in both. Every entry needs a score.
    """
    ranked = sorted(entries, key=lambda entry: entry.cider)  # type: ignore[arg-type, return-value]
    count = min(count, max(1, len(ranked) // 2))
    return [(f"The {count} worst", ranked[:count]), (f"The {count} best", ranked[::-1][:count])]


def _article(entry: ReportEntry, separator: str) -> Iterator[str]:
    photo, caption, _ = entry
    picture, size = thumbnail(photo)
    yield f'<article>{picture}<div><div class="caption">{separator.join(_word_elements(caption, size))}</div>\n'
    yield f'<div class="note">{" · ".join(_details(entry))}</div>\n<ul>\n'
    for words in photo.captions:
        yield f"<li>{html.escape(separator.join(words))}</li>\n"
    yield "</ul></div></article>\n"


def _details(entry: ReportEntry) -> Iterator[str]:
    photo, caption, cider = entry
    yield html.escape(photo.id)
    if caption.log_probability is not None:
        yield f"log-probability {caption.log_probability:.2f}"
    if caption.probability is not None:
        yield f"probability {caption.probability:.0%}"
    if caption.finished is False:
        yield "unfinished"
    if cider is not None:
        yield f"CIDEr-D {cider:.1f}"


def thumbnail(photo: Photo, longer_side: int = THUMBNAIL) -> tuple[str, tuple[int, int]]:
    """The photo as an HTML element and its size in pixels; an unreadable photo becomes the reason."""
    try:
        image = open_photo(photo.image)
    except PhotoError as error:
        return f'<div class="note">{html.escape(str(error))}</div>', (0, 0)
    image.thumbnail((longer_side, longer_side))
    width, height = image.size
    return f'<div><img src="{_data_uri(image, "jpeg")}" width="{width}" height="{height}" alt=""></div>', image.size


def _word_elements(caption: CaptionResult, size: tuple[int, int]) -> list[str]:
    """The words as HTML elements, each with its attention map, if there is attention, and as pale as its evidence."""
    unknown: Sequence[None] = [None] * len(caption.words)
    evidence = caption.evidence or unknown
    if caption.attention is None:
        return [_span(word, value) for word, value in zip(caption.words, evidence, strict=True)]
    width, height = size
    maps = np.asarray(caption.attention).reshape(-1, *caption.grid)
    return [
        f'<b tabindex="0"{_tooltip(beta, value)}>{_span(word, value, titled=False)}'
        f'<img src="{_data_uri(_shade(weights), "png")}" width="{width}" height="{height}" alt=""></b>'
        for word, weights, beta, value in zip(caption.words, maps, caption.sentinel or unknown, evidence, strict=True)
    ]


def _span(word: str, evidence: float | None, titled: bool = True) -> str:
    """The word, as pale as its evidence says."""
    text = html.escape(word)
    if evidence is None:
        return text
    opacity = PALEST + (1 - PALEST) * evidence_strength(evidence)
    return f'<span{_tooltip(None, evidence) if titled else ""} style="opacity:{opacity:.2f}">{text}</span>'


def _tooltip(beta: float | None, evidence: float | None) -> str:
    texts = []
    if beta is not None:
        texts.append(f"&beta; {beta:.2f}: the fraction of this word that came from the language model alone")
    if evidence is not None:
        texts.append(f"evidence {evidence:+.2f}: log-probability before this photo, minus that before the mean photo")
    return f' title="{"; ".join(texts)}"' if texts else ""


def _shade(weights: np.ndarray) -> Image.Image:
    """Attention (rows, columns) -> a black image, one pixel per cell, transparent where attention is high."""
    light = weights / max(float(weights.max()), 1e-9)
    alpha = np.uint8(np.round(255 * MAX_SHADE * (1 - light)))
    return Image.fromarray(np.stack([np.zeros_like(alpha), alpha], -1), "LA")


def _data_uri(image: Image.Image, image_format: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, image_format, quality=70)
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"
