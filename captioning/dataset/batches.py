"""One photo with all its captions -> packed batches, from the cache or from the photos themselves.

Letters: B photos, R captions, W words of all captions packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset

from captioning.dataset.caption_dataset import CaptionDataset
from captioning.encoders.grid import Grid
from captioning.encoders.images import Augment, Transform, read_photos
from captioning.errors import PhotoError, UserError


@dataclass
class Batch:
    photos: Grid | Tensor  # cached: the photos' Grid; live: the photos (B, 3, S, S) uint8
    words: PackedSequence  # what is read: <start> y_1 ... y_n, the longest caption first
    targets: Tensor  # (W,) int64, what is to be said: y_1 ... y_n <end>, packed like the words
    photo_index: Tensor  # (R,) int64: which photo of the view a caption describes
    indices: np.ndarray  # (B,) which photos of the split these are
    failures: list[str] = field(default_factory=list)  # photos that could not be read; they are left out

    @property
    def captions(self) -> int:
        return len(self.photo_index)

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """On the device; a Grid's cells become `dtype`."""
        view = (
            self.photos.to(device, dtype)
            if isinstance(self.photos, Grid)
            else self.photos.to(device, non_blocking=True)
        )
        words = PackedSequence(self.words.data.to(device, non_blocking=True), self.words.batch_sizes)
        targets, photo = (tensor.to(device, non_blocking=True) for tensor in (self.targets, self.photo_index))
        return Batch(view, words, targets, photo, self.indices, self.failures)

    def pin_memory(self) -> Batch:
        view = self.photos.pin_memory()
        return Batch(
            view,
            self.words.pin_memory(),
            self.targets.pin_memory(),
            self.photo_index.pin_memory(),
            self.indices,
            self.failures,
        )


class CachedPhotos(Dataset):
    """Batches of a split whose feature maps are read from the cache."""

    def __init__(self, split: CaptionDataset, rows: np.ndarray, read: Callable[[np.ndarray], Grid]):
        """rows (N,) int64: where each photo is in the file; read: rows -> their Grid."""
        self.split, self.rows, self.read = split, rows, read

    def __getitem__(self, photos: np.ndarray) -> Batch:
        return Batch(self.read(self.rows[photos]), *self.split.pack(photos), photos)


class LivePhotos(Dataset):
    """Batches of a split whose photos are decoded anew, for the live encoder."""

    def __init__(
        self,
        split: CaptionDataset,
        transform: Transform,
        augment: Augment | None = None,
        sided: np.ndarray | None = None,
    ):
        """augment: the views of training photos, if any, and sided (N,) bool: whose captions tell left from right."""
        self.split, self.transform = split, transform
        self.augment, self.sided = augment, sided
        self.epoch = 0  # each has other views

    def __getitem__(self, photos: np.ndarray) -> Batch:
        readable, decoded, failures = read_photos(
            self.split.paths, photos, self.transform, self._view if self.augment else None
        )
        if not readable:
            raise PhotoError(f"{failures[0]}; not one photo of a batch can be read")
        return Batch(decoded, *self.split.pack(readable), np.array(readable), failures)

    def _view(self, photo: Image.Image, index: int) -> Image.Image:
        return self.augment(photo, int(index), self.epoch, self.sided is None or not self.sided[index])


def plan_batches(split: CaptionDataset, captions: int, order: Iterable[int], ranks: int = 1) -> list[np.ndarray]:
    """The photos in this order, in batches of at most so many captions; a photo's captions stay together.

    Each of `ranks` processes takes its share of every batch, so a last batch with too few photos for that joins the
    one before it. Raises UserError where another batch has too few.
    """
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
    if len(plan) > 1 and len(plan[-1]) < ranks:
        plan[-2:] = [np.concatenate(plan[-2:])]
    few = min((len(photos) for photos in plan), default=ranks)
    if few < ranks:
        raise UserError(f"--batch-size {captions}: {few} photos a batch do not go round {ranks} processes; raise it")
    return plan


class Update(NamedTuple):
    """What one update of the weights learns from: one batch, or several whose gradients add up."""

    batches: list[np.ndarray]
    words: int  # of all of them, on all ranks
    captions: int
    photos: int


def plan_updates(split: CaptionDataset, plan: list[np.ndarray], accumulate: int) -> list[Update]:
    """The batches of a plan in groups of `accumulate`, the last one perhaps smaller."""
    updates, words, captions = [], split.target_counts(), np.diff(split.photo_offsets)
    for first in range(0, len(plan), accumulate):
        batches = plan[first : first + accumulate]
        photos = np.concatenate(batches)
        updates.append(Update(batches, int(words[photos].sum()), int(captions[photos].sum()), len(photos)))
    return updates


def epoch_order(photos: int, seed: int, epoch: int) -> np.ndarray:
    """An epoch's order: a function of seed and epoch, so that a resumed run sees the very same one."""
    return np.random.default_rng([seed, epoch]).permutation(photos)
