"""One process, or the ranks that torchrun starts.

    torchrun --nproc-per-node 4 -- train.py data/aic --run att --batch-size 512

(The lone -- keeps torchrun from reading --run as its own flag.) Every rank runs the same command on its shard of
each batch. Only rank 0 prints, scores and saves; the ranks agree on events such as signals.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from captioning.errors import LostProcessError, UserError
from captioning.runtime.signals import StopRequest, report_stop_while_blocked

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """This process's rank among `size` ranks. A single process does not communicate."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints, scores and saves."""
        return self.rank == 0

    def shard(self, items: T) -> T:
        """Every size-th item of a sequence. The shards of all ranks are disjoint and cover the sequence."""
        return items[self.rank :: self.size]  # type: ignore[index]

    def all_reduce(self, values: list[float]) -> list[float]:
        """The sum of each value over all ranks, on every rank."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def all_reduce_tensor(self, tensor: Tensor) -> None:
        """Replace a tensor, on any device, by its sum over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in the order of the ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]


SINGLE = DistributedContext()


@contextlib.contextmanager
def init_distributed(remedy: str) -> Iterator[DistributedContext]:
    """Connect the ranks that torchrun started (gloo on CPUs, NCCL on GPUs); without torchrun, yield SINGLE.

    Raises LostProcessError, ending in `remedy`, if another rank dies.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield SINGLE
        return
    with report_stop_while_blocked(), _lost_process_errors(size, remedy):
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        except ValueError as error:
            raise UserError(f"RANK and WORLD_SIZE are set, but not by torchrun ({error}); unset them") from None
        distributed = DistributedContext(dist.get_rank(), dist.get_world_size())
        if not distributed.is_main:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
        yield distributed
        _leave_group()  # not after an error: it would wait for the other ranks


@contextlib.contextmanager
def _lost_process_errors(size: int, remedy: str) -> Iterator[None]:
    """Turn the errors of a collective whose peer has died into a LostProcessError."""
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise LostProcessError(f"another of the {size} processes was lost; {remedy}") from None


@contextlib.contextmanager
def lost_process_is_stop(stop: StopRequest) -> Iterator[None]:
    """Turn a lost connection into KeyboardInterrupt if a stop was requested: another rank has stopped first."""
    try:
        yield
    except RuntimeError as error:
        if stop.requested and _is_lost_connection(error):
            raise KeyboardInterrupt from None
        raise


def _is_lost_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "connection closed", "nccl"))


def _leave_group() -> None:
    """End the process group.

    Before torch 2.8, this waits for the group's threads while it holds the GIL. One of them may be about to free the
    last exchanged Python object, which needs the GIL: without the pause, they could deadlock.
    """
    if torch.__version__ < "2.8":
        time.sleep(1)
    dist.destroy_process_group()


def data_parallel(module: nn.Module, sync_buffers: bool) -> DistributedDataParallel:
    """Wrap a module for training on all ranks. sync_buffers: copy rank 0's buffers to all ranks at each forward."""
    name = "forward_sync_buffers"  # torch 2.13 deprecates broadcast_buffers in its favour
    if name not in inspect.signature(DistributedDataParallel).parameters:
        name = "broadcast_buffers"
    setting: dict[str, Any] = {name: sync_buffers}
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **setting)


class SyncBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d with the statistics of all ranks' rows; torch's SyncBatchNorm works only on GPUs.

    Rows (B, E) -> (B, E). A batch of one row has no variance, so it is normalised with the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor
    momentum: float

    def forward(self, rows: Tensor) -> Tensor:
        """Normalise rows (B, E); in training, update the running statistics."""
        if self.training and dist.is_initialized() and dist.get_world_size() > 1:
            return self._forward_distributed(rows.float())
        return F.batch_norm(
            rows,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training and len(rows) > 1,
            self.momentum,
            self.eps,
        )

    def _forward_distributed(self, rows: Tensor) -> Tensor:
        count = all_reduce(torch.full((), float(len(rows)), device=rows.device))
        mean = all_reduce(rows.sum(0)) / count
        variance = all_reduce((rows - mean).square().sum(0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return (rows - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
