"""Feature maps in 8 bits per value: half the size of float16, with a relative L2 error below one percent.

Most features are small and a few are large, so the codes are uniform in the square root of the value (companding, as
in G.711 telephony, https://www.itu.int/rec/T-REC-G.711): small values get fine steps. Each cell has its own scale s.

    s >= 0: no value is negative, as after a ReLU     value =  s (q / 255)^2
    s < 0:  a value of the cell is negative           value = -s l |l| / 127^2,   l = q - 128

The sign of the scale thus says how its cell is coded, and a file may hold cells of both kinds.

Letters: R rows, B photos per batch, N cells, C channels; s scale, q code, l signed level.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from captioning.runtime.kernel_loading import LoadedKernels
from captioning.runtime.library_errors import reason

KERNELS = "captioning.features.kernels"
MAX_KERNEL_ERROR = 1e-5  # relative: rounding in float32 is below it
MAX_CODE = 255  # of a cell without negative values
MAX_LEVEL = 127  # of a cell with negative values
ZERO_CODE = 128  # the code of 0 in such a cell
SMALLEST_SCALE = 1e-30  # also that of a cell of zeros


def quantize(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Cells (..., C) of any floating dtype -> codes (..., C) uint8 and scales (...) float32, on their device.

    The scale of a cell with an infinite value or NaN is not finite.
    """
    smallest = cells.amin(-1, keepdim=True)  # (..., 1); aminmax takes 20 times as long
    largest = cells.amax(-1, keepdim=True)
    signed = smallest < 0
    scales = torch.maximum(largest, -smallest).float().clamp_min(SMALLEST_SCALE)
    levels = torch.where(signed, MAX_LEVEL, MAX_CODE)
    codes = (cells.float() * (levels.square() / scales)).abs_().sqrt_().round_()  # levels * sqrt(|value| / scale)
    if signed.any():
        codes = torch.where(signed, codes.copysign_(cells) + ZERO_CODE, codes)
    return codes.to(torch.uint8), torch.where(signed, -scales, scales).squeeze(-1)


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes (..., C) uint8 and scales (...) float32 -> cells (..., C) in `dtype`; computed in float32."""
    signed = scales[..., None] < 0  # (..., 1)
    zero_codes = torch.where(signed, float(ZERO_CODE), 0.0)
    levels = codes.float().sub_(zero_codes).div_(torch.where(signed, MAX_LEVEL, MAX_CODE))  # -1 to 1
    return (levels * levels.abs()).mul_(scales[..., None].abs()).to(dtype)


def dequantize_rows(codes: Tensor, scales: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The cells (B, N, C), in `dtype`, of these rows (B,) int64 of codes (R, N, C) uint8 and scales (R, N) float32."""
    return dequantize(codes.index_select(0, rows), scales.index_select(0, rows), dtype)


DequantizeRows = Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]


def proven_kernel(loaded: LoadedKernels, codes: Tensor, scales: Tensor) -> DequantizeRows:
    """The kernel, if it computes what `dequantize_rows` does from these codes and scales; else that function.

    Then one line says why.
    """
    problem = loaded.unavailable
    if loaded.module is not None:
        problem = _problem(loaded.module.dequantize_rows, codes, scales)
        if problem is None:
            return loaded.module.dequantize_rows
    print(f"8-bit features are decoded without their GPU kernel, which is slower: {problem}")
    return dequantize_rows


def _problem(kernel: DequantizeRows, codes: Tensor, scales: Tensor) -> str | None:
    rows = torch.arange(len(codes), device=codes.device).flip(0)
    exact = dequantize_rows(codes, scales, rows, torch.float32)
    try:
        error = float((kernel(codes, scales, rows, torch.float32) - exact).norm() / exact.norm().clamp_min(1e-30))
    except Exception as failure:  # Triton's own errors have no other common class
        return reason(failure)
    return None if error <= MAX_KERNEL_ERROR else f"it is off by {error:.2%}"  # also if it is NaN
