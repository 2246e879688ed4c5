"""Where the decoders' speed lives: ways of doing what their equations say.

AllSteps: a linear layer that a recurrence applies at every step, with one product for its weight's gradient.
Backpropagation through time forms dW = sum_t dy_t^T x_t term by term: many products of few rows, each as large as the
weight itself. Here every step notes x_t and dy_t, and the sum is one product behind the last of them.

AllScores: the scores of attention, without their sums in memory.

all_words: attention of all words at once, where no hidden state waits for it.

kernels_for: captioning/decoders/kernels.py, where it serves.

Letters: B photos, K captions a photo, R rows of a step, W rows of all steps, P cells, A attention, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from captioning.decoders.protocol import upcast

IN_CACHE = 2**18  # elements: what a core works on at once
ACTIVATIONS = {  # f, in place; what f gave -> f', in place: 0 or 1, and 1 - tanh^2
    "relu": (Tensor.relu_, Tensor.sign_),
    "tanh": (  # 2 sigmoid(2 x) - 1, in less than half of torch's time for tanh, which is more exact only next to 0
        lambda sums: sums.mul_(2).sigmoid_().mul_(2).sub_(1),
        lambda tanh: torch.addcmul(tanh.new_ones(()), tanh, tanh, value=-1, out=tanh),
    ),
}
Layer = Callable[[Tensor], Tensor]  # a linear layer itself, or AllSteps of it


class DeferredGradLinear:
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
    def forward(context: Any, inputs: Tensor, parameters: Tensor, steps: DeferredGradLinear, number: int) -> Tensor:
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


class ChunkedAttentionScores:
    """The scores of attention, w . f(k_p + q) with f relu or tanh, for every step of one forward pass.

    In between are R P A sums a step: to ask for so much memory, to write it and to read it takes longer than the sums
    themselves. So a CPU makes them in its cache, a few rows of one photo at a time and at least in float32, and anew
    where gradients need them: those of keys and w wait for the last step, as in AllSteps.
    """

    def __init__(self, activation: str, keys: Tensor, weight: Tensor, photo: Tensor | None = None):
        """keys (B, P, A), weight (1, A); photo (R,) int64: whose each row is; without it there are K rows a photo."""
        self.activation, self.keys, self.weight, self.photo_index = activation, keys, weight, photo
        self.in_parts = keys.device.type == "cpu" and not torch.compiler.is_compiling()  # no loops in exported graphs
        if self.in_parts:
            self.keys, self.weight = upcast(keys.detach()), upcast(weight.detach())
            self.count, self.notes = 0, {}  # by step: queries (R, A), gradients of the scores (R, P), photos (R,)
            self.parameters = _Keys.apply(keys, weight, activation, self.notes)
        elif photo is not None:
            self.keys = keys.index_select(0, photo)

    def __call__(self, query: Tensor) -> Tensor:
        """(B, K, A) -> (B, K, P); where each row has its photo, the first rows' alone: (R, 1, A) -> (R, 1, P)."""
        photos, rows = self.keys.shape[0], query.shape[0] * query.shape[1]
        if not self.in_parts:
            self.keys = self.keys if self.photo_index is None or rows == photos else self.keys[:rows]
            activated = getattr(torch, f"{self.activation}_")(self.keys[:, None] + query[:, :, None])  # (B, K, P, A)
            return F.linear(activated, self.weight).squeeze(3)
        photo = (
            torch.arange(photos).repeat_interleave(rows // photos)
            if self.photo_index is None
            else self.photo_index[:rows]
        )
        self.count += 1
        scores = _Scores.apply(upcast(query).flatten(0, 1), self.parameters, self, photo, self.count)
        return scores.view(*query.shape[:2], -1)


class _Keys(torch.autograd.Function):
    """Stands for keys and w in the graph: behind all steps, its backward sees the notes of every one."""

    @staticmethod
    def forward(context: Any, keys: Tensor, weight: Tensor, activation: str, notes: dict) -> Tensor:
        context.save_for_backward(keys, weight)
        context.activation, context.notes = activation, notes  # not the scores: a ring is freed late
        return keys.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(context: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        keys, weight = context.saved_tensors
        notes = (context.notes[number] for number in sorted(context.notes))
        query, gradient, photo = (torch.cat(tensors) for tensors in zip(*notes, strict=True))  # of W rows
        context.notes.clear()
        of_keys, of_weight = upcast(torch.zeros_like(keys)), upcast(torch.zeros_like(weight[0]))
        order, parts, sums = _in_parts(context.activation, upcast(keys), query, photo)
        now = gradient.index_select(0, order).split([rows for _, rows in parts])  # (K, P) of each part
        for (one, _), of_scores, activated in zip(parts, now, sums, strict=True):
            of_weight.addmv_(activated.flatten(0, 1).T, of_scores.view(-1))
            slopes = ACTIVATIONS[context.activation][1](activated)
            for slope, of_score in zip(slopes, of_scores[:, :, None], strict=True):
                of_keys[one].addcmul_(slope, of_score)
        return of_keys.mul_(weight).to(keys.dtype), of_weight[None].to(weight.dtype), None, None


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, query: Tensor, parameters: Tensor, scores: ChunkedAttentionScores, photo: Tensor, number: int
    ) -> Tensor:
        context.save_for_backward(query, photo)
        context.scores, context.number = scores, number
        order, _, sums = _in_parts(scores.activation, scores.keys, query, photo)
        of_rows = torch.cat([torch.mv(activated.flatten(0, 1), scores.weight[0]) for activated in sums])
        of_rows = of_rows.view(len(query), -1)  # by photo
        return torch.empty_like(of_rows).index_copy_(0, order, of_rows)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (query, photo), scores = context.saved_tensors, context.scores
        if context.needs_input_grad[1]:
            scores.notes[context.number] = query, gradient, photo
        order, parts, sums = _in_parts(scores.activation, scores.keys, query, photo)
        now = gradient.index_select(0, order)[:, None].split([rows for _, rows in parts])  # (K, 1, P) of each part
        slopes = map(ACTIVATIONS[scores.activation][1], sums)
        of_query = torch.cat([torch.bmm(*both) for both in zip(now, slopes, strict=True)])[:, 0].mul_(scores.weight)
        return torch.empty_like(query).index_copy_(0, order, of_query), None, None, None, None


def _in_parts(
    activation: str, keys: Tensor, query: Tensor, photo: Tensor
) -> tuple[Tensor, list[tuple[int, int]], Iterator[Tensor]]:
    """Queries (R, A), their photos (R,) -> the rows by photo (R,); a photo, and how many of its rows, of each part;
    f(k_p + q) of each (K, P, A), gone with the next."""
    order, counts = photo.argsort(stable=True), enumerate(photo.bincount().tolist())
    most = max(1, IN_CACHE * torch.get_num_threads() // keys[0].numel())
    parts = [(one, min(most, rows - first)) for one, rows in counts for first in range(0, rows, most)]
    space = keys.new_empty(min(most, len(query)), *keys.shape[1:])
    queries = query.index_select(0, order)[:, None].split([rows for _, rows in parts])
    sums = (torch.add(keys[one], some, out=space[:n]) for (one, n), some in zip(parts, queries, strict=True))
    return order, parts, map(ACTIVATIONS[activation][0], sums)


def all_words(
    look: Callable[..., Tensor], photos: tuple[Tensor, ...], rows: tuple[Tensor, ...], photo: Tensor, sizes: list[int]
) -> Tensor:
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
