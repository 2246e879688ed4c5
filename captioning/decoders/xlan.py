"""X-Linear attention networks, X-LAN: Pan et al. 2020, https://arxiv.org/abs/2003.14080, sections 3 and 4.

Legend: B photos, R captions, K captions per photo, W words of all captions packed, N native cells, P output cells,
C channels, D attention size, h heads, d = D / h, E embedding size, H hidden size, V vocabulary size.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captioning.decoders.attention import lstm_update
from captioning.decoders.fused_ops import DeferredGradLinear, Layer, OutputLayer
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
from captioning.encoders.grid import Grid
from captioning.errors import UserError


class XLinearAttention(nn.Module):
    """The X-Linear attention block (section 3): spatial and channel-wise attention from products of query and keys.

    b_i = elu(W_k k_i) * elu(W_q q)                       bilinear pooling of key i and query
    b'_i = relu(W_B b_i)
    s = softmax(w_s . b'_i)                               spatial attention over the cells i
    c = sigmoid(W_e mean_i(b'_i))                         channel-wise attention: squeeze and excitation
    F(k, v, q) = c * sum_i(s_i elu(W_v v_i) * elu(W'_q q))

    As in the authors' experiments, a GroupNorm over each head follows each elu, each head has its own s and c, and all
    heads share W_B (d -> d / 2), w_s and W_e (d / 2 -> d).
    """

    def __init__(self, query_size: int, cell_size: int, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.head_size = size // heads
        self.query = nn.Linear(query_size, 2 * size)  # W_q and W'_q in one product
        self.query_norm = nn.GroupNorm(2 * heads, 2 * size)
        self.cell = nn.Linear(cell_size, 2 * size)  # W_k and W_v: keys and values are the same cells
        self.cell_norm = nn.GroupNorm(2 * heads, 2 * size)
        self.bilinear = nn.Linear(self.head_size, self.head_size // 2)
        self.spatial = nn.Linear(self.head_size // 2, 1, bias=False)  # a bias would not change the softmax
        self.channel = nn.Linear(self.head_size // 2, self.head_size)

    def keys_and_values(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """elu(W_k k) (B, h, d, N) and elu(W_v v) (B, h, N, d) of cells (B, N, D)."""
        projected = self.cell_norm(F.elu(self.cell(cells)).flatten(0, 1))  # (B N, 2D)
        keys, values = projected.view(*cells.shape[:2], 2, self.heads, self.head_size).unbind(2)  # (B, N, h, d)
        return keys.permute(0, 2, 3, 1).contiguous(), values.transpose(1, 2).contiguous()

    def forward(self, projected_query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """self.query(q) (R, 2D) of R = B K rows -> F(k, v, q) (R, D), s (R, h, N).

        keys and values as in `keys_and_values`.
        """
        photos = keys.shape[0]  # not len(): torch.export would take it for a constant
        captions = projected_query.shape[0] // photos
        query = self.query_norm(F.elu(projected_query))
        query, gate = query.view(photos, captions, 2, self.heads, self.head_size).transpose(1, 3).unbind(2)
        pooled = self._pool(query, keys)  # b' (B h K, d / 2, N)
        by_caption = (photos, self.heads, captions, -1)
        scores = self.spatial.weight.expand(pooled.shape[0], -1, -1) @ pooled
        spatial = upcast(scores).view(by_caption).softmax(3)  # (B, h, K, N)
        channel = upcast(self.channel(pooled.mean(2).view(by_caption))).sigmoid()  # (B, h, K, d)
        attended = channel * gate * upcast(spatial.to(values.dtype) @ values)  # (B, h, K, d)
        return attended.transpose(1, 2).reshape(photos * captions, -1), spatial.transpose(1, 2).flatten(0, 1)

    def _pool(self, query: Tensor, keys: Tensor) -> Tensor:
        """b' (B h K, d / 2, N) of query (B, h, K, d) and keys (B, h, d, N).

        W_B (k_i * q) is computed as (W_B diag(q)) k_i, whose matrix is smaller than the products of all keys with q.
        """
        photos, heads, captions, size = query.shape
        weights = self.bilinear.weight * query.contiguous()[:, :, :, None]  # (B, h, K, d / 2, d)
        bias = self.bilinear.bias.repeat(captions)[None, :, None].to(keys.dtype)  # (1, K d / 2, 1)
        weights = weights.view(photos * heads, -1, size).to(keys.dtype)
        pooled = upcast(torch.baddbmm(bias, weights, keys.flatten(0, 1))).relu_()  # (B h, K d / 2, N)
        return pooled.view(photos * heads * captions, -1, keys.shape[3])


class XLinearLayer(nn.Module):
    """A layer of the encoder (section 4.2): relates the cells of a photo to the photo as a whole.

    v^m = F(k^(m-1), k^(m-1), v^(m-1))
    k_i^m = LayerNorm(relu(W_m [v^m, k_i^(m-1)]) + k_i^(m-1))
    """

    def __init__(self, size: int, heads: int, dropout: float):
        super().__init__()
        self.attention = XLinearAttention(size, size, size, heads)
        self.from_photo = nn.Linear(size, size)  # the two halves of W_m: the first is computed once per photo
        self.from_cell = nn.Linear(size, size, bias=False)
        self.norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, photo: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """v^(m-1) (B, D), k^(m-1) (B, N, D) -> v^m, k^m."""
        attention = self.attention
        photo, _ = attention(attention.query(photo), *attention.keys_and_values(cells))
        photo = self.dropout(photo)
        return photo, self.norm((self.from_photo(photo)[:, None] + self.from_cell(cells)).relu() + cells)


class Operations(NamedTuple):
    """The linear layers of one step: the modules themselves, or their faster equivalents in training."""

    context_gates: Layer
    hidden_gates: Layer
    query: Layer
    context: Layer


class XlanDecoder(nn.Module):
    """X-Linear attention between the cells of a photo, and between the cells and the words.

    k^0 = elu(W F),  v^0 = mean(k^0),  k^m, v^m as in XLinearLayer for m = 1 .. M      the encoder (section 4.2)
    g = LayerNorm(W_G [v^0, ..., v^M])                                                 the photo as a whole
    h_t = LSTM([E y_t-1, g + c_t-1], h_t-1)                                            the decoder (section 4.3)
    c_t = GLU(W_c [F(k^M, k^M, h_t), h_t]),  c_0 = 0
    p(y_t) = softmax(W_o c_t)

    F is computed by XLinearAttention. The cells are the native ones, so the attention shown, the mean of the heads, is
    spread to 14 x 14 cells and scaled to a sum of 1. The paper has 4 layers of 8 heads and D = H = E = 1024. Dropout
    applies to k^0, to v^m and F, to the c_t-1 that the LSTM reads, and to c_t before the output layer. Not taken from
    the authors' experiments: CELU with alpha 1.3 for elu, a smaller dropout inside the blocks, the activation of E y,
    the LayerNorm of F.
    """

    uses_attention = True
    has_sentinel = False
    uses_coverage = False

    def __init__(
        self,
        vocabulary_size: int,
        channels: int,
        embedding_size: int = 1024,
        attention_size: int = 1024,
        hidden_size: int = 1024,
        dropout: float = 0.5,
        encoder_layers: int = 4,
        heads: int = 8,
        positions: str = "none",
    ):
        """The default sizes are the paper's. positions: added to k^0; "learnt", "sinusoidal" or "none".

        Raises UserError unless the attention size is a multiple of two times the number of heads.
        """
        super().__init__()
        if attention_size % (2 * heads):
            raise UserError(f"--attention-size {attention_size}: must be a multiple of {2 * heads}, two times --heads")
        self.cell = nn.Linear(channels, attention_size)
        self.positions = make_positions(positions, attention_size)
        self.layers = nn.ModuleList(XLinearLayer(attention_size, heads, dropout) for _ in range(encoder_layers))
        self.photo = nn.Linear((encoder_layers + 1) * attention_size, hidden_size)
        self.photo_norm = nn.LayerNorm(hidden_size)
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        # The gates of the LSTM: from the word, from g + c_t-1, and from h_t-1
        self.word_gates = nn.Linear(embedding_size, 4 * hidden_size)
        self.context_gates = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.hidden_gates = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.attention = XLinearAttention(hidden_size, attention_size, attention_size, heads)
        self.context = nn.Linear(attention_size + hidden_size, 2 * hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.output_layer = OutputLayer(hidden_size, vocabulary_size)
        init_weights(self.embedding, self.output_layer)
        init_gates(hidden_size, self.word_gates, self.context_gates, self.hidden_gates)

    def init_state(self, grid: Grid) -> State:
        """per_photo: keys (B, h, d, N), values (B, h, N, d), pooling (B, P, N), photo_gates (B, 4H).

        per_caption: h and c of the LSTM, and the context (B, H).
        """
        cells, photo = self._encode(grid)
        keys, values = self.attention.keys_and_values(cells)
        pooling = grid.pooling.expand(keys.shape[0], -1, -1)  # a view: allocates nothing
        photo_gates = self.context_gates(photo)
        zeros = photo_gates.new_zeros(keys.shape[0], photo.shape[1], dtype=upcast(photo_gates).dtype)
        return State((keys, values, pooling, photo_gates), (zeros, zeros, zeros))

    def _encode(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """k^M (B, N, D) and g (B, H)."""
        cells = self.dropout(self.positions.add(F.elu(self.cell(grid.cells)), grid.pooling))
        photo = cells.mean(1)
        photos = [photo]
        for layer in self.layers:
            photo, cells = layer(photo, cells)
            photos.append(photo)
        return cells, self.photo_norm(self.photo(torch.cat(photos, 1)))

    def step(self, words: Tensor, state: State) -> Step:
        """See Decoder.step in captioning/decoders/protocol.py."""
        pooling, photo_gates = state.per_photo[2:]
        operations = Operations(self.context_gates, self.hidden_gates, self.attention.query, self.context)
        gates = self.word_gates(self.embedding(words)) + repeat_for_captions(photo_gates, words)
        per_caption, spatial = self._advance(operations, gates, state)
        logits = self.output_layer(self.dropout(per_caption[2]))  # (R, V)
        attention = spatial.mean(1).unflatten(0, (pooling.shape[0], -1))  # (B, K, N)
        attention = spread_attention(attention, pooling)
        return Step(F.log_softmax(upcast(logits), 1), attention, State(state.per_photo, per_caption))

    def forward(self, grid: Grid, words: PackedSequence, photo_index: Tensor) -> DecoderOutput:
        """See Decoder.forward in captioning/decoders/protocol.py.

        Captions are packed longest first, so the batch shrinks as they end and no padding is computed.
        """
        (keys, values, _, photo_gates), per_caption, _ = self.init_state(grid)
        step_sizes = words.batch_sizes.tolist()
        photo_of_word = photo_of_each_word(photo_index, step_sizes)  # (W,)
        gates = self.word_gates(self.embedding(words.data)) + photo_gates.index_select(0, photo_of_word)  # (W, 4H)
        layers = (self.context_gates, self.hidden_gates, self.attention.query, self.context)
        operations = Operations(*map(DeferredGradLinear, layers))
        state = State((keys, values), per_caption).expand_to_captions(photo_index)
        steps = run_steps(partial(self._advance, operations), gates, step_sizes, state)
        contexts = torch.cat([per_caption[2] for per_caption, _ in steps])  # (W, H)
        return DecoderOutput(self.output_layer(self.dropout(contexts)), None)  # (W, V): one product

    def _advance(self, operations: Operations, gates: Tensor, state: State) -> tuple[tuple[Tensor, ...], Tensor]:
        """Run one step: gates from word and photo (R, 4H), state -> next per_caption, s (R, h, N).

        state.per_photo: keys, values, and others that this does not use.
        """
        keys, values = state.per_photo[:2]
        hidden, cell, context = state.per_caption
        gates = gates + operations.context_gates(self.dropout(context)) + operations.hidden_gates(hidden)
        hidden, cell = lstm_update(gates, cell)
        attended, spatial = self.attention(operations.query(hidden), keys, values)
        context = F.glu(upcast(operations.context(torch.cat([self.dropout(attended), hidden], 1))), 1)
        return (hidden, cell, context), spatial
