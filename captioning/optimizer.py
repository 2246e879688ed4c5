"""The optimizer, and its learning rates: functions of where training stands, so resuming needs no memory of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from config import Train


def rate_factor(config: Train, behind: float, after: float) -> float:
    """What the learning rates are multiplied by for one update. behind, after: epochs before it and with it.

    step:    decay^floor(behind / decay_every)
    cosine:  (1 + cos(pi behind / epochs)) / 2                (Loshchilov and Hutter 2017, without restarts)
    both times min(1, after / warm_up)
    """
    if config.schedule == "cosine":
        factor = (1 + math.cos(math.pi * min(1.0, behind / config.epochs))) / 2
    else:
        factor = config.decay ** (behind // config.decay_every)
    return factor * min(1.0, after / config.warm_up) if config.warm_up else factor


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
    return torch.optim.AdamW(groups, lr=Train.learning_rate, weight_decay=0.0, fused=True)
