"""BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D of tokenized captions, as coco-caption defines them, and bootstrap intervals.

The scores equal those of pycocoevalcap, the Python code of coco-caption itself; the tests compare them to 1e-9. N-grams
are counted as arrays (`captioning.evaluation.ngrams`), in a fraction of its time (bench/scoring.py). nltk's corpus_bleu
differs on short captions: it counts at least one n-gram per caption. Scores are multiplied by 100. BLEU is the corpus
score without smoothing; CIDEr-D takes its document frequencies from the references given. References are the original
words, not their <unk> version.

Every score is a function of sums over photos. One table of per-photo statistics therefore gives the scores of the whole
set, of each caption alone, and of photos sampled with replacement (the bootstrap).

    BLEU          Papineni et al. 2002, https://aclanthology.org/P02-1040/
    ROUGE-L       Lin 2004, https://aclanthology.org/W04-1013/
    CIDEr-D       Vedantam et al. 2015, https://arxiv.org/abs/1411.5726
    coco-caption  Chen et al. 2015, https://arxiv.org/abs/1504.00325
    bootstrap     Efron 1979, https://doi.org/10.1214/aos/1176344552;
                  for text generation Koehn 2004, https://aclanthology.org/W04-3250/
    subsequences  Hyyrö 2004, "Bit-parallel LCS-length computation revisited", AWOCA

Letters: N photos, R resamples, M words of all captions concatenated, D different n-grams of one order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from captioning.evaluation.ngrams import (
    MAX_ORDER,
    Comparisons,
    Matches,
    NGramCounts,
    Occurrences,
    cider_d,
    document_frequencies,
    inverse_document_frequencies,
    number_ngrams,
    tf_idf_cosines,
)

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D")
NUM_RESAMPLES = 1000
RESAMPLED_PHOTOS = 2**18  # photos that are drawn at once, in one resample or in many small ones
ROUGE_BETA = 1.2  # how much more recall counts than precision, as in coco-caption

Captions = Mapping[str, Sequence[str]]  # photo id -> words
References = Mapping[str, Sequence[Sequence[str]]]  # photo id -> captions in words


def score(candidates: Captions, references: References) -> dict[str, float]:
    """Score one caption per photo against one or more references of the same photo.

    Returns each metric times 100. Raises the errors of `per_image_stats`.
    """
    return by_name(aggregate(per_image_stats(candidates, references)))


def uninformative(candidates: Captions, references: References) -> dict[str, str]:
    """The metrics that say nothing about these captions, and why: metric -> reason.

    CIDEr-D weighs an n-gram by log(photos / photos that have it in their references): it is 0 for all captions if all
    photos have the same n-grams. BLEU of n words compares n-grams of n words: without any, its value is that of
    coco-caption's guards against division by zero. Captions are those of `per_image_stats`.
    """
    reasons = {}
    for order, number in enumerate(("two", "three", "four"), start=2):
        if not any(len(words) >= order for photo in candidates for words in references[photo]):
            reasons[f"BLEU-{order}"] = f"no reference has {number} words"
        elif not any(len(words) >= order for words in candidates.values()):
            reasons[f"BLEU-{order}"] = f"no caption has {number} words"
    first, *others = candidates
    ngrams = _distinct_ngrams(references[first])
    if not others:
        reasons["CIDEr-D"] = "it weighs words by how few photos they describe, and there is only one photo"
    elif all(_distinct_ngrams(references[photo]) == ngrams for photo in others):
        reasons["CIDEr-D"] = "it weighs words by how few photos they describe, and all photos have the same captions"
    return reasons


def _distinct_ngrams(captions: Sequence[Sequence[str]]) -> set[tuple[str, ...]]:
    """The n-grams of 1 to 4 words in these captions."""
    return {
        tuple(words[start : start + order])
        for words in captions
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(words) - order + 1)
    }


def by_name(scores: np.ndarray) -> dict[str, Any]:
    """Scores (6,), or their intervals (6, 2) -> metric name -> score, or [lower, upper]."""
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
    photo_references = [references[photo] for photo in candidates]
    captions = [*candidates.values(), *chain.from_iterable(photo_references)]
    words, lengths = _encode(captions)
    references_of_photo = np.array([len(own) for own in photo_references])
    comparisons = Comparisons(lengths, np.arange(len(candidates)), references_of_photo)
    matching, cosines = [], np.zeros(len(comparisons.candidate))
    for ngrams in number_ngrams(words, lengths):
        counts = comparisons.count(ngrams)
        matches = comparisons.match(counts)
        matching.append(_clipped_matches(comparisons, counts, matches))
        cosines += tf_idf_cosines(comparisons, counts, matches, _weights(comparisons, ngrams))
    num_words = lengths[: len(candidates)]
    total = [np.maximum(num_words - order, 0) for order in range(MAX_ORDER)]
    closest = _closest_lengths(comparisons)
    rouge = [_rouge_l(caption, own) for caption, own in zip(candidates.values(), photo_references, strict=True)]
    return np.column_stack([*matching, *total, num_words, closest, rouge, cider_d(comparisons, cosines)])


def _encode(captions: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Words -> ids of all captions concatenated (M,) and the words of each caption, both int64.

    Raises ValueError if a word contains a space.
    """
    word_to_id: defaultdict[str, int] = defaultdict()
    word_to_id.default_factory = word_to_id.__len__
    lengths = np.array([len(words) for words in captions])
    ids = np.fromiter(map(word_to_id.__getitem__, chain.from_iterable(captions)), np.int64, lengths.sum())
    for word in word_to_id:
        if word.split() != [word]:
            raise ValueError(f"{word!r} is not one word")
    return ids, lengths


def _weights(comparisons: Comparisons, ngrams: Occurrences) -> np.ndarray:
    """The inverse document frequencies of n-grams (D,), by the references alone."""
    caption = comparisons.caption_of_word[ngrams.start]
    of_references = ngrams.select(caption >= comparisons.num_candidates)
    photo = comparisons.photo[comparisons.caption_of_word[of_references.start]]
    return inverse_document_frequencies(document_frequencies(photo, of_references), comparisons.num_candidates)


def _clipped_matches(comparisons: Comparisons, counts: NGramCounts, matches: Matches) -> np.ndarray:
    """BLEU's matching n-grams of one order (N,): an n-gram counts as often as in the reference with most of it."""
    if not len(matches.candidate):
        return np.zeros(comparisons.num_candidates)
    first = np.flatnonzero(np.diff(matches.candidate, prepend=-1))
    common = np.minimum(counts.counts[matches.candidate], counts.counts[matches.reference])
    candidate = counts.group[matches.candidate[first]]
    return np.bincount(candidate, np.maximum.reduceat(common, first), comparisons.num_candidates)


def _closest_lengths(comparisons: Comparisons) -> np.ndarray:
    """The length of the reference closest in length (N,) int64. Of two equally close, the shorter one counts."""
    reference = comparisons.lengths[comparisons.reference]
    distance = np.abs(reference - comparisons.lengths[comparisons.candidate])
    distance_then_length = distance * (reference.max() + 1) + reference
    return np.minimum.reduceat(distance_then_length, comparisons.first) % (reference.max() + 1)


def _rouge_l(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L of one caption, 0 to 1: best precision and best recall, even of different references, combined.

    As in coco-caption, an empty caption counts as one empty word.
    """
    candidate = candidate or [""]
    references = [reference or [""] for reference in references]
    common = [_common_subsequence(candidate, reference) for reference in references]
    precision = max(common) / len(candidate)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True))
    if precision == 0:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence.

    One row of the table of dynamic programming is one Python integer, of any length: bit i is 0 where the row grows by
    one at word i of `second` (Hyyrö 2004).
    """
    positions: dict[str, int] = {}  # of each word in `second`, as bits
    for index, word in enumerate(second):
        positions[word] = positions.get(word, 0) | 1 << index
    row = everywhere = (1 << len(second)) - 1
    for word in first:
        if word in positions:
            matching = row & positions[word]
            row = (row + matching | row - matching) & everywhere
    return len(second) - row.bit_count()


def aggregate(stats: np.ndarray) -> np.ndarray:
    """Compute the scores of a set of photos from their statistics.

    stats: (..., N, 12). Returns (..., 6), times 100, in the order of METRICS.
    """
    return _scores_of_sums(stats.sum(-2), stats.shape[-2])


def _scores_of_sums(sums: np.ndarray, num_photos: int) -> np.ndarray:
    """Scores (..., 6), times 100, of num_photos photos whose statistics add up to sums (..., 12)."""
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
    at_once = max(1, RESAMPLED_PHOTOS // num_photos)
    sums = []
    for first in range(0, NUM_RESAMPLES, at_once):
        rows = min(at_once, NUM_RESAMPLES - first)
        photos = rng.integers(num_photos, size=(rows, num_photos)) + num_photos * np.arange(rows)[:, None]
        times_drawn = np.bincount(photos.ravel(), minlength=rows * num_photos).reshape(rows, num_photos)
        sums.append(times_drawn @ stats)
    return _scores_of_sums(np.concatenate(sums), num_photos)


def confidence_interval(scores: np.ndarray) -> np.ndarray:
    """The central 95 % of the scores of resamples: (R, ...) -> (..., 2), lower and upper bounds."""
    return np.percentile(scores, (2.5, 97.5), axis=0).T
