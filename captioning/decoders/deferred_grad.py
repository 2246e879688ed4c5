"""Gradients that are computed once, after the backward pass of the last step, not once per step.

A recurrence uses the same tensors, such as a weight or the keys of the attention, at every step, and autograd adds up
their gradient step by step. Often one large operation over the rows of all steps is faster and more precise than many
small ones.

    deferred = DeferredGradient(gradients_of_weight, weight)

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs, anchor, deferred):
            ctx.deferred = deferred
            ctx.step = deferred.next_step()
            ...

        @staticmethod
        def backward(ctx, gradient):
            if ctx.needs_input_grad[1]:  # of the anchor
                ctx.deferred.save(ctx.step, inputs, gradient)
            ...  # the gradient of the anchor is None

    outputs = [Step.apply(inputs, deferred.anchor, deferred) for inputs in ...]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Saved = tuple[Tensor, ...]  # what one step saves in its backward pass
ComputeGradients = Callable[..., tuple["Tensor | None", ...]]  # (steps, *tensors) -> a gradient per tensor


class DeferredGradient:
    """Defers the gradients of `tensors` to the end of the backward pass of all steps.

    compute(steps, *tensors) returns one gradient, or None, per tensor. `steps` lists what each step saved, first step
    first. `compute` must not refer to this object: that reference cycle would keep the graph in memory.
    """

    def __init__(self, compute: ComputeGradients, *tensors: Tensor | None):
        self.num_steps = 0
        self.saved: dict[int, Saved] = {}  # by step
        # Every step takes the anchor as an input, so autograd runs the anchor's backward after that of all steps.
        self.anchor = _Anchor.apply(compute, self.saved, *tensors)

    def next_step(self) -> int:
        """Return the number of a new step."""
        self.num_steps += 1
        return self.num_steps

    def save(self, step: int, *tensors: Tensor) -> None:
        """Save what `compute` needs of this step. Call it in the step's backward, if the anchor needs a gradient."""
        self.saved[step] = tensors


class _Anchor(torch.autograd.Function):
    """Stands for the tensors in the autograd graph. Its output is empty."""

    @staticmethod
    def forward(ctx: Any, compute: ComputeGradients, saved: dict[int, Saved], *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.compute = compute
        ctx.saved = saved  # not the DeferredGradient, which refers to the anchor: a cycle
        first = next(tensor for tensor in tensors if tensor is not None)
        return first.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        steps: Sequence[Saved] = [ctx.saved[step] for step in sorted(ctx.saved)]
        ctx.saved.clear()
        return None, None, *ctx.compute(steps, *ctx.saved_tensors)
