"""The results of the checks as check.html, one page that opens offline, and check.json."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from captioning.doctor.findings import Check, Finding
from captioning.runtime.files import atomic_text
from captioning.runtime.progress import tqdm
from captioning.viewing.html_report import HEAD, thumbnail
from preprocess.captions import Photo
from preprocess.vocabulary import Vocabulary

SHOWN = 50  # findings of a check that the page shows
LISTED = 1_000  # findings of a check that the JSON file lists
THUMBNAIL = 160  # pixels of the longer side
STYLE = """<style>
article { contain-intrinsic-size: auto 180px }
article > :first-child { width: auto; max-width: 100%; display: flex; flex-wrap: wrap; gap: 8px }
figure { margin: 0; width: 160px }
figcaption { font-size: 11px; line-height: 1.3; color: #77706a; overflow-wrap: anywhere }
</style>
"""


def write_check_page(path: Path, title: str, vocabulary: Vocabulary, checks: Sequence[Check]) -> None:
    """Write a page with a table of the checks and the worst findings of each. Raises UserError if it cannot be written.

    vocabulary: of the captions, which it joins to text. A photo that cannot be read is replaced by the reason.
    """
    with atomic_text(path) as file:
        file.write(HEAD.format(title=html.escape(title), language=vocabulary.language) + STYLE + "<ul>\n")
        for check in checks:
            file.write(f'<li><a href="#{check.name}">{check.title}</a>: {len(check.findings):,}</li>\n')
        file.write("</ul>\n")
        for check in tqdm(checks, "page", unit="check"):
            shown = check.findings[:SHOWN]
            heading = check.title + (
                f", the worst {SHOWN} of {len(check.findings):,}" if len(check.findings) > SHOWN else ""
            )
            file.write(f'<h2 id="{check.name}">{heading}</h2>\n<p>{html.escape(check.meaning)}</p>\n')
            if not shown:
                file.write("<p>Nothing was found.</p>\n")
            for finding in shown:
                file.writelines(_article(finding, vocabulary))


def _article(finding: Finding, vocabulary: Vocabulary) -> Iterator[str]:
    yield f"<article><div>{''.join(map(_picture, finding.photos))}</div><div>\n"
    if finding.caption:
        yield f'<div class="caption">{html.escape(vocabulary.join(finding.caption))}</div>\n'
    yield f'<div class="note">{html.escape(finding.note)}</div>\n'
    others = [words for words in finding.photos[0].captions if words != finding.caption]
    if len(finding.photos) <= 2 and others:  # one photo, or one and that which it is compared with
        which = "photo" if len(finding.photos) == 1 else "first photo"
        yield f'<div class="note">{"other " * bool(finding.caption)}captions of the {which}:</div>\n<ul>\n'
        yield from (f"<li>{html.escape(vocabulary.join(words))}</li>\n" for words in others)
        yield "</ul>"
    yield "</div></article>\n"


def _picture(photo: Photo) -> str:
    """The photo with its id and split below it."""
    label = html.escape(f"{photo.id} ({photo.split})")
    return f"<figure>{thumbnail(photo, THUMBNAIL)[0]}<figcaption>{label}</figcaption></figure>"


def write_check_json(path: Path, checks: Sequence[Check]) -> None:
    """Write how much each check found, and the LISTED worst findings. Raises UserError if it cannot be written."""

    def plain(finding: Finding) -> dict:
        shown = [{"id": photo.id, "split": photo.split, "image": photo.image} for photo in finding.photos]
        return {"score": round(finding.score, 4), "note": finding.note, "photos": shown, "caption": finding.caption}

    results = {
        check.name: {
            "title": check.title,
            "meaning": check.meaning,
            "found": len(check.findings),
            "findings": [plain(finding) for finding in check.findings[:LISTED]],
        }
        for check in checks
    }
    with atomic_text(path) as file:
        json.dump(results, file, ensure_ascii=False, indent=1)
        file.write("\n")
