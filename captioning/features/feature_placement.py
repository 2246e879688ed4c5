"""Where the features are while a decoder trains: on the GPU, in memory, or on the disk from batch to batch.

gpu   all rows lie on the GPU as they are stored: a batch is one index_select, and nothing travels
ram   all rows lie in main memory, the native cells alone: a third of a 14x14 file
disk  each batch is read from the mapped file; what was read before comes from the system's page cache
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from captioning.encoders.grid import Grid
from captioning.encoders.images import in_batches
from captioning.errors import UserError
from captioning.features.feature_cache import FeatureReader

LOADED_AT_ONCE = 256  # photos
PLACES = {"gpu": "the GPU", "ram": "main memory", "disk": "the disk"}
SHARES = {"gpu": 0.6, "ram": 0.5}  # of the free memory that features may take: a decoder and its batches need room too


class FeaturePlacement(NamedTuple):
    where: str  # gpu, ram or disk
    why: str  # for a person


def choose_residence(wanted: str, needed: int, device: torch.device) -> FeaturePlacement:
    """wanted: auto, gpu, ram or disk, for so many bytes of features. Raises UserError where they do not fit."""
    free = {"gpu": free_on_gpu(device), "ram": free_in_memory()}
    fits = {where: needed <= SHARES[where] * free[where] for where in SHARES}
    told = f"{needed / 1e9:.1f} GB of features"
    if wanted == "auto":
        if device.type != "cuda":
            return FeaturePlacement("disk", f"{told}; the CPU reads them where they are")
        wanted = next((where for where in ("gpu", "ram") if fits[where]), "disk")
        return FeaturePlacement(
            wanted, f"{told}; {free['gpu'] / 1e9:.1f} GB are free on the GPU, {free['ram'] / 1e9:.1f} in RAM"
        )
    if wanted == "gpu" and device.type != "cuda":
        raise UserError(f"--features-on gpu: the run is on {device}; give --device cuda, or --features-on ram or disk")
    if not fits.get(wanted, True):
        raise UserError(
            f"--features-on {wanted}: {told} are more than {SHARES[wanted]:.0%} of the {free[wanted] / 1e9:.1f} GB "
            "free; give --features-on disk"
        )
    return FeaturePlacement(wanted, told)


def free_on_gpu(device: torch.device) -> int:
    """Bytes; none where it is no GPU of CUDA."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def free_in_memory() -> int:
    """Bytes of main memory for this process, of as many as torchrun started on this machine."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        free = int(re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())[1]) * 1024
    else:  # macOS tells only the whole
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def reading(
    reader: FeatureReader, rows: np.ndarray, pooled: bool, wanted: str, device: torch.device
) -> tuple[Callable[[np.ndarray], Grid], FeaturePlacement]:
    """How to read these rows (N,) int64 from now on, and where they lie; pooled: only the mean of each map is wanted.

    Raises UserError where they do not fit.
    """
    read = reader.read_pooled if pooled else reader.read
    one = read(rows[:1]).cells
    residence = choose_residence(wanted, len(rows) * one.nbytes, device)
    if residence.where == "disk":
        return read, residence
    return ResidentFeatures(read, rows, device if residence.where == "gpu" else torch.device("cpu")).read, residence


class ResidentFeatures:
    """Rows of a feature file that were read once, to be read again as from the file."""

    def __init__(self, read: Callable[[np.ndarray], Grid], rows: np.ndarray, device: torch.device):
        """rows (N,) int64: those that will be asked for, each once."""
        first = read(rows[:1])
        self.pooling = first.pooling.to(device)
        self.place = np.full(rows.max() + 1, -1)
        self.place[rows] = np.arange(len(rows))
        self.cells = torch.empty(len(rows), *first.cells.shape[1:], dtype=first.cells.dtype, device=device)
        parts = in_batches(rows, LOADED_AT_ONCE)
        for part, batch in zip(self.cells.split(LOADED_AT_ONCE), tqdm(parts, desc="load", unit="batch"), strict=True):
            part.copy_(read(batch).cells)

    def read(self, rows: np.ndarray) -> Grid:
        """The maps, or their means, of rows (B,) int64, where they lie."""
        places = torch.from_numpy(self.place[rows]).to(self.cells.device, non_blocking=True)
        return Grid(self.cells.index_select(0, places), self.pooling)
