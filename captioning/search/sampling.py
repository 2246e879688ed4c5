"""Sampling from a decoder: whole captions, and the input words of scheduled sampling.

Letters: B photos, R captions, W words of all captions packed, K captions per photo, T steps, V vocabulary size,
P cells.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from captioning.caption import Caption
from captioning.decoders.protocol import (
    Decoder,
    DecoderOutput,
    State,
    attention_sum,
    concat_samples,
    sample_categorical,
)
from captioning.encoders.grid import Grid
from captioning.search.beam_search import banned_ids
from captioning.search.end_check import EndCheck, copy_to_cpu, sync_interval
from captioning.search.graphs import DecodingGraphs
from captioning.search.options import SearchOptions
from preprocess.vocabulary import END, PAD, START


@torch.no_grad()
def sample(
    decoder: Decoder,
    grid: Grid,
    num_samples: int,
    max_length: int,
    greedy_first: bool = False,
    graphs: DecodingGraphs | None = None,
) -> Tensor:
    """Sample captions word by word -> (B, K, T) int64: at most `max_length` words, <end> if it ended, then <pad>.

    K is num_samples. greedy_first adds the greedy caption of each photo as its first, so that K is num_samples + 1.
    T is at most max_length + 1. graphs: run the steps as CUDA graphs.
    """
    captions = num_samples + greedy_first

    def choose(log_probabilities: Tensor) -> Tensor:
        words = sample_categorical(log_probabilities.exp())
        if greedy_first:
            words[::captions] = log_probabilities[::captions].argmax(1)
        return words

    sampler = _Sampler(decoder, captions, max_length, choose, key=greedy_first)
    steps = sampler.decode(grid, graphs)
    return torch.stack([step.words for step in steps], 1).view(len(grid), captions, -1)


@torch.no_grad()
def sample_captions(
    decoder: Decoder, grid: Grid, search: SearchOptions, graphs: DecodingGraphs | None = None
) -> list[list[Caption]]:
    """Sample `num_captions` captions of each photo with `temperature` and `top_p`: see `nucleus_filter`.

    log_probability is that of the unfiltered distribution. The decoder should be in eval mode. graphs: run the steps as
    CUDA graphs.
    """

    def choose(log_probabilities: Tensor) -> Tensor:
        return sample_categorical(nucleus_filter(log_probabilities, search.temperature, search.top_p).exp())

    sampler = _Sampler(decoder, search.num_captions, search.max_length, choose, search, search.allow_unknown)
    steps = sampler.decode(grid, graphs)
    attentions = [step.attention for step in steps if step.attention is not None]
    *copies, attention = copy_to_cpu(
        torch.stack([step.words for step in steps], 1),  # (R, T)
        torch.stack([step.log_probabilities for step in steps], 1),
        torch.stack(attentions, 1).float() if attentions else None,  # (R, T, P)
    )
    words, log_probabilities = (copy.tolist() for copy in copies if copy is not None)
    captions = []
    for row, caption in enumerate(words):
        finished = END in caption
        length = caption.index(END) if finished else min(len(caption), search.max_length)
        log_probability = sum(log_probabilities[row][: length + finished])
        # clone: a view would keep the attention of the whole batch in memory
        own_attention = None if attention is None else attention[row, :length].clone()
        captions.append(Caption(caption[:length], log_probability, finished, own_attention))
    return [captions[first : first + search.num_captions] for first in range(0, len(captions), search.num_captions)]


def nucleus_filter(log_probabilities: Tensor, temperature: float, top_p: float) -> Tensor:
    """Apply temperature and nucleus sampling to log-probabilities (R, V) -> normalised log-probabilities (R, V).

    Only the smallest set of most likely words whose total probability reaches top_p remains (Holtzman et al. 2020,
    https://arxiv.org/abs/1904.09751, eq. 2-3). A temperature below 1 sharpens the distribution p^(1/temperature).
    """
    ordered, words = (log_probabilities / temperature).log_softmax(1).sort(dim=1, descending=True)
    mass_before = ordered.exp().cumsum(1) - ordered.exp()  # total probability of the more likely words
    ordered = ordered.masked_fill(mass_before >= top_p, -torch.inf)
    return torch.empty_like(ordered).scatter_(1, words, ordered).log_softmax(1)


class _Samples(NamedTuple):
    """What one step hands to the next."""

    state: State
    words: Tensor  # (R,) int64, the words written last
    ended: Tensor  # (R,) bool


class _SampleStep(NamedTuple):
    """The results of one step."""

    words: Tensor  # (R,) int64, <pad> after <end>
    log_probabilities: Tensor  # (R,) float32, of the words
    attention: Tensor | None  # (R, P), with which they were chosen


class _Sampler:
    """The steps of sampling."""

    def __init__(
        self,
        decoder: Decoder,
        captions: int,
        max_length: int,
        choose: Callable[[Tensor], Tensor],
        key: Hashable,
        allow_unknown: bool = False,
    ):
        """captions: per photo. choose: log-probabilities (R, V), -inf for banned words -> words (R,).

        key: equal for those with the same `choose` and `allow_unknown`.
        """
        self.decoder = decoder
        self.captions = captions
        self.choose = choose
        self.allow_unknown = allow_unknown
        self.num_steps = max_length + 1  # one step more than words: <end> may follow the last word
        self.key: Hashable = (decoder, captions, max_length, key)

    def decode(self, grid: Grid, graphs: DecodingGraphs | None) -> list[_SampleStep]:
        """The steps of all captions of the grid."""
        samples = self.start(grid)
        if graphs is None:
            return self.run(samples)
        samples, first_step = self.step(samples, 0)  # its state may have another dtype than the initial one
        return [first_step, *graphs.run(self, samples, 1, len(grid))[0]]

    def start(self, grid: Grid) -> _Samples:
        """Before the first word."""
        device = grid.cells.device
        photos = torch.arange(len(grid), device=device).repeat_interleave(self.captions)
        words = torch.full((len(photos),), START, device=device)
        return _Samples(self.decoder.init_state(grid).reorder(photos), words, torch.zeros_like(words, dtype=torch.bool))

    def run(self, samples: _Samples) -> list[_SampleStep]:
        """Run the steps until all captions have ended."""
        check = EndCheck(samples.words.device)
        interval = sync_interval(samples.words.device)
        steps = []
        for number in range(self.num_steps):
            samples, step = self.step(samples, number)
            steps.append(step)
            known = check(self.unfinished(samples)) if (number + 1) % interval == 0 else None
            if known is not None and known.number == 0:
                break
        return steps

    def step(self, samples: _Samples, number: int) -> tuple[_Samples, _SampleStep]:
        """Append one word to every caption, <pad> after <end>."""
        log_probabilities, attention, state, _ = self.decoder.step(samples.words, samples.state)
        banned = banned_ids(log_probabilities.device, self.allow_unknown)
        words = self.choose(log_probabilities.index_fill(1, banned, -torch.inf)).masked_fill(samples.ended, PAD)
        step = _SampleStep(words, log_probabilities.gather(1, words[:, None])[:, 0], attention)
        return _Samples(state, words, samples.ended | (words == END)), step

    def unfinished(self, samples: _Samples) -> Tensor:
        """(B,) bool: photos with a caption that has not ended."""
        return ~samples.ended.view(-1, self.captions).all(1)


def pack_sampled(captions: Tensor) -> tuple[PackedSequence, Tensor, Tensor]:
    """Pack captions of `sample` (R, T), longest first.

    Returns the decoder inputs and the targets (W,), and for each packed caption its row in `captions` (R,) int64.
    """
    lengths, order = (captions != PAD).sum(1).sort(descending=True, stable=True)
    captions = captions[order]
    lengths = lengths.cpu()
    inputs = torch.cat([torch.full_like(captions[:, :1], START), captions[:, :-1]], 1)
    words = pack_padded_sequence(inputs, lengths, batch_first=True)
    targets = pack_padded_sequence(captions, lengths, batch_first=True).data
    return words, targets, order


def scheduled_sampling_forward(
    decoder: Decoder, grid: Grid, words: PackedSequence, photo_index: Tensor, sampling_prob: float
) -> DecoderOutput:
    """The decoder's forward, with each input word after <start> replaced by its own sample with `sampling_prob`.

    Scheduled sampling (Bengio et al. 2015, https://arxiv.org/abs/1506.03099). The logits (W, V) are log-probabilities.
    """
    state = decoder.init_state(grid).expand_to_captions(photo_index)
    log_probabilities: list[Tensor] = []
    attentions: list[Tensor] = []
    samples = []
    for true_words in words.data.split(words.batch_sizes.tolist()):
        captions = len(true_words)
        state = state.truncate(captions)
        inputs = true_words
        if log_probabilities:
            sampled = sample_categorical(log_probabilities[-1][:captions].detach().exp())
            use_sampled = torch.rand(captions, device=true_words.device) < sampling_prob
            inputs = torch.where(use_sampled, sampled, true_words)
        step = decoder.step(inputs, state)
        state = step.state
        log_probabilities.append(step.log_probabilities)
        samples.append(step.samples)
        if step.attention is not None:
            attentions.append(step.attention)
    return DecoderOutput(
        torch.cat(log_probabilities), attention_sum(decoder, attentions, words), concat_samples(samples)
    )


@contextlib.contextmanager
def deterministic(decoder: nn.Module, keep_dropout: bool = False) -> Iterator[None]:
    """Make a decoder in training compute what it computes in eval mode; with keep_dropout, except for its dropout.

    Unlike eval(), this leaves recurrent layers in training mode: cuDNN has no backward pass for them in eval mode.
    """
    training = {module: module.training for module in decoder.modules()}
    recurrent_dropout = {module: module.dropout for module in training if isinstance(module, nn.RNNBase)}
    for module in training:
        if isinstance(module, nn.RNNBase):
            if not keep_dropout:
                module.dropout = 0.0
        elif not (keep_dropout and isinstance(module, nn.Dropout)):
            module.training = False
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
        for module, dropout in recurrent_dropout.items():
            module.dropout = dropout
