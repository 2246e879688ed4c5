"""Scores of a set of captions with confidence intervals and statistics, and comparisons of two sets.

A protocol says how captions and references are tokenized before they are compared. Scores depend on it:

    word            the words of the tokenizer
    coco            English: the tokens of coco-caption, from the captions as they were written, so that scores compare
                    with published ones. The words of the tokenizer lack apostrophes: mans for man 's
    character       languages without spaces: every character is a token; a run of Latin letters or digits stays one
    ai-challenger   Chinese: the evaluation of AI Challenger 2017. The caption loses its 。 and is tokenized by jieba's
                    precise mode; references keep their tokens. All pass through coco-caption's PTB tokenizer, which in
                    Chinese only lowers the case and drops its punctuation and PTB_QUOTES (tested on real captions)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

from captioning.caption import CaptionResult
from captioning.evaluation.coco_tokens import coco_tokens
from captioning.evaluation.java_metrics import meteor_score, spice_score
from captioning.evaluation.metrics import (
    METRICS,
    NUM_RESAMPLES,
    Captions,
    References,
    aggregate,
    bootstrap,
    by_name,
    confidence_interval,
    per_image_stats,
    uninformative,
)
from preprocess.captions import TEXTS_FILE, Photo
from preprocess.languages import LANGUAGES
from preprocess.tokenizers import jieba_cut

CaptionedPhotos = Sequence[tuple[Photo, CaptionResult]]
Comparison = dict[str, dict[str, dict[str, Any]]]  # protocol -> metric -> difference, interval, better

PTB_QUOTES = "“”‘’"  # the PTB tokenizer writes them as '' and `, and drops those
NO_TEXTS = (
    f"not scored by coco-caption's tokens, as published scores are: the data set lacks {TEXTS_FILE}; to make it, run "
    "python -m preprocess again with the same settings"
)
# Words that rarely end a caption: 0.6 % of Flickr8k's 35,000 English captions and 0.1 % of the Chinese ones end in one.
# Words that may end a caption, such as by, over or 上 (on), are not included.
FUNCTION_WORDS = {
    "en": frozenset(
        "a an the this that his their its in on at of with for to from into onto near through under and or "
        "while as is are was were am be".split()
    ),
    "zh": frozenset(
        "的 地 得 在 和 与 及 跟 把 被 给 对 从 向 往 于 是 有 穿 穿着 正在 个 只 条 名 位 "
        "一个 一只 一条 一名 一位 一群 一件 一辆 一张 两个 两只 几个".split()
    ),
}


def by_character(words: Sequence[str]) -> list[str]:
    """Tokenize a caption into characters; a run of Latin letters or digits stays one token."""
    return re.findall(r"[0-9A-Za-z]+|\S", "".join(words))


def by_challenge(words: Sequence[str]) -> list[str]:
    """Apply the PTB tokenizer's rules to a Chinese caption that is already tokenized."""
    text = " ".join(words).lower().translate(dict.fromkeys(map(ord, PTB_QUOTES)))
    return [word for word in text.split() if word not in PUNCTUATIONS]


@dataclass(frozen=True)
class Protocol:
    """How captions and references are tokenized before they are compared."""

    tokenize_caption: Callable[[CaptionResult], Sequence[str]]
    tokenize_reference: Callable[[Any], Sequence[str]]  # of the words of a reference, or with from_text of its text
    from_text: bool = False


PROTOCOLS = {
    "word": Protocol(lambda caption: caption.words, list),
    "coco": Protocol(lambda caption: coco_tokens(caption.text), coco_tokens, from_text=True),
    "character": Protocol(lambda caption: by_character(caption.words), by_character),
    "ai-challenger": Protocol(
        lambda caption: by_challenge(jieba_cut("".join(caption.text.split()).replace("。", ""))),
        by_challenge,
    ),
}


@dataclass(frozen=True)
class CaptionStats:
    """Statistics of a set of captions, other than its scores. Fractions are between 0 and 1."""

    words: float  # mean number per caption
    vocabulary: int  # number of different words
    distinct: float  # number of different captions / number of captions
    repeated_words: float  # fraction of words that occur earlier in their caption
    # fraction of captions that end in a function word, a known flaw of CIDEr optimisation; None for ja and th
    function_word_endings: float | None
    unfinished: float | None = None  # fraction of captions truncated at the maximum length; None if unknown

    @classmethod
    def compute(cls, captions: Sequence[Sequence[str]], language: str, unfinished: float | None = None) -> CaptionStats:
        """Compute the statistics of one caption or more, given in words. language: a name in LANGUAGES."""
        total = sum(len(words) for words in captions)
        repeated = sum(len(words) - len(set(words)) for words in captions)
        function_words = FUNCTION_WORDS.get(language, frozenset())
        endings = sum(bool(words) and words[-1] in function_words for words in captions)
        return cls(
            words=total / len(captions),
            vocabulary=len({word for words in captions for word in words}),
            distinct=len({tuple(words) for words in captions}) / len(captions),
            repeated_words=repeated / max(1, total),
            function_word_endings=endings / len(captions) if function_words else None,
            unfinished=unfinished,
        )


@dataclass(frozen=True)
class Scores:
    """The scores of a set of captions, by every protocol that suits its language and tokenizer."""

    tokenizer: str
    stats: dict[str, np.ndarray]  # protocol -> per-image statistics (N, 12), see captioning.evaluation.metrics
    java: dict[str, dict[str, float | str]]  # protocol -> METEOR and SPICE, or why they were skipped
    uninformative: dict[str, dict[str, str]]  # protocol -> metrics that say nothing about the captions, and why
    caption_stats: CaptionStats
    reference_stats: CaptionStats
    notes: Sequence[str] = ()  # what could not be scored, and why

    @functools.cached_property
    def resampled(self) -> dict[str, np.ndarray]:
        """Protocol -> scores of the bootstrap resamples (R, 6)."""
        return {protocol: bootstrap(stats) for protocol, stats in self.stats.items()}

    @property
    def per_caption(self) -> np.ndarray:
        """The scores of each caption alone, by the protocol word: (N, 6)."""
        return aggregate(self.stats["word"][:, None])

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON-ready data."""
        intervals = {
            protocol: by_name(confidence_interval(resampled)) for protocol, resampled in self.resampled.items()
        }
        scores = {
            protocol: {**by_name(aggregate(stats)), **self.java[protocol]} for protocol, stats in self.stats.items()
        }
        return {
            "photos": len(self.stats["word"]),
            "tokenizer": self.tokenizer,
            **scores,
            "intervals": intervals,
            "uninformative": self.uninformative,
            "facts": {"captions": vars(self.caption_stats), "references": vars(self.reference_stats)},
        }

    def __str__(self) -> str:
        """Tables of scores and statistics, with how they were computed."""
        conditions = (
            f"{len(self.stats['word']):,} photos, tokenizer {self.tokenizer}; times 100, corpus BLEU unsmoothed, "
            f"references are the original words, not their <unk> version; intervals: {NUM_RESAMPLES:,} resamples"
        )
        notes = [*self._skipped(), *self._uninformative()]
        return "\n".join([*self._score_lines(), conditions, *notes, "", *self._stats_lines()])

    def _score_lines(self) -> list[str]:
        lines = [_row("", [*METRICS, "METEOR", "SPICE"])]
        for protocol, stats in self.stats.items():
            scores = [*aggregate(stats), *self.java[protocol].values()]
            lines.append(_row(f"by {protocol}", [_format_score(score) for score in scores]))
            intervals = confidence_interval(self.resampled[protocol])
            lines.append(_row("95 %", [f"{low:.1f}-{high:.1f}" for low, high in intervals]))
        return lines

    def _skipped(self) -> list[str]:
        """What was skipped and why, each reason once."""
        scores = [score for java in self.java.values() for score in java.values()]
        return list(dict.fromkeys([*self.notes, *(score for score in scores if isinstance(score, str))]))

    def _uninformative(self) -> list[str]:
        return [
            f"{metric} by {protocol} says nothing about the captions: {reason}"
            for protocol, reasons in self.uninformative.items()
            for metric, reason in reasons.items()
        ]

    def _stats_lines(self) -> list[str]:
        header = ["words", "vocabulary", "distinct", "repeated", "bad endings", "unfinished"]
        return [
            _row("", header),
            _row("captions", _stats_cells(self.caption_stats)),
            _row("references", _stats_cells(self.reference_stats)),
        ]


def score_captions(
    captioned: CaptionedPhotos,
    language: str,
    tokenizer: str,
    java: bool = True,
    texts: Mapping[str, Sequence[str]] | None = None,
) -> Scores:
    """Score captions against the references of their photos, which are tokenized.

    language: a name in LANGUAGES; tokenizer: the one of the references. Without `java`, METEOR and SPICE are left out.
    texts: the references of each photo as they were written, for the protocol coco. Raises ValueError if there are no
    captions or a photo has no references.
    """
    stats: dict[str, np.ndarray] = {}
    java_scores: dict[str, dict[str, float | str]] = {}
    reasons: dict[str, dict[str, str]] = {}
    for name in _protocols(language, tokenizer, has_texts=texts is not None):
        candidates, references = _tokenized(PROTOCOLS[name], captioned, texts)
        stats[name] = per_image_stats(candidates, references)
        reasons[name] = uninformative(candidates, references)
        java_scores[name] = _java_scores(candidates, references, language, name) if java else {}
    captions = [caption for _, caption in captioned]
    caption_stats = CaptionStats.compute([caption.words for caption in captions], language, _unfinished(captions))
    reference_stats = CaptionStats.compute([words for photo, _ in captioned for words in photo.captions], language)
    notes = [NO_TEXTS] if language == "en" and texts is None else []
    return Scores(tokenizer, stats, java_scores, reasons, caption_stats, reference_stats, notes)


def _protocols(language: str, tokenizer: str, has_texts: bool) -> list[str]:
    if LANGUAGES[language].has_spaces:
        return ["word", "coco"] if has_texts else ["word"]
    if tokenizer == "jieba":  # references tokenized as those of the challenge
        return ["word", "character", "ai-challenger"]
    return ["word", "character"]


def _tokenized(
    protocol: Protocol, captioned: CaptionedPhotos, texts: Mapping[str, Sequence[str]] | None
) -> tuple[Captions, References]:
    """The captions and the references by a protocol. References without a token are left out."""
    candidates = {photo.id: protocol.tokenize_caption(caption) for photo, caption in captioned}
    references = {}
    for photo, _ in captioned:
        captions = texts[photo.id] if protocol.from_text and texts is not None else photo.captions
        references[photo.id] = list(filter(None, map(protocol.tokenize_reference, captions)))
    return candidates, references


def _unfinished(captions: Sequence[CaptionResult]) -> float | None:
    """The fraction of captions that are unfinished, among those that are known to be finished or not."""
    finished = [caption.finished for caption in captions if caption.finished is not None]
    return 1 - sum(finished) / len(finished) if finished else None


def _java_scores(candidates: Captions, references: References, language: str, protocol: str) -> dict[str, float | str]:
    """METEOR and SPICE, or why they are skipped.

    AI Challenger applies METEOR's English setting to Chinese words, where only equal words match.
    """
    meteor: float | str = "skipped: METEOR is for English"
    spice: float | str = "skipped: SPICE is for English"
    if language == "en" or protocol == "ai-challenger":
        meteor = meteor_score(candidates, references)
    if language == "en":
        spice = spice_score(candidates, references)
    return {"METEOR": meteor, "SPICE": spice}


def compare(first: Scores, second: Scores) -> Comparison:
    """Compare two sets of captions of the same photos, in the same order.

    Returns for each protocol and metric: "difference", the score of the second minus that of the first; "interval", its
    95 % interval; "better", the fraction of paired resamples in which the second has the higher score.
    """
    comparison: Comparison = {}
    for protocol, stats in second.stats.items():
        differences = aggregate(stats) - aggregate(first.stats[protocol])
        resampled = second.resampled[protocol] - first.resampled[protocol]
        intervals = confidence_interval(resampled)
        better = (resampled > 0).mean(0)
        comparison[protocol] = {
            metric: {
                "difference": differences[index].item(),
                "interval": intervals[index].tolist(),
                "better": better[index].item(),
            }
            for index, metric in enumerate(METRICS)
        }
    return comparison


def format_comparison(comparison: Comparison) -> str:
    """The result of `compare` as a table."""
    lines = [_row("", METRICS)]
    for protocol, metrics in comparison.items():
        lines.append(_row(f"by {protocol}", [f"{metric['difference']:+.1f}" for metric in metrics.values()]))
        lines.append(_row("95 %", ["{:+.1f}..{:+.1f}".format(*metric["interval"]) for metric in metrics.values()]))
        lines.append(_row("better in", [f"{metric['better']:.1%}" for metric in metrics.values()]))
    return "\n".join(lines)


# ---- tables


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<16}" + "".join(f" {cell:>11}" for cell in cells)


def _format_score(score: float | str) -> str:
    return "-" if isinstance(score, str) else f"{score:.1f}"


def _stats_cells(stats: CaptionStats) -> list[str]:
    fractions = (stats.distinct, stats.repeated_words, stats.function_word_endings, stats.unfinished)
    percentages = ["-" if fraction is None else f"{fraction:.1%}" for fraction in fractions]
    return [f"{stats.words:.1f}", f"{stats.vocabulary:,}", *percentages]
