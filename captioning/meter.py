"""How fast an epoch goes, what it waits for, and the most memory it took."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

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

    def figures(self) -> dict:
        seconds = time.monotonic() - self.began
        return {
            "captions_per_second": self.captions / seconds, "photos_per_second": self.photos / seconds,
            "waiting": self.waited / seconds, "train_seconds": seconds, "peak_memory_gb": self.peak_memory() / 1e9,
        }  # fmt: skip

    def peak_memory(self) -> int:
        """Bytes: on a GPU those its tensors took in this epoch; on a CPU the most this process ever held."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def __str__(self) -> str:
        seconds = time.monotonic() - self.began
        return f"{self.captions / seconds:.0f} captions/s, waiting {self.waited / seconds:.0%}"
