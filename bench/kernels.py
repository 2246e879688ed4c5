"""What the Triton kernels take of a GPU, and read from its memory. Needs Triton 3.4, no GPU: it compiles and simulates.

    python bench/kernels.py
    python bench/kernels.py --native-cells 49 100 196 --channels 1280 --architectures 86

Compiled, per kernel, type of the features and architecture (90: H100 and H200, 86: RTX 3060 and 3090, 80: A100):

registers   of a thread
spills      bytes that a thread stores in memory for want of registers
shared      bytes of shared memory of a program
programs    that a multiprocessor runs at once
warps       of these programs, of the 64 (86: 48) that a multiprocessor can hold

Simulated: how much of keys and cells in bfloat16 attention reads from memory for one batch of captions as long as those
of COCO, five per photo, forward and backward. As many programs as the GPU runs at once read tile after tile through an
L2 cache that drops what was used least recently. A read from memory takes three times as long as one from the cache;
durations vary by half. Other tensors are small, and not counted.

Letters: B photos, R rows, N native cells, P output cells (196), C channels, A attention size, H hidden size.
"""

from __future__ import annotations

import contextlib
import heapq
import io
import os
import random
import re
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import triton
import tyro
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from captioning.decoders import kernels
from captioning.encoders.grid import GRID_SIZE
from captioning.features import kernels as feature_kernels

CAPTIONS_PER_PHOTO = 5
FLOAT32_TENSORS = {  # in any precision
    *("pooling", "score_weight", "attention", "d_attention", "d_scores", "d_score_weight"),
    *("cell", "new_hidden", "new_cell", "d_hidden", "d_cell", "d_old_cell", "scales"),
}
INDICES = {"photo_index", "row_order", "word_order", "word_offsets", "rows"}


@dataclass(frozen=True)
class Bench:
    native_cells: tuple[int, ...] = (64,)  # N
    channels: int = 2048  # C
    attention_size: int = 512  # A
    hidden_size: int = 512  # H
    architectures: tuple[int, ...] = (90, 86, 80)
    features: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16")
    captions: int = 512  # of the simulated batch


class Kernel(NamedTuple):
    """A kernel with the constants and the number of warps of its launch."""

    function: Any
    constants: dict[str, int]
    num_warps: int = 4


def list_kernels(cells: int, channels: int, attention_size: int, hidden_size: int) -> list[Kernel]:
    """All kernels, as they are launched for grids of N native cells."""
    blocks = kernels.attention_blocks(GRID_SIZE**2, cells)
    attention = {"P": GRID_SIZE**2, "N": cells, "A": attention_size, "C": channels, **blocks}
    num_warps = attention.pop("num_warps")
    lstm = {"H": hidden_size, "H_BLOCK": kernels.H_BLOCK}
    return [
        Kernel(kernels._attention_kernel, attention, num_warps),
        Kernel(kernels._attention_backward_kernel, attention, num_warps),
        Kernel(kernels._keys_backward_kernel, {"P": GRID_SIZE**2, "A": attention_size, **kernels.KEYS_BLOCKS}),
        Kernel(kernels._lstm_kernel, lstm),
        Kernel(kernels._lstm_backward_kernel, lstm),
        Kernel(
            feature_kernels._dequantize_kernel,
            {"N": cells, "C": channels, "C_BLOCK": feature_kernels.block_size(channels)},
        ),
    ]


class Resources(NamedTuple):
    """What a compiled kernel takes."""

    registers: int  # of a thread
    spills: int  # bytes that a thread stores
    shared: int  # bytes of shared memory of a program


def compile_kernel(kernel: Kernel, dtype: str, architecture: int) -> Resources:
    """Compile a kernel as Triton does for aligned tensors. dtype: "fp32", "bf16" or "fp16", the type of the features.

    Raises the compiler's error, and a warning about floating-point fusion as an error.
    """
    names = kernel.function.arg_names
    types = {name: _argument_type(name, dtype, kernel.constants) for name in names}
    constants = {(i,): kernel.constants[name] for i, name in enumerate(names) if name in kernel.constants}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types[name].startswith("*") or name.endswith("_stride")
    }
    source = ASTSource(kernel.function, types, constants, aligned)
    options = {**kernels.LAUNCH_OPTIONS, "num_warps": kernel.num_warps}
    with _compiler_log() as log, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*FP_FUSION")  # a launch without LAUNCH_OPTIONS
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    [spills] = re.findall(r"(\d+) bytes spill stores", log.getvalue())
    [registers] = re.findall(r"Used (\d+) registers", log.getvalue())
    return Resources(int(registers), int(spills), compiled.metadata.shared)


def _argument_type(name: str, dtype: str, constants: dict[str, int]) -> str:
    if name in constants:
        return "constexpr"
    if name in ("num_tiles", "num_rows") or name.endswith("_stride"):
        return "i32"
    if name == "codes":
        return "*u8"
    if name in INDICES:
        return "*i64"
    return "*fp32" if name in FLOAT32_TENSORS else f"*{dtype}"


@contextlib.contextmanager
def _compiler_log() -> Iterator[io.StringIO]:
    """Context manager: what ptxas prints. Nothing is compiled twice, so each kernel is compiled into a new cache."""
    settings = {"TRITON_DUMP_PTXAS_LOG": "1"}
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(io.StringIO()) as log:
        settings["TRITON_CACHE_DIR"] = cache
        old = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield log
        finally:
            for name, value in old.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


class Multiprocessor(NamedTuple):
    """Limits of a multiprocessor: https://docs.nvidia.com/cuda/cuda-c-programming-guide, "Technical Specifications"."""

    warps: int
    programs: int
    shared: int  # bytes
    registers: int = 2**16


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 * 1024),
    86: Multiprocessor(48, 16, 100 * 1024),
    89: Multiprocessor(48, 24, 100 * 1024),
    90: Multiprocessor(64, 32, 228 * 1024),
}
REGISTER_UNIT = 256  # a warp takes a multiple of this many
RESERVED_SHARED = 1024  # bytes that the system takes per program


def resident_programs(resources: Resources, num_warps: int, architecture: int) -> int:
    """How many programs a multiprocessor runs at once."""
    limits = MULTIPROCESSORS[architecture]
    registers_per_warp = -(-32 * resources.registers // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        limits.registers // registers_per_warp // num_warps,
        limits.warps // num_warps,
        limits.shared // (resources.shared + RESERVED_SHARED),
        limits.programs,
    )


class Card(NamedTuple):
    name: str
    multiprocessors: int
    cache: int  # MB of L2


CARDS = (Card("RTX 3060", 28, 3), Card("RTX 3090", 82, 6), Card("A100", 108, 40), Card("H200", 132, 50))
MISS_DURATION = 3  # of a read from memory, relative to one from the cache
Tile = tuple[str, int, int]  # keys or cells, of a photo, the number of the tile


class Cache:
    """An L2 cache that drops what was used least recently, and counts the bytes that it reads from memory."""

    def __init__(self, capacity: int):
        """capacity: bytes."""
        self.free = capacity
        self.tiles: OrderedDict[Tile, int] = OrderedDict()  # bytes of each
        self.read_from_memory = 0  # bytes

    def read(self, tile: Tile, size: int) -> bool:
        """Read a tile of this many bytes, and return whether it was in the cache."""
        if tile in self.tiles:
            self.tiles.move_to_end(tile)
            return True
        self.read_from_memory += size
        self.free -= size
        self.tiles[tile] = size
        while self.free < 0:
            self.free += self.tiles.popitem(last=False)[1]
        return False


def simulate_reads(bench: Bench, num_native: int, cache: Cache, at_once: int, by_photo: bool) -> None:
    """Send all reads of keys and cells of one batch through the cache: `at_once` programs run at the same time."""
    rng = np.random.default_rng(0)
    lengths = -np.sort(-(8 + rng.poisson(3.5, bench.captions)))  # words and <end>: 11.5 on average, as in COCO
    photo_index = rng.permutation(np.arange(bench.captions) // CAPTIONS_PER_PHOTO)
    order = photo_index.argsort(kind="stable") if by_photo else np.arange(bench.captions)
    blocks = kernels.attention_blocks(GRID_SIZE**2, num_native)
    keys = [("keys", i, 2 * GRID_SIZE**2 * blocks["A_BLOCK"]) for i in range(bench.attention_size // blocks["A_BLOCK"])]
    cells = [("cells", i, 2 * num_native * blocks["C_BLOCK"]) for i in range(bench.channels // blocks["C_BLOCK"])]
    rows_of_steps = [int((lengths > step).sum()) for step in range(lengths[0])]
    launches = [(rows, keys + cells) for rows in rows_of_steps]
    launches += [(rows, cells + keys) for rows in reversed(rows_of_steps)]  # backward
    jitter = random.Random(0)
    for rows, tiles in launches:
        _run_programs(photo_index[order[order < rows]].tolist(), tiles, cache, at_once, jitter)


def _run_programs(
    photos: Sequence[int], tiles: Sequence[tuple[str, int, int]], cache: Cache, at_once: int, jitter: random.Random
) -> None:
    """Run a program for each of these photos, which reads these tiles in order. They start in order."""
    waiting = iter(photos)
    running = [(0.0, place, photo, iter(tiles)) for place, photo in enumerate(islice(waiting, at_once))]
    while running:
        now, place, photo, rest = running[0]  # the program that reads next
        if (tile := next(rest, None)) is not None:
            name, number, size = tile
            hit = cache.read((name, photo, number), size)
            duration = (1 if hit else MISS_DURATION) * jitter.uniform(0.5, 1.5)
            heapq.heapreplace(running, (now + duration, place, photo, rest))
        elif (next_photo := next(waiting, None)) is not None:
            heapq.heapreplace(running, (now, place, next_photo, iter(tiles)))
        else:
            heapq.heappop(running)


def print_resources(bench: Bench) -> None:
    """Compile all kernels, and print a line for each."""
    columns = ("N", "kernel", "features", "sm", "registers", "spills", "shared", "programs", "warps")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for cells in bench.native_cells:
        for kernel in list_kernels(cells, bench.channels, bench.attention_size, bench.hidden_size):
            name = kernel.function.__name__.removeprefix("_").removesuffix("_kernel")
            for dtype in bench.features:
                for architecture in bench.architectures:
                    found = compile_kernel(kernel, dtype, architecture)
                    programs = resident_programs(found, kernel.num_warps, architecture)
                    line = (cells, name, dtype, architecture, *found, programs, programs * kernel.num_warps)
                    print("| " + " | ".join(map(str, line)) + " |", flush=True)


def print_reads(bench: Bench, programs: int = 5) -> None:
    """Simulate a batch on each card, and print a line for each. programs: that a multiprocessor runs at once."""
    print("| N | card | L2, MB | GB read, rows in order of length | GB read, rows by photo |\n|---|---|---|---|---|")
    for cells in bench.native_cells:
        for card in CARDS:
            volumes = []
            for by_photo in (False, True):
                cache = Cache(card.cache * 2**20)
                simulate_reads(bench, cells, cache, programs * card.multiprocessors, by_photo)
                volumes.append(f"{cache.read_from_memory / 1e9:.2f}")
            print("| " + " | ".join(map(str, (cells, card.name, card.cache, *volumes))) + " |", flush=True)


def main(bench: Bench) -> None:
    print_resources(bench)
    print()
    print_reads(bench)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
