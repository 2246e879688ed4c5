"""The scores of a set of captions: how far they can be trusted, what else they show, and which of two sets is better.

A protocol says how captions and references are cut before they are compared; the number depends on it:

    word            the words as the tokenizer cut them
    character       Chinese: every character by itself, a run of Latin letters or digits stays one
    ai-challenger   Chinese: AI Challenger 2017's own evaluation. A caption loses its 。 and is cut by jieba's precise
                    mode, references are as they were cut; all go through coco-caption's PTB tokenizer, which in Chinese
                    does no more than lower the case and drop its marks (with `PTB_QUOTES`; tested on real captions)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

from captioning.caption import CaptionResult
from captioning.evaluation.java_metrics import meteor_score, spice_score
from captioning.evaluation.metrics import (
    NAMES,
    RESAMPLES,
    aggregate,
    bootstrap,
    by_name,
    confidence_interval,
    per_image_stats,
)
from preprocess.captions import Photo
from preprocess.tokenizers import jieba_cut

Pairs = Sequence[tuple[Photo, CaptionResult]]

PTB_QUOTES = "“”‘’"  # it writes them as '' and `, which are dropped
# Words that a caption hardly ever ends in: of Flickr8k's 35,000 captions 0.6 % in English and 0.1 % in Chinese do.
# Words that may well end one, such as by, over or 上 (on), are not among them.
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
    """The same caption cut in characters; a run of Latin letters or digits stays one."""
    return re.findall(r"[0-9A-Za-z]+|\S", "".join(words))


def by_challenge(words: Sequence[str]) -> list[str]:
    """What the PTB tokenizer leaves of a Chinese caption that is cut already."""
    text = " ".join(words).lower().translate(dict.fromkeys(map(ord, PTB_QUOTES)))
    return [word for word in text.split() if word not in PUNCTUATIONS]


# How a caption is cut, and how a reference is.
PROTOCOLS: dict[str, tuple[Callable[[CaptionResult], list[str]], Callable[[Sequence[str]], list[str]]]] = {
    "word": (lambda caption: caption.words, list),
    "character": (lambda caption: by_character(caption.words), by_character),
    "ai-challenger": (lambda caption: by_challenge(jieba_cut(caption.text.replace("。", ""))), by_challenge),
}


@dataclass(frozen=True)
class CaptionStats:
    """What a set of captions shows beside its scores; shares are of 1."""

    words: float  # in a caption, on average
    vocabulary: int  # words used
    distinct: float  # captions, each counted once however often it is there
    repeated_words: float  # words that their caption said before
    function_word_endings: float  # captions that break off at one: what CIDEr optimisation is known to teach
    unfinished: float | None = None  # captions cut at the greatest length; None: not known

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]], language: str, unfinished: float | None = None) -> CaptionStats:
        total = sum(map(len, captions))
        endings = sum(bool(words) and words[-1] in FUNCTION_WORDS[language] for words in captions)
        return cls(
            words=total / len(captions),
            vocabulary=len({word for words in captions for word in words}),
            distinct=len(set(map(tuple, captions))) / len(captions),
            repeated_words=sum(len(words) - len(set(words)) for words in captions) / max(1, total),
            function_word_endings=endings / len(captions),
            unfinished=unfinished,
        )


@dataclass(frozen=True)
class Scores:
    """The scores of a set of captions, by every protocol that fits its language and its tokenizer."""

    tokenizer: str
    parts: dict[str, np.ndarray]  # by protocol: what each photo adds, (N, 12); see metrics
    java: dict[str, dict[str, float | str]]  # by protocol: METEOR and SPICE, or why they were skipped
    captions: CaptionStats
    references: CaptionStats

    @functools.cached_property
    def resamples(self) -> dict[str, np.ndarray]:
        """By protocol, (R, 6)."""
        return {protocol: bootstrap(parts) for protocol, parts in self.parts.items()}

    @property
    def per_caption(self) -> np.ndarray:
        """The scores of every caption by itself, by word: (N, 6)."""
        return aggregate(self.parts["word"][:, None])

    def to_dict(self) -> dict:
        """Plain data, for JSON."""
        intervals = {
            protocol: dict(zip(NAMES, confidence_interval(scores).tolist(), strict=True))
            for protocol, scores in self.resamples.items()
        }
        scores = {
            protocol: {**by_name(aggregate(parts)), **self.java[protocol]} for protocol, parts in self.parts.items()
        }
        facts = {"captions": vars(self.captions), "references": vars(self.references)}
        return {
            "photos": len(self.per_caption),
            "tokenizer": self.tokenizer,
            **scores,
            "intervals": intervals,
            "facts": facts,
        }

    def __str__(self) -> str:
        """The table for a person, with how the numbers were made."""
        lines, skipped = [_row("", [*NAMES, "METEOR", "SPICE"])], {}
        for protocol, parts in self.parts.items():
            java = self.java[protocol].values()
            skipped |= dict.fromkeys(value for value in java if isinstance(value, str))
            lines.append(_row(f"by {protocol}", [*map(_figure, aggregate(parts)), *map(_figure, java)]))
            lines.append(
                _row("95 %", [f"{low:.1f}-{high:.1f}" for low, high in confidence_interval(self.resamples[protocol])])
            )
        made = (
            f"{len(self.per_caption):,} photos, words by {self.tokenizer}; times 100, corpus BLEU unsmoothed, "
            f"references are the words themselves, not their <unk> version; intervals: {RESAMPLES:,} resamples"
        )
        return "\n".join([*lines, made, *skipped, "", *_facts(self.captions, self.references)])


def score_captions(pairs: Pairs, language: str, tokenizer: str, java: bool = True) -> Scores:
    """Scores of captions against the references of their photos; without `java` METEOR and SPICE are left out."""
    protocols = ["word"] if language == "en" else ["word", "character"]
    if language == "zh" and tokenizer == "jieba":  # the references are cut as the challenge's are
        protocols.append("ai-challenger")
    parts, from_java = {}, {}
    for protocol in protocols:
        of_caption, of_reference = PROTOCOLS[protocol]
        candidates = {photo.id: of_caption(caption) for photo, caption in pairs}
        references = {photo.id: [*map(of_reference, photo.captions)] for photo, _ in pairs}
        parts[protocol] = per_image_stats(candidates, references)
        from_java[protocol] = _java_scores(candidates, references, language, protocol) if java else {}
    known = [caption.finished for _, caption in pairs if caption.finished is not None]
    unfinished = 1 - sum(known) / len(known) if known else None
    ours = CaptionStats.of([caption.words for _, caption in pairs], language, unfinished)
    theirs = CaptionStats.of([words for photo, _ in pairs for words in photo.captions], language)
    return Scores(tokenizer, parts, from_java, ours, theirs)


def _java_scores(candidates: dict, references: dict, language: str, protocol: str) -> dict[str, float | str]:
    """The challenge lets METEOR's English setting loose on Chinese words: only equal ones match."""
    none = "skipped: {} is for English"
    has_meteor = language == "en" or protocol == "ai-challenger"
    meteor = meteor_score(candidates, references) if has_meteor else none.format("METEOR")
    spice = spice_score(candidates, references) if language == "en" else none.format("SPICE")
    return {"METEOR": meteor, "SPICE": spice}


def compare(one: Scores, other: Scores) -> dict[str, dict[str, dict]]:
    """By protocol and score: other - one, its interval and the share of paired resamples in which other is better.

    Both of captions of the same photos in the same order.
    """
    found = {}
    for protocol, parts in other.parts.items():
        difference = aggregate(parts) - aggregate(one.parts[protocol])
        gaps = other.resamples[protocol] - one.resamples[protocol]
        rows = zip(difference.tolist(), confidence_interval(gaps).tolist(), (gaps > 0).mean(0).tolist(), strict=True)
        found[protocol] = {
            name: {"difference": gap, "interval": ends, "better": share}
            for name, (gap, ends, share) in zip(NAMES, rows, strict=True)
        }
    return found


def format_comparison(found: dict[str, dict[str, dict]]) -> str:
    """What `compare` found, for a person."""
    lines = [_row("", NAMES)]
    for protocol, scores in found.items():
        lines.append(_row(f"by {protocol}", [f"{score['difference']:+.1f}" for score in scores.values()]))
        lines.append(_row("95 %", ["{:+.1f}..{:+.1f}".format(*score["interval"]) for score in scores.values()]))
        lines.append(_row("better in", [f"{score['better']:.1%}" for score in scores.values()]))
    return "\n".join(lines)


def _facts(captions: CaptionStats, references: CaptionStats) -> list[str]:
    """Two rows of a table."""
    lines = [_row("", ["words", "vocabulary", "distinct", "said before", "break off", "unfinished"])]
    for name, facts in (("captions", captions), ("references", references)):
        shares = (facts.distinct, facts.repeated_words, facts.function_word_endings, facts.unfinished)
        cells = [f"{facts.words:.1f}", f"{facts.vocabulary:,}", *(f"{s:.1%}" if s is not None else "-" for s in shares)]
        lines.append(_row(name, cells))
    return lines


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<16}" + "".join(f" {cell:>11}" for cell in cells)


def _figure(value: float | str) -> str:
    return "-" if isinstance(value, str) else f"{value:.1f}"
