"""Soft attention: Xu et al. 2015, Show, Attend and Tell, https://arxiv.org/abs/1502.03044.

Legend: B photos, R captions, K captions per photo, W words of all captions packed, N native cells, P output cells,
C channels, A attention size, E embedding size, H hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captioning.decoders.fused_ops import ChunkedAttentionScores, DeferredGradLinear, Layer, OutputLayer, kernels_for
from captioning.decoders.positions import make_positions
from captioning.decoders.protocol import (
    DecoderOutput,
    HardSamples,
    State,
    Step,
    attention_sum,
    concat_samples,
    init_gates,
    init_weights,
    run_steps,
    upcast,
)
from captioning.encoders.grid import Grid

# attention (B, K, P), and what a subclass adds to the state -> weight of each cell in the context (B, K, P), samples
WeighCells = Callable[..., tuple[Tensor, "HardSamples | None"]]
# query (R, A), gate (R, C), and what a subclass adds to the state -> context (R, C), attention (R, P), samples (R,)
Attend = Callable[..., tuple[Tensor, Tensor, "HardSamples | None"]]
# gate pre-activations from word, context and hidden state (R, 4H) each, c_t-1 (R, H) -> h_t, c_t (R, H)
LstmCell = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Operations(NamedTuple):
    """The operations of one step: the modules themselves, or their faster equivalents in training."""

    from_hidden: Layer
    attend: Attend
    context_gates: Layer
    lstm_cell: LstmCell


class AttentionDecoder(nn.Module):
    """An LSTM that attends to the cells of the photo before each word.

    e_t = w . relu(W_f F + W_h h_t-1)          the score of each cell       (eq. 4)
    a_t = softmax(e_t)                         the attention                (eq. 5)
    z_t = sigmoid(W_b h_t-1) * sum(a_t F)      the gated context            (eq. 13, section 4.2.1)
    h_t = LSTM([E y_t-1, z_t], h_t-1)          h_0, c_0 from W_i mean(F)    (eq. 1-3)
    p(y_t) = softmax(W_o h_t)
    """

    uses_attention = True
    has_sentinel = False
    uses_coverage = True
    supports_kernels = True  # the context is sum(a_t F), as in captioning/decoders/kernels.py

    def __init__(
        self,
        vocabulary_size: int,
        channels: int,
        embedding_size: int = 512,
        attention_size: int = 512,
        hidden_size: int = 512,
        dropout: float = 0.5,
        positions: str = "none",
    ):
        """positions: added to the cells, "learnt", "sinusoidal" or "none"."""
        super().__init__()
        self.positions = make_positions(positions, channels)
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.key = nn.Linear(channels, attention_size)
        self.score = nn.Linear(attention_size, 1, bias=False)
        self.initial = nn.Linear(channels, 2 * hidden_size)
        # One product computes all that depends on h_t-1: the query W_h (A), the gate W_b (C), the LSTM's gates (4H)
        self.split_sizes = [attention_size, channels, 4 * hidden_size]
        self.from_hidden = nn.Linear(hidden_size, sum(self.split_sizes))
        self.word_gates = nn.Linear(embedding_size, 4 * hidden_size)
        self.context_gates = nn.Linear(channels, 4 * hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.output_layer: nn.Linear = OutputLayer(hidden_size, vocabulary_size)
        init_weights(self.embedding, self.output_layer)
        init_gates(hidden_size, self.word_gates, self.context_gates)

    def init_state(self, grid: Grid) -> State:
        """per_photo: cells (B, N, C), keys (B, P, A), pooling (B, P, N). per_caption: h and c (B, H)."""
        grid = self.positions.add_to_cells(grid)
        keys = grid.spread(self.key(grid.cells))  # P (W_f F): project the N native cells, once per photo
        pooling = grid.pooling.expand(keys.shape[0], -1, -1)  # a view: allocates nothing
        hidden, cell = upcast(self.initial(grid.mean())).chunk(2, 1)
        return State((grid.cells, keys, pooling), (hidden, cell))

    def step(self, words: Tensor, state: State) -> Step:
        """See Decoder.step in captioning/decoders/protocol.py."""
        cells, keys, pooling = state.per_photo
        scores = ChunkedAttentionScores("relu", keys, self.score.weight)
        attend = GridAttention(cells, pooling, scores, self.weigh_cells)
        operations = Operations(self.from_hidden, attend, self.context_gates, lstm_cell)
        word_gates = self.word_gates(self.embedding(words))
        per_caption, attention, samples = self._advance(operations, word_gates, state)
        logits = self.output_layer(self.dropout(per_caption[0]))  # (R, V)
        return Step(F.log_softmax(upcast(logits), 1), attention, State(state.per_photo, per_caption), samples)

    def forward(self, grid: Grid, words: PackedSequence, photo_index: Tensor) -> DecoderOutput:
        """See Decoder.forward in captioning/decoders/protocol.py.

        Captions are packed longest first, so the batch shrinks as they end and no padding is computed.
        """
        per_photo, per_caption, _ = self.init_state(grid)
        cells, keys, _ = per_photo
        operations = self._training_operations(cells, keys, grid.pooling, photo_index)
        state = State((), per_caption).expand_to_captions(photo_index)  # (R, H)
        word_gates = self.word_gates(self.embedding(words.data))  # (W, 4H): independent of the hidden state
        hiddens: list[Tensor] = []
        attentions: list[Tensor] = []
        samples: list[HardSamples | None] = []
        steps = run_steps(partial(self._advance, operations), word_gates, words.batch_sizes.tolist(), state)
        for per_caption, attention, step_samples in steps:
            hiddens.append(per_caption[0])
            attentions.append(attention)
            samples.append(step_samples)
        logits = self.output_layer(self.dropout(torch.cat(hiddens)))  # (W, V): one product for all words
        return DecoderOutput(logits, attention_sum(self, attentions, words), concat_samples(samples))

    def _training_operations(self, cells: Tensor, keys: Tensor, pooling: Tensor, photo_index: Tensor) -> Operations:
        """The fastest operations for one forward pass over captions of the photos photo_index (R,)."""
        from_hidden = DeferredGradLinear(self.from_hidden)
        context_gates = DeferredGradLinear(self.context_gates)
        kernels = kernels_for(cells) if self.supports_kernels else None
        if kernels is not None:
            fused = kernels.FusedAttention(cells, keys, pooling, self.score.weight, photo_index)
            return Operations(from_hidden, fused, context_gates, kernels.lstm_cell)
        scores = ChunkedAttentionScores("relu", keys, self.score.weight, photo_index)
        attend = GridAttention(cells.index_select(0, photo_index), pooling, scores, self.weigh_cells)  # (R, N, C)
        return Operations(from_hidden, attend, context_gates, lstm_cell)

    def _advance(
        self, operations: Operations, word_gates: Tensor, state: State
    ) -> tuple[tuple[Tensor, ...], Tensor, HardSamples | None]:
        """Run one step: word_gates (R, 4H), state -> next per_caption, attention (R, P), samples (R,)."""
        hidden, cell, *extra = state.per_caption
        query, gate, hidden_gates = operations.from_hidden(hidden).split(self.split_sizes, 1)
        context, attention, samples = operations.attend(query, gate, *extra)
        hidden, cell = operations.lstm_cell(word_gates, operations.context_gates(context), hidden_gates, cell)
        return (hidden, cell, *extra), attention, samples

    def weigh_cells(self, attention: Tensor) -> tuple[Tensor, HardSamples | None]:
        """Attention (B, K, P) -> the weight of each cell in the context (B, K, P), samples (R,)."""
        return soft_weights(attention)


def soft_weights(attention: Tensor) -> tuple[Tensor, HardSamples | None]:
    """The weight of each cell in the context of soft attention: the attention itself (B, K, P), and no samples."""
    return attention, None


class GridAttention:
    """Attend to the cells of each photo: z_t and a_t of AttentionDecoder, for every step of one forward pass.

    With a photo_index in `scores`, cells are one row per caption, and later calls may have fewer rows: captions end.
    """

    def __init__(self, cells: Tensor, pooling: Tensor, scores: ChunkedAttentionScores, weigh_cells: WeighCells):
        """cells (B, N, C), or (R, N, C) with a photo_index in scores; pooling (P, N) or (B, P, N)."""
        self.cells = cells
        self.pooling = pooling
        self.scores = scores
        self.weigh_cells = weigh_cells

    def __call__(self, query: Tensor, gate: Tensor, *extra: Tensor) -> tuple[Tensor, Tensor, HardSamples | None]:
        """query (R, A), gate (R, C) of R = B K rows -> z_t (R, C), a_t (R, P), samples (R,)."""
        context, attention, samples = self.attend(query, *extra)
        return gate.sigmoid() * context, attention, samples

    def attend(self, query: Tensor, *extra: Tensor) -> tuple[Tensor, Tensor, HardSamples | None]:
        """The same without the gate: query (R, A) -> sum(a_t F) (R, C), a_t (R, P), samples (R,)."""
        if self.scores.photo_index is not None and len(query) != len(self.cells):
            self.cells = self.cells[: len(query)]
        photos = self.cells.shape[0]  # not len(): torch.export would take it for a constant
        scores = self.scores(query.view(photos, -1, query.shape[1]))  # (B, K, P)
        attention = upcast(scores).softmax(2)
        weights, samples = self.weigh_cells(attention, *extra)
        context = Grid(self.cells, self.pooling).attend(weights)  # (B, K, C): (a P) F
        return context.flatten(0, 1), attention.flatten(0, 1), samples


def lstm_cell(word_gates: Tensor, context_gates: Tensor, hidden_gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """LSTM cell: gate pre-activations (R, 4H) from word, context and hidden state; c_t-1 (R, H) -> h_t, c_t (R, H)."""
    return lstm_update(word_gates + context_gates + hidden_gates, cell)


def lstm_update(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """LSTM cell: summed gate pre-activations (R, 4H), c_t-1 (R, H) -> h_t, c_t (R, H)."""
    input_gate, forget_gate, candidate, output_gate = upcast(gates).chunk(4, 1)
    cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
    return output_gate.sigmoid() * cell.tanh(), cell
