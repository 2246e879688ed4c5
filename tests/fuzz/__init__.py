"""Fuzz targets. Each is a program; tests/torture/test_fuzz.py runs them for a limited time."""

import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

# Inputs are written thousands of times a second: to a file system in memory, if there is one.
_HOLDER = tempfile.TemporaryDirectory(prefix="kantu-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
FOLDER = Path(_HOLDER.name)


def write_seeds(seeds: Iterable[bytes]) -> None:
    """Write the first inputs into the corpus folder, the first argument of the command line."""
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
