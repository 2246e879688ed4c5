"""The learning rate as a function of where training stands, and nothing else: a resumed run needs no memory of it."""

from __future__ import annotations

import math

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
