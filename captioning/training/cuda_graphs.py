"""Forward and backward of a batch as one CUDA graph: one kernel launch per batch.

A decoder with attention runs thousands of short kernels per batch, and launching them takes longer than running them.
A CUDA graph launches them all at once, but its shapes are fixed. Each batch is therefore copied into the smallest of a
few static batches that holds it, padded with <pad>, which the objective ignores.

The sizes of the static batches follow from the plan of the epochs: see `plan_static_sizes`. They depend on the data
set, the seed and the batch size only, so a resumed run pads, and draws its dropout masks, like an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from captioning.dataset.batches import Batch, epoch_order, plan_batches
from captioning.dataset.caption_dataset import CaptionDataset
from captioning.encoders.grid import Grid
from captioning.runtime.cuda_graphs import Capture, GraphCapture
from captioning.runtime.device import pin, restored
from captioning.runtime.distributed import SINGLE, DistributedContext
from captioning.training.objectives import Loss, LossWeights
from preprocess.vocabulary import PAD, UNKNOWN

ROW_MULTIPLE = 8  # photos and captions of a static batch are rounded up to multiples of it
STEP_QUANTILES = (0.5, 0.8, 0.95, 1.0)  # of the batches' steps: one static batch for each
SAMPLE_STRETCH = 1.25
PLANNED_BATCHES = 4000  # so many batches, and at least one epoch, are planned to find the sizes

# a batch on the device, the weights of its losses -> its detached Loss; adds to the gradients of the parameters
BatchWork = Callable[[Batch, LossWeights], Loss]


class StaticSize(NamedTuple):
    """The size of a static batch."""

    photos: int
    batch_sizes: np.ndarray  # (T,) int64, non-increasing: captions of each step

    def fits(self, batch: Batch) -> bool:
        """Whether it can hold the batch."""
        batch_sizes = batch.words.batch_sizes.numpy()
        return (
            len(batch.photos) <= self.photos
            and len(batch_sizes) <= len(self.batch_sizes)
            and bool((batch_sizes <= self.batch_sizes[: len(batch_sizes)]).all())
        )


def plan_static_sizes(
    split: CaptionDataset, batch_size: int, seed: int, distributed: DistributedContext = SINGLE
) -> list[StaticSize]:
    """The sizes that hold the batches of the first epochs, smallest first; each is at least as large as the one before.

    The captions' lengths are known before training, so the plan of an epoch gives the size of every batch. A later
    epoch may have batches that no size holds. They are rare, and run without a graph.
    """
    photos: list[np.ndarray] = []  # of each planned batch
    epoch = 0
    while len(photos) < PLANNED_BATCHES:
        order = epoch_order(len(split), seed, epoch)
        photos += map(distributed.shard, plan_batches(split, batch_size, order, distributed.size))
        epoch += 1
    num_photos = np.array([len(batch) for batch in photos])
    profiles = _batch_profiles(split, photos)  # (batches, T)
    steps = (profiles > 0).sum(1)
    sizes = []
    for limit in np.unique(np.quantile(steps, STEP_QUANTILES, method="higher")):
        held = steps <= limit
        batch_sizes = _round_up(profiles[held].max(0)[:limit])
        sizes.append(StaticSize(int(_round_up(num_photos[held].max())), batch_sizes))
    return sizes


def plan_sampled_sizes(
    split: CaptionDataset, batch_size: int, samples: int, seed: int, distributed: DistributedContext = SINGLE
) -> list[StaticSize]:
    """Like `plan_static_sizes`, for `samples` captions per photo that an objective samples.

    Their lengths are not known before. They are taken to be distributed like those of the dataset's captions, but up
    to SAMPLE_STRETCH times as long. Batches with still longer ones run without a graph.
    """
    sizes = []
    for size in plan_static_sizes(split, batch_size, seed, distributed):
        captions = size.photos * samples
        steps = min(round(SAMPLE_STRETCH * len(size.batch_sizes)), split.max_length + 1)
        stretched = np.interp(np.arange(steps) / SAMPLE_STRETCH, np.arange(len(size.batch_sizes)), size.batch_sizes)
        fractions = stretched / size.batch_sizes[0]
        batch_sizes = np.minimum(_round_up(np.ceil(captions * fractions).astype(np.int64)), captions)
        sizes.append(StaticSize(size.photos, batch_sizes))
    return sizes


def _batch_profiles(split: CaptionDataset, photos: Sequence[np.ndarray]) -> np.ndarray:
    """The captions at each step of each batch (len(photos), T) int64. photos: those of each batch, (B,) int64."""
    lengths = np.minimum(np.diff(split.caption_offsets), split.max_length) + 1  # of the decoder's inputs
    max_steps = int(lengths.max())
    of_photo = np.zeros((len(split), max_steps + 1), np.int64)  # captions of each length
    photo_of_caption = np.arange(len(split)).repeat(np.diff(split.photo_offsets))
    np.add.at(of_photo, (photo_of_caption, lengths), 1)
    first = np.cumsum([0, *(len(batch) for batch in photos)])[:-1]
    of_batch = np.add.reduceat(of_photo[np.concatenate(photos)], first)  # (batches, T + 1)
    return np.flip(np.flip(of_batch, 1).cumsum(1), 1)[:, 1:]  # captions of at least 1, 2, ... steps


def _round_up(number: Any) -> Any:
    """Round up to a multiple of ROW_MULTIPLE. number: an int or an int array."""
    return -(-number // ROW_MULTIPLE) * ROW_MULTIPLE


class StaticBatch:
    """A batch whose tensors keep their shapes and addresses."""

    def __init__(self, like: Batch, size: StaticSize, number: int, device: torch.device, precision: torch.dtype):
        """like: has the same N, C and pooling, and is prepared by its objective or not. number: of the size."""
        self.size = size
        self.number = number
        self.num_words = int(size.batch_sizes.sum())
        captions = int(size.batch_sizes[0])
        # words, targets and photo_index in one tensor, which one copy fills
        self.indices = torch.full((2 * self.num_words + captions,), UNKNOWN, device=device)
        words, targets, photo_index = self.indices.split([self.num_words, self.num_words, captions])
        photo_index.zero_()
        assert not isinstance(like.photos, Tensor), "photos for a live encoder have no static batch"
        cells = torch.zeros(size.photos, *like.photos.shape[1:], dtype=precision, device=device)
        packed = PackedSequence(words, torch.from_numpy(size.batch_sizes))
        self.grid = Grid(cells, like.photos.pooling.to(device))
        self.rewards = torch.zeros(2, captions, device=device)  # and advantages, of captions that were sampled
        self.batch = Batch(self.grid, packed, targets, photo_index, np.arange(size.photos))
        if like.is_prepared:
            self.batch.rewards, self.batch.advantages = self.rewards
        self.weight_values = torch.ones(len(LossWeights._fields), device=device)
        self.weights = LossWeights(*self.weight_values)

    def fill(self, batch: Batch, weights: LossWeights) -> None:
        """Copy a batch, on any device, and the weights of its losses into these tensors."""
        source = batch.targets.device
        positions = self._packed_positions(batch.words.batch_sizes.numpy()).to(source)
        indices = torch.full(self.indices.shape, PAD, device=source)
        indices[positions] = batch.words.data
        indices[self.num_words + positions] = batch.targets
        indices[2 * self.num_words :][: batch.num_captions] = batch.photo_index
        copy_async(self.indices, indices)
        if batch.is_prepared:
            self._fill_rewards(batch)
        copy_async(self.weight_values, torch.tensor(weights))
        # The cells after these keep old values: only words whose target is <pad> attend to them.
        assert not isinstance(batch.photos, Tensor)
        batch.photos.copy_to(self.grid.cells[: len(batch.photos)])

    def _fill_rewards(self, batch: Batch) -> None:
        assert batch.rewards is not None and batch.advantages is not None
        rewards = torch.zeros(self.rewards.shape, device=batch.rewards.device)
        rewards[0, : batch.num_captions] = batch.rewards
        rewards[1, : batch.num_captions] = batch.advantages
        copy_async(self.rewards, rewards)

    def _packed_positions(self, batch_sizes: np.ndarray) -> Tensor:
        """(W,) int64: where each word of a batch packed with these batch sizes goes in this static batch's packing."""
        sizes = self.size.batch_sizes[: len(batch_sizes)]
        step_starts = np.cumsum(sizes) - sizes
        shifts = step_starts - (np.cumsum(batch_sizes) - batch_sizes)
        return torch.from_numpy(np.arange(batch_sizes.sum()) + np.repeat(shifts, batch_sizes))


def copy_async(target: Tensor, source: Tensor) -> None:
    """Copy from the CPU or the same device without waiting for a GPU."""
    if target.is_cuda and not source.is_cuda:
        source = pin(source)
    target.copy_(source, non_blocking=True)


class CudaGraphRunner:
    """Runs batches as CUDA graphs. A graph is captured before its first use, and lives as long as this object."""

    def __init__(
        self,
        backward: BatchWork,
        sizes: Sequence[StaticSize],
        state: Sequence[Tensor],
        device: torch.device,
        precision: torch.dtype,
        capture: Capture | None = None,
    ):
        """backward: the work to capture. Its Loss must be detached: an autograd graph also keeps its streams alive.

        sizes: smallest first. state: the tensors that backward changes, the gradients among them: they must keep their
        addresses. precision: of the cells.
        """
        self.backward = backward
        self.sizes = sizes
        self.state = state
        self.device = device
        self.precision = precision
        self.capture = capture or GraphCapture()
        self.static_batches: dict[int, StaticBatch] = {}  # by the number of their size
        self.replays: dict[tuple[int, Hashable], Callable[[], Loss]] = {}

    def fill(self, batch: Batch, weights: LossWeights) -> StaticBatch | None:
        """Copy a batch into the smallest static batch that holds it. None if it is larger than all of them."""
        number = next((number for number, size in enumerate(self.sizes) if size.fits(batch)), None)
        if number is None:
            return None
        static_batch = self._static_batch(number, batch)
        static_batch.fill(batch, weights)
        return static_batch

    def run(self, static_batch: StaticBatch, variant: Hashable = None) -> Loss:
        """Add the gradients of a static batch. variant: how backward computes at present; each has its own graphs.

        Raises CaptureError or UserError like GraphCapture, and whatever backward raises.
        """
        # The graph of the largest batch comes first, so that the others fit into its memory.
        for number in (len(self.sizes) - 1, static_batch.number):
            if (number, variant) not in self.replays:
                captured = self._static_batch(number, static_batch.batch)
                self.replays[number, variant] = self._capture(captured)
        loss = self.replays[static_batch.number, variant]()
        return Loss(loss.objective.clone(), loss.value.clone())  # the next replay overwrites them

    def _static_batch(self, number: int, like: Batch) -> StaticBatch:
        if number not in self.static_batches:
            size = self.sizes[number]
            self.static_batches[number] = StaticBatch(like, size, number, self.device, self.precision)
        return self.static_batches[number]

    def _capture(self, static_batch: StaticBatch) -> Callable[[], Loss]:
        def work() -> Loss:
            return self.backward(static_batch.batch, static_batch.weights)

        with restored(self.state, self.device):
            work()  # CUDA loads kernels on their first use, which cannot be captured
            return self.capture(work)
