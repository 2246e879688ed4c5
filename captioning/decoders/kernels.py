"""On an NVIDIA GPU, soft attention's step in two kernels each way, in Triton: what it sees, and the LSTM's gates.

The equations are those of captioning/decoders/attention.py, where they can be read. Between the products with weights
a step there is a dozen passes over (R, P, A) and (R, C); here keys and cells are read once a row, in place, and nothing
of that size is written. Sums are float32 in any precision.

The gradients of the keys and of w are sums over all steps, and wait for the last of them as in fast.py: one kernel adds
up a photo's words, in their order, so that the same batch has the same gradients.

Letters: B photos, R rows of a step, W rows of all steps, N native cells, P output cells, C channels, A attention,
H hidden. A program is one row, or one photo's tile of keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

A_BLOCK, C_BLOCK, H_BLOCK = 64, 128, 256  # elements that a program reads at once
KEY_CELLS = 32  # cells of a tile of keys


class FusedAttention:
    """(query (R, A), gate (R, C)) -> sigmoid(gate) * ((a P) F) (R, C), a (R, P), for every step of a forward pass."""

    def __init__(self, cells: Tensor, keys: Tensor, pooling: Tensor, score: Tensor, photo: Tensor):
        """cells (B, N, C), keys (B, P, A), pooling (P, N), score, w (1, A), photo (R,): whose each row is."""
        self.cells, self.keys, self.pooling = cells.contiguous(), keys.detach().contiguous(), pooling.contiguous()
        self.score, self.photo_index = score.detach(), photo
        self.notes: dict[int, tuple[Tensor, Tensor]] = {}  # by step: query (R, A), gradient of the scores (R, P)
        self.count = 0  # of steps
        self.parameters = _Parameters.apply(keys, score, photo, self.notes)

    def __call__(self, query: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        self.count += 1
        return _Look.apply(query, gate, self.parameters, self, self.count)

    def sizes(self) -> dict[str, int]:
        (_, n, c), (_, p, a) = self.cells.shape, self.keys.shape
        return {
            "P": p,
            "N": n,
            "A": a,
            "C": c,
            "P_BLOCK": triton.next_power_of_2(p),
            "N_BLOCK": triton.next_power_of_2(n),
            "A_BLOCK": A_BLOCK,
            "C_BLOCK": C_BLOCK,
            "num_warps": 8,
        }


class _Parameters(torch.autograd.Function):
    """Stands for keys and w in the graph: behind all steps, its backward sees the notes of every one."""

    @staticmethod
    def forward(context: Any, keys: Tensor, score: Tensor, photo: Tensor, notes: dict) -> Tensor:
        context.save_for_backward(keys, score, photo)
        context.notes = notes  # not the looks, which hold what stands for their keys: a ring is freed late
        return keys.new_empty(0)

    @staticmethod
    def backward(context: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        keys, score, photo = context.saved_tensors
        keys, (photos, p, a) = keys.contiguous(), keys.shape
        steps = [context.notes[number] for number in sorted(context.notes)]
        context.notes.clear()
        queries, gradients = (torch.cat(tensors) for tensors in zip(*steps, strict=True))  # (W, A), (W, P)
        of, order = torch.cat([photo[: len(query)] for query, _ in steps]).sort(stable=True)  # words by photo
        ends = torch.searchsorted(of, torch.arange(photos + 1, device=of.device))
        tiles = triton.cdiv(p, KEY_CELLS)
        d_keys, d_score = torch.empty_like(keys), torch.empty(photos * tiles, a, device=of.device)
        _keys_backward[photos * tiles, triton.cdiv(a, A_BLOCK)](
            keys,
            score,
            queries,
            gradients,
            order,
            ends,
            d_keys,
            d_score,
            tiles,
            P=p,
            A=a,
            P_BLOCK=KEY_CELLS,
            A_BLOCK=A_BLOCK,
        )
        return d_keys, d_score.sum(0, keepdim=True).to(score.dtype), None, None


class _Look(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, query: Tensor, gate: Tensor, parameters: Tensor, looks: FusedAttention, number: int):
        rows = len(query)
        attention = torch.empty(rows, looks.keys.shape[1], device=query.device)
        seen = torch.empty(rows, looks.cells.shape[2], dtype=query.dtype, device=query.device)
        _look[(rows,)](
            query,
            gate,
            looks.keys,
            looks.cells,
            looks.pooling,
            looks.score,
            looks.photo_index,
            attention,
            seen,
            query.stride(0),
            gate.stride(0),
            **looks.sizes(),
        )
        context.save_for_backward(query, gate, attention)
        context.looks, context.number = looks, number
        return seen, attention

    @staticmethod
    def backward(context: Any, d_seen: Tensor, d_attention: Tensor) -> tuple[Tensor | None, ...]:
        looks, (query, gate, attention) = context.looks, context.saved_tensors
        d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        d_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        d_scores = torch.empty_like(attention)
        _look_backward[(len(query),)](
            query,
            gate,
            looks.keys,
            looks.cells,
            looks.pooling,
            looks.score,
            looks.photo_index,
            attention,
            d_seen.contiguous(),
            d_attention.contiguous(),
            d_query,
            d_gate,
            d_scores,
            query.stride(0),
            gate.stride(0),
            **looks.sizes(),
        )
        looks.notes[context.number] = query, d_scores
        return d_query, d_gate, None, None, None


@triton.jit
def _read(matrix, i, j, rows: tl.constexpr, columns: tl.constexpr):
    """Elements i, j of it, zero outside."""
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    return tl.load(matrix + i[:, None] * columns + j[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _look(
    query,
    gate,
    keys,
    cells,
    pooling,
    score,
    photo,
    attention,
    seen,
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
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(photo + row)
    p, n = tl.arange(0, P_BLOCK), tl.arange(0, N_BLOCK)
    sums = tl.zeros([P_BLOCK], tl.float32)
    for first in range(0, A, A_BLOCK):
        a = first + tl.arange(0, A_BLOCK)
        q = tl.load(query + row * query_stride + a, mask=a < A, other=0.0).to(tl.float32)
        w = tl.load(score + a, mask=a < A, other=0.0).to(tl.float32)
        k = _read(keys + at * P * A, p, a, P, A)
        sums += tl.sum(tl.maximum(k + q[None, :], 0.0) * w[None, :], 1)
    sums = tl.where(p < P, sums, -float("inf"))
    sums = tl.exp(sums - tl.max(sums, 0))
    share = sums / tl.sum(sums, 0)
    tl.store(attention + row * P + p, share, mask=p < P)
    pool = _read(pooling, p, n, P, N)
    weight = tl.sum(share[:, None] * pool, 0)
    for first in range(0, C, C_BLOCK):
        c = first + tl.arange(0, C_BLOCK)
        f = _read(cells + at * N * C, n, c, N, C)
        g = tl.load(gate + row * gate_stride + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(seen + row * C + c, tl.sum(weight[:, None] * f, 0) * tl.sigmoid(g), mask=c < C)


@triton.jit
def _look_backward(
    query,
    gate,
    keys,
    cells,
    pooling,
    score,
    photo,
    attention,
    d_seen,
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
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(photo + row)
    p, n = tl.arange(0, P_BLOCK), tl.arange(0, N_BLOCK)
    share = tl.load(attention + row * P + p, mask=p < P, other=0.0)
    pool = _read(pooling, p, n, P, N)
    weight = tl.sum(share[:, None] * pool, 0)
    d_weight = tl.zeros([N_BLOCK], tl.float32)
    for first in range(0, C, C_BLOCK):
        c = first + tl.arange(0, C_BLOCK)
        f = _read(cells + at * N * C, n, c, N, C)
        g = tl.sigmoid(tl.load(gate + row * gate_stride + c, mask=c < C, other=0.0).to(tl.float32))
        d = tl.load(d_seen + row * C + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(d_gate + row * C + c, d * tl.sum(weight[:, None] * f, 0) * g * (1 - g), mask=c < C)
        d_weight += tl.sum(f * (d * g)[None, :], 1)
    d_share = tl.sum(pool * d_weight[None, :], 1)
    d_share += tl.load(d_attention + row * P + p, mask=p < P, other=0.0)
    d = share * (d_share - tl.sum(share * d_share, 0))
    tl.store(d_scores + row * P + p, d, mask=p < P)
    for first in range(0, A, A_BLOCK):
        a = first + tl.arange(0, A_BLOCK)
        q = tl.load(query + row * query_stride + a, mask=a < A, other=0.0).to(tl.float32)
        w = tl.load(score + a, mask=a < A, other=0.0).to(tl.float32)
        k = _read(keys + at * P * A, p, a, P, A)
        tl.store(d_query + row * A + a, w * tl.sum(tl.where(k + q[None, :] > 0, d[:, None], 0.0), 0), mask=a < A)


@triton.jit
def _keys_backward(
    keys,
    score,
    queries,
    gradients,
    order,
    ends,
    d_keys,
    d_score,
    tiles,
    P: tl.constexpr,
    A: tl.constexpr,
    P_BLOCK: tl.constexpr,
    A_BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    at = place // tiles
    p, a = (place % tiles) * P_BLOCK + tl.arange(0, P_BLOCK), tl.program_id(1) * A_BLOCK + tl.arange(0, A_BLOCK)
    k = _read(keys + at * P * A, p, a, P, A)
    total, of_score = tl.zeros([P_BLOCK, A_BLOCK], tl.float32), tl.zeros([A_BLOCK], tl.float32)
    for number in range(tl.load(ends + at), tl.load(ends + at + 1)):
        word = tl.load(order + number)
        q = tl.load(queries + word * A + a, mask=a < A, other=0.0).to(tl.float32)
        d = tl.load(gradients + word * P + p, mask=p < P, other=0.0)
        sums = k + q[None, :]
        total += tl.where(sums > 0, d[:, None], 0.0)
        of_score += tl.sum(tl.maximum(sums, 0.0) * d[:, None], 0)
    w = tl.load(score + a, mask=a < A, other=0.0).to(tl.float32)
    inside = (p[:, None] < P) & (a[None, :] < A)
    tl.store(d_keys + (at * P + p[:, None]) * A + a[None, :], total * w[None, :], mask=inside)
    tl.store(d_score + place * A + a, of_score, mask=a < A)


class LstmGates(torch.autograd.Function):
    """(word, context and hidden gates (R, 4H) each, c (R, H) float32) -> h, c (R, H) float32."""

    @staticmethod
    def forward(context: Any, word: Tensor, seen: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        new_hidden, new_cell = torch.empty_like(cell), torch.empty_like(cell)
        _gates[_grid(cell)](
            word,
            seen,
            hidden,
            cell,
            new_hidden,
            new_cell,
            word.stride(0),
            seen.stride(0),
            hidden.stride(0),
            cell.stride(0),
            H=cell.shape[1],
            H_BLOCK=H_BLOCK,
        )
        context.save_for_backward(word, seen, hidden, cell)
        return new_hidden, new_cell

    @staticmethod
    def backward(context: Any, d_hidden: Tensor, d_cell: Tensor) -> tuple[Tensor, ...]:
        word, seen, hidden, cell = context.saved_tensors
        d_gates, d_old = torch.empty_like(seen), torch.empty_like(cell)
        _gates_backward[_grid(cell)](
            word,
            seen,
            hidden,
            cell,
            d_hidden.contiguous(),
            d_cell.contiguous(),
            d_gates,
            d_old,
            word.stride(0),
            seen.stride(0),
            hidden.stride(0),
            cell.stride(0),
            H=cell.shape[1],
            H_BLOCK=H_BLOCK,
        )
        return d_gates.to(word.dtype), d_gates, d_gates.to(hidden.dtype), d_old


def try_out(device: torch.device) -> None:
    """Raises whatever Triton does where it cannot compile, or its kernels not run."""
    LstmGates.apply(*(torch.zeros(1, 4, device=device) for _ in range(3)), torch.zeros(1, 1, device=device))


def _grid(cell: Tensor) -> tuple[int, int]:
    return len(cell), triton.cdiv(cell.shape[1], H_BLOCK)


@triton.jit
def _gate(word, seen, hidden, place: tl.constexpr, h, H: tl.constexpr):
    inside = h < H
    total = tl.load(word + place * H + h, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(seen + place * H + h, mask=inside, other=0.0).to(tl.float32)
    return total + tl.load(hidden + place * H + h, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _gates(
    word,
    seen,
    hidden,
    cell,
    new_hidden,
    new_cell,
    word_stride,
    seen_stride,
    hidden_stride,
    cell_stride,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * H_BLOCK + tl.arange(0, H_BLOCK)
    word, seen, hidden = word + row * word_stride, seen + row * seen_stride, hidden + row * hidden_stride
    let_in, forget = tl.sigmoid(_gate(word, seen, hidden, 0, h, H)), tl.sigmoid(_gate(word, seen, hidden, 1, h, H))
    candidate, let_out = _tanh(_gate(word, seen, hidden, 2, h, H)), tl.sigmoid(_gate(word, seen, hidden, 3, h, H))
    kept = forget * tl.load(cell + row * cell_stride + h, mask=h < H, other=0.0) + let_in * candidate
    tl.store(new_cell + row * H + h, kept, mask=h < H)
    tl.store(new_hidden + row * H + h, let_out * _tanh(kept), mask=h < H)


@triton.jit
def _gates_backward(
    word,
    seen,
    hidden,
    cell,
    d_hidden,
    d_cell,
    d_gates,
    d_old,
    word_stride,
    seen_stride,
    hidden_stride,
    cell_stride,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * H_BLOCK + tl.arange(0, H_BLOCK)
    inside = h < H
    word, seen, hidden = word + row * word_stride, seen + row * seen_stride, hidden + row * hidden_stride
    let_in, forget = tl.sigmoid(_gate(word, seen, hidden, 0, h, H)), tl.sigmoid(_gate(word, seen, hidden, 1, h, H))
    candidate, let_out = _tanh(_gate(word, seen, hidden, 2, h, H)), tl.sigmoid(_gate(word, seen, hidden, 3, h, H))
    old = tl.load(cell + row * cell_stride + h, mask=inside, other=0.0)
    out = _tanh(forget * old + let_in * candidate)
    d_h = tl.load(d_hidden + row * H + h, mask=inside, other=0.0)
    d_c = tl.load(d_cell + row * H + h, mask=inside, other=0.0) + d_h * let_out * (1 - out * out)
    d_gates += row * 4 * H + h
    tl.store(d_gates, d_c * candidate * let_in * (1 - let_in), mask=inside)
    tl.store(d_gates + H, d_c * old * forget * (1 - forget), mask=inside)
    tl.store(d_gates + 2 * H, d_c * let_in * (1 - candidate * candidate), mask=inside)
    tl.store(d_gates + 3 * H, d_h * out * let_out * (1 - let_out), mask=inside)
    tl.store(d_old + row * H + h, d_c * forget, mask=inside)
