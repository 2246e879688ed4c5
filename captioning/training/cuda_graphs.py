"""One launch a batch: what a GPU does for the gradients of a batch, captured as a CUDA graph and replayed.

A decoder that attends is thousands of short kernels a batch, and to start them one by one takes longer than to run
them. A graph starts them all at once, but its shapes are fixed. So a batch is laid into a mould, one of few: <pad>
fills the rest, which the objective passes over. Moulds grow with the batches that do not fit, until all do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from captioning.dataset.batches import Batch
from captioning.encoders.grid import Grid
from captioning.errors import UserError
from captioning.runtime.checkpoint import first_sentence
from captioning.training.objectives import Loss
from preprocess.vocabulary import PAD

PHOTOS, CAPTIONS, STEPS = 8, 8, 4  # sizes of a mould are multiples of these
LEVELS = 8  # about so many different numbers of captions that still go on


class CudaGraphRunner:
    """Batch -> Loss, its gradients added to those of the parameters."""

    def __init__(
        self,
        gradients: Callable[[Batch], Loss],
        parameters: list[nn.Parameter],
        device: torch.device,
        precision: torch.dtype,
        capture: Callable[[Callable], Callable] | None = None,
    ):
        """gradients: what is captured, of a batch on the device whose cells have this precision.

        The loss it gives should be detached: the graph of autograd would be kept, with the streams it was made on.
        """
        self.gradients, self.device, self.precision = gradients, device, precision
        self.capture = capture or GraphCapture()
        self.moulds: dict[tuple[int, int, int], StaticBatch] = {}
        for parameter in parameters:  # a graph adds to the tensors that were there when it was captured
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, batch: Batch) -> Loss:
        """batch: wherever it was read to."""
        mould = self.mould_for(batch)
        mould.fill(batch)
        if mould.used:
            mould.replay = mould.replay or self.capture(lambda: self.gradients(mould.batch))
            loss = mould.replay()
        else:  # as any batch is learnt from: what CUDA loads for it must not be captured
            loss = self.gradients(mould.batch)
            mould.used = True
        return Loss(loss.objective.clone(), loss.value.clone(), len(batch.targets))  # the next replay writes there

    def mould_for(self, batch: Batch) -> StaticBatch:
        sizes = batch.words.batch_sizes.numpy()
        photos, captions = rounded(len(batch.photos), PHOTOS), rounded(sizes[0], CAPTIONS)
        steps, level = rounded(len(sizes), STEPS), rounded(captions // LEVELS, CAPTIONS)
        wanted = np.minimum(rounded(np.pad(sizes, (0, steps - len(sizes)), constant_values=1), level), captions)
        mould = self.moulds.get((photos, captions, steps))
        if mould is None or (wanted > mould.sizes).any():
            wanted = wanted if mould is None else np.maximum(wanted, mould.sizes)
            mould = StaticBatch(batch.photos, photos, wanted, self.device, self.precision)
            self.moulds[photos, captions, steps] = mould
        return mould


class StaticBatch:
    """A batch whose tensors stay where they are, of so many photos, and so many captions at each step."""

    def __init__(self, like: Grid, photos: int, sizes: np.ndarray, device: torch.device, precision: torch.dtype):
        """sizes (T,) int64, none larger than the one before."""
        self.sizes, self.words = sizes, int(sizes.sum())
        self.numbers = torch.full((2 * self.words + int(sizes[0]),), PAD, device=device)  # all that is int64
        read, said, photo = self.numbers.split([self.words, self.words, int(sizes[0])])
        cells = torch.zeros(photos, *like.cells.shape[1:], dtype=precision, device=device)
        grid = Grid(cells, like.pooling.to(device))
        self.batch = Batch(grid, PackedSequence(read, torch.from_numpy(sizes)), said, photo, np.arange(photos))
        self.used, self.replay = False, None

    def fill(self, batch: Batch) -> None:
        sizes = batch.words.batch_sizes.numpy()
        shift = np.cumsum(self.sizes)[: len(sizes)] - self.sizes[: len(sizes)] - (np.cumsum(sizes) - sizes)
        places = torch.from_numpy(np.arange(len(batch.targets)) + np.repeat(shift, sizes))
        numbers = torch.full(self.numbers.shape, PAD, pin_memory=self.numbers.is_cuda)
        numbers[places], numbers[self.words + places] = batch.words.data, batch.targets
        numbers[2 * self.words :][: batch.captions] = batch.photo_index
        self.numbers.copy_(numbers, non_blocking=True)
        # what is left of other photos behind them belongs to no word that counts
        self.batch.photos.cells[: len(batch.photos)].copy_(batch.photos.cells, non_blocking=True)


class GraphCapture:
    """work -> a function that does the same on the same tensors, without starting each kernel anew.

    Raises UserError where the GPU cannot capture it.
    """

    def __init__(self) -> None:
        self.pool = None  # of memory, which graphs that never run at once can share

    def __call__(self, work: Callable[[], Loss]) -> Callable[[], Loss]:
        gc.collect()  # graphs of autograd still in a ring would tie the streams they were made on to the capture's
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):  # another thread reads ahead
                loss = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"a batch cannot be captured as a CUDA graph ({first_sentence(error)}); give --no-cuda-graphs"
            ) from None
        self.pool = self.pool or graph.pool()

        def replay() -> Loss:
            graph.replay()
            return loss

        return replay


def rounded(number, step: int):
    """Up to a multiple of step, at least one."""
    return np.maximum(1, -(-number // step)) * step
