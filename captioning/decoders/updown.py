"""Bottom-up and top-down attention: Anderson et al. 2018, https://arxiv.org/abs/1707.07998, section 3.2.

Legend: B photos, R captions, K captions per photo, W words of all captions packed, N native cells, P output cells,
C channels, A attention size, E embedding size, H hidden size, V vocabulary size.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captioning.decoders.attention import GridAttention, lstm_update, soft_weights
from captioning.decoders.fused_ops import ChunkedAttentionScores, DeferredGradLinear, Layer, OutputLayer
from captioning.decoders.positions import make_positions
from captioning.decoders.protocol import (
    DecoderOutput,
    State,
    Step,
    init_gates,
    init_weights,
    photo_of_each_word,
    repeat_for_captions,
    run_steps,
    upcast,
)
from captioning.encoders.grid import Grid


class Operations(NamedTuple):
    """The operations of one step: the modules themselves, or their faster equivalents in training."""

    attention_gates: Layer
    query: Layer
    grid_attention: GridAttention
    context_gates: Layer
    language_gates: Layer


class UpDownDecoder(nn.Module):
    """Two LSTMs: one chooses where to look, from the whole photo and what was written; the other writes the word.

    h1_t = LSTM([h2_t-1, mean(v), E y_t-1], h1_t-1)       the attention LSTM            (eq. 2)
    e_t = w . tanh(W_v v + W_h h1_t)                      the score of each cell        (eq. 3)
    a_t = softmax(e_t),  z_t = sum(a_t v)                 the attention, the context    (eq. 4-5)
    h2_t = LSTM([z_t, h1_t], h2_t-1)                      the language LSTM             (eq. 6)
    p(y_t) = softmax(W_p h2_t + b_p)                                                    (eq. 7)

    All h and c are 0 at first. The paper's v are regions of a detector; here they are the 14 x 14 cells of the grid.
    """

    uses_attention = True
    has_sentinel = False
    uses_coverage = False

    def __init__(
        self,
        vocabulary_size: int,
        channels: int,
        embedding_size: int = 1000,
        attention_size: int = 512,
        hidden_size: int = 1000,
        dropout: float = 0.5,
        positions: str = "none",
    ):
        """The default sizes are the paper's. positions: added to the cells, "learnt", "sinusoidal" or "none"."""
        super().__init__()
        self.positions = make_positions(positions, channels)
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        # The gates of the attention LSTM: from the word, from the photo, and from [h2_t-1, h1_t-1]
        self.word_gates = nn.Linear(embedding_size, 4 * hidden_size)
        self.photo_gates = nn.Linear(channels, 4 * hidden_size, bias=False)
        self.attention_gates = nn.Linear(2 * hidden_size, 4 * hidden_size, bias=False)
        self.key = nn.Linear(channels, attention_size)
        self.query = nn.Linear(hidden_size, attention_size, bias=False)
        self.score = nn.Linear(attention_size, 1, bias=False)
        # The gates of the language LSTM: from the context, and from [h1_t, h2_t-1]
        self.context_gates = nn.Linear(channels, 4 * hidden_size)
        self.language_gates = nn.Linear(2 * hidden_size, 4 * hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.output_layer = OutputLayer(hidden_size, vocabulary_size)
        init_weights(self.embedding, self.output_layer)
        init_gates(hidden_size, self.word_gates, self.photo_gates, self.attention_gates)
        init_gates(hidden_size, self.context_gates, self.language_gates)

    def init_state(self, grid: Grid) -> State:
        """per_photo: cells (B, N, C), keys (B, P, A), pooling (B, P, N), photo_gates (B, 4H).

        per_caption: h and c of the attention LSTM, then of the language LSTM (B, H).
        """
        grid = self.positions.add_to_cells(grid)
        keys = grid.spread(self.key(grid.cells))  # P (W_v F): project the N native cells, once per photo
        pooling = grid.pooling.expand(keys.shape[0], -1, -1)  # a view: allocates nothing
        photo_gates = self.photo_gates(grid.mean())
        zeros = photo_gates.new_zeros(keys.shape[0], self.query.in_features, dtype=upcast(photo_gates).dtype)
        return State((grid.cells, keys, pooling, photo_gates), (zeros, zeros, zeros, zeros))

    def step(self, words: Tensor, state: State) -> Step:
        """See Decoder.step in captioning/decoders/protocol.py."""
        cells, keys, pooling, photo_gates = state.per_photo
        scores = ChunkedAttentionScores("tanh", keys, self.score.weight)
        operations = Operations(
            self.attention_gates,
            self.query,
            GridAttention(cells, pooling, scores, soft_weights),
            self.context_gates,
            self.language_gates,
        )
        gates = self.word_gates(self.embedding(words)) + repeat_for_captions(photo_gates, words)
        per_caption, attention = self._advance(operations, gates, state)
        logits = self.output_layer(self.dropout(per_caption[2]))  # (R, V)
        return Step(F.log_softmax(upcast(logits), 1), attention, State(state.per_photo, per_caption))

    def forward(self, grid: Grid, words: PackedSequence, photo_index: Tensor) -> DecoderOutput:
        """See Decoder.forward in captioning/decoders/protocol.py.

        Captions are packed longest first, so the batch shrinks as they end and no padding is computed.
        """
        (cells, keys, _, photo_gates), per_caption, _ = self.init_state(grid)
        operations = self._training_operations(cells, keys, grid.pooling, photo_index)
        state = State((), per_caption).expand_to_captions(photo_index)  # (R, H)
        step_sizes = words.batch_sizes.tolist()
        photo_of_word = photo_of_each_word(photo_index, step_sizes)  # (W,)
        # Independent of the hidden states: one product for all words, one for all photos
        gates = self.word_gates(self.embedding(words.data)) + photo_gates.index_select(0, photo_of_word)  # (W, 4H)
        steps = run_steps(partial(self._advance, operations), gates, step_sizes, state)
        hiddens = torch.cat([per_caption[2] for per_caption, _ in steps])  # (W, H)
        return DecoderOutput(self.output_layer(self.dropout(hiddens)), None)  # (W, V): one product

    def _training_operations(self, cells: Tensor, keys: Tensor, pooling: Tensor, photo_index: Tensor) -> Operations:
        """The fastest operations for one forward pass over captions of the photos photo_index (R,)."""
        scores = ChunkedAttentionScores("tanh", keys, self.score.weight, photo_index)
        return Operations(
            DeferredGradLinear(self.attention_gates),
            DeferredGradLinear(self.query),
            GridAttention(cells.index_select(0, photo_index), pooling, scores, soft_weights),  # cells (R, N, C)
            DeferredGradLinear(self.context_gates),
            DeferredGradLinear(self.language_gates),
        )

    def _advance(self, operations: Operations, gates: Tensor, state: State) -> tuple[tuple[Tensor, ...], Tensor]:
        """Run one step: gates from word and photo (R, 4H), state -> next per_caption, attention (R, P)."""
        hidden1, cell1, hidden2, cell2 = state.per_caption
        gates = gates + operations.attention_gates(torch.cat([hidden2, hidden1], 1))
        hidden1, cell1 = lstm_update(gates, cell1)
        context, attention, _ = operations.grid_attention.attend(operations.query(hidden1))  # (R, C), (R, P)
        gates = operations.context_gates(context) + operations.language_gates(torch.cat([hidden1, hidden2], 1))
        hidden2, cell2 = lstm_update(gates, cell2)
        return (hidden1, cell1, hidden2, cell2), attention
