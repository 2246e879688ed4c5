"""A CNN's feature map in its native resolution, with the pooling that resamples it to 14x14.

`AdaptiveAvgPool2d(14)` of a map is linear: F14 = P F, with P = kron(p_rows, p_columns). Everything that is linear in
F14 can therefore be computed, exactly, on the few native cells F and resampled afterwards:

    keys     W F14      = P (W F)          64 projections per photo instead of 196
    context  a F14      = (a P) F          a sum over 64 cells instead of 196
    mean     mean(F14)  = mean(P) F

Letters: B photos, N native cells, P output cells (14 x 14 = 196), C channels, A values per cell, K attention maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from captioning.runtime.device import pin

GRID_SIZE = 14  # output cells per side, as in Xu et al. 2015 (https://arxiv.org/abs/1502.03044)


@dataclass
class Grid:
    """Native feature maps of a batch, and the pooling to the output cells.

    cells: (B, N, C), row by row. pooling: (P, N), or (B, P, N) with equal matrices; each row sums to one.
    """

    cells: Tensor
    pooling: Tensor

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, N, C)."""
        return tuple(self.cells.shape)

    def spread(self, values: Tensor) -> Tensor:
        """Resample values of the native cells (B, N, A) to the output cells (B, P, A)."""
        return self.pooling.to(values.dtype) @ values

    def attend(self, attention: Tensor) -> Tensor:
        """Sum the output cells, weighted by attention (B, K, P) -> context (B, K, C)."""
        return (attention @ self.pooling.to(attention.dtype)).to(self.cells.dtype) @ self.cells

    def mean(self) -> Tensor:
        """The mean of the output cells (B, C)."""
        weights = self.pooling.mean(0).to(self.cells.dtype)  # (N,)
        return weights @ self.cells

    def dropout_channels(self, probability: float) -> Grid:
        """Drop channels, the same ones in all cells of a photo; those kept are scaled to preserve the mean."""
        if not probability:
            return self
        mask = F.dropout(self.cells.new_ones(len(self), 1, self.cells.shape[2]), probability)  # (B, 1, C)
        return Grid(self.cells * mask, self.pooling)

    def select(self, photos: Tensor) -> Grid:
        """The grids of these photos, int64 (K,), in this order."""
        return Grid(self.cells.index_select(0, photos), self.pooling)

    def to(self, device: torch.device, dtype: torch.dtype) -> Grid:
        """Move the grid to a device and convert its cells."""
        cells = self.cells.to(device, non_blocking=True).to(dtype)  # copy in the smaller stored type, then convert
        return Grid(cells, self.pooling.to(device, non_blocking=True))

    def copy_to(self, cells: Tensor) -> None:
        """Write the cells to `cells` (B, N, C), on its device and in its dtype."""
        cells.copy_(self.cells, non_blocking=True)

    def pin_memory(self) -> Grid:
        """Copy the grid to pinned memory; a grid on a GPU stays there."""
        return self if self.cells.is_cuda else Grid(pin(self.cells), pin(self.pooling))


def pooling_matrix(cells_in: int, cells_out: int) -> Tensor:
    """p (cells_out, cells_in) float64: output cell i averages inputs floor(i in/out) .. ceil((i+1) in/out) - 1."""
    matrix = torch.zeros(cells_out, cells_in, dtype=torch.float64)
    for i in range(cells_out):
        start = i * cells_in // cells_out
        end = math.ceil((i + 1) * cells_in / cells_out)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


@lru_cache
def grid_pooling(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """P (196, height * width) float32: AdaptiveAvgPool2d(14) of a height x width map, as a matrix."""
    with torch.inference_mode(False):  # the first call may come from inference mode, and the matrix is cached
        return torch.kron(pooling_matrix(height, GRID_SIZE), pooling_matrix(width, GRID_SIZE)).float().to(device)


def native_indices(cells: int) -> list[int] | None:
    """The output row that equals each native row, for a map of `cells` rows: [0, 2, 4, 6, 7, 9, 11, 13] for 8.

    None if some native row never stands alone in an output row, as for 10 or 12: F14 must then be read in full.
    """
    matrix = pooling_matrix(cells, GRID_SIZE)
    indices = []
    for cell in range(cells):
        equal_rows = torch.nonzero(matrix[:, cell] == 1).flatten()
        if not len(equal_rows):
            return None
        indices.append(int(equal_rows[0]))
    return indices


def to_stored_layout(grid: Grid, shape: Sequence[int], dtype: str) -> tuple[Tensor, Tensor]:
    """Convert a grid to rows of a feature file.

    shape: (h, w, C) of a stored row, 14x14 or native. Returns cells (B, h, w, C) in `dtype`, and the mean of the
    output cells (B, C) float32.
    """
    grid = Grid(grid.cells.float(), grid.pooling)
    cells = grid.spread(grid.cells) if tuple(shape[:2]) == (GRID_SIZE, GRID_SIZE) else grid.cells
    return cells.reshape(-1, *shape).to(getattr(torch, dtype)), grid.mean()
