"""The steps of a search as CUDA graphs: a few launches instead of about sixty kernels per step.

A graph repeats fixed work on tensors of fixed addresses and shapes. So no photo leaves a search before its end, and the
tensors that one step hands to the next, the carry, are static: a search is copied into static tensors of at least as
many photos. Those that grow by an entry per step have room for all steps, and a step reads those written before it. The
steps are divided into blocks, each with a graph of its own since steps may differ, and the search may end between two
blocks. A block is captured when it is needed for the second time. Before that it runs without a graph, on the same
tensors: CUDA loads kernels on their first use. Each graph proves itself: its first results are compared with those of
the same work without it.

The work of a search, its random numbers included, follows from the search and the number of photos alone. It does not
depend on what was captured before, so that a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from captioning.decoders.protocol import State
from captioning.runtime.cuda_graphs import Capture, CaptureError, GraphCapture
from captioning.runtime.device import restore_rng, rng_state
from captioning.runtime.library_errors import reason
from captioning.search.end_check import EndCheck

STEPS_PER_BLOCK = 4
MAX_SHAPES = 16  # searches kept with their graphs; the tensors of each take memory
MOST_DIFFERENT = 0.05  # of the numbers a graph computes, from the same work without it

Carry = Any  # a tensor, or a tuple or NamedTuple of carries, such as captioning.decoders.protocol.State

BlockResult = tuple[list[Carry], Tensor]  # the results of the steps of a block, and which photos are then unfinished
Work = Callable[[], BlockResult]


class Decoding(Protocol):
    """A search as steps. Its tensors have a row, or an equal number of adjacent rows, per photo."""

    key: Hashable  # equal for searches whose steps do the same work
    num_steps: int  # at most

    def step(self, carry: Carry, number: int) -> tuple[Carry, Carry]:
        """Run step `number` -> the carry of the next step, and the results of this one.

        Shapes stay, except that the t of State.growing is `number` before the step and one more after it.
        """

    def unfinished(self, carry: Carry) -> Tensor:
        """(L,) bool: the photos that are still decoded."""


class DecodingGraphs:
    """Runs searches, and keeps their CUDA graphs from batch to batch."""

    def __init__(self, capture: Capture | None = None):
        self.capture: Capture | None = capture or GraphCapture()  # None: it failed
        self.loops: dict[Hashable, _StaticLoop] = {}
        self.lock = threading.Lock()  # hold it while a search uses its results: the next one overwrites them

    def run(self, decoding: Decoding, carry: Carry, first: int, photos: int) -> tuple[list[Carry], Carry]:
        """Run the steps of a search from number `first` on; carry: of `photos` photos.

        Returns the results of the steps and the last carry, which the next search overwrites.
        """
        loop = self._loop_for(decoding, carry, photos)
        loop.fill(carry, first)
        check = EndCheck(next(tensors_of(carry)).device)
        results: list[Carry] = []
        for start in range(first, decoding.num_steps, STEPS_PER_BLOCK):
            numbers = range(start, min(start + STEPS_PER_BLOCK, decoding.num_steps))
            block_results, unfinished = self._run_block(loop, start, partial(loop.run, decoding, numbers))
            results += block_results
            known = check(unfinished[:photos])
            if known is not None and known.number == 0:
                break
        return [loop.cut(result, photos) for result in results], loop.cut(loop.carry, photos)

    def _loop_for(self, decoding: Decoding, carry: Carry, photos: int) -> _StaticLoop:
        capacity = padded_size(photos)
        tensors = list(tensors_of(carry))
        device_type = tensors[0].device.type
        shapes = tuple(
            (len(tensor) // photos, tensor.shape[1:], tensor.dtype, tensor.stride(0) == 0) for tensor in tensors
        )
        precision = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        key = (decoding.key, capacity, shapes, precision)
        loop = self.loops.get(key)
        if loop is None:
            loop = _StaticLoop(carry, photos, capacity, decoding.num_steps)
            if len(self.loops) < MAX_SHAPES:
                self.loops[key] = loop
        return loop

    def _run_block(self, loop: _StaticLoop, start: int, work: Work) -> BlockResult:
        """Run a block of steps, as a graph if there is one; start: the first of its steps."""
        if start in loop.replays:
            return loop.replays[start]()
        if start in loop.used and self.capture is not None:
            return self._capture_block(loop, start, work)
        loop.used.add(start)
        return work()

    def _capture_block(self, loop: _StaticLoop, start: int, work: Work) -> BlockResult:
        """Run a block without its graph, and then again as a graph, which is kept if both have the same results."""
        assert self.capture is not None
        saved = loop.save()
        expected = map_tensors(torch.clone, work())
        loop.restore(saved)
        try:
            replay = self.capture(work)
        except (CaptureError, torch.OutOfMemoryError) as error:
            self._give_up(reason(error))
            return work()
        found = replay()
        different = _fraction_different(found, expected)
        if different > MOST_DIFFERENT:
            self._give_up(f"{different:.0%} of the results of a graph are not those of the same work without it")
            loop.restore(saved)
            return work()
        loop.replays[start] = replay
        return found

    def _give_up(self, why: str) -> None:
        print(f"captions are searched without CUDA graphs, which is slower: {why}")
        self.capture = None
        for loop in self.loops.values():
            loop.replays = {}


def _fraction_different(found: Carry, expected: Carry) -> float:
    """The fraction of numbers that are not equal or, if floating point, not close."""
    pairs = zip(tensors_of(found), tensors_of(expected), strict=True)
    different = [
        ~torch.isclose(one.float(), other.float(), rtol=1e-2, atol=1e-3, equal_nan=True).flatten()
        for one, other in pairs
    ]
    return float(torch.cat(different).float().mean())


class _StaticLoop:
    """The steps of one search on tensors whose shapes and addresses stay."""

    def __init__(self, carry: Carry, photos: int, capacity: int, num_steps: int):
        def static(tensor: Tensor) -> Tensor:
            return _static_like(tensor, len(tensor) // photos * capacity)

        def static_growing(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(len(tensor) // photos * capacity, num_steps, *tensor.shape[2:])

        self.capacity = capacity
        self.carry = map_tensors(static, carry, static_growing)
        self.used: set[int] = set()  # first steps of the blocks that have run
        self.replays: dict[int, Work] = {}  # first step of a block -> its graph

    def fill(self, carry: Carry, number: int) -> None:
        """Copy the carry of a batch before step `number` in. The rows after it stay, and do not affect the others."""
        _copy_rows(self._before(number), carry)

    def _before(self, number: int) -> Carry:
        """The carry before this step: of tensors that grow, the entries that were written."""
        return map_tensors(lambda tensor: tensor, self.carry, lambda tensor: tensor[:, :number])

    def save(self) -> tuple[Carry, dict]:
        """Copies of the carry and of the state of the random number generators."""
        return map_tensors(torch.clone, self.carry), rng_state(next(tensors_of(self.carry)).device)

    def restore(self, saved: tuple[Carry, dict]) -> None:
        """Go back to what `save` returned."""
        carry, random_numbers = saved
        _copy_rows(self.carry, carry)
        restore_rng(random_numbers, next(tensors_of(carry)).device)

    def run(self, decoding: Decoding, numbers: range) -> BlockResult:
        """Run the steps of these numbers -> their results, and the photos that are then unfinished (L,) bool."""
        # Weights that autocast converted before must not be part of a graph, since they are freed. Those converted in
        # a graph, once per block, must not be used outside of it, since they have values only while it runs.
        torch.clear_autocast_cache()
        try:
            carry = self._before(numbers.start)
            results = []
            for number in numbers:
                carry, result = decoding.step(carry, number)
                results.append(result)
            for static, tensor in zip(tensors_of(self._before(numbers.stop)), tensors_of(carry), strict=True):
                assert static.shape == tensor.shape and static.dtype == tensor.dtype, "a carry keeps its shapes"
                if static is not tensor:
                    static.copy_(tensor)
            return results, decoding.unfinished(self.carry)
        finally:
            torch.clear_autocast_cache()

    def cut(self, carry: Carry, photos: int) -> Carry:
        """The first rows of each tensor, those of a batch of so many photos."""
        return map_tensors(lambda tensor: tensor[: len(tensor) // self.capacity * photos], carry)


def padded_size(photos: int) -> int:
    """Round up, by at most a quarter, to 1 to 8, 10, 12, 14, 16, 20, 24, 28, 32, ...: batches then share few sizes."""
    multiple = 2 ** max(0, (photos - 1).bit_length() - 3)
    return -(-photos // multiple) * multiple


def _static_like(tensor: Tensor, rows: int) -> Tensor:
    """Zeros with so many rows; if all rows of the tensor are one in memory, those of the result are too."""
    shared = len(tensor) > 0 and tensor.stride(0) == 0
    static = torch.zeros(1 if shared else rows, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    return static.expand(rows, *tensor.shape[1:]) if shared else static


def _copy_rows(static: Carry, carry: Carry) -> None:
    """Copy the tensors of a carry into the first rows of static ones."""
    for target, tensor in zip(tensors_of(static), tensors_of(carry), strict=True):
        rows = 1 if target.stride(0) == 0 else len(tensor)
        target[:rows].copy_(tensor[:rows])


def map_tensors(
    function: Callable[[Tensor], Tensor], carry: Carry, growing: Callable[[Tensor], Tensor] | None = None
) -> Carry:
    """Apply a function to every tensor of a carry, and another one to those of State.growing, if given; None stays."""
    if carry is None or isinstance(carry, Tensor):
        return None if carry is None else function(carry)
    if isinstance(carry, State) and growing is not None:
        fixed = map_tensors(function, carry._replace(growing=()))
        return fixed._replace(growing=tuple(growing(tensor) for tensor in carry.growing))
    parts = [map_tensors(function, part, growing) for part in carry]
    return type(carry)(*parts) if hasattr(carry, "_fields") else tuple(parts)


def tensors_of(carry: Carry) -> Iterator[Tensor]:
    """The tensors of a carry, in order."""
    if isinstance(carry, Tensor):
        yield carry
    elif carry is not None:
        for part in carry:
            yield from tensors_of(part)
