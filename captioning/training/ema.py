"""An exponential moving average of the weights: steadier than the weights of any one update, and better captions.

    average <- d average + (1 - d) weights,    d = min(decay, (1 + n) / (10 + n)) after n updates

so that the average soon forgets where it started (Polyak and Juditsky 1992; the warm-up is TensorFlow's).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class EMA:
    """Follows parameters that are trained; the averages take their place while it is `in_place`."""

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.averages: list[Tensor] = []  # from the first update on, when the weights to start from are there

    @torch.no_grad()
    def update(self) -> None:
        """Once after every update of the weights."""
        if not self.averages:
            self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters are the averages inside this block, and themselves again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.data, average.data = average.data, parameter.data

    def state_dict(self) -> dict[str, int | list[Tensor]]:
        return {"updates": self.updates, "averages": self.averages}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        places = zip(self.parameters, state["averages"], strict=True)
        self.averages = [average.to(parameter.device) for parameter, average in places]
