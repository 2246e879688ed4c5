"""CIDEr-D (Vedantam et al. 2015) of many captions at once: a reward that is ready before the GPU has to wait for it.

The score is pycocoevalcap's CIDEr-D, with <end> as a word of every caption, so that a caption that breaks off does not
match one that ends there, and with the document frequencies of the photos given (the train split). All n-grams of a
batch are counted, weighed and matched together, as numpy arrays; no dictionary and no loop over captions.

Letters: S captions to score, M words of several captions one after the other, E entries: a caption and an n-gram in it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from captioning.dataset.caption_dataset import CaptionDataset
from preprocess.vocabulary import END, PAD

ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of the length penalty, in words
PHOTOS_AT_ONCE = 10_000  # when document frequencies are counted
MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: odd, and its bits have no pattern


class NGrams(NamedTuple):
    """Each caption's n-grams, once each, sorted by caption and key."""

    caption: np.ndarray  # (E,)
    order: np.ndarray  # (E,) 0 to 3: n - 1
    key: np.ndarray  # (E,) uint64: the n-gram; two of 20 million share a key once in 100,000 vocabularies
    count: np.ndarray  # (E,) in this caption


class CiderReward:
    """Scores of captions against the true ones of their photos."""

    def __init__(self, split: CaptionDataset):
        """split: photos with their true captions; words outside the vocabulary count too, as words never said."""
        self.split, parts = split, []
        for first in range(0, len(split), PHOTOS_AT_ONCE):
            photo = np.arange(first, min(first + PHOTOS_AT_ONCE, len(split)))
            grams, references = self._references(photo)
            parts.append(_once_each(references.photo[grams.caption], grams.key))
        self.keys, self.frequencies = np.unique(np.concatenate(parts), return_counts=True)
        self.log_photos = np.log(float(len(split)))

    def __call__(self, photos: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """photos (S,) int: whose each is; captions (S, T) int: words, with <end> where they end, then <pad> -> (S,).

        float64, in CIDEr-D's own scale: 0 to 10.
        """
        there = captions != PAD
        lengths = there.sum(1)
        ours = _grams(captions[there], np.concatenate([[0], lengths.cumsum()]))
        asked, place = np.unique(photos, return_inverse=True)
        theirs, references = self._references(asked)
        weight, weight_there = self._weights(ours), self._weights(theirs)
        norm = _norms(ours, weight, len(captions))  # (S, 4)
        norm_there = _norms(theirs, weight_there, len(references.photo))

        most = int(references.counts.max())  # references of a photo
        similar = np.zeros((len(captions), most, ORDERS))
        one, other = _same(place[ours.caption], ours.key, references.photo[theirs.caption], theirs.key)
        product = np.minimum(weight[one], weight_there[other]) * weight_there[other]
        reference = theirs.caption[other]
        np.add.at(
            similar,
            (ours.caption[one], reference - references.first[references.photo[reference]], ours.order[one]),
            product,
        )

        which = references.first[place][:, None] + np.arange(most)  # (S, most)
        real = np.arange(most) < references.counts[place][:, None]
        which = np.where(real, which, 0)
        scale = norm[:, None] * norm_there[which]  # (S, most, 4)
        cosine = np.divide(similar, scale, out=np.zeros_like(similar), where=scale > 0)
        apart = np.maximum(lengths - 1, 0)[:, None] - np.maximum(references.lengths - 1, 0)[which]
        each = cosine.mean(2) * np.exp(-(apart**2) / (2 * SIGMA**2)) * real
        return 10 * each.sum(1) / references.counts[place]

    def _references(self, photos: np.ndarray) -> tuple[NGrams, _References]:
        """The true captions of these photos."""
        first, ends = self.split.photo_offsets[photos], self.split.caption_offsets
        counts = self.split.photo_offsets[photos + 1] - first
        captions = _ranges(first, counts)
        lengths = ends[captions + 1] - ends[captions]
        words = np.insert(self.split.words[_ranges(ends[captions], lengths)], lengths.cumsum(), END)
        grams = _grams(words, np.append(0, (lengths + 1).cumsum()))
        starts = np.concatenate([[0], counts.cumsum()[:-1]])
        return grams, _References(np.arange(len(photos)).repeat(counts), starts, counts, lengths + 1)

    def _weights(self, grams: NGrams) -> np.ndarray:
        """tf-idf: the count times log(photos / photos whose captions have it)."""
        place = np.minimum(np.searchsorted(self.keys, grams.key), len(self.keys) - 1)
        frequency = np.where(self.keys[place] == grams.key, self.frequencies[place], 1)
        return grams.count * (self.log_photos - np.log(frequency))


class _References(NamedTuple):
    photo: np.ndarray  # (captions,) the place of its photo among those asked for
    first: np.ndarray  # (photos,) its first caption
    counts: np.ndarray  # (photos,) of captions
    lengths: np.ndarray  # (captions,) of words


def _grams(words: np.ndarray, ends: np.ndarray) -> NGrams:
    """words (M,); caption i is words[ends[i] : ends[i + 1]]."""
    caption = np.arange(len(ends) - 1).repeat(np.diff(ends))
    left = ends[1:][caption] - np.arange(len(words))  # words from here to the caption's end
    key = np.zeros(len(words), np.uint64)  # of the n-gram that begins here
    entries = []
    for order in range(ORDERS):
        there = np.flatnonzero(left > order)
        key[there] = _mixed(key[there], words[there + order])
        entries.append((caption[there], np.full(len(there), order), key[there]))
    caption, order, key = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    sort = np.lexsort((key, caption))
    caption, order, key = caption[sort], order[sort], key[sort]
    new = np.flatnonzero(_changes(caption, key))
    return NGrams(caption[new], order[new], key[new], np.diff(new, append=len(key)))


def _mixed(key: np.ndarray, words: np.ndarray) -> np.ndarray:
    """The key of an n-gram and a word more: splitmix64's finisher, which leaves no pattern."""
    key = (key ^ (words.astype(np.uint64) + np.uint64(1))) * MIX
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


def _changes(*columns: np.ndarray) -> np.ndarray:
    """(E,) bool: True where a sorted row is another than the one before."""
    new = np.ones(len(columns[0]), bool)
    new[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return new


def _once_each(photo: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The keys of each photo, once however many of its captions have them."""
    sort = np.lexsort((key, photo))
    photo, key = photo[sort], key[sort]
    return key[_changes(photo, key)]


def _norms(grams: NGrams, weight: np.ndarray, captions: int) -> np.ndarray:
    """(captions, 4) the length of each caption's vector of weights."""
    squares = np.bincount(grams.caption * ORDERS + grams.order, weight**2, captions * ORDERS)
    return np.sqrt(squares).reshape(captions, ORDERS)


def _same(
    photo: np.ndarray, key: np.ndarray, photo_there: np.ndarray, key_there: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of an entry here and one there that have both photo and key in common, as two arrays of places."""
    keys, number = np.unique(np.concatenate([key, key_there]), return_inverse=True)
    here, there = photo * len(keys) + number[: len(key)], photo_there * len(keys) + number[len(key) :]
    sort = np.argsort(there, kind="stable")
    first, end = (np.searchsorted(there[sort], here, side) for side in ("left", "right"))
    return np.arange(len(here)).repeat(end - first), sort[_ranges(first, end - first)]


def _ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ... counts[0] of them, then those of first[1], and so on."""
    return np.arange(counts.sum()) + (first - counts.cumsum() + counts).repeat(counts)
