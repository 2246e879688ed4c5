"""How fast an epoch goes, what it waits for, and the most memory it took."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch


class Meter:
    """Starts when it is made."""

    def __init__(self, device: torch.device):
        self.device = device
        self.began = self.saved = time.monotonic()
        self.waited, self.captions, self.photos = 0.0, 0.0, 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        asked = time.monotonic()
        yield
        self.waited += time.monotonic() - asked

    def add(self, captions: float, photos: float, saved: bool) -> None:
        self.captions, self.photos = self.captions + captions, self.photos + photos
        self.saved = time.monotonic() if saved else self.saved

    def since_save(self) -> float:
        """Seconds."""
        return time.monotonic() - self.saved

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def rate(self) -> float:
        """Captions a second."""
        return self.captions / self.seconds()

    def share_waited(self) -> float:
        """Of the time: 0 to 1."""
        return self.waited / self.seconds()

    def figures(self) -> dict:
        return {
            "captions_per_second": self.rate(),
            "photos_per_second": self.photos / self.seconds(),
            "waiting": self.share_waited(),
            "train_seconds": self.seconds(),
            "peak_memory_gb": self.peak_memory() / 1e9,
        }

    def peak_memory(self) -> int:
        """Bytes: on a GPU those its tensors took in this epoch; on a CPU the most this process ever held."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return most_resident()


def most_resident() -> int:
    """The most bytes of main memory that this process ever held.

    Linux hands ru_maxrss on from the process that started this one, so there the kernel's own figure is read.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
