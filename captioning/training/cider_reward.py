"""CIDEr-D (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726) of a batch of captions, as a training reward.

The score is pycocoevalcap's CIDEr-D with two differences: <end> is a word of every caption, so that a truncated caption
does not match a complete one, and document frequencies come from the photos given (the train split). All n-grams of a
batch are counted, weighted and matched as numpy arrays, without a loop over captions, so that the GPU need not wait.

Letters: S candidates, K photos of a batch, C references of these photos, R references of one photo at most,
M words of several captions concatenated, E n-grams: the distinct n-grams of each caption.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from captioning.dataset.caption_dataset import CaptionDataset
from preprocess.vocabulary import END, PAD

MAX_ORDER = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of the length penalty, in words
PHOTOS_PER_CHUNK = 10_000  # bounds the memory of counting document frequencies
HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, as in splitmix64


class NGrams(NamedTuple):
    """The distinct n-grams of each caption, sorted by caption and key."""

    caption: np.ndarray  # (E,) int64: which caption
    order: np.ndarray  # (E,) int64: n - 1, 0 to 3
    key: np.ndarray  # (E,) uint64: hash; two of 20 million n-grams collide in one of 100,000 vocabularies
    counts: np.ndarray  # (E,) int64: occurrences in the caption


class References(NamedTuple):
    """The reference captions of K photos, one photo after the other."""

    ngrams: NGrams
    photo: np.ndarray  # (C,) int64: which of the K photos
    first: np.ndarray  # (K,) int64: the first reference of each photo
    counts: np.ndarray  # (K,) int64: references of each photo
    lengths: np.ndarray  # (C,) int64: words, with <end>


class CiderReward:
    """CIDEr-D of candidate captions against the references of their photos."""

    def __init__(self, references: CaptionDataset):
        """references: photos with their captions. Words outside the vocabulary count too; no candidate has them."""
        self.references = references
        chunks = []
        for start in range(0, len(references), PHOTOS_PER_CHUNK):
            photos = np.arange(start, min(start + PHOTOS_PER_CHUNK, len(references)))
            chunk = self._references_of(photos)
            chunks.append(_distinct_keys(chunk.photo[chunk.ngrams.caption], chunk.ngrams.key))
        self.keys, self.document_frequencies = np.unique(np.concatenate(chunks), return_counts=True)
        self.log_num_photos = np.log(float(len(references)))

    def __call__(self, photos: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """Return (S,) float64: the CIDEr-D of each caption on its original scale, 0 to 10.

        photos (S,) int: the photo each caption describes, an index of the references.
        captions (S, T) int: word ids, <end> where the caption ends, then <pad>.
        """
        lengths = (captions != PAD).sum(1)
        candidates = _count_ngrams(captions[captions != PAD], np.concatenate([[0], lengths.cumsum()]))
        distinct_photos, photo_index = np.unique(photos, return_inverse=True)
        references = self._references_of(distinct_photos)

        reference_index, exists = _reference_grid(references, photo_index)  # (S, R), (S, R)
        cosine = self._cosine(candidates, photo_index, references, reference_index)  # (S, R, 4)
        length_difference = np.maximum(lengths - 1, 0)[:, None] - np.maximum(references.lengths - 1, 0)[reference_index]
        length_penalty = np.exp(-(length_difference**2) / (2 * SIGMA**2))
        scores = cosine.mean(2) * length_penalty * exists  # (S, R)
        return 10 * scores.sum(1) / references.counts[photo_index]

    def _cosine(
        self, candidates: NGrams, photo_index: np.ndarray, references: References, reference_index: np.ndarray
    ) -> np.ndarray:
        """(S, R, 4): the clipped cosine similarity of tf-idf vectors, per candidate, reference and order."""
        num_candidates, max_references = reference_index.shape
        candidate_weights = self._tf_idf(candidates)
        reference_weights = self._tf_idf(references.ngrams)
        candidate_norms = _norms(candidates, candidate_weights, num_candidates)  # (S, 4)
        reference_norms = _norms(references.ngrams, reference_weights, len(references.photo))  # (C, 4)

        i, j = _match(
            photo_index[candidates.caption],
            candidates.key,
            references.photo[references.ngrams.caption],
            references.ngrams.key,
        )
        products = np.minimum(candidate_weights[i], reference_weights[j]) * reference_weights[j]
        matched_reference = references.ngrams.caption[j]
        number_in_photo = matched_reference - references.first[references.photo[matched_reference]]
        dot_products = np.zeros((num_candidates, max_references, MAX_ORDER))
        np.add.at(dot_products, (candidates.caption[i], number_in_photo, candidates.order[i]), products)

        norms = candidate_norms[:, None] * reference_norms[reference_index]  # (S, R, 4)
        return np.divide(dot_products, norms, out=np.zeros_like(dot_products), where=norms > 0)

    def _references_of(self, photos: np.ndarray) -> References:
        """The references of these photos (K,) int64, distinct."""
        photo_offsets = self.references.photo_offsets
        caption_offsets = self.references.caption_offsets
        counts = photo_offsets[photos + 1] - photo_offsets[photos]
        captions = _ranges(photo_offsets[photos], counts)
        lengths = caption_offsets[captions + 1] - caption_offsets[captions]
        words = self.references.words[_ranges(caption_offsets[captions], lengths)]
        words = np.insert(words, lengths.cumsum(), END)
        lengths = lengths + 1
        return References(
            _count_ngrams(words, np.append(0, lengths.cumsum())),
            photo=np.arange(len(photos)).repeat(counts),
            first=np.concatenate([[0], counts.cumsum()[:-1]]),
            counts=counts,
            lengths=lengths,
        )

    def _tf_idf(self, ngrams: NGrams) -> np.ndarray:
        """(E,) float64: count * log(photos / document frequency); an unseen n-gram has document frequency 1."""
        position = np.minimum(np.searchsorted(self.keys, ngrams.key), len(self.keys) - 1)
        frequency = np.where(self.keys[position] == ngrams.key, self.document_frequencies[position], 1)
        return ngrams.counts * (self.log_num_photos - np.log(frequency))


def _reference_grid(references: References, photo_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two (S, R) arrays for candidates of these photos: indices of their references, and which of them exist."""
    number = np.arange(int(references.counts.max()))
    exists = number < references.counts[photo_index][:, None]
    index = references.first[photo_index][:, None] + number
    return np.where(exists, index, 0), exists


def _count_ngrams(words: np.ndarray, offsets: np.ndarray) -> NGrams:
    """Count the n-grams of captions: words (M,) int, of which caption i is words[offsets[i] : offsets[i + 1]]."""
    caption = np.arange(len(offsets) - 1).repeat(np.diff(offsets))
    remaining = offsets[1:][caption] - np.arange(len(words))  # words from here to the end of the caption
    key = np.zeros(len(words), np.uint64)  # of the n-gram that starts here
    starts_by_order: list[np.ndarray] = []
    keys_by_order: list[np.ndarray] = []
    for order in range(MAX_ORDER):
        starts = np.flatnonzero(remaining > order)
        key[starts] = _extend_hash(key[starts], words[starts + order])
        starts_by_order.append(starts)
        keys_by_order.append(key[starts])
    orders = np.arange(MAX_ORDER).repeat([len(starts) for starts in starts_by_order])
    return _count_equal(caption[np.concatenate(starts_by_order)], orders, np.concatenate(keys_by_order))


def _count_equal(caption: np.ndarray, order: np.ndarray, key: np.ndarray) -> NGrams:
    """Merge the equal n-grams of each caption."""
    by_caption_and_key = np.lexsort((key, caption))
    caption, order, key = (column[by_caption_and_key] for column in (caption, order, key))
    first = np.flatnonzero(_is_first(caption, key))
    return NGrams(caption[first], order[first], key[first], np.diff(first, append=len(key)))


def _extend_hash(key: np.ndarray, words: np.ndarray) -> np.ndarray:
    """The hash of an n-gram extended by one word, mixed by the finaliser of splitmix64."""
    key = (key ^ (words.astype(np.uint64) + np.uint64(1))) * HASH_MULTIPLIER
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


def _is_first(*columns: np.ndarray) -> np.ndarray:
    """(E,) bool: True where a row of sorted columns differs from the row before it."""
    first = np.ones(len(columns[0]), bool)
    first[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return first


def _distinct_keys(photo: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The keys of each photo, once per photo that has them."""
    by_photo_and_key = np.lexsort((key, photo))
    photo, key = photo[by_photo_and_key], key[by_photo_and_key]
    return key[_is_first(photo, key)]


def _norms(ngrams: NGrams, weights: np.ndarray, num_captions: int) -> np.ndarray:
    """(num_captions, 4): the Euclidean norm of each caption's tf-idf vector, per order."""
    squares = np.bincount(ngrams.caption * MAX_ORDER + ngrams.order, weights**2, num_captions * MAX_ORDER)
    return np.sqrt(squares).reshape(num_captions, MAX_ORDER)


def _match(
    photo_a: np.ndarray, key_a: np.ndarray, photo_b: np.ndarray, key_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i, j) with photo_a[i] == photo_b[j] and key_a[i] == key_b[j], as two int arrays."""
    distinct, key_index = np.unique(np.concatenate([key_a, key_b]), return_inverse=True)
    pair_a = photo_a * len(distinct) + key_index[: len(key_a)]
    pair_b = photo_b * len(distinct) + key_index[len(key_a) :]
    sort_b = np.argsort(pair_b, kind="stable")
    start = np.searchsorted(pair_b[sort_b], pair_a, "left")
    counts = np.searchsorted(pair_b[sort_b], pair_a, "right") - start
    return np.arange(len(pair_a)).repeat(counts), sort_b[_ranges(start, counts)]


def _ranges(start: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenate the ranges start[i], start[i] + 1, ..., start[i] + counts[i] - 1."""
    return np.arange(counts.sum()) + (start - counts.cumsum() + counts).repeat(counts)
