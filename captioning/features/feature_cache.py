"""features.h5: the one file that knows its layout.

    features (N, h, w, C) float16 or float32: 14x14, or the CNN's own cells with --grid native
    pooled   (N, C) float32: the mean of the 14x14
    images   (N,) utf-8: the photos' ids, in the order of captions.jsonl
    done     (N,) uint8: 1 once the row is safely on disk
    attributes: format, encoder, weights, weights_sha256, image_size, grid, native_grid, mean, std, precision,
        scaled_decoding, nvjpeg, torch

Every array is one contiguous block, allocated when the file is made, so that its place never moves: rows are written
and read at their offsets, by any number of processes, without a lock, and a kill can spoil no HDF5 metadata.

Letters: N photos, B photos of a batch, h x w cells, C channels.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from captioning.encoders.grid import SIDE, Grid, grid_pooling, native_indices
from captioning.errors import UserError
from captioning.features.hdf5_layout import ContiguousArray, own_array, read_blocks
from captioning.runtime.library_errors import reason
from captioning.runtime.signals import defer_signals
from captioning.runtime.string_array import StringArray

FORMAT = "kantu features 1"
IN_FLIGHT = 4  # batches handed over and not yet on the disk; as many again may be on their way there
SYNC = getattr(os, "fdatasync", os.fsync)  # macOS has only the second


def describe_features(recipe: dict, native_grid: tuple[int, int], grid: str, precision: str) -> dict:
    """The attributes of a feature file, from an encoder's recipe."""
    transform = recipe["transform"]
    return {
        "format": FORMAT,
        "encoder": recipe["name"],
        "weights": recipe["weights"],
        "image_size": transform["image_size"],
        "mean": list(transform["mean"]),
        "std": list(transform["std"]),
        "grid": grid,
        "native_grid": list(native_grid),
        "precision": precision,
        "scaled_decoding": transform.get("scaled_decoding", False),
        "nvjpeg": transform.get("nvjpeg", False),
        "weights_sha256": recipe["sha256"],  # the last to be compared: that of random weights depends on all the others
    }


class FeatureWriter:
    """Makes features.h5, or goes on with one of the same recipe and photos.

    Raises UserError where there is a file of another recipe, no room on the disk, or no leave to write.
    """

    def __init__(self, path: Path, ids: Sequence[str], attributes: dict, channels: int, dtype: str, overwrite: bool):
        self.path, self.dtype = path, np.dtype(dtype)
        side = (SIDE, SIDE) if attributes["grid"] == "14" else tuple(attributes["native_grid"])
        self.shape = (len(ids), *side, channels)
        attributes = {**attributes, "dtype": dtype}
        with _writing(path):
            if path.exists() and not overwrite:
                self._check_same(ids, attributes)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._check_room()
                self._make(ids, attributes)
            self.blocks = _read_layout(path)[0]
            self.file = os.open(path, os.O_RDWR)
        self.waiting: queue.Queue = queue.Queue(IN_FLIGHT)
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._write_what_waits, name="writer", daemon=True)
        self.thread.start()

    def _check_same(self, ids: Sequence[str], wanted: dict) -> None:
        blocks, found, found_ids = _read_layout(self.path)
        wanted = {**wanted, "shape": list(self.shape[1:])}
        older = {"scaled_decoding": False, "nvjpeg": False}  # a file made before there was the choice does not say
        block = blocks["features"]
        found = {**older, **found, "dtype": str(block.dtype), "shape": list(block.shape[1:])}
        remedy = "give --overwrite to replace it, or --out for another file"
        for name, value in wanted.items():
            if found.get(name) != value:
                raise UserError(f"{self.path}: was made with {name} {found.get(name)}, not {value}; {remedy}")
        if [*found_ids] != [*ids]:
            known = f"{len(set(ids).intersection(found_ids)):,} of its {len(found_ids):,} are among our {len(ids):,}"
            raise UserError(f"{self.path}: holds the photos of another data set ({known}); {remedy}")

    def _check_room(self) -> None:
        needed = self.nbytes()
        freed = self.path.stat().st_blocks * 512 if self.path.exists() else 0
        free = shutil.disk_usage(self.path.parent).free + freed
        if needed > free:
            raise UserError(
                f"{self.path}: needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; "
                "make room, give --grid native, or --out on another disk"
            )

    def nbytes(self) -> int:
        """Bytes of features and pooled."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize + self.shape[0] * self.shape[-1] * 4

    def _make(self, ids: Sequence[str], attributes: dict) -> None:
        """All metadata is written here, under a temporary name, before the first photo."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.unlink(missing_ok=True)
        names = [id.encode() for id in ids]  # of a fixed length: HDF5 reads a damaged heap of others for ever
        with open(temporary, "xb") as file:  # HDF5 itself would crash where the system refuses it the place
            file.write(bytes(2**16 + len(names) * max(map(len, names))))
            file.truncate(file.tell() + self.nbytes())
            os.fsync(file.fileno())
        with h5py.File(temporary, "w", libver=("earliest", "v110")) as file:
            _allocate(file, "features", self.shape, self.dtype)
            _allocate(file, "pooled", (self.shape[0], self.shape[-1]), np.dtype("float32"))
            _allocate(file, "done", self.shape[:1], np.dtype("uint8"))
            file.create_dataset("images", data=names, dtype=h5py.string_dtype("utf-8", max(map(len, names))))
            for name, value in {**attributes, "torch": str(torch.__version__)}.items():
                file.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def missing(self) -> np.ndarray:
        """Rows still to be done, (M,) int64."""
        return np.flatnonzero(self.blocks["done"].map(self.path) != 1)

    def write(self, rows: np.ndarray, features: Tensor, pooled: Tensor) -> None:
        """rows (B,) int64; features (B, h, w, C); pooled (B, C) float32. A thread writes them while the next are made.

        Raises UserError where these are not finite, or where rows handed over before could not be written.
        """
        if not len(rows):
            return
        features = features.to(getattr(torch, str(self.dtype)))
        if not torch.stack(features.aminmax()).isfinite().all():  # both are NaN where one value is; 50 times faster
            raise UserError(
                f"{self.path}: features too large for {self.dtype}, or not finite; "
                "give --dtype float32 --overwrite, or check the --weights"
            )
        features = np.ascontiguousarray(features.numpy())
        pooled = np.ascontiguousarray(pooled.numpy())
        self._raise_failure()
        self.waiting.put((np.asarray(rows), features, pooled))

    def _write_what_waits(self) -> None:
        """All batches that wait are written together: a slow disk then syncs less often."""
        closing = False
        while not closing:
            batches = [self.waiting.get()]
            while not self.waiting.empty():
                batches.append(self.waiting.get())
            closing = batches[-1] is None
            try:
                if self.failure is None:
                    self._commit([batch for batch in batches if batch])
            except Exception as error:  # whatever it is: a thread that died would leave `write` waiting for ever
                self.failure = error  # from here on nothing is written: the next call says so

    def _commit(self, batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        for rows, features, pooled in batches:
            for place, row in enumerate(rows):
                self._put("features", row, features[place])
                self._put("pooled", row, pooled[place])
        SYNC(self.file)  # first the rows, then the word that they are there
        for rows, _, _ in batches:
            self._mark_done(rows)

    def _raise_failure(self) -> None:
        if self.failure:
            with _writing(self.path):
                raise self.failure

    def _mark_done(self, rows: np.ndarray) -> None:
        """Neighbours in one write: a kill leaves a batch done or not done, and it is made anew as the same batch."""
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            if len(run):
                self._put("done", run[0], np.ones(len(run), np.uint8))

    def _put(self, name: str, row: int, values: np.ndarray) -> None:
        block = self.blocks[name]
        data, offset = memoryview(values.reshape(-1).view(np.uint8)), block.offset + int(row) * block.row_bytes
        while data:  # a write may be short where the disk fills up
            written = os.pwrite(self.file, data, offset)
            data, offset = data[written:], offset + written

    def close(self) -> None:
        """Everything handed over is on the disk. Raises UserError where it is not."""
        self.waiting.put(None)
        self.thread.join()
        try:
            os.fsync(self.file)
        except OSError as error:
            self.failure = self.failure or error
        os.close(self.file)
        self._raise_failure()


def forget_rows(path: Path, rows: Sequence[int]) -> None:
    """These rows are not done: the next extraction makes them anew."""
    block = _read_layout(path)[0]["done"]
    with _writing(path), open(path, "r+b") as file:
        for row in rows:
            file.seek(block.offset + int(row))
            file.write(b"\0")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({reason(error)}); mend that and run the same command, or give --out elsewhere"
        ) from None


def _allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """A contiguous dataset whose place is fixed now; features are not filled, since every row will be written."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_obj_track_times(False)  # the same photos give the same file, to the bit
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_ALLOC if name == "done" else h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, plan)


def _read_layout(path: Path) -> tuple[dict[str, ContiguousArray], dict, StringArray]:
    """The blocks, the attributes and the ids of a feature file; no lock is taken, nothing stays open."""
    try:
        with defer_signals(), h5py.File(path, "r", locking=False) as file:
            attributes = {_plain(name): _plain(value) for name, value in file.attrs.items()}
            if attributes.get("format") != FORMAT:
                raise KeyError(f"format {attributes.get('format')!r}, not the {FORMAT!r} of this version of Kantu")
            blocks, images = read_blocks(file, attributes, os.path.getsize(path)), own_array(file, "images")
            if images.shape != blocks["done"].shape:
                raise ValueError("features and images of different photos")
            ids = StringArray(images.asstr()[:])
    except EOFError:
        raise UserError(f"{path}: is cut short; extract again with --overwrite") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make it with: python extract_features.py DATA") from None
    except Exception as error:  # HDF5 reports a foreign or damaged file in many ways
        remedy = "check its permissions, or extract again with --overwrite"
        raise UserError(f"{path}: cannot be read as a Kantu feature file ({reason(error)}); {remedy}") from None
    return blocks, attributes, ids


def _plain(value: object) -> object:
    value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
    return value.decode("utf-8") if isinstance(value, bytes) else value


class FeatureReader:
    """Rows of a finished feature file as Grids on the CPU. Safe in any number of processes, however they start.

    Of a 14x14 file only the rows and columns that ARE native cells are read, where there are such.
    """

    def __init__(self, path: Path, pin: bool = False):
        """pin: read into memory that a GPU can fetch from while it computes."""
        self.path, self.pin = Path(path), pin
        self.blocks, self.attributes, self.ids = _read_layout(self.path)
        _, self.height, self.width, self.channels = self.blocks["features"].shape
        native, self.places = self.attributes["native_grid"], None
        places = [native_indices(cells) for cells in native]
        if None not in places and [self.height, self.width] != native:
            (self.height, self.width), self.places = native, np.ix_(*places)
        self._maps: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}  # each process maps the file anew

    def rows_of(self, ids: Iterable[str]) -> np.ndarray:
        """(N,) int64: where each photo is in the file; -1 where it is not."""
        rows = {photo: row for row, photo in enumerate(self.ids)}  # not kept: it takes 200 bytes a photo
        return np.fromiter((rows.get(id, -1) for id in ids), np.int64)

    def present(self, rows: np.ndarray, allowed: float, dataset: Path) -> np.ndarray:
        """(N,) bool: which photos are done, given the row of each. Raises UserError where more than the share
        `allowed` is not."""
        there = (rows >= 0) & self.done()[rows]
        missing = int((~there).sum())
        if missing > allowed * len(rows):
            known = (rows >= 0).any()
            wrong = "" if known else "of another data set: "
            raise UserError(
                f"{self.path}: {wrong}no features for {missing:,} of {len(rows):,} images; "
                f"run: python extract_features.py {dataset}" + ("" if known else " --overwrite")
            )
        return there

    def _map(self, name: str) -> np.ndarray:
        if name not in self._maps:
            self._maps[name] = np.asarray(self.blocks[name].map(self.path))  # numpy takes rows of a memmap slowly
        return self._maps[name]

    def done(self) -> np.ndarray:
        """(N,) bool: the rows that are there."""
        return self._map("done") == 1

    def read(self, rows: np.ndarray) -> Grid:
        """The feature maps of rows (B,) int64."""
        block = self._map("features")
        shape = len(rows), self.height, self.width, self.channels
        cells = torch.empty(shape, dtype=getattr(torch, str(block.dtype)), pin_memory=self.pin)
        for cell, row in zip(cells.numpy(), rows, strict=True):
            cell[:] = block[row] if self.places is None else block[row][self.places]
        return Grid(self._finite(cells, rows).flatten(1, 2), grid_pooling(self.height, self.width))

    def read_stored(self, rows: np.ndarray, name: str = "features") -> np.ndarray:
        """Rows (B,) int64 with all that is stored of them (B, h w C) or, pooled, (B, C), finite or not."""
        block = self._map(name)
        return block.reshape(len(block), -1)[rows]

    def read_pooled(self, rows: np.ndarray) -> Grid:
        """The mean of each map alone, as a grid of one cell: all that a decoder without attention looks at."""
        return Grid(self._finite(torch.from_numpy(self._map("pooled")[rows]), rows)[:, None], grid_pooling(1, 1))

    def _finite(self, features: Tensor, rows: np.ndarray) -> Tensor:
        """The features of these rows (B, ...). Raises UserError where one is not finite, as all it touches would be."""
        if not torch.stack(features.aminmax()).isfinite().all():
            bad = next(row for row, values in zip(rows, features, strict=True) if not values.isfinite().all())
            raise UserError(
                f"{self.path}: the features of {self.ids[bad]} are not finite; extract_features.py --verify finds all "
                "such, and the same command without --verify makes them anew"
            )
        return features
