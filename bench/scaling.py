"""How the time of a training step of the attention decoder, and of beam search, grows when each size is doubled.

    python bench/scaling.py
    python bench/scaling.py --base.channels 1280 --rounds 5

2.0 is linear; less means that a part of the time does not depend on the size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
import tyro
from beam_search import Bench as SearchBench
from beam_search import caption_all, make_random
from decoders import Bench, Data, best_of, kantu_step, make_decoders

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
        "captions per photo": replace(base, captions_per_photo=2 * base.captions_per_photo),
        "words per caption": replace(base, length_factor=2 * base.length_factor),
        "vocabulary": replace(base, vocabulary=2 * base.vocabulary),
        "native cells (8x8 to 14x14: three times)": replace(base, grid_side=14),
        "channels": replace(base, channels=2 * base.channels),
        "embedding, attention, hidden": replace(base, size=2 * base.size),
    }
    print_table("training step", {name: make_training_step(bench) for name, bench in doubled.items()}, scaling.rounds)
    search = SearchBench(photos=32, vocabulary=base.vocabulary, channels=base.channels, size=base.size)
    searches = {
        "": search,
        "photos": replace(search, photos=2 * search.photos, batch_size=2 * search.batch_size),
        "beams": replace(search, beam_size=2 * search.beam_size),
        "vocabulary": replace(search, vocabulary=2 * search.vocabulary),
        "channels": replace(search, channels=2 * search.channels),
    }
    print_table("beam search", {name: make_search(bench) for name, bench in searches.items()}, scaling.rounds)
    print_table(
        "beam search", {"": make_search(search), "native cells (three times)": make_search(search, 14)}, scaling.rounds
    )
    print(f"float32, {scaling.threads} threads, torch {torch.__version__}")


def make_training_step(bench: Bench) -> partial:
    decoder, _ = make_decoders(bench)
    batch = Data(bench).kantu_batch(torch.float32)
    return partial(kantu_step, decoder, make_optimizer(decoder.parameters()), batch, torch.float32)


def make_search(bench: SearchBench, grid_side: int = 8) -> partial:
    decoder, _ = make_random(bench)
    torch.manual_seed(1)
    grid = Grid(torch.randn(bench.photos, grid_side**2, bench.channels).relu(), grid_pooling(grid_side, grid_side))
    return partial(caption_all, decoder.eval(), grid, bench, torch.float32)


def print_table(title: str, functions: dict[str, partial], rounds: int) -> None:
    """Print the time of each function relative to the one named ""."""
    seconds = best_of(rounds, functions)
    print(f"{title}: {seconds[''] * 1e3:.0f} ms")
    for name, taken in seconds.items():
        if name:
            print(f"{name:>45}  {taken / seconds['']:4.1f} times as long")


if __name__ == "__main__":
    main(tyro.cli(Scaling))
