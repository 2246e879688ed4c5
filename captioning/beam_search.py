"""Beam search over a batch of photos: tensors only, and no knowledge of a decoder but its protocol.

At every step the `beam_size` likeliest continuations of all live hypotheses of a photo are kept; those that end in
<end> are finished and leave the beam, the others live on. The likeliest finished hypothesis wins, by the sum of its
words' log-probabilities. Log-probabilities only fall, so a photo is done once no live hypothesis is above its best
finished one; and with a beam as wide as there are captions, the search is exhaustive. Greedy is a beam of one.

Letters: B photos, L of them still searched, K live hypotheses a photo, V vocabulary, P cells, T steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captioning.decoders.protocol import Decoder
from captioning.grid import Grid
from preprocess.vocabulary import END, PAD, START, UNKNOWN

FORBIDDEN = [PAD, UNKNOWN, START]  # never written
LOOK_EVERY = 4  # steps: each look whether all photos are done waits for a GPU


@dataclass
class Caption:
    words: list[int]  # without <start> and <end>
    log_probability: float  # natural, summed over the words, <end> included where it was written
    finished: bool  # False: nothing ended within max_length; this is the likeliest unfinished one
    attention: Tensor | None  # (len(words), P) float32 on the CPU, a row a word; None where the decoder has none


@dataclass
class _Step:
    """One step of all photos: hypothesis k of photo b wrote words[b, k], going on from parents[b, k]."""

    words: Tensor  # (B, K) int64
    parents: Tensor  # (B, K) int64, into the K of the step before
    attention: Tensor | None  # (B, K of the step before, P)


@torch.inference_mode()
def beam_search(decoder: Decoder, grid: Grid, beam_size: int, max_length: int) -> list[Caption]:
    """The likeliest caption of each photo, in the grid's order, of at most `max_length` words."""
    state = decoder.begin(grid)
    photos, device = len(grid), grid.cells.device
    live = torch.arange(photos, device=device)  # (L,) which photos these rows are of
    scores = torch.zeros(photos, 1, device=device)  # (L, K) of the live hypotheses; -inf: not live
    words = torch.full((photos,), START, device=device)  # (L K,)
    best = _Best.none(photos, device)
    steps: list[_Step] = []
    for number in range(max_length + 1):  # the last step can only end
        step = decoder.step(words, state)
        width, vocabulary = scores.shape[1], step.log_probabilities.shape[1]
        log_probabilities = step.log_probabilities.view(len(live), width, vocabulary)
        log_probabilities[:, :, FORBIDDEN] = -torch.inf
        if number == max_length:
            ends = scores + log_probabilities[:, :, END]
            scores, parents = ends.max(1, keepdim=True)
            chosen = torch.full_like(parents, END)
        else:
            candidates = (scores[:, :, None] + log_probabilities).flatten(1)  # (L, K V)
            scores, places = candidates.topk(min(beam_size, candidates.shape[1]))
            parents, chosen = places // vocabulary, places % vocabulary
        steps.append(_in_full(photos, live, chosen, parents, step.attention))
        ended = chosen == END
        best.take(live, scores.masked_fill(~ended, -torch.inf), number)
        if number == max_length:
            break
        unfinished = scores.masked_fill(ended, -torch.inf)
        best.fall_back(live, unfinished, number)
        scores, words = unfinished, chosen.flatten()
        rows = (parents + torch.arange(len(live), device=device)[:, None] * width).flatten()
        state = step.state.reorder(rows)
        if device.type == "cpu" or number % LOOK_EVERY == LOOK_EVERY - 1:
            going = scores.max(1).values > best.score[live]
            left = int(going.sum())
            if left == 0:
                break
            if left <= len(live) // 2:  # those that are done leave the batch
                kept = going.nonzero()[:, 0]
                rows = (kept[:, None] * scores.shape[1] + torch.arange(scores.shape[1], device=device)).flatten()
                state, live, scores, words = state.keep(kept, rows), live[kept], scores[kept], words[rows]
    return _unroll(steps, best)


@dataclass
class _Best:
    """The best hypothesis of each photo so far (B,): its score, and the step and place where it wrote its last word."""

    score: Tensor  # of the best finished one; -inf where there is none
    step: Tensor
    place: Tensor
    finished: Tensor
    unfinished_score: Tensor

    @classmethod
    def none(cls, photos: int, device: torch.device) -> _Best:
        minus = torch.full((photos,), -torch.inf, device=device)
        zeros = torch.zeros(photos, dtype=torch.long, device=device)
        return cls(minus, zeros, zeros.clone(), zeros.bool(), minus.clone())

    def take(self, live: Tensor, scores: Tensor, number: int) -> None:
        """Finished hypotheses (L, K), -inf for others: the best replaces a worse one."""
        score, place = scores.max(1)
        better = score > self.score[live]
        self.score[live] = torch.where(better, score, self.score[live])
        self.step[live] = torch.where(better, number, self.step[live])
        self.place[live] = torch.where(better, place, self.place[live])
        self.finished[live] |= better

    def fall_back(self, live: Tensor, scores: Tensor, number: int) -> None:
        """Live hypotheses (L, K): the best of the last step stands in where nothing has finished."""
        score, place = scores.max(1)
        none_yet = ~self.finished[live] & (score > -torch.inf)
        self.unfinished_score[live] = torch.where(none_yet, score, self.unfinished_score[live])
        self.step[live] = torch.where(none_yet, number, self.step[live])
        self.place[live] = torch.where(none_yet, place, self.place[live])


def _in_full(photos: int, live: Tensor, words: Tensor, parents: Tensor, attention: Tensor | None) -> _Step:
    """The step with a row for every photo, those that are done included."""
    if attention is not None:
        attention = attention.view(len(live), -1, attention.shape[1])
    if len(live) == photos:
        return _Step(words, parents, attention)
    spread = [
        None if tensor is None else tensor.new_zeros(photos, *tensor.shape[1:]).index_copy_(0, live, tensor)
        for tensor in (words, parents, attention)
    ]
    return _Step(*spread)


def _unroll(steps: list[_Step], best: _Best) -> list[Caption]:
    """Follow the parents back from each photo's best hypothesis."""
    photos, place = torch.arange(len(best.step), device=best.step.device), best.place
    words, attentions = [], []
    for number in range(len(steps) - 1, -1, -1):
        step = steps[number]
        here = number <= best.step  # earlier than the end of this photo's caption
        at = torch.where(here, place, 0)
        words.append(torch.where(here, step.words[photos, at], PAD))
        parent = step.parents[photos, at]
        if step.attention is not None:
            attentions.append(step.attention[photos, parent])
        place = torch.where(here, parent, place)
    words = torch.stack(words[::-1], 1).cpu()
    attentions = torch.stack(attentions[::-1], 1).float().cpu() if attentions else [None] * len(words)
    scores = torch.where(best.finished, best.score, best.unfinished_score).tolist()
    captions = []
    for row, score, finished, end, attention in zip(
        words.tolist(), scores, best.finished.tolist(), best.step.tolist(), attentions, strict=True
    ):
        length = end if finished else end + 1  # the last word of a finished one is <end>
        captions.append(Caption(row[:length], score, finished, None if attention is None else attention[:length]))
    return captions
