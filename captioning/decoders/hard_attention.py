"""Show, Attend and Tell (Xu et al. 2015), hard attention: one cell is seen at a time.

Letters: B photos, R captions, K captions a photo, W words of all captions packed, P output cells.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from captioning.decoders.attention import AttentionDecoder
from captioning.decoders.protocol import HardSamples, State, sample_categorical
from captioning.encoders.grid import Grid


class HardAttentionDecoder(AttentionDecoder):
    """s_t ~ Multinomial(a_t),   z_t = sigmoid(W_b h_t-1) * F[s_t]                (eq. 8-9; all else as soft attention)

    The gradient of the drawing is REINFORCE's (eq. 11-12), which the objective adds from the choices. For half of the
    photos, anew in every batch, what is seen is the expectation sum(a_t F) instead, which makes it steadier (section
    4.1). Outside training nothing is drawn: `sees` says what is seen.
    """

    uses_coverage = False
    uses_expectation = False
    sees: Literal["expectation", "argmax"] = "expectation"
    expected_share = 0.5  # of the photos, in training

    def init_state(self, grid: Grid) -> State:
        """In training rows also hold which photos' cells are drawn (B,) bool."""
        state = super().init_state(grid)
        if not self.training:
            return state
        drawn = torch.rand(len(grid), device=grid.cells.device) >= self.expected_share
        return State(state.per_photo, (*state.per_caption, drawn))

    def _weights(self, attention: Tensor, drawn: Tensor | None = None) -> tuple[Tensor, HardSamples | None]:
        if drawn is None:
            return (attention if self.sees == "expectation" else one_hot(attention.argmax(2), attention)), None
        log_attention = attention.clamp_min(torch.finfo(attention.dtype).tiny).log()
        cell = sample_categorical(attention.detach())  # (B, K)
        drawn = drawn.view(cell.shape)
        weights = torch.where(drawn[:, :, None], one_hot(cell, attention), attention)
        log_probability = log_attention.gather(2, cell[:, :, None]).squeeze(2) * drawn
        entropy = -(attention * log_attention).sum(2)
        return weights, HardSamples(log_probability.flatten(), entropy.flatten())


def one_hot(cell: Tensor, attention: Tensor) -> Tensor:
    """(B, K) int64 -> (B, K, P), of the type of the attention."""
    return F.one_hot(cell, attention.shape[2]).to(attention.dtype)
