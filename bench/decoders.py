"""The time of a training step of Kantu's decoders and of others, on random features.

The others are written like the tutorials (bench/tutorial.py) and the captioning toolkits (bench/toolkits.py).

    python bench/decoders.py                                     attention, 32 captions of 8 photos
    python bench/decoders.py --photos 32 --captions-per-photo 1     one caption per photo: captions share no work
    python bench/decoders.py --decoder lstm                      or updown, xlan, aoa
    python bench/decoders.py --encoder resnet101                 the tutorial also runs its encoder, as in every epoch

Both have the same weights and captions, and their losses and gradients are compared before anything is timed. A step is
a full update: gradients, clipping, Adam. The implementations alternate for --rounds rounds; the best time counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter, process_time
from timeit import timeit
from typing import Literal

import numpy as np
import torch
import tyro
from synthetic import coco_lengths
from toolkits import ToolkitAoa, ToolkitUpDown, ToolkitXlan
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from tutorial import TutorialAttention, TutorialEncoder, TutorialLstm

from captioning.dataset.batches import Batch
from captioning.decoders.factory import build_decoder
from captioning.encoders.grid import GRID_SIZE, Grid, grid_pooling
from captioning.runtime.device import autocast, pick_precision
from captioning.training.objectives import CrossEntropy, LossWeights
from captioning.training.optimizer import make_optimizer
from config import Train
from preprocess.vocabulary import END, SPECIAL, START


@dataclass(frozen=True)
class Bench:
    decoder: Literal["attention", "lstm", "updown", "xlan", "aoa"] = "attention"
    photos: int = 8
    captions_per_photo: int = 4  # not COCO's 5: 32 captions per batch, equally many per photo for BatchNorm
    length_factor: int = 1  # multiplies the lengths of COCO captions
    vocabulary: int = 9490
    channels: int = 2048
    size: int = 512  # of embedding, attention and hidden state
    grid_side: int = 8  # native cells per side
    encoder: str | None = None  # such as resnet101: the tutorial then encodes one photo per caption, already decoded
    image_size: int = 256
    rounds: int = 5
    heads: int = 8  # of xlan and aoa
    encoder_layers: int | None = None  # of xlan and aoa; the published 4 and 6 unless given
    threads: int = torch.get_num_threads()

    @property
    def other(self) -> str:
        """Whose way Kantu is compared with."""
        return "tutorial" if self.decoder in ("attention", "lstm") else "toolkit"


class Data:
    """Random captions with the lengths of COCO captions, and random features."""

    def __init__(self, bench: Bench, seed: int = 0):
        rng = np.random.default_rng(seed)
        lengths = coco_lengths(rng, bench.photos * bench.captions_per_photo)
        self.lengths = -np.sort(-bench.length_factor * lengths) + 1  # including <end>
        self.captions = torch.zeros(len(self.lengths), self.lengths[0] + 1, dtype=torch.long)
        for row, length in zip(self.captions, self.lengths, strict=True):
            words = torch.from_numpy(rng.integers(len(SPECIAL), bench.vocabulary, length - 1))
            row[: length + 1] = torch.cat([torch.tensor([START]), words, torch.tensor([END])])
        self.photo_index = torch.from_numpy(rng.permutation(np.arange(len(self.lengths)) % bench.photos))
        cells = torch.from_numpy(
            rng.standard_normal((bench.photos, bench.grid_side**2, bench.channels), np.float32)
        ).relu()
        self.grid = Grid(cells, grid_pooling(bench.grid_side, bench.grid_side))

    def kantu_batch(self, dtype: torch.dtype) -> Batch:
        words = pack_padded_sequence(self.captions[:, :-1], self.lengths, batch_first=True)
        targets = pack_padded_sequence(self.captions[:, 1:], self.lengths, batch_first=True).data
        pooling = self.grid.pooling.to(torch.promote_types(dtype, torch.float32))
        grid = Grid(self.grid.cells.to(dtype), pooling)
        return Batch(
            grid, PackedSequence(words.data, words.batch_sizes), targets, self.photo_index, np.arange(len(grid))
        )

    def other_batch(self, bench: Bench, dtype: torch.dtype = torch.float32) -> tuple:
        """The batch of the tutorial or the toolkit."""
        if bench.other == "tutorial":
            return self.tutorial_batch(dtype)
        cells = self.grid.cells.to(dtype)
        if bench.decoder == "updown":
            cells = self.grid.spread(cells)
        return cells, self.photo_index, self.captions, self.lengths.tolist()

    def tutorial_batch(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[int]]:
        """The tutorial's batch: a 14x14 map per caption (B, 14, 14, C), the captions and their lengths."""
        maps = self.grid.spread(self.grid.cells.to(dtype)).unflatten(1, (GRID_SIZE, GRID_SIZE))
        return maps[self.photo_index], self.captions, self.lengths.tolist()


def make_decoders(bench: Bench, dropout: float = 0.5) -> tuple[nn.Module, nn.Module]:
    """Kantu's decoder and the other one, with the same weights."""
    torch.manual_seed(0)
    sizes = {
        "vocabulary_size": bench.vocabulary,
        "channels": bench.channels,
        "embedding_size": bench.size,
        "hidden_size": bench.size,
        "dropout": dropout,
    }
    tutorial_sizes = (bench.vocabulary, bench.channels, bench.size)
    if bench.decoder == "lstm":
        lstm = build_decoder("lstm", sizes)
        return lstm, TutorialLstm(*tutorial_sizes, bench.size, dropout).copy_weights(lstm)
    sizes |= {"attention_size": bench.size, "heads": bench.heads, "encoder_layers": bench.encoder_layers}
    if bench.decoder == "updown":
        updown = build_decoder("updown", sizes)
        updown.score.weight.data *= 10
        return updown, ToolkitUpDown(*tutorial_sizes, bench.size, bench.size, dropout).copy_weights(updown)
    if bench.decoder in ("xlan", "aoa"):
        decoder = build_decoder(bench.decoder, sizes)
        toolkit = ToolkitXlan if bench.decoder == "xlan" else ToolkitAoa
        return decoder, toolkit(*tutorial_sizes, dropout, len(decoder.layers), bench.heads).copy_weights(decoder)
    attention = build_decoder("attention", sizes)
    # As peaked as trained attention: the gradients of uniform attention are dominated by rounding errors.
    attention.score.weight.data *= 10
    return attention, TutorialAttention(*tutorial_sizes, bench.size, bench.size, dropout).copy_weights(attention)


def kantu_step(decoder: nn.Module, optimizer: torch.optim.Optimizer | None, batch: Batch, dtype: torch.dtype) -> Tensor:
    """One update as in captioning/training/trainer.py. Without an optimizer, compute and keep the gradients."""
    with autocast(batch.targets.device, dtype):
        loss = CrossEntropy(Train("data", "run"))(decoder, batch.photos, batch, LossWeights()).objective
    loss.backward()
    if optimizer:
        nn.utils.clip_grad_value_(decoder.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def tutorial_step(decoder: nn.Module, optimizer: torch.optim.Optimizer | None, batch: tuple) -> Tensor:
    """One update as in the tutorials. Without an optimizer, compute and keep the gradients."""
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
    """Print how much losses and gradients differ. Exits if the difference is more than rounding."""
    rounding = 1e-4 if bench.decoder == "xlan" else 1e-5  # its many norms amplify rounding
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, rounding)):
        kantu_loss, kantu_gradient = compute_kantu_gradient(bench, data, dtype)
        loss, gradient = compute_tutorial_gradient(bench, data, dtype)
        loss_error = abs(kantu_loss / loss - 1).item()
        gradient_error = ((kantu_gradient - gradient).norm() / gradient.norm()).item()
        print(
            f"{dtype}: Kantu and the {bench.other} differ by {loss_error:.0e} in the loss, "
            f"{gradient_error:.0e} in the gradient"
        )
        if max(loss_error, gradient_error) > tolerance:
            raise SystemExit("error: the results are not the same; nothing was timed")


def compute_tutorial_gradient(bench: Bench, data: Data, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient as one vector. Dropout is off, because its random numbers would differ."""
    _, decoder = make_decoders(bench, dropout=0.0)
    decoder = decoder.to(dtype)
    loss = tutorial_step(decoder, None, data.other_batch(bench, dtype))
    return loss, parameters_to_vector(parameter.grad for parameter in decoder.parameters())


def compute_kantu_gradient(bench: Bench, data: Data, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same for Kantu, with the gradient in the layout of the tutorial's matrices."""
    kantu, tutorial = (decoder.to(dtype) for decoder in make_decoders(bench, dropout=0.0))
    loss = kantu_step(kantu, None, data.kantu_batch(dtype), torch.float32)
    with torch.no_grad():
        for parameter in kantu.parameters():
            parameter.copy_(parameter.grad)
    return loss, parameters_to_vector(tutorial.copy_weights(kantu).parameters()).detach()


def clock(threads: int) -> tuple[str, Callable[[], float]]:
    """What to time with, and its name: of one thread, the time that it computes, whatever else the machine does."""
    return ("CPU time", process_time) if threads == 1 else ("wall time", perf_counter)


def best_of(
    rounds: int, functions: dict[str, Callable[[], object]], timer: Callable[[], float] = perf_counter
) -> dict[str, float]:
    """Name -> seconds, the best of `rounds` rounds in which all functions run. An extra first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            seconds[name].append(timeit(function, timer=timer, number=1))
    return {name: min(times[1:]) for name, times in seconds.items()}


def tutorial_epoch_step(bench: Bench, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step, after the encoder has encoded the photo of every caption."""
    encoder = TutorialEncoder(bench.encoder)
    photos = torch.rand(bench.photos * bench.captions_per_photo, 3, bench.image_size, bench.image_size)
    return lambda: (encoder(photos), step())


def main(bench: Bench) -> None:
    torch.set_num_threads(bench.threads)
    data = Data(bench)
    compare(bench, data)
    kantu, tutorial = make_decoders(bench)
    optimizer = torch.optim.Adam(tutorial.parameters(), 4e-4)
    steps = {bench.other: partial(tutorial_step, tutorial, optimizer, data.other_batch(bench))}
    for dtype in dict.fromkeys((torch.float32, pick_precision("auto", torch.device("cpu")))):
        decoder = copy.deepcopy(kantu)
        name = f"Kantu, {str(dtype).removeprefix('torch.')}"
        steps[name] = partial(kantu_step, decoder, make_optimizer(decoder.parameters()), data.kantu_batch(dtype), dtype)
    if bench.encoder:
        steps[bench.other] = tutorial_epoch_step(bench, steps[bench.other])
    name_of_clock, timer = clock(bench.threads)
    seconds = best_of(bench.rounds, steps, timer)
    for name, taken in seconds.items():
        print(f"{name:>16}  {taken:7.3f} s per step  {seconds[bench.other] / taken:5.1f} times as fast")
    print(f"{len(data.lengths)} captions of {bench.photos} photos, {data.lengths.sum()} words of {bench.vocabulary:,}")
    print(
        f"{bench.grid_side}x{bench.grid_side} cells of {bench.channels}; "
        f"{name_of_clock}, {bench.threads} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main(tyro.cli(Bench))
