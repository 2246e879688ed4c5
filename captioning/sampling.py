"""Words that a decoder draws itself: whole captions, and words read in place of the true ones in training.

Letters: B photos, R captions, W words of all captions packed, K captions drawn of a photo, T words, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from captioning.beam_search import FORBIDDEN, steps_between_looks
from captioning.decoders.protocol import Decoder, TeacherForced, all_choices, coverage
from captioning.grid import Grid
from preprocess.vocabulary import END, PAD, START


@torch.no_grad()
def sample(decoder: Decoder, grid: Grid, samples: int, max_length: int, greedy_first: bool = False) -> Tensor:
    """Captions drawn word by word -> (B, K, T) int64: the words, <end> where it ended, then <pad>.

    K is `samples`, and one more with greedy_first: each photo's first is then its greedy caption. T is at most
    max_length + 1: the words and an <end>.
    """
    captions = samples + greedy_first
    forbidden = torch.tensor(FORBIDDEN, device=grid.cells.device)
    photo = torch.arange(len(grid), device=grid.cells.device)
    state = decoder.begin(grid).reorder(photo.repeat_interleave(captions))
    words = torch.full((len(grid) * captions,), START, device=grid.cells.device)
    ended = torch.zeros_like(words, dtype=torch.bool)
    drawn = []
    for number in range(max_length + 1):
        step = decoder.step(words, state)
        log_probabilities, state = step.log_probabilities.index_fill(1, forbidden, -torch.inf), step.state
        words = log_probabilities.exp().multinomial(1)[:, 0]
        if greedy_first:
            words[::captions] = log_probabilities[::captions].argmax(1)
        words = words.masked_fill(ended, PAD)
        drawn.append(words)
        ended = ended | (words == END)
        if (number + 1) % steps_between_looks(grid.cells.device) == 0 and bool(ended.all()):
            break
    return torch.stack(drawn, 1).view(len(grid), captions, -1)


def forced_as_drawn(captions: Tensor) -> tuple[PackedSequence, Tensor, Tensor]:
    """Captions drawn (R, T) -> the words read, the words said (W,), packed, and which caption each row is (R,)."""
    lengths, order = (captions != PAD).sum(1).sort(descending=True, stable=True)
    captions, lengths = captions[order], lengths.cpu()
    read = torch.cat([torch.full_like(captions[:, :1], START), captions[:, :-1]], 1)
    words = pack_padded_sequence(read, lengths, batch_first=True)
    return words, pack_padded_sequence(captions, lengths, batch_first=True).data, order


def read_own_words(decoder: Decoder, grid: Grid, words: PackedSequence, photo: Tensor, own: float) -> TeacherForced:
    """As the decoder's forward, but each word after the first is, with probability `own`, one it draws itself."""
    state = decoder.begin(grid).of_captions(photo)
    log_probabilities, attentions, choices = [], [], []
    for true in words.data.split(words.batch_sizes.tolist()):
        state, read = state.first(len(true)), true
        if log_probabilities:
            drawn = log_probabilities[-1][: len(true)].detach().exp().multinomial(1)[:, 0]
            read = torch.where(torch.rand(len(true), device=true.device) < own, drawn, true)
        step = decoder.step(read, state)
        state = step.state
        log_probabilities.append(step.log_probabilities)
        attentions.append(step.attention)
        choices.append(step.choices)
    return TeacherForced(torch.cat(log_probabilities), coverage(decoder, attentions), all_choices(choices))


@contextlib.contextmanager
def without_chance(decoder: nn.Module, but_dropout: bool = False) -> Iterator[None]:
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
