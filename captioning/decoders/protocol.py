"""What every decoder promises. Beam search, greedy decoding and the commands know only this.

Letters: B photos, R rows (captions being written: R = B x beams, the beams of a photo side by side),
W words of all captions packed, P cells, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from captioning.encoders.grid import Grid
from preprocess.vocabulary import PAD


class State(NamedTuple):
    """What a decoder carries from word to word.

    per_photo: tensors with a row a photo (B, ...), the same at every step, such as the attention's keys;
    per_caption: tensors with a row a caption (R, ...), such as the LSTM's hidden state. R is a multiple of B.
    """

    per_photo: tuple[Tensor, ...]
    per_caption: tuple[Tensor, ...]

    def reorder(self, rows: Tensor) -> State:
        """Row i goes on from row `rows[i]` (R',) int64, of the same photo: a beam's parent."""
        return State(self.per_photo, tuple(tensor.index_select(0, rows) for tensor in self.per_caption))

    def select(self, photos: Tensor, rows: Tensor) -> State:
        """Only these photos (int64) and these rows (int64) of theirs go on; the others have finished."""
        return State(
            tuple(tensor.index_select(0, photos) for tensor in self.per_photo),
            tuple(tensor.index_select(0, rows) for tensor in self.per_caption),
        )

    def expand_to_captions(self, photo: Tensor) -> State:
        """From a row a photo to a row a caption, in both parts: photo (R,) int64 says whose each is."""
        return State(
            tuple(tensor.index_select(0, photo) for tensor in self.per_photo),
            tuple(tensor.index_select(0, photo) for tensor in self.per_caption),
        )

    def truncate(self, rows: int) -> State:
        """Only the first captions go on: packed longest first, the others have ended."""
        if rows == len(self.per_caption[0]):  # a slice's gradient is a whole zeroed tensor: cut only when captions end
            return self
        return State(
            tuple(tensor[:rows] for tensor in self.per_photo), tuple(tensor[:rows] for tensor in self.per_caption)
        )


class HardSamples(NamedTuple):
    """What a decoder drew while it read, one choice a word: what REINFORCE needs to know of it."""

    log_probability: Tensor  # (W,) of what was drawn; zero where nothing was
    entropy: Tensor  # (W,) natural, of the distribution


class Step(NamedTuple):
    log_probabilities: Tensor  # (R, V) float32
    attention: Tensor | None  # (R, P), rows sum to one, or to 1 - beta with a sentinel; None where it does not attend
    state: State
    choices: HardSamples | None = None  # (R,): only of a decoder that draws, in training


class DecoderOutput(NamedTuple):
    logits: Tensor  # (W, V): unnormalised, before the softmax; packed like the words
    attention_sum: Tensor | None  # (R, P): the attention a caption gave each cell, summed over its words
    choices: HardSamples | None = None  # (W,): only of a decoder that draws, in training


class Decoder(Protocol):
    embedding: nn.Embedding  # (V, E): of the words it reads
    output_layer: nn.Linear  # H -> V: of the words it says
    uses_attention: bool  # False: the pooled map is enough
    uses_coverage: bool  # True: over a caption its attention should cover each cell about once (doubly stochastic)
    has_sentinel: bool  # True: attention sums to 1 - beta, the share of the photo in a word

    def init_state(self, grid: Grid) -> State:
        """The state before the first word, one row a photo."""

    def step(self, words: Tensor, state: State) -> Step:
        """Feed the words (R,) int64 just written, <start> at first; R may be any multiple of the photos."""

    def forward(self, grid: Grid, words: PackedSequence, photo: Tensor) -> DecoderOutput:
        """The scores of the next word after each of `words` (W,), the true ones, packed longest caption first.

        photo (R,) int64: which photo of the grid each caption describes.
        """


def attention_sum(decoder: Decoder, attentions: list[Tensor], words: PackedSequence) -> Tensor | None:
    """The attention of each step (R, P), fewer rows as captions end -> its sum (R, P), where the decoder covers.

    <pad> among the words looks at nothing.
    """
    if not decoder.uses_coverage:
        return None
    looked = torch.cat(attentions) * (words.data != PAD)[:, None]
    return pad_packed_sequence(PackedSequence(looked, words.batch_sizes))[0].sum(0)


def concat_samples(choices: list[HardSamples | None]) -> HardSamples | None:
    """Those of each step (R,) -> of all words (W,)."""
    return HardSamples(*map(torch.cat, zip(*choices, strict=True))) if choices[0] is not None else None


def sample_categorical(shares: Tensor) -> Tensor:
    """One of N for each row of shares (..., N), as likely as its share, int64 (...).

    torch.multinomial, but for its look at the shares, for which a GPU would have to be waited for.
    """
    return (shares / torch.empty_like(shares).exponential_()).argmax(-1)


def upcast(values: Tensor) -> Tensor:
    """At least float32: sums, exponentials and cell states lose too much in half precision."""
    return values.float() if values.element_size() < 4 else values


def init_weights(embedding: nn.Embedding, vocabulary: nn.Linear) -> None:
    """As in the published recipe: uniform in +-0.1, no bias."""
    nn.init.uniform_(embedding.weight, -0.1, 0.1)
    nn.init.uniform_(vocabulary.weight, -0.1, 0.1)
    nn.init.zeros_(vocabulary.bias)
