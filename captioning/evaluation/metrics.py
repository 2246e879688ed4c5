"""BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D of tokenized captions, as coco-caption defines them, and bootstrap intervals.

The scorers are those of pycocoevalcap, the Python code of coco-caption itself. (nltk's corpus_bleu differs on short
captions: it counts at least one n-gram per caption.) Scores are multiplied by 100. BLEU is the corpus score without
smoothing; CIDEr-D takes its document frequencies from the references given. References are the original words, not
their <unk> version.

Every score is a function of sums over photos. One table of per-photo statistics therefore gives the scores of the whole
set, of each caption alone, and of photos sampled with replacement (the bootstrap).

    BLEU          Papineni et al. 2002, https://aclanthology.org/P02-1040/
    ROUGE-L       Lin 2004, https://aclanthology.org/W04-1013/
    CIDEr-D       Vedantam et al. 2015, https://arxiv.org/abs/1411.5726
    coco-caption  Chen et al. 2015, https://arxiv.org/abs/1504.00325
    bootstrap     Efron 1979, https://doi.org/10.1214/aos/1176344552;
                  for text generation Koehn 2004, https://aclanthology.org/W04-3250/

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

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D")
NUM_RESAMPLES = 1000

Captions = Mapping[str, Sequence[str]]  # photo id -> words
References = Mapping[str, Sequence[Sequence[str]]]  # photo id -> captions in words


def score(candidates: Captions, references: References) -> dict[str, float]:
    """Score one caption per photo against one or more references of the same photo.

    Returns each metric times 100. Raises the errors of `per_image_stats`.
    """
    return by_name(aggregate(per_image_stats(candidates, references)))


def by_name(scores: np.ndarray) -> dict[str, float]:
    """Scores (6,) -> metric name -> score."""
    return dict(zip(METRICS, scores.tolist(), strict=True))


def per_image_stats(candidates: Captions, references: References) -> np.ndarray:
    """Compute the statistics that each photo adds to the scores, in the order of the candidates.

    Returns (N, 12) float64. Columns 0-3: matching n-grams of 1 to 4 words; 4-7: all n-grams of 1 to 4 words; 8: words;
    9: words of the reference closest in length; 10: ROUGE-L; 11: CIDEr-D, with the document frequencies of all photos
    given. Candidates may be empty captions.

    Raises ValueError if there are no candidates, if a photo has no reference with words, or if a word contains a space.
    """
    if not candidates:
        raise ValueError("no captions to score")
    for photo in candidates:
        if not any(references.get(photo, ())):
            raise ValueError(f"no references for {photo}")
    candidate_texts = {photo: _join(words) for photo, words in candidates.items()}
    reference_texts = {photo: [_join(words) for words in references[photo]] for photo in candidates}
    bleu = [_bleu_counts(text, reference_texts[photo]) for photo, text in candidate_texts.items()]
    rouge = Rouge().compute_score(reference_texts, {photo: [text] for photo, text in candidate_texts.items()})[1]
    cider = _cider_d(list(candidate_texts.values()), list(reference_texts.values()))
    return np.column_stack([bleu, rouge, cider])


def _bleu_counts(candidate: str, references: list[str]) -> list[int]:
    """Columns 0-9 of `per_image_stats`. Of two references equally close in length, the shorter one counts."""
    (counts,) = BleuScorer(candidate, references, n=4).ctest
    closest = min((abs(length - counts["testlen"]), length) for length in counts["reflen"])[1]
    return [*counts["correct"], *counts["guess"], counts["testlen"], closest]


def _cider_d(candidates: list[str], references: list[list[str]]) -> np.ndarray:
    """CIDEr-D of each photo -> (N,)."""
    scorer = CiderScorer()
    scorer.ctest = _LazyNGrams(cook_test, candidates)
    scorer.crefs = _LazyNGrams(cook_refs, references)
    scorer.document_frequency = Counter()  # of small ints, which Python caches; the scorer's default counts in floats
    return scorer.compute_score()[1]


@dataclass
class _LazyNGrams:
    """N-gram counts, computed again in each loop over them: those of 5,000 photos would take 100 MB."""

    count: Callable
    captions: list

    def __len__(self) -> int:
        return len(self.captions)

    def __iter__(self) -> Iterator:
        return map(self.count, self.captions)


def aggregate(stats: np.ndarray) -> np.ndarray:
    """Compute the scores of a set of photos from their statistics.

    stats: (..., N, 12). Returns (..., 6), times 100, in the order of METRICS.
    """
    sums = stats.sum(-2)
    num_photos = stats.shape[-2]
    matches, total, words, closest, averaged = np.split(sums, [4, 8, 9, 10], axis=-1)
    precision = (matches + 1e-15) / (total + 1e-9)  # coco-caption's guards against division by zero
    brevity = np.exp(np.minimum(0, 1 - (closest + 1e-9) / (words + 1e-15)))
    bleu = brevity * precision.cumprod(-1) ** (1 / np.arange(1, 5))
    return 100 * np.concatenate([bleu, averaged / num_photos], -1)


def bootstrap(stats: np.ndarray) -> np.ndarray:
    """Score 1,000 resamples of N photos, with replacement: stats (N, 12) -> (R, 6).

    The indices depend on N alone, so resamples of two sets of captions of the same photos are paired. The document
    frequencies of CIDEr-D stay those of the original set.
    """
    rng = np.random.default_rng(0)
    num_photos = len(stats)
    resamples = (rng.integers(num_photos, size=num_photos) for _ in range(NUM_RESAMPLES))
    return np.stack([aggregate(stats[indices]) for indices in resamples])


def confidence_interval(scores: np.ndarray) -> np.ndarray:
    """The central 95 % of the scores of resamples: (R, 6) -> (6, 2), lower and upper bounds."""
    return np.percentile(scores, (2.5, 97.5), axis=0).T


def _join(words: Sequence[str]) -> str:
    for word in words:
        if not word or word.split() != [word]:
            raise ValueError(f"{word!r} is not one word")
    return " ".join(words)
