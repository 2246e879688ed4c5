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

from typing import NamedTuple

import torch
from torch import Tensor

from captioning.caption import Caption
from captioning.decoders.protocol import Decoder, State
from captioning.encoders.grid import Grid
from captioning.search.options import SearchOptions
from preprocess.vocabulary import END, PAD, START, UNKNOWN


@torch.no_grad()  # not inference_mode, in which autocast would convert the weights again at every step
def beam_search(decoder: Decoder, grid: Grid, search: SearchOptions) -> list[list[Caption]]:
    """The best captions of each photo of the grid: up to `num_captions` different ones of at most `max_length` words.

    Finished captions come first, those of each group by score. Unfinished ones follow where too few end. The decoder
    should be in eval mode.
    """
    device = grid.cells.device
    beam = _Beam(decoder.init_state(grid), len(grid), device, search)
    interval = sync_interval(device)
    for number in range(search.max_length + 1):  # one step more than words: <end> may follow the last word
        beam.step(decoder)
        if (number + 1) % interval == 0 and not beam.prune_finished():
            break
    captions_of_groups = _build_captions(beam.history, beam.best)
    results = []
    for first in range(0, len(captions_of_groups), search.beam_groups):
        groups = captions_of_groups[first : first + search.beam_groups]
        results.append(deduplicate([caption for group in groups for caption in group]))
    return results


def banned_ids(device: torch.device, allow_unknown: bool = False) -> Tensor:
    """Ids (int64) of words that are never generated: <pad>, <start> and, unless allowed, <unk>."""
    return torch.tensor([PAD, START] if allow_unknown else [PAD, UNKNOWN, START], device=device)


def sync_interval(device: torch.device) -> int:
    """Steps between two checks for finished photos. On a GPU each check is a device synchronisation."""
    return 1 if device.type == "cpu" else 4


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

    def merge(self, groups: Tensor, new: _Hypotheses, keep_mask: Tensor | None = None) -> None:
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


class _BestHypotheses:
    """The best finished hypotheses of each group so far, and unfinished ones as a fallback if too few finish."""

    def __init__(self, groups: int, captions: int, device: torch.device):
        self.finished = _Hypotheses.empty(groups, captions, device)
        self.unfinished = _Hypotheses.empty(groups, captions, device)
        self.unfinished.score[:, 0] = 0.0  # the empty hypothesis
        self.unfinished.log_probability[:, 0] = 0.0
        self.unfinished.last_step.fill_(-1)

    def update(
        self, groups: Tensor, log_probabilities: Tensor, ended: Tensor, step: int, length_penalty: float
    ) -> None:
        """Add the hypotheses of one step: log_probabilities and ended (S, K), all of step + 1 words."""
        log_probabilities = log_probabilities.float()
        last_step = torch.full_like(ended, step, dtype=torch.long)
        position = torch.arange(ended.shape[1], device=groups.device).expand_as(last_step)

        score = log_probabilities.masked_fill(~ended, -torch.inf) / (step + 1) ** length_penalty
        self.finished.merge(groups, _Hypotheses(score, log_probabilities, last_step, position))

        live = log_probabilities.masked_fill(ended, -torch.inf)
        none_live = live.amax(1, keepdim=True) == -torch.inf  # then keep the unfinished ones of the step before
        self.unfinished.merge(groups, _Hypotheses(live, log_probabilities, last_step, position), keep_mask=none_live)


class _Beam:
    """The live hypotheses of a batch, and the history of their words."""

    def __init__(self, state: State, num_photos: int, device: torch.device, search: SearchOptions):
        num_groups = num_photos * search.beam_groups
        self.search = search
        self.photos = torch.arange(num_photos, device=device)  # (L,) photos still searched
        if search.beam_groups > 1:
            state = state.reorder(self.photos.repeat_interleave(search.beam_groups))
        self.state = state
        self.words = torch.full((num_groups, 1), START, device=device)  # (S, K) the last word of each hypothesis
        # (S, K, T) all words of each hypothesis; filled only for no_repeat_ngram
        self.prefixes = torch.empty(num_groups, 1, 0, dtype=torch.long, device=device)
        # (S, K), -inf for a hypothesis that has ended or cannot be continued
        self.log_probabilities = torch.zeros(num_groups, 1, device=device)
        self.banned_ids = banned_ids(device, search.allow_unknown)
        self.best = _BestHypotheses(num_groups, search.num_captions // search.beam_groups, device)
        self.history: list[_BeamStep] = []

    @property
    def groups(self) -> Tensor:
        """(S,) int64, the groups still searched, as indices into the B G of the batch."""
        groups = torch.arange(self.search.beam_groups, device=self.photos.device)
        return (self.photos[:, None] * self.search.beam_groups + groups).flatten()

    def step(self, decoder: Decoder) -> None:
        """Append one word to every hypothesis. The last step drops hypotheses that do not end: they are too long."""
        number = len(self.history)
        next_word, attention, state, _ = decoder.step(self.words.flatten(), self.state)
        log_probabilities, parents, words = self._select(self._continuations(next_word))
        rows = self._decoder_rows(parents)
        if attention is not None:
            attention = attention.index_select(0, rows).unflatten(0, parents.shape)
        ended = words == END
        if number == self.search.max_length:
            log_probabilities = log_probabilities.masked_fill(~ended, -torch.inf)
        self.best.update(self.groups, log_probabilities, ended, number, self.search.length_penalty)
        self.history.append(
            _BeamStep(
                self._scatter_groups(words),
                self._scatter_groups(parents),
                None if attention is None else self._scatter_groups(attention),
            )
        )
        if self.search.no_repeat_ngram:
            prefixes = self.prefixes.gather(1, parents[:, :, None].expand(-1, -1, number))
            self.prefixes = torch.cat([prefixes, words[:, :, None]], 2)
        self.words = words
        self.log_probabilities = log_probabilities.masked_fill(ended, -torch.inf)
        self.state = state.reorder(rows)

    def prune_finished(self) -> bool:
        """Drop finished photos once they are at least half of those searched; return whether any photo remains."""
        length_factor = (self.search.max_length + 1) ** self.search.length_penalty
        upper_bound = self.log_probabilities.amax(1) / length_factor
        unfinished = (upper_bound > self.best.finished.score[self.groups, -1]).view(len(self.photos), -1).any(1)
        remaining = int(unfinished.sum())
        if 0 < remaining <= len(unfinished) // 2:
            self._keep_photos(unfinished.nonzero()[:, 0])
        return remaining > 0

    def _keep_photos(self, keep: Tensor) -> None:
        """Continue with these of the L photos only (int64)."""
        groups = torch.arange(len(self.words), device=keep.device).view(len(self.photos), -1)[keep].flatten()
        rows = torch.arange(self.words.numel(), device=keep.device).view_as(self.words)[groups]  # (S, K)
        self.state = self.state.select(keep, rows.flatten())
        self.photos = self.photos[keep]
        self.words = self.words[groups]
        self.log_probabilities = self.log_probabilities[groups]
        self.prefixes = self.prefixes[groups]

    def _continuations(self, next_word: Tensor) -> Tensor:
        """log p of the next word (S K, V) -> log p of each hypothesis with it appended (S, K, V), -inf if banned."""
        number = len(self.history)
        continuations = self.log_probabilities[:, :, None] + next_word.unflatten(0, self.words.shape)
        continuations.index_fill_(2, self.banned_ids, -torch.inf)
        if number < self.search.min_length:
            continuations[:, :, END] = -torch.inf
        if 0 < self.search.no_repeat_ngram <= number:
            self._ban_repeated_ngrams(continuations)
        return continuations

    def _ban_repeated_ngrams(self, continuations: Tensor) -> None:
        """Set words that would complete an n-gram of the hypothesis again to -inf, in place (S, K, V)."""
        size = self.search.no_repeat_ngram
        ngrams = self.prefixes.unfold(2, size, 1)  # (S, K, T - size + 1, size)
        last_words = self.prefixes[:, :, None, self.prefixes.shape[2] - size + 1 :]  # (S, K, 1, size - 1)
        repeated = (ngrams[..., :-1] == last_words).all(3)
        continuations.scatter_(2, ngrams[..., -1].where(repeated, PAD), -torch.inf)  # PAD is banned anyway

    def _select(self, continuations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(S, K, V) -> log p, parents and words of the best of each group, all (S, K').

        K' is below the full beam where fewer continuations exist.
        """
        groups = self.search.beam_groups
        vocab_size = continuations.shape[2]
        continuations = continuations.unflatten(0, (-1, groups))  # (L, G, K, V)
        size = min(self.search.beam_size // groups, continuations.shape[2] * vocab_size)
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

    def _decoder_rows(self, parents: Tensor) -> Tensor:
        """Indices into the K of each group (S, K') -> rows of the decoder's state (S K',)."""
        first_rows = torch.arange(len(parents), device=parents.device)[:, None] * self.words.shape[1]
        return (first_rows + parents).flatten()

    def _scatter_groups(self, values: Tensor) -> Tensor:
        """(S, K, ...) -> (B G, K, ...), zero for the groups of dropped photos."""
        total = len(self.best.finished.score)
        if len(values) == total:
            return values
        return values.new_zeros(total, *values.shape[1:]).index_copy_(0, self.groups, values)


def _stack_groups(values: list[Tensor]) -> Tensor:
    """Values of each of the G groups (L, K') -> (S, K'), the groups of a photo adjacent."""
    return torch.stack(values, 1).flatten(0, 1)


def _build_captions(history: list[_BeamStep], best: _BestHypotheses) -> list[list[Caption]]:
    """The captions of each of the B G groups: at most N, finished ones first, each by score."""
    merged = (torch.cat(pair, 1) for pair in zip(best.finished, best.unfinished, strict=True))
    hypotheses = _Hypotheses(*merged)  # (B G, 2 N)
    words, attention = _backtrack(history, hypotheses)
    word_ids = words.tolist()
    scores = hypotheses.score.tolist()
    log_probabilities = hypotheses.log_probability.tolist()
    last_steps = hypotheses.last_step.tolist()
    wanted = best.finished.score.shape[1]
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
    """Follow the parents back from each hypothesis -> words (B G, 2 N, T), attention (B G, 2 N, T, P) on the CPU.

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
    attention = torch.stack(attentions[::-1], 2).float().cpu() if attentions else None
    return torch.stack(words[::-1], 2), attention
