"""How far features are off when they are held in 8 bits per value, on the features of a real data set.

    python bench/quantization.py data/f8k-zh                 2,000 of its photos

The error is |approximate - exact| / |exact| of a cell, in the L2 norm; cells of zeros are left out. Compared are the
codes of captioning/features/quantization.py, codes that are uniform in the value, and float8 (e4m3), each with the same
scale per cell: its largest value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from timeit import timeit

import numpy as np
import torch
import tyro
from torch import Tensor
from tyro.conf import Positional

from captioning.encoders.grid import Grid
from captioning.features.feature_reader import FeatureReader
from captioning.features.quantization import dequantize, quantize


@dataclass(frozen=True)
class Bench:
    data: Positional[Path]  # folder with extracted features
    features: Path | None = None  # data/NAME/features.h5 unless given
    photos: int = 2000  # spread over the file


def main(bench: Bench) -> None:
    torch.set_num_threads(1)
    reader = FeatureReader(bench.features or bench.data / "features.h5")
    rows = np.flatnonzero(reader.done())
    rows = rows[np.linspace(0, len(rows) - 1, min(bench.photos, len(rows))).astype(int)]
    batches = [reader.read(batch) for batch in np.array_split(rows, -(-len(rows) // 64))]
    negative = np.mean([(batch.cells < 0).float().mean().item() for batch in batches])
    zero = np.mean([(batch.cells == 0).float().mean().item() for batch in batches])
    print(
        f"{reader.path}: {reader.attributes['encoder']}, {len(rows):,} photos of {tuple(batches[0].shape[1:])}, "
        f"{zero:.0%} zeros, {negative:.0%} negative"
    )
    print(f"{'relative error of':>24}  {'min':>7}  {'mean':>7}  {'max':>7}   mean of the map")
    methods = {"square root, 8 bits": companded, "uniform, 8 bits": uniform, "float8 e4m3": float8}
    for name, method in methods.items():
        errors = torch.cat([cell_errors(batch.cells.float(), method) for batch in batches])
        means = torch.cat([mean_errors(batch, method) for batch in batches])
        values = [errors.min(), errors.mean(), errors.max(), means.mean()]
        print(f"{name:>24}  " + "  ".join(f"{value:7.2%}" for value in values))
    cells = batches[0].cells
    codes, scales = quantize(cells)
    for name, work in (
        ("quantised", lambda: quantize(cells)),
        ("dequantised", lambda: dequantize(codes, scales, torch.float32)),
    ):
        seconds = min(timeit(work, number=1) for _ in range(5))
        print(f"{name:>24}  {len(cells) / seconds:,.0f} photos/s, one thread")


def companded(cells: Tensor) -> Tensor:
    return dequantize(*quantize(cells), torch.float32)


def uniform(cells: Tensor) -> Tensor:
    scale, levels = scale_and_levels(cells, 255, 127)
    return (cells / scale * levels).round() / levels * scale


def float8(cells: Tensor) -> Tensor:
    scale, _ = scale_and_levels(cells, 255, 127)
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (cells / scale * largest).to(torch.float8_e4m3fn).float() / largest * scale


def scale_and_levels(cells: Tensor, unsigned: int, signed: int) -> tuple[Tensor, Tensor]:
    """The largest value of each cell, (B, N, 1), and the number of levels up to it."""
    negative = (cells < 0).any(-1, keepdim=True)
    levels = torch.where(negative, signed, unsigned)
    return cells.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny), levels


def cell_errors(cells: Tensor, method: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the cells (B, N, C) that are not zero, (K,)."""
    cells = cells.flatten(0, 1)
    cells = cells[cells.norm(dim=1) > 0]
    return (method(cells) - cells).norm(dim=1) / cells.norm(dim=1)


def mean_errors(grid: Grid, method: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the means of the 14x14 maps, (B,)."""
    cells = grid.cells.float()
    exact = Grid(cells, grid.pooling).mean()
    return (Grid(method(cells), grid.pooling).mean() - exact).norm(dim=1) / exact.norm(dim=1)


if __name__ == "__main__":
    main(tyro.cli(Bench))
