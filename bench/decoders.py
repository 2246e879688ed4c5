"""A training step and an epoch of our decoders beside the tutorials' way (bench/tutorial.py), on random features.

    python bench/decoders.py                                     attention, 32 captions of 8 photos
    python bench/decoders.py --photos 32 --captions-of-a-photo 1     each of another photo: no work is shared
    python bench/decoders.py --decoder lstm
    python bench/decoders.py --encoder resnet101                 as in an epoch: the tutorial pays its encoder, too

Both have the same weights and see the same captions; losses and gradients are compared before anything is timed. A
step is all that an update takes: gradients, clipping, Adam. The best of --rounds counts, the two taking turns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from timeit import timeit
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from tutorial import TutorialAttention, TutorialEncoder, TutorialLstm

from captioning.dataset.batches import Batch
from captioning.decoders.factory import build_decoder
from captioning.encoders.grid import SIDE, Grid, grid_pooling
from captioning.runtime.device import autocast, pick_precision
from captioning.training.objectives import CrossEntropy, LossWeights
from captioning.training.optimizer import make_optimizer
from config import Train
from preprocess.vocabulary import END, SPECIAL, START

# Words of a COCO caption (val2017, all 25,014): how many captions have so many
COCO_LENGTHS = {
    7: 206,
    8: 4005,
    9: 5549,
    10: 5350,
    11: 3814,
    12: 2507,
    13: 1454,
    14: 851,
    15: 468,
    16: 276,
    17: 175,
    18: 111,
    19: 70,
    20: 45,
    21: 30,
    22: 24,
    23: 23,
    24: 14,
    25: 13,
    26: 29,
}


@dataclass(frozen=True)
class Bench:
    decoder: Literal["attention", "lstm"] = "attention"
    photos: int = 8
    captions_of_a_photo: int = 4  # not COCO's 5: 32 captions a batch, and each photo counts alike in a BatchNorm
    longer: int = 1  # times COCO's captions
    vocabulary: int = 9490
    channels: int = 2048
    size: int = 512  # of embedding, attention and hidden state
    cells: int = 8  # native cells a side
    encoder: str | None = None  # such as resnet101: the tutorial encodes a photo a caption; JPEGs are not decoded
    image_size: int = 256
    rounds: int = 5
    threads: int = torch.get_num_threads()


class Data:
    """Random captions of COCO's lengths for random features."""

    def __init__(self, bench: Bench, seed: int = 0):
        random = np.random.default_rng(seed)
        counts = np.array(list(COCO_LENGTHS.values()))
        lengths = random.choice(list(COCO_LENGTHS), bench.photos * bench.captions_of_a_photo, p=counts / counts.sum())
        self.lengths = -np.sort(-bench.longer * lengths) + 1  # and an <end>
        self.captions = torch.zeros(len(self.lengths), self.lengths[0] + 1, dtype=torch.long)
        for row, length in zip(self.captions, self.lengths, strict=True):
            words = torch.from_numpy(random.integers(len(SPECIAL), bench.vocabulary, length - 1))
            row[: length + 1] = torch.cat([torch.tensor([START]), words, torch.tensor([END])])
        self.photo_index = torch.from_numpy(random.permutation(np.arange(len(self.lengths)) % bench.photos))
        cells = torch.from_numpy(
            random.standard_normal((bench.photos, bench.cells**2, bench.channels), np.float32)
        ).relu()
        self.grid = Grid(cells, grid_pooling(bench.cells, bench.cells))

    def for_us(self, dtype: torch.dtype) -> Batch:
        words = pack_padded_sequence(self.captions[:, :-1], self.lengths, batch_first=True)
        targets = pack_padded_sequence(self.captions[:, 1:], self.lengths, batch_first=True).data
        pooling = self.grid.pooling.to(torch.promote_types(dtype, torch.float32))
        grid = Grid(self.grid.cells.to(dtype), pooling)
        return Batch(
            grid, PackedSequence(words.data, words.batch_sizes), targets, self.photo_index, np.arange(len(grid))
        )

    def for_the_tutorial(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[int]]:
        """Every caption with a copy of its photo's 14x14 map (B, 14, 14, C), as its loader hands them over."""
        maps = self.grid.spread(self.grid.cells.to(dtype)).unflatten(1, (SIDE, SIDE))
        return maps[self.photo_index], self.captions, self.lengths.tolist()


def decoders(bench: Bench, dropout: float = 0.5) -> tuple[nn.Module, nn.Module]:
    """Ours and the tutorial's, of the same weights."""
    torch.manual_seed(0)
    sizes = {
        "vocabulary_size": bench.vocabulary,
        "channels": bench.channels,
        "embedding_size": bench.size,
        "hidden_size": bench.size,
        "dropout": dropout,
    }
    plain = (bench.vocabulary, bench.channels, bench.size)
    if bench.decoder == "lstm":
        ours = build_decoder("lstm", sizes)
        return ours, TutorialLstm(*plain, bench.size, dropout).take(ours)
    ours = build_decoder("attention", {**sizes, "attention_size": bench.size})
    ours.score.weight.data *= 10  # as peaked as trained attention: the gradients of an even one are all rounding
    return ours, TutorialAttention(*plain, bench.size, bench.size, dropout).take(ours)


def our_step(decoder: nn.Module, optimizer: torch.optim.Optimizer | None, batch: Batch, dtype: torch.dtype) -> Tensor:
    """As captioning/training/trainer.py; without an optimizer the gradients stay."""
    with autocast(batch.targets.device, dtype):
        loss = CrossEntropy(Train("data", "run"))(decoder, batch.photos, batch, LossWeights()).objective
    loss.backward()
    if optimizer:
        nn.utils.clip_grad_value_(decoder.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def tutorial_step(decoder: nn.Module, optimizer: torch.optim.Optimizer | None, batch: tuple) -> Tensor:
    loss = decoder.loss(*batch)
    loss.backward()
    if optimizer:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.data.clamp_(-5.0, 5.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def compare(bench: Bench, data: Data) -> None:
    """The same losses and gradients, or there is nothing to compare."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        (our_loss, ours), (loss, theirs) = our_gradient(bench, data, dtype), tutorial_gradient(bench, data, dtype)
        of_loss, of_gradient = abs(our_loss / loss - 1).item(), ((ours - theirs).norm() / theirs.norm()).item()
        print(
            f"{dtype}: ours and the tutorial's differ by {of_loss:.0e} in the loss, {of_gradient:.0e} in the gradient"
        )
        if max(of_loss, of_gradient) > tolerance:
            raise SystemExit("they are not the same; nothing was timed")


def tutorial_gradient(bench: Bench, data: Data, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient as one vector; dropout is off, since chance would differ."""
    _, decoder = decoders(bench, dropout=0.0)
    decoder = decoder.to(dtype)
    loss = tutorial_step(decoder, None, data.for_the_tutorial(dtype))
    return loss, parameters_to_vector(parameter.grad for parameter in decoder.parameters())


def our_gradient(bench: Bench, data: Data, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Likewise, moved into the tutorial's matrices."""
    ours, plain = (decoder.to(dtype) for decoder in decoders(bench, dropout=0.0))
    loss = our_step(ours, None, data.for_us(dtype), torch.float32)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)
    return loss, parameters_to_vector(plain.take(ours).parameters()).detach()


def best_of(rounds: int, works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds, the best of some rounds in which all take their turn; a round before does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            seconds[name].append(timeit(work, number=1))
    return {name: min(taken[1:]) for name, taken in seconds.items()}


def tutorial_epoch_step(bench: Bench, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step, after the live encoder has seen the photo of every caption."""
    encoder = TutorialEncoder(bench.encoder)
    photos = torch.rand(bench.photos * bench.captions_of_a_photo, 3, bench.image_size, bench.image_size)
    return lambda: (encoder(photos), step())


def main(bench: Bench) -> None:
    torch.set_num_threads(bench.threads)
    data = Data(bench)
    compare(bench, data)
    ours, plain = decoders(bench)
    works = {
        "tutorial": partial(tutorial_step, plain, torch.optim.Adam(plain.parameters(), 4e-4), data.for_the_tutorial())
    }
    for dtype in dict.fromkeys((torch.float32, pick_precision("auto", torch.device("cpu")))):
        decoder = copy.deepcopy(ours)
        name = f"ours, {str(dtype).removeprefix('torch.')}"
        works[name] = partial(our_step, decoder, make_optimizer(decoder.parameters()), data.for_us(dtype), dtype)
    if bench.encoder:
        works["tutorial"] = tutorial_epoch_step(bench, works["tutorial"])
    seconds = best_of(bench.rounds, works)
    for name, taken in seconds.items():
        print(f"{name:>16}  {taken:7.3f} s a step  {seconds['tutorial'] / taken:5.1f} times as fast")
    print(f"{len(data.lengths)} captions of {bench.photos} photos, {data.lengths.sum()} words of {bench.vocabulary:,}")
    print(f"{bench.cells}x{bench.cells} cells of {bench.channels}; {bench.threads} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main(tyro.cli(Bench))
