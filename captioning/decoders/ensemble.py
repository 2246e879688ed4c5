"""Ensembles: several decoders that write one caption together, or one decoder that reads several views of a photo.

Legend: B photos, R captions being written, V vocabulary size, P cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from captioning.decoders.protocol import Decoder, State, Step
from captioning.encoders.grid import Grid


class Ensemble:
    """p(word) = mean_i p_i(word). A search uses it like any decoder; all members read the same grid."""

    def __init__(self, members: Sequence[Decoder]):
        self.members = members
        self.has_sentinel = all(member.has_sentinel for member in members)  # else attention does not sum to 1 - beta
        self.uses_attention = any(member.uses_attention for member in members)
        self.state_sizes: list[list[int]] = []  # of each member: the number of tensors in each part of its state

    def init_state(self, grid: Grid) -> State:
        """The concatenation of the members' states."""
        return self._concat_members([member.init_state(grid) for member in self.members])

    def _concat_members(self, states: Sequence[State]) -> State:
        self.state_sizes = [[len(part) for part in state] for state in states]
        return _concat_states(states)

    def step(self, words: Tensor, state: State) -> Step:
        """Log of the mean probability (R, V); attention (R, P) is the mean over the members that have one."""
        member_states = self._split_state(state)
        steps = [member.step(words, part) for member, part in zip(self.members, member_states, strict=True)]
        mean = self._mean(torch.stack([step.log_probabilities for step in steps]))
        return Step(mean, self._attention(steps), _concat_states([step.state for step in steps]))

    def _mean(self, log_probabilities: Tensor) -> Tensor:
        """Those of all members (members, R, V) -> (R, V)."""
        return log_probabilities.logsumexp(0) - math.log(len(log_probabilities))

    def _attention(self, steps: Sequence[Step]) -> Tensor | None:
        attentions = [step.attention for step in steps if step.attention is not None]
        return torch.stack(attentions).mean(0) if attentions else None

    def _split_state(self, state: State) -> list[State]:
        """The inverse of _concat_states."""
        parts = [iter(part) for part in state]
        return [
            State(*(tuple(islice(part, size)) for part, size in zip(parts, sizes, strict=True)))
            for sizes in self.state_sizes
        ]


@dataclass
class PhotoViews:
    """The grids of several views of the same photos, the whole photos first. A search takes it like a Grid."""

    grids: Sequence[Grid]

    def __len__(self) -> int:
        return len(self.grids[0])

    @property
    def cells(self) -> Tensor:
        """Those of the whole photos, (B, N, C)."""
        return self.grids[0].cells

    def to(self, device: torch.device, dtype: torch.dtype) -> PhotoViews:
        """Move the grids to a device and convert their cells."""
        return PhotoViews([grid.to(device, dtype) for grid in self.grids])


class ViewEnsemble(Ensemble):
    """A decoder that reads all views of each photo: p(word) is the normalised geometric mean of those of the views.

    That is, log-probabilities are averaged (test-time augmentation). The attention is that over the whole photo.
    """

    def __init__(self, decoder: Decoder, views: int):
        super().__init__([decoder] * views)

    def init_state(self, grid: Grid | PhotoViews) -> State:
        """The concatenation of the states of all views of a PhotoViews, which has as many."""
        assert isinstance(grid, PhotoViews)
        return self._concat_members(
            [member.init_state(view) for member, view in zip(self.members, grid.grids, strict=True)]
        )

    def _mean(self, log_probabilities: Tensor) -> Tensor:
        return log_probabilities.mean(0).log_softmax(1)

    def _attention(self, steps: Sequence[Step]) -> Tensor | None:
        return steps[0].attention


def _concat_states(states: Sequence[State]) -> State:
    """One State with the tensors of all members, in the order of the members."""
    return State(*(tuple(chain.from_iterable(parts)) for parts in zip(*states, strict=True)))
