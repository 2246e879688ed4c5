"""Whether a fast way to compute a batch is right: its gradients against those of plain PyTorch.

Three gradients of one batch are computed from the same random state: g32 by plain PyTorch in float32, g_plain by plain
PyTorch in the run's precision, and g_fast by the fast way. With e = |g - g32| / |g32| for each parameter, the fast way
is right if all is finite and

    e_fast <= ERROR_FACTOR e_plain + ERROR_FLOOR        for every parameter
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

ERROR_FACTOR = 2.0
ERROR_FLOOR = 1e-3
ALIGNMENT = 64  # elements: 256 bytes, as of tensors that torch allocates, so that kernels read several at once


class Gradients:
    """The gradients of all parameters, as views of one tensor that keeps its address.

    The parameters' `grad` must be zeroed in place, not set to None.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]):
        """parameters: by name, float32, on one device."""
        self.names = [*parameters]
        # of the part of each parameter, with zeros that align the next one
        self.sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters.values()]
        device = next(iter(parameters.values())).device
        self.flat = torch.zeros(sum(self.sizes), device=device)
        for parameter, part in zip(parameters.values(), self.flat.split(self.sizes), strict=True):
            parameter.grad = part[: parameter.numel()].view_as(parameter)

    def compute(self, backward: Callable[[], object]) -> Tensor:
        """The gradients that backward adds, like `flat`."""
        self.flat.zero_()
        backward()
        return self.flat.clone()

    def errors(self, gradients: Tensor, reference: Tensor) -> Tensor:
        """|g - reference| / |reference| of each parameter, float32 on the CPU; both arguments are like `flat`.

        A parameter whose reference is zero has the error 0 if its gradient is zero too, else infinity.
        """
        pairs = zip(gradients.split(self.sizes), reference.split(self.sizes), strict=True)
        norms = torch.stack([torch.stack([(part - true).norm(), true.norm()]) for part, true in pairs]).cpu()
        return (norms[:, 0] / norms[:, 1]).where(norms[:, 0] != 0, 0.0)  # NaN stays NaN


class Finding(NamedTuple):
    """The parameter whose gradient exceeds what is allowed the most, or comes closest to that."""

    parameter: str
    error: float  # of the fast way
    plain_error: float  # of plain PyTorch in the same precision
    is_right: bool

    def __str__(self) -> str:
        return f"{self.error:.2%} in the gradient of {self.parameter}, plain PyTorch {self.plain_error:.2%}"


def judge(names: Sequence[str], errors: Tensor, plain_errors: Tensor) -> Finding:
    """Compare the errors of a fast way with those of plain PyTorch, one per parameter; NaN is wrong."""
    allowed = ERROR_FACTOR * plain_errors + ERROR_FLOOR
    worst = int((errors - allowed).nan_to_num(torch.inf, torch.inf, -torch.inf).argmax())
    is_right = bool((errors <= allowed).all())
    return Finding(names[worst], float(errors[worst]), float(plain_errors[worst]), is_right)
