"""The peak performance of a device, which other figures are compared with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from captioning.runtime.device import synchronize


def best_seconds(function: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """The best time of some calls, until the device has finished; one more call before them is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def peak_operations(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Floating-point operations per second of a product of two (side, side) matrices."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / best_seconds(lambda: a @ a, device)


def peak_bandwidth(device: torch.device, length: int) -> float:
    """Bytes per second, read and written, of a copy of `length` bytes on the device."""
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * length / best_seconds(lambda: target.copy_(source), device)


def host_bandwidth(device: torch.device, length: int) -> float:
    """Bytes per second of a copy of `length` bytes from main memory, pinned for a GPU, to the device."""
    source = torch.zeros(length, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(length, dtype=torch.uint8, device=device)
    return length / best_seconds(lambda: target.copy_(source, non_blocking=True), device)


def disk_bandwidth(folder: Path, length: int) -> tuple[float, float]:
    """Bytes per second of writing a file of `length` bytes, synced, and of reading it back from the disk."""
    path = folder / "disk"
    block = os.urandom(min(length, 2**24))
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(length // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    written = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # else the page cache answers
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        reading = time.perf_counter()
        while file.read(len(block)):
            pass
    read = time.perf_counter()
    path.unlink()
    num_bytes = length // len(block) * len(block)
    return num_bytes / (written - started), num_bytes / (read - reading)
