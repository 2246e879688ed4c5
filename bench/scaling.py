"""What doubling each size costs: a training step of the attention decoder, and captions by beam search.

    python bench/scaling.py
    python bench/scaling.py --base.channels 1280 --rounds 5

2.0 is linear; less means that part of the time does not depend on that size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
import tyro
from beam_search import Bench as SearchBench
from beam_search import captions, made_up
from decoders import Bench, Data, best_of, decoders, our_step

from captioning.encoders.grid import Grid, grid_pooling
from captioning.training.optimizer import make_optimizer


@dataclass(frozen=True)
class Scaling:
    base: Bench = field(default_factory=Bench)
    rounds: int = 3
    threads: int = torch.get_num_threads()


def main(scaling: Scaling) -> None:
    torch.set_num_threads(scaling.threads)
    base = scaling.base
    doubled = {
        "": base,
        "photos (and captions)": replace(base, photos=2 * base.photos),
        "captions a photo": replace(base, captions_of_a_photo=2 * base.captions_of_a_photo),
        "words a caption": replace(base, longer=2 * base.longer),
        "vocabulary": replace(base, vocabulary=2 * base.vocabulary),
        "native cells (8x8 to 14x14: three times)": replace(base, cells=14),
        "channels": replace(base, channels=2 * base.channels),
        "embedding, attention, hidden": replace(base, size=2 * base.size),
    }
    table("a training step", {name: training(bench) for name, bench in doubled.items()}, scaling.rounds)
    search = SearchBench(photos=32, vocabulary=base.vocabulary, channels=base.channels, size=base.size)
    searches = {
        "": search,
        "photos": replace(search, photos=2 * search.photos, batch_size=2 * search.batch_size),
        "beams": replace(search, beam_size=2 * search.beam_size),
        "vocabulary": replace(search, vocabulary=2 * search.vocabulary),
        "channels": replace(search, channels=2 * search.channels),
    }
    table("beam search", {name: searching(bench) for name, bench in searches.items()}, scaling.rounds)
    table("beam search", {"": searching(search), "native cells (three times)": searching(search, 14)}, scaling.rounds)
    print(f"float32, {scaling.threads} threads, torch {torch.__version__}")


def training(bench: Bench) -> partial:
    decoder, _ = decoders(bench)
    batch = Data(bench).for_us(torch.float32)
    return partial(our_step, decoder, make_optimizer(decoder.parameters()), batch, torch.float32)


def searching(bench: SearchBench, cells: int = 8) -> partial:
    decoder, grid = made_up(bench)
    torch.manual_seed(1)
    grid = Grid(torch.randn(bench.photos, cells * cells, bench.channels).relu(), grid_pooling(cells, cells))
    return partial(captions, decoder.eval(), grid, bench, torch.float32)


def table(what: str, works: dict[str, partial], rounds: int) -> None:
    seconds = best_of(rounds, works)
    print(f"{what}: {seconds[''] * 1e3:.0f} ms")
    for name, taken in seconds.items():
        if name:
            print(f"{name:>45}  {taken / seconds['']:4.1f} times as long")


if __name__ == "__main__":
    main(tyro.cli(Scaling))
