"""Each Triton kernel alone, beside what the decoder runs without it.

Letters: B photos, R rows of a step, T steps, N native cells, P output cells, C channels, A attention size, H hidden
size.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from ceilings import best_seconds, peak_bandwidth
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from captioning.decoders import attention
from captioning.decoders.fused_ops import ChunkedAttentionScores, kernels_for
from captioning.encoders.grid import GRID_SIZE, grid_pooling
from captioning.features import quantization
from captioning.runtime.device import pick_precision
from gpu_steps.common import CAPTIONS_PER_PHOTO, Row, Setting, not_available

STEPS = 10  # T
REPEATS = 5


class Inputs(NamedTuple):
    """The tensors of T equal steps of the attention decoder."""

    cells: Tensor  # (B, N, C)
    keys: Tensor  # (B, P, A)
    pooling: Tensor  # (P, N)
    score_weight: Tensor  # (1, A)
    photo_index: Tensor  # (R,) int64
    queries: list[Tensor]  # T of (R, A)
    gates: list[Tensor]  # T of (R, C)
    lstm: list[Tensor]  # three of (R, 4H)
    cell: Tensor  # (R, H) float32


def make_inputs(setting: Setting) -> Inputs:
    """Random inputs in the precision of training, of the batch size that `library` has."""
    scale = setting.scale
    rows = scale.library_batch_size
    photos = max(1, rows // CAPTIONS_PER_PHOTO)
    options: dict[str, Any] = {"device": setting.device, "dtype": pick_precision("auto", setting.device)}

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, **options).requires_grad_()

    return Inputs(
        cells=torch.randn(photos, scale.side**2, scale.channels, **options).relu(),
        keys=leaf(photos, GRID_SIZE**2, scale.size),
        pooling=grid_pooling(scale.side, scale.side).to(setting.device),
        score_weight=torch.randn(1, scale.size, device=setting.device).requires_grad_(),
        photo_index=torch.randperm(rows, device=setting.device) % photos,
        queries=[leaf(rows, scale.size) for _ in range(STEPS)],
        gates=[leaf(rows, scale.channels) for _ in range(STEPS)],
        lstm=[leaf(rows, 4 * scale.size) for _ in range(3)],
        cell=torch.randn(rows, scale.size, device=setting.device).requires_grad_(),
    )


def each_kernel(setting: Setting) -> Iterator[Row]:
    """Time and bandwidth of every kernel, and the time of the plain form of what it computes."""
    inputs = make_inputs(setting)
    codes = random_codes(setting)
    plain = {
        "attention": lambda: plain_attention(inputs),
        "lstm": lambda: lstm_steps(inputs, attention.lstm_cell),
        "uint8": lambda: decode_codes(quantization.dequantize_rows, codes),
    }
    kernels = kernels_for(inputs.cells)
    if kernels is None:
        for name, work in plain.items():
            seconds = best_seconds(work, setting.device, rounds=1) / STEPS
            yield Row(f"{name}: a step, plain", 1e6 * seconds, "us", note="wall clock")
        yield not_available("kernels", "need an NVIDIA GPU and Triton")
        return
    feature_kernels = importlib.import_module(quantization.KERNELS)
    fused = {
        "attention": lambda: fused_attention(inputs, kernels.FusedAttention),
        "lstm": lambda: lstm_steps(inputs, kernels.lstm_cell),
        "uint8": lambda: decode_codes(feature_kernels.dequantize_rows, codes),
    }
    bandwidth = peak_bandwidth(setting.device, setting.scale.copy_bytes)
    for name, work in plain.items():
        without = sum(total_times(work).values())
        times = total_times(fused[name])
        for kernel, seconds in sorted(times.items(), key=lambda item: -item[1]):
            if kernel in {**vars(kernels), **vars(feature_kernels)}:
                yield kernel_row(kernel, seconds, inputs, bandwidth)
        together = sum(times.values())
        note = f"plain takes {1e6 * without / STEPS:.1f} us, {without / together:.2f} times as long"
        yield Row(f"{name}: a step, forward and backward", 1e6 * together / STEPS, "us", note=note)


class Codes(NamedTuple):
    """Features of B photos in 8 bits."""

    codes: Tensor  # (B, N, C) uint8
    scales: Tensor  # (B, N) float32
    rows: Tensor  # (B,) int64


def random_codes(setting: Setting) -> Codes:
    """As many photos as `make_inputs` has."""
    scale = setting.scale
    photos = max(1, scale.library_batch_size // CAPTIONS_PER_PHOTO)
    return Codes(
        torch.randint(256, (photos, scale.side**2, scale.channels), dtype=torch.uint8, device=setting.device),
        torch.rand(photos, scale.side**2, device=setting.device),
        torch.randperm(photos, device=setting.device),
    )


def decode_codes(dequantize_rows: Callable, codes: Codes) -> None:
    """Decode them T times."""
    for _ in range(STEPS):
        dequantize_rows(*codes, torch.bfloat16)


def kernel_row(kernel: str, seconds: float, inputs: Inputs, bandwidth: float) -> Row:
    """The row of a kernel that took these seconds for T steps. Bytes are those that its programs read and write."""
    num_bytes = kernel_bytes(kernel, inputs)
    achieved = num_bytes / seconds
    note = f"{achieved / 1e9:,.0f} GB/s, {achieved / bandwidth:.0%} of a copy (from the L2 cache it can be more)"
    return Row(f"kernel {kernel}: a step", 1e6 * seconds / STEPS, "us", note=note)


def kernel_bytes(kernel: str, inputs: Inputs) -> int:
    """Bytes that a kernel reads and writes in T steps, by what its name says it does."""
    rows, hidden = inputs.cell.shape
    photo = inputs.cells[0].nbytes + inputs.keys[0].nbytes  # which every row reads
    row = inputs.queries[0][0].nbytes + 2 * inputs.gates[0][0].nbytes + 4 * inputs.keys.shape[1]
    gates = inputs.lstm[0][0].nbytes
    if "dequantize" in kernel:  # from one byte to the two of bfloat16
        return STEPS * 3 * inputs.cells.numel()
    if "lstm" in kernel:
        passes = 2 if "backward" in kernel else 1  # gradients of what was read are written
        return STEPS * rows * passes * (3 * gates + 3 * 4 * hidden)
    if "keys" in kernel:
        tiles = inputs.keys.shape[1] / 32
        return int(2 * inputs.keys.nbytes + STEPS * rows * (inputs.queries[0][0].nbytes * tiles + row))
    return STEPS * rows * (photo + row * (2 if "backward" in kernel else 1))


def fused_attention(inputs: Inputs, build: Callable) -> None:
    """T steps with the kernels, and their backward pass."""
    attend = build(inputs.cells, inputs.keys, inputs.pooling, inputs.score_weight, inputs.photo_index)
    run_steps(inputs, attend)


def plain_attention(inputs: Inputs) -> None:
    """T steps as the decoder runs them without kernels, and their backward pass."""
    scores = ChunkedAttentionScores("relu", inputs.keys, inputs.score_weight.to(inputs.keys.dtype), inputs.photo_index)
    cells = inputs.cells.index_select(0, inputs.photo_index)
    run_steps(inputs, attention.GridAttention(cells, inputs.pooling, scores, lambda weights: (weights, None)))


def run_steps(inputs: Inputs, attend: Callable) -> None:
    """Attend T times, then one backward pass, as in training."""
    outputs = [attend(query, gate) for query, gate in zip(inputs.queries, inputs.gates, strict=True)]
    sum(context.float().sum() + weights.float().square().sum() for context, weights, _ in outputs).backward()


def lstm_steps(inputs: Inputs, lstm_cell: Callable) -> None:
    """T steps of the LSTM cell, and their backward pass."""
    cell = inputs.cell
    hiddens = []
    for _ in range(STEPS):
        hidden, cell = lstm_cell(*inputs.lstm, cell)
        hiddens.append(hidden)
    torch.stack(hiddens).sum().backward()


def total_times(work: Callable[[], object]) -> dict[str, float]:
    """GPU kernel -> its seconds in one call of the work, the mean of some calls."""
    work()  # compiles
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPEATS):
            work()
        torch.cuda.synchronize()
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            seconds[event.name] += event.time_range.elapsed_us() / 1e6 / REPEATS
    return dict(seconds)
