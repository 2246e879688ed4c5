"""A feature map as the CNN left it, with the pooling that makes it 14x14: the exact shortcut.

`AdaptiveAvgPool2d(14)` of a map is linear: F14 = P F, with P = kron(p_rows, p_columns). Whatever is
linear in F14 can therefore be computed on the few native cells F and spread afterwards:

    keys     W F14      = P (W F)          64 projections a photo instead of 196
    context  a F14      = (a P) F          a sum over 64 cells instead of 196
    mean     mean(F14)  = mean(P) F

Letters: B photos, N native cells, P output cells (14 x 14 = 196), C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 14  # output cells a side: Xu et al. 2015 attend over 14 x 14


@dataclass
class Grid:
    """cells (B, N, C), row by row; pooling (P, N), or (B, P, N) of equal ones, whose rows sum to one."""

    cells: Tensor
    pooling: Tensor

    def __len__(self) -> int:
        return len(self.cells)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the native cells (B, N, A) -> of the output cells (B, P, A)."""
        return self.pooling.to(values.dtype) @ values

    def attend(self, attention: Tensor) -> Tensor:
        """Attention over the output cells (B, K, P) -> what it sees (B, K, C)."""
        return (attention @ self.pooling.to(attention.dtype)).to(self.cells.dtype) @ self.cells

    def mean(self) -> Tensor:
        """The mean of the output cells (B, C)."""
        weights = self.pooling.mean(0).to(self.cells.dtype)  # (N,)
        return weights @ self.cells

    def dropout_channels(self, share: float) -> Grid:
        """Dropout of whole channels, the same in all cells of a photo; the others grow, so that the mean stays."""
        if not share:
            return self
        kept = F.dropout(self.cells.new_ones(len(self), 1, self.cells.shape[2]), share)  # (B, 1, C)
        return Grid(self.cells * kept, self.pooling)

    def select(self, photos: Tensor) -> Grid:
        """The same for these photos (K,) int64, in this order."""
        return Grid(self.cells.index_select(0, photos), self.pooling)

    def to(self, device: torch.device, dtype: torch.dtype) -> Grid:
        cells = self.cells.to(device, non_blocking=True).to(dtype)  # travel in the stored type, then widen
        return Grid(cells, self.pooling.to(device, non_blocking=True))

    def pin_memory(self) -> Grid:
        """Where a GPU can fetch it while it computes; what lies on one stays there."""
        return self if self.cells.is_cuda else Grid(self.cells.pin_memory(), self.pooling.pin_memory())


def pooling_matrix(cells_in: int, cells_out: int) -> Tensor:
    """p (cells_out, cells_in) float64: output cell i averages inputs floor(i in/out) .. ceil((i+1) in/out) - 1."""
    matrix = torch.zeros(cells_out, cells_in, dtype=torch.float64)
    for i in range(cells_out):
        first, end = i * cells_in // cells_out, math.ceil((i + 1) * cells_in / cells_out)
        matrix[i, first:end] = 1 / (end - first)
    return matrix


@lru_cache
def grid_pooling(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """P (196, height * width) float32: AdaptiveAvgPool2d(14) of a height x width map, as a matrix."""
    with torch.inference_mode(False):  # kept from the first call on, which may be one in inference mode
        return torch.kron(pooling_matrix(height, SIDE), pooling_matrix(width, SIDE)).float().to(device)


def native_indices(cells: int) -> list[int] | None:
    """Output rows that ARE the native rows, one each: [0, 2, 4, 6, 7, 9, 11, 13] for 8.

    None where some native row is alone in no output row, as for 10 or 12: F14 must then be read whole.
    """
    rows = pooling_matrix(cells, SIDE)
    places = []
    for cell in range(cells):
        alone = torch.nonzero(rows[:, cell] == 1).flatten()
        if not len(alone):
            return None
        places.append(int(alone[0]))
    return places


def to_stored_layout(grid: Grid, shape: Sequence[int], dtype: str) -> tuple[Tensor, Tensor]:
    """A grid as rows of a feature file: cells (B, h, w, C) of this shape, 14x14 or native; their mean (B, C)."""
    grid = Grid(grid.cells.float(), grid.pooling)
    cells = grid.spread(grid.cells) if tuple(shape[:2]) == (SIDE, SIDE) else grid.cells
    return cells.reshape(-1, *shape).to(getattr(torch, dtype)), grid.mean()
