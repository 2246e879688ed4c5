"""Forward and backward of a batch as one CUDA graph: one kernel launch per batch.

A decoder with attention runs thousands of short kernels per batch, and launching them takes longer than running them.
A CUDA graph launches them all at once, but its shapes are fixed. Each batch is therefore copied into a static batch of
one of a few shapes, padded with <pad>, which the objective ignores. A static batch that turns out too small is replaced
by a larger one, until all batches fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from captioning.dataset.batches import Batch
from captioning.encoders.grid import Grid
from captioning.runtime.cuda_graphs import GraphCapture
from captioning.training.objectives import Loss
from preprocess.vocabulary import PAD

# The shape of a static batch is rounded up to multiples of these.
PHOTO_MULTIPLE = 8
CAPTION_MULTIPLE = 8
STEP_MULTIPLE = 4
BATCH_SIZE_LEVELS = 8  # about as many different batch sizes over the steps of a static batch


class CudaGraphRunner:
    """Batch -> Loss. Adds the gradients of the batch to the `grad` of the parameters."""

    def __init__(
        self,
        backward: Callable[[Batch], Loss],
        parameters: list[nn.Parameter],
        device: torch.device,
        precision: torch.dtype,
        capture: Callable[[Callable[[], Loss]], Callable[[], Loss]] | None = None,
    ):
        """backward: the work to capture; called with a batch on the device whose features have this precision.

        The Loss it returns must be detached: an autograd graph that is kept alive also keeps its streams.
        """
        self.backward = backward
        self.device = device
        self.precision = precision
        self.capture = capture or GraphCapture()
        self.static_batches: dict[tuple[int, int, int], StaticBatch] = {}
        for parameter in parameters:  # a graph adds to the gradient tensors that existed when it was captured
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, batch: Batch) -> Loss:
        """batch: on any device."""
        static_batch = self.static_batch_for(batch)
        static_batch.fill(batch)
        if static_batch.used:
            if static_batch.replay is None:
                static_batch.replay = self.capture(lambda: self.backward(static_batch.batch))
            loss = static_batch.replay()
        else:  # run eagerly first: CUDA loads kernels on their first use, which cannot be captured
            loss = self.backward(static_batch.batch)
            static_batch.used = True
        return Loss(loss.objective.clone(), loss.value.clone(), len(batch.targets))  # the next replay overwrites them

    def static_batch_for(self, batch: Batch) -> StaticBatch:
        """Return the static batch for this batch; create one, or a larger one, if none fits."""
        batch_sizes = batch.words.batch_sizes.numpy()
        photos = round_up(len(batch.photos), PHOTO_MULTIPLE)
        captions = round_up(batch_sizes[0], CAPTION_MULTIPLE)
        steps = round_up(len(batch_sizes), STEP_MULTIPLE)
        level = round_up(captions // BATCH_SIZE_LEVELS, CAPTION_MULTIPLE)
        padded = np.pad(batch_sizes, (0, steps - len(batch_sizes)), constant_values=1)
        required = np.minimum(round_up(padded, level), captions)
        static_batch = self.static_batches.get((photos, captions, steps))
        if static_batch is None or (required > static_batch.batch_sizes).any():
            if static_batch is not None:
                required = np.maximum(required, static_batch.batch_sizes)
            static_batch = StaticBatch(batch.photos, photos, required, self.device, self.precision)
            self.static_batches[photos, captions, steps] = static_batch
        return static_batch


class StaticBatch:
    """A batch whose tensors keep their shapes and addresses."""

    def __init__(self, like: Grid, photos: int, batch_sizes: np.ndarray, device: torch.device, precision: torch.dtype):
        """like: a Grid of the same N, C and pooling. batch_sizes (T,) int64, non-increasing: captions of each step."""
        self.batch_sizes = batch_sizes
        self.num_words = int(batch_sizes.sum())
        captions = int(batch_sizes[0])
        # words, targets and photo_index in one tensor, which one copy fills
        self.indices = torch.full((2 * self.num_words + captions,), PAD, device=device)
        words, targets, photo_index = self.indices.split([self.num_words, self.num_words, captions])
        cells = torch.zeros(photos, *like.cells.shape[1:], dtype=precision, device=device)
        grid = Grid(cells, like.pooling.to(device))
        packed = PackedSequence(words, torch.from_numpy(batch_sizes))
        self.batch = Batch(grid, packed, targets, photo_index, np.arange(photos))
        self.used = False
        self.replay: Callable[[], Loss] | None = None

    def fill(self, batch: Batch) -> None:
        """Copy a batch into these tensors."""
        positions = self._packed_positions(batch.words.batch_sizes.numpy())
        indices = torch.full(self.indices.shape, PAD, pin_memory=self.indices.is_cuda)
        indices[positions] = batch.words.data
        indices[self.num_words + positions] = batch.targets
        indices[2 * self.num_words :][: batch.num_captions] = batch.photo_index
        self.indices.copy_(indices, non_blocking=True)
        # The cells after these keep old values: only words whose target is <pad> attend to them.
        self.batch.photos.cells[: len(batch.photos)].copy_(batch.photos.cells, non_blocking=True)

    def _packed_positions(self, batch_sizes: np.ndarray) -> torch.Tensor:
        """(W,) int64: where each word of a batch packed with these batch sizes goes in this static batch's packing."""
        sizes = self.batch_sizes[: len(batch_sizes)]
        step_starts = np.cumsum(sizes) - sizes
        shifts = step_starts - (np.cumsum(batch_sizes) - batch_sizes)
        return torch.from_numpy(np.arange(batch_sizes.sum()) + np.repeat(shifts, batch_sizes))


def round_up(number: Any, multiple: int) -> Any:
    """Round up to a multiple, at least one of it. number: an int or an int array."""
    return np.maximum(1, -(-number // multiple)) * multiple
