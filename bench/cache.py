"""How fast features.h5 is written and read, beside the plain way and beside what the system can do at all.

    python bench/cache.py FOLDER                      a folder on the disk in question; 3.2 GB are written there
    python bench/cache.py FOLDER --photos 500

The plain way is the tutorials': one HDF5 file that stays open, a photo a write and a photo a read, one process. What
the system can do is os.pread of the very bytes from a cold file, and a copy from numpy's memmap from the page cache.
Every figure is the best of --rounds rounds in which all ways take their turns; what is read is checked before.

Then, for files of more and more rows, what a row costs and how much memory the process takes, mapped pages included.
These files are sparse: only --photos rows of each, at random places, are written, and read again in another order.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path
from timeit import timeit

import h5py
import numpy as np
import torch
import tyro
from tyro.conf import Positional

from captioning.encoders.grid import Grid, grid_pooling
from captioning.encoders.images import in_batches
from captioning.features.feature_cache import FeatureReader, FeatureWriter, describe_features
from captioning.runtime.meter import most_resident

RECIPE = {
    "name": "bench",
    "weights": "none",
    "sha256": "",
    "transform": {"image_size": 256, "mean": (0, 0, 0), "std": (1, 1, 1)},
}


@dataclass(frozen=True)
class Bench:
    folder: Positional[Path]  # to write in; what is written is removed
    photos: int = 2000
    channels: int = 2048  # of the 8x8 cells of a 256-pixel photo
    batch_size: int = 32  # photos
    rounds: int = 3
    sizes: tuple[int, ...] = (1_000, 10_000, 100_000)  # rows


def main(bench: Bench) -> None:
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    cells = torch.randn(bench.batch_size, 64, bench.channels).half()
    grid = Grid(cells, grid_pooling(8, 8))
    paths = {name: bench.folder / f"bench-{name}.h5" for name in ("14", "native", "plain")}
    try:
        f14 = grid.spread(cells.float()).half().view(-1, 14, 14, bench.channels)
        native = cells.view(-1, 8, 8, bench.channels)
        print("writing, and syncing at the end")
        table(
            "plain h5py, 14x14",
            bench,
            f14[0].nbytes,
            timeit(lambda: write_plainly(bench, paths["plain"], f14), number=1),
        )
        table("ours, 14x14", bench, f14[0].nbytes, timeit(lambda: write(bench, paths["14"], "14", f14), number=1))
        table(
            "ours, native",
            bench,
            native[0].nbytes,
            timeit(lambda: write(bench, paths["native"], "native", native), number=1),
        )
        plan = in_batches(random.permutation(bench.photos), bench.batch_size)
        for cold in (True, False):
            print("random photos, from a cold file" if cold else "random photos, from the page cache")
            read_all(bench, paths, plan, cold)
    finally:
        for path in paths.values():
            path.unlink(missing_ok=True)
    print(
        f"a 14x14 file of so many rows, {bench.photos} written at random places and read from the page cache; "
        f"{14 * 14 * 2 * bench.channels:,} bytes a photo written, {8 * 8 * 2 * bench.channels:,} read"
    )
    print(f"{'rows':>24}  {'size':>8}  {'made in':>7}  {'written':>24}  {'opened in':>9}  {'read':>24}  most memory")
    for size in bench.sizes:
        process = multiprocessing.get_context("spawn").Process(target=grow, args=(bench, size))
        process.start()  # each has a memory of its own
        process.join()


class SparseWriter(FeatureWriter):
    """Makes files that the disk has no room for."""

    def _check_room(self) -> None:
        pass


def grow(bench: Bench, size: int) -> None:
    torch.set_num_threads(1)
    path, began = bench.folder / "bench-sparse.h5", time.perf_counter()
    random = np.random.default_rng(0)
    places = random.choice(size, min(bench.photos, size), replace=False)
    features = torch.randn(bench.batch_size, 14, 14, bench.channels).half()
    try:
        ids, attributes = [str(number) for number in range(size)], describe_features(RECIPE, (8, 8), "14", "float32")
        writer = SparseWriter(path, ids, attributes, bench.channels, "float16", True)
        made, began = time.perf_counter() - began, time.perf_counter()
        for rows in in_batches(np.sort(places), bench.batch_size):
            writer.write(rows, features[: len(rows)], features[: len(rows)].float().mean((1, 2)))
        writer.close()
        written, began = len(places) / (time.perf_counter() - began), time.perf_counter()
        reader = FeatureReader(path)
        opened, began = time.perf_counter() - began, time.perf_counter()
        for rows in in_batches(random.permutation(places), bench.batch_size):
            reader.read(rows)
        read = len(places) / (time.perf_counter() - began)
        moved = [
            f"{rate:5,.0f} photos/s {rate * cells * 2 * bench.channels / 1e6:5,.0f} MB/s"
            for rate, cells in ((written, 14 * 14), (read, 8 * 8))
        ]
        print(
            f"{size:24,}  {path.stat().st_size / 1e9:5.1f} GB  {made * 1e3:4.0f} ms  {moved[0]}  "
            f"{opened * 1e3:6.0f} ms  {moved[1]}  {most_resident() / 1e6:8.0f} MB"
        )
    finally:
        path.unlink(missing_ok=True)


def write(bench: Bench, path: Path, grid: str, features: torch.Tensor) -> None:
    ids = [str(number) for number in range(bench.photos)]
    attributes = describe_features(RECIPE, (8, 8), grid, "float32")
    writer = FeatureWriter(path, ids, attributes, bench.channels, "float16", overwrite=True)
    pooled = features.float().mean((1, 2))
    for rows in in_batches(np.arange(bench.photos), bench.batch_size):
        writer.write(rows, features[: len(rows)], pooled[: len(rows)])
    writer.close()


def write_plainly(bench: Bench, path: Path, features: torch.Tensor) -> None:
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("features", (bench.photos, *features.shape[1:]), "float16")
        for photo in range(bench.photos):
            dataset[photo] = features[photo % bench.batch_size].numpy()
        file.flush()
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def read_all(bench: Bench, paths: dict[str, Path], plan: list[np.ndarray], cold: bool) -> None:
    """Each way is made anew for every round: what it has mapped, the system would not forget."""
    block = FeatureReader(paths["native"]).blocks["features"]

    def pread() -> None:
        with open(paths["native"], "rb", buffering=0) as file:
            for rows in plan:
                whole = np.empty((len(rows), block.row_bytes), np.uint8)
                for into, row in zip(whole, rows, strict=True):
                    os.preadv(file.fileno(), [into], block.offset + int(row) * block.row_bytes)

    def copy() -> None:
        mapped = block.map(paths["native"])
        for rows in plan:
            whole = np.empty((len(rows), *block.shape[1:]), np.float16)
            for into, row in zip(whole, rows, strict=True):
                into[:] = mapped[row]

    def ours(name: str) -> None:
        reader = FeatureReader(paths[name])
        for rows in plan:
            reader.read(rows)

    def plainly() -> None:
        with h5py.File(paths["plain"]) as file:
            for rows in plan:
                torch.stack([torch.from_numpy(file["features"][row]) for row in rows])

    ways = {
        "plain h5py, 14x14": (plainly, "plain"),
        "ours, of a 14x14 file": (lambda: ours("14"), "14"),
        "ours, of a native file": (lambda: ours("native"), "native"),
        "os.pread of it": (pread, "native"),
        "memmap copy of it": (copy, "native"),
    }
    one, other = (FeatureReader(paths[name]).read(plan[0]).cells for name in ("14", "native"))
    np.testing.assert_array_equal(one, other)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(bench.rounds):
        for way, (read, name) in ways.items():
            forget(paths[name]) if cold else warm(paths[name])
            best[way] = min(best[way], timeit(read, number=1))
    for way, seconds in best.items():
        table(way, bench, 14 * 14 * 2 * bench.channels if way.startswith("plain") else block.row_bytes, seconds)
    against = "os.pread of it" if cold else "memmap copy of it"
    print(
        f"{'':>24}  a native file is read at {best[against] / best['ours, of a native file']:.0%} of the speed of "
        f"{against.removesuffix(' of it')}, and {best['plain h5py, 14x14'] / best['ours, of a native file']:.1f} "
        "times as fast as the plain way"
    )


def forget(path: Path) -> None:
    """The system drops what it has of this file in memory."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(path: Path) -> None:
    with open(path, "rb") as file:
        while file.read(1 << 24):
            pass


def table(way: str, bench: Bench, size: int, seconds: float) -> None:
    print(
        f"{way:>24}  {bench.photos / seconds:8,.0f} photos/s {bench.photos * size / seconds / 1e6:8,.0f} MB/s "
        f"{size:9,} bytes a photo"
    )


if __name__ == "__main__":
    main(tyro.cli(Bench))
