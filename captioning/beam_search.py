"""Beam search over a batch of photos: tensors only, and no knowledge of a decoder but its protocol.

At every step the `beam_size` likeliest continuations of all live hypotheses of a photo are kept. Those that wrote
<end> are finished and leave the beam; the next step fills their places with continuations of the others. The finished
hypothesis of the highest rank wins:

    rank(y) = log p(y) / |y|^a        |y| words, <end> among them; a, the length penalty: 0 sum, 1 mean

As log p can only fall, a live hypothesis can at best have its present log p at the greatest length: a photo is done
once that is above its best finished one for none of them, and stopping there changes nothing. A beam as wide as there
are captions is an exhaustive search; a beam of one is greedy. Equal scores are ordered by torch.topk, which sees only
the photo's own scores, so that the other photos of a batch do not matter.

Letters: B photos, L of them still searched, K hypotheses a photo, V vocabulary, P cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from captioning.decoders.protocol import Decoder, State
from captioning.grid import Grid
from preprocess.vocabulary import END, PAD, START, UNKNOWN

FORBIDDEN = (PAD, UNKNOWN, START)  # never written


@dataclass
class Caption:
    words: list[int]  # without <start> and <end>
    log_probability: float  # natural, summed over the words, and <end> where it is finished
    finished: bool  # False: nothing ended within max_length words; this is the likeliest unfinished hypothesis
    attention: Tensor | None  # (len(words), P) float32 on the CPU, a row a word; None for a decoder without


@torch.no_grad()  # not inference_mode: autocast would round the weights anew at every step
def beam_search(
    decoder: Decoder, grid: Grid, beam_size: int, max_length: int, length_penalty: float = 0.0
) -> list[Caption]:
    """The best caption of each photo of the grid, in its order, of at most `max_length` words.

    One more step than words, so that a caption of `max_length` words can end. The decoder should be in eval mode.
    Raises ValueError for a beam or a length below 1, or a length penalty below 0.
    """
    if beam_size < 1 or max_length < 1:
        raise ValueError(f"a beam of {beam_size} and captions of {max_length} words: both must be 1 or more")
    if not length_penalty >= 0:
        raise ValueError(f"a length penalty of {length_penalty}: must be 0 or more")
    device = grid.cells.device
    search = _Search(decoder.begin(grid), len(grid), device, length_penalty, longest=max_length + 1)
    every = steps_between_looks(device)
    for number in range(max_length + 1):
        search.advance(decoder, beam_size, only_ends=number == max_length)
        if (number + 1) % every == 0 and not search.retire():
            break
    return _unroll(search.history, search.best)


def steps_between_looks(device: torch.device) -> int:
    """Steps from one look for photos that are done to the next: each look waits until a GPU has done all its work."""
    return 1 if device.type == "cpu" else 4


class _Step(NamedTuple):
    """Hypothesis k of photo b wrote words[b, k] while it looked at attention[b, k]; parents[b, k] wrote before it."""

    words: Tensor  # (B, K) int64
    parents: Tensor  # (B, K) int64, into the K of the step before
    attention: Tensor | None  # (B, K, P)


class _Best:
    """The best hypothesis of each photo so far; to begin with an unfinished one without words. All tensors (B,)."""

    def __init__(self, photos: int, device: torch.device):
        self.log_probability = torch.zeros(photos, device=device)
        self.rank = torch.zeros(photos, device=device)
        self.finished = torch.zeros(photos, dtype=torch.bool, device=device)
        self.step = torch.full((photos,), -1, device=device)  # the step at which it wrote its last word ...
        self.place = torch.zeros(photos, dtype=torch.long, device=device)  # ... and its place in the beam there

    def to_beat(self, photos: Tensor) -> Tensor:
        """What a hypothesis of these photos (L,) must exceed: the best finished one, -inf where there is none."""
        return self.rank.masked_fill(~self.finished, -torch.inf)[photos]

    def update(self, photos: Tensor, scores: Tensor, ended: Tensor, step: int, length_penalty: float) -> None:
        """scores, ended (L, K), all of step + 1 words.

        A better finished hypothesis wins; an unfinished one stands in while there is none.
        """
        finished, place_of_finished = scores.masked_fill(~ended, -torch.inf).max(1)
        unfinished, place_of_unfinished = scores.masked_fill(ended, -torch.inf).max(1)
        to_beat = self.to_beat(photos)
        rank = finished / (step + 1) ** length_penalty
        wins = rank > to_beat
        stands_in = ~wins & (to_beat == -torch.inf) & (unfinished > -torch.inf)
        for old, new in (
            (self.log_probability, torch.where(wins, finished, unfinished)),
            (self.rank, rank),
            (self.finished, wins),
            (self.step, torch.full_like(photos, step)),
            (self.place, torch.where(wins, place_of_finished, place_of_unfinished)),
        ):
            old[photos] = torch.where(wins | stands_in, new, old[photos])


class _Search:
    """The hypotheses of a batch on their way."""

    def __init__(self, state: State, photos: int, device: torch.device, length_penalty: float, longest: int):
        self.state, self.length_penalty, self.longest = state, length_penalty, longest
        self.photos = torch.arange(photos, device=device)  # (L,) those still searched
        self.words = torch.full((photos, 1), START, device=device)  # (L, K) just written
        self.scores = torch.zeros(photos, 1, device=device)  # (L, K) log-probabilities; -inf: ended, or impossible
        self.forbidden = torch.tensor(FORBIDDEN, device=device)
        self.best = _Best(photos, device)
        self.history: list[_Step] = []

    def advance(self, decoder: Decoder, beam_size: int, only_ends: bool) -> None:
        """Every hypothesis writes a word; at the last step (`only_ends`) what does not end is too long, and dropped."""
        log_probabilities, attention, state, _ = decoder.step(self.words.flatten(), self.state)
        scores, parents, words = self._choose(log_probabilities, beam_size)
        rows = self._rows(parents)
        if attention is not None:
            attention = attention.index_select(0, rows).unflatten(0, parents.shape)
        ended = words == END
        if only_ends:
            scores = scores.masked_fill(~ended, -torch.inf)
        self.best.update(self.photos, scores, ended, len(self.history), self.length_penalty)
        self.history.append(_Step(*(self._for_all_photos(values) for values in (words, parents, attention))))
        self.words, self.scores, self.state = words, scores.masked_fill(ended, -torch.inf), state.reorder(rows)

    def retire(self) -> bool:
        """Is any photo left that is not done? Those that are leave the batch once they are half of it."""
        at_best = self.scores.amax(1) / self.longest**self.length_penalty  # no word more costs nothing
        going = at_best > self.best.to_beat(self.photos)
        left = int(going.sum())
        if 0 < left <= len(going) // 2:
            kept = going.nonzero()[:, 0]
            rows = torch.arange(self.scores.numel(), device=kept.device).view_as(self.scores)  # (L, K)
            self.state = self.state.keep(kept, rows[kept].flatten())
            self.photos, self.words, self.scores = self.photos[kept], self.words[kept], self.scores[kept]
        return left > 0

    def _choose(self, log_probabilities: Tensor, beam_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """(L K, V) -> the best continuations: scores, parents, words (L, K'), where K' may be fewer than beam_size."""
        vocabulary = log_probabilities.shape[1]
        candidates = self.scores[:, :, None] + log_probabilities.unflatten(0, self.scores.shape)  # (L, K, V)
        candidates.index_fill_(2, self.forbidden, -torch.inf)
        candidates = candidates.flatten(1)
        scores, places = candidates.topk(min(beam_size, candidates.shape[1]))
        return scores, places // vocabulary, places % vocabulary

    def _rows(self, places: Tensor) -> Tensor:
        """Places in the beams (L, K') -> the decoder's rows (L K',)."""
        first = torch.arange(len(places), device=places.device)[:, None] * self.scores.shape[1]
        return (first + places).flatten()

    def _for_all_photos(self, values: Tensor | None) -> Tensor | None:
        """(L, K, ...) -> (B, K, ...), zero for photos that have left: history is read by photo."""
        total = len(self.best.step)
        if values is None or len(values) == total:
            return values
        return values.new_zeros(total, *values.shape[1:]).index_copy_(0, self.photos, values)


def _unroll(history: list[_Step], best: _Best) -> list[Caption]:
    """Follow the parents back from each photo's best hypothesis."""
    photos, place = torch.arange(len(best.place), device=best.place.device), best.place
    words, attentions = [], []
    for number in reversed(range(len(history))):
        step = history[number]
        words.append(step.words[photos, place])
        if step.attention is not None:
            attentions.append(step.attention[photos, place])
        place = torch.where(number <= best.step, step.parents[photos, place], place)  # before that: not yet on its way
    words = torch.stack(words[::-1], 1).tolist()
    attentions = torch.stack(attentions[::-1], 1).float().cpu() if attentions else [None] * len(words)
    lengths = best.step + (~best.finished).long()  # the last word of a finished hypothesis is <end>
    captions = []
    for row, length, score, finished, attention in zip(
        words, lengths.tolist(), best.log_probability.tolist(), best.finished.tolist(), attentions, strict=True
    ):
        own = None if attention is None else attention[:length].clone()  # a view would keep the whole batch's alive
        captions.append(Caption(row[:length], score, finished, own))
    return captions
