"""CIDEr-D (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726) of a batch of captions, as a training reward.

The score is coco-caption's CIDEr-D, computed as in evaluation (`captioning.evaluation.ngrams`), with two differences:
<end> is a word of every caption, so that a truncated caption does not match a complete one, and document frequencies
come from the photos given (the train split). A batch is scored as numpy arrays, without a loop over captions, so that
the GPU need not wait.

Letters: S candidates, K photos of a batch, D different n-grams of one order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from captioning.dataset.caption_dataset import CaptionDataset
from captioning.evaluation.ngrams import (
    Comparisons,
    cider_d,
    document_frequencies,
    inverse_document_frequencies,
    number_ngrams,
    ranges,
    tf_idf_cosines,
)
from preprocess.vocabulary import END, PAD


class KnownNGrams(NamedTuple):
    """The D n-grams of one order in the references, and the weight of each. An unknown n-gram has the number D."""

    codes: np.ndarray  # (D + 1,) int64, as in Occurrences; the last one is larger than any
    inverse_frequencies: np.ndarray  # (D + 1,) float64; the last one is for unknown n-grams

    def find(self, codes: np.ndarray) -> np.ndarray:
        """The numbers of n-grams given by their codes, D if unknown; both (X,) int64."""
        number = np.searchsorted(self.codes, codes)
        return np.where(self.codes[number] == codes, number, len(self.codes) - 1)


class CiderReward:
    """CIDEr-D of candidate captions against the references of their photos."""

    def __init__(self, references: CaptionDataset):
        """references: photos with their captions. Words outside the vocabulary count too; no candidate has them."""
        self.references = references
        num_photos = len(references)
        words, lengths, num_references = self._references_of(np.arange(num_photos))
        photo_of_word = np.arange(num_photos).repeat(num_references).repeat(lengths)
        self.known: list[KnownNGrams] = []  # by order
        for ngrams in number_ngrams(words, lengths):
            frequencies = document_frequencies(photo_of_word[ngrams.start], ngrams)
            weights = inverse_document_frequencies(np.append(frequencies, 0), num_photos)
            self.known.append(KnownNGrams(np.append(ngrams.codes, np.iinfo(np.int64).max), weights))

    @property
    def is_zero(self) -> bool:
        """Whether every reward is 0: all photos have the same n-grams, as a single photo does."""
        return not any(known.inverse_frequencies[:-1].any() for known in self.known)

    def __call__(self, photos: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """Return (S,) float64: the CIDEr-D of each caption on its original scale, 0 to 10.

        photos (S,) int: the photo each caption describes, an index of the references.
        captions (S, T) int: word ids, <end> where the caption ends, then <pad>.
        """
        distinct_photos, photo_index = np.unique(photos, return_inverse=True)
        reference_words, reference_lengths, num_references = self._references_of(distinct_photos)
        is_word = captions != PAD
        words = np.concatenate([captions[is_word], reference_words])
        lengths = np.concatenate([is_word.sum(1), reference_lengths])
        comparisons = Comparisons(lengths, photo_index, num_references)
        cosines = np.zeros(len(comparisons.candidate))
        known_number = np.zeros(1, np.int64)  # the empty n-gram has the number 0, here and among the references
        for ngrams, known in zip(number_ngrams(words, lengths), self.known, strict=True):
            known_number = known.find(ngrams.codes_with(known_number))
            counts = comparisons.count(ngrams)
            matches = comparisons.match(counts)
            cosines += tf_idf_cosines(comparisons, counts, matches, known.inverse_frequencies[known_number])
        return cider_d(comparisons, cosines)

    def _references_of(self, photos: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The words of all references of these photos with <end>, the words of each reference, references per photo.

        photos (K,) int64, distinct; returns int64 arrays.
        """
        photo_offsets = self.references.photo_offsets
        caption_offsets = self.references.caption_offsets
        num_references = photo_offsets[photos + 1] - photo_offsets[photos]
        captions = ranges(photo_offsets[photos], num_references)
        lengths = caption_offsets[captions + 1] - caption_offsets[captions]
        words = self.references.words[ranges(caption_offsets[captions], lengths)]
        return np.insert(words.astype(np.int64), lengths.cumsum(), END), lengths + 1, num_references
