"""The optimizer and its learning-rate schedules.

A schedule is a function (options, epoch) -> factor. `epoch` is a float: the epochs trained before the update, so 2.5 is
the middle of the third epoch. Both learning rates, the decoder's and the encoder's, are multiplied by the factor. A
schedule has no state, so a resumed run continues it exactly. To add one, write the function here, register it in
SCHEDULES (captioning/training/__init__.py), and add its settings to TrainingOptions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from captioning.training import SCHEDULES
from captioning.training.options import COMMON_DEFAULTS, TrainingOptions


def learning_rate_factor(options: TrainingOptions, epoch_start: float, epoch_end: float) -> float:
    """Return the factor of the learning rates for one update.

    The factor is schedule(epoch_start) * min(1, epoch_end / warmup_epochs): linear warm-up. epoch_start, epoch_end:
    epochs trained before and after this update.
    """
    factor = SCHEDULES[options.schedule](options, epoch_start)
    if options.warmup_epochs:
        factor *= min(1.0, epoch_end / options.warmup_epochs)
    return factor


def step_decay(options: TrainingOptions, epoch: float) -> float:
    """lr_decay ^ floor(epoch / lr_decay_every)"""
    return options.lr_decay ** (epoch // options.lr_decay_every)


def cosine_decay(options: TrainingOptions, epoch: float) -> float:
    """(1 + cos(pi epoch / epochs)) / 2, without restarts (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983)"""
    return (1 + math.cos(math.pi * min(1.0, epoch / options.epochs))) / 2


def inverse_sqrt_decay(options: TrainingOptions, epoch: float) -> float:
    """(max(epoch, w) / w)^-0.5 with w = warmup_epochs; 1 epoch if that is 0

    With the linear warm-up it is the schedule of Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762, eq. 3) in
    epochs, whose largest value is --learning-rate.
    """
    start = options.warmup_epochs or 1.0
    return (max(epoch, start) / start) ** -0.5


def parameter_groups(trained: dict[str, Iterable[nn.Parameter]], weight_decay: float) -> list[dict]:
    """Return the optimizer's groups: for each learning rate one with weight decay and one without (biases and norms).

    trained: the name of a learning-rate setting, such as "learning_rate" -> parameters. Frozen ones are left out.
    """
    return [group for rate, parameters in trained.items() for group in _groups_of(parameters, rate, weight_decay)]


def layer_decay_groups(
    layers: Sequence[Iterable[nn.Parameter]], rate: str, weight_decay: float, layer_decay: float
) -> list[dict]:
    """Like `parameter_groups`, with the learning rate layer_decay^d of the d-th layer before the last.

    Layer-wise learning-rate decay (Clark et al. 2020, https://arxiv.org/abs/2003.10555, appendix). layers: parameters
    by depth, the last one next to the decoder. The last group has the full rate, so logs show that one.
    """
    groups = []
    for depth, parameters in enumerate(layers):
        scale = layer_decay ** (len(layers) - 1 - depth)
        groups += [group | {"scale": scale} for group in _groups_of(parameters, rate, weight_decay) if group["params"]]
    return groups


def _groups_of(parameters: Iterable[nn.Parameter], rate: str, weight_decay: float) -> list[dict]:
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim > 1]
    vectors = [parameter for parameter in trainable if parameter.ndim <= 1]
    return [
        {"params": matrices, "rate": rate, "weight_decay": weight_decay},
        {"params": vectors, "rate": rate, "weight_decay": 0.0},
    ]


def make_optimizer(groups: Iterable) -> torch.optim.Optimizer:
    """Return AdamW (which is Adam without weight decay). Fused: each update reads and writes every weight once."""
    return torch.optim.AdamW(groups, lr=COMMON_DEFAULTS.learning_rate, weight_decay=0.0, fused=True)
