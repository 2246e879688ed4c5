"""The photos of a split, with their captions as numbers.

Captions are flat arrays with offsets: workers share them, and memory does not grow with their number.

Letters: R captions of a batch, W words of all of them packed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from config import UserError
from preprocess.captions import CAPTIONS_FILE, Photo
from preprocess.vocabulary import END, PAD, START, UNKNOWN, VOCABULARY_FILE, Vocabulary

MOST_UNKNOWN = 0.9  # share of the words: the few most frequent ones alone are more than the rest


def photos_of(photos: Sequence[Photo], split: str, dataset: Path, limit: int = 0) -> list[Photo]:
    """The photos of a split, the first `limit` of them unless that is 0. Raises UserError where there are none."""
    found = [photo for photo in photos if photo.split == split]
    if not found:
        there = ", ".join(sorted({photo.split for photo in photos}))
        raise UserError(
            f"{dataset}: has no {split} photos, only {there}; make them with python -m preprocess {dataset}"
        )
    return found[: limit or None]


def check_none_lost(photos: Sequence[Photo], features: Path, cached: Sequence[str], allowed: float) -> None:
    """captions.jsonl has the photos of the features made from it: cut at the end of a line, it would still be in order.

    Raises UserError where more than the share `allowed` of them is missing.
    """
    lost = len(set(cached).difference(photo.id for photo in photos))
    if lost > allowed * len(cached):
        raise UserError(
            f"{features.parent / CAPTIONS_FILE}: lacks {lost:,} of the {len(cached):,} photos of {features}; if it was "
            f"cut short, run python -m preprocess again; if it is as you want it, give --features {features}"
        )


def check_words_known(split: Split, dataset: Path) -> None:
    """Raises UserError where the vocabulary knows next to none of the words: it is of another data set."""
    unknown = np.mean(split.words == UNKNOWN)
    if unknown > MOST_UNKNOWN:
        raise UserError(
            f"{dataset / VOCABULARY_FILE}: does not know {unknown:.0%} of the words in {CAPTIONS_FILE}; is it of "
            f"another data set? Make both with: python -m preprocess {dataset} --overwrite"
        )


def tells_sides(photo: Photo) -> bool:
    """Does a caption say left or right, in English or Chinese? Such a photo must not be mirrored."""
    words = {word for caption in photo.captions for word in caption}
    return any(word.startswith(("left", "right")) or "左" in word or "右" in word for word in words)


class Split:
    """The photos of one split: ids, paths, and their captions as numbers."""

    def __init__(self, photos: Iterable[Photo], vocabulary: Vocabulary, max_length: int):
        self.ids: list[str] = []
        self.paths: list[str] = []
        self.cut = 0  # captions longer than max_length
        words = array("i")
        caption_ends, photo_ends = [0], [0]
        for photo in photos:
            self.ids.append(photo.id)
            self.paths.append(photo.image)
            for caption in photo.captions:
                self.cut += len(caption) > max_length
                words.extend(vocabulary.encode(caption[:max_length]))
                caption_ends.append(len(words))
            photo_ends.append(len(caption_ends) - 1)
        self.words = (
            np.frombuffer(words, np.int32) if words else np.empty(0, np.int32)
        )  # of all captions, one after the other
        self.caption_ends = np.array(caption_ends, np.int64)  # caption i is words[ends[i] : ends[i + 1]]
        self.photo_ends = np.array(photo_ends, np.int64)  # photo i has captions ends[i] to ends[i + 1] - 1

    def __len__(self) -> int:
        return len(self.ids)

    def captions_of(self, photo: int) -> int:
        return int(self.photo_ends[photo + 1] - self.photo_ends[photo])

    def words_of(self, photo: int) -> int:
        """The words to be said of a photo: those of its captions, and an <end> for each."""
        first, end = self.photo_ends[photo], self.photo_ends[photo + 1]
        return int(self.caption_ends[end] - self.caption_ends[first] + end - first)

    def pack(self, photos: Sequence[int]) -> tuple[PackedSequence, Tensor, Tensor]:
        """All captions of these photos -> words read, words to be said (W,), and whose caption each is (R,)."""
        captions = [
            (self.words[self.caption_ends[c] : self.caption_ends[c + 1]], place)
            for place, photo in enumerate(photos)
            for c in range(self.photo_ends[photo], self.photo_ends[photo + 1])
        ]
        captions.sort(key=lambda caption: -len(caption[0]))  # stable: equal lengths keep their order
        lengths = torch.tensor([len(words) + 1 for words, _ in captions])
        padded = np.full((len(captions), int(lengths[0]) + 1), PAD, np.int64)
        padded[:, 0] = START
        for row, (words, _) in zip(padded, captions, strict=True):
            row[1 : len(words) + 1] = words
            row[len(words) + 1] = END
        padded = torch.from_numpy(padded)
        words = pack_padded_sequence(padded[:, :-1], lengths, batch_first=True)
        targets = pack_padded_sequence(padded[:, 1:], lengths, batch_first=True).data
        return words, targets, torch.tensor([place for _, place in captions])
