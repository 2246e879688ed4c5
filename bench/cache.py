"""The speed of writing and reading features.h5, compared with plain h5py and with the limits of the system.

    python bench/cache.py FOLDER                      a folder on the disk to measure; 3.2 GB are written there
    python bench/cache.py FOLDER --photos 500

Plain h5py is what tutorials use: one open HDF5 file, one photo per write and per read, one process. The limits of the
system are os.pread of the same bytes from a cold file, and a copy from a numpy memmap from the page cache. Every time
is the best of --rounds rounds in which all methods run. What they read is checked first.

Main memory is where --features-on ram holds the rows. A batch for a GPU is gathered from there into a kept buffer;
before 0.2.0 it was gathered into fresh memory, and copied from there.

The next lines simulate which share of an epoch's reads is served from memory that holds a part of the rows: a fixed
part, and those read last (a least-recently-used cache, LRU).

The last table shows, for files with increasing numbers of rows, the time per row and the memory of the process,
including mapped pages. These files are sparse: only --photos random rows are written, and read in another order.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from timeit import timeit

import h5py
import numpy as np
import torch
import tyro
from synthetic import RECIPE
from tyro.conf import Positional

from captioning.encoders.grid import Grid, grid_pooling
from captioning.encoders.images import split_batches
from captioning.features.feature_files import FeatureFiles
from captioning.features.feature_placement import FileRows, HeldRows
from captioning.features.feature_reader import FeatureReader
from captioning.features.feature_writer import FeatureWriter
from captioning.features.recipe import describe_features
from captioning.runtime.meter import peak_resident_memory


@dataclass(frozen=True)
class Bench:
    folder: Positional[Path]  # to write to; everything written is removed
    photos: int = 2000
    channels: int = 2048  # of the features; the grid has 8x8 cells, as for a photo of 256 pixels
    batch_size: int = 32  # photos
    rounds: int = 3
    sizes: tuple[int, ...] = (1_000, 10_000, 100_000)  # rows
    parts: tuple[float, ...] = (0.3, 0.6, 0.9)  # of the rows, held in memory in the simulation
    simulated_rows: int = 20_000


def main(bench: Bench) -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    cells = torch.randn(bench.batch_size, 64, bench.channels).half()
    grid = Grid(cells, grid_pooling(8, 8))
    paths = {name: bench.folder / f"bench-{name}.h5" for name in ("14", "native", "plain")}
    try:
        features_14 = grid.spread(cells.float()).half().view(-1, 14, 14, bench.channels)
        native = cells.view(-1, 8, 8, bench.channels)
        print("writing, with a sync at the end")
        print_rate(
            "plain h5py, 14x14",
            bench,
            features_14[0].nbytes,
            timeit(lambda: write_with_h5py(bench, paths["plain"], features_14), number=1),
        )
        print_rate(
            "Kantu, 14x14",
            bench,
            features_14[0].nbytes,
            timeit(lambda: write(bench, paths["14"], "14", features_14), number=1),
        )
        print_rate(
            "Kantu, native",
            bench,
            native[0].nbytes,
            timeit(lambda: write(bench, paths["native"], "native", native), number=1),
        )
        plan = split_batches(rng.permutation(bench.photos), bench.batch_size)
        print_memory_rates(bench, paths["native"], plan)
        for cold in (True, False):
            print("random photos, from a cold file" if cold else "random photos, from the page cache")
            read_all(bench, paths, plan, cold)
    finally:
        for path in paths.values():
            path.unlink(missing_ok=True)
    for part in bench.parts:
        lru = lru_share(part, bench.simulated_rows)
        print(f"memory for {part:.0%} of the rows: fixed ones serve {part:.0%} of an epoch's reads, LRU {lru:.0%}")
    print(
        f"14x14 files, {bench.photos} random rows written and read from the page cache; "
        f"{14 * 14 * 2 * bench.channels:,} bytes per photo written, {8 * 8 * 2 * bench.channels:,} read"
    )
    print(f"{'rows':>24}  {'size':>8}  {'created':>7}  {'written':>24}  {'opened':>9}  {'read':>24}  peak memory")
    for size in bench.sizes:
        process = multiprocessing.get_context("spawn").Process(target=measure_size, args=(bench, size))
        process.start()  # one process per size, so that its memory can be measured
        process.join()


class SparseWriter(FeatureWriter):
    """Creates sparse files that would not fit on the disk if all rows were written."""

    def _check_free_space(self, files: int, freed: int) -> None:
        """The disk need not hold all rows."""


def measure_size(bench: Bench, size: int) -> None:
    """Write and read random rows of a sparse file with `size` rows, and print times and memory."""
    torch.set_num_threads(1)
    path = bench.folder / "bench-sparse.h5"
    started = time.perf_counter()
    rng = np.random.default_rng(0)
    written_rows = rng.choice(size, min(bench.photos, size), replace=False)
    features = torch.randn(bench.batch_size, 14, 14, bench.channels).half()
    try:
        ids = [str(number) for number in range(size)]
        attributes = describe_features(RECIPE, (8, 8), "14", "float32")
        writer = SparseWriter(path, ids, attributes, bench.channels, "float16", True)
        create_seconds = time.perf_counter() - started
        started = time.perf_counter()
        for rows in split_batches(np.sort(written_rows), bench.batch_size):
            writer.write(rows, features[: len(rows)], features[: len(rows)].float().mean((1, 2)))
        writer.close()
        write_rate = len(written_rows) / (time.perf_counter() - started)
        started = time.perf_counter()
        reader = FeatureReader(path)
        open_seconds = time.perf_counter() - started
        started = time.perf_counter()
        for rows in split_batches(rng.permutation(written_rows), bench.batch_size):
            reader.read(rows)
        read_rate = len(written_rows) / (time.perf_counter() - started)
        rates = [
            f"{rate:5,.0f} photos/s {rate * cells * 2 * bench.channels / 1e6:5,.0f} MB/s"
            for rate, cells in ((write_rate, 14 * 14), (read_rate, 8 * 8))
        ]
        print(
            f"{size:24,}  {path.stat().st_size / 1e9:5.1f} GB  {create_seconds * 1e3:4.0f} ms  {rates[0]}  "
            f"{open_seconds * 1e3:6.0f} ms  {rates[1]}  {peak_resident_memory() / 1e6:8.0f} MB"
        )
    finally:
        path.unlink(missing_ok=True)


def write(bench: Bench, path: Path, grid: str, features: torch.Tensor) -> None:
    ids = [str(number) for number in range(bench.photos)]
    attributes = describe_features(RECIPE, (8, 8), grid, "float32")
    writer = FeatureWriter(path, ids, attributes, bench.channels, "float16", overwrite=True)
    pooled = features.float().mean((1, 2))
    for rows in split_batches(np.arange(bench.photos), bench.batch_size):
        writer.write(rows, features[: len(rows)], pooled[: len(rows)])
    writer.close()


def write_with_h5py(bench: Bench, path: Path, features: torch.Tensor) -> None:
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("features", (bench.photos, *features.shape[1:]), "float16")
        for photo in range(bench.photos):
            dataset[photo] = features[photo % bench.batch_size].numpy()
        file.flush()
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def reading_methods(paths: dict[str, Path], plan: list[np.ndarray]) -> dict[str, tuple[Callable[[], None], str]]:
    """Method -> a function that reads all batches of the plan, and the name of its file.

    Every call opens its file again: mapped pages would stay in the page cache.
    """
    native = FeatureReader(paths["native"]).arrays["features"]

    def pread() -> None:
        with open(paths["native"], "rb", buffering=0) as file:
            for rows in plan:
                batch = np.empty((len(rows), native.row_bytes), np.uint8)
                for target, row in zip(batch, rows, strict=True):
                    os.preadv(file.fileno(), [target], native.offset + int(row) * native.row_bytes)

    def copy() -> None:
        mapped = native.map(paths["native"])
        for rows in plan:
            batch = np.empty((len(rows), *native.shape[1:]), np.float16)
            for target, row in zip(batch, rows, strict=True):
                target[:] = mapped[row]

    def read_with_kantu(name: str) -> None:
        reader = FeatureReader(paths[name])
        for rows in plan:
            reader.read(rows)

    def read_with_h5py() -> None:
        with h5py.File(paths["plain"]) as file:
            for rows in plan:
                torch.stack([torch.from_numpy(file["features"][row]) for row in rows])

    return {
        "plain h5py, 14x14": (read_with_h5py, "plain"),
        "Kantu, 14x14 file": (lambda: read_with_kantu("14"), "14"),
        "Kantu, native file": (lambda: read_with_kantu("native"), "native"),
        "os.pread, native file": (pread, "native"),
        "memmap copy, native file": (copy, "native"),
    }


def read_all(bench: Bench, paths: dict[str, Path], plan: list[np.ndarray], cold: bool) -> None:
    """Print the speed of each method."""
    one, other = (FeatureReader(paths[name]).read(plan[0]).cells for name in ("14", "native"))
    np.testing.assert_array_equal(one, other)
    methods = reading_methods(paths, plan)
    best = dict.fromkeys(methods, float("inf"))
    for _ in range(bench.rounds):
        for method, (read, name) in methods.items():
            if cold:
                drop_from_page_cache(paths[name])
            else:
                load_into_page_cache(paths[name])
            best[method] = min(best[method], timeit(read, number=1))
    for method, seconds in best.items():
        num_cells = 14 * 14 if method.startswith("plain") else 8 * 8
        row_bytes = num_cells * 2 * bench.channels
        print_rate(method, bench, row_bytes, seconds)
    limit = "os.pread, native file" if cold else "memmap copy, native file"
    print(
        f"{'':>24}  a native file is read at {best[limit] / best['Kantu, native file']:.0%} of the speed of "
        f"{limit.removesuffix(', native file')}, and {best['plain h5py, 14x14'] / best['Kantu, native file']:.1f} "
        "times as fast as with plain h5py"
    )


def print_memory_rates(bench: Bench, path: Path, plan: list[np.ndarray]) -> None:
    """Print the speed of gathering batches from main memory into a buffer that is kept, as pinned memory is."""
    reader = FeatureReader(path)
    source = FileRows(FeatureFiles([reader]), pooled=False, quantize=False)
    held = HeldRows(source, np.arange(bench.photos), torch.device("cpu")).held.cells
    buffer = torch.zeros(bench.batch_size, *held.shape[1:], dtype=held.dtype)
    mapped = reader.arrays["features"].map(path)
    load_into_page_cache(path)

    def gather_twice() -> None:
        for rows in plan:
            buffer[: len(rows)].copy_(held.index_select(0, torch.from_numpy(rows)))

    def gather_once() -> None:
        for rows in plan:
            torch.index_select(held, 0, torch.from_numpy(rows), out=buffer[: len(rows)])

    def copy_from_page_cache() -> None:
        for rows in plan:
            for target, row in zip(buffer.view(-1, *mapped.shape[1:]).numpy(), rows, strict=False):
                target[:] = mapped[row]

    methods = {"main memory, before": gather_twice, "main memory": gather_once, "page cache": copy_from_page_cache}
    best = dict.fromkeys(methods, float("inf"))
    for _ in range(bench.rounds):
        for method, read in methods.items():
            best[method] = min(best[method], timeit(read, number=1))
    print("random photos, native cells, into a kept buffer")
    for method, seconds in best.items():
        print_rate(method, bench, held[0].nbytes, seconds)
    print(f"{'':>24}  main memory is {best['main memory, before'] / best['main memory']:.1f} times as fast as before")


def lru_share(part: float, rows: int, epochs: int = 4) -> float:
    """The share of reads that a least-recently-used cache of part of the rows serves, after its first epoch."""
    rng = np.random.default_rng(0)
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for epoch in range(epochs):
        for row in rng.permutation(rows).tolist():
            if row in cache:
                cache.move_to_end(row)
                hits += epoch > 0
                continue
            cache[row] = None
            if len(cache) > part * rows:
                cache.popitem(last=False)
    return hits / (rows * (epochs - 1))


def drop_from_page_cache(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load_into_page_cache(path: Path) -> None:
    with open(path, "rb") as file:
        while file.read(1 << 24):
            pass


def print_rate(method: str, bench: Bench, size: int, seconds: float) -> None:
    print(
        f"{method:>24}  {bench.photos / seconds:8,.0f} photos/s {bench.photos * size / seconds / 1e6:8,.0f} MB/s "
        f"{size:9,} bytes per photo"
    )


if __name__ == "__main__":
    main(tyro.cli(Bench))
