"""Hard attention: Xu et al. 2015, Show, Attend and Tell, https://arxiv.org/abs/1502.03044.

Each word attends to one sampled cell.

Legend: B photos, R captions, K captions per photo, P output cells.
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
    """s_t ~ Multinomial(a_t),   z_t = sigmoid(W_b h_t-1) * F[s_t]       (eq. 8-9; all else as in soft attention)

    REINFORCE estimates the gradient of the sampling (eq. 11-12): the objective computes it from the HardSamples. For
    half of the photos, chosen anew in every batch, the context is the expectation sum(a_t F) instead, which reduces the
    variance (section 4.1). Outside training nothing is sampled: `attention_mode` selects the
    expectation or the most probable cell.
    """

    uses_coverage = False
    supports_kernels = False
    attention_mode: Literal["expectation", "argmax"] = "expectation"
    expectation_fraction = 0.5  # of the photos, in training

    def init_state(self, grid: Grid) -> State:
        """As in soft attention. In training, per_caption also holds which photos sample a cell: bool (B,)."""
        state = super().init_state(grid)
        if not self.training:
            return state
        sampled = torch.rand(len(grid), device=grid.cells.device) >= self.expectation_fraction
        return State(state.per_photo, (*state.per_caption, sampled))

    def weigh_cells(self, attention: Tensor, sampled: Tensor | None = None) -> tuple[Tensor, HardSamples | None]:
        """Attention (B, K, P), sampled bool (R,) in training -> weight of each cell (B, K, P), samples (R,)."""
        if sampled is None:
            if self.attention_mode == "argmax":
                return one_hot(attention.argmax(2), attention), None
            return attention, None
        log_attention = attention.clamp_min(torch.finfo(attention.dtype).tiny).log()
        cell = sample_categorical(attention.detach())  # (B, K)
        sampled = sampled.view(cell.shape)
        weights = torch.where(sampled[:, :, None], one_hot(cell, attention), attention)
        log_probability = log_attention.gather(2, cell[:, :, None]).squeeze(2) * sampled
        entropy = -(attention * log_attention).sum(2)
        return weights, HardSamples(log_probability.flatten(), entropy.flatten())


def one_hot(cell: Tensor, attention: Tensor) -> Tensor:
    """cell (B, K) int64 -> (B, K, P), with the dtype of the attention (B, K, P)."""
    return F.one_hot(cell, attention.shape[2]).to(attention.dtype)
