"""Writes features.h5 (its layout: hdf5_layout.py), row by row, so that a kill loses nothing that is marked as done.

Letters: N photos, B photos per batch, h x w cells, C channels.
"""

from __future__ import annotations

import os
import queue
import shutil
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from captioning.encoders.grid import GRID_SIZE, Grid, to_stored_layout
from captioning.errors import UserError
from captioning.features.hdf5_layout import QUANTIZATION, Layout, create_file, data_bytes, read_layout
from captioning.features.quantization import quantize
from captioning.features.recipe import complete_attributes, first_difference
from captioning.runtime.files import write_errors

WRITE_REMEDY = "fix that and run the same command, or give --out elsewhere"
QUEUE_SIZE = 4  # batches that wait for the disk; the writing thread may hold as many again
fdatasync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


def to_stored_rows(grid: Grid, shape: Sequence[int], dtype: str) -> tuple[Tensor, ...]:
    """What `FeatureWriter.write` takes for a grid, on the grid's device.

    shape: (h, w, C) of a stored row. Returns features (B, h, w, C) in `dtype`, pooled (B, C) float32 and, for uint8,
    scales (B, h, w) float32. pooled is the mean before quantisation.
    """
    if dtype != "uint8":
        return to_stored_layout(grid, shape, dtype)
    cells, pooled = to_stored_layout(grid, shape, "float32")
    codes, scales = quantize(cells)
    return codes, pooled, scales


class _Batch(NamedTuple):
    rows: np.ndarray  # (B,) int64
    values: dict[str, np.ndarray]  # name of an array of the file -> its rows (B, ...)


class FeatureWriter:
    """Creates features.h5, or resumes one with the same attributes and photos.

    A thread writes to the disk while the next batch is computed.
    """

    def __init__(
        self,
        path: Path,
        ids: Sequence[str],
        attributes: dict,
        channels: int,
        dtype: str,
        overwrite: bool,
        photo_files: np.ndarray | None = None,
        others: int = 0,
    ):
        """ids: of the photos, one per row; attributes: from recipe.describe_features; dtype: float16, float32 or uint8.

        photo_files (N, 2) int64: see photo_files.py; None: not known. others: files of this size that will be created
        on the same disk.

        Of an existing file with other photos, the rows of those that it shares are kept. Raises UserError if it shares
        none, if it has other attributes, or if the disk is full or denies access.
        """
        self.path = path
        self.dtype = np.dtype(dtype)
        self.photo_files = photo_files
        grid = (GRID_SIZE, GRID_SIZE) if attributes["grid"] == "14" else tuple(attributes["native_grid"])
        self.shape = (len(ids), *grid, channels)
        attributes = {**attributes, "dtype": dtype}
        if dtype == "uint8":
            attributes["quantization"] = QUANTIZATION
        with write_errors(path, WRITE_REMEDY):
            if path.exists() and not overwrite:
                layout = self._check_resumable(attributes)
                if [*layout.ids] != [*ids]:
                    self._rearrange(layout, ids)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._check_free_space(1 + others, self.path.stat().st_blocks * 512 if self.path.exists() else 0)
                create_file(path, self.shape, self.dtype, ids, {**attributes, "torch": str(torch.__version__)})
            self.arrays = read_layout(path).arrays
            self.file = os.open(path, os.O_RDWR)
        self.queue: queue.Queue[_Batch | None] = queue.Queue(QUEUE_SIZE)  # None: close
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._write_queue, name="writer", daemon=True)
        self.thread.start()

    def _check_resumable(self, attributes: dict) -> Layout:
        """The layout of the existing file. Raises UserError if it has other attributes."""
        layout = read_layout(self.path)
        expected = {**attributes, "shape": list(self.shape[1:])}
        found = complete_attributes(layout.attributes, layout.arrays["features"])
        if name := first_difference(found, expected):
            raise UserError(
                f"{self.path}: was extracted with {name} {found.get(name)}, not {expected[name]}; give --overwrite to "
                "replace it, or --out for another file"
            )
        return layout

    def _rearrange(self, old: Layout, ids: Sequence[str]) -> None:
        """Replace the existing file by one of these photos, with the rows of those that both have.

        A kill leaves the existing file as it was. Raises UserError if they share no photo.
        """
        index = {photo: row for row, photo in enumerate(old.ids)}
        sources = np.array([index.get(photo, -1) for photo in ids])  # (N,) rows of the existing file; -1: a new photo
        shared = int((sources >= 0).sum())
        if not shared:
            raise UserError(
                f"{self.path}: belongs to another data set: none of its {len(old.ids):,} photos is among these "
                f"{len(ids):,}; give --overwrite to replace it, or --out for another file"
            )
        self._check_free_space(1, freed=0)
        temporary = self.path.with_name(self.path.name + ".new")
        try:
            create_file(temporary, self.shape, self.dtype, ids, old.attributes)
            self._copy_rows(old, sources, temporary)
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
        print(
            f"{self.path}: the data set has changed: the rows of {shared:,} photos are kept, {len(ids) - shared:,} are "
            f"new, {len(old.ids) - shared:,} are no longer in it"
        )

    def _copy_rows(self, old: Layout, sources: np.ndarray, path: Path) -> None:
        """Copy the done rows `sources` (N,), -1 for none, of the existing file to a new one at `path`."""
        self.arrays = read_layout(path).arrays
        stored = {name: array.map(self.path) for name, array in old.arrays.items()}
        rows = np.flatnonzero((sources >= 0) & (stored["done"][sources] == 1))
        self.file = os.open(path, os.O_RDWR)
        try:
            for name in sorted(stored, key="done".__eq__):  # the mark comes last
                for row in rows:
                    self._write_rows(name, int(row), stored[name][sources[row]])
            os.fsync(self.file)
        finally:
            os.close(self.file)

    def _check_free_space(self, files: int, freed: int) -> None:
        """Raise UserError if the disk cannot hold this file, or this number of files of its size.

        freed: bytes on the disk of the file that it replaces.
        """
        needed = files * self.nbytes()
        free = shutil.disk_usage(self.path.parent).free + freed
        if needed > free:
            several = f" in {files} files" if files > 1 else ""
            raise UserError(
                f"{self.path}: needs {needed / 1e9:.1f} GB{several} and the disk has {free / 1e9:.1f} GB free; "
                "free some space, give --grid native or --dtype uint8, or --out on another disk"
            )

    def nbytes(self) -> int:
        """Bytes of the rows."""
        return data_bytes(self.shape, self.dtype)

    def missing(self) -> np.ndarray:
        """The rows that are not done, (M,) int64."""
        return np.flatnonzero(self.arrays["done"].map(self.path) != 1)

    def stored_photo_files(self) -> np.ndarray:
        """The entries of the file, (N, 2) int64: see photo_files.py. Zeros in a file of an older version."""
        if "photo_files" not in self.arrays:
            return np.zeros((self.shape[0], 2), np.int64)
        return np.array(self.arrays["photo_files"].map(self.path))

    def write(self, rows: np.ndarray, features: Tensor, pooled: Tensor, scales: Tensor | None = None) -> None:
        """Queue rows (B,) int64 with features (B, h, w, C) and pooled (B, C) float32, on the CPU.

        A file of uint8 takes codes, with their scales (B, h, w) float32.
        Raises UserError if the features are not finite in the file's dtype, or if earlier rows could not be written.
        """
        assert (self.dtype == np.uint8) == (scales is not None), "codes come with their scales"
        if not len(rows):
            return
        features = features.to(getattr(torch, str(self.dtype)))
        # aminmax propagates NaN and is 50 times faster than isfinite of all values.
        if not torch.stack((features if scales is None else scales).aminmax()).isfinite().all():
            raise UserError(
                f"{self.path}: features too large for {self.dtype}, or not finite; "
                "give --dtype float32 --overwrite, or check the --weights"
            )
        values = {"features": features, "pooled": pooled} | ({} if scales is None else {"scales": scales})
        self._raise_failure()
        arrays = {name: _as_array(value) for name, value in values.items()}
        if self.photo_files is not None and "photo_files" in self.arrays:
            arrays["photo_files"] = self.photo_files[rows]
        self.queue.put(_Batch(np.asarray(rows), arrays))

    def _write_queue(self) -> None:
        """The thread: write all queued batches together, so that a slow disk syncs less often."""
        closing = False
        while not closing:
            items = [self.queue.get()]
            while not self.queue.empty():
                items.append(self.queue.get())
            closing = items[-1] is None
            try:
                if self.failure is None:
                    self._commit([batch for batch in items if batch is not None])
            except Exception as error:  # of any kind: if the thread ended, `write` would wait for ever
                self.failure = error  # the next call raises it, and nothing more is written

    def _commit(self, batches: list[_Batch]) -> None:
        for batch in batches:
            for i, row in enumerate(batch.rows):
                for name, values in batch.values.items():
                    self._write_rows(name, row, values[i])
        fdatasync(self.file)  # the rows must be on disk before they are marked as done
        for batch in batches:
            self._mark_done(batch.rows)

    def _mark_done(self, rows: np.ndarray) -> None:
        """Mark consecutive rows with one write, so that after a kill either all rows of a batch are done or none.

        A batch that is encoded again then has the same photos, and bit-equal features.
        """
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            if len(run):
                self._write_rows("done", run[0], np.ones(len(run), np.uint8))

    def _write_rows(self, name: str, first_row: int, values: np.ndarray) -> None:
        array = self.arrays[name]
        offset = array.offset + int(first_row) * array.row_bytes
        data = values.reshape(-1).view(np.uint8).data
        while data:  # a write may be partial when the disk fills up
            written = os.pwrite(self.file, data, offset)
            data = data[written:]
            offset += written

    def _raise_failure(self) -> None:
        if self.failure:
            with write_errors(self.path, WRITE_REMEDY):
                raise self.failure

    def close(self) -> None:
        """Wait until all queued rows are on disk. Raises UserError if they could not be written."""
        self.queue.put(None)
        self.thread.join()
        try:
            os.fsync(self.file)
        except OSError as error:
            self.failure = self.failure or error
        os.close(self.file)
        self._raise_failure()


def _as_array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.numpy())


def mark_not_done(path: Path, rows: Iterable[int]) -> None:
    """Mark rows of a feature file as not done: the next extraction encodes them again.

    Raises UserError if the file cannot be written.
    """
    done = read_layout(path).arrays["done"]
    with write_errors(path, WRITE_REMEDY), open(path, "r+b") as file:
        for row in rows:
            file.seek(done.offset + int(row))
            file.write(b"\0")
