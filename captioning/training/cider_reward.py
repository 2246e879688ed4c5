"""CIDEr-D (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726) of a batch of captions, as a training reward.

The score is coco-caption's CIDEr-D, computed as in evaluation (`captioning.evaluation.ngrams`), with two differences:
<end> is a word of every caption, so that a truncated caption does not match a complete one, and document frequencies
come from the photos given (the train split). A batch is scored as numpy arrays, without a loop over captions, so that
the GPU need not wait.

Letters: S candidates, K photos of a batch.
"""

from __future__ import annotations

import numpy as np

from captioning.dataset.caption_dataset import CaptionDataset
from captioning.evaluation.ngrams import Comparisons, cider_d, known_cosines, known_ngrams, ranges
from preprocess.vocabulary import END, PAD


class CiderReward:
    """CIDEr-D of candidate captions against the references of their photos."""

    def __init__(self, references: CaptionDataset):
        """references: photos with their captions. Words outside the vocabulary count too; no candidate has them."""
        self.references = references
        num_photos = len(references)
        words, lengths, num_references = self._references_of(np.arange(num_photos))
        self.known = known_ngrams(words, lengths, np.arange(num_photos).repeat(num_references), num_photos)

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
        return cider_d(comparisons, known_cosines(comparisons, words, self.known))

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
