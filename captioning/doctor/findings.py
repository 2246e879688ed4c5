"""What a check returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from preprocess.captions import Photo


class Finding(NamedTuple):
    """Something that looks wrong.

    score: higher is worse; comparable within one check only. note: what is wrong, in words. photos: to be shown,
    the one concerned first. caption: the words concerned, if they are those of one caption.
    """

    score: float
    note: str
    photos: tuple[Photo, ...]
    caption: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Check:
    """The result of one check. name: its key in the JSON file. meaning: what it looks for, for a reader of the page."""

    name: str
    title: str
    meaning: str
    findings: Sequence[Finding] = field(default_factory=list)


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """The findings by falling score; equal scores keep their order."""
    return sorted(findings, key=lambda finding: -finding.score)
