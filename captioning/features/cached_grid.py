"""The feature maps of a batch on their way from where they are held to the device.

Letters: R rows held, B photos per batch, of which G are held on the device and H on the host; N cells, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from captioning.encoders.grid import Grid
from captioning.features.quantization import DequantizeRows, dequantize_rows, quantize
from captioning.runtime.device import empty_pinned, pin


class FeatureRows(NamedTuple):
    """Feature maps in the form in which they are held: floating point, or codes with scales (quantization.py)."""

    cells: Tensor  # (R, N, C) float16 or float32, or uint8 codes
    scales: Tensor | None = None  # (R, N) float32, of codes

    def map(self, function: Callable[[Tensor], Tensor]) -> FeatureRows:
        """Apply a function to each tensor."""
        return FeatureRows(function(self.cells), None if self.scales is None else function(self.scales))

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return self.cells[0].nbytes + (0 if self.scales is None else self.scales[0].nbytes)

    def empty_like(self, rows: int, device: torch.device) -> FeatureRows:
        """This many rows of the same form, uninitialised."""
        return self.map(lambda tensor: torch.empty(rows, *tensor.shape[1:], dtype=tensor.dtype, device=device))

    def write(self, start: int, rows: FeatureRows) -> None:
        """Copy rows of the same form into these, from row `start` on."""
        end = start + len(rows.cells)
        self.cells[start:end].copy_(rows.cells)
        if self.scales is not None and rows.scales is not None:
            self.scales[start:end].copy_(rows.scales)

    def gather(self, rows: Tensor, pinned: bool) -> FeatureRows:
        """A copy of these rows (B,) int64 on the CPU. pinned: in pinned memory.

        torch keeps pinned memory for later batches, and does not reuse it before an asynchronous copy from it has
        ended. So this is the only copy on the host, into memory that is already mapped.
        """
        return self.map(lambda tensor: _gather(tensor, rows, pinned))

    def to(self, device: torch.device) -> FeatureRows:
        """Copy the rows to a device: from pinned memory asynchronously."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def select(self, rows: Tensor, dtype: torch.dtype, dequantize: DequantizeRows = dequantize_rows) -> Tensor:
        """The cells (B, N, C), in `dtype`, of these rows (B,) int64, on the device that holds them."""
        if self.scales is None:
            return self.cells.index_select(0, rows).to(dtype)
        return dequantize(self.cells, self.scales, rows, dtype)

    def decode(self, dtype: torch.dtype, dequantize: DequantizeRows = dequantize_rows) -> Tensor:
        """All cells (R, N, C) in `dtype`."""
        if self.scales is None:
            return self.cells.to(dtype)
        return dequantize(self.cells, self.scales, torch.arange(len(self.cells), device=self.cells.device), dtype)

    def quantize(self) -> FeatureRows:
        """The rows as codes with scales; unchanged if they are that already."""
        return FeatureRows(*quantize(self.cells)) if self.scales is None else self


def _gather(tensor: Tensor, rows: Tensor, pinned: bool) -> Tensor:
    if not pinned:
        return tensor.index_select(0, rows)
    return torch.index_select(tensor, 0, rows, out=empty_pinned((len(rows), *tensor.shape[1:]), tensor.dtype))


@dataclass
class CachedGrid:
    """The feature maps of a batch before they are on the device: `to` returns their Grid.

    Some photos are rows of `resident`, which holds many rows on the device; the rows of the others were read to the
    host. `to` and `copy_to` put both in the order of the batch, without waiting for the device.
    """

    host: FeatureRows  # (H, ...) in the order of the batch
    resident: FeatureRows | None  # (R, ...) on the device; None: all photos are in `host`
    rows: Tensor  # (G,) int64: rows of `resident`
    places: Tensor  # (B,) int64: places in the batch, of the G photos of `rows`, then of those of `host`
    pooling: Tensor  # (P, N) float32, on the device
    dequantize: DequantizeRows = dequantize_rows  # decodes codes on the device

    def __len__(self) -> int:
        return len(self.places)

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, N, C)."""
        return len(self), *self.host.cells.shape[1:]

    def to(self, device: torch.device, dtype: torch.dtype) -> Grid:
        """Copy the maps to the device, and convert them to `dtype` there. device: that of `resident` and `pooling`."""
        parts = self._parts(device, dtype)
        if len(parts) == 1:
            return Grid(parts[0], self.pooling)
        cells = torch.empty(self.shape, dtype=dtype, device=device)
        self._merge(parts, cells)
        return Grid(cells, self.pooling)

    def copy_to(self, cells: Tensor) -> None:
        """Write the maps to cells (B, N, C), on the device and in the dtype of these."""
        parts = self._parts(cells.device, cells.dtype)
        if len(parts) == 1:
            cells.copy_(parts[0])
        else:
            self._merge(parts, cells)

    def _parts(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """The maps on the device: those of `resident` (G, N, C), then those of `host` (H, N, C); one if B is G or H."""
        parts = []
        if len(self.rows):
            assert self.resident is not None
            parts.append(self.resident.select(self.rows.to(device, non_blocking=True), dtype, self.dequantize))
        if len(self.rows) < len(self):
            # copied in the form in which they are held, which is smaller, and decoded on the device
            parts.append(self.host.to(device).decode(dtype, self.dequantize))
        return parts

    def _merge(self, parts: list[Tensor], cells: Tensor) -> None:
        """Write the parts to their places in cells (B, N, C)."""
        places = self.places.to(cells.device, non_blocking=True)
        for part, part_places in zip(parts, places.split([len(part) for part in parts]), strict=True):
            cells.index_copy_(0, part_places, part)

    def pin_memory(self) -> CachedGrid:
        """Copy what lies on the host to pinned memory, unless it does already."""
        return replace(self, host=self.host.map(pin), rows=pin(self.rows), places=pin(self.places))
