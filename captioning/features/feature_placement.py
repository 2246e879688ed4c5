"""Where features are held while a decoder trains: on the GPU, in main memory, or on disk.

gpu   as many rows as fit beside the decoder are on the GPU, as stored: reading them copies nothing from the host
ram   rows are in main memory, native cells only: a third of a 14x14 file
disk  each batch is read from the memory-mapped file; the system's page cache holds what was read before

If not all rows fit on the GPU, a fixed subset of them lies there and serves its share of every epoch's reads. A cache
of the rows that were read last would serve less, since an epoch reads each row once, in a new order: with space for
60 % of the rows, 24 % instead of 60 % (bench/cache.py).

Letters: R rows held, B photos per batch, G of them on the GPU.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from captioning.encoders.images import split_batches
from captioning.errors import UserError
from captioning.features.cached_grid import CachedGrid, FeatureRows
from captioning.features.feature_files import FeatureFiles
from captioning.features.quantization import KERNELS, DequantizeRows, dequantize_rows, proven_kernel
from captioning.runtime.device import oom_as_user_error
from captioning.runtime.kernel_loading import load_kernels
from captioning.runtime.progress import tqdm

CPU = torch.device("cpu")
LOAD_BATCH_SIZE = 256  # photos
PROOF_ROWS = 8  # on which the kernel that decodes codes is compared with its plain form
RESERVED_BYTES = 4 * 10**9  # of GPU memory for the decoder and its batches, at least ...
RESERVED_FRACTION = 0.15  # ... and of all GPU memory: on a larger GPU the batches are larger too
MEMORY_FRACTION = 0.5  # of the free main memory


class FeaturePlacement(NamedTuple):
    """How many photos' features lie where, and why. The rest lies on disk."""

    photos: int
    on_gpu: int
    in_ram: int
    reason: str  # for the message that is printed

    @property
    def on_disk(self) -> int:
        """The number of photos whose features are read from disk."""
        return self.photos - self.on_gpu - self.in_ram

    def __str__(self) -> str:
        """For the message that is printed: "the GPU (REASON)", or how many photos lie where."""
        counts = {"the GPU": self.on_gpu, "main memory": self.in_ram, "the disk": self.on_disk}
        used = {name: count for name, count in counts.items() if count}
        if len(used) == 1:
            return f"{next(iter(used))} ({self.reason})"
        return " and ".join(f"{name} ({count:,} photos)" for name, count in used.items()) + f": {self.reason}"


class Sizes(NamedTuple):
    """What is to be placed."""

    photos: int
    row_bytes: int  # of one photo, in the form in which it is held
    quantized_bytes: int  # of one photo as codes; equal to row_bytes if quantisation would change nothing

    def __str__(self) -> str:
        return f"{self.photos * self.row_bytes / 1e9:.1f} GB of features"


def choose_placement(requested: str, sizes: Sizes, device: torch.device) -> FeaturePlacement:
    """Where to place the features. requested: auto, gpu, ram or disk. Raises UserError if they do not fit there."""
    if requested == "ram":
        return _all_in_ram(sizes)
    if requested == "gpu" and device.type != "cuda":
        raise UserError(f"--features-on gpu: the run is on {device}; give --device cuda, or --features-on ram or disk")
    if requested == "disk" or device.type != "cuda":
        reason = f"{sizes}" if requested == "disk" else f"{sizes}; the {device.type.upper()} reads them in place"
        return FeaturePlacement(sizes.photos, 0, 0, reason)
    return _as_many_on_gpu_as_fit(sizes, device, all_must_fit=requested == "gpu")


def _as_many_on_gpu_as_fit(sizes: Sizes, device: torch.device, all_must_fit: bool) -> FeaturePlacement:
    free, total = gpu_memory(device)
    available = max(0, free - max(RESERVED_BYTES, int(RESERVED_FRACTION * total)))
    on_gpu = min(sizes.photos, available // sizes.row_bytes)
    rest = sizes._replace(photos=sizes.photos - on_gpu)
    kept = free - available
    reason = f"{sizes}; {free / 1e9:.1f} GB are free on the GPU, of which {kept / 1e9:.1f} are kept for the decoder"
    remedy = _quantization_remedy(sizes, available) if rest.photos else ""
    if all_must_fit and rest.photos:
        partly = f"{on_gpu:,} of {sizes.photos:,} photos fit; --features-on auto holds those there and reads the rest"
        raise UserError(f"--features-on gpu: {reason}: {partly} from RAM or disk{remedy and f'; or give {remedy}'}")
    in_ram = rest.photos if _fits_in_ram(rest) else 0
    return FeaturePlacement(sizes.photos, on_gpu, in_ram, reason + (remedy and f"; give {remedy}"))


def _quantization_remedy(sizes: Sizes, available: int) -> str:
    """The advice to quantise, if the codes of all photos fit into the available bytes; else empty."""
    nbytes = sizes.photos * sizes.quantized_bytes
    if nbytes > available:
        return ""
    return f"--quantize-features, with which all fit, in {nbytes / 1e9:.1f} GB"


def _all_in_ram(sizes: Sizes) -> FeaturePlacement:
    if not _fits_in_ram(sizes):
        raise UserError(
            f"--features-on ram: {sizes} are more than {MEMORY_FRACTION:.0%} of the {free_main_memory() / 1e9:.1f} GB "
            "free; give --features-on disk"
        )
    return FeaturePlacement(sizes.photos, 0, sizes.photos, str(sizes))


def _fits_in_ram(sizes: Sizes) -> bool:
    return sizes.photos * sizes.row_bytes <= MEMORY_FRACTION * free_main_memory()


def gpu_memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of a CUDA device."""
    return torch.cuda.mem_get_info(device)


def free_main_memory() -> int:
    """Free bytes of main memory, divided by the number of processes that torchrun started on this machine."""
    meminfo = Path("/proc/meminfo")
    available = (
        re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text(encoding="utf-8")) if meminfo.is_file() else None
    )
    if available:
        free = int(available[1]) * 1024
    else:  # macOS reports only the total
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def place_features(
    files: FeatureFiles,
    rows: np.ndarray,
    pooled: bool,
    requested: str,
    device: torch.device,
    quantize: bool = False,
    kernels: bool = True,
) -> PlacedFeatures:
    """Load rows (N,) int64, all different, to where they are placed.

    pooled: only the mean of each map. requested: auto, gpu, ram or disk. quantize: hold the maps as uint8 codes.
    kernels: decode codes on a GPU with a fused kernel, if it works there.
    Raises UserError if the rows do not fit, or one is not finite.
    """
    source = FileRows(files, pooled, quantize)
    first = source.read(rows[:1])
    quantized = first.row_bytes if pooled else first.quantize().row_bytes
    placement = choose_placement(requested, Sizes(len(rows), first.row_bytes, quantized), device)
    return PlacedFeatures(source, rows, placement, device, kernels)


class FileRows:
    """Rows of the files: maps or their means."""

    def __init__(self, files: FeatureFiles, pooled: bool, quantize: bool):
        """quantize: maps that are stored in floating point become codes when they are read."""
        self.files = files
        self.pooled = pooled
        self.quantize = quantize and not pooled
        self.pooling = files.pooling(pooled)

    def read(self, rows: np.ndarray, device: torch.device = CPU) -> FeatureRows:
        """The features of rows (B,) int64, on the device. Raises UserError if a row is not finite."""
        stored = self.files.read_rows(rows, self.pooled).to(device)
        return stored.quantize() if self.quantize else stored


class HeldRows:
    """Rows that were loaded once into the memory of a device."""

    def __init__(self, source: FileRows, rows: np.ndarray, device: torch.device, pinned: bool = False):
        """rows (R,) int64, all different. pinned: `read` gathers into pinned memory."""
        self.pinned = pinned
        self.position = np.full(rows.max() + 1, -1)  # row of the file -> index into `held`; -1: not held
        self.position[rows] = np.arange(len(rows))
        self.held = source.read(rows[:1]).empty_like(len(rows), device)
        batches = split_batches(rows, LOAD_BATCH_SIZE)
        for number, batch in enumerate(tqdm(batches, desc="load", unit="batch")):
            self.held.write(number * LOAD_BATCH_SIZE, source.read(batch, device))

    def positions_of(self, rows: np.ndarray) -> np.ndarray:
        """The index into `held` of rows (B,) int64; -1 for a row that is not held."""
        known = rows < len(self.position)
        return np.where(known, self.position[np.where(known, rows, 0)], -1)

    def read(self, rows: np.ndarray) -> FeatureRows:
        """The features of rows (B,) int64, all held, in main memory."""
        return self.held.gather(torch.from_numpy(self.position[rows]), self.pinned)


class PlacedFeatures:
    """Reads batches of the rows that were placed."""

    def __init__(
        self,
        source: FileRows,
        rows: np.ndarray,
        placement: FeaturePlacement,
        device: torch.device,
        kernels: bool = True,
    ):
        """rows (N,) int64, all different. device: on which those of `placement.on_gpu` are held, and batches used.

        kernels: see `place_features`.

        Raises UserError if the memory does not suffice after all.
        """
        self.placement = placement
        self.pooling = source.pooling.to(device)
        self.host: FileRows | HeldRows = source
        self.resident: HeldRows | None = None
        on_gpu = evenly_spread(len(rows), placement.on_gpu)  # (N,) bool
        if placement.on_gpu:
            with oom_as_user_error("the features did not fit; give --features-on ram or disk"):
                self.resident = HeldRows(source, rows[on_gpu], device)
        if placement.in_ram:
            with oom_as_user_error("the features did not fit; give --features-on disk"):
                self.host = HeldRows(source, rows[~on_gpu], CPU, pinned=device.type == "cuda")
        sample = source.read(rows[:PROOF_ROWS], device)
        self.dequantize: DequantizeRows = dequantize_rows
        if kernels and device.type == "cuda" and sample.scales is not None:
            self.dequantize = proven_kernel(load_kernels(KERNELS, device), sample.cells, sample.scales)

    def read(self, rows: np.ndarray) -> CachedGrid:
        """The maps, or their means, of rows (B,) int64."""
        if self.resident is None:
            positions = np.full(len(rows), -1)
        else:
            positions = self.resident.positions_of(rows)
        held = positions >= 0
        return CachedGrid(
            host=self.host.read(rows[~held]),
            resident=None if self.resident is None else self.resident.held,
            rows=torch.from_numpy(positions[held]),
            places=torch.from_numpy(np.concatenate([np.flatnonzero(held), np.flatnonzero(~held)])),
            pooling=self.pooling,
            dequantize=self.dequantize,
        )


def evenly_spread(photos: int, chosen: int) -> np.ndarray:
    """Which `chosen` of the photos are taken, (N,) bool: the same share of every stretch of them, so of each split."""
    steps = np.arange(photos + 1) * chosen // max(1, photos)
    return np.diff(steps) > 0
