"""The speed of Kantu's beam search, over batches of photos, and of the tutorial's, over one photo at a time.

    python bench/beam_search.py                                                   random weights and features
    python bench/beam_search.py --run checkpoints/att --data data/aic             a trained run, photos of val
    python bench/beam_search.py --photos 5000 --batch-size 500 --device cuda      only Kantu, on a GPU
    python bench/beam_search.py --decoder updown --photos 32                      beside the toolkits' way; or xlan, aoa
    python bench/beam_search.py --decoder updown --photos 32 --words 10 --max-length 20

Both have the same weights. In the tutorial, a finished hypothesis makes the beam smaller. With the rule of
captioning/search/beam_search.py instead, the tutorial must find the same captions; this is checked as well. The
toolkits' way (bench/toolkits.py) searches batches of photos, by the same rule; the two take turns, and medians count.
The toolkits always compute --max-length steps, 17 or 20 by default; --words makes the captions end before, as trained
decoders do, after 10 words on COCO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from timeit import timeit
from typing import Literal

import decoders
import torch
import tyro
from toolkits import Toolkit
from torch import Tensor, nn
from tutorial import TutorialAttention

from captioning.decoders.factory import build_decoder
from captioning.encoders.grid import GRID_SIZE, Grid, grid_pooling
from captioning.features.feature_reader import FeatureReader
from captioning.runtime.checkpoint import load_checkpoint
from captioning.runtime.device import autocast, pick_device, pick_precision
from captioning.search.beam_search import beam_search
from captioning.search.options import SearchOptions
from preprocess.captions import read_captions
from preprocess.vocabulary import END


@dataclass(frozen=True)
class Bench:
    decoder: Literal["attention", "updown", "xlan", "aoa"] = "attention"
    run: Path | None = None  # run of --decoder attention; random weights unless given
    data: Path | None = None  # with --run
    features: Path | None = None  # with --run: data/NAME/features.h5 unless given
    photos: int = 60
    beam_size: int = 5
    max_length: int = 12  # words per caption; random weights always reach it
    batch_size: int = 32
    rounds: int = 5  # with --decoder updown, xlan or aoa
    words: int | None = None  # with --decoder updown, xlan or aoa: words after which captions end; never unless given
    vocabulary: int = 9490
    channels: int = 2048
    size: int = 512
    device: str = "cpu"
    threads: int = torch.get_num_threads()


def make_random(bench: Bench) -> tuple[nn.Module, Grid]:
    """A decoder with random weights, and random features. The captions have --max-length words and all differ."""
    torch.manual_seed(0)
    decoder = build_decoder(
        "attention",
        {
            "vocabulary_size": bench.vocabulary,
            "channels": bench.channels,
            "embedding_size": bench.size,
            "attention_size": bench.size,
            "hidden_size": bench.size,
            "dropout": 0.5,
        },
    )
    with torch.no_grad():
        decoder.embedding.weight *= 10
        decoder.output_layer.weight *= 10
    return decoder, Grid(torch.randn(bench.photos, 64, bench.channels).relu(), grid_pooling(8, 8))


def load_trained(bench: Bench) -> tuple[nn.Module, Grid]:
    """The decoder of --run, and features of val."""
    saved = load_checkpoint(bench.run)["decoder"]
    decoder = build_decoder(saved["name"], saved["sizes"])
    decoder.load_state_dict(saved["state"])
    reader = FeatureReader(bench.features or bench.data / "features.h5")
    rows = reader.rows_of(photo.id for photo in read_captions(bench.data) if photo.split == "val")[: bench.photos]
    return decoder, reader.read(rows).to(torch.device("cpu"), torch.float32)


def caption_all(decoder: nn.Module, grid: Grid, bench: Bench, dtype: torch.dtype) -> list[list[int]]:
    """The best caption of every photo by Kantu's beam search, in batches of --batch-size."""
    captions = []
    for cells in grid.cells.split(bench.batch_size):
        with autocast(cells.device, dtype):
            batch = Grid(cells.to(dtype), grid.pooling)
            captions += [
                best.words for (best,) in beam_search(decoder, batch, SearchOptions(bench.beam_size, bench.max_length))
            ]
    return captions


def main(bench: Bench) -> None:
    torch.set_num_threads(bench.threads)
    if bench.decoder != "attention":
        compare_with_toolkit(bench)
        return
    decoder, grid = load_trained(bench) if bench.run else make_random(bench)
    device = pick_device(bench.device)
    decoder = decoder.to(device).eval()
    grid = grid.to(device, torch.float32)
    seconds = {}
    if device.type == "cpu":
        seconds = time_tutorial(bench, decoder, grid)
    for dtype in dict.fromkeys((torch.float32, pick_precision("auto", device))):
        caption_all(decoder, Grid(grid.cells[: bench.batch_size], grid.pooling), bench, dtype)  # warm-up
        name = f"Kantu, {str(dtype).removeprefix('torch.')}"
        seconds[name] = timeit(lambda dtype=dtype: caption_all(decoder, grid, bench, dtype), number=1)
    slowest = next(iter(seconds.values()))
    for name, taken in seconds.items():
        print(f"{name:>30}  {len(grid) / taken:8.1f} captions/s  {slowest / taken:6.1f} times as fast")
    print(f"{len(grid)} photos, beam {bench.beam_size}, batches of {bench.batch_size}")
    print(f"{device}, {bench.threads} threads, torch {torch.__version__}")


class EndingLayer(nn.Module):
    """An output layer after which <end> becomes the likeliest word at about step `words` of a search."""

    def __init__(self, layer: nn.Linear, words: int):
        super().__init__()
        self.layer = layer
        self.words = words
        self.step = 0  # of the search: set it to 0 before each

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.layer(hidden)
        logits[:, END] += 2 * (self.step - self.words) + 8  # the largest logits are about 10
        self.step += 1
        return logits


def make_pair(bench: Bench) -> tuple[nn.Module, Toolkit]:
    """A decoder with random weights, whose captions differ, and the toolkits' way of it with the same weights."""
    size = bench.size
    sizes = decoders.Bench(decoder=bench.decoder, vocabulary=bench.vocabulary, channels=bench.channels, size=size)
    kantu, toolkit = (model.eval() for model in decoders.make_decoders(sizes))
    with torch.no_grad():
        kantu.embedding.weight *= 10
        kantu.output_layer.weight *= 10
    toolkit.copy_weights(kantu)
    if bench.words is not None:
        for model in (kantu, toolkit):
            model.output_layer = EndingLayer(model.output_layer, bench.words)
    return kantu, toolkit


def compare_with_toolkit(bench: Bench) -> None:
    """Print the time of both ways. Exits if, in float64, they do not find the same captions."""
    kantu, toolkit = make_pair(bench)
    grid = Grid(torch.randn(bench.photos, 64, bench.channels).relu(), grid_pooling(8, 8))
    double = Grid(grid.cells.double(), grid.pooling.double())
    found = way_of(kantu.double(), bench, double)()
    if found != way_of(toolkit.double(), bench, double)():
        raise SystemExit("error: the captions are not the same; the times are not comparable")
    words = sorted(map(len, found))
    different = len(set(map(tuple, found)))
    print(f"all {len(found)} captions are equal in float64, {different} different; {words[0]} to {words[-1]} words")
    kantu.float()
    ways = {"toolkit": way_of(toolkit.float(), bench, grid)}
    for dtype in dict.fromkeys((torch.float32, pick_precision("auto", torch.device("cpu")))):
        name = f"Kantu, {str(dtype).removeprefix('torch.')}"
        ways[name] = way_of(kantu, bench, Grid(grid.cells.to(dtype), grid.pooling), dtype)
    clock, timer = decoders.clock(bench.threads)
    times = [{name: timeit(way, timer=timer, number=1) for name, way in ways.items()} for _ in range(bench.rounds)]
    seconds = {name: median(row[name] for row in times) for name in ways}
    for name, taken in seconds.items():
        print(f"{name:>16}  {len(grid) / taken:8.1f} captions/s  {seconds['toolkit'] / taken:6.1f} times as fast")
    print(
        f"{len(grid)} photos, beam {bench.beam_size}, batches of {bench.batch_size}, at most {bench.max_length} words"
    )
    print(f"medians of {bench.rounds} rounds in {clock}; {bench.threads} threads, torch {torch.__version__}")


def way_of(
    model: nn.Module, bench: Bench, grid: Grid, dtype: torch.dtype = torch.float32
) -> Callable[[], list[list[int]]]:
    """A function that returns the caption of each photo, as ids. dtype: of Kantu's arithmetic, under autocast."""
    own_cells = bench.decoder != "updown" or not isinstance(model, Toolkit)
    cells = grid.cells if own_cells else grid.spread(grid.cells)
    search = SearchOptions(bench.beam_size, bench.max_length)

    def caption(batch: Tensor) -> list[list[int]]:
        if isinstance(model.output_layer, EndingLayer):
            model.output_layer.step = 0
        if isinstance(model, Toolkit):
            return model.beam_search(batch, bench.beam_size, bench.max_length)
        with autocast(batch.device, dtype):
            return [best.words for (best,) in beam_search(model, Grid(batch, grid.pooling), search)]

    return lambda: [words for batch in cells.split(bench.batch_size) for words in caption(batch)]


def time_tutorial(bench: Bench, decoder: nn.Module, grid: Grid) -> dict[str, float]:
    """Seconds of the tutorial's search. Exits if, with Kantu's rule, it does not find Kantu's captions."""
    sizes = (
        decoder.embedding.weight.shape,
        grid.cells.shape[2],
        decoder.key.out_features,
        decoder.output_layer.in_features,
    )
    (vocabulary, embedding), channels, attention, hidden = sizes
    tutorial = TutorialAttention(vocabulary, channels, embedding, attention, hidden, 0.0).copy_weights(decoder).eval()
    maps = grid.spread(grid.cells).unflatten(1, (GRID_SIZE, GRID_SIZE))
    captions: dict[bool, list] = {}

    def search(refill: bool) -> None:
        captions[refill] = [tutorial.beam_search(one, bench.beam_size, bench.max_length, refill) for one in maps]

    seconds = {
        "tutorial": timeit(lambda: search(False), number=1),
        "tutorial, Kantu's rule": timeit(lambda: search(True), number=1),
    }
    expected = caption_all(decoder, grid, bench, torch.float32)
    equal = {
        refill: sum(one == other for one, other in zip(expected, captions[refill], strict=True))
        for refill in (True, False)
    }
    print(
        f"{equal[True]} of {len(expected)} captions equal the tutorial's with Kantu's rule, "
        f"{equal[False]} with its own; {sum(map(len, expected)) / len(expected):.1f} words per caption"
    )
    if equal[True] < len(expected):
        raise SystemExit("error: the captions are not the same; the times are not comparable")
    return seconds


if __name__ == "__main__":
    main(tyro.cli(Bench))
