"""Capturing work on a GPU as a CUDA graph, which later runs with one launch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from captioning.errors import UserError
from captioning.runtime.library_errors import reason

T = TypeVar("T")


class CaptureError(Exception):
    """The work cannot be captured; the process can continue without a graph."""


class Capture(Protocol):
    """work -> a function that repeats the work on the same tensors and returns the same result."""

    def __call__(self, work: Callable[[], T]) -> Callable[[], T]: ...


class GraphCapture:
    """Captures work as CUDA graphs that share one memory pool, since they never run at the same time.

    A graph is never destroyed while this object lives, not even one whose work failed: with the last graph of a pool,
    its memory would go, and recent versions of torch would also free the cuBLAS workspaces of its stream, which other
    graphs still use (https://github.com/pytorch/pytorch/issues/193402). The stream is therefore this object's own.
    """

    def __init__(self) -> None:
        self.pool: Any = None
        self.stream: Any = None
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, work: Callable[[], T]) -> Callable[[], T]:
        """Capture work that has run before: CUDA loads kernels on their first use, which cannot be captured.

        Raises CaptureError if the work itself fails, and UserError if the capture cannot be ended: CUDA and torch's
        random number generator may then be left in the middle of it, and no other work would be right.
        """
        gc.collect()  # autograd graphs still in reference cycles would tie their streams to the capture's
        graph = torch.cuda.CUDAGraph()
        self.stream = self.stream or torch.cuda.Stream()
        failure: Exception | None = None
        result: T
        try:
            # thread_local: the prefetching thread may call CUDA during the capture
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                try:
                    result = work()
                except Exception as error:  # raised below, once the capture has ended
                    failure = error
        except RuntimeError as error:
            first = failure or error  # the error that ends a capture hides the one that spoilt it
            if isinstance(first, torch.OutOfMemoryError):
                raise UserError(
                    "out of memory on the GPU while a CUDA graph was captured: lower --batch-size, give --features-on "
                    "ram or disk, or --no-cuda-graphs"
                ) from None
            raise UserError(
                f"work cannot be captured as a CUDA graph ({reason(first)}), and the GPU is left in an unknown state; "
                "run again with --no-cuda-graphs"
            ) from None
        self.pool = self.pool or graph.pool()
        self.graphs.append(graph)
        if isinstance(failure, torch.OutOfMemoryError):
            raise failure
        if failure is not None:
            raise CaptureError(reason(failure)) from failure

        def replay() -> T:
            graph.replay()
            return result

        return replay
