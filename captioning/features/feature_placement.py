"""Where features are held while a decoder trains: on the GPU, in main memory, or on disk.

gpu   all rows are on the GPU, as stored: a batch is one index_select, without a copy from the host
ram   all rows are in main memory, native cells only: a third of a 14x14 file
disk  each batch is read from the memory-mapped file; the system's page cache holds what was read before

Letters: N photos, B photos per batch.
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
from captioning.encoders.images import split_batches
from captioning.errors import UserError
from captioning.features.feature_reader import FeatureReader

LOAD_BATCH_SIZE = 256  # photos
LOCATION_NAMES = {"gpu": "the GPU", "ram": "main memory", "disk": "the disk"}
MEMORY_FRACTIONS = {"gpu": 0.6, "ram": 0.5}  # of the free memory; the decoder and its batches need the rest


class FeaturePlacement(NamedTuple):
    """Where features are placed, and why."""

    location: str  # gpu, ram or disk
    reason: str  # for the message that is printed


def choose_placement(requested: str, nbytes: int, device: torch.device) -> FeaturePlacement:
    """Where to place `nbytes` of features. requested: auto, gpu, ram or disk.

    Raises UserError if they do not fit there.
    """
    free = {"gpu": free_gpu_memory(device), "ram": free_main_memory()}
    fits = {location: nbytes <= fraction * free[location] for location, fraction in MEMORY_FRACTIONS.items()}
    size = f"{nbytes / 1e9:.1f} GB of features"
    if requested == "auto":
        if device.type != "cuda":
            return FeaturePlacement("disk", f"{size}; the CPU reads them in place")
        location = next((location for location in ("gpu", "ram") if fits[location]), "disk")
        free_text = f"{free['gpu'] / 1e9:.1f} GB are free on the GPU, {free['ram'] / 1e9:.1f} in RAM"
        return FeaturePlacement(location, f"{size}; {free_text}")
    if requested == "gpu" and device.type != "cuda":
        raise UserError(f"--features-on gpu: the run is on {device}; give --device cuda, or --features-on ram or disk")
    if not fits.get(requested, True):
        raise UserError(
            f"--features-on {requested}: {size} are more than {MEMORY_FRACTIONS[requested]:.0%} of the "
            f"{free[requested] / 1e9:.1f} GB free; give --features-on disk"
        )
    return FeaturePlacement(requested, size)


def free_gpu_memory(device: torch.device) -> int:
    """Free bytes on a CUDA device; 0 for other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def free_main_memory() -> int:
    """Free bytes of main memory, divided by the number of processes that torchrun started on this machine."""
    meminfo = Path("/proc/meminfo")
    available = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
    if available:
        free = int(available[1]) * 1024
    else:  # macOS reports only the total
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def place_features(
    reader: FeatureReader, rows: np.ndarray, pooled: bool, requested: str, device: torch.device
) -> tuple[Callable[[np.ndarray], Grid], FeaturePlacement]:
    """Load rows (N,) int64 to where they are placed -> a function that reads a batch of them, and the placement.

    pooled: load only the mean of each map. requested: auto, gpu, ram or disk.
    Raises UserError if the rows do not fit, or one is not finite.
    """
    read = reader.read_pooled if pooled else reader.read
    row_bytes = read(rows[:1]).cells.nbytes
    placement = choose_placement(requested, len(rows) * row_bytes, device)
    if placement.location == "disk":
        return read, placement
    target = device if placement.location == "gpu" else torch.device("cpu")
    return LoadedFeatures(read, rows, target).read, placement


class LoadedFeatures:
    """Rows of a feature file, loaded once into memory."""

    def __init__(self, read: Callable[[np.ndarray], Grid], rows: np.ndarray, device: torch.device):
        """read: reads a batch of rows from the file; rows (N,) int64: the distinct rows to load."""
        first = read(rows[:1])
        self.pooling = first.pooling.to(device)
        self.position = np.full(rows.max() + 1, -1)  # row of the file -> index into cells
        self.position[rows] = np.arange(len(rows))
        self.cells = torch.empty(len(rows), *first.cells.shape[1:], dtype=first.cells.dtype, device=device)
        chunks = self.cells.split(LOAD_BATCH_SIZE)
        batches = tqdm(split_batches(rows, LOAD_BATCH_SIZE), desc="load", unit="batch")
        for chunk, batch in zip(chunks, batches, strict=True):
            chunk.copy_(read(batch).cells)

    def read(self, rows: np.ndarray) -> Grid:
        """The maps, or their means, of rows (B,) int64, on the device."""
        positions = torch.from_numpy(self.position[rows]).to(self.cells.device, non_blocking=True)
        return Grid(self.cells.index_select(0, positions), self.pooling)
