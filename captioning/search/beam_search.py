"""Beam search over a batch of photos, for any decoder of `captioning.decoders.protocol`.

At every step the `beam_size` most probable continuations of all live hypotheses of a photo are kept. Those that end
with <end> are finished and leave the beam; the next step refills it with continuations of the live ones. The finished
hypotheses with the highest score win:

    score(y) = log p(y) / |y|^a        |y| words, including <end>; a, the length penalty: 0 is the sum, 1 the mean

log p never increases, so log p / (max_length + 1)^a is an upper bound on the score a live hypothesis can reach. A photo
is done when no live hypothesis can exceed the last of its wanted finished ones; stopping there does not change the
result. A beam as wide as the number of possible captions is an exhaustive search; a beam of one is greedy decoding.
torch.topk breaks ties from the scores of one photo only, so the other photos of a batch do not affect a result.

Diverse beam search (Vijayakumar et al. 2018, https://arxiv.org/abs/1610.02424, algorithm 1): the beam is divided into
groups, which choose one after the other. A word loses `diversity_penalty` for each hypothesis of an earlier group that
chose it at this step. The penalty affects only the choice: finished captions are ranked by their unpenalised score.

Letters: B photos, L photos still searched, G groups per photo, S = L G groups still searched (those of a photo are
adjacent), K hypotheses per group, N wanted captions per group, V vocabulary size, P cells, T steps.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from captioning.caption import Caption
from captioning.decoders.protocol import Decoder, State
from captioning.encoders.grid import Grid
from captioning.search.end_check import EndCheck, copy_to_cpu, sync_interval
from captioning.search.graphs import DecodingGraphs
from captioning.search.options import SearchOptions
from preprocess.vocabulary import END, PAD, START, UNKNOWN


@torch.no_grad()  # not inference_mode, in which autocast would convert the weights again at every step
def beam_search(
    decoder: Decoder, grid: Grid, search: SearchOptions, graphs: DecodingGraphs | None = None
) -> list[list[Caption]]:
    """The best captions of each photo of the grid: up to `num_captions` different ones of at most `max_length` words.

    Finished captions come first, those of each group by score. Unfinished ones follow where too few end. The decoder
    should be in eval mode. graphs: run the steps as CUDA graphs.
    """
    searcher = _BeamSearch(decoder, search, grid.cells.device)
    beams = searcher.start(grid)
    if graphs is None:
        history, beams = searcher.run(beams)
    else:
        beams, first_step = searcher.step(beams, 0)  # of one hypothesis per group, all other steps of K
        if beams.words.shape[1] == searcher.size:
            history, beams = graphs.run(searcher, beams, 1, len(grid))
        else:  # fewer words than K: the beam grows further
            history, beams = searcher.run(beams, 1)
        history = [first_step, *history]
    captions_of_groups = _build_captions(history, beams)
    results = []
    for first in range(0, len(captions_of_groups), search.beam_groups):
        groups = captions_of_groups[first : first + search.beam_groups]
        results.append(deduplicate([caption for group in groups for caption in group]))
    return results


@cache  # making a tensor of a list waits for the device
def banned_ids(device: torch.device, allow_unknown: bool = False) -> Tensor:
    """Ids (int64) of words that are never generated: <pad>, <start> and, unless allowed, <unk>. Do not modify it."""
    with torch.inference_mode(False):  # the first call may come from inference mode
        return torch.tensor([PAD, START] if allow_unknown else [PAD, UNKNOWN, START], device=device)


def deduplicate(captions: list[Caption]) -> list[Caption]:
    """Keep the first of captions with the same words.

    Two groups may find the same caption, and an unfinished one may have the words of a finished one.
    """
    unique: dict[tuple[int, ...], Caption] = {}
    for caption in captions:
        unique.setdefault(tuple(caption.words), caption)
    return list(unique.values())


class _BeamStep(NamedTuple):
    """One step of all groups: hypothesis k of group g appended words[g, k] to hypothesis parents[g, k]."""

    words: Tensor  # (B G, K) int64
    parents: Tensor  # (B G, K) int64, index into the K of the step before
    attention: Tensor | None  # (B G, K, P), with which each word was chosen


class _Hypotheses(NamedTuple):
    """Hypotheses of each group, best first. Unused entries have the score -inf."""

    score: Tensor  # (B G, N) float32
    log_probability: Tensor  # (B G, N) float32
    last_step: Tensor  # (B G, N) int64, the step of the last word; -1 for the empty hypothesis
    position: Tensor  # (B G, N) int64, index into the K of that step

    @classmethod
    def empty(cls, groups: int, captions: int, device: torch.device) -> _Hypotheses:
        """Only unused entries."""
        score = torch.full((groups, captions), -torch.inf, device=device)
        zero = torch.zeros(groups, captions, dtype=torch.long, device=device)
        return cls(score, score.clone(), zero, zero.clone())

    def merge(self, groups: Tensor | slice, new: _Hypotheses, keep_mask: Tensor | None = None) -> None:
        """Keep the N best of the present and the `new` (S, K) hypotheses of these groups, in place.

        At equal score a present hypothesis comes first. keep_mask (S, 1) bool: groups whose present hypotheses count;
        in the other groups they are dropped. None keeps all.
        """
        present_score = self.score[groups]
        if keep_mask is not None:
            present_score = present_score.where(keep_mask, -torch.inf)
        score, order = torch.cat([present_score, new.score], 1).sort(dim=1, descending=True, stable=True)
        wanted = self.score.shape[1]
        self.score[groups] = score[:, :wanted]
        for present, added in zip(self[1:], new[1:], strict=True):
            present[groups] = torch.cat([present[groups], added], 1).gather(1, order[:, :wanted])


class _Beams(NamedTuple):
    """The live hypotheses of the photos still searched, and the best hypotheses of all photos so far."""

    state: State
    words: Tensor  # (S, K) int64, the last word of each hypothesis
    prefixes: Tensor  # (S, K, T) int64, all words of each hypothesis, with no_repeat_ngram; T is the most, 0 without
    log_probabilities: Tensor  # (S, K) float32, -inf for a hypothesis that has ended or cannot be continued
    finished: _Hypotheses
    unfinished: _Hypotheses  # a fallback if too few finish

    def update_best(
        self, groups: Tensor | slice, log_probabilities: Tensor, ended: Tensor, step: int, length_penalty: float
    ) -> None:
        """Add the hypotheses of one step, in place: log_probabilities and ended (S, K), all of step + 1 words."""
        log_probabilities = log_probabilities.float()
        last_step = torch.full_like(ended, step, dtype=torch.long)
        position = torch.arange(ended.shape[1], device=ended.device).expand_as(last_step)

        score = log_probabilities.masked_fill(~ended, -torch.inf) / (step + 1) ** length_penalty
        self.finished.merge(groups, _Hypotheses(score, log_probabilities, last_step, position))

        live = log_probabilities.masked_fill(ended, -torch.inf)
        none_live = live.amax(1, keepdim=True) == -torch.inf  # then keep the unfinished ones of the step before
        self.unfinished.merge(groups, _Hypotheses(live, log_probabilities, last_step, position), keep_mask=none_live)


class _BeamSearch:
    """The steps of beam search. Between them, photos may leave the search."""

    def __init__(self, decoder: Decoder, search: SearchOptions, device: torch.device):
        self.decoder = decoder
        self.search = search
        self.key: Hashable = (decoder, search)
        self.num_steps = search.max_length + 1  # one step more than words: <end> may follow the last word
        self.size = search.beam_size // search.beam_groups  # K
        self.banned_ids = banned_ids(device, search.allow_unknown)
        self.photos: Tensor | None = None  # (L,) int64, those still searched; None: all

    def start(self, grid: Grid) -> _Beams:
        """The empty hypothesis of each group."""
        search = self.search
        device = grid.cells.device
        num_groups = len(grid) * search.beam_groups
        captions = search.num_captions // search.beam_groups
        state = self.decoder.init_state(grid)
        if search.beam_groups > 1:
            state = state.reorder(torch.arange(len(grid), device=device).repeat_interleave(search.beam_groups))
        unfinished = _Hypotheses.empty(num_groups, captions, device)
        unfinished.score[:, 0] = 0.0  # the empty hypothesis
        unfinished.log_probability[:, 0] = 0.0
        unfinished.last_step.fill_(-1)
        most_words = self.num_steps if search.no_repeat_ngram else 0
        return _Beams(
            state,
            words=torch.full((num_groups, 1), START, device=device),
            prefixes=torch.zeros(num_groups, 1, most_words, dtype=torch.long, device=device),
            log_probabilities=torch.zeros(num_groups, 1, device=device),
            finished=_Hypotheses.empty(num_groups, captions, device),
            unfinished=unfinished,
        )

    def run(self, beams: _Beams, first: int = 0) -> tuple[list[_BeamStep], _Beams]:
        """Run the steps from number `first` on; photos leave the search once half of those searched are finished."""
        check = EndCheck(beams.words.device)
        interval = sync_interval(beams.words.device)
        history = []
        for number in range(first, self.num_steps):
            beams, step = self.step(beams, number)
            history.append(step)
            known = check(self.unfinished(beams)) if (number + 1) % interval == 0 else None
            if known is None:
                continue
            if known.number == 0:
                break
            if known.number <= len(known.mask) // 2:
                photos = known.indices()
                check.keep(photos)
                beams = self._keep_photos(beams, photos)
        return history, beams

    def step(self, beams: _Beams, number: int) -> tuple[_Beams, _BeamStep]:
        """Append one word to every hypothesis. The last step drops hypotheses that do not end: they are too long."""
        next_word, attention, state, _ = self.decoder.step(beams.words.flatten(), beams.state)
        log_probabilities, parents, words = self._select(self._continuations(beams, next_word, number))
        rows = _decoder_rows(parents, beams.words.shape[1])
        if attention is not None:
            attention = attention.index_select(0, rows).unflatten(0, parents.shape)
        ended = words == END
        if number == self.search.max_length:
            log_probabilities = log_probabilities.masked_fill(~ended, -torch.inf)
        groups = self._groups()
        beams.update_best(groups, log_probabilities, ended, number, self.search.length_penalty)
        total = len(beams.finished.score)
        step = _BeamStep(
            _scatter_groups(words, groups, total),
            _scatter_groups(parents, groups, total),
            None if attention is None else _scatter_groups(attention, groups, total),
        )
        prefixes = beams.prefixes.gather(1, parents[:, :, None].expand(-1, -1, beams.prefixes.shape[2]))
        if self.search.no_repeat_ngram:
            prefixes[:, :, number] = words
        live = log_probabilities.masked_fill(ended, -torch.inf)
        return beams._replace(state=state.reorder(rows), words=words, prefixes=prefixes, log_probabilities=live), step

    def unfinished(self, beams: _Beams) -> Tensor:
        """(L,) bool: photos with a live hypothesis that can still exceed the last of their wanted finished ones."""
        length_factor = (self.search.max_length + 1) ** self.search.length_penalty
        upper_bound = beams.log_probabilities.amax(1) / length_factor
        exceeds = upper_bound > beams.finished.score[self._groups(), -1]
        return exceeds.view(-1, self.search.beam_groups).any(1)

    def _groups(self) -> Tensor | slice:
        """(S,) int64, the groups still searched, as indices into the B G of the batch."""
        if self.photos is None:
            return slice(None)
        groups = torch.arange(self.search.beam_groups, device=self.photos.device)
        return (self.photos[:, None] * self.search.beam_groups + groups).flatten()

    def _keep_photos(self, beams: _Beams, keep: Tensor) -> _Beams:
        """Continue with these of the L photos only (int64)."""
        groups = torch.arange(len(beams.words), device=keep.device).view(-1, self.search.beam_groups)[keep].flatten()
        rows = torch.arange(beams.words.numel(), device=keep.device).view_as(beams.words)[groups]  # (S, K)
        self.photos = keep if self.photos is None else self.photos[keep]
        return beams._replace(
            state=beams.state.select(keep, rows.flatten()),
            words=beams.words[groups],
            prefixes=beams.prefixes[groups],
            log_probabilities=beams.log_probabilities[groups],
        )

    def _continuations(self, beams: _Beams, next_word: Tensor, number: int) -> Tensor:
        """log p of the next word (S K, V) -> log p of each hypothesis with it appended (S, K, V), -inf if banned."""
        continuations = beams.log_probabilities[:, :, None] + next_word.unflatten(0, beams.words.shape)
        continuations.index_fill_(2, self.banned_ids, -torch.inf)
        if number < self.search.min_length:
            continuations[:, :, END] = -torch.inf
        if 0 < self.search.no_repeat_ngram <= number:
            self._ban_repeated_ngrams(continuations, beams.prefixes[:, :, :number])
        return continuations

    def _ban_repeated_ngrams(self, continuations: Tensor, prefixes: Tensor) -> None:
        """Set words that would complete an n-gram of the hypothesis again to -inf, in place (S, K, V)."""
        size = self.search.no_repeat_ngram
        ngrams = prefixes.unfold(2, size, 1)  # (S, K, T - size + 1, size)
        last_words = prefixes[:, :, None, prefixes.shape[2] - size + 1 :]  # (S, K, 1, size - 1)
        repeated = (ngrams[..., :-1] == last_words).all(3)
        continuations.scatter_(2, ngrams[..., -1].where(repeated, PAD), -torch.inf)  # PAD is banned anyway

    def _select(self, continuations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(S, K, V) -> log p, parents and words of the best of each group, all (S, K').

        K' is below the full beam where fewer continuations exist.
        """
        vocab_size = continuations.shape[2]
        continuations = continuations.unflatten(0, (-1, self.search.beam_groups))  # (L, G, K, V)
        size = min(self.size, continuations.shape[2] * vocab_size)
        penalties = continuations.new_zeros(len(continuations), 1, vocab_size)  # of words that earlier groups chose
        best: list[Tensor] = []  # of each group (L, K')
        parents: list[Tensor] = []
        words: list[Tensor] = []
        for group in continuations.unbind(1):
            penalised = group - penalties if best else group
            indices = penalised.flatten(1).topk(size)[1]  # (L, K'), into the K V continuations
            best.append(group.flatten(1).gather(1, indices))
            parents.append(indices // vocab_size)
            words.append(indices % vocab_size)
            penalty = self.search.diversity_penalty * (best[-1] > -torch.inf)[:, None].to(penalties)
            penalties.scatter_add_(2, words[-1][:, None], penalty)
        return _stack_groups(best), _stack_groups(parents), _stack_groups(words)


def _decoder_rows(parents: Tensor, hypotheses: int) -> Tensor:
    """Indices into the K hypotheses of each group (S, K') -> rows of the decoder's state (S K',)."""
    first_rows = torch.arange(len(parents), device=parents.device)[:, None] * hypotheses
    return (first_rows + parents).flatten()


def _scatter_groups(values: Tensor, groups: Tensor | slice, total: int) -> Tensor:
    """(S, K, ...) of these groups -> (B G, K, ...), zero for the groups of dropped photos."""
    if isinstance(groups, slice):
        return values
    return values.new_zeros(total, *values.shape[1:]).index_copy_(0, groups, values)


def _stack_groups(values: list[Tensor]) -> Tensor:
    """Values of each of the G groups (L, K') -> (S, K'), the groups of a photo adjacent."""
    return torch.stack(values, 1).flatten(0, 1)


def _build_captions(history: list[_BeamStep], beams: _Beams) -> list[list[Caption]]:
    """The captions of each of the B G groups: at most N, finished ones first, each by score."""
    merged = (torch.cat(pair, 1) for pair in zip(beams.finished, beams.unfinished, strict=True))
    hypotheses = _Hypotheses(*merged)  # (B G, 2 N)
    words, attention = _backtrack(history, hypotheses)
    *copies, attention = copy_to_cpu(words, *hypotheses[:3], attention)
    word_ids, scores, log_probabilities, last_steps = (copy.tolist() for copy in copies if copy is not None)
    wanted = beams.finished.score.shape[1]
    captions_of_groups = []
    for group in range(len(word_ids)):
        existing = [i for i, score in enumerate(scores[group]) if score > -torch.inf]
        captions = []
        for i in existing[:wanted]:
            finished = i < wanted
            length = last_steps[group][i] + (not finished)  # the last word of a finished hypothesis is <end>
            # clone: a view would keep the attention of the whole batch in memory
            own_attention = None if attention is None else attention[group, i, :length].clone()
            caption_words = word_ids[group][i][:length]
            captions.append(Caption(caption_words, log_probabilities[group][i], finished, own_attention))
        captions_of_groups.append(captions)
    return captions_of_groups


def _backtrack(history: list[_BeamStep], hypotheses: _Hypotheses) -> tuple[Tensor, Tensor | None]:
    """Follow the parents back from each hypothesis -> words (B G, 2 N, T), attention (B G, 2 N, T, P).

    Entries after the last word of a hypothesis are arbitrary.
    """
    groups = torch.arange(len(hypotheses.position), device=hypotheses.position.device)[:, None]
    position = hypotheses.position
    words = []
    attentions = []
    for number in reversed(range(len(history))):
        step = history[number]
        words.append(step.words[groups, position])
        if step.attention is not None:
            attentions.append(step.attention[groups, position])
        # a hypothesis that ended before this step keeps its position
        position = torch.where(number <= hypotheses.last_step, step.parents[groups, position], position)
    attention = torch.stack(attentions[::-1], 2).float() if attentions else None
    return torch.stack(words[::-1], 2), attention
