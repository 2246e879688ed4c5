"""Exponential moving average (EMA) of the weights (Polyak and Juditsky 1992, https://doi.org/10.1137/0330046).

    average <- d average + (1 - d) weights,    d = min(decay, (1 + n) / (10 + n)) after n updates

The averaged weights vary less from update to update and caption better. The small d of the first updates, TensorFlow's
warm-up, lets the average forget the initial weights soon.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class EMA:
    """Averages parameters while they are trained. `average_parameters()` swaps the averages in."""

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.parameters: list[Tensor] = list(parameters)
        self.decay = decay
        self.updates = 0
        self.averages: list[Tensor] = []  # empty until the first update: weights may still be loaded until then

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the average. Call it after every update of the weights."""
        if not self.averages:
            self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)

    @contextlib.contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Context manager: inside it, the parameters hold the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the values, not the tensors: CUDA graphs read the weights where they were at the capture."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)

    def state_dict(self) -> dict[str, int | list[Tensor]]:
        """The averages and the number of updates."""
        return {"updates": self.updates, "averages": self.averages}

    def load_state_dict(self, state: dict) -> None:
        """Restore a state_dict, on the devices of the parameters. Raises ValueError if their numbers differ."""
        self.updates = state["updates"]
        pairs = zip(self.parameters, state["averages"], strict=True)
        self.averages = [average.to(parameter.device) for parameter, average in pairs]
