"""The interface of a caption decoder. Training, search, export and the commands use a decoder only through it.

A decoder is an nn.Module with two ways to run the same network:

    forward    teacher forcing: reads all words of all captions at once and returns the logits of their next words;
    step       decoding: reads one word per caption and returns the log-probabilities of the next word. init_state
               returns the State before the first word, and each Step holds the State for the next step.

Both must agree: in eval mode, the log-softmax of forward's logits equals the log-probabilities that step returns for
the same words.

Legend of the shapes in this package:

    B  photos                    R  captions in the batch; in a search, all beams: R = B K, those of a photo adjacent
    K  captions per photo        W  words of all captions, packed (torch.nn.utils.rnn.PackedSequence)
    P  output cells (14 x 14)    N  native cells of the feature map (8 x 8 for a photo of 256 pixels and ResNet)
    C  channels of a cell        V  vocabulary size
    E  embedding size            A  attention size              H  hidden size

A minimal decoder, a GRU whose initial state is computed from the mean of the feature map:

    class GruDecoder(nn.Module):
        uses_attention = False
        uses_coverage = False
        has_sentinel = False

        def __init__(self, vocabulary_size: int, channels: int, embedding_size: int, hidden_size: int):
            super().__init__()
            self.initial = nn.Linear(channels, hidden_size)
            self.embedding = nn.Embedding(vocabulary_size, embedding_size)
            self.gru = nn.GRU(embedding_size, hidden_size)
            self.output_layer = nn.Linear(hidden_size, vocabulary_size)
            init_weights(self.embedding, self.output_layer)

        def init_state(self, grid: Grid) -> State:
            return State(per_photo=(), per_caption=(self.initial(grid.mean()),))  # h (B, H)

        def step(self, words: Tensor, state: State) -> Step:
            (hidden,) = state.per_caption  # (R, H)
            output, hidden = self.gru(self.embedding(words)[None], hidden[None])  # (1, R, H) each
            logits = self.output_layer(output[0])  # (R, V)
            return Step(F.log_softmax(upcast(logits), 1), None, State((), (hidden[0],)))

        def forward(self, grid: Grid, words: PackedSequence, photo_index: Tensor) -> DecoderOutput:
            (hidden,) = self.init_state(grid).expand_to_captions(photo_index).per_caption  # (R, H)
            embedded = PackedSequence(self.embedding(words.data), words.batch_sizes)
            output, _ = self.gru(embedded, hidden[None])
            return DecoderOutput(self.output_layer(output.data), None)  # (W, V)

Save it as captioning/decoders/gru.py and register it in captioning/decoders/__init__.py:

    "gru": "captioning.decoders.gru:GruDecoder",

`python train.py DATA --decoder gru` then trains it. The constructor's parameter names select its settings: it may take
vocabulary_size, channels, and any field of TrainingOptions (captioning/training/options.py), such as
embedding_size, attention_size, hidden_size and dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from captioning.encoders.grid import Grid
from preprocess.vocabulary import PAD


class State(NamedTuple):
    """The tensors that a decoder carries from one step to the next.

    per_photo: one row per photo (B, ...), constant over the steps, such as the keys of the attention.
    per_caption: one row per caption (R, ...), such as the hidden state of the LSTM. R is a multiple of B.
    growing: one row per caption and one entry per step so far (R, t, ...), such as the keys of the words read. Before
    the first step t is 0.
    """

    per_photo: tuple[Tensor, ...]
    per_caption: tuple[Tensor, ...]
    growing: tuple[Tensor, ...] = ()

    def reorder(self, rows: Tensor) -> State:
        """Continue row i from row `rows[i]`, its parent beam; rows (R',) int64 must keep captions with their photo."""
        return State(self.per_photo, _rows_of(self.per_caption, rows), _rows_of(self.growing, rows))

    def select(self, photos: Tensor, rows: Tensor) -> State:
        """Keep these photos (B',) int64 and these captions (R',) int64; drop the finished ones."""
        return State(_rows_of(self.per_photo, photos), _rows_of(self.per_caption, rows), _rows_of(self.growing, rows))

    def expand_to_captions(self, photo_index: Tensor) -> State:
        """Expand all parts from one row per photo to one row per caption; photo_index (R,) int64."""
        return self.select(photo_index, photo_index)

    def truncate(self, rows: int) -> State:
        """Keep the first `rows` rows of all parts. Captions are packed longest first: the dropped ones have ended."""
        if rows == len((*self.per_caption, *self.growing)[0]):  # a slice's gradient is zero-filled, of full size
            return self
        return State(*(tuple(tensor[:rows] for tensor in part) for part in self))


def _rows_of(tensors: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.index_select(0, rows) for tensor in tensors)


class HardSamples(NamedTuple):
    """What a stochastic decoder sampled in training, one sample per word: the inputs of REINFORCE."""

    log_probability: Tensor  # (W,) of the sample; zero where nothing was sampled
    entropy: Tensor  # (W,) of the distribution, in nats


class Step(NamedTuple):
    """The result of one decoding step."""

    log_probabilities: Tensor  # (R, V) float32, of the next word
    attention: Tensor | None  # (R, P), rows sum to 1, or to 1 - beta with a sentinel; None without attention
    state: State  # for the next step
    samples: HardSamples | None = None  # (R,), of a stochastic decoder in training


class DecoderOutput(NamedTuple):
    """The result of teacher forcing."""

    logits: Tensor  # (W, V), before the softmax, packed like the words
    attention_sum: Tensor | None  # (R, P), summed over the words of a caption; None unless uses_coverage
    samples: HardSamples | None = None  # (W,), of a stochastic decoder in training


class Decoder(Protocol):
    """What a decoder must provide, in addition to being an nn.Module. See the example at the top of this file."""

    embedding: nn.Embedding  # (V, E), of the input words: --word-vectors and --tie-embeddings use it
    output_layer: nn.Linear  # (V, H), to the logits: --tie-embeddings uses it
    uses_attention: bool  # False: the decoder reads only the mean of the feature map, grid.mean()
    uses_coverage: bool  # True: train with doubly stochastic attention, which covers each cell about once per caption
    has_sentinel: bool  # True: attention sums to 1 - beta, and beta is the weight of the visual sentinel

    def init_state(self, grid: Grid) -> State:
        """Return the state before the first word, one row per photo in all parts: R = B."""

    def step(self, words: Tensor, state: State) -> Step:
        """Read one word per caption.

        words (R,) int64: the words written last, <start> at first. R may be any multiple of the number of photos.
        """

    def forward(self, grid: Grid, words: PackedSequence, photo_index: Tensor) -> DecoderOutput:
        """Compute the logits of the word after each of `words`: teacher forcing.

        words: int64 (W,), the ground truth shifted by <start>, packed with the longest caption first.
        photo_index (R,) int64: the photo in `grid` that each caption describes.
        """


def attention_sum(decoder: Decoder, attentions: list[Tensor], words: PackedSequence) -> Tensor | None:
    """Sum the attention over the words of each caption.

    attentions: per step (R_t, P), where R_t is the number of captions that have not ended. Steps whose word is <pad>
    do not count. Returns (R, P), or None if the decoder does not use coverage.
    """
    if not decoder.uses_coverage:
        return None
    weights = torch.cat(attentions) * (words.data != PAD)[:, None]  # (W, P)
    return pad_packed_sequence(PackedSequence(weights, words.batch_sizes))[0].sum(0)


def spread_attention(attention: Tensor, pooling: Tensor) -> Tensor:
    """Attention to the native cells (B, K, N), pooling (B, P, N) -> to the output cells (B K, P); rows sum to 1.

    Resampled like an image: equal weights stay equal, and the weight of one cell covers what the cell covers.
    """
    spread = upcast(attention @ pooling.to(attention.dtype).mT)  # (B, K, P)
    return (spread / spread.sum(2, keepdim=True)).flatten(0, 1)


def photo_of_each_word(photo_index: Tensor, step_sizes: list[int]) -> Tensor:
    """The photo of each packed word (W,) int64. photo_index (R,): that of each caption. step_sizes: rows per step."""
    return torch.cat([photo_index[:size] for size in step_sizes])


def run_steps(
    advance: Callable[[Tensor, State], tuple[Any, ...]], inputs: Tensor, step_sizes: Sequence[int], state: State
) -> Iterator[tuple[Any, ...]]:
    """Run the steps of packed captions, whose words are given, one after another: yields what each `advance` returns.

    advance: inputs of a step (R_t, ...) and the state of its captions -> their next per_caption, and whatever else.
    inputs (W, ...): of all words, packed; step_sizes: R_t of every step. state: one row per caption, longest first;
    the captions that have ended are dropped.
    """
    for step_inputs in inputs.split(step_sizes):
        state = state.truncate(len(step_inputs))
        result = advance(step_inputs, state)
        state = State(state.per_photo, result[0])
        yield result


def repeat_for_captions(per_photo: Tensor, words: Tensor) -> Tensor:
    """Rows of photos (B, ...) -> one row per caption (R, ...), where words (R,) has as many captions for each photo."""
    captions_per_photo = words.shape[0] // per_photo.shape[0]  # not len(): torch.export would take it for a constant
    return per_photo.repeat_interleave(captions_per_photo, 0)


def concat_samples(steps: list[HardSamples | None]) -> HardSamples | None:
    """Concatenate the samples of each step (R_t,) to those of all words (W,); None if the decoder does not sample."""
    samples = [step for step in steps if step is not None]
    if not samples:
        return None
    return HardSamples(
        torch.cat([step.log_probability for step in samples]), torch.cat([step.entropy for step in samples])
    )


def sample_categorical(probabilities: Tensor) -> Tensor:
    """Sample one index per row of probabilities (..., N): int64 (...). Rows need not be normalised.

    Like torch.multinomial, without its device synchronisation.
    """
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def upcast(values: Tensor) -> Tensor:
    """Convert half precision to float32: sums, exponentials and cell states need it."""
    return values.float() if values.element_size() < 4 else values


def init_weights(embedding: nn.Embedding, output_layer: nn.Linear) -> None:
    """Initialise uniformly in [-0.1, 0.1], with zero bias, as the published recipes of these models do."""
    nn.init.uniform_(embedding.weight, -0.1, 0.1)
    nn.init.uniform_(output_layer.weight, -0.1, 0.1)
    nn.init.zeros_(output_layer.bias)


def init_gates(hidden_size: int, *layers: nn.Linear) -> None:
    """Initialise the weights of gate layers uniformly in +-1/sqrt(hidden_size), as torch.nn.LSTMCell does.

    nn.Linear would scale them by its own fan-in instead. Biases keep their initialisation.
    """
    bound = hidden_size**-0.5
    for layer in layers:
        nn.init.uniform_(layer.weight, -bound, bound)
