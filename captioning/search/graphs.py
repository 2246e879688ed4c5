"""The steps of a search as CUDA graphs: a few launches instead of about sixty kernels per step.

A graph repeats fixed work on tensors of fixed addresses and shapes. So no photo leaves a search before its end, and the
tensors that one step hands to the next, the carry, are static: a search is copied into static tensors of at least as
many photos. The steps are divided into blocks, each one graph, and between them the search may end. A block with the
numbers of its steps in it is a graph of its own: steps may differ. A block is captured when it is needed for the second
time. Before that it runs without a graph on the same tensors, since CUDA loads kernels on their first use.

The work of a search, its random numbers included, follows from the search and the number of photos alone. It does not
depend on what was captured before, so that a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from captioning.runtime.cuda_graphs import Capture, CaptureError, GraphCapture
from captioning.search.end_check import EndCheck

STEPS_PER_BLOCK = 4
MAX_SHAPES = 8  # searches kept with their graphs; the tensors of each take memory

Carry = Any  # a tensor, or a tuple or NamedTuple of carries, such as captioning.decoders.protocol.State


class Decoding(Protocol):
    """A search as steps. Its tensors have a row, or an equal number of adjacent rows, per photo."""

    key: Hashable  # equal for searches whose steps do the same work
    num_steps: int  # at most

    def step(self, carry: Carry, number: int) -> tuple[Carry, Carry]:
        """Run step `number` -> the carry of the next step, with the same shapes, and the results of this one."""

    def unfinished(self, carry: Carry) -> Tensor:
        """(L,) bool: the photos that are still decoded."""


class DecodingGraphs:
    """Runs searches, and keeps their CUDA graphs from batch to batch."""

    def __init__(self, capture: Capture | None = None):
        self.capture = capture or GraphCapture()
        self.loops: dict[Hashable, _StaticLoop] = {}
        self.lock = threading.Lock()  # hold it while a search uses its results: the next one overwrites them

    def run(self, decoding: Decoding, carry: Carry, first: int, photos: int) -> tuple[list[Carry], Carry]:
        """Run the steps of a search from number `first` on; carry: of `photos` photos.

        Returns the results of the steps and the last carry, which the next search overwrites.
        """
        loop = self._loop_for(decoding, carry, photos)
        loop.fill(carry)
        check = EndCheck(next(tensors_of(carry)).device)
        results: list[Carry] = []
        for start in range(first, decoding.num_steps, STEPS_PER_BLOCK):
            numbers = range(start, min(start + STEPS_PER_BLOCK, decoding.num_steps))
            block_results, unfinished = loop.run(decoding, numbers, self._capture)
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
            loop = _StaticLoop(carry, photos, capacity)
            if len(self.loops) < MAX_SHAPES:
                self.loops[key] = loop
        return loop

    def _capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        try:
            return self.capture(work)
        except CaptureError as error:
            print(f"captions are searched without CUDA graphs, which is slower: {error}")
            self.capture = _repeat
            return work


def _repeat(work: Callable[[], Any]) -> Callable[[], Any]:
    """In place of a capture: run the work again each time."""
    return work


class _StaticLoop:
    """The steps of one search on tensors whose shapes and addresses stay."""

    def __init__(self, carry: Carry, photos: int, capacity: int):
        self.capacity = capacity
        self.carry = map_tensors(lambda tensor: _static_like(tensor, len(tensor) // photos * capacity), carry)
        self.used: set[int] = set()  # first steps of the blocks that ran without a graph
        self.blocks: dict[int, Callable[[], tuple[list[Carry], Tensor]]] = {}  # first step -> its graph

    def fill(self, carry: Carry) -> None:
        """Copy the carry of a batch in. The rows after it keep old values, and do not affect the others."""
        for static, tensor in zip(tensors_of(self.carry), tensors_of(carry), strict=True):
            rows = 1 if static.stride(0) == 0 else len(tensor)
            static[:rows].copy_(tensor[:rows])

    def run(
        self, decoding: Decoding, numbers: range, capture: Callable[[Callable[[], Any]], Callable[[], Any]]
    ) -> tuple[list[Carry], Tensor]:
        """Run the steps of these numbers -> their results, and the photos that are then unfinished (L,) bool."""

        def work() -> tuple[list[Carry], Tensor]:
            return self._run_steps(decoding, numbers)

        if numbers.start not in self.used:
            self.used.add(numbers.start)
            return work()
        if numbers.start not in self.blocks:
            self.blocks[numbers.start] = capture(work)
        return self.blocks[numbers.start]()

    def _run_steps(self, decoding: Decoding, numbers: range) -> tuple[list[Carry], Tensor]:
        # Weights that autocast converted before must not be part of a graph, since they are freed. Those converted in
        # a graph, once per block, must not be used outside of it, since they have values only while it runs.
        torch.clear_autocast_cache()
        try:
            carry = self.carry
            results = []
            for number in numbers:
                carry, result = decoding.step(carry, number)
                results.append(result)
            for static, tensor in zip(tensors_of(self.carry), tensors_of(carry), strict=True):
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


def map_tensors(function: Callable[[Tensor], Tensor], carry: Carry) -> Carry:
    """Apply a function to every tensor of a carry; None stays."""
    if carry is None or isinstance(carry, Tensor):
        return None if carry is None else function(carry)
    parts = [map_tensors(function, part) for part in carry]
    return type(carry)(*parts) if hasattr(carry, "_fields") else tuple(parts)


def tensors_of(carry: Carry) -> Iterator[Tensor]:
    """The tensors of a carry, in order."""
    if isinstance(carry, Tensor):
        yield carry
    elif carry is not None:
        for part in carry:
            yield from tensors_of(part)
