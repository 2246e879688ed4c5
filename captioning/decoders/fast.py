"""Where the decoders' speed lives: ways of doing what their equations say.

AllSteps: a linear layer that a recurrence applies at every step, with one product for its weight's gradient.
Backpropagation through time forms dW = sum_t dy_t^T x_t term by term: many products of few rows, each as large as the
weight itself. Here every step notes x_t and dy_t, and the sum is one product behind the last of them.

in_parts: the scores of attention, a few photos at a time.

kernels_for: captioning/decoders/kernels.py, where it serves.

Letters: B photos, K captions a photo, R rows of a step, W rows of all steps, P cells, A attention, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IN_CACHE = 2**19  # elements
Layer = Callable[[Tensor], Tensor]  # a linear layer itself, or AllSteps of it


class AllSteps:
    """y_t = W x_t + b for every step of one forward pass: values and gradients are those of the layer.

    Under autocast the weight is rounded once, and gradients add up in the product, not in half precision.
    """

    def __init__(self, layer: nn.Linear):
        device = layer.weight.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layer.weight.dtype
        self.weight = layer.weight.detach().to(half)  # (O, I)
        self.bias = None if layer.bias is None else layer.bias.detach().to(half)
        self.count = 0  # of steps
        self.notes: dict[int, tuple[Tensor, Tensor]] = {}  # by step: x_t (R, I), dy_t (R, O) of the backward pass
        self.parameters = _Parameters.apply(layer.weight, layer.bias, self.notes)

    def __call__(self, inputs: Tensor) -> Tensor:
        """(R, I) -> (R, O), in the type that autocast computes in."""
        self.count += 1
        return _OneStep.apply(inputs.to(self.weight.dtype), self.parameters, self, self.count)


class _Parameters(torch.autograd.Function):
    """Stands for weight and bias in the graph: behind all steps, its backward sees the notes of every one."""

    @staticmethod
    def forward(context: Any, weight: Tensor, bias: Tensor | None, notes: dict) -> Tensor:
        context.notes, context.dtype = notes, weight.dtype
        return weight.new_empty(0)

    @staticmethod
    def backward(context: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        inputs, gradients = (
            torch.cat(tensors) for tensors in zip(*context.notes.values(), strict=True)
        )  # (W, I), (W, O)
        context.notes.clear()
        of_bias = gradients.sum(0, dtype=context.dtype) if context.needs_input_grad[1] else None
        return (gradients.T @ inputs).to(context.dtype), of_bias, None


class _OneStep(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, inputs: Tensor, parameters: Tensor, steps: AllSteps, number: int) -> Tensor:
        context.save_for_backward(inputs)
        context.steps, context.number = steps, number
        return F.linear(inputs, steps.weight, steps.bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if context.needs_input_grad[1]:
            context.steps.notes[context.number] = (*context.saved_tensors, gradient)
        return gradient @ context.steps.weight, None, None, None


def kernels_for(cells: Tensor) -> ModuleType | None:
    """The kernels, for cells on an NVIDIA GPU that ask for no gradient, as those of the cache; None for others."""
    serve = cells.is_cuda and torch.version.cuda and not cells.requires_grad and cells.element_size() <= 4
    return _kernels(cells.device) if serve else None


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    try:
        from captioning.decoders import kernels

        kernels.try_out(device)
    except Exception as error:  # no Triton, no C compiler for it, a GPU that it does not know: whatever it raises
        reason = str(error).partition("\n")[0] or type(error).__name__
        print(f"attention goes without its kernels for GPUs, which is slower: {reason}")
        return None
    return kernels


def in_parts(scores: Callable[..., Tensor], keys: Tensor, query: Tensor) -> Tensor:
    """scores(keys (B, P, A), query (B, K, A)) -> (B, K, P), a few photos at a time where nothing learns on a CPU.

    In between there are B K P A sums: asking the system for so much memory takes longer than the sums themselves.
    """
    if torch.is_grad_enabled() or keys.device.type != "cpu":
        return scores(keys, query)
    shape = query.shape[1], *keys.shape[1:]
    photos = max(1, IN_CACHE // math.prod(shape))
    sums = torch.empty(min(photos, len(keys)), *shape, dtype=torch.result_type(keys, query))
    parts = zip(keys.split(photos), query.split(photos), strict=True)
    return torch.cat([scores(*part, out=sums[: len(part[0])]) for part in parts])
