"""Beam search over a batch of photos: tensors only, and no knowledge of a decoder but its protocol.

At every step the `beam_size` likeliest continuations of all live hypotheses of a photo are kept. Those that wrote
<end> are finished and leave the beam; the next step fills their places with continuations of the others. The finished
hypotheses of the highest rank win:

    rank(y) = log p(y) / |y|^a        |y| words, <end> among them; a, the length penalty: 0 sum, 1 mean

As log p can only fall, a live hypothesis can at best have its present log p at the greatest length: a photo is done
once that is above its last wanted finished one for none of them, and stopping there changes nothing. A beam as wide as
there are captions is an exhaustive search; a beam of one is greedy. Equal scores are ordered by torch.topk, which sees
only the photo's own scores, so that the other photos of a batch do not matter.

Diverse beam search (Vijayakumar et al. 2018, algorithm 1): the beam is parted into groups, which choose one after the
other. A word that earlier groups wrote at this step loses `diversity` for each hypothesis that did; log p, by which
finished captions are ranked, stays what it is.

Letters: B photos, L of them still searched, G groups, K hypotheses a group, N captions wanted of a group, V vocabulary,
P cells. A slot is a group of a photo: S = L G of them, those of a photo side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captioning.caption import Caption
from captioning.decoders.protocol import Decoder, State
from captioning.encoders.grid import Grid
from captioning.search.options import SearchOptions
from preprocess.vocabulary import END, PAD, START, UNKNOWN


@torch.no_grad()  # not inference_mode: autocast would round the weights anew at every step
def beam_search(decoder: Decoder, grid: Grid, search: SearchOptions) -> list[list[Caption]]:
    """The best captions of each photo of the grid, in its order, of at most `max_length` words.

    `captions` of each, all different, the finished ones first, each group's by rank; fewer where there are no more
    that end. One more step than words, so that a caption of `max_length` words can end. The decoder should be in eval
    mode.
    """
    device = grid.cells.device
    beam = _Beam(decoder.init_state(grid), len(grid), device, search)
    every = sync_interval(device)
    for number in range(search.max_length + 1):
        beam.advance(decoder)
        if (number + 1) % every == 0 and not beam.retire():
            break
    slots = _unroll(beam.history, beam.best)
    return [
        _different([caption for slot in slots[first : first + search.beam_groups] for caption in slot])
        for first in range(0, len(slots), search.beam_groups)
    ]


def banned_ids(device: torch.device, allow_unknown: bool = False) -> Tensor:
    """Words that are never written, int64."""
    return torch.tensor([PAD, START] if allow_unknown else [PAD, UNKNOWN, START], device=device)


def sync_interval(device: torch.device) -> int:
    """Steps from one look for photos that are done to the next: each look waits until a GPU has done all its work."""
    return 1 if device.type == "cpu" else 4


class _Step(NamedTuple):
    """Hypothesis k of slot s wrote words[s, k] while it looked at attention[s, k]; parents[s, k] wrote before it."""

    words: Tensor  # (B G, K) int64
    parents: Tensor  # (B G, K) int64, into the K of the step before
    attention: Tensor | None  # (B G, K, P)


class _Found(NamedTuple):
    """Hypotheses of each slot, the best first; what is not there has the rank -inf. All tensors (B G, N)."""

    rank: Tensor  # float32
    log_probability: Tensor  # float32
    step: Tensor  # int64: at which it wrote its last word ...
    place: Tensor  # int64: ... and its place in the beam there

    @classmethod
    def nothing(cls, slots: int, captions: int, device: torch.device) -> _Found:
        none = torch.full((slots, captions), -torch.inf, device=device)
        zero = torch.zeros(slots, captions, dtype=torch.long, device=device)
        return cls(none, none.clone(), zero, zero.clone())

    def best(self, slots: Tensor, new: _Found, and_old: Tensor | None = None) -> None:
        """The best of the new ones (S, K) and the old ones; a new one must exceed an old one to come before it.

        and_old (S, 1) bool: where the old ones count; everywhere unless given.
        """
        old_rank = self.rank[slots] if and_old is None else self.rank[slots].where(and_old, -torch.inf)
        rank, order = torch.cat([old_rank, new.rank], 1).sort(dim=1, descending=True, stable=True)
        wanted = self.rank.shape[1]
        self.rank[slots] = rank[:, :wanted]
        for old, more in zip(self[1:], new[1:], strict=True):
            old[slots] = torch.cat([old[slots], more], 1).gather(1, order[:, :wanted])


class _Best:
    """The best finished hypotheses of each slot so far; and unfinished ones, which stand in where there are too few."""

    def __init__(self, slots: int, captions: int, device: torch.device):
        self.finished = _Found.nothing(slots, captions, device)
        self.unfinished = _Found.nothing(slots, captions, device)
        self.unfinished.rank[:, 0] = self.unfinished.log_probability[:, 0] = 0.0  # the one without words
        self.unfinished.step.fill_(-1)

    def update(self, slots: Tensor, scores: Tensor, ended: Tensor, step: int, length_penalty: float) -> None:
        """scores, ended (S, K), all of step + 1 words."""
        scores = scores.float()
        rank = scores.masked_fill(~ended, -torch.inf) / (step + 1) ** length_penalty
        steps = torch.full_like(ended, step, dtype=torch.long)
        places = torch.arange(ended.shape[1], device=slots.device).expand_as(steps)
        self.finished.best(slots, _Found(rank, scores, steps, places))
        live = scores.masked_fill(ended, -torch.inf)
        none_lives = live.amax(1, keepdim=True) == -torch.inf  # then those before it still stand in
        self.unfinished.best(slots, _Found(live, scores, steps, places), and_old=none_lives)


class _Beam:
    """The hypotheses of a batch on their way."""

    def __init__(self, state: State, photos: int, device: torch.device, search: SearchOptions):
        self.search = search
        self.photos = torch.arange(photos, device=device)  # (L,) those still searched
        self.state = (
            state.reorder(self.photos.repeat_interleave(search.beam_groups)) if search.beam_groups > 1 else state
        )
        slots = photos * search.beam_groups
        self.words = torch.full((slots, 1), START, device=device)  # (S, K) just written
        self.written = torch.empty(slots, 1, 0, dtype=torch.long, device=device)  # (S, K, T): only with no_repeat
        self.scores = torch.zeros(slots, 1, device=device)  # (S, K) log-probabilities; -inf: ended, or impossible
        self.forbidden = banned_ids(device, search.allow_unknown)
        self.best = _Best(slots, search.num_captions // search.beam_groups, device)
        self.history: list[_Step] = []

    @property
    def slots(self) -> Tensor:
        """(S,) of those still searched, among the B G of all."""
        groups = torch.arange(self.search.beam_groups, device=self.photos.device)
        return (self.photos[:, None] * self.search.beam_groups + groups).flatten()

    def advance(self, decoder: Decoder) -> None:
        """Every hypothesis writes a word; at the last step what does not end is too long, and dropped."""
        log_probabilities, attention, state, _ = decoder.step(self.words.flatten(), self.state)
        number = len(self.history)
        scores, parents, words = self._choose(self._continuations(log_probabilities))
        rows = self._rows(parents)
        if attention is not None:
            attention = attention.index_select(0, rows).unflatten(0, parents.shape)
        ended = words == END
        if number == self.search.max_length:
            scores = scores.masked_fill(~ended, -torch.inf)
        self.best.update(self.slots, scores, ended, number, self.search.length_penalty)
        self.history.append(_Step(*(self._for_all_slots(values) for values in (words, parents, attention))))
        if self.search.no_repeat_ngram:
            before = self.written.gather(1, parents[:, :, None].expand(-1, -1, number))
            self.written = torch.cat([before, words[:, :, None]], 2)
        self.words, self.scores, self.state = words, scores.masked_fill(ended, -torch.inf), state.reorder(rows)

    def retire(self) -> bool:
        """Is any photo left that is not done? Those that are leave the batch once they are half of it."""
        at_best = self.scores.amax(1) / (self.search.max_length + 1) ** self.search.length_penalty  # no word costs less
        going = (at_best > self.best.finished.rank[self.slots, -1]).view(len(self.photos), -1).any(1)
        left = int(going.sum())
        if 0 < left <= len(going) // 2:
            kept = going.nonzero()[:, 0]
            slots = torch.arange(len(self.words), device=kept.device).view(len(going), -1)[kept].flatten()
            rows = torch.arange(self.scores.numel(), device=kept.device).view_as(self.scores)[slots]  # (S, K)
            self.state = self.state.select(kept, rows.flatten())
            self.photos, self.words, self.scores = self.photos[kept], self.words[slots], self.scores[slots]
            self.written = self.written[slots]
        return left > 0

    def _continuations(self, log_probabilities: Tensor) -> Tensor:
        """The decoder's (S K, V) -> the scores of all hypotheses with one word more (S, K, V); -inf: not allowed."""
        number, size = len(self.history), self.search.no_repeat_ngram
        scores = self.scores[:, :, None] + log_probabilities.unflatten(0, self.scores.shape)
        scores.index_fill_(2, self.forbidden, -torch.inf)
        if number < self.search.min_length:
            scores[:, :, END] = -torch.inf
        if 0 < size <= number:
            runs = self.written.unfold(2, size, 1)  # (S, K, number - size + 1, size): all of so many words
            again = (runs[..., :-1] == self.written[:, :, None, number - size + 1 :]).all(3)  # begin as the last ones
            scores.scatter_(2, runs[..., -1].where(again, PAD), -torch.inf)  # PAD is forbidden anyway
        return scores

    def _choose(self, continuations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(S, K, V) -> the best of them: scores, parents, words (S, K'), where K' may be fewer than a beam."""
        groups, vocabulary = self.search.beam_groups, continuations.shape[2]
        continuations = continuations.unflatten(0, (-1, groups))  # (L, G, K, V)
        size = min(self.search.beam_size // groups, continuations.shape[2] * vocabulary)
        losses = continuations.new_zeros(len(continuations), 1, vocabulary)  # of the words of the groups before
        chosen = []
        for group in continuations.unbind(1):
            places = (group - losses if chosen else group).flatten(1).topk(size)[1]  # (L, K')
            scores, parents, words = group.flatten(1).gather(1, places), places // vocabulary, places % vocabulary
            losses.scatter_add_(
                2, words[:, None], self.search.diversity_penalty * (scores > -torch.inf)[:, None].to(losses)
            )
            chosen.append((scores, parents, words))
        return tuple(torch.stack(parts, 1).flatten(0, 1) for parts in zip(*chosen, strict=True))

    def _rows(self, places: Tensor) -> Tensor:
        """Places in the beams (S, K') -> the decoder's rows (S K',)."""
        first = torch.arange(len(places), device=places.device)[:, None] * self.scores.shape[1]
        return (first + places).flatten()

    def _for_all_slots(self, values: Tensor | None) -> Tensor | None:
        """(S, K, ...) -> (B G, K, ...), zero for photos that have left: history is read by slot."""
        total = len(self.best.finished.rank)
        if values is None or len(values) == total:
            return values
        return values.new_zeros(total, *values.shape[1:]).index_copy_(0, self.slots, values)


def _unroll(history: list[_Step], best: _Best) -> list[list[Caption]]:
    """Follow the parents back from each slot's best hypotheses, the finished ones and then the others."""
    found = _Found(*(torch.cat(both, 1) for both in zip(best.finished, best.unfinished, strict=True)))  # (B G, 2 N)
    slots, place = torch.arange(len(found.place), device=found.place.device)[:, None], found.place
    words, attentions = [], []
    for number in reversed(range(len(history))):
        step = history[number]
        words.append(step.words[slots, place])
        if step.attention is not None:
            attentions.append(step.attention[slots, place])
        place = torch.where(number <= found.step, step.parents[slots, place], place)  # before: not yet on its way
    words = torch.stack(words[::-1], 2).tolist()  # (B G, 2 N, steps)
    attentions = torch.stack(attentions[::-1], 2).float().cpu() if attentions else None
    captions: list[list[Caption]] = []
    for slot, (ranks, scores, steps) in enumerate(zip(*(values.tolist() for values in found[:3]), strict=True)):
        wanted, captions_of_slot = len(ranks) // 2, []
        for i in [i for i, rank in enumerate(ranks) if rank > -torch.inf][:wanted]:
            length = steps[i] + (i >= wanted)  # the last word of a finished hypothesis is <end>
            # a view would keep the whole batch's alive
            own = None if attentions is None else attentions[slot, i, :length].clone()
            captions_of_slot.append(Caption(words[slot][i][:length], scores[i], i < wanted, own))
        captions.append(captions_of_slot)
    return captions


def _different(captions: list[Caption]) -> list[Caption]:
    """Each once: groups may find the same, and what did not end may have the words of one that did."""
    different: dict[tuple[int, ...], Caption] = {}
    for caption in captions:
        different.setdefault(tuple(caption.words), caption)
    return list(different.values())
