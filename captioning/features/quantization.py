"""Feature maps in 8 bits per value: half the size of float16, with a relative L2 error below one percent.

Most features are small and a few are large, so the codes are uniform in the square root of the value (companding, as
in G.711 telephony, https://www.itu.int/rec/T-REC-G.711): small values get fine steps. Each cell has its own scale s.

    s >= 0: no value is negative, as after a ReLU     value =  s (q / 255)^2
    s < 0:  a value of the cell is negative           value = -s l |l| / 127^2,   l = q - 128

The sign of the scale thus says how its cell is coded, and a file may hold cells of both kinds.

Letters: R rows, B photos per batch, N cells, C channels; s scale, q code, l signed level.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_CODE = 255  # of a cell without negative values
MAX_LEVEL = 127  # of a cell with negative values
ZERO_CODE = 128  # the code of 0 in such a cell
TINY = torch.finfo(torch.float32).tiny  # in place of the scale of a cell of zeros


def quantize(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Finite cells (..., C) of any floating dtype -> codes (..., C) uint8 and scales (...) float32, on their device.

    The scale of a cell with an infinite value or NaN is not finite.
    """
    cells = cells.float()
    largest = cells.abs().amax(-1)  # (...)
    signed = cells.amin(-1) < 0  # (...)
    roots = (cells.abs() / largest.clamp_min(TINY)[..., None]).sqrt_()  # (..., C), 0 to 1
    unsigned_codes = (roots * MAX_CODE).round_()
    signed_codes = (roots * MAX_LEVEL).round_() * cells.sign() + ZERO_CODE
    codes = torch.where(signed[..., None], signed_codes, unsigned_codes)
    return codes.to(torch.uint8), torch.where(signed, -largest, largest)


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes (..., C) uint8 and scales (...) float32 -> cells (..., C) in `dtype`; computed in float32."""
    scales = scales[..., None]
    values = codes.float()
    unsigned_levels = values / MAX_CODE
    signed_levels = (values - ZERO_CODE) / MAX_LEVEL
    levels = torch.where(scales < 0, signed_levels, unsigned_levels)
    return (levels * levels.abs() * scales.abs()).to(dtype)


def dequantize_rows(codes: Tensor, scales: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The cells (B, N, C), in `dtype`, of these rows (B,) int64 of codes (R, N, C) uint8 and scales (R, N) float32."""
    return dequantize(codes.index_select(0, rows), scales.index_select(0, rows), dtype)
