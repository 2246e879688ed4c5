"""Faster equivalents of what the decoders' equations say: same values, same gradients.

DeferredGradLinear: a linear layer of a recurrence, whose weight gets its gradient from one product over all steps.
DeferredGradProduct: the same for products with matrices of each caption, such as keys and values.
OutputLayer: the linear layer to the logits, faster for the few rows of a search.
ChunkedAttentionScores: attention scores that never hold their (R, P, A) activations in memory.
attend_all_steps: attention of all words at once, for decoders whose hidden state does not depend on it.
kernels_for: the Triton kernels of captioning/decoders/kernels.py, where they apply.
kernels_unavailable: why they do not apply.

Legend: B photos, K captions per photo, R rows of a step, W rows of all steps, P cells, A attention size, I inputs,
O outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from captioning.decoders.deferred_grad import DeferredGradient, Saved
from captioning.decoders.protocol import photo_of_each_word, upcast
from captioning.runtime.kernel_loading import load_kernels

CACHE_ELEMENTS = 2**18  # elements of a chunk per thread: they stay in the cache of a core

KERNELS = "captioning.decoders.kernels"
MAX_CELLS = 1024  # native cells per photo that the kernels take: beyond, they need most registers of a GPU

Layer = Callable[[Tensor], Tensor]  # a linear layer, or its DeferredGradLinear


class DeferredGradLinear:
    """y_t = W x_t + b at every step of one forward pass, with values and gradients of the layer.

    Backpropagation through time computes dW = sum_t dy_t^T x_t term by term: many products of few rows, each as large
    as the weight. Here each step saves x_t and dy_t, and one product after the last step computes the sum. Under
    autocast the weight is rounded once, and the sum is accumulated inside the product, not in half precision.
    """

    def __init__(self, layer: nn.Linear):
        device_type = layer.weight.device.type
        dtype = layer.weight.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        self.weight = layer.weight.detach().to(dtype)  # (O, I)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.deferred = DeferredGradient(_linear_gradients, layer.weight, layer.bias)

    def __call__(self, inputs: Tensor) -> Tensor:
        """(R, I) -> (R, O), in the dtype that autocast computes in."""
        return _LinearStep.apply(inputs.to(self.weight.dtype), self.deferred.anchor, self)


def _linear_gradients(steps: Sequence[Saved], weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of weight and bias from x_t (R, I) and dy_t (R, O) of each step."""
    last_first = reversed(steps)  # the order in which autograd would add them
    inputs, gradients = (torch.cat(tensors) for tensors in zip(*last_first, strict=True))  # (W, I), (W, O)
    bias_gradient = None if bias is None else gradients.sum(0, dtype=weight.dtype)
    return (gradients.T @ inputs).to(weight.dtype), bias_gradient


class _LinearStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, anchor: Tensor, linear: DeferredGradLinear) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.linear = linear
        ctx.step = linear.deferred.next_step()
        return F.linear(inputs, linear.weight, linear.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.needs_input_grad[1]:
            ctx.linear.deferred.save(ctx.step, *ctx.saved_tensors, gradient)
        return gradient @ ctx.linear.weight, None, None


class OutputLayer(nn.Linear):
    """The linear layer to the logits of all words.

    Its weight is larger than the caches of a core, and a step of a search has only a few dozen rows. A CPU then
    computes the product faster in pieces of the vocabulary (bench/NOTES.md).
    """

    WORDS = 1024  # of a piece

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V)."""
        if not self._is_faster_in_pieces(hidden):
            return super().forward(hidden)
        logits = hidden.new_empty(len(hidden), self.out_features)
        pieces = zip(*(tensor.split(self.WORDS) for tensor in (self.weight, self.bias, logits.T)), strict=True)
        for weight, bias, piece in pieces:
            torch.addmm(bias, hidden, weight.T, out=piece.T)
        return logits

    def _is_faster_in_pieces(self, hidden: Tensor) -> bool:
        """Whether this is a step without gradients on a CPU, in full precision. An exported graph has no loops."""
        is_step = hidden.dim() == 2 and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return is_step and hidden.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


class DeferredGradProduct:
    """y_t = x_t M at every step of one forward pass, with a matrix M of each head of each caption.

    The gradient of M is dM = sum_t x_t^T dy_t, and each term is as large as M itself. As in DeferredGradLinear, one
    product after the last step computes the sum.
    """

    def __init__(self, matrices: Tensor):
        """matrices (R, h, I, O)."""
        self.matrices = matrices.detach()
        self.deferred = DeferredGradient(_matrix_gradients, matrices)

    def __call__(self, inputs: Tensor) -> Tensor:
        """(R', h, 1, I) of the first R' captions -> (R', h, 1, O)."""
        return _ProductStep.apply(inputs.to(self.matrices.dtype), self.deferred.anchor, self)


def _matrix_gradients(steps: Sequence[Saved], matrices: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the matrices from x_t (R', h, 1, I) and dy_t (R', h, 1, O) of each step."""
    rows = torch.tensor([len(inputs) for inputs, _ in steps])  # fewer in every step: captions end
    inputs, gradients = (
        pad_packed_sequence(PackedSequence(torch.cat(tensors).squeeze(2), rows), batch_first=True)[0].transpose(1, 2)
        for tensors in zip(*steps, strict=True)
    )  # (R, h, T, I), (R, h, T, O): zero after the end of a caption
    return (inputs.mT @ gradients,)


class _ProductStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, anchor: Tensor, product: DeferredGradProduct) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.product = product
        ctx.step = product.deferred.next_step()
        return inputs @ product.matrices[: len(inputs)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        product = ctx.product
        if ctx.needs_input_grad[1]:
            product.deferred.save(ctx.step, *ctx.saved_tensors, gradient)
        return gradient @ product.matrices[: len(gradient)].mT, None, None


_kernels_enabled: ContextVar[bool] = ContextVar("kernels_enabled", default=True)


@contextlib.contextmanager
def use_kernels(enabled: bool) -> Iterator[None]:
    """Context manager: inside it, in this thread, `kernels_for` returns kernels only if `enabled`."""
    token = _kernels_enabled.set(enabled)
    try:
        yield
    finally:
        _kernels_enabled.reset(token)


def kernels_for(cells: Tensor) -> ModuleType | None:
    """Return the module of Triton kernels if they can compute with cells (B, N, C) and are enabled, else None.

    They compute no gradient of the cells, and none in float64.
    """
    if not _kernels_enabled.get() or cells.requires_grad or cells.dtype == torch.float64:
        return None
    if kernels_unavailable(cells.device, cells.shape[1]):
        return None
    return load_kernels(KERNELS, cells.device).module


def kernels_unavailable(device: torch.device, native_cells: int) -> str | None:
    """Why the Triton kernels cannot compute with this many cells per photo on this device, or None if they can.

    The reason is a clause for a message, without a full stop.
    """
    if native_cells > MAX_CELLS:
        return f"they take at most {MAX_CELLS} cells per photo, and these features have {native_cells}"
    return load_kernels(KERNELS, device).unavailable


class Activation(NamedTuple):
    """An activation function and its derivative. Both overwrite their argument."""

    apply_: Callable[[Tensor], Tensor]  # x -> f(x), in place
    derivative_: Callable[[Tensor], Tensor]  # f(x) -> f'(x), in place


def _tanh_(x: Tensor) -> Tensor:
    """2 sigmoid(2 x) - 1: takes less than half the time of torch.tanh, which is more exact only near 0."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


def _tanh_derivative_(tanh: Tensor) -> Tensor:
    """1 - tanh^2."""
    return torch.addcmul(tanh.new_ones(()), tanh, tanh, value=-1, out=tanh)


ACTIVATIONS = {
    "relu": Activation(Tensor.relu_, Tensor.sign_),  # relu(x) >= 0, so that its sign is 0 or 1
    "tanh": Activation(_tanh_, _tanh_derivative_),
}


class ChunkedAttentionScores:
    """Attention scores w . f(k_p + q), with f relu or tanh, for every step of one forward pass.

    The activations f(k_p + q) are R P A numbers per step. Allocating, writing and reading them takes longer than
    computing them. A CPU therefore computes them in chunks that fit into its cache, a few rows of one photo at a time
    and at least in float32, and computes them again in the backward pass. The gradients of keys and w are deferred to
    the end of the backward pass. Other devices, and exported graphs, compute all activations of a step at once.
    """

    def __init__(self, activation: str, keys: Tensor, weight: Tensor, photo_index: Tensor | None = None):
        """keys (B, P, A); weight (1, A), w; photo_index (R,) int64, the photo of each row.

        Without photo_index, each call has K adjacent rows per photo.
        """
        self.activation = activation
        self.photo_index = photo_index
        self.chunked = keys.device.type == "cpu" and not torch.compiler.is_compiling()  # no loops in exported graphs
        if self.chunked:
            self.keys = upcast(keys.detach())
            self.weight = upcast(weight.detach())
            self.deferred = DeferredGradient(partial(_score_gradients, activation), keys, weight)
        else:
            self.keys = keys if photo_index is None else keys.index_select(0, photo_index)
            self.weight = weight

    def __call__(self, query: Tensor) -> Tensor:
        """(B, K, A) -> (B, K, P); with photo_index, the first R' rows only: (R', 1, A) -> (R', 1, P)."""
        return self._in_chunks(query) if self.chunked else self._at_once(query)

    def _at_once(self, query: Tensor) -> Tensor:
        if self.photo_index is not None and query.shape[0] != self.keys.shape[0]:
            self.keys = self.keys[: query.shape[0]]  # captions have ended
        activate = torch.relu_ if self.activation == "relu" else torch.tanh_
        activations = activate(self.keys[:, None] + query[:, :, None])  # (B, K, P, A)
        return F.linear(activations, self.weight).squeeze(3)

    def _in_chunks(self, query: Tensor) -> Tensor:
        photos, captions_per_photo, _ = query.shape
        if self.photo_index is None:
            photo_index = torch.arange(photos).repeat_interleave(captions_per_photo)
        else:
            photo_index = self.photo_index[:photos]
        scores = _ScoresStep.apply(upcast(query).flatten(0, 1), self.deferred.anchor, self, photo_index)  # (B K, P)
        return scores.view(photos, captions_per_photo, -1)


def _score_gradients(
    activation: str, steps: Sequence[Saved], keys: Tensor, weight: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of keys and w from query (R, A), gradient of the scores (R, P) and photo_index (R,) of each step."""
    query, gradient, photo_index = (torch.cat(tensors) for tensors in zip(*steps, strict=True))  # of W rows
    keys_gradient = upcast(torch.zeros_like(keys))
    weight_gradient = upcast(torch.zeros_like(weight[0]))
    chunks = _Chunks(upcast(keys), photo_index)
    for photo, scores_gradient, activations in zip(
        chunks.photos, chunks.split(gradient), chunks.activations(activation, query), strict=True
    ):  # scores_gradient (K, P), activations (K, P, A) of one photo
        weight_gradient.addmv_(activations.flatten(0, 1).T, scores_gradient.view(-1))
        derivatives = ACTIVATIONS[activation].derivative_(activations)
        for derivative, row_gradient in zip(derivatives, scores_gradient[:, :, None], strict=True):
            keys_gradient[photo].addcmul_(derivative, row_gradient)
    return keys_gradient.mul_(weight).to(keys.dtype), weight_gradient[None].to(weight.dtype)


class _ScoresStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, anchor: Tensor, scores: ChunkedAttentionScores, photo_index: Tensor) -> Tensor:
        ctx.save_for_backward(query, photo_index)
        ctx.scores = scores
        ctx.step = scores.deferred.next_step()
        chunks = _Chunks(scores.keys, photo_index)
        weight = scores.weight[0]
        by_photo = [
            torch.mv(activations.flatten(0, 1), weight) for activations in chunks.activations(scores.activation, query)
        ]
        return chunks.restore_order(torch.cat(by_photo).view(len(query), -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, photo_index = ctx.saved_tensors
        scores = ctx.scores
        if ctx.needs_input_grad[1]:
            scores.deferred.save(ctx.step, query, gradient, photo_index)
        chunks = _Chunks(scores.keys, photo_index)
        derivative_ = ACTIVATIONS[scores.activation].derivative_
        by_photo = [
            torch.bmm(scores_gradient, derivative_(activations))  # (K, 1, P) and (K, P, A) -> (K, 1, A)
            for scores_gradient, activations in zip(
                chunks.split(gradient[:, None]), chunks.activations(scores.activation, query), strict=True
            )
        ]
        query_gradient = torch.cat(by_photo)[:, 0].mul_(scores.weight)
        return chunks.restore_order(query_gradient), None, None, None


class _Chunks:
    """Rows of queries in chunks of one photo each, small enough for their activations to stay in the cache."""

    def __init__(self, keys: Tensor, photo_index: Tensor):
        """keys (B, P, A); photo_index (R,) int64, the photo of each row."""
        self.keys = keys
        self.order = photo_index.argsort(stable=True)  # (R,): rows by photo
        max_rows = max(1, CACHE_ELEMENTS * torch.get_num_threads() // keys[0].numel())
        self.photos: list[int] = []  # of each chunk
        self.sizes: list[int] = []  # rows of each chunk
        for photo, rows in enumerate(photo_index.bincount().tolist()):
            for start in range(0, rows, max_rows):
                self.photos.append(photo)
                self.sizes.append(min(max_rows, rows - start))

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows (R, ...) of each chunk (K, ...)."""
        return rows.index_select(0, self.order).split(self.sizes)

    def activations(self, activation: str, query: Tensor) -> Iterator[Tensor]:
        """f(k_p + q) of each chunk (K, P, A); query (R, A). All share one buffer: the next overwrites the last."""
        apply_ = ACTIVATIONS[activation].apply_
        buffer = self.keys.new_empty(max(self.sizes), *self.keys.shape[1:])
        for photo, rows in zip(self.photos, self.split(query[:, None]), strict=True):
            yield apply_(torch.add(self.keys[photo], rows, out=buffer[: len(rows)]))

    def restore_order(self, by_photo: Tensor) -> Tensor:
        """Rows by photo (R, ...) -> the rows in their original order."""
        return torch.empty_like(by_photo).index_copy_(0, self.order, by_photo)


Attend = Callable[..., Tensor]  # (*per_photo (B, ...), *per_word (B K, ...)) -> (B K, ...)


def attend_all_steps(
    attend: Attend,
    per_photo: tuple[Tensor, ...],
    per_word: tuple[Tensor, ...],
    photo_index: Tensor,
    step_sizes: list[int],
) -> Tensor:
    """Apply `attend` to the packed words of all steps: per_photo (B, ...), per_word (W, ...) -> (W, ...).

    photo_index (R,) int64: the photo of each caption. step_sizes: rows of each step. A CPU reads each photo once, for
    all words of its captions. On a GPU, the number of these words would need a device synchronisation, so it attends
    step by step.
    """
    strategy = photo_by_photo if photo_index.device.type == "cpu" else step_by_step
    return strategy(attend, per_photo, per_word, photo_index, step_sizes)


def photo_by_photo(
    attend: Attend,
    per_photo: tuple[Tensor, ...],
    per_word: tuple[Tensor, ...],
    photo_index: Tensor,
    step_sizes: list[int],
) -> Tensor:
    """Like `attend_all_steps`: one call of `attend` per photo, with all words of its captions."""
    photo_of_word = photo_of_each_word(photo_index, step_sizes)  # (W,)
    order = photo_of_word.argsort(stable=True)
    words_per_photo = photo_of_word.bincount(minlength=len(per_photo[0])).tolist()
    photos = zip(*(tensor.split(1) for tensor in per_photo), strict=True)
    words = zip(*(tensor.index_select(0, order).split(words_per_photo) for tensor in per_word), strict=True)
    by_photo = torch.cat(
        [attend(*photo, *rows) for photo, rows, count in zip(photos, words, words_per_photo, strict=True) if count]
    )
    return torch.empty_like(by_photo).index_copy(0, order, by_photo)


def step_by_step(
    attend: Attend,
    per_photo: tuple[Tensor, ...],
    per_word: tuple[Tensor, ...],
    photo_index: Tensor,
    step_sizes: list[int],
) -> Tensor:
    """Like `attend_all_steps`: one call of `attend` per step, with one word of each caption."""
    per_caption = [tensor.index_select(0, photo_index) for tensor in per_photo]  # (R, ...)
    steps = zip(*(tensor.split(step_sizes) for tensor in per_word), strict=True)
    return torch.cat(
        [
            attend(*(tensor[:size] for tensor in per_caption), *rows)
            for size, rows in zip(step_sizes, steps, strict=True)
        ]
    )
