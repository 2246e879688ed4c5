"""How much captions of one photo agree, those of a model or of people: the CIDEr-D of each with each other one.

Letters: S captions, K captions of one photo, M words of all captions concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from captioning.dataset.caption_dataset import CaptionDataset
from captioning.evaluation.ngrams import Comparisons, KnownNGrams, known_cosines, known_ngrams, similarities


class NGramWeights:
    """The tf-idf weights of CIDEr-D (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726), from a train split."""

    def __init__(self, known: Sequence[KnownNGrams]):
        """known: by order."""
        self.known = known

    @classmethod
    def of(cls, split: CaptionDataset) -> NGramWeights:
        """The weights in the captions of a split."""
        lengths = np.diff(split.caption_offsets)
        photo_of_caption = np.arange(len(split)).repeat(np.diff(split.photo_offsets))
        known = known_ngrams(split.words.astype(np.int64), lengths, photo_of_caption, len(split), min_photos=2)
        return cls(known)

    def to_dict(self) -> dict:
        """Tensors, for a checkpoint."""
        return {
            "codes": [torch.from_numpy(known.codes) for known in self.known],
            "weights": [torch.from_numpy(known.inverse_frequencies) for known in self.known],
        }

    @classmethod
    def from_dict(cls, data: dict) -> NGramWeights:
        """The inverse of `to_dict`."""
        pairs = zip(data["codes"], data["weights"], strict=True)
        return cls([KnownNGrams(codes.numpy(), weights.numpy()) for codes, weights in pairs])

    def rarity(self, words: Sequence[int]) -> np.ndarray:
        """log(photos / photos whose captions have the word) of each word: (T,) float64."""
        unigrams = self.known[0]
        return unigrams.inverse_frequencies[unigrams.find(np.array(words, np.int64))]

    def agreement(self, captions: Sequence[Sequence[Sequence[int]]]) -> list[np.ndarray]:
        """CIDEr-D, 0 to 10, of each caption of a photo (rows) with each as the only reference (columns).

        captions: those of each photo as word ids. Returns (K, K) float64 for each photo, symmetric up to the clipping
        of CIDEr-D. The CIDEr-D with several references is the mean of those with each.
        """
        counts = np.array([len(photo_captions) for photo_captions in captions])
        flat = list(chain.from_iterable(captions))
        lengths = np.array([len(caption) for caption in flat], np.int64)
        words = np.fromiter(chain.from_iterable(flat), np.int64, lengths.sum())
        photo_of_caption = np.arange(len(counts)).repeat(counts)
        comparisons = Comparisons(np.tile(lengths, 2), photo_of_caption, counts)
        values = 10 * similarities(comparisons, known_cosines(comparisons, np.tile(words, 2), self.known))
        per_photo = np.split(values, (counts**2).cumsum()[:-1])
        return [matrix.reshape(count, count) for matrix, count in zip(per_photo, counts, strict=True)]


def mean_with_others(agreement: np.ndarray) -> np.ndarray:
    """The mean CIDEr-D of each caption with the others of its photo: (K, K) -> (K,); 0 for a single caption."""
    others = len(agreement) - 1
    return (agreement.sum(1) - np.diag(agreement)) / max(1, others)
