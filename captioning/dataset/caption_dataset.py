"""The photos of a split, with their captions as numbers.

Captions are flat arrays with offsets, a few hundred bytes a photo, which workers share.

Letters: N photos, R captions of a batch, W words of all of them packed.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from captioning.errors import UserError
from captioning.runtime.string_array import StringArray
from preprocess.annotations import SPLITS
from preprocess.captions import CAPTIONS_FILE, Photo
from preprocess.vocabulary import END, PAD, SPECIAL, START, UNKNOWN, VOCABULARY_FILE, Vocabulary

MOST_UNKNOWN = 0.9  # share of the words: the few most frequent ones alone are more than the rest


def places_of(splits: Sequence[str], split: str, dataset: Path, limit: int = 0) -> np.ndarray:
    """Where the photos of a split are among all, given the split of each; the first `limit` of them unless that is 0.

    Raises UserError where there are none.
    """
    found = np.flatnonzero(np.asarray(splits) == split)
    if not len(found):
        there = ", ".join(sorted(set(splits)))
        raise UserError(
            f"{dataset}: has no {split} photos, only {there}; make them with python -m preprocess {dataset}"
        )
    return found[: limit or None]


def photos_of(photos: Sequence[Photo], split: str, dataset: Path, limit: int = 0) -> list[Photo]:
    """The photos of a split: see places_of."""
    return [photos[i] for i in places_of([photo.split for photo in photos], split, dataset, limit)]


def check_none_lost(found: np.ndarray, features: Path, cached: int, allowed: float) -> None:
    """captions.jsonl has the photos of the features made from it: cut at the end of a line, it would still be in order.

    found (N,) int64: the row of each, -1 for none; cached: all rows. Raises UserError where more than `allowed` lack.
    """
    lost = cached - len(np.unique(found[found >= 0]))
    if lost > allowed * cached:
        raise UserError(
            f"{features.parent / CAPTIONS_FILE}: lacks {lost:,} of the {cached:,} photos of {features}; if it was "
            f"cut short, run python -m preprocess again; if it is as you want it, give --features {features}"
        )


def check_words_known(split: CaptionDataset, dataset: Path) -> None:
    """Raises UserError where the vocabulary knows next to none of the words: it is of another data set."""
    unknown = np.mean(split.words >= split.vocab_size)
    if unknown > MOST_UNKNOWN:
        raise UserError(
            f"{dataset / VOCABULARY_FILE}: does not know {unknown:.0%} of the words in {CAPTIONS_FILE}; is it of "
            f"another data set? Make both with: python -m preprocess {dataset} --overwrite"
        )


class CaptionDataset:
    """Photos, those of a whole file or of one split: ids, paths, and their captions as numbers.

    Words that the vocabulary lacks have numbers beyond it: they are UNKNOWN to a decoder, but not to the scores.
    """

    def __init__(self, photos: Iterable[Photo], vocabulary: Vocabulary, max_length: int):
        """max_length: the words that a decoder learns of a caption."""
        numbers, splits = dict(vocabulary.word_to_id), bytearray()
        self.ids, self.paths = StringArray(), StringArray()
        words, caption_offsets, photo_offsets = array("i"), array("q", [0]), array("q", [0])
        for photo in photos:
            self.ids.append(photo.id)
            self.paths.append(photo.image)
            splits.append(SPLITS.index(photo.split))
            for caption in photo.captions:
                words.extend(numbers.setdefault(word, len(numbers) + len(SPECIAL)) for word in caption)
                caption_offsets.append(len(words))
            photo_offsets.append(len(caption_offsets) - 1)
        self.id_to_word = (*SPECIAL, *numbers)  # of word i
        self.vocab_size, self.max_length = len(vocabulary), max_length
        self.splits = np.array(splits)  # (N,) uint8: which of SPLITS
        self.words = np.array(words, np.min_scalar_type(len(self.id_to_word)))  # of all captions, one after the other
        self.caption_offsets = np.array(caption_offsets)  # caption i is words[ends[i] : ends[i + 1]]
        self.photo_offsets = np.array(photo_offsets)  # photo i has captions ends[i] to ends[i + 1] - 1

    def indices_of(self, split: str, dataset: Path, limit: int = 0) -> np.ndarray:
        """Where the photos of one split are: see places_of."""
        return places_of(np.array(SPLITS)[self.splits], split, dataset, limit)

    def subset(self, photos: np.ndarray) -> CaptionDataset:
        """These photos alone, in ascending order."""
        part, there = copy.copy(self), np.zeros(len(self), bool)
        there[photos] = True
        captions = there.repeat(np.diff(self.photo_offsets))
        part.ids, part.paths = (StringArray(texts[i] for i in photos) for texts in (self.ids, self.paths))
        part.splits = self.splits[there]
        part.words = self.words[captions.repeat(np.diff(self.caption_offsets))]
        part.caption_offsets = np.append(0, np.diff(self.caption_offsets)[captions].cumsum())
        part.photo_offsets = np.append(0, np.diff(self.photo_offsets)[there].cumsum())
        return part

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_truncated(self) -> int:
        """Captions longer than max_length."""
        return int((np.diff(self.caption_offsets) > self.max_length).sum())

    def captions_of(self, photo: int) -> int:
        return int(self.photo_offsets[photo + 1] - self.photo_offsets[photo])

    def target_counts(self) -> np.ndarray:
        """(N,) int64, of each photo: the words of its captions, and an <end> for each."""
        return np.add.reduceat(np.minimum(np.diff(self.caption_offsets), self.max_length) + 1, self.photo_offsets[:-1])

    def mentions_side(self) -> np.ndarray:
        """(N,) bool: does a caption say left or right, in English or Chinese? Such a photo must not be mirrored."""
        sides = [word.startswith(("left", "right")) or "左" in word or "右" in word for word in self.id_to_word]
        return np.logical_or.reduceat(np.array(sides)[self.words], self.caption_offsets[self.photo_offsets[:-1]])

    def references(self, photo: int) -> list[list[str]]:
        """Its captions, whole, in words."""
        first, end = self.photo_offsets[photo : photo + 2]
        captions = np.split(self.words, self.caption_offsets[first : end + 1])[1:-1]
        return [[self.id_to_word[word] for word in caption] for caption in captions]

    def pack(self, photos: Sequence[int]) -> tuple[PackedSequence, Tensor, Tensor]:
        """All captions of these photos -> words read, words to be said (W,), and whose caption each is (R,)."""
        captions = [
            (self.words[self.caption_offsets[c] : self.caption_offsets[c + 1]][: self.max_length], place)
            for place, photo in enumerate(photos)
            for c in range(self.photo_offsets[photo], self.photo_offsets[photo + 1])
        ]
        captions.sort(key=lambda caption: -len(caption[0]))  # stable: equal lengths keep their order
        lengths = torch.tensor([len(words) + 1 for words, _ in captions])
        padded = np.full((len(captions), int(lengths[0]) + 1), PAD, np.int64)
        padded[:, 0] = START
        for row, (words, _) in zip(padded, captions, strict=True):
            row[1 : len(words) + 1] = words
            row[len(words) + 1] = END
        padded[padded >= self.vocab_size] = UNKNOWN
        padded = torch.from_numpy(padded)
        words = pack_padded_sequence(padded[:, :-1], lengths, batch_first=True)
        targets = pack_padded_sequence(padded[:, 1:], lengths, batch_first=True).data
        return words, targets, torch.tensor([place for _, place in captions])
