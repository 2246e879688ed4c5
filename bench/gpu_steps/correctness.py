"""The fast path against the plain one: growing batches, gradients, and a run that is stopped and resumed.

The fast path is what --fast-path turns on: CUDA graphs and fused kernels. Everything is compared through the Trainer,
as train.py runs it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from trainer_runs import PLAIN_WAY, SilentLog, make_trainer, train_epoch, way_of

from captioning.decoders import DECODERS, hard_attention
from captioning.decoders.hard_attention import HardAttentionDecoder
from captioning.errors import UserError
from captioning.runtime.checkpoint import load_checkpoint
from captioning.training.data import TrainingData
from captioning.training.options import TrainingOptions
from captioning.training.self_check import ERROR_FACTOR, ERROR_FLOOR
from captioning.training.trainer import Trainer
from gpu_steps.common import Row, Setting, describe_captures, memory_pressure, not_available, watch_captures

PLAIN: dict[str, Any] = {"fast_path": False, "cuda_graphs": False, "kernels": False}
NO_UPDATE = 1e-30  # a learning rate that leaves every weight as it is
LOSS_TOLERANCE = 0.01  # relative, of the mean loss of an epoch in half precision
LOSS_SCALE = 2.0**10  # in float16


# ---- growing batches


def avoids_fast_path(trainer: Trainer) -> bool:
    """Whether a trainer has not taken a fast path that there should be: plain would be compared with plain."""
    if trainer.fast_path:
        return way_of(trainer) == PLAIN_WAY
    return trainer.device.type == "cuda" and bool(trainer.decoder.uses_attention)


def growing_lengths(setting: Setting) -> Iterator[Row]:
    """Batches that outgrow the static sizes of those before, with little GPU memory left; then the same at random."""
    scale = setting.scale
    options = setting.options(batch_size=scale.growing_batch_size, dropout=0.0, seed=0)
    data = setting.growing_data(scale.growing_batches, scale.growing_batch_size)
    losses = {}
    with memory_pressure(setting, scale.free_gb):
        for name, order, changes in (("growing", 0, {}), ("random", 1, {}), ("growing, plain", 0, PLAIN)):
            run = replace(options, **changes)
            trainer = make_trainer(run, setting.vocabulary, data, setting.device, force=True)
            trainer.state.progress.epoch = order  # the data grow in epoch 0
            with watch_captures() as captures:
                metrics = train_epoch(trainer)
            losses[name] = metrics["train_loss"]
            expected = setting.device.type == "cuda" and not changes
            yield Row(
                f"{name}: mean loss of {scale.growing_batches} batches",
                losses[name],
                target="the fast path" if expected else "",
                met=not avoids_fast_path(trainer) if expected else None,
                note=f"{way_of(trainer)}, {describe_captures(captures)}; {metrics['train_seconds']:.1f} s",
            )
            del trainer
    difference = abs(losses["growing"] / losses["growing, plain"] - 1)
    yield Row(
        "growing: relative difference of the loss to the plain path",
        difference,
        target=f"<= {LOSS_TOLERANCE}",
        met=difference <= LOSS_TOLERANCE,
    )


# ---- gradients

Gradients = dict[int, dict[str, Tensor]]  # update -> parameter -> gradient


class Error(NamedTuple):
    """The relative error of a gradient against plain float32."""

    fast: float
    plain: float  # of the same parameter and batch
    parameter: str

    def excess(self) -> float:
        """The error as a multiple of what the self-check of a run allows."""
        return self.fast / (ERROR_FACTOR * self.plain + ERROR_FLOOR)


def gradient_errors(setting: Setting) -> Iterator[Row]:
    """e = |g - g32| / |g32| of each parameter in batches of growing lengths: the fast path beside the plain one."""
    scale = setting.scale
    data = setting.growing_data(scale.gradient_batches, scale.gradient_batch_size)
    options = setting.options(
        batch_size=scale.gradient_batch_size, dropout=0.0, grad_clip=0.0, learning_rate=NO_UPDATE, seed=0
    )
    with hard_attention_without_chance():
        for decoder in DECODERS:
            exact = gradients(setting, replace(options, decoder=decoder, precision="float32", **PLAIN), data)
            for precision in ("float32", "bfloat16", "float16"):
                if (decoder, precision, setting.device.type) == ("lstm", "float16", "cpu"):
                    yield not_available(f"{decoder}, {precision}", "a CPU has no LSTM in float16 for equal lengths")
                    continue
                run = replace(options, decoder=decoder, precision=precision)
                plain = exact if precision == "float32" else gradients(setting, replace(run, **PLAIN), data)
                trainer = make_trainer(run, setting.vocabulary, data, setting.device, force=True)
                try:
                    row = compare_gradients(f"{decoder}, {precision}", exact, plain, collect_gradients(trainer))
                except UserError as error:  # such as a loss that is not finite: the others are still compared
                    row = Row(f"{decoder}, {precision}", "failed", note=str(error), target="trains", met=False)
                met = row.met and not avoids_fast_path(trainer)
                yield row._replace(met=met, note=f"{way_of(trainer)}; {row.note}")


@contextlib.contextmanager
def hard_attention_without_chance() -> Iterator[None]:
    """In the block, hard attention looks at the most probable cell: padding would change which one it samples."""
    with (
        mock.patch.object(HardAttentionDecoder, "expectation_fraction", 0.0),
        mock.patch.object(hard_attention, "sample_categorical", lambda attention: attention.argmax(-1)),
    ):
        yield


def gradients(setting: Setting, options: TrainingOptions, data: TrainingData) -> Gradients:
    """The gradients of a new run: see `collect_gradients`."""
    return collect_gradients(make_trainer(options, setting.vocabulary, data, setting.device))


def collect_gradients(trainer: Trainer) -> Gradients:
    """The finite gradients of each update of an epoch, as the optimizer sees them.

    The epoch is run twice, and the second time counts: by then CUDA graphs are replayed. A gradient that overflows in
    float16 is left out.
    """
    scaler = trainer.state.scaler
    if scaler.is_enabled():  # a run would find the scale by overflowing a few times
        scaler.load_state_dict({**scaler.state_dict(), "scale": LOSS_SCALE})
    found: Gradients = {}

    def collect(*_: Any) -> None:
        named = {name: p.grad.detach().clone() for name, p in trainer.decoder.named_parameters() if p.grad is not None}
        if all(bool(gradient.isfinite().all()) for gradient in named.values()):
            found[trainer.state.progress.step] = named

    train_epoch(trainer)
    trainer.state.progress.epoch = 0  # the same batches again
    trainer.state.optimizer.register_step_pre_hook(collect)
    train_epoch(trainer)
    return found


def compare_gradients(name: str, exact: Gradients, plain: Gradients, fast: Gradients) -> Row:
    """The row of one decoder and precision."""
    updates = exact.keys() & plain.keys()  # those that overflow by plain PyTorch too prove nothing
    broken = updates - fast.keys()
    errors = []
    for update in sorted(updates & fast.keys()):
        for parameter, g32 in exact[update].items():
            size = g32.norm().clamp_min(torch.finfo(torch.float32).tiny)
            e_fast, e_plain = (float((g[update][parameter] - g32).norm() / size) for g in (fast, plain))
            errors.append(Error(e_fast, e_plain, parameter))
    worst = max(errors, key=Error.excess, default=Error(float("nan"), float("nan"), "none"))
    above = sum(error.excess() > 1 for error in errors)
    notes = [f"{worst.parameter}, where plain has {worst.plain:.2g}", f"{above} of {len(errors)} above"]
    if broken:
        notes.append(f"not finite in {len(broken)} updates")
    if len(updates) < len(exact):
        notes.append(f"plain overflowed in {len(exact) - len(updates)} updates")
    return Row(
        f"{name}: worst error of a gradient",
        worst.fast,
        target=f"all <= {ERROR_FACTOR:g} plain + {ERROR_FLOOR:g}",
        met=bool(errors) and not above and not broken,
        note="; ".join(notes),
    )


# ---- stop and resume


class StoppingLog(SilentLog):
    """Requests a stop at the end of an update, as Ctrl-C would."""

    def __init__(self, trainer: Trainer, update: int):
        super().__init__()
        self.trainer = trainer
        self.update = update

    def step(self, metrics: dict, quantity: str, value: float) -> None:
        """Called after the updates whose losses are read."""
        if self.trainer.state.progress.step >= self.update:
            raise_stop()


def raise_stop() -> None:
    """The signal of Ctrl-C, which the trainer's StopRequest receives.

    To this very thread: a signal to the process may reach another thread, and arrive after the last update.
    """
    signal.raise_signal(signal.SIGINT)


def stop_and_resume(setting: Setting) -> Iterator[Row]:
    """Two epochs at once, and the same stopped in the middle of the second and resumed: equal weights?"""
    scale = setting.scale
    data = setting.growing_data(scale.resume_updates, scale.gradient_batch_size)
    for decoder in DECODERS:
        options = setting.options(decoder=decoder, batch_size=scale.gradient_batch_size)
        whole = make_trainer(options, setting.vocabulary, data, setting.device, force=True)
        for _ in range(2):
            train_epoch(whole)
        stopped_at = stop_in_second_epoch(setting, options, data)
        saved = load_checkpoint(options.folder / "last.pt")
        resumed = make_trainer(options, setting.vocabulary, data, setting.device, saved)
        train_epoch(resumed)
        yield compare_weights(decoder, whole, resumed, stopped_at)


def stop_in_second_epoch(setting: Setting, options: TrainingOptions, data: TrainingData) -> int:
    """Train until a stop in the middle of the second epoch, which saves last.pt -> the update it stopped at."""
    trainer = make_trainer(options, setting.vocabulary, data, setting.device, force=True)
    train_epoch(trainer)
    try:
        train_epoch(trainer, StoppingLog(trainer, setting.scale.resume_updates // 3))
    except KeyboardInterrupt:
        return trainer.state.progress.step
    raise AssertionError("the run did not stop")


def compare_weights(decoder: str, whole: Trainer, resumed: Trainer, stopped_at: int) -> Row:
    """The row of one decoder."""
    differences = {
        name: float((one - other).detach().abs().max())
        for (name, one), other in zip(whole.decoder.named_parameters(), resumed.decoder.parameters(), strict=True)
    }
    name, largest = max(differences.items(), key=lambda item: item[1])
    return Row(
        f"{decoder}, stopped and resumed: weights",
        "bit-equal" if largest == 0 else "differ",
        target="bit-equal",
        met=largest == 0,
        note=f"{way_of(resumed)}, stopped at update {stopped_at} of epoch 2"
        + f"; {name} differs by {largest:.2g}" * (largest > 0),
    )
