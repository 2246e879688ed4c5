"""Photos with their captions as word ids.

The captions are flat arrays with offsets: a few hundred bytes per photo, which worker processes share.

Letters: N photos, R captions of a batch, W words of all captions packed.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from captioning.errors import UserError
from captioning.runtime.string_array import StringArray
from preprocess.captions import CAPTIONS_FILE, Photo
from preprocess.folders import SPLITS
from preprocess.vocabulary import END, PAD, SPECIAL, START, UNKNOWN, VOCABULARY_FILE, Vocabulary

MAX_UNKNOWN = 0.9  # fraction of words; the vocabulary of the same data set covers more than a tenth of them


def split_indices(splits: Sequence[str] | np.ndarray, split: str, data: Path, limit: int = 0) -> np.ndarray:
    """The indices (int64) of the photos of one split, given the split of each photo.

    limit: return the first `limit` of them only; 0 returns all. Raises UserError if the split is empty.
    """
    indices = np.flatnonzero(np.asarray(splits) == split)
    if not len(indices):
        existing = ", ".join(sorted(set(splits)))
        raise UserError(
            f"{data}: has no {split} photos, only {existing}; create them with: python -m preprocess {data}"
        )
    return indices[: limit or None]


def photos_in_split(photos: Sequence[Photo], split: str, data: Path, limit: int = 0) -> list[Photo]:
    """The photos of one split; the arguments and errors are those of `split_indices`."""
    return [photos[i] for i in split_indices([photo.split for photo in photos], split, data, limit)]


def check_captions_complete(rows: np.ndarray, features: Path, num_cached: int, allowed: float) -> None:
    """Raise UserError if captions.jsonl lacks more than the fraction `allowed` of the photos in the feature file.

    A captions.jsonl truncated at the end of a line is still valid, so only this comparison detects it.

    rows (N,) int64: the feature row of each photo in captions.jsonl, -1 if it has none; num_cached: rows in the file.
    """
    missing = num_cached - len(np.unique(rows[rows >= 0]))
    if missing > allowed * num_cached:
        raise UserError(
            f"{features.parent / CAPTIONS_FILE}: lacks {missing:,} of the {num_cached:,} photos of {features}; if it "
            f"is truncated, run python -m preprocess again; if it is complete, give --features {features}"
        )


def check_vocabulary(split: CaptionDataset, data: Path) -> None:
    """Raise UserError if the vocabulary lacks nearly all words of the captions: it belongs to another data set."""
    unknown = np.mean(split.words >= split.vocab_size)
    if unknown > MAX_UNKNOWN:
        raise UserError(
            f"{data / VOCABULARY_FILE}: lacks {unknown:.0%} of the words in {CAPTIONS_FILE}; it seems to belong to "
            f"another data set; create both again: python -m preprocess {data} --overwrite"
        )


def sides_of(word: str) -> set[str]:
    """The sides that a word names, in English or Chinese: a subset of "left" and "right"."""
    names = {"left": "左", "right": "右"}
    return {side for side, character in names.items() if word.startswith(side) or character in word}


class CaptionDataset:
    """Photos of a captions.jsonl, or of one split of it: their ids, their paths and their captions as word ids.

    Words outside the vocabulary have ids from `vocab_size` on. `pack` maps them to UNKNOWN; `references` keeps them,
    so that scores are computed against the original captions.

    Attributes:
        ids, paths: (N,) str, of each photo.
        splits: (N,) uint8, index into SPLITS.
        words: ids of the words of all captions, concatenated.
        caption_offsets: caption i has words[caption_offsets[i] : caption_offsets[i + 1]].
        photo_offsets: photo i has the captions photo_offsets[i] to photo_offsets[i + 1] - 1.
        id_to_word: the word of each id.
        vocab_size: words in the vocabulary, with the special ones.
        max_length: longest caption, in words, that `pack` returns; longer ones are truncated.
    """

    def __init__(self, photos: Iterable[Photo], vocabulary: Vocabulary, max_length: int):
        word_ids = dict(vocabulary.word_to_id)
        self.ids = StringArray()
        self.paths = StringArray()
        splits = bytearray()
        words = array("i")
        caption_offsets = array("q", [0])
        photo_offsets = array("q", [0])
        for photo in photos:
            self.ids.append(photo.id)
            self.paths.append(photo.image)
            splits.append(SPLITS.index(photo.split))
            for caption in photo.captions:
                words.extend(word_ids.setdefault(word, len(word_ids) + len(SPECIAL)) for word in caption)
                caption_offsets.append(len(words))
            photo_offsets.append(len(caption_offsets) - 1)
        self.id_to_word = (*SPECIAL, *word_ids)
        self.vocab_size = len(vocabulary)
        self.max_length = max_length
        self.splits = np.array(splits)
        self.words = np.array(words, np.min_scalar_type(len(self.id_to_word)))
        self.caption_offsets = np.array(caption_offsets)
        self.photo_offsets = np.array(photo_offsets)

    def __len__(self) -> int:
        return len(self.ids)

    def indices_of(self, split: str, data: Path, limit: int = 0) -> np.ndarray:
        """The indices of the photos of one split; the arguments and errors are those of `split_indices`."""
        return split_indices(np.array(SPLITS)[self.splits], split, data, limit)

    def subset(self, indices: np.ndarray) -> CaptionDataset:
        """A copy with these photos only. indices: int64, ascending."""
        keep = np.zeros(len(self), bool)
        keep[indices] = True
        keep_caption = keep.repeat(np.diff(self.photo_offsets))
        subset = copy.copy(self)
        subset.ids = StringArray(self.ids[i] for i in indices)
        subset.paths = StringArray(self.paths[i] for i in indices)
        subset.splits = self.splits[keep]
        subset.words = self.words[keep_caption.repeat(np.diff(self.caption_offsets))]
        subset.caption_offsets = np.append(0, np.diff(self.caption_offsets)[keep_caption].cumsum())
        subset.photo_offsets = np.append(0, np.diff(self.photo_offsets)[keep].cumsum())
        return subset

    @property
    def num_truncated(self) -> int:
        """Number of captions longer than max_length."""
        return int((np.diff(self.caption_offsets) > self.max_length).sum())

    def num_captions(self, photo: int) -> int:
        """Number of captions of one photo."""
        return int(self.photo_offsets[photo + 1] - self.photo_offsets[photo])

    def target_counts(self) -> np.ndarray:
        """Number of targets of each photo (N,) int64: the words of its truncated captions and one <end> per caption."""
        lengths = np.minimum(np.diff(self.caption_offsets), self.max_length) + 1
        return np.add.reduceat(lengths, self.photo_offsets[:-1])

    def mentions_side(self) -> np.ndarray:
        """Whether a caption of each photo says left or right, in English or Chinese (N,) bool.

        Mirroring such a photo would make the caption wrong.
        """
        is_side = [bool(sides_of(word)) for word in self.id_to_word]
        first_words = self.caption_offsets[self.photo_offsets[:-1]]
        return np.logical_or.reduceat(np.array(is_side)[self.words], first_words)

    def references(self, photo: int) -> list[list[str]]:
        """The captions of one photo in words, neither truncated nor with <unk>."""
        first, end = self.photo_offsets[photo : photo + 2]
        offsets = self.caption_offsets[first : end + 1].tolist()
        captions = [self.words[start:stop].tolist() for start, stop in pairwise(offsets)]
        return [[self.id_to_word[word] for word in caption] for caption in captions]

    def pack(self, indices: Sequence[int] | np.ndarray) -> tuple[PackedSequence, Tensor, Tensor]:
        """Pack all captions of these photos, longest first; captions of equal length keep their order.

        Returns the decoder inputs <start> y_1 ... y_n (W,), the targets y_1 ... y_n <end> (W,), and for each caption
        the position of its photo in `indices` (R,), all int64.
        """
        captions = []
        for position, photo in enumerate(indices):
            for i in range(self.photo_offsets[photo], self.photo_offsets[photo + 1]):
                words = self.words[self.caption_offsets[i] : self.caption_offsets[i + 1]]
                captions.append((words[: self.max_length], position))
        captions.sort(key=lambda caption: -len(caption[0]))
        padded, lengths = self._pad([words for words, _ in captions])
        inputs = pack_padded_sequence(padded[:, :-1], lengths, batch_first=True)
        targets = pack_padded_sequence(padded[:, 1:], lengths, batch_first=True).data
        return inputs, targets, torch.tensor([position for _, position in captions])

    def _pad(self, captions: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Captions, longest first -> <start> y_1 ... y_n <end> <pad> ... (R, T + 1), and their lengths n + 1 (R,)."""
        lengths = torch.tensor([len(words) + 1 for words in captions])
        padded = np.full((len(captions), int(lengths[0]) + 1), PAD, np.int64)
        padded[:, 0] = START
        for row, words in zip(padded, captions, strict=True):
            row[1 : len(words) + 1] = words
            row[len(words) + 1] = END
        padded[padded >= self.vocab_size] = UNKNOWN
        return torch.from_numpy(padded), lengths
