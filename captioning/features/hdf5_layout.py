"""Arrays of an HDF5 file that lie in that very file, and where.

HDF5 lets a name stand for an array of another file, or for the bytes of any file at all: with a feature file from
someone else that would be any file of this machine. None of that is followed.

Letters: N photos, h x w cells, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from captioning.encoders.grid import SIDE

TEXTS = ("encoder", "weights", "weights_sha256", "precision")  # attributes
MOST_CELLS = 1000  # of a side of a CNN's map


@dataclass(frozen=True)
class ContiguousArray:
    """Where an array lies in the file."""

    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def map(self, path: Path) -> np.ndarray:
        return np.memmap(path, self.dtype, "r", self.offset, self.shape)


def own_array(file: h5py.File, name: str) -> h5py.Dataset:
    """The array of this name. Raises KeyError without one, ValueError where it lies in another file."""
    array = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(array, h5py.Dataset) or array.is_virtual or array.external:
        raise ValueError(f"no array {name} of its own")
    return array


def read_blocks(file: h5py.File, attributes: dict, size: int) -> dict[str, ContiguousArray]:
    """features (N, h, w, C), pooled (N, C) and done (N,), each contiguous in the file, which has `size` bytes.

    Raises KeyError or ValueError for anything else, and where the attributes do not fit; EOFError for a file cut short.
    """
    blocks = {
        name: _block(file, name, dtypes)
        for name, dtypes in (("features", ("float16", "float32")), ("pooled", ("float32",)), ("done", ("uint8",)))
    }
    shape, native = blocks["features"].shape, attributes.get("native_grid")
    if len(shape) != 4 or not all(shape):
        raise ValueError(f"features of shape {shape}")
    if blocks["pooled"].shape != (shape[0], shape[3]) or blocks["done"].shape != shape[:1]:
        raise ValueError("features, pooled and done of different photos")
    if native is None:
        raise ValueError("no native_grid")
    fits = isinstance(native, list) and len(native) == 2 and list(shape[1:3]) in (native, [SIDE, SIDE])
    if not fits or not all(cells in range(1, MOST_CELLS + 1) for cells in native):
        raise ValueError(f"native_grid {native}")
    if strange := [name for name in TEXTS if not isinstance(attributes.get(name), str)]:
        raise ValueError(f"no {strange[0]}")
    if any(block.offset + shape[0] * block.row_bytes > size for block in blocks.values()):
        raise EOFError(f"is cut short ({size:,} bytes)")
    return blocks


def _block(file: h5py.File, name: str, dtypes: tuple[str, ...]) -> ContiguousArray:
    array = own_array(file, name)
    offset = array.id.get_offset()
    if offset is None or str(array.dtype) not in dtypes:
        raise ValueError(f"{name} is no block of {' or '.join(dtypes)}")
    return ContiguousArray(offset, array.shape, array.dtype)
