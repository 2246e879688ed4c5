"""Ensembles: several decoders that write one caption together, from the mean of their probabilities.

Legend: B photos, R captions being written, V vocabulary size, P cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        states = [member.init_state(grid) for member in self.members]
        self.state_sizes = [[len(part) for part in state] for state in states]
        return _concat_states(states)

    def step(self, words: Tensor, state: State) -> Step:
        """Log of the mean probability (R, V); attention (R, P) is the mean over the members that have one."""
        member_states = self._split_state(state)
        steps = [member.step(words, part) for member, part in zip(self.members, member_states, strict=True)]
        log_probabilities = torch.stack([step.log_probabilities for step in steps])
        mean = log_probabilities.logsumexp(0) - math.log(len(steps))
        attentions = [step.attention for step in steps if step.attention is not None]
        attention = torch.stack(attentions).mean(0) if attentions else None
        return Step(mean, attention, _concat_states([step.state for step in steps]))

    def _split_state(self, state: State) -> list[State]:
        """The inverse of _concat_states."""
        parts = [iter(part) for part in state]
        return [
            State(*(tuple(islice(part, size)) for part, size in zip(parts, sizes, strict=True)))
            for sizes in self.state_sizes
        ]


def _concat_states(states: Sequence[State]) -> State:
    """One State with the tensors of all members, in the order of the members."""
    return State(*(tuple(chain.from_iterable(parts)) for parts in zip(*states, strict=True)))
