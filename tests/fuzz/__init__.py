"""Fuzz targets, each a program of its own; tests/torture/test_fuzz.py runs them for a while."""

import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

# What an input is written to, thousands of times a second: in memory where there is such a place.
_HOLDER = tempfile.TemporaryDirectory(prefix="kantu-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
FOLDER = Path(_HOLDER.name)


def lay_down(seeds: Iterable[bytes]) -> None:
    """The first inputs, into the folder that the command line names."""
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
