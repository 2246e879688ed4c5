"""Where a cell lies in the photo, added to what a decoder reads of it: --positions of every decoder that reads cells.

Legend: B photos, N native cells, P output cells, S channels of what the positions are added to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from captioning.decoders.protocol import upcast
from captioning.encoders.grid import GRID_SIZE, Grid


class Positions(nn.Module):
    """Two-dimensional positions of the native cells, of any map: the pooling matrix tells all that is needed.

    The positions are those of the 14 x 14 output cells. A native cell has the mean of the output cells that read it.
    """

    def forward(self, pooling: Tensor) -> Tensor:
        """Pooling (P, N) -> positions of the native cells (N, S)."""
        raise NotImplementedError

    def add(self, values: Tensor, pooling: Tensor) -> Tensor:
        """Values of the native cells (B, N, S), pooling (P, N) -> the values with their positions (B, N, S)."""
        return values + self(pooling)

    def add_to_cells(self, grid: Grid) -> Grid:
        """The grid with the positions in its cells, in their dtype.

        They are added before the pooling, so all that a decoder computes from the cells remains exact.
        """
        return Grid(self.add(grid.cells, grid.pooling).to(grid.cells.dtype), grid.pooling)


class LearntPositions(Positions):
    """A vector per row plus one per column."""

    def __init__(self, size: int):
        """size: S."""
        super().__init__()
        self.rows = nn.Parameter(0.02 * torch.randn(GRID_SIZE, size))
        self.columns = nn.Parameter(0.02 * torch.randn(GRID_SIZE, size))

    def forward(self, pooling: Tensor) -> Tensor:
        """Pooling (P, N) -> positions of the native cells (N, S)."""
        positions = (self.rows[:, None] + self.columns).flatten(0, 1)  # (P, S)
        shares = pooling.to(positions.dtype) / pooling.sum(0).to(positions.dtype)
        return shares.mT @ positions


class SinusoidalPositions(Positions):
    """Sinusoids of the row in one half of the channels, of the column in the other, in units of output cells.

    Two-dimensional positions as in Parmar et al. 2018 (https://arxiv.org/abs/1802.05751), section 3.
    """

    def __init__(self, size: int):
        """size: S."""
        super().__init__()
        self.size = size

    def forward(self, pooling: Tensor) -> Tensor:
        """Pooling (P, N) -> positions of the native cells (N, S)."""
        shares = pooling / pooling.sum(0)  # no matrix product: autocast would round it
        cells = torch.arange(GRID_SIZE**2, device=pooling.device)[:, None]
        row, column = ((shares * part).sum(0)[:, None] for part in (cells // GRID_SIZE, cells % GRID_SIZE))
        half = self.size // 2
        return torch.cat([sinusoids(row, half, shares), sinusoids(column, self.size - half, shares)], 1)


class NoPositions(Positions):
    """No positions: a decoder without encoder layers then reads the cells as a set."""

    def __init__(self, size: int):
        super().__init__()

    def add(self, values: Tensor, pooling: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def add_to_cells(self, grid: Grid) -> Grid:
        """The grid itself."""
        return grid


POSITIONS = {"learnt": LearntPositions, "sinusoidal": SinusoidalPositions, "none": NoPositions}


def make_positions(name: str, size: int) -> Positions:
    """name: "learnt", "sinusoidal" or "none". size: the channels S of what they are added to."""
    return POSITIONS[name](size)


def sinusoids(position: Tensor | int, size: int, like: Tensor) -> Tensor:
    """sin(position / 10000^(2i / size)) in channel 2i, the cosine in channel 2i + 1 (Vaswani et al., section 3.5).

    position: a number, or (..., 1). Returns (..., size), on the device and in the dtype of `like`, at least float32.
    """
    like = upcast(like)
    frequencies = torch.exp(torch.arange(0, size, 2, device=like.device, dtype=like.dtype) * (-math.log(10000) / size))
    angles = position * frequencies
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[..., :size]
