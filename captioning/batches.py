"""One photo with all its captions -> packed batches.

Captions are flat arrays with offsets: workers share them, and memory does not grow with their number.

Letters: B photos, R captions, W words of all captions packed, T words of the longest.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.data import Dataset

from captioning.feature_cache import FeatureReader
from captioning.grid import Grid
from captioning.images import PhotoError, Transform, read_photos
from preprocess.captions import Photo
from preprocess.vocabulary import END, PAD, START, Vocabulary


@dataclass
class Batch:
    view: Grid | Tensor  # cached: the photos' Grid; live: the photos (B, 3, S, S) uint8
    words: PackedSequence  # what is read: <start> y_1 ... y_n, the longest caption first
    targets: Tensor  # (W,) int64, what is to be said: y_1 ... y_n <end>, packed like the words
    photo: Tensor  # (R,) int64: which photo of the view a caption describes
    indices: np.ndarray  # (B,) which photos of the split these are
    failures: list[str] = field(default_factory=list)  # photos that could not be read; they are left out

    @property
    def captions(self) -> int:
        return len(self.photo)

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """On the device; a Grid's cells become `dtype`."""
        view = self.view.to(device, dtype) if isinstance(self.view, Grid) else self.view.to(device, non_blocking=True)
        words = PackedSequence(self.words.data.to(device, non_blocking=True), self.words.batch_sizes)
        targets, photo = (tensor.to(device, non_blocking=True) for tensor in (self.targets, self.photo))
        return Batch(view, words, targets, photo, self.indices, self.failures)

    def pin_memory(self) -> Batch:
        view = self.view.pin_memory()
        return Batch(view, self.words.pin_memory(), self.targets.pin_memory(), self.photo.pin_memory(), self.indices,
                     self.failures)  # fmt: skip


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
        self.words = np.frombuffer(words, np.int32) if words else np.empty(0, np.int32)  # of all captions, one after the other
        self.caption_ends = np.array(caption_ends, np.int64)  # caption i is words[ends[i] : ends[i + 1]]
        self.photo_ends = np.array(photo_ends, np.int64)  # photo i has captions ends[i] to ends[i + 1] - 1

    def __len__(self) -> int:
        return len(self.ids)

    def captions_of(self, photo: int) -> int:
        return int(self.photo_ends[photo + 1] - self.photo_ends[photo])

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


class CachedPhotos(Dataset):
    """Batches of a split whose feature maps are read from the cache; rows: where each photo is in the file."""

    def __init__(self, split: Split, reader: FeatureReader, rows: np.ndarray, sees_cells: bool):
        self.split, self.rows = split, rows
        self.reader, self.sees_cells = reader, sees_cells

    def __getitem__(self, photos: np.ndarray) -> Batch:
        read = self.reader.read if self.sees_cells else self.reader.read_pooled
        return Batch(read(self.rows[photos]), *self.split.pack(photos), photos)


class LivePhotos(Dataset):
    """Batches of a split whose photos are decoded anew, for the live encoder."""

    def __init__(self, split: Split, transform: Transform):
        self.split, self.transform = split, transform

    def __getitem__(self, photos: np.ndarray) -> Batch:
        readable, decoded, failures = read_photos(self.split.paths, photos, self.transform)
        if not readable:
            raise PhotoError(f"{failures[0]}; not one photo of a batch can be read")
        return Batch(decoded, *self.split.pack(readable), np.array(readable), failures)


def plan_batches(split: Split, captions: int, order: Iterable[int]) -> list[np.ndarray]:
    """The photos in this order, in batches of at most so many captions; a photo's captions stay together."""
    plan, batch, size = [], [], 0
    for photo in order:
        count = split.captions_of(photo)
        if batch and size + count > captions:
            plan.append(np.array(batch))
            batch, size = [], 0
        batch.append(photo)
        size += count
    if batch:
        plan.append(np.array(batch))
    return plan


def shuffled(photos: int, seed: int, epoch: int) -> np.ndarray:
    """An epoch's order: a function of seed and epoch, so that a resumed run sees the very same one."""
    return np.random.default_rng([seed, epoch]).permutation(photos)
