"""When a search may stop: reading from the device which photos are still decoded, without making a GPU wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Unfinished(NamedTuple):
    """The photos that are still decoded."""

    number: int
    mask: Tensor  # (L,) bool, of the photos decoded

    def indices(self) -> Tensor:
        """The photos in the mask (number,) int64, in order. Unlike nonzero, it does not wait for the device."""
        return self.mask.int().argsort(descending=True, stable=True)[: self.number]


class EndCheck:
    """Reads from the device which photos are still decoded.

    A CPU reads the answer at once. A GPU would idle after each such read until its next work arrives. There the copy
    of the one number is started at a check and read at the next one, while the GPU computes the steps between. Photos
    that ended are then decoded a few steps longer, which does not change their captions.
    """

    def __init__(self, device: torch.device):
        self.delay = check_delay(device)
        self.started: list[tuple[Callable[[], int], Tensor]] = []

    def __call__(self, unfinished: Tensor) -> Unfinished | None:
        """unfinished (L,) bool -> that of `check_delay` checks ago; None if there was none."""
        self.started.append((_start_reading(unfinished.sum()), unfinished))
        if len(self.started) <= self.delay:
            return None
        read, mask = self.started.pop(0)
        return Unfinished(read(), mask)

    def keep(self, photos: Tensor) -> None:
        """Continue with these photos only (int64): they hold all that the check that is not read yet found."""
        self.started = [(read, mask[photos]) for read, mask in self.started]


def check_delay(device: torch.device) -> int:
    """Checks after which the answer is read."""
    return 1 if device.type == "cuda" else 0


def sync_interval(device: torch.device) -> int:
    """Steps between two checks. Each costs launches on a GPU, and MPS waits for it."""
    return {"cpu": 1, "cuda": 2}.get(device.type, 4)


def copy_to_cpu(*tensors: Tensor | None) -> list[Tensor | None]:
    """Copy tensors from one device to the CPU, and wait for it once."""
    copies = [None if tensor is None else tensor.to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors]
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
            break
    return copies


def _start_reading(number: Tensor) -> Callable[[], int]:
    """Start to copy a number to the CPU. Returns a function that waits for this copy alone, and returns the number."""
    if not number.is_cuda:
        return lambda: int(number)
    copy = number.to("cpu", non_blocking=True)  # in pinned memory
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(number.device))

    def read() -> int:
        copied.synchronize()
        return int(copy)

    return read
