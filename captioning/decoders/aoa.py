"""Attention on attention, AoANet: Huang et al. 2019, https://arxiv.org/abs/1908.06954, section 3.

Legend: B photos, R captions, K captions per photo, W words of all captions packed, N native cells, P output cells,
C channels, H hidden size (of all layers), h heads, d = H / h, E embedding size, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captioning.decoders.attention import lstm_update
from captioning.decoders.fused_ops import DeferredGradLinear, DeferredGradProduct, Layer, OutputLayer
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
    spread_attention,
    upcast,
)
from captioning.decoders.transformer import join_heads, split_heads
from captioning.encoders.grid import Grid
from captioning.errors import UserError


def attention_on_attention(layer: Layer, attended: Tensor, query: Tensor) -> Tensor:
    """AoA(v, q) = sigmoid(W_g [v, q] + b_g) * (W_i [v, q] + b_i)   (section 3.1)

    The information about what a query q attended to, v, passes as far as the gate finds that it fits the query.
    attended and query (..., H) -> (..., H), at least float32. layer (2H -> 2H): W_i, then W_g.
    """
    return F.glu(upcast(layer(torch.cat([attended, query], -1))), -1)


class RefiningLayer(nn.Module):
    """A layer of the encoder, which relates the cells of a photo (section 3.2.1).

    A' = LayerNorm(A + AoA(attention(W_q A, W_k A, W_v A), W_q A))
    """

    def __init__(self, size: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.query_keys_values = nn.Linear(size, 3 * size)
        self.information = nn.Linear(2 * size, 2 * size)
        self.norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, cells: Tensor) -> Tensor:
        """A (B, N, H) -> A' (B, N, H)."""
        query, keys, values = self.query_keys_values(cells).chunk(3, 2)
        heads = [split_heads(part, self.heads) for part in (query, keys, values)]
        attended = join_heads(F.scaled_dot_product_attention(heads[0], heads[1], heads[2]))
        information = attention_on_attention(self.information, self.dropout(attended), self.dropout(query))
        return self.norm(cells + information)


Product = Callable[[Tensor], Tensor]  # a product with keys or values, or its DeferredGradProduct


class Operations(NamedTuple):
    """The operations of one step: the modules themselves, or their faster equivalents in training."""

    context_gates: Layer
    hidden_gates: Layer
    query: Layer
    score: Product  # q (B, h, K, d) -> q k (B, h, K, N)
    attend: Product  # a (B, h, K, N) -> a v (B, h, K, d)
    information: Layer


class AoaDecoder(nn.Module):
    """Attention on attention between the cells of a photo, and between the cells and the words.

    A = relu(W F), refined by the layers of the encoder;  g = mean(A)                (section 3.2.1)
    h_t = LSTM([E y_t-1, g + c_t-1], h_t-1)                                          (section 3.2.2)
    c_t = AoA(attention(W_q h_t, W_k A, W_v A), W_q h_t),  c_0 = 0
    p(y_t) = softmax(W_p c_t)

    The attention is that of Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762, section 3.2.2), with several heads.
    The cells are the native ones, so the attention shown, the mean of the heads, is spread to 14 x 14 cells and scaled
    to a sum of 1. Dropout applies to A, to the c_t-1 that the LSTM reads and to c_t before the output layer, and half
    of it to the inputs of each AoA in the encoder. From the authors' experiments: 6 layers of 8 heads, the relu. Not
    taken from them: the LayerNorm before the attention, of cells and of h_t; AoA of h_t itself for W_q h_t.
    """

    uses_attention = True
    has_sentinel = False
    uses_coverage = False

    def __init__(
        self,
        vocabulary_size: int,
        channels: int,
        embedding_size: int = 1024,
        hidden_size: int = 1024,
        dropout: float = 0.5,
        encoder_layers: int = 6,
        heads: int = 8,
        positions: str = "none",
    ):
        """The default sizes are the paper's. positions: added to A; "learnt", "sinusoidal" or "none".

        Raises UserError if the heads do not divide the hidden size.
        """
        super().__init__()
        if hidden_size % heads:
            raise UserError(f"--heads {heads}: must divide --hidden-size, now {hidden_size}")
        self.heads = heads
        self.cell = nn.Linear(channels, hidden_size)
        self.positions = make_positions(positions, hidden_size)
        self.layers = nn.ModuleList(RefiningLayer(hidden_size, heads, dropout / 2) for _ in range(encoder_layers))
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        # The gates of the LSTM: from the word, from g + c_t-1, and from h_t-1
        self.word_gates = nn.Linear(embedding_size, 4 * hidden_size)
        self.context_gates = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.hidden_gates = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.query = nn.Linear(hidden_size, hidden_size)
        self.keys_values = nn.Linear(hidden_size, 2 * hidden_size)
        self.information = nn.Linear(2 * hidden_size, 2 * hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.output_layer = OutputLayer(hidden_size, vocabulary_size)
        init_weights(self.embedding, self.output_layer)
        init_gates(hidden_size, self.word_gates, self.context_gates, self.hidden_gates)

    def encode(self, grid: Grid) -> Tensor:
        """The refined cells A (B, N, H)."""
        cells = self.dropout(self.positions.add(self.cell(grid.cells).relu(), grid.pooling))
        for layer in self.layers:
            cells = layer(cells)
        return cells

    def init_state(self, grid: Grid) -> State:
        """per_photo: keys and values (B, h, N, d), pooling (B, P, N), photo_gates (B, 4H).

        per_caption: h and c of the LSTM, and the context (B, H).
        """
        cells = self.encode(grid)
        keys, values = (split_heads(part, self.heads).contiguous() for part in self.keys_values(cells).chunk(2, 2))
        pooling = grid.pooling.expand(cells.shape[0], -1, -1)  # a view: allocates nothing
        photo_gates = self.context_gates(cells.mean(1))
        zeros = photo_gates.new_zeros(cells.shape[0], cells.shape[2], dtype=upcast(photo_gates).dtype)
        return State((keys, values, pooling, photo_gates), (zeros, zeros, zeros))

    def step(self, words: Tensor, state: State) -> Step:
        """See Decoder.step in captioning/decoders/protocol.py."""
        keys, values, pooling, photo_gates = state.per_photo
        operations = Operations(
            self.context_gates,
            self.hidden_gates,
            self.query,
            partial(torch.matmul, other=keys.mT),
            partial(torch.matmul, other=values),
            self.information,
        )
        gates = self.word_gates(self.embedding(words)) + repeat_for_captions(photo_gates, words)
        per_caption, attention = self._advance(operations, gates, state, keys.shape[0])
        logits = self.output_layer(self.dropout(per_caption[2]))  # (R, V)
        attention = spread_attention(attention.mean(1), pooling)
        return Step(F.log_softmax(upcast(logits), 1), attention, State(state.per_photo, per_caption))

    def forward(self, grid: Grid, words: PackedSequence, photo_index: Tensor) -> DecoderOutput:
        """See Decoder.forward in captioning/decoders/protocol.py.

        Captions are packed longest first, so the batch shrinks as they end and no padding is computed.
        """
        (keys, values, _, photo_gates), per_caption, _ = self.init_state(grid)
        operations = self._training_operations(keys.index_select(0, photo_index), values.index_select(0, photo_index))
        state = State((), per_caption).expand_to_captions(photo_index)
        step_sizes = words.batch_sizes.tolist()
        photo_of_word = photo_of_each_word(photo_index, step_sizes)  # (W,)
        # Independent of the hidden states: one product for all words, one for all photos
        gates = self.word_gates(self.embedding(words.data)) + photo_gates.index_select(0, photo_of_word)  # (W, 4H)
        steps = run_steps(
            lambda gates, state: self._advance(operations, gates, state, photos=len(gates)), gates, step_sizes, state
        )
        contexts = torch.cat([per_caption[2] for per_caption, _ in steps])  # (W, H)
        return DecoderOutput(self.output_layer(self.dropout(contexts)), None)  # (W, V): one product

    def _training_operations(self, keys: Tensor, values: Tensor) -> Operations:
        """The fastest operations for one forward pass, with keys and values of each caption (R, h, N, d)."""
        return Operations(
            DeferredGradLinear(self.context_gates),
            DeferredGradLinear(self.hidden_gates),
            DeferredGradLinear(self.query),
            DeferredGradProduct(keys.mT),
            DeferredGradProduct(values),
            DeferredGradLinear(self.information),
        )

    def _advance(
        self, operations: Operations, gates: Tensor, state: State, photos: int
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Run one step of R = B K captions, of as many photos as `operations` has keys.

        gates from word and photo (R, 4H), state -> next per_caption, attention of each head (B, h, K, N).
        """
        hidden, cell, context = state.per_caption
        gates = gates + operations.context_gates(self.dropout(context)) + operations.hidden_gates(hidden)
        hidden, cell = lstm_update(gates, cell)
        query = operations.query(hidden)  # (R, H)
        scores = operations.score(split_heads(query.view(photos, -1, query.shape[1]), self.heads))  # (B, h, K, N)
        attention = (upcast(scores) / math.sqrt(query.shape[1] // self.heads)).softmax(3)
        attended = join_heads(operations.attend(attention.to(query.dtype))).flatten(0, 1)  # (R, H)
        context = attention_on_attention(operations.information, attended, query)
        return (hidden, cell, context), attention
