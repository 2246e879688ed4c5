"""Several decoders that write one caption together: at every step, the mean of their probabilities.

Letters: B photos, R rows (captions being written), V vocabulary, P cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from captioning.decoders.protocol import Decoder, State, Step
from captioning.encoders.grid import Grid


class Ensemble:
    """p(word) = mean_i p_i(word). To a search it is a decoder like any other; all members see the same grid."""

    def __init__(self, members: Sequence[Decoder]):
        self.members = members
        self.has_sentinel = all(member.has_sentinel for member in members)  # else attention would not sum to 1 - beta
        self.uses_attention = any(member.uses_attention for member in members)
        self.parts: list[tuple[int, int]] = []  # tensors of each member's state: a row a photo, a row a caption

    def init_state(self, grid: Grid) -> State:
        """The members' states, one behind the other."""
        states = [member.init_state(grid) for member in self.members]
        self.parts = [(len(state.per_photo), len(state.per_caption)) for state in states]
        return _joined(states)

    def step(self, words: Tensor, state: State) -> Step:
        """Attention (R, P) is the mean of that of the members that have one."""
        steps = [member.step(words, own) for member, own in zip(self.members, self._split(state), strict=True)]
        together = torch.stack([step.log_probabilities for step in steps]).logsumexp(0) - math.log(len(steps))
        attentions = [step.attention for step in steps if step.attention is not None]
        attention = torch.stack(attentions).mean(0) if attentions else None
        return Step(together, attention, _joined([step.state for step in steps]))

    def _split(self, state: State) -> list[State]:
        photos, rows = iter(state.per_photo), iter(state.per_caption)
        return [
            State(tuple(next(photos) for _ in range(p)), tuple(next(rows) for _ in range(r))) for p, r in self.parts
        ]


def _joined(states: Sequence[State]) -> State:
    """The tensors of all, member after member."""
    return State(*(sum(tensors, ()) for tensors in zip(*states, strict=True)))
