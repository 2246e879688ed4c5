"""Throughput, waiting time and peak memory of one epoch."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch


class Meter:
    """Measures from its construction on."""

    def __init__(self, device: torch.device):
        self.device = device
        self.started_at = self.saved_at = time.monotonic()
        self.seconds_waited = 0.0
        self.captions = 0.0
        self.photos = 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of this block as waiting for data."""
        started_at = time.monotonic()
        yield
        self.seconds_waited += time.monotonic() - started_at

    def add(self, captions: float, photos: float, saved: bool) -> None:
        """Count what was trained on. saved: a checkpoint is due now."""
        self.captions += captions
        self.photos += photos
        if saved:
            self.saved_at = time.monotonic()

    def seconds_since_save(self) -> float:
        """Seconds since the last checkpoint, or since the start."""
        return time.monotonic() - self.saved_at

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started_at

    def rate(self) -> float:
        """Captions per second."""
        return self.captions / self.seconds()

    def waiting_fraction(self) -> float:
        """The fraction of the time spent waiting for data, 0 to 1."""
        return self.seconds_waited / self.seconds()

    def metrics(self) -> dict[str, float]:
        """The entries of the log's epoch event."""
        return {
            "captions_per_second": self.rate(),
            "photos_per_second": self.photos / self.seconds(),
            "waiting": self.waiting_fraction(),
            "train_seconds": self.seconds(),
            "peak_memory_gb": self.peak_memory() / 1e9,
        }

    def peak_memory(self) -> int:
        """Bytes: on a GPU the peak of its tensors in this epoch, on a CPU the peak of the process since it started."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident_memory()


def peak_resident_memory() -> int:
    """Peak main memory of this process, in bytes.

    On Linux, ru_maxrss is inherited from the parent process, so the kernel's VmHWM is read instead.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (match := re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))):
        return int(match[1]) * 1024
    import resource  # Windows lacks it: no command runs there, but the library can be imported

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
