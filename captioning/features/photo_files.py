"""What a feature file records of each photo's file, by which a photo that has changed since is told.

An entry is the file's size in bytes and its modification time in ns, or a hash of its content, which is negative. An
entry of zeros is not known: of a file that could not be found, or in a feature file of an older version.

Letters: N photos, M rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HASH_BYTES = 8  # of which a bit becomes the sign
HASHING_THREADS = 8


def stat_photos(paths: Iterable[str]) -> np.ndarray:
    """Bytes and modification time (ns) of photo files, (N, 2) int64; zeros for a file that cannot be found."""
    return np.array([_stat(path) for path in paths], np.int64).reshape(-1, 2)


def _stat(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return 0, 0
    return status.st_size, max(status.st_mtime_ns, 0)


def with_hashes(photo_files: np.ndarray, paths: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """The entries (N, 2) of `stat_photos`, those of `rows` (M,) int64 with a hash of the content."""
    photo_files = photo_files.copy()
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        photo_files[rows, 1] = [*threads.map(_hash, (paths[row] for row in rows))]
    return photo_files


def _hash(path: str) -> int:
    """A negative number; 0 for a file that cannot be read."""
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError):
        return 0
    digest = hashlib.blake2b(content, digest_size=HASH_BYTES).digest()
    return int.from_bytes(digest, "big") >> 1 | ~(2**63 - 1)


def changed_photos(stored: np.ndarray, photo_files: np.ndarray, paths: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """Those of `rows` (M,) int64 whose photo is another than when its entry was stored.

    stored (N, 2) int64: the entries of a feature file. photo_files: from `stat_photos`. A photo of which either is not
    known counts as unchanged. An entry with a hash is compared by it, and its file is read if it has the same size.
    """
    known = rows[stored[rows].any(1) & photo_files[rows].any(1)]
    hashed = known[(stored[known, 1] < 0) & (stored[known, 0] == photo_files[known, 0])]
    return known[(stored != with_hashes(photo_files, paths, hashed))[known].any(1)]
