"""Where the decoders' speed lives: ways of doing what their equations say.

AllSteps: a linear layer that a recurrence applies at every step, with one product for its weight's gradient.
Backpropagation through time forms dW = sum_t dy_t^T x_t term by term: many products of few rows, each as large as the
weight itself. Here every step notes x_t and dy_t, and the sum is one product behind the last of them.

in_parts: the scores of attention, a few photos at a time.

all_words, tanh_scores: attention of all words at once, where no hidden state waits for it.

kernels_for: captioning/decoders/kernels.py, where it serves.

Letters: B photos, K captions a photo, R rows of a step, W rows of all steps, P cells, A attention, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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


def all_words(look: Callable[..., Tensor], photos: tuple[Tensor, ...], rows: tuple[Tensor, ...], photo: Tensor,
              sizes: list[int]) -> Tensor:  # fmt: skip
    """look(photos (B, ...), rows of K words a photo (B K, ...)) -> (B K, ...), of all words packed (W, ...).

    photo (R,) int64: whose each caption is; sizes: rows of each step. On a CPU a photo is read once, for all words of
    its captions. On a GPU the number of these would have to be waited for: there a step's rows look together.
    """
    return (photo_by_photo if photo.device.type == "cpu" else step_by_step)(look, photos, rows, photo, sizes)


def photo_by_photo(look: Callable, photos: tuple, rows: tuple, photo: Tensor, sizes: list[int]) -> Tensor:
    whose = torch.cat([photo[:size] for size in sizes])  # (W,)
    order, words = whose.argsort(stable=True), whose.bincount(minlength=len(photos[0])).tolist()
    of_photo = zip(*(tensor.split(1) for tensor in photos), strict=True)
    of_words = zip(*(tensor.index_select(0, order).split(words) for tensor in rows), strict=True)
    seen = torch.cat([look(*one, *some) for one, some in zip(of_photo, of_words, strict=True) if len(some[0])])
    return torch.empty_like(seen).index_copy(0, order, seen)


def step_by_step(look: Callable, photos: tuple, rows: tuple, photo: Tensor, sizes: list[int]) -> Tensor:
    photos = tuple(tensor.index_select(0, photo) for tensor in photos)
    steps = zip(*(tensor.split(sizes) for tensor in rows), strict=True)
    return torch.cat([look(*(tensor[: len(step[0])] for tensor in photos), *step) for step in steps])


def tanh_scores(keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    """w . tanh(keys (B, P, A) + query (B, K, A)) -> (B, K, P); weight (1, A).

    On a CPU the B K P A sums are made a few words at a time, in the cache and at least in float32, and once more in
    the backward pass: to write them to memory and to read them back takes longer.
    """
    if keys.device.type != "cpu" or torch.compiler.is_compiling():  # a graph to be exported holds no loop
        return F.linear(torch.add(keys[:, None], query[:, :, None]).tanh_(), weight).squeeze(3)
    dtype = torch.promote_types(keys.dtype, torch.float32)
    return _TanhScores.apply(keys.to(dtype), query.to(dtype), weight.to(dtype).view(-1))


class _TanhScores(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(keys, query, weight)
        scores = keys.new_empty(*query.shape[:2], keys.shape[1])
        for one, some, tanh in _tanh_in_parts(keys, query):
            torch.mv(tanh.flatten(0, 1), weight, out=scores[one, some].view(-1))
        return scores

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of sum(g tanh(k + q) w), with tanh' = 1 - tanh^2."""
        keys, query, weight = context.saved_tensors
        of_weight = torch.zeros_like(weight)
        of_keys = gradient.sum(1)[:, :, None].expand_as(keys).clone()
        of_query = gradient.sum(2)[:, :, None].expand_as(query).clone()
        for one, some, tanh in _tanh_in_parts(keys, query):
            now = gradient[one, some]  # (words, P)
            of_weight.addmv_(tanh.flatten(0, 1).T, now.flatten())
            tanh.square_().mul_(now[:, :, None])
            of_keys[one] -= tanh.sum(0)
            of_query[one, some] -= tanh.sum(1)
        return of_keys * weight, of_query * weight, of_weight


def _tanh_in_parts(keys: Tensor, query: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """keys (B, P, A), query (B, K, A) -> photo, which words, tanh(keys + query) (words, P, A): gone with the next."""
    words = max(1, IN_CACHE // keys[0].numel())
    space = keys.new_empty(min(words, query.shape[1]), *keys.shape[1:])
    for one in range(len(keys)):
        for first in range(0, query.shape[1], words):
            some = slice(first, first + words)
            queries = query[one, some, None]
            yield one, some, torch.add(keys[one], queries, out=space[: len(queries)]).tanh_()
