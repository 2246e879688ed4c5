"""A Triton kernel for NVIDIA GPUs: gather rows of 8-bit feature maps and decode them, in one pass.

It computes `dequantize_rows` of captioning/features/quantization.py, which is its readable form and defines the codes.
It reads one byte per value and writes the result, where that form writes and reads about ten tensors of that size.

Letters: R rows held, B photos of a batch, N cells, C channels. A program decodes up to C_BLOCK values of one cell.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 2048


def dequantize_rows(codes: Tensor, scales: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The cells (B, N, C), in `dtype`, of these rows (B,) int64 of codes (R, N, C) uint8 and scales (R, N) float32.

    All three tensors are contiguous and on one GPU. Each row is between 0 and R - 1, which is not checked.
    """
    _, num_cells, channels = codes.shape
    cells = torch.empty(len(rows), num_cells, channels, dtype=dtype, device=codes.device)
    block = block_size(channels)
    if cells.numel():
        _dequantize_kernel[len(rows) * num_cells, triton.cdiv(channels, block)](
            codes, scales, rows, cells, N=num_cells, C=channels, C_BLOCK=block, enable_fp_fusion=True
        )
    return cells


def block_size(channels: int) -> int:
    """C_BLOCK."""
    return min(triton.next_power_of_2(channels), MAX_BLOCK)


def smoke_test(device: torch.device) -> None:
    """Decode one value. Raises the error of Triton, or of the driver, if the kernel does not compile or run."""
    codes = torch.zeros(1, 1, 1, dtype=torch.uint8, device=device)
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    dequantize_rows(codes, torch.ones(1, 1, device=device), rows, torch.float32)


@triton.jit
def _dequantize_kernel(codes, scales, rows, cells, N: tl.constexpr, C: tl.constexpr, C_BLOCK: tl.constexpr):
    target = tl.program_id(0).to(tl.int64)  # a cell of the batch
    source = tl.load(rows + target // N) * N + target % N
    c = tl.program_id(1) * C_BLOCK + tl.arange(0, C_BLOCK)
    scale = tl.load(scales + source)
    code = tl.load(codes + source * C + c, mask=c < C, other=0).to(tl.float32)
    # Division rounded to nearest, as on a CPU: the features of a photo do not depend on the device.
    level = tl.where(scale < 0, tl.div_rn(code - 128.0, 127.0), tl.div_rn(code, 255.0))
    value = level * tl.abs(level) * tl.abs(scale)
    tl.store(cells + target * C + c, value.to(cells.dtype.element_ty), mask=c < C)
