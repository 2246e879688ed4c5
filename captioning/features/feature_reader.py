"""Reads features.h5 (its layout: hdf5_layout.py).

Letters: N photos, B photos per batch, h x w cells, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from captioning.encoders.grid import Grid, grid_pooling, native_indices
from captioning.encoders.images import Transform
from captioning.errors import UserError
from captioning.features.cached_grid import FeatureRows
from captioning.features.hdf5_layout import read_layout
from captioning.features.quantization import dequantize
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

    def transform(self) -> Transform:
        """How the photos became the encoder's input."""
        names = {field.name for field in fields(Transform)}
        return Transform.from_dict({name: value for name, value in self.attributes.items() if name in names})

    def rows_of(self, ids: Iterable[str]) -> np.ndarray:
        """The row of each photo, (N,) int64; -1 if the file does not hold it."""
        rows = {photo: row for row, photo in enumerate(self.ids)}  # not stored: it takes 200 bytes per photo
        return np.fromiter((rows.get(id, -1) for id in ids), np.int64)

    def available(self, rows: np.ndarray, allow_missing: float, dataset: Path) -> np.ndarray:
        """Which photos are done, (N,) bool, from their rows (N,) int64 as given by `rows_of`.

        Raises UserError if a larger fraction than `allow_missing` is not done.
        """
        available = (rows >= 0) & self.done()[rows]
        missing = int((~available).sum())
        if missing > allow_missing * len(rows):
            same_dataset = (rows >= 0).any()
            problem = "" if same_dataset else "belongs to another data set: "
            overwrite = "" if same_dataset else " --overwrite"
            raise UserError(
                f"{self.path}: {problem}no features for {missing:,} of {len(rows):,} images; "
                f"run: python extract_features.py {dataset}{overwrite}"
            )
        return available

    def done(self) -> np.ndarray:
        """Which rows are done, (N,) bool."""
        return self._map("done") == 1

    def read(self, rows: np.ndarray) -> Grid:
        """The feature maps of rows (B,) int64. Raises UserError if a row is not finite."""
        return self._grid(self.read_rows(rows), pooled=False)

    def read_pooled(self, rows: np.ndarray) -> Grid:
        """The means of the feature maps of rows (B,) int64, as grids of one cell, for decoders without attention.

        Raises UserError if a row is not finite.
        """
        return self._grid(self.read_rows(rows, pooled=True), pooled=True)

    def _grid(self, rows: FeatureRows, pooled: bool) -> Grid:
        dtype = rows.cells.dtype if rows.scales is None else torch.float32
        return Grid(rows.decode(dtype), self.pooling(pooled))

    def pooling(self, pooled: bool) -> Tensor:
        """P (P, N) float32 of the maps, or of their means."""
        return grid_pooling(1, 1) if pooled else grid_pooling(self.height, self.width)

    def read_rows(self, rows: np.ndarray, pooled: bool = False) -> FeatureRows:
        """The native cells of rows (B,) int64, or their means as one cell, in the form in which they are stored.

        Raises UserError if a row is not finite.
        """
        if pooled:
            means = torch.from_numpy(self._map("pooled")[rows])  # (B, C)
            self._check_finite(means, rows)
            return FeatureRows(means[:, None])
        cells = self._read_native("features", rows).flatten(1, 2)
        if cells.dtype != torch.uint8:
            self._check_finite(cells, rows)
            return FeatureRows(cells)
        scales = self._read_native("scales", rows).flatten(1, 2)
        self._check_finite(scales, rows)
        return FeatureRows(cells, scales)

    def _read_native(self, name: str, rows: np.ndarray) -> Tensor:
        """The values of the native cells, (B, h, w, ...)."""
        stored = self._map(name)
        shape = (len(rows), self.height, self.width, *stored.shape[3:])
        dtype = getattr(torch, str(stored.dtype))
        values = empty_pinned(shape, dtype) if self.pin else torch.empty(shape, dtype=dtype)
        for value, row in zip(values.numpy(), rows, strict=True):
            value[:] = stored[row] if self.native_cells is None else stored[row][self.native_cells]
        return values

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

    def _check_finite(self, values: Tensor, rows: np.ndarray) -> None:
        """Raise UserError if one of the values (B, ...) of these rows is not finite."""
        if len(rows) and not torch.stack(values.aminmax()).isfinite().all():
            bad = next(row for row, value in zip(rows, values, strict=True) if not value.isfinite().all())
            raise UserError(
                f"{self.path}: the features of {self.ids[bad]} are not finite; extract_features.py --verify finds all "
                "such rows, and the same command without --verify encodes them again"
            )
