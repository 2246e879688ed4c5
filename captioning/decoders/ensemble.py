"""Ensembles: several decoders that write one caption together, from the mean of their probabilities.

Legend: B photos, R captions being written, V vocabulary size, P cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
        self.state_sizes: list[tuple[int, int]] = []  # number of tensors in per_photo and per_caption of each member

    def init_state(self, grid: Grid) -> State:
        """The concatenation of the members' states."""
        states = [member.init_state(grid) for member in self.members]
        self.state_sizes = [(len(state.per_photo), len(state.per_caption)) for state in states]
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
        states = []
        photo_start = caption_start = 0
        for num_photo, num_caption in self.state_sizes:
            photo_end, caption_end = photo_start + num_photo, caption_start + num_caption
            states.append(State(state.per_photo[photo_start:photo_end], state.per_caption[caption_start:caption_end]))
            photo_start, caption_start = photo_end, caption_end
        return states


def _concat_states(states: Sequence[State]) -> State:
    """One State with the tensors of all members, in the order of the members."""
    return State(
        tuple(tensor for state in states for tensor in state.per_photo),
        tuple(tensor for state in states for tensor in state.per_caption),
    )
