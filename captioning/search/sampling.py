"""Words that a decoder draws itself: whole captions, and words read in place of the true ones in training.

Letters: B photos, R captions, W words of all captions packed, K captions drawn of a photo, T words, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from captioning.caption import Caption
from captioning.decoders.protocol import Decoder, DecoderOutput, attention_sum, concat_samples, sample_categorical
from captioning.encoders.grid import Grid
from captioning.search.beam_search import banned_ids, sync_interval
from captioning.search.options import SearchOptions
from preprocess.vocabulary import END, PAD, START


@torch.no_grad()
def sample(decoder: Decoder, grid: Grid, samples: int, max_length: int, greedy_first: bool = False) -> Tensor:
    """Captions drawn word by word -> (B, K, T) int64: the words, <end> where it ended, then <pad>.

    K is `samples`, and one more with greedy_first: each photo's first is then its greedy caption. T is at most
    max_length + 1: the words and an <end>.
    """
    captions = samples + greedy_first

    def choose(log_probabilities: Tensor) -> Tensor:
        words = sample_categorical(log_probabilities.exp())
        if greedy_first:
            words[::captions] = log_probabilities[::captions].argmax(1)
        return words

    drawn = [words for words, *_ in _word_by_word(decoder, grid, captions, max_length, choose)]
    return torch.stack(drawn, 1).view(len(grid), captions, -1)


@torch.no_grad()
def draw_captions(decoder: Decoder, grid: Grid, search: SearchOptions) -> list[list[Caption]]:
    """`captions` of each photo, drawn with a temperature from the top p of the words: see `sharpened`.

    log_probability is the decoder's own. The decoder should be in eval mode.
    """

    def choose(log_probabilities: Tensor) -> Tensor:
        return sample_categorical(nucleus_filter(log_probabilities, search.temperature, search.top_p).exp())

    steps = _word_by_word(decoder, grid, search.num_captions, search.max_length, choose, search.allow_unknown)
    steps = zip(*steps, strict=True)
    words, log_probabilities, attentions = (None if step[0] is None else torch.stack(step, 1) for step in steps)
    captions = []
    for row, (said, scores) in enumerate(zip(words.tolist(), log_probabilities.tolist(), strict=True)):
        finished = END in said
        length = said.index(END) if finished else min(len(said), search.max_length)
        attention = None if attentions is None else attentions[row, :length].float().cpu()
        captions.append(Caption(said[:length], sum(scores[: length + finished]), finished, attention))
    return [captions[first : first + search.num_captions] for first in range(0, len(captions), search.num_captions)]


def nucleus_filter(log_probabilities: Tensor, temperature: float, top_p: float) -> Tensor:
    """(R, V) -> (R, V): of p^(1/temperature), the likeliest words whose shares reach top_p, normalised anew.

    Nucleus sampling (Holtzman et al. 2020, eq. 2-3). A temperature below 1 makes likely words likelier.
    """
    ordered, places = (log_probabilities / temperature).log_softmax(1).sort(dim=1, descending=True)
    before = ordered.exp().cumsum(1) - ordered.exp()  # the share of the words before each one
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(ordered).scatter_(1, places, ordered).log_softmax(1)


def _word_by_word(
    decoder: Decoder,
    grid: Grid,
    captions: int,
    max_length: int,
    choose: Callable[[Tensor], Tensor],
    allow_unknown: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """A step at a time: the words written (R,), <pad> after <end>; their log-probabilities (R,); attention (R, P).

    choose: the words of log-probabilities (R, V), where what may not be written has -inf.
    """
    device = grid.cells.device
    forbidden = banned_ids(device, allow_unknown)
    state = decoder.init_state(grid).reorder(torch.arange(len(grid), device=device).repeat_interleave(captions))
    words = torch.full((len(grid) * captions,), START, device=device)
    ended = torch.zeros_like(words, dtype=torch.bool)
    for number in range(max_length + 1):
        log_probabilities, attention, state, _ = decoder.step(words, state)
        words = choose(log_probabilities.index_fill(1, forbidden, -torch.inf)).masked_fill(ended, PAD)
        yield words, log_probabilities.gather(1, words[:, None])[:, 0], attention
        ended = ended | (words == END)
        if (number + 1) % sync_interval(device) == 0 and bool(ended.all()):
            return


def pack_sampled(captions: Tensor) -> tuple[PackedSequence, Tensor, Tensor]:
    """Captions drawn (R, T) -> the words read, the words said (W,), packed, and which caption each row is (R,)."""
    lengths, order = (captions != PAD).sum(1).sort(descending=True, stable=True)
    captions, lengths = captions[order], lengths.cpu()
    read = torch.cat([torch.full_like(captions[:, :1], START), captions[:, :-1]], 1)
    words = pack_padded_sequence(read, lengths, batch_first=True)
    return words, pack_padded_sequence(captions, lengths, batch_first=True).data, order


def scheduled_sampling_forward(
    decoder: Decoder, grid: Grid, words: PackedSequence, photo: Tensor, own: float
) -> DecoderOutput:
    """As the decoder's forward, but each word after the first is, with probability `own`, one it draws itself."""
    state = decoder.init_state(grid).expand_to_captions(photo)
    log_probabilities, attentions, choices = [], [], []
    for true in words.data.split(words.batch_sizes.tolist()):
        state, read = state.truncate(len(true)), true
        if log_probabilities:
            drawn = sample_categorical(log_probabilities[-1][: len(true)].detach().exp())
            read = torch.where(torch.rand(len(true), device=true.device) < own, drawn, true)
        step = decoder.step(read, state)
        state = step.state
        log_probabilities.append(step.log_probabilities)
        attentions.append(step.attention)
        choices.append(step.samples)
    return DecoderOutput(
        torch.cat(log_probabilities), attention_sum(decoder, attentions, words), concat_samples(choices)
    )


@contextlib.contextmanager
def deterministic(decoder: nn.Module, but_dropout: bool = False) -> Iterator[None]:
    """A decoder in training says and learns, inside this block, as it does when it captions; or so but for its dropout.

    Not simply eval(): on a GPU a recurrent layer that is not in training has no gradient.
    """
    modules = [(module, module.training, getattr(module, "dropout", None)) for module in decoder.modules()]
    for module, _, _ in modules:
        if isinstance(module, nn.RNNBase):
            module.dropout *= but_dropout
        elif not (but_dropout and isinstance(module, nn.Dropout)):
            module.training = False
    try:
        yield
    finally:
        for module, training, dropout in modules:
            module.training = training
            if isinstance(module, nn.RNNBase):
                module.dropout = dropout
