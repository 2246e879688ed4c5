"""How much of what captions say of drawn scenes is true, by kind of statement.

Scenes with new combinations, of a colour and a shape that no scene of train shows together, are counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from captioning.caption import CaptionResult
from captioning.encoders.grid import GRID_SIZE
from preprocess.captions import Photo
from preprocess.drawing import Box, Scene
from preprocess.scenes import Statement, judge, named_objects, words_of

KINDS = ("background", "colour", "shape", "combination", "size", "count", "relation", "between")
RELATION_KINDS = ("relation", "between")


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    true: int
    total: int

    @classmethod
    def of(cls, truths: Iterable[bool]) -> Share:
        """The share that is true."""
        values = list(truths)
        return cls(sum(values), len(values))

    @property
    def value(self) -> float | None:
        """From 0 to 1; None of nothing."""
        return self.true / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the probability, by the score method (Wilson 1927): also right for all and none.

        E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22.
        """
        if not self.total:
            return 0.0, 1.0
        z = 1.96
        share = self.true / self.total
        middle = share + z**2 / (2 * self.total)
        half = z * math.sqrt(share * (1 - share) / self.total + z**2 / (4 * self.total**2))
        scale = 1 + z**2 / self.total
        return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)

    def __str__(self) -> str:
        """Per cent, the interval, and of how many."""
        if not self.total:
            return "none stated"
        low, high = self.interval
        return f"{100 * self.true / self.total:5.1f} ({100 * low:.0f}-{100 * high:.0f}) of {self.total}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {"share": self.value, "interval": self.interval, "true": self.true, "total": self.total}


@dataclass(frozen=True)
class JudgedCaption:
    """A run's caption of a scene, judged.

    statements: None if the caption matches no template. known: the combinations that scenes of train show.
    """

    photo: Photo
    scene: Scene
    result: CaptionResult
    statements: list[Statement] | None
    language: str
    known: frozenset[tuple[str, str]]

    @classmethod
    def judge(
        cls, photo: Photo, scene: Scene, result: CaptionResult, language: str, known: frozenset[tuple[str, str]]
    ) -> JudgedCaption:
        """Judge a caption."""
        return cls(photo, scene, result, judge(result.words, scene, language), language, known)

    @property
    def is_new(self) -> bool:
        """Whether the scene has a new combination."""
        return not self.scene.combinations <= self.known

    @property
    def is_true(self) -> bool:
        """Whether the caption is a sentence of which every statement is true."""
        return self.statements is not None and all(statement.is_true for statement in self.statements)

    def states(self, kinds: Sequence[str]) -> bool:
        """Whether the caption states something of these kinds."""
        return any(statement.kind in kinds for statement in self.statements or ())

    def people_state(self, kinds: Sequence[str]) -> Iterator[bool]:
        """Whether the photo's own captions state something of these kinds, one after the other."""
        for words in self.photo.captions:
            yield any(statement.kind in kinds for statement in judge(words, self.scene, self.language) or ())

    def peaks(self) -> Iterator[tuple[bool, float]]:
        """For each named object, whether attention has its peak on it, and the share of the photo that it covers.

        Nothing for a decoder without attention.
        """
        if self.result.attention is None:
            return
        attention = self.result.attention.numpy()  # (words, 196)
        for word, boxes in named_objects(self.result.words, self.scene, self.language):
            covered = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
            yield peak_is_inside(attention[word], boxes), covered


def peak_is_inside(attention: np.ndarray, boxes: Sequence[Box]) -> bool:
    """Whether the centre of the cell with the most attention is in one of the boxes. attention: (196,), 14x14 cells."""
    row, column = divmod(int(attention.argmax()), GRID_SIZE)
    x = (column + 0.5) / GRID_SIZE
    y = (row + 0.5) / GRID_SIZE
    return any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes)


@dataclass(frozen=True)
class Row:
    """Of one kind of statement, or of whole captions: what is true, and how many captions state it.

    known, new: of scenes without and with a new combination.
    """

    known: Share
    new: Share
    stated: Share
    stated_by_people: Share

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {name: share.to_dict() for name, share in vars(self).items()}


@dataclass(frozen=True)
class TruthReport:
    """How much of what a run says of drawn scenes is true."""

    rows: dict[str, Row]
    unreadable: int  # captions that match no template; they are false
    peaks: Share  # of the named objects: attention has its peak on them
    peaks_by_chance: float | None  # share of the photo that they cover, on average
    evidence: dict[str, list[float]]  # kind -> evidence of each true statement, in nats; empty without
    probabilities: list[tuple[float, bool]]  # of each caption, and whether it is true; empty without

    def __str__(self) -> str:
        """A table, and lines on attention, evidence and probability."""
        header = f"{'true, in per cent':<22}{'known combinations':<24}{'new combinations':<24}{'stated by run':>13}"
        lines = [f"{header}{'people':>9}", *(self._line(name) for name in self.rows)]
        if self.unreadable:
            lines.append(f"captions that match no template and count as false: {self.unreadable}")
        if self.peaks_by_chance is not None:
            chance = 100 * self.peaks_by_chance
            lines.append(f"attention has its peak on the named object: {self.peaks}; by chance {chance:.1f}")
        if self.evidence:
            medians = (f"{kind} {np.median(values):+.2f}" for kind, values in self.evidence.items())
            lines.append(f"evidence of true statements, median in nats: {', '.join(medians)}")
        if self.ranked_right is not None:
            lines.append(
                f"the probability ranks a true caption above a false one in {self.ranked_right:.1%} of such pairs"
            )
        return "\n".join(lines)

    def _line(self, name: str) -> str:
        row = self.rows[name]
        stated, by_people = (
            "" if share.value is None else f"{share.value:.1%}" for share in (row.stated, row.stated_by_people)
        )
        return f"{name:<22}{row.known!s:<24}{row.new!s:<24}{stated:>13}{by_people:>9}"

    @property
    def ranked_right(self) -> float | None:
        """In how many pairs of a true and a false caption the true one has the higher probability; ties count half.

        The area under the receiver operating characteristic. None without probabilities, or if no pair exists.
        """
        true, false = (
            np.array([value for value, is_true in self.probabilities if is_true is wanted]) for wanted in (True, False)
        )
        if not len(true) or not len(false):
            return None
        difference = true[:, None] - false
        return float(((difference > 0) + 0.5 * (difference == 0)).mean())

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {
            "rows": {name: row.to_dict() for name, row in self.rows.items()},
            "unreadable": self.unreadable,
            "attention": {**self.peaks.to_dict(), "chance": self.peaks_by_chance},
            "evidence": {kind: float(np.median(values)) for kind, values in self.evidence.items()},
            "ranked_right": self.ranked_right,
        }


def report(captions: Sequence[JudgedCaption]) -> TruthReport:
    """Count what is true."""
    peaks = [peak for caption in captions for peak in caption.peaks()]
    relating = [caption for caption in captions if caption.states(RELATION_KINDS)]
    probabilities = [(caption.result.probability, caption.is_true) for caption in captions]
    return TruthReport(
        {
            "captions": _row(_caption_truths(captions), captions, KINDS),
            "that state a relation": _row(_caption_truths(relating), captions, RELATION_KINDS),
            **{kind: _row(_statement_truths(captions, kind), captions, (kind,)) for kind in KINDS},
        },
        sum(caption.statements is None for caption in captions),
        Share.of(hit for hit, _ in peaks),
        float(np.mean([covered for _, covered in peaks])) if peaks else None,
        _evidence(captions),
        [(probability, is_true) for probability, is_true in probabilities if probability is not None],
    )


def _row(truths: Iterable[tuple[bool, bool]], captions: Sequence[JudgedCaption], kinds: Sequence[str]) -> Row:
    """truths: of each statement, or caption, whether it is new and whether it is true. captions: all of them."""
    values = list(truths)
    return Row(
        Share.of(is_true for is_new, is_true in values if not is_new),
        Share.of(is_true for is_new, is_true in values if is_new),
        Share.of(caption.states(kinds) for caption in captions),
        Share.of(stated for caption in captions for stated in caption.people_state(kinds)),
    )


def _caption_truths(captions: Sequence[JudgedCaption]) -> Iterator[tuple[bool, bool]]:
    return ((caption.is_new, caption.is_true) for caption in captions)


def _statement_truths(captions: Sequence[JudgedCaption], kind: str) -> Iterator[tuple[bool, bool]]:
    """Combinations are known or new themselves; other statements are what their scene is."""
    for caption in captions:
        for statement in caption.statements or ():
            if statement.kind == kind:
                is_new = caption.is_new
                if kind == "combination" and statement.object:
                    is_new = statement.object.combination not in caption.known
                yield is_new, statement.is_true


def _evidence(captions: Sequence[JudgedCaption]) -> dict[str, list[float]]:
    """Kind -> the evidence of each true statement: the sum over its words. Empty if the run has none."""
    found: dict[str, list[float]] = {}
    for caption in captions:
        if caption.result.evidence is None:
            continue
        for statement in caption.statements or ():
            if statement.is_true:
                words = words_of(statement.fact, caption.result.words, caption.language)
                found.setdefault(statement.kind, []).append(sum(caption.result.evidence[word] for word in words))
    return {kind: found[kind] for kind in KINDS if kind in found}
