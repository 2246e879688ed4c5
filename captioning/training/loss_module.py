"""Encoder, decoder and objective as one module: what is trained, and what DistributedDataParallel wraps."""

from __future__ import annotations

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

    def forward(self, batch: Batch, weights: LossWeights) -> Loss:
        """Return the objective's loss of a batch on the device."""
        grid = self.encode(batch).dropout_channels(self.feature_dropout)
        return self.objective(self.decoder, grid, batch, weights)
