"""Reads features.h5 (its layout: hdf5_layout.py).

Letters: N photos, B photos per batch, h x w cells, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from captioning.encoders.grid import Grid, grid_pooling, native_indices
from captioning.encoders.images import Transform
from captioning.encoders.views import View
from captioning.errors import UserError
from captioning.features.cached_grid import FeatureRows
from captioning.features.hdf5_layout import read_layout
from captioning.features.quantization import dequantize
from captioning.features.recipe import complete_attributes
from captioning.runtime.device import empty_pinned


class FeatureReader:
    """Reads rows of a feature file to the CPU, in any number of processes with any start method.

    From a 14x14 file it reads only the rows and columns that equal native ones, if they cover the native map.
    """

    def __init__(self, path: Path, pin: bool = False):
        """pin: read into pinned memory. Raises UserError like `read_layout`."""
        self.path = Path(path)
        self.pin = pin
        self.arrays, self.attributes, self.ids = read_layout(self.path)
        _, self.height, self.width, self.channels = self.arrays["features"].shape
        self.native_cells: tuple[np.ndarray, ...] | None = None  # index of a row's native cells; None: all of them
        native_grid = self.attributes["native_grid"]
        rows, columns = (native_indices(cells) for cells in native_grid)
        if rows is not None and columns is not None and [self.height, self.width] != native_grid:
            self.height, self.width = native_grid
            self.native_cells = np.ix_(rows, columns)
        self._maps: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}  # each process maps the file itself

    @property
    def view(self) -> View:
        """The view of the photos that the file holds."""
        return View.parse(self.complete_attributes["view"])

    @property
    def recipe(self) -> dict:
        """All attributes that files must share to be used together; those that older files lack have their value."""
        return {name: value for name, value in self.complete_attributes.items() if name not in ("view", "torch")}

    @property
    def complete_attributes(self) -> dict:
        """See recipe.complete_attributes."""
        return complete_attributes(self.attributes, self.arrays["features"])

    def transform(self) -> Transform:
        """How the photos became the encoder's input."""
        names = {field.name for field in fields(Transform)}
        return Transform.from_dict({name: value for name, value in self.attributes.items() if name in names})

    def rows_of(self, ids: Iterable[str]) -> np.ndarray:
        """The row of each photo, (N,) int64; -1 if the file does not hold it."""
        rows = {photo: row for row, photo in enumerate(self.ids)}  # not stored: it takes 200 bytes per photo
        return np.fromiter((rows.get(id, -1) for id in ids), np.int64)

    def done(self) -> np.ndarray:
        """Which rows are done, (N,) bool."""
        return self._map("done") == 1

    def read(self, rows: np.ndarray) -> Grid:
        """The feature maps of rows (B,) int64. Raises UserError if a row is not finite."""
        return self.to_grid(self.read_rows(rows), pooled=False)

    def read_pooled(self, rows: np.ndarray) -> Grid:
        """The means of the feature maps of rows (B,) int64, as grids of one cell, for decoders without attention.

        Raises UserError if a row is not finite.
        """
        return self.to_grid(self.read_rows(rows, pooled=True), pooled=True)

    def to_grid(self, rows: FeatureRows, pooled: bool) -> Grid:
        """The grid of rows that `read_rows` has read."""
        dtype = rows.cells.dtype if rows.scales is None else torch.float32
        return Grid(rows.decode(dtype), self.pooling(pooled))

    def pooling(self, pooled: bool) -> Tensor:
        """P (P, N) float32 of the maps, or of their means."""
        return grid_pooling(1, 1) if pooled else grid_pooling(self.height, self.width)

    def read_rows(self, rows: np.ndarray, pooled: bool = False) -> FeatureRows:
        """The native cells of rows (B,) int64, or their means as one cell, in the form in which they are stored.

        Raises UserError if a row is not finite.
        """
        target = self.empty_rows(len(rows), pooled)
        self.read_into(target, np.arange(len(rows)), rows, pooled)
        check_finite(target, lambda i: (self, rows[i]))
        return target

    def empty_rows(self, count: int, pooled: bool) -> FeatureRows:
        """So many uninitialised rows in the form in which they are stored, in pinned memory if the reader pins."""
        cells = 1 if pooled else self.height * self.width
        dtype = self.arrays["pooled" if pooled else "features"].dtype
        has_scales = dtype == np.uint8
        return FeatureRows(
            self._empty((count, cells, self.channels), dtype),
            self._empty((count, cells), self.arrays["scales"].dtype) if has_scales else None,
        )

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
        torch_dtype = getattr(torch, str(dtype))
        return empty_pinned(shape, torch_dtype) if self.pin else torch.empty(shape, dtype=torch_dtype)

    def read_into(self, target: FeatureRows, places: np.ndarray, rows: np.ndarray, pooled: bool) -> None:
        """Read rows (K,) int64, finite or not, to the rows `places` (K,) int64 of `target`, made by `empty_rows`."""
        if pooled:
            target.cells.numpy()[places, 0] = self._map("pooled")[rows]
            return
        self._read_native("features", rows, target.cells.numpy(), places)
        if target.scales is not None:
            self._read_native("scales", rows, target.scales.numpy(), places)

    def _read_native(self, name: str, rows: np.ndarray, target: np.ndarray, places: np.ndarray) -> None:
        """Copy the values of the native cells to the rows `places` of target (B, h w, ...)."""
        stored = self._map(name)
        target = target.reshape(len(target), self.height, self.width, *stored.shape[3:])  # a view
        for place, row in zip(places, rows, strict=True):
            target[place] = stored[row] if self.native_cells is None else stored[row][self.native_cells]

    def read_stored(self, rows: np.ndarray, name: str = "features") -> np.ndarray:
        """Rows (B,) int64 exactly as stored: features (B, h w C), scales (B, h w) or pooled (B, C), finite or not."""
        stored = self._map(name)
        return stored.reshape(len(stored), -1)[rows]

    def read_all_cells(self, rows: np.ndarray) -> Tensor:
        """All stored cells of rows (B,) int64, (B, h w, C) float32, finite or not."""
        channels = self.arrays["features"].shape[3]
        cells = torch.from_numpy(self.read_stored(rows)).view(len(rows), -1, channels)
        if cells.dtype != torch.uint8:
            return cells.float()
        return dequantize(cells, torch.from_numpy(self.read_stored(rows, "scales")), torch.float32)

    def _map(self, name: str) -> np.ndarray:
        if name not in self._maps:
            self._maps[name] = np.asarray(self.arrays[name].map(self.path))  # indexing a np.memmap is slow
        return self._maps[name]


def check_finite(rows: FeatureRows, source: Callable[[int], tuple[FeatureReader, int]]) -> None:
    """Raise UserError if a row is not finite. source(i): the file of row i, and its row there."""
    values = rows.cells if rows.scales is None else rows.scales
    if len(values) and not torch.stack(values.aminmax()).isfinite().all():
        reader, row = source(next(i for i, value in enumerate(values) if not value.isfinite().all()))
        raise UserError(
            f"{reader.path}: the features of {reader.ids[row]} are not finite; extract_features.py --verify finds all "
            "such rows, and the same command without --verify encodes them again"
        )
