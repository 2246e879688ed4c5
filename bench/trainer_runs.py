"""Epochs of the real Trainer for the benchmarks, without a command line."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from synthetic import first_photos
from torch.utils.flop_counter import FlopCounterMode

from captioning.runtime.log import Log
from captioning.runtime.signals import StopRequest
from captioning.training import OBJECTIVES
from captioning.training.data import TrainingData
from captioning.training.options import TrainingOptions
from captioning.training.trainer import Trainer
from preprocess.vocabulary import Vocabulary

PLAIN_WAY = "plain PyTorch"  # str of captioning.training.fast_path.PLAIN


class SilentLog(Log):
    """A log that writes no file."""

    def __init__(self) -> None:
        super().__init__(Path(), {}, None, is_main=False)


def make_trainer(
    options: TrainingOptions,
    vocabulary: Vocabulary,
    data: TrainingData,
    device: torch.device,
    saved: dict | None = None,
    force: bool = False,
) -> Trainer:
    """The trainer that train.py makes, on this data.

    saved: the checkpoint to resume from. force: take the fast path if it is right, even where it is slower.
    """
    gc.collect()  # an earlier trainer leaves the GPU
    objective = OBJECTIVES[options.objective](options, data.train.split)
    trainer = Trainer(options, vocabulary, data, objective, device)
    if saved:
        trainer.state.restore(saved)
    trainer.start_fast_path(SilentLog())
    if force and trainer.fast_path:
        trainer.fast_path.resume(trainer.fast_path.ways[0])  # as a run that has used it
    return trainer


def way_of(trainer: Trainer) -> str:
    """How batches are computed, after the first one."""
    return str(trainer.fast_path.way) if trainer.fast_path else PLAIN_WAY


def train_epoch(trainer: Trainer, log: Log | None = None) -> dict[str, Any]:
    """Train the rest of an epoch, without its validation -> the metrics of the run's log."""
    with StopRequest() as stop:
        metrics = trainer.train_epoch(log or SilentLog(), stop)
    trainer.state.progress.finish_epoch()
    return metrics


def operations_per_word(
    options: TrainingOptions, vocabulary: Vocabulary, data: TrainingData, device: torch.device
) -> float:
    """Floating-point operations of the matrix products of an update, per word: counted in one batch."""
    captions_per_photo = max(1, data.train.split.num_captions(0))
    one_batch = first_photos(data, max(1, options.batch_size // captions_per_photo))
    plain = replace(options, fast_path=False, cuda_graphs=False, kernels=False)  # a kernel's work is not counted
    trainer = make_trainer(plain, vocabulary, one_batch, device)
    with FlopCounterMode(display=False) as counter:
        train_epoch(trainer)
    return counter.get_total_flops() / int(one_batch.train.split.target_counts().sum())
