"""Triton kernels for NVIDIA GPUs: one step of soft attention, and the gates of an LSTM, forward and backward.

They compute the equations of captioning/decoders/attention.py, which is their readable form. Between the products with
weights, a step of that form makes about a dozen passes over tensors of (R, P, A) and (R, C). Here, a program reads
the keys and cells of its row in place, once, and writes no tensor of that size. Sums are float32 in any precision.

A GPU starts programs in the order of their numbers, so the rows of one photo have adjacent programs: the first one
brings the keys and cells of the photo into the cache, and the others find them there, even in a cache of 3 MB.

Few registers per thread let many programs share a multiprocessor, and hide the time that reads take: no tile takes
more than 32 registers of a thread, and `python bench/kernels.py` shows what each kernel takes.

The gradients of the keys and of w are sums over all steps. They are deferred to the end of the backward pass, as in
captioning/decoders/fused_ops.py: one kernel adds up the words of each photo in a fixed order, so that gradients are
deterministic.

Legend: B photos, R rows of a step, W rows of all steps, N native cells, P output cells, C channels, A attention size,
H hidden size. A program computes one row of the batch, or one tile of the keys of a photo. X_BLOCK is the number of
elements along X that a program reads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from captioning.decoders.deferred_grad import DeferredGradient, Saved
from captioning.decoders.protocol import photo_of_each_word

H_BLOCK = 256
KEYS_BLOCKS = {"P_BLOCK": 16, "A_BLOCK": 64}  # of the gradient of the keys
# Fused multiply-add, which was Triton's default: Triton 3.9 warns if neither the launch nor the environment sets it.
LAUNCH_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


class FusedAttention:
    """sigmoid(gate) * ((a P) F) and a = softmax(w . relu(keys + query)), for every step of one forward pass."""

    def __init__(self, cells: Tensor, keys: Tensor, pooling: Tensor, score_weight: Tensor, photo_index: Tensor):
        """cells (B, N, C), F; keys (B, P, A); pooling (P, N), P; score_weight (1, A), w; photo_index (R,) int64."""
        self.cells = cells.contiguous()
        self.keys = keys.detach().contiguous()
        self.pooling = pooling.contiguous()
        self.score_weight = score_weight.detach()
        self.photo_index = photo_index
        # One order for all steps: it costs one sort per batch, and programs whose caption has ended return at once.
        self.row_order = photo_index.argsort(stable=True)  # (R,): rows by photo
        self.deferred = DeferredGradient(_keys_gradients, keys, score_weight, photo_index)

    def __call__(self, query: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, None]:
        """query (R, A), gate (R, C) -> context (R, C), attention (R, P) float32, None (there are no samples)."""
        context, attention = _AttentionStep.apply(query, gate, self.deferred.anchor, self)
        return context, attention, None

    def launch_arguments(self) -> dict[str, Any]:
        """The sizes and options of a launch of the two attention kernels."""
        _, num_native, channels = self.cells.shape
        _, num_cells, attention_size = self.keys.shape
        return {
            "P": num_cells,
            "N": num_native,
            "A": attention_size,
            "C": channels,
            **attention_blocks(num_cells, num_native),
            **LAUNCH_OPTIONS,
        }


def attention_blocks(num_cells: int, num_native: int) -> dict[str, int]:
    """The blocks and warps of the attention kernels for P and N cells: the larger N, the fewer channels in a tile."""
    native_block = triton.next_power_of_2(num_native)
    return {
        "P_BLOCK": triton.next_power_of_2(num_cells),
        "N_BLOCK": native_block,
        "A_BLOCK": 32,
        "C_BLOCK": min(max(8192 // native_block, 16), 64),
        "POOL_BLOCK": min(max(1024 // native_block, 8), 32),
        "num_warps": 8,
    }


def _keys_gradients(
    steps: Sequence[Saved], keys: Tensor, score_weight: Tensor, photo_index: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of keys (B, P, A) and w (1, A) from query (R, A) and gradient of the scores (R, P) of each step."""
    keys = keys.contiguous()
    num_photos, num_cells, attention_size = keys.shape
    queries, d_scores = (torch.cat(tensors) for tensors in zip(*steps, strict=True))  # (W, A), (W, P)
    photo_of_word = photo_of_each_word(photo_index, [len(query) for query, _ in steps])  # (W,)
    sorted_photos, word_order = photo_of_word.sort(stable=True)
    word_offsets = torch.searchsorted(sorted_photos, torch.arange(num_photos + 1, device=keys.device))
    num_tiles = triton.cdiv(num_cells, KEYS_BLOCKS["P_BLOCK"])
    d_keys = torch.empty_like(keys)
    d_score_weight = torch.empty(num_photos * num_tiles, attention_size, device=keys.device)
    _keys_backward_kernel[num_photos * num_tiles, triton.cdiv(attention_size, KEYS_BLOCKS["A_BLOCK"])](
        keys,
        score_weight,
        queries,
        d_scores,
        word_order,
        word_offsets,
        d_keys,
        d_score_weight,
        num_tiles,
        P=num_cells,
        A=attention_size,
        **KEYS_BLOCKS,
        **LAUNCH_OPTIONS,
    )
    return d_keys, d_score_weight.sum(0, keepdim=True).to(score_weight.dtype), None


class _AttentionStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, gate: Tensor, anchor: Tensor, fused: FusedAttention) -> tuple[Tensor, Tensor]:
        num_rows = len(query)
        attention = torch.empty(num_rows, fused.keys.shape[1], device=query.device)
        context = torch.empty(num_rows, fused.cells.shape[2], dtype=query.dtype, device=query.device)
        _attention_kernel[(len(fused.row_order),)](
            query,
            gate,
            fused.keys,
            fused.cells,
            fused.pooling,
            fused.score_weight,
            fused.photo_index,
            fused.row_order,
            num_rows,
            attention,
            context,
            query.stride(0),
            gate.stride(0),
            **fused.launch_arguments(),
        )
        ctx.save_for_backward(query, gate, attention, context)
        ctx.fused = fused
        ctx.step = fused.deferred.next_step()
        return context, attention

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_context: Tensor, d_attention: Tensor) -> tuple[Tensor | None, ...]:
        fused = ctx.fused
        query, gate, attention, context = ctx.saved_tensors
        d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        d_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        d_scores = torch.empty_like(attention)
        _attention_backward_kernel[(len(fused.row_order),)](
            query,
            gate,
            fused.keys,
            fused.cells,
            fused.pooling,
            fused.score_weight,
            fused.photo_index,
            fused.row_order,
            len(query),
            attention,
            context,
            d_context.contiguous(),
            d_attention.contiguous(),
            d_query,
            d_gate,
            d_scores,
            query.stride(0),
            gate.stride(0),
            **fused.launch_arguments(),
        )
        if ctx.needs_input_grad[2]:
            fused.deferred.save(ctx.step, query, d_scores)
        return d_query, d_gate, None, None


@triton.jit
def _load_tile(matrix, i, j, rows: tl.constexpr, columns: tl.constexpr):
    """Load elements (i, j) of a matrix (rows, columns) as float32, with zeros outside of it."""
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    return tl.load(matrix + i[:, None] * columns + j[None, :], mask=inside, other=0.0).to(tl.float32)


# The number of rows differs from step to step. Triton would compile kernels again where it is 1 or divisible by 16.
@triton.jit(do_not_specialize=["num_rows"])
def _attention_kernel(
    query,
    gate,
    keys,
    cells,
    pooling,
    score_weight,
    photo_index,
    row_order,
    num_rows,
    attention,
    context,
    query_stride,
    gate_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    A: tl.constexpr,
    C: tl.constexpr,
    P_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    A_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
    POOL_BLOCK: tl.constexpr,
):
    row = tl.load(row_order + tl.program_id(0))
    if row >= num_rows:  # this caption has ended
        return
    photo = tl.load(photo_index + row)
    p = tl.arange(0, P_BLOCK)
    n = tl.arange(0, N_BLOCK)
    attention += row * P
    scores = tl.zeros([P_BLOCK], tl.float32)
    for start in range(0, A, A_BLOCK):
        a = start + tl.arange(0, A_BLOCK)
        q = tl.load(query + row * query_stride + a, mask=a < A, other=0.0).to(tl.float32)
        w = tl.load(score_weight + a, mask=a < A, other=0.0).to(tl.float32)
        k = _load_tile(keys + photo * P * A, p, a, P, A)
        scores += tl.sum(tl.maximum(k + q[None, :], 0.0) * w[None, :], 1)
    scores = tl.where(p < P, scores, -float("inf"))
    exponentials = tl.exp(scores - tl.max(scores, 0))
    tl.store(attention + p, exponentials / tl.sum(exponentials, 0), mask=p < P)
    tl.debug_barrier()  # the next loop reads what other threads of this program stored
    products = tl.zeros([POOL_BLOCK, N_BLOCK], tl.float32)
    for start in range(0, P, POOL_BLOCK):
        i = start + tl.arange(0, POOL_BLOCK)
        probability = tl.load(attention + i, mask=i < P, other=0.0)
        products += probability[:, None] * _load_tile(pooling, i, n, P, N)
    native_weight = tl.sum(products, 0)
    for start in range(0, C, C_BLOCK):
        c = start + tl.arange(0, C_BLOCK)
        f = _load_tile(cells + photo * N * C, n, c, N, C)
        g = tl.load(gate + row * gate_stride + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(context + row * C + c, tl.sum(native_weight[:, None] * f, 0) * tl.sigmoid(g), mask=c < C)


@triton.jit(do_not_specialize=["num_rows"])
def _attention_backward_kernel(
    query,
    gate,
    keys,
    cells,
    pooling,
    score_weight,
    photo_index,
    row_order,
    num_rows,
    attention,
    context,
    d_context,
    d_attention,
    d_query,
    d_gate,
    d_scores,
    query_stride,
    gate_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    A: tl.constexpr,
    C: tl.constexpr,
    P_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    A_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
    POOL_BLOCK: tl.constexpr,
):
    row = tl.load(row_order + tl.program_id(0))
    if row >= num_rows:  # this caption has ended
        return
    photo = tl.load(photo_index + row)
    n = tl.arange(0, N_BLOCK)
    d_scores += row * P
    d_native_weight = tl.zeros([N_BLOCK], tl.float32)
    for start in range(0, C, C_BLOCK):
        c = start + tl.arange(0, C_BLOCK)
        f = _load_tile(cells + photo * N * C, n, c, N, C)
        g = tl.sigmoid(tl.load(gate + row * gate_stride + c, mask=c < C, other=0.0).to(tl.float32))
        z = tl.load(context + row * C + c, mask=c < C, other=0.0).to(tl.float32)  # g ((a P) F)
        d = tl.load(d_context + row * C + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(d_gate + row * C + c, d * z * (1 - g), mask=c < C)
        d_native_weight += tl.sum(f * (d * g)[None, :], 1)
    for start in range(0, P, POOL_BLOCK):
        i = start + tl.arange(0, POOL_BLOCK)
        spread = tl.sum(_load_tile(pooling, i, n, P, N) * d_native_weight[None, :], 1)
        tl.store(d_scores + i, spread, mask=i < P)  # until the softmax below
    tl.debug_barrier()  # the next line reads what other threads of this program stored
    p = tl.arange(0, P_BLOCK)
    d_probability = tl.load(d_scores + p, mask=p < P, other=0.0)
    d_probability += tl.load(d_attention + row * P + p, mask=p < P, other=0.0)
    probability = tl.load(attention + row * P + p, mask=p < P, other=0.0)
    d_score = probability * (d_probability - tl.sum(probability * d_probability, 0))  # of the softmax
    tl.debug_barrier()  # all threads have read what the next line overwrites
    tl.store(d_scores + p, d_score, mask=p < P)
    for start in range(0, A, A_BLOCK):
        a = start + tl.arange(0, A_BLOCK)
        q = tl.load(query + row * query_stride + a, mask=a < A, other=0.0).to(tl.float32)
        w = tl.load(score_weight + a, mask=a < A, other=0.0).to(tl.float32)
        k = _load_tile(keys + photo * P * A, p, a, P, A)
        active = tl.where(k + q[None, :] > 0, d_score[:, None], 0.0)
        tl.store(d_query + row * A + a, w * tl.sum(active, 0), mask=a < A)


@triton.jit
def _keys_backward_kernel(
    keys,
    score_weight,
    queries,
    d_scores,
    word_order,
    word_offsets,
    d_keys,
    d_score_weight,
    num_tiles,
    P: tl.constexpr,
    A: tl.constexpr,
    P_BLOCK: tl.constexpr,
    A_BLOCK: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    photo = tile // num_tiles
    p = (tile % num_tiles) * P_BLOCK + tl.arange(0, P_BLOCK)
    a = tl.program_id(1) * A_BLOCK + tl.arange(0, A_BLOCK)
    k = _load_tile(keys + photo * P * A, p, a, P, A)
    keys_sum = tl.zeros([P_BLOCK, A_BLOCK], tl.float32)
    products = tl.zeros([P_BLOCK, A_BLOCK], tl.float32)
    for i in range(tl.load(word_offsets + photo), tl.load(word_offsets + photo + 1)):
        word = tl.load(word_order + i)
        q = tl.load(queries + word * A + a, mask=a < A, other=0.0).to(tl.float32)
        d = tl.load(d_scores + word * P + p, mask=p < P, other=0.0)
        sums = k + q[None, :]
        keys_sum += tl.where(sums > 0, d[:, None], 0.0)
        products += tl.maximum(sums, 0.0) * d[:, None]
    w = tl.load(score_weight + a, mask=a < A, other=0.0).to(tl.float32)
    inside = (p[:, None] < P) & (a[None, :] < A)
    tl.store(d_keys + (photo * P + p[:, None]) * A + a[None, :], keys_sum * w[None, :], mask=inside)
    tl.store(d_score_weight + tile * A + a, tl.sum(products, 0), mask=a < A)


def lstm_cell(word_gates: Tensor, context_gates: Tensor, hidden_gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Like captioning.decoders.attention.lstm_cell: gates (R, 4H) each, c (R, H) float32 -> h, c (R, H) float32."""
    return _LstmCell.apply(word_gates, context_gates, hidden_gates, cell)


class _LstmCell(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, word_gates: Tensor, context_gates: Tensor, hidden_gates: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor]:
        new_hidden = torch.empty_like(cell)
        new_cell = torch.empty_like(cell)
        _lstm_kernel[_lstm_grid(cell)](
            word_gates,
            context_gates,
            hidden_gates,
            cell,
            new_hidden,
            new_cell,
            word_gates.stride(0),
            context_gates.stride(0),
            hidden_gates.stride(0),
            cell.stride(0),
            H=cell.shape[1],
            H_BLOCK=H_BLOCK,
            **LAUNCH_OPTIONS,
        )
        ctx.save_for_backward(word_gates, context_gates, hidden_gates, cell)
        return new_hidden, new_cell

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor, d_cell: Tensor) -> tuple[Tensor, ...]:
        word_gates, context_gates, hidden_gates, cell = ctx.saved_tensors
        d_gates = torch.empty_like(context_gates)
        d_old_cell = torch.empty_like(cell)
        _lstm_backward_kernel[_lstm_grid(cell)](
            word_gates,
            context_gates,
            hidden_gates,
            cell,
            d_hidden.contiguous(),
            d_cell.contiguous(),
            d_gates,
            d_old_cell,
            word_gates.stride(0),
            context_gates.stride(0),
            hidden_gates.stride(0),
            cell.stride(0),
            H=cell.shape[1],
            H_BLOCK=H_BLOCK,
            **LAUNCH_OPTIONS,
        )
        return d_gates.to(word_gates.dtype), d_gates, d_gates.to(hidden_gates.dtype), d_old_cell


def _lstm_grid(cell: Tensor) -> tuple[int, int]:
    return len(cell), triton.cdiv(cell.shape[1], H_BLOCK)


def smoke_test(device: torch.device) -> None:
    """Run a small kernel. Raises the error of Triton, or of the driver, if kernels do not compile or run."""
    gates = torch.zeros(1, 4, device=device)
    lstm_cell(gates, gates, gates, torch.zeros(1, 1, device=device))


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _sum_gates(word_gates, context_gates, hidden_gates, offset, inside):
    """The pre-activation of a gate: the sum of its three parts, as float32."""
    total = tl.load(word_gates + offset, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(context_gates + offset, mask=inside, other=0.0).to(tl.float32)
    return total + tl.load(hidden_gates + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _activate_gates(
    word_gates,
    context_gates,
    hidden_gates,
    row,
    word_stride,
    context_stride,
    hidden_stride,
    h,
    H: tl.constexpr,
):
    """Input gate, forget gate, candidate and output gate of elements h of a row."""
    inside = h < H
    word_gates += row * word_stride
    context_gates += row * context_stride
    hidden_gates += row * hidden_stride
    input_gate = tl.sigmoid(_sum_gates(word_gates, context_gates, hidden_gates, h, inside))
    forget_gate = tl.sigmoid(_sum_gates(word_gates, context_gates, hidden_gates, H + h, inside))
    candidate = _tanh(_sum_gates(word_gates, context_gates, hidden_gates, 2 * H + h, inside))
    output_gate = tl.sigmoid(_sum_gates(word_gates, context_gates, hidden_gates, 3 * H + h, inside))
    return input_gate, forget_gate, candidate, output_gate


@triton.jit
def _lstm_kernel(
    word_gates,
    context_gates,
    hidden_gates,
    cell,
    new_hidden,
    new_cell,
    word_stride,
    context_stride,
    hidden_stride,
    cell_stride,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * H_BLOCK + tl.arange(0, H_BLOCK)
    input_gate, forget_gate, candidate, output_gate = _activate_gates(
        word_gates, context_gates, hidden_gates, row, word_stride, context_stride, hidden_stride, h, H
    )
    old_cell = tl.load(cell + row * cell_stride + h, mask=h < H, other=0.0)
    updated = forget_gate * old_cell + input_gate * candidate
    tl.store(new_cell + row * H + h, updated, mask=h < H)
    tl.store(new_hidden + row * H + h, output_gate * _tanh(updated), mask=h < H)


@triton.jit
def _lstm_backward_kernel(
    word_gates,
    context_gates,
    hidden_gates,
    cell,
    d_hidden,
    d_cell,
    d_gates,
    d_old_cell,
    word_stride,
    context_stride,
    hidden_stride,
    cell_stride,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * H_BLOCK + tl.arange(0, H_BLOCK)
    inside = h < H
    input_gate, forget_gate, candidate, output_gate = _activate_gates(
        word_gates, context_gates, hidden_gates, row, word_stride, context_stride, hidden_stride, h, H
    )
    old_cell = tl.load(cell + row * cell_stride + h, mask=inside, other=0.0)
    activated = _tanh(forget_gate * old_cell + input_gate * candidate)
    d_h = tl.load(d_hidden + row * H + h, mask=inside, other=0.0)
    d_c = tl.load(d_cell + row * H + h, mask=inside, other=0.0) + d_h * output_gate * (1 - activated * activated)
    d_gates += row * 4 * H + h
    tl.store(d_gates, d_c * candidate * input_gate * (1 - input_gate), mask=inside)
    tl.store(d_gates + H, d_c * old_cell * forget_gate * (1 - forget_gate), mask=inside)
    tl.store(d_gates + 2 * H, d_c * input_gate * (1 - candidate * candidate), mask=inside)
    tl.store(d_gates + 3 * H, d_h * activated * output_gate * (1 - output_gate), mask=inside)
    tl.store(d_old_cell + row * H + h, d_c * forget_gate, mask=inside)
