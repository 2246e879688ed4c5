"""One process, or several as one: the ranks that torchrun starts.

    torchrun --nproc-per-node 4 -- train.py data/aic --run att --batch-size 512

(The lone -- keeps torchrun from reading --run as a flag of its own.) Every rank runs the same command on its share of
each batch. Rank 0 alone speaks, scores and saves; what one rank finds out, such as a signal, all of them hear.
"""

from __future__ import annotations

import contextlib
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

from captioning.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """This process's place among `size`. Without torchrun it is the only one, and nothing here communicates."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, items: T) -> T:
        """This rank's share of a sequence: every size-th item. The shares are disjoint and leave nothing out."""
        return items[self.rank :: self.size]

    def all_reduce(self, values: list[float]) -> list[float]:
        """The sums over all ranks, on every rank."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def all_gather(self, value: T) -> list[T]:
        """What each rank has, rank 0's first, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """What rank 0 has, on every rank; it waits for rank 0."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]


SINGLE = DistributedContext()


@contextlib.contextmanager
def init_distributed(remedy: str) -> Iterator[DistributedContext]:
    """All the ranks that torchrun started, ready to talk (gloo on CPUs, NCCL on GPUs); without it, this process.

    Raises UserError, ending in `remedy`, where another rank is lost on the way.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        yield SINGLE
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except ValueError as error:
        raise UserError(f"RANK and WORLD_SIZE are set, but not by torchrun ({error}); unset them") from None
    ranks = DistributedContext(dist.get_rank(), dist.get_world_size())
    if not ranks.is_main:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
    try:
        yield ranks
    except RuntimeError as error:
        if not _is_lost_rank(error):
            raise
        raise UserError(f"another of the {ranks.size} processes was lost; {remedy}") from None
    _leave()  # not after an error: it would wait for the others


def _leave() -> None:
    """Until torch 2.8, to end a group is to wait for its threads while no other thread may run Python.

    One of them may be about to free, in Python, what was exchanged last: the two would wait for each other for ever.
    """
    if torch.__version__ < "2.8":
        time.sleep(1)
    dist.destroy_process_group()


def _is_lost_rank(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "connection closed" in text or "nccl" in text


class SyncBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d whose statistics are those of all ranks' rows together (torch's SyncBatchNorm wants a GPU).

    Rows (B, E) -> (B, E). A batch of one row has no variance to learn from: the running statistics serve.
    """

    def forward(self, rows: Tensor) -> Tensor:
        if self.training and dist.is_initialized() and dist.get_world_size() > 1:
            return self._over_ranks(rows.float())
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

    def _over_ranks(self, rows: Tensor) -> Tensor:
        count = all_reduce(torch.full((), float(len(rows)), device=rows.device))
        mean = all_reduce(rows.sum(0)) / count
        variance = all_reduce((rows - mean).square().sum(0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return (rows - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
