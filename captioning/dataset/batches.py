"""Batches of photos with all their captions, from cached features or from the photos themselves.

Letters: B photos, R captions, W words of all captions packed, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset

from captioning.dataset.caption_dataset import CaptionDataset
from captioning.encoders.grid import Grid
from captioning.encoders.images import Augment, Transform, read_photos
from captioning.errors import PhotoError, UserError
from captioning.features.cached_grid import CachedGrid
from captioning.runtime.device import pin


@dataclass
class Batch:
    """B photos and their R captions, packed longest caption first."""

    # cached features, or decoded photos (B, 3, S, S) uint8 for the live encoder; `to` makes a CachedGrid a Grid
    photos: Grid | CachedGrid | Tensor
    words: PackedSequence  # decoder inputs: <start> y_1 ... y_n
    targets: Tensor  # (W,) int64, the next words: y_1 ... y_n <end>, packed like `words`
    photo_index: Tensor  # (R,) int64, the photo of the batch that each caption describes
    indices: np.ndarray  # (B,) int64, the index of each photo in its CaptionDataset
    failures: list[str] = field(default_factory=list)  # errors of unreadable photos, which the batch leaves out
    # Of captions that an objective sampled in place of the dataset's, (R,) float32; a caption that only pads has zeros
    rewards: Tensor | None = None
    advantages: Tensor | None = None  # the rewards less their baselines

    @property
    def num_captions(self) -> int:
        """R."""
        return len(self.photo_index)

    @property
    def is_prepared(self) -> bool:
        """Whether an objective has sampled its captions and rewarded them."""
        return self.rewards is not None

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """Copy the tensors to a device. `dtype` applies to the cells of a Grid; everything else keeps its type."""
        if isinstance(self.photos, Tensor):
            photos: Grid | Tensor = self.photos.to(device, non_blocking=True)
        else:
            photos = self.photos.to(device, dtype)
        return Batch(
            photos,
            PackedSequence(self.words.data.to(device, non_blocking=True), self.words.batch_sizes),
            self.targets.to(device, non_blocking=True),
            self.photo_index.to(device, non_blocking=True),
            self.indices,
            self.failures,
            None if self.rewards is None else self.rewards.to(device, non_blocking=True),
            None if self.advantages is None else self.advantages.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """Copy the tensors to page-locked memory, from which a GPU copies asynchronously."""
        return Batch(
            pin(self.photos) if isinstance(self.photos, Tensor) else self.photos.pin_memory(),
            PackedSequence(pin(self.words.data), self.words.batch_sizes),
            pin(self.targets),
            pin(self.photo_index),
            self.indices,
            self.failures,
            None if self.rewards is None else pin(self.rewards),
            None if self.advantages is None else pin(self.advantages),
        )


class CachedPhotos(Dataset):
    """Batches with features from the cache. An item is indexed by the photos it holds: (B,) int64 -> Batch."""

    def __init__(
        self, split: CaptionDataset, rows: np.ndarray, read: Callable[[np.ndarray], Grid | CachedGrid], seed: int = 0
    ):
        """rows (N, V) int64: the row of each photo of `split` in each view; -1: it must not be used; or (N,) for one.

        read: rows (B,) -> their maps. seed: see `draw_views`.
        """
        self.split = split
        self.rows = rows
        self.read = read
        self.seed = seed
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Draw the view in which each photo is seen in this epoch."""
        views = self.rows.reshape(len(self.rows), -1)
        self.drawn_rows = views[np.arange(len(views)), draw_views(views >= 0, self.seed, epoch)]  # (N,)

    def __getitem__(self, indices: np.ndarray) -> Batch:
        return Batch(self.read(self.drawn_rows[indices]), *self.split.pack(indices), indices)


class LivePhotos(Dataset):
    """Batches of decoded photos, for the live encoder. An item is indexed by the photos it holds: (B,) int64 -> Batch.

    The batch leaves out photos that cannot be read, together with their captions.
    """

    def __init__(
        self,
        split: CaptionDataset,
        transform: Transform,
        augment: Augment | None = None,
        mentions_side: np.ndarray | None = None,
    ):
        """mentions_side (N,) bool: photos that `augment` must not mirror, since a caption says left or right."""
        self.split = split
        self.transform = transform
        self.augment = augment
        self.mentions_side = mentions_side
        self.epoch = 0  # seeds the augmentation

    def start_epoch(self, epoch: int) -> None:
        """Augment the photos anew."""
        self.epoch = epoch

    def __getitem__(self, indices: np.ndarray) -> Batch:
        """Raises PhotoError if none of the photos can be read."""
        augment = self._augment if self.augment else None
        readable, photos, failures = read_photos(self.split.paths, indices.tolist(), self.transform, augment)
        if not readable:
            raise PhotoError(f"{failures[0]}; no photo of the batch can be read")
        return Batch(photos, *self.split.pack(readable), np.array(readable), failures)

    def _augment(self, photo: np.ndarray, index: int) -> np.ndarray:
        assert self.augment is not None
        may_flip = self.mentions_side is None or not self.mentions_side[index]
        return self.augment(photo, index, self.epoch, may_flip)


def plan_batches(split: CaptionDataset, batch_size: int, order: Iterable[int], world_size: int = 1) -> list[np.ndarray]:
    """Group photos, in the given order, into batches of at most `batch_size` captions -> the photos of each batch.

    All captions of a photo are in one batch; a photo with more than `batch_size` captions is alone in its batch. Each
    of `world_size` processes takes a shard of every batch, so a last batch with fewer photos than processes joins the
    batch before it. Raises UserError if another batch has fewer photos than processes.
    """
    plan: list[np.ndarray] = []
    batch: list[int] = []
    batch_captions = 0
    for photo in order:
        captions = split.num_captions(photo)
        if batch and batch_captions + captions > batch_size:
            plan.append(np.array(batch))
            batch = []
            batch_captions = 0
        batch.append(photo)
        batch_captions += captions
    if batch:
        plan.append(np.array(batch))
    if len(plan) > 1 and len(plan[-1]) < world_size:
        plan[-2:] = [np.concatenate(plan[-2:])]
    smallest = min((len(photos) for photos in plan), default=world_size)
    if smallest < world_size:
        raise UserError(
            f"--batch-size {batch_size}: a batch of {smallest} photos cannot be divided among {world_size} processes; "
            "increase it"
        )
    return plan


class Update(NamedTuple):
    """The batches whose gradients are accumulated for one optimizer step."""

    batches: list[np.ndarray]  # the photos of each batch
    words: int  # targets in all batches, over all processes
    captions: int
    photos: int


def plan_updates(split: CaptionDataset, plan: list[np.ndarray], grad_accumulation: int) -> list[Update]:
    """Group the batches of a plan into updates of `grad_accumulation` batches; the last update may have fewer."""
    words = split.target_counts()
    captions = np.diff(split.photo_offsets)
    updates = []
    for start in range(0, len(plan), grad_accumulation):
        batches = plan[start : start + grad_accumulation]
        photos = np.concatenate(batches)
        updates.append(Update(batches, int(words[photos].sum()), int(captions[photos].sum()), len(photos)))
    return updates


def epoch_order(num_photos: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation (N,) of the photos. It depends on seed and epoch only, so a resumed run gets the same one."""
    return np.random.default_rng([seed, epoch]).permutation(num_photos)


def draw_views(allowed: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Draw one of the allowed views (N, V) bool of each photo, at least one each -> its column (N,) int64.

    A photo with n views is seen once in each of them in the epochs 0 to n - 1, then again in n to 2n - 1, and so on, in
    random order. The result depends on the arguments only, so a resumed run gets the same one.
    """
    numbers = allowed.sum(1)
    ranks = np.zeros(len(allowed), np.int64)  # among the allowed views of the photo
    for number in np.unique(numbers):
        cycle, place = divmod(epoch, int(number))
        rng = np.random.default_rng([seed, number, cycle, 1])  # the 1: another stream than that of `epoch_order`
        photos = numbers == number
        ranks[photos] = rng.random(allowed.shape[:1] + (number,)).argsort(1)[photos, place]
    allowed_first = np.argsort(~allowed, axis=1, kind="stable")
    return np.take_along_axis(allowed_first, ranks[:, None], 1)[:, 0]
