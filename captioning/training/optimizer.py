"""The optimizer, and its learning rates: functions of where training stands, so resuming needs no memory of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from captioning.training import SCHEDULES
from captioning.training.options import TrainingOptions


def learning_rate_factor(options: TrainingOptions, epoch_start: float, epoch_end: float) -> float:
    """The factor of the learning rates for one update: that of the schedule, times min(1, epoch_end / warmup_epochs).

    epoch_start, epoch_end: epochs trained before and after this update.
    """
    factor = SCHEDULES[options.schedule](options, epoch_start)
    return factor * min(1.0, epoch_end / options.warmup_epochs) if options.warmup_epochs else factor


def step_decay(options: TrainingOptions, epoch: float) -> float:
    """lr_decay ^ floor(epoch / lr_decay_every)"""
    return options.lr_decay ** (epoch // options.lr_decay_every)


def cosine_decay(options: TrainingOptions, epoch: float) -> float:
    """(1 + cos(pi epoch / epochs)) / 2, without restarts (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983)"""
    return (1 + math.cos(math.pi * min(1.0, epoch / options.epochs))) / 2


def parameter_groups(trained: dict[str, Iterable[nn.Parameter]], weight_decay: float) -> list[dict]:
    """For the optimizer, a group (or two) a learning rate, by its setting's name; biases and norms do not decay."""
    groups = []
    for rate, parameters in trained.items():
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        for decays in (True, False):
            some = [parameter for parameter in parameters if (parameter.ndim > 1) == decays]
            groups.append({"params": some, "rate": rate, "weight_decay": weight_decay if decays else 0.0})
    return groups


def make_optimizer(groups: Iterable) -> torch.optim.Optimizer:
    """AdamW, which without weight decay is Adam; fused: each weight is read and written once an update."""
    return torch.optim.AdamW(groups, lr=TrainingOptions.learning_rate, weight_decay=0.0, fused=True)
