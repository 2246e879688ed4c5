"""Encoder, decoder and objective as one module: what is trained, and what DistributedDataParallel wraps."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from captioning.dataset.batches import Batch
from captioning.encoders.encoder import Encoder
from captioning.encoders.grid import Grid
from captioning.training.objectives import Loss, LossWeights, Objective


class LossModule(nn.Module):
    """Batch -> Loss in one forward, since DistributedDataParallel synchronises the gradients of a forward only.

    Only training calls it; validation and captioning call the encoder and the decoder.
    """

    def __init__(self, encoder: Encoder | None, decoder: nn.Module, objective: Objective, feature_dropout: float):
        """encoder: None with cached features."""
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.objective = objective
        self.feature_dropout = feature_dropout

    def encode(self, batch: Batch) -> Grid:
        """Return the features of a batch: the cached Grid, or the live encoder's. The decoder cannot tell which."""
        if isinstance(batch.photos, Grid):
            return batch.photos
        assert self.encoder is not None, "live photos need an encoder"
        return self.encoder(batch.photos)

    def prepare(self, batch: Batch) -> Batch:
        """Do what a CUDA graph cannot repeat of a batch's work, if the objective has such work.

        batch: on the device. The returned one has the features that the objective read, with their dropout, and its
        other tensors on the CPU. Where this is not called, `forward` does the work itself. A live encoder must run in
        `forward`, where it has gradients: then nothing is prepared.
        """
        if not self.objective.prepares or not isinstance(batch.photos, Grid):
            return batch
        grid = batch.photos.dropout_channels(self.feature_dropout)
        return replace(self.objective.prepare(self.decoder, grid, batch), photos=grid)

    def forward(self, batch: Batch, weights: LossWeights) -> Loss:
        """Return the objective's loss of a batch on the device."""
        grid = self.encode(batch)
        if not batch.is_prepared:
            grid = grid.dropout_channels(self.feature_dropout)
            if self.objective.prepares:
                batch = self.objective.prepare(self.decoder, grid, batch).to(grid.cells.device, grid.cells.dtype)
        return self.objective(self.decoder, grid, batch, weights)
