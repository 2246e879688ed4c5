"""BLEU-1..4, ROUGE-L and CIDEr-D as coco-caption defines them, on words that are already cut, with their intervals.

The scorers are pycocoevalcap's, the Python of coco-caption itself. (nltk's corpus_bleu is not the same on short
captions: it counts at least one n-gram in each.) All scores are times 100: corpus BLEU without smoothing, CIDEr-D with
the document frequencies of the references given. References are the words themselves, not their <unk> version.

Every score is a function of sums over photos, so one table of what each photo adds (its parts) gives the scores of all
photos, of one, and of photos drawn with replacement: the bootstrap (Efron 1979; for captions Koehn 2004).

Letters: N photos, R resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs, cook_test
from pycocoevalcap.rouge.rouge import Rouge

NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D")
RESAMPLES = 1000

Captions = Mapping[str, Sequence[str]]
References = Mapping[str, Sequence[Sequence[str]]]


def score(candidates: Captions, references: References) -> dict[str, float]:
    """Scores times 100, of one caption (words) a photo against one or more references (words) of the same photo.

    Raises as `parts_of` does.
    """
    return by_name(aggregate(per_image_stats(candidates, references)))


def by_name(scores: np.ndarray) -> dict[str, float]:
    """(6,) -> each score under its name."""
    return dict(zip(NAMES, scores.tolist(), strict=True))


def per_image_stats(candidates: Captions, references: References) -> np.ndarray:
    """What each photo adds to the scores, in the order of the candidates -> (N, 12) float64.

    Columns: the n-grams of 1 to 4 words that are right, all n-grams of 1 to 4 words, the words, those of the reference
    nearest in length, ROUGE-L, CIDEr-D. Candidates may be empty captions. CIDEr-D's document frequencies are those of
    all photos given. Raises ValueError without candidates, for a photo without a reference that has words, and for a
    word with a space.
    """
    theirs = {photo: [_joined(words)] for photo, words in candidates.items()}
    if not theirs:
        raise ValueError("no captions to score")
    alone = [photo for photo in theirs if not any(references.get(photo, ()))]
    if alone:
        raise ValueError(f"no references for {alone[0]}")
    ours = {photo: [_joined(words) for words in references[photo]] for photo in theirs}
    bleu = [_counts(words, ours[photo]) for photo, (words,) in theirs.items()]
    rouge, cider = Rouge().compute_score(ours, theirs)[1], CiderScorer()
    cider.ctest = _Cooked(cook_test, [words for (words,) in theirs.values()])
    cider.crefs = _Cooked(cook_refs, [*ours.values()])
    cider.document_frequency = Counter()  # of small integers, which need no object each
    return np.column_stack([bleu, rouge, cider.compute_score()[1]])


@dataclass
class _Cooked:
    """Captions as n-grams, counted anew by each loop over them: those of 5,000 photos would take 100 MB."""

    cook: Callable
    captions: list

    def __len__(self) -> int:
        return len(self.captions)

    def __iter__(self) -> Iterator:
        return map(self.cook, self.captions)


def _counts(words: str, references: list[str]) -> list[int]:
    """What BLEU counts in a photo. Of two references as near in length, the shorter."""
    (photo,) = BleuScorer(words, references, n=4).ctest
    nearest = min((abs(length - photo["testlen"]), length) for length in photo["reflen"])[1]
    return [*photo["correct"], *photo["guess"], photo["testlen"], nearest]


def aggregate(parts: np.ndarray) -> np.ndarray:
    """The scores of photos taken together: parts (..., N, 12) -> (..., 6) times 100, in the order of NAMES."""
    sums, photos = parts.sum(-2), parts.shape[-2]
    right, all_grams, words, nearest = sums[..., :4], sums[..., 4:8], sums[..., 8:9], sums[..., 9:10]
    precision = (right + 1e-15) / (all_grams + 1e-9)  # coco-caption's guards against a division by zero
    brevity = np.exp(np.minimum(0, 1 - (nearest + 1e-9) / (words + 1e-15)))
    bleu = brevity * precision.cumprod(-1) ** (1 / np.arange(1, 5))
    return 100 * np.concatenate([bleu, sums[..., 10:] / photos], -1)


def bootstrap(parts: np.ndarray) -> np.ndarray:
    """The scores of 1,000 data sets of N photos drawn with replacement from these: (N, 12) -> (R, 6).

    The draws depend on N alone: those of two sets of captions of the same photos are paired. Document frequencies stay.
    """
    random, photos = np.random.default_rng(0), len(parts)
    return np.stack([aggregate(parts[random.integers(photos, size=photos)]) for _ in range(RESAMPLES)])


def confidence_interval(scores: np.ndarray) -> np.ndarray:
    """The middle 95 % of resampled scores: (R, 6) -> (6, 2), from and to."""
    return np.percentile(scores, (2.5, 97.5), axis=0).T


def _joined(words: Sequence[str]) -> str:
    for word in words:
        if not word or word.split() != [word]:
            raise ValueError(f"{word!r} is not one word")
    return " ".join(words)
