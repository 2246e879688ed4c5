"""The layout of features.h5.

    features (N, h, w, C) float16 or float32: 14x14 cells, or the CNN's own with --grid native; or uint8 codes of them
    pooled   (N, C) float32: the mean of the 14x14 cells; or class vectors, which the attribute `pooled` says
    scales   (N, h, w) float32: the scale of each cell; only with uint8 codes, which quantization.py defines
    images   (N,) utf-8: the photos' ids, in the order of captions.jsonl
    done     (N,) uint8: 1 once the row is safely on disk
    photo_files (N, 2) int64: bytes and modification time (ns) of the photo's file; zeros or absent if not known
    attributes: format, encoder, weights, weights_sha256, image_size, grid, native_grid, mean, std, precision,
        scaled_decoding, nvjpeg, decoding, interpolation, pooled, view, torch; with uint8 codes: quantization

Every array is contiguous and allocated when the file is created, so its offset never changes. Any number of processes
read and write rows at their offsets without a lock, and a kill cannot damage HDF5 metadata.

HDF5 lets a name refer to an array in another file, or to the bytes of any file. A feature file from someone else could
thereby read any file of this machine, so such references are rejected.

Letters: N photos, h x w cells, C channels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from captioning.encoders.grid import GRID_SIZE
from captioning.errors import UserError
from captioning.runtime.library_errors import reason
from captioning.runtime.signals import defer_signals
from captioning.runtime.string_array import StringArray

FORMAT = "kantu features 1"
QUANTIZATION = "square root, one scale per cell"  # the attribute `quantization` of a file with uint8 codes
DTYPES = {"features": ("float16", "float32", "uint8"), "pooled": ("float32",), "done": ("uint8",)}
SCALES_DTYPE = "float32"
PHOTO_FILES_DTYPE = "int64"
TEXT_ATTRIBUTES = ("encoder", "weights", "weights_sha256", "precision")
MAX_CELLS_PER_SIDE = 1000
HEADER_BYTES = 2**16  # more than the metadata takes


@dataclass(frozen=True)
class ContiguousArray:
    """Where an array lies in the file."""

    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def map(self, path: Path) -> np.ndarray:
        """The array as a read-only memory map of the file."""
        return np.memmap(path, self.dtype, "r", self.offset, self.shape)


class Layout(NamedTuple):
    """The metadata of a feature file."""

    arrays: dict[str, ContiguousArray]  # features, pooled, done; with uint8 codes scales; of newer files photo_files
    attributes: dict
    ids: StringArray  # of the photos, one per row


def data_arrays(shape: Sequence[int], dtype: np.dtype) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The shapes and dtypes of the arrays that rows are written to, for features of this shape (N, h, w, C)."""
    arrays = {"features": (tuple(shape), dtype), "pooled": ((shape[0], shape[-1]), np.dtype("float32"))}
    if dtype == np.uint8:
        arrays["scales"] = (tuple(shape[:-1]), np.dtype(SCALES_DTYPE))
    arrays["photo_files"] = ((shape[0], 2), np.dtype(PHOTO_FILES_DTYPE))
    return arrays


def data_bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    """Bytes of these arrays."""
    return sum(math.prod(array) * dtype.itemsize for array, dtype in data_arrays(shape, dtype).values())


def create_file(path: Path, shape: tuple[int, ...], dtype: np.dtype, ids: Sequence[str], attributes: dict) -> None:
    """Create a feature file with no row done; it replaces an existing one.

    shape: (N, h, w, C) of features. All metadata is written here, to a temporary file that is then renamed.
    Raises OSError.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    names = [id.encode() for id in ids]
    longest = max(map(len, names))
    with open(temporary, "xb") as file:  # reserve the space first: HDF5 would crash if the system denied it
        file.write(bytes(HEADER_BYTES + len(names) * longest))
        file.truncate(file.tell() + data_bytes(shape, dtype))
        os.fsync(file.fileno())
    with h5py.File(temporary, "w", libver=("earliest", "v110")) as file:
        for name, (array_shape, array_dtype) in data_arrays(shape, dtype).items():
            _allocate(file, name, array_shape, array_dtype, filled=name == "photo_files")
        _allocate(file, "done", shape[:1], np.dtype("uint8"), filled=True)
        # a fixed length: HDF5 can read a damaged heap of variable-length strings for ever
        file.create_dataset("images", data=names, dtype=h5py.string_dtype("utf-8", longest))
        for name, value in attributes.items():
            file.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype, filled: bool) -> None:
    """Create a contiguous dataset and allocate it now. filled: with zeros."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_obj_track_times(False)  # the same photos give the same file, bit by bit
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_ALLOC if filled else h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, properties)


def read_layout(path: Path) -> Layout:
    """Read a feature file's metadata, without a lock; the file is closed again.

    Raises UserError if the file is missing, truncated, damaged or not a feature file of this version.
    """
    try:
        with defer_signals(), h5py.File(path, "r", locking=False) as file:
            attributes = {_plain(name): _plain(value) for name, value in file.attrs.items()}
            if attributes.get("format") != FORMAT:
                raise ValueError(f"format {attributes.get('format')!r}, not the {FORMAT!r} of this version of Kantu")
            arrays = _read_arrays(file, attributes, os.path.getsize(path))
            images = _local_dataset(file, "images")
            if images.shape != arrays["done"].shape:
                raise ValueError("features and images have different lengths")
            ids = StringArray(images.asstr()[:])
    except EOFError:
        raise UserError(f"{path}: is truncated; extract again with --overwrite") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; create it with: python extract_features.py DATA") from None
    except Exception as error:  # HDF5 reports a foreign or damaged file in many ways
        remedy = "check its permissions, or extract again with --overwrite"
        raise UserError(f"{path}: cannot be read as a Kantu feature file ({reason(error)}); {remedy}") from None
    return Layout(arrays, attributes, ids)


def _plain(value: object) -> object:
    """An HDF5 attribute as plain Python data."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _read_arrays(file: h5py.File, attributes: dict, size: int) -> dict[str, ContiguousArray]:
    """Locate features, pooled, done, photo_files if present and, with uint8 codes, scales in a file of `size` bytes.

    Raises ValueError if one is missing, not contiguous, or contradicts another or the attributes; EOFError if the
    file is truncated.
    """
    arrays = {name: _locate(file, name, dtypes) for name, dtypes in DTYPES.items()}
    shape = arrays["features"].shape
    if arrays["features"].dtype == np.uint8:
        if attributes.get("quantization") != QUANTIZATION:
            raise ValueError(f"uint8 codes of quantization {attributes.get('quantization')!r}")
        arrays["scales"] = _locate(file, "scales", (SCALES_DTYPE,))
        if arrays["scales"].shape != shape[:-1]:
            raise ValueError("features and scales have different shapes")
    if "photo_files" in file:
        arrays["photo_files"] = _locate(file, "photo_files", (PHOTO_FILES_DTYPE,))
        if arrays["photo_files"].shape != (shape[0], 2):
            raise ValueError("features and photo_files have different lengths")
    if len(shape) != 4 or not all(shape):
        raise ValueError(f"features of shape {shape}")
    if arrays["pooled"].shape != (shape[0], shape[3]) or arrays["done"].shape != shape[:1]:
        raise ValueError("features, pooled and done have different lengths")
    _check_native_grid(attributes.get("native_grid"), shape)
    for name in TEXT_ATTRIBUTES:
        if not isinstance(attributes.get(name), str):
            raise ValueError(f"no {name}")
    if any(array.offset + shape[0] * array.row_bytes > size for array in arrays.values()):
        raise EOFError
    return arrays


def _check_native_grid(native_grid: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError if features of this shape (N, h, w, C) do not fit the attribute."""
    if native_grid is None:
        raise ValueError("no native_grid")
    is_pair = isinstance(native_grid, list) and len(native_grid) == 2
    fits = is_pair and list(shape[1:3]) in (native_grid, [GRID_SIZE, GRID_SIZE])
    if not fits or not all(cells in range(1, MAX_CELLS_PER_SIDE + 1) for cells in native_grid):
        raise ValueError(f"native_grid {native_grid}")


def _locate(file: h5py.File, name: str, dtypes: tuple[str, ...]) -> ContiguousArray:
    dataset = _local_dataset(file, name)
    offset = dataset.id.get_offset()
    if offset is None or str(dataset.dtype) not in dtypes:
        raise ValueError(f"{name} is not a contiguous array of {' or '.join(dtypes)}")
    return ContiguousArray(offset, dataset.shape, dataset.dtype)


def _local_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """The dataset of this name. Raises ValueError if there is none, or if its data lies in another file."""
    dataset = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise ValueError(f"no array {name} in this file")
    return dataset
