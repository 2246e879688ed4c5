"""What training minimises. An objective is an object with one method, `loss`.

Letters: R captions, W words of all captions, P cells, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from captioning.batches import Batch
from captioning.decoders.protocol import full
from captioning.grid import Grid


class Loss(NamedTuple):
    objective: Tensor  # scalar: what is minimised, this batch's share of it
    cross_entropy: Tensor  # scalar: natural log, mean over the words of the batch
    top5: Tensor  # scalar: share of the words among the five likeliest


class Share(NamedTuple):
    """A batch's share of one update of the weights, which may add up several batches and several ranks.

    The means of a loss are over the words and the captions of the whole update, however it is divided.
    """

    words: float = 1.0
    captions: float = 1.0


@dataclass(frozen=True)
class CrossEntropy:
    """L = -mean log p(y_t) + alpha_c mean((1 - sum_t a_t)^2)   (Xu et al. 2015, eq. 14)

    The second term, doubly stochastic attention, is the mean over captions and cells: over a caption, each cell is
    looked at about once. A decoder without attention has none.
    """

    alpha_c: float

    def loss(self, decoder: nn.Module, grid: Grid, batch: Batch, share: Share) -> Loss:
        scores, coverage = decoder(grid, batch.words, batch.photo)
        cross_entropy = F.cross_entropy(full(scores), batch.targets)
        objective = share.words * cross_entropy
        if coverage is not None and self.alpha_c:
            objective = objective + share.captions * self.alpha_c * (1 - coverage).square().mean()
        return Loss(objective, cross_entropy.detach(), _top5_share(scores.detach(), batch.targets))


def _top5_share(scores: Tensor, targets: Tensor) -> Tensor:
    """The share of targets with fewer than five likelier words: cheaper than sorting the vocabulary."""
    likelier = scores > scores.gather(1, targets[:, None])  # (W, V)
    return (likelier.sum(1) < 5).float().mean()
