"""N-grams of many captions as arrays, and CIDEr-D: counted, matched and weighted without a loop over captions.

Candidates are compared with every reference of their photo. The metrics and the CIDEr reward of training share this
code: they differ only in the photos from which document frequencies come, and in whether <end> is a word.

N-grams are numbered, not hashed: two n-grams have the same number if and only if they have the same words.

    CIDEr-D       Vedantam et al. 2015, https://arxiv.org/abs/1411.5726
    coco-caption  Chen et al. 2015, https://arxiv.org/abs/1504.00325

Letters: S candidates, K photos, P comparisons of a candidate with a reference, M words of all captions concatenated,
and for one order: O occurrences of n-grams, D different n-grams, E distinct n-grams of each caption, A matches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

MAX_ORDER = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of CIDEr-D's length penalty, in words
WORD_BITS = 32  # of the code of an n-gram, for its last word; the upper 31 are for the number of the words before it
LAST_WORD = (1 << WORD_BITS) - 1


class Occurrences(NamedTuple):
    """All n-grams of one order in some captions, from the first caption to the last."""

    start: np.ndarray  # (O,) int64: the position of its first word among the M words, ascending
    number: np.ndarray  # (O,) int64: which of the D different n-grams it is
    codes: np.ndarray  # (D,) int64, ascending: the number of its first n - 1 words, then its last word

    def select(self, keep: np.ndarray) -> Occurrences:
        """Those for which keep (O,) bool is True, with the same numbers."""
        return Occurrences(self.start[keep], self.number[keep], self.codes)

    def codes_with(self, numbers: np.ndarray) -> np.ndarray:
        """The codes (D,) where numbers[i] takes the place of the number i of the first n - 1 words."""
        return numbers[self.codes >> WORD_BITS] << WORD_BITS | self.codes & LAST_WORD


class NGramCounts(NamedTuple):
    """How often each caption, or all captions of a photo, contain each n-gram; sorted by group and number."""

    group: np.ndarray  # (E,) int64: the caption, or the photo
    number: np.ndarray  # (E,) int64: which of the D different n-grams
    counts: np.ndarray  # (E,) int64, at least 1


class KnownNGrams(NamedTuple):
    """The D n-grams of one order in some captions, and the weight of each. An unknown n-gram has the number D."""

    codes: np.ndarray  # (D + 1,) int64, as in Occurrences; the last one is larger than any
    inverse_frequencies: np.ndarray  # (D + 1,) float64; the last one is for unknown n-grams

    def find(self, codes: np.ndarray) -> np.ndarray:
        """The numbers of n-grams given by their codes, D if unknown; both (X,) int64."""
        number = np.searchsorted(self.codes, codes)
        return np.where(self.codes[number] == codes, number, len(self.codes) - 1)


class Matches(NamedTuple):
    """The n-grams that a candidate shares with a reference of its photo: indices of the NGramCounts of all captions."""

    candidate: np.ndarray  # (A,) int64, ascending
    reference: np.ndarray  # (A,) int64
    comparison: np.ndarray  # (A,) int64: which of the P comparisons


class Comparisons:
    """S candidates, each compared with every reference of its photo.

    Captions are numbered: the S candidates first, then the references, photo by photo.

    Attributes:
        lengths: (S + references,) int64, words of each caption.
        caption_of_word: (M,) int64.
        photo: (S + references,) int64, the photo of each caption.
        num_references: (S,) int64, of each candidate's photo.
        first: (S,) int64, the first comparison of each candidate; those of one candidate follow each other.
        first_reference: (S,) int64, the caption it is with.
        candidate, reference: (P,) int64, the captions compared.
    """

    def __init__(self, lengths: np.ndarray, candidate_photo: np.ndarray, references_of_photo: np.ndarray):
        """lengths: as above. candidate_photo (S,) int64: below K. references_of_photo (K,) int64: at least 1 each."""
        num_candidates = len(candidate_photo)
        self.lengths = lengths
        self.caption_of_word = np.arange(len(lengths)).repeat(lengths)
        self.photo = np.concatenate([candidate_photo, np.arange(len(references_of_photo)).repeat(references_of_photo)])
        self.num_references = references_of_photo[candidate_photo]
        self.first = _starts(self.num_references)
        self.first_reference = (num_candidates + _starts(references_of_photo))[candidate_photo]
        self.candidate = np.arange(num_candidates).repeat(self.num_references)
        self.reference = ranges(self.first_reference, self.num_references)

    @property
    def num_candidates(self) -> int:
        return len(self.first)

    def count(self, ngrams: Occurrences) -> NGramCounts:
        """Count the n-grams of each caption."""
        return count_ngrams(self.caption_of_word[ngrams.start], ngrams)

    def match(self, counts: NGramCounts) -> Matches:
        """Find the n-grams that a candidate shares with a reference of its photo; counts: those of each caption."""
        num_of_candidates = int(np.searchsorted(counts.group, self.num_candidates))
        key = self.photo[counts.group] * (counts.number.max(initial=0) + 1) + counts.number
        by_key = num_of_candidates + np.argsort(key[num_of_candidates:], kind="stable")
        sorted_keys = key[by_key]
        first = np.searchsorted(sorted_keys, key[:num_of_candidates], "left")
        matches = np.searchsorted(sorted_keys, key[:num_of_candidates], "right") - first
        candidate = np.arange(num_of_candidates).repeat(matches)
        reference = by_key[ranges(first, matches)]
        caption = counts.group[candidate]
        comparison = self.first[caption] + counts.group[reference] - self.first_reference[caption]
        return Matches(candidate, reference, comparison)


def number_ngrams(words: np.ndarray, lengths: np.ndarray) -> Iterator[Occurrences]:
    """Find and number the n-grams of captions, for the orders 1 to 4 one after the other.

    words (M,) int64: ids of 0 to 2^32 - 1, of one caption after the other; M below 2^31. lengths int64: words of each
    caption. The number of an n-gram's first n - 1 words and its last word identify it.
    """
    remaining = lengths.cumsum().repeat(lengths) - np.arange(len(words))  # words from here to the end of the caption
    number = np.zeros(len(words), np.int64)  # of the n-gram of the order before that starts here; 0 is the empty one
    for order in range(MAX_ORDER):
        start = np.flatnonzero(remaining > order)
        codes, numbers = np.unique(number[start] << WORD_BITS | words[start + order], return_inverse=True)
        number[start] = numbers
        yield Occurrences(start, numbers, codes)


def count_ngrams(group: np.ndarray, ngrams: Occurrences) -> NGramCounts:
    """Count the n-grams of each group of captions. group (O,) int64: that of each occurrence."""
    num_different = max(1, len(ngrams.codes))
    keys, counts = np.unique(group * num_different + ngrams.number, return_counts=True)
    groups, numbers = np.divmod(keys, num_different)
    return NGramCounts(groups, numbers, counts)


def document_frequencies(photo: np.ndarray, ngrams: Occurrences) -> np.ndarray:
    """The number of photos that contain each n-gram: (D,) int64. photo (O,) int64: that of each occurrence."""
    return np.bincount(count_ngrams(photo, ngrams).number, minlength=len(ngrams.codes))


def inverse_document_frequencies(frequencies: np.ndarray, num_photos: int) -> np.ndarray:
    """log(photos / document frequency) (D,) float64; an n-gram in no photo has document frequency 1.

    Every logarithm is computed once, so that an n-gram in all photos weighs exactly 0, not a rounding error.
    """
    logs = np.log(np.arange(1, num_photos + 1))
    return (logs[-1] - logs)[np.maximum(frequencies, 1) - 1]


def known_ngrams(
    words: np.ndarray, lengths: np.ndarray, photo_of_caption: np.ndarray, num_photos: int, min_photos: int = 1
) -> list[KnownNGrams]:
    """The n-grams of each order that occur in the captions of `min_photos` photos or more, and their weights.

    Those of one photo weigh as much as unknown ones: with min_photos 2, weights are the same and fewer are held. words
    and lengths: as in `number_ngrams`. photo_of_caption int64: below num_photos.
    """
    photo_of_word = photo_of_caption.repeat(lengths)
    known = []
    new_number = np.zeros(1, np.int64)  # of each n-gram of the order before, among the known ones
    for ngrams in number_ngrams(words, lengths):
        frequencies = document_frequencies(photo_of_word[ngrams.start], ngrams)
        keep = frequencies >= min_photos
        codes = ngrams.codes_with(new_number)[keep]  # ascending: an n-gram's first words are in as many photos
        weights = inverse_document_frequencies(np.append(frequencies[keep], 0), num_photos)
        known.append(KnownNGrams(np.append(codes, np.iinfo(np.int64).max), weights))
        new_number = keep.cumsum() - 1
    return known


def known_cosines(comparisons: Comparisons, words: np.ndarray, known: Sequence[KnownNGrams]) -> np.ndarray:
    """The sum of `tf_idf_cosines` over the orders (P,), with the weights of known n-grams.

    words (M,) int64: those of the candidates, then of the references.
    """
    cosines = np.zeros(len(comparisons.candidate))
    known_number = np.zeros(1, np.int64)  # the empty n-gram has the number 0, here and among the known ones
    for ngrams, known_of_order in zip(number_ngrams(words, comparisons.lengths), known, strict=True):
        known_number = known_of_order.find(ngrams.codes_with(known_number))
        counts = comparisons.count(ngrams)
        matches = comparisons.match(counts)
        cosines += tf_idf_cosines(comparisons, counts, matches, known_of_order.inverse_frequencies[known_number])
    return cosines


def tf_idf_cosines(
    comparisons: Comparisons, counts: NGramCounts, matches: Matches, inverse_frequencies: np.ndarray
) -> np.ndarray:
    """The clipped cosine similarity of tf-idf vectors, for the n-grams of one order: (P,) float64, 0 to 1.

    counts: those of each caption; inverse_frequencies (D,) float64: the weight of each n-gram.
    """
    weights = counts.counts * inverse_frequencies[counts.number]
    norms = np.sqrt(np.bincount(counts.group, weights**2, len(comparisons.lengths)))
    products = np.minimum(weights[matches.candidate], weights[matches.reference]) * weights[matches.reference]
    dot_products = np.bincount(matches.comparison, products, len(comparisons.candidate))
    norm = norms[comparisons.candidate] * norms[comparisons.reference]
    return np.divide(dot_products, norm, out=np.zeros_like(norm), where=norm > 0)


def cider_d(comparisons: Comparisons, cosines: np.ndarray) -> np.ndarray:
    """CIDEr-D of each candidate: (S,) float64, 0 to 10. cosines (P,): the sum of `tf_idf_cosines` over the orders.

    The mean over orders and references, with a penalty on the difference in length.
    """
    sums = np.bincount(comparisons.candidate, similarities(comparisons, cosines), comparisons.num_candidates)
    return 10 * sums / comparisons.num_references


def similarities(comparisons: Comparisons, cosines: np.ndarray) -> np.ndarray:
    """CIDEr-D of each candidate with each single reference, divided by 10: (P,) float64, 0 to 1. cosines: see above."""
    difference = comparisons.lengths[comparisons.candidate] - comparisons.lengths[comparisons.reference]
    return cosines / MAX_ORDER * np.exp(-(difference**2) / (2 * SIGMA**2))


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where each of several consecutive ranges starts, the first at 0, given how long they are."""
    return counts.cumsum() - counts


def ranges(start: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenate the ranges start[i], start[i] + 1, ..., start[i] + counts[i] - 1."""
    return np.arange(counts.sum()) + (start - _starts(counts)).repeat(counts)
