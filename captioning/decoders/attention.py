"""Show, Attend and Tell (Xu et al. 2015), soft attention.

Letters: B photos, R captions, K captions a photo, W words of all captions packed, N native cells, P output cells,
C channels, A attention, E embedding, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captioning.decoders.fused_ops import ChunkedAttentionScores, DeferredGradLinear, Layer, kernels_for
from captioning.decoders.protocol import (
    DecoderOutput,
    HardSamples,
    State,
    Step,
    attention_sum,
    concat_samples,
    init_weights,
    upcast,
)
from captioning.encoders.grid import Grid


class AttentionDecoder(nn.Module):
    """e_t = w . relu(W_f F + W_h h_t-1)          the score of each cell       (eq. 4)
    a_t = softmax(e_t)                            the attention                (eq. 5)
    z_t = sigmoid(W_b h_t-1) * sum(a_t F)         the gated context            (eq. 13, section 4.2.1)
    h_t = LSTM([E y_t-1, z_t], h_t-1)             from W_i mean(F)             (eq. 1-3)
    p(y_t) = softmax(W_o h_t)
    """

    uses_attention = True
    has_sentinel = False
    uses_coverage = True
    uses_expectation = True  # sum(a_t F), which kernels for GPUs know

    def __init__(
        self,
        vocabulary_size: int,
        channels: int,
        embedding_size: int,
        attention_size: int,
        hidden_size: int,
        dropout: float,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.key = nn.Linear(channels, attention_size)
        self.score = nn.Linear(attention_size, 1, bias=False)
        self.initial = nn.Linear(channels, 2 * hidden_size)
        # What the hidden state feeds, in one product: the query W_h (A), the gate W_b (C), the LSTM's own gates (4H)
        self.parts = [attention_size, channels, 4 * hidden_size]
        self.from_hidden = nn.Linear(hidden_size, sum(self.parts))
        self.word_gates = nn.Linear(embedding_size, 4 * hidden_size)
        self.context_gates = nn.Linear(channels, 4 * hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.output_layer = nn.Linear(hidden_size, vocabulary_size)
        init_weights(self.embedding, self.output_layer)
        for gates in (self.word_gates, self.context_gates):
            nn.init.uniform_(gates.weight, -(hidden_size**-0.5), hidden_size**-0.5)  # as torch.nn.LSTMCell

    def init_state(self, grid: Grid) -> State:
        """photos: cells (B, N, C), keys (B, P, A), pooling (B, P, N); rows: h and c (B, H)."""
        keys = grid.spread(self.key(grid.cells))  # projected once a photo, on the native cells: P (W_f F)
        pooling = grid.pooling.expand(keys.shape[0], -1, -1)  # a view: it takes no memory
        return State((grid.cells, keys, pooling), upcast(self.initial(grid.mean())).chunk(2, 1))

    def step(self, words: Tensor, state: State) -> Step:
        gates = self.word_gates(self.embedding(words))
        cells, keys, pooling = state.per_photo
        look = partial(self._look, cells, ChunkedAttentionScores("relu", keys, self.score.weight), pooling)
        layers = self.from_hidden, self.context_gates
        rows, attention, choices = self._advance(gates, state.per_caption, look, self._lstm, *layers)
        scores = self.output_layer(self.dropout(rows[0]))  # (R, V)
        return Step(F.log_softmax(upcast(scores), 1), attention, State(state.per_photo, rows), choices)

    def forward(self, grid: Grid, words: PackedSequence, photo: Tensor) -> DecoderOutput:
        """Captions run longest first, so that the batch shrinks as they end: no padded row is ever computed."""
        (cells, keys, _), rows = self.init_state(grid)  # the pooling stays one matrix for all captions
        if kernels := kernels_for(cells) if self.uses_expectation else None:  # they find a caption's photo themselves
            state = State((), rows).expand_to_captions(photo)  # (R, H)
            look = kernels.FusedAttention(cells, keys, grid.pooling, self.score.weight, photo)
            lstm = kernels.LstmGates.apply
        else:
            state = State((cells,), rows).expand_to_captions(photo)  # (R, N, C); (R, H)
            scores = ChunkedAttentionScores("relu", keys, self.score.weight, photo)
            look, lstm = None, self._lstm
        hiddens, attentions, chosen = [], [], []
        word_gates = self.word_gates(self.embedding(words.data))  # (W, 4H): they wait for no hidden state
        layers = DeferredGradLinear(self.from_hidden), DeferredGradLinear(self.context_gates)
        for gates in word_gates.split(words.batch_sizes.tolist()):
            photos, rows = state.truncate(len(gates))
            look_now = look or partial(self._look, *photos, scores, grid.pooling)
            rows, attention, choices = self._advance(gates, rows, look_now, lstm, *layers)
            state = State(photos, rows)
            hiddens.append(rows[0])
            attentions.append(attention)
            chosen.append(choices)
        scores = self.output_layer(self.dropout(torch.cat(hiddens)))  # (W, V): one product for all words
        return DecoderOutput(scores, attention_sum(self, attentions, words), concat_samples(chosen))

    def _advance(
        self,
        word_gates: Tensor,
        rows: tuple[Tensor, ...],
        look: Callable,
        lstm: Callable,
        from_hidden: Layer,
        context_gates: Layer,
    ) -> tuple[tuple[Tensor, ...], Tensor, HardSamples | None]:
        """One step of R rows -> rows h (R, H), c (R, H), ...; attention (R, P); choices (R,)."""
        hidden, cell, *others = rows
        query, gate, hidden_gates = from_hidden(hidden).split(self.parts, 1)
        context, attention, *choices = look(query, gate, *others)
        hidden, cell = lstm(word_gates, context_gates(context), hidden_gates, cell)
        return (hidden, cell, *others), attention, choices[0] if choices else None

    def _look(
        self, cells: Tensor, scores: Callable, pooling: Tensor, query: Tensor, gate: Tensor, *others: Tensor
    ) -> tuple[Tensor, Tensor, HardSamples | None]:
        """Queries (R, A) and gates (R, C) of R = B K rows over B photos -> z_t (R, C), a_t (R, P), choices (R,)."""
        photos = cells.shape[0]  # not len: torch.export would take it for a constant
        attention = upcast(scores(query.view(photos, -1, query.shape[1]))).softmax(2)  # (B, K, P)
        weights, choices = self._weights(attention, *others)
        seen = Grid(cells, pooling).attend(weights)  # (B, K, C): (a P) F
        return gate.sigmoid() * seen.view(gate.shape), attention.flatten(0, 1), choices

    def _lstm(self, word: Tensor, context: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """What word, context and hidden state give to the gates (R, 4H), and c_t-1 (R, H) -> h_t and c_t (R, H)."""
        let_in, forget, candidate, let_out = upcast(word + context + hidden).chunk(4, 1)
        cell = forget.sigmoid() * cell + let_in.sigmoid() * candidate.tanh()
        return let_out.sigmoid() * cell.tanh(), cell

    def _weights(self, attention: Tensor) -> tuple[Tensor, HardSamples | None]:
        """Attention (B, K, P) -> the weight of each cell in what is seen (B, K, P): here the attention itself."""
        return attention, None
