"""The speed of training, validation and CIDEr optimisation, and the same training step as the library would run it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from ceilings import best_seconds
from synthetic import first_photos
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.profiler import ProfilerActivity, profile
from trainer_runs import make_trainer, operations_per_word, train_epoch, way_of

from captioning.dataset.batches import Batch, CachedPhotos
from captioning.decoders import attention
from captioning.encoders.grid import Grid
from captioning.runtime.cuda_graphs import GraphCapture
from captioning.runtime.device import autocast
from captioning.runtime.signals import StopRequest
from captioning.search.beam_search import beam_search
from captioning.search.options import SearchOptions
from captioning.training.data import TrainingData
from captioning.training.objectives import LossWeights
from captioning.training.trainer import Trainer
from gpu_steps.common import (
    CAPTIONS_PER_PHOTO,
    COCO_CAPTIONS,
    Row,
    Setting,
    describe_captures,
    not_available,
    watch_captures,
)
from preprocess.captions import Photo
from preprocess.vocabulary import END

EPOCH_SECONDS = 8.0  # the target for COCO_CAPTIONS captions
VALIDATION_SECONDS = 3.0  # the target for 5,000 photos
PATHS: dict[str, dict[str, Any]] = {  # name -> options of a run
    "fast path": {},
    "no kernels": {"kernels": False},
    "no graphs": {"cuda_graphs": False},
    "plain": {"fast_path": False, "cuda_graphs": False, "kernels": False},
}
COUNTING_BATCH_SIZE = 50  # captions of the batch whose operations are counted
PROBE_UPDATES = 12  # of an epoch that measures how many photos fit into scale.epoch_seconds
TARGET_BATCH_SIZES = (512, 1024)
SENTENCES = 20  # different captions that a decoder learns before it is validated
WITHIN = 1.1  # the library replaces our code if its step takes at most this many times as long


# ---- training


def epochs(setting: Setting) -> Iterator[Row]:
    """A quarter of an epoch of COCO at several batch sizes, with and without graphs and kernels."""
    scale = setting.scale
    data = setting.data(setting.photos(scale.epoch_photos))
    per_word = operations_per_word(
        setting.options(batch_size=COUNTING_BATCH_SIZE), setting.vocabulary, data, setting.device
    )
    operations = per_word * data.train.split.target_counts().sum() / scale.epoch_photos / CAPTIONS_PER_PHOTO
    for batch_size in scale.epoch_batch_sizes:
        for name in PATHS:
            what = f"{batch_size} captions, {name}"
            try:
                yield from epoch_rows(setting, data, batch_size, name, operations)
            except torch.OutOfMemoryError:
                yield not_available(what, "out of memory")
                torch.cuda.empty_cache()


def epoch_rows(setting: Setting, data: TrainingData, batch_size: int, path: str, operations: float) -> Iterator[Row]:
    """The rows of one batch size and path. operations: floating-point operations per caption."""
    with watch_captures() as captures:
        metrics, photos, way = timed_epoch(setting, data, batch_size, path)
    rate = metrics["captions_per_second"]
    what = f"{batch_size} captions, {path}"
    yield Row(
        what,
        rate,
        "captions/s",
        note=f"{way}, {len(captures)} captures, {photos:,} photos, {metrics['peak_memory_gb']:.1f} GB",
    )
    yield Row(f"{what}: matrix products", rate * operations / 1e12, "TFLOP/s")
    seconds = COCO_CAPTIONS / rate
    has_target = path == "fast path" and batch_size in TARGET_BATCH_SIZES
    yield Row(
        f"{what}: a whole epoch of COCO",
        seconds,
        "s",
        target=f"<= {EPOCH_SECONDS:g} s" * has_target,
        met=seconds <= EPOCH_SECONDS if has_target else None,
        note=f"projected from {metrics['train_seconds']:.1f} s; waiting {metrics['waiting']:.1%}",
    )


def timed_epoch(setting: Setting, data: TrainingData, batch_size: int, path: str) -> tuple[dict, int, str]:
    """The second of two epochs -> its metrics, the number of photos, and how batches were computed.

    The first one tries the fast path and captures graphs. What is slow gets as many photos as fit into the time.
    """
    options = setting.options(batch_size=batch_size, **PATHS[path])

    def two_epochs(part: TrainingData) -> tuple[dict, str]:
        trainer = make_trainer(options, setting.vocabulary, part, setting.device, force=path != "fast path")
        train_epoch(trainer)
        return train_epoch(trainer), way_of(trainer)

    photos = len(data.train.split)
    if path != "fast path" or batch_size not in TARGET_BATCH_SIZES:
        probe = max(1, batch_size // CAPTIONS_PER_PHOTO) * PROBE_UPDATES
        rate = two_epochs(first_photos(data, probe))[0]["photos_per_second"]
        photos = min(photos, max(probe, int(rate * setting.scale.epoch_seconds)))
    part = first_photos(data, photos)
    metrics, way = two_epochs(part)
    return metrics, len(part.train.split), way


def capture_memory(setting: Setting) -> Iterator[Row]:
    """The memory of CUDA graphs, beside that of a run without them; and that of the proof before the first batch."""
    scale = setting.scale
    for batch_size in scale.epoch_batch_sizes:
        data = setting.data(setting.photos(scale.memory_updates * max(1, batch_size // CAPTIONS_PER_PHOTO)))
        for name in ("fast path", "no graphs"):
            options = setting.options(batch_size=batch_size, **PATHS[name])
            trainer = make_trainer(options, setting.vocabulary, data, setting.device)
            held = allocated(setting)
            with watch_captures() as captures:
                first = train_epoch(trainer)
            second = train_epoch(trainer)
            peak, proof_peak = (metrics["peak_memory_gb"] - held for metrics in (second, first))
            note = f"{way_of(trainer)}; {proof_peak:.2f} GB in the first epoch, with the proof"
            yield Row(f"{batch_size} captions, {name}: peak above data and weights", peak, "GB", note=note)
            if captures:
                yield Row(
                    f"{batch_size} captions: the graphs' pool",
                    captures[-1].pool / 1e9,
                    "GB",
                    note=f"{describe_captures(captures)}; {captures[-1].reserved / 1e9:.1f} GB reserved by the process",
                )
            del trainer


def allocated(setting: Setting) -> float:
    """GB of tensors on the GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(setting.device) / 1e9 if setting.device.type == "cuda" else 0.0


# ---- validation and search


def validation(setting: Setting) -> Iterator[Row]:
    """Validation as after an epoch, split into the device's work and scoring; then beam search."""
    scale = setting.scale
    val = setting.photos(scale.val_photos, split="val")
    train = repeat_captions(setting.photos(scale.val_updates * max(1, scale.library_batch_size // CAPTIONS_PER_PHOTO)))
    data = setting.data(train, val)
    options = setting.options(batch_size=scale.library_batch_size)
    trainer = make_trainer(options, setting.vocabulary, data, setting.device)
    train_epoch(trainer)
    yield from timed_validations(trainer, scale.val_photos)
    yield from timed_search(setting, trainer)


def repeat_captions(photos: list[Photo]) -> list[Photo]:
    """The photos with captions out of few different ones, which a decoder learns, and with them where captions end."""
    few = [caption for photo in photos[:SENTENCES] for caption in photo.captions][:SENTENCES]
    return [
        Photo(photo.image, photo.id, photo.split, tuple(few[(i + j) % len(few)] for j in range(len(photo.captions))))
        for i, photo in enumerate(photos)
    ]


def timed_validations(trainer: Trainer, photos: int) -> Iterator[Row]:
    """The second of two validations: the first one loads kernels."""
    scoring: list[float] = []
    original = trainer.validation.merge

    def merge(*arguments: Any) -> dict:
        started = time.perf_counter()
        metrics = original(*arguments)
        scoring.append(time.perf_counter() - started)
        return metrics

    with mock.patch.object(trainer.validation, "merge", merge), StopRequest() as stop:
        for _ in range(2):
            metrics = trainer.validate(stop)
    seconds = metrics["val_seconds"]
    yield Row(
        f"validation of {photos:,} photos",
        seconds,
        "s",
        target=f"<= {VALIDATION_SECONDS:g} s",
        met=seconds <= VALIDATION_SECONDS if trainer.device.type == "cuda" else None,
        note=f"CIDEr-D {metrics['CIDEr-D']:.1f}",
    )
    yield Row("on the device: loss and captions", seconds - scoring[-1], "s")
    yield Row("scoring", scoring[-1], "s")


@torch.no_grad()
def timed_search(setting: Setting, trainer: Trainer) -> Iterator[Row]:
    """Beam search of 5 over the photos of val."""
    scale = setting.scale
    decoder: Any = trainer.decoder.eval()
    val = trainer.val
    assert isinstance(val, CachedPhotos)
    search = SearchOptions(beam_size=5, max_length=trainer.options.max_length)
    parts = np.array_split(np.arange(scale.val_photos), -(-scale.val_photos // scale.search_batch_size))
    lengths: list[int] = []

    def search_all() -> None:
        lengths.clear()
        for rows in parts:
            grid = val.read(rows).to(setting.device, trainer.precision)
            with autocast(setting.device, trainer.precision):
                lengths.extend(len(best.words) for (best,) in beam_search(decoder, grid, search))

    seconds = best_seconds(search_all, setting.device, rounds=1)
    note = f"{scale.val_photos / seconds:,.0f} captions/s, {np.mean(lengths):.1f} words per caption"
    yield Row(f"beam search, beam 5, {scale.val_photos:,} photos", seconds, "s", note=note)


# ---- CIDEr optimisation


def cider_idle_share(setting: Setting) -> Iterator[Row]:
    """The share of the time of CIDEr optimisation in which the GPU does nothing."""
    scale = setting.scale
    photos = setting.photos(scale.cider_updates * max(1, scale.cider_batch_size // CAPTIONS_PER_PHOTO))
    options = setting.options(objective="cider", start_from=Path("none"), batch_size=scale.cider_batch_size)
    trainer = make_trainer(options, setting.vocabulary, setting.data(photos), setting.device)
    output_layer: Any = trainer.decoder.output_layer
    with torch.no_grad():  # an untrained decoder hardly ever samples <end>
        output_layer.bias[END] = np.log(scale.vocabulary / 10)
    train_epoch(trainer)
    metrics = train_epoch(trainer)
    yield Row(f"{scale.cider_batch_size} captions per batch", metrics["captions_per_second"], "captions/s")
    if setting.device.type != "cuda":
        yield not_available("idle share of the GPU", "needs a GPU")
        return
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:  # it slows the CPU down, little without its events
        started = time.perf_counter()
        train_epoch(trainer)
        seconds = time.perf_counter() - started
    busy = busy_seconds(profiler)
    note = f"{busy:.2f} s of kernels and copies in {seconds:.2f} s; unprofiled {metrics['train_seconds']:.2f} s"
    yield Row("idle share of the GPU", f"{1 - busy / seconds:.0%}", note=note)


def busy_seconds(profiler: profile) -> float:
    """The length of the union of the intervals in which the GPU ran something."""
    spans = [event.time_range for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(0.0, span.end - max(end, span.start))
        end = max(end, span.end)
    return busy / 1e6


# ---- the library's way


class FixedBatch(nn.Module):
    """The loss of batches of one shape as a module of tensors, which torch.compile and make_graphed_callables take."""

    def __init__(self, trainer: Trainer, batch: Batch):
        super().__init__()
        self.decoder = trainer.decoder
        self.objective = trainer.objective
        assert isinstance(batch.photos, Grid)
        self.pooling = batch.photos.pooling
        self.batch_sizes = batch.words.batch_sizes
        self.indices = batch.indices
        self.device, self.precision = trainer.device, trainer.precision

    def forward(self, cells: Tensor, words: Tensor, targets: Tensor, photo_index: Tensor) -> Tensor:
        """The objective of the batch, a scalar."""
        grid = Grid(cells, self.pooling)
        batch = Batch(grid, PackedSequence(words, self.batch_sizes), targets, photo_index, self.indices)
        with autocast(self.device, self.precision):
            return self.objective(self.decoder, grid, batch, LossWeights()).objective


def the_library_s_way(setting: Setting) -> Iterator[Row]:
    """Forward and backward pass of one batch: plain, as we run it, and by the two ways of torch.

    torch gets the plain equations, without the layers that we wrote for speed, which it could not look into.
    """
    batch_size = setting.scale.library_batch_size
    data = setting.data(setting.photos(max(1, batch_size // CAPTIONS_PER_PHOTO)))
    trainer = make_trainer(setting.options(batch_size=batch_size), setting.vocabulary, data, setting.device)
    trainer.decoder.train()
    batch = data.train[np.arange(len(data.train.split))].to(setting.device, trainer.precision)
    assert isinstance(batch.photos, Grid)
    tensors = (batch.photos.cells, batch.words.data, batch.targets, batch.photo_index)
    ours = None
    for name, build in WAYS.items():
        started = time.perf_counter()
        try:
            step = build(FixedBatch(trainer, batch), tensors)
            seconds = time_step(step, trainer, setting.device)
        except Unavailable as error:
            yield not_available(name, str(error))
            continue
        except Exception as error:  # whatever it cannot compile or capture; an error of CUDA ends the process
            yield not_available(name, f"{type(error).__name__}: {str(error).splitlines()[:1]}")
            continue
        preparation = time.perf_counter() - started
        ours = seconds if name == "ours" else ours
        note = f"the first steps took {preparation:.1f} s"
        if ours and name.startswith("torch") and setting.device.type == "cuda":
            replaces = "it replaces ours" if seconds <= WITHIN * ours else "ours stays"
            note += f"; {seconds / ours:.2f} times as long as ours: {replaces}"
        yield Row(f"{batch_size} captions, {name}", 1e3 * seconds, "ms", note=note)


class Unavailable(Exception):
    """This machine cannot run a step in this way."""


def time_step(step: Callable[[], Tensor], trainer: Trainer, device: torch.device) -> float:
    """The best seconds of a step, and a check of its loss."""
    for _ in range(3):  # compilation, capture, allocation
        loss = step()
    if not bool(loss.isfinite()):
        raise ValueError(f"the loss is {float(loss)}")
    seconds = best_seconds(step, device)
    for parameter in trainer.state.parameters:
        parameter.grad = None
    return seconds


@contextlib.contextmanager
def plain_equations() -> Iterator[None]:
    """In the block, the attention decoder uses torch's layers and no kernels."""
    with mock.patch.multiple(attention, DeferredGradLinear=the_layer_itself, kernels_for=no_kernels):
        yield


def the_layer_itself(layer: nn.Linear) -> nn.Linear:
    """In place of DeferredGradLinear. A function of the module, since torch.compile compiles again for a new one."""
    return layer


def no_kernels(cells: Tensor) -> None:
    """In place of kernels_for."""


def plain_step(module: FixedBatch, tensors: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """Without graphs or kernels."""

    def step() -> Tensor:
        with plain_equations():
            return backward(module, tensors)

    return step


def our_step(module: FixedBatch, tensors: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """One CUDA graph with our kernels, as training runs a batch."""
    if module.device.type != "cuda":
        return lambda: backward(module, tensors)
    for parameter in module.decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            backward(module, tensors)
    torch.cuda.current_stream().wait_stream(side)
    return GraphCapture()(lambda: backward(module, tensors))


def compiled_step(module: FixedBatch, tensors: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """torch.compile in the mode that uses CUDA graphs; a CPU only traces it, since it has none."""
    settings: dict[str, Any] = {"mode": "reduce-overhead"} if module.device.type == "cuda" else {"backend": "eager"}
    compiled = torch.compile(module, dynamic=False, **settings)

    def step() -> Tensor:
        if module.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        for parameter in module.decoder.parameters():  # its graph overwrites the gradients that it has returned
            parameter.grad = None
        with plain_equations():  # it is compiled in the first call
            return backward(compiled, tensors).clone()

    return step


def graphed_step(module: FixedBatch, tensors: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """torch.cuda.make_graphed_callables."""
    if module.device.type != "cuda":
        raise Unavailable("needs a GPU")
    with plain_equations():
        graphed: Any = torch.cuda.make_graphed_callables(module, tensors)
    return lambda: backward(graphed, tensors)


def backward(module: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
    """Forward and backward pass -> the loss, detached."""
    loss = module(*tensors)
    loss.backward()
    return loss.detach()


WAYS = {
    "plain": plain_step,
    "ours": our_step,
    "torch.cuda.make_graphed_callables": graphed_step,
    'torch.compile(mode="reduce-overhead")': compiled_step,
}
