"""Encoder, decoder and objective as one module: what is trained, and what DistributedDataParallel wraps."""

from __future__ import annotations

from torch import nn

from captioning.dataset.batches import Batch
from captioning.encoders.encoder import Encoder
from captioning.encoders.grid import Grid
from captioning.training.objectives import Loss, LossWeights, Objective


class LossModule(nn.Module):
    """Batch -> Loss, in one forward, which is all that DistributedDataParallel follows. Only training calls it."""

    def __init__(self, encoder: Encoder | None, decoder: nn.Module, objective: Objective, feature_dropout: float):
        super().__init__()
        self.encoder, self.decoder, self.objective = encoder, decoder, objective
        self.feature_dropout = feature_dropout

    def encode(self, batch: Batch) -> Grid:
        """The Grid of a batch, cached or live: the decoder cannot tell which."""
        return self.encoder(batch.photos) if self.encoder else batch.photos

    def forward(self, batch: Batch, share: LossWeights) -> Loss:
        grid = self.encode(batch).dropout_channels(self.feature_dropout)
        return self.objective(self.decoder, grid, batch, share)
