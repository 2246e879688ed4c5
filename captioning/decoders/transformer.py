"""A transformer: Vaswani et al. 2017, Attention Is All You Need, https://arxiv.org/abs/1706.03762, for captions.

Encoder layers over the native cells, optionally with the memory slots of M2 (Cornia et al. 2020,
https://arxiv.org/abs/1912.08226), and decoder layers over the words. The layers are pre-norm (Xiong et al. 2020,
https://arxiv.org/abs/2002.04745): x + f(norm(x)), with one more norm after the last layer.

Legend: B photos, R captions, K captions per photo, W words of all captions packed, T words of the longest one, N native
cells, P output cells, C channels, E embedding size, H hidden size (of all layers), M memory slots, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from captioning.decoders.fused_ops import OutputLayer
from captioning.decoders.positions import make_positions, sinusoids
from captioning.decoders.protocol import DecoderOutput, State, Step, init_weights, spread_attention, upcast
from captioning.encoders.grid import Grid
from captioning.errors import UserError


class TransformerDecoder(nn.Module):
    """p(y_t+1) = softmax(W_o decoder(E y_1 ... E y_t, cells)),  cells = encoder(relu(W F) + positions)

    The positions of words are sinusoidal (section 3.5), so a caption may have any length. The attention of a word is
    that of the last layer to the cells: the mean of its heads, resampled from the native to the output cells.
    """

    uses_attention = True
    has_sentinel = False
    uses_coverage = False

    def __init__(
        self,
        vocabulary_size: int,
        channels: int,
        embedding_size: int = 512,
        hidden_size: int = 512,
        layers: int = 3,
        encoder_layers: int = 3,
        heads: int = 8,
        feed_forward_size: int = 2048,
        memory_slots: int = 0,
        positions: str = "learnt",
        dropout: float = 0.1,
    ):
        """The default sizes are M2's. positions: of the cells, "learnt", "sinusoidal" or "none".

        Raises UserError if the heads do not divide the hidden size.
        """
        super().__init__()
        if hidden_size % heads:
            raise UserError(f"--heads {heads}: must divide --hidden-size, now {hidden_size}")
        self.dropout = nn.Dropout(dropout)
        self.cell_projection = nn.Linear(channels, hidden_size)
        self.positions = make_positions(positions, hidden_size)
        self.encoder_layers = nn.ModuleList(
            EncoderLayer(hidden_size, heads, feed_forward_size, self.dropout, memory_slots)
            for _ in range(encoder_layers)
        )
        self.encoder_norm = nn.LayerNorm(hidden_size)
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        of_one_size = embedding_size == hidden_size
        self.word_projection = nn.Identity() if of_one_size else nn.Linear(embedding_size, hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(hidden_size, heads, feed_forward_size, self.dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.output_layer = OutputLayer(hidden_size, vocabulary_size)
        init_weights(self.embedding, self.output_layer)

    @property
    def decoder_layers(self) -> Sequence[DecoderLayer]:
        """The layers, with their type."""
        return cast("Sequence[DecoderLayer]", self.layers)

    def encode(self, grid: Grid) -> Tensor:
        """The native cells as the decoder layers read them (B, N, H)."""
        cells = self.dropout(self.positions.add(self.cell_projection(grid.cells).relu(), grid.pooling))
        for layer in self.encoder_layers:
            cells = layer(cells)
        return self.encoder_norm(cells)

    def init_state(self, grid: Grid) -> State:
        """per_photo: pooling (B, P, N) and, of each layer, the keys and values of the cells (B, N, 2H).

        growing: of each layer, the keys and values of the words read so far (B, t, 2H); t = 0.
        """
        cells = self.encode(grid)
        of_cells = [layer.cell_keys_values(cells) for layer in self.decoder_layers]
        pooling = grid.pooling.expand(cells.shape[0], -1, -1)  # a view: allocates nothing
        return State((pooling, *of_cells), (), tuple(keys_values[:, :0] for keys_values in of_cells))

    def step(self, words: Tensor, state: State) -> Step:
        """See Decoder.step in captioning/decoders/protocol.py."""
        pooling, *of_cells = state.per_photo
        hidden = self.embed(words)
        hidden = self.dropout(hidden + sinusoids(state.growing[0].shape[1], hidden.shape[1], hidden))
        growing = []
        attention = hidden  # of the last layer, below
        for layer, of_photos, of_words in zip(self.decoder_layers, of_cells, state.growing, strict=True):
            hidden, attention, of_words = layer.step(hidden, of_photos, of_words)
            growing.append(of_words)
        logits = self.output_layer(self.norm(hidden))  # (R, V)
        attention = spread_attention(attention, pooling)
        return Step(F.log_softmax(upcast(logits), 1), attention, State(state.per_photo, (), tuple(growing)))

    def forward(self, grid: Grid, words: PackedSequence, photo_index: Tensor) -> DecoderOutput:
        """See Decoder.forward in captioning/decoders/protocol.py.

        All words at once. Only the attention itself computes padding: a causal mask keeps it from the words, since it
        follows them.
        """
        cells = self.encode(grid)
        packing = Packing(words.batch_sizes)
        steps = torch.arange(len(words.batch_sizes), device=cells.device)
        hidden = self.embed(words.data)  # (W, H)
        positions = sinusoids(steps[:, None], hidden.shape[1], hidden)  # (T, H)
        hidden = self.dropout(hidden + packing.pack(positions.expand(len(photo_index), -1, -1)))
        for layer in self.decoder_layers:
            of_captions = layer.cell_keys_values(cells).index_select(0, photo_index)  # (R, N, 2H)
            hidden = layer(hidden, of_captions, packing)
        return DecoderOutput(self.output_layer(self.norm(hidden)), None)  # (W, V): one product for all words

    def embed(self, words: Tensor) -> Tensor:
        """Words int64 (...) -> (..., H), scaled by sqrt(H) (Vaswani et al., section 3.4)."""
        return self.word_projection(self.embedding(words)) * math.sqrt(self.norm.weight.shape[0])


class Packing:
    """Converts words from packed to one row per caption, and back."""

    def __init__(self, batch_sizes: Tensor):
        """batch_sizes: int64 (T,) of a PackedSequence, on the CPU."""
        self.batch_sizes = batch_sizes
        self.lengths = (batch_sizes[:, None] > torch.arange(int(batch_sizes[0]))).sum(0)  # (R,)

    def pad(self, values: Tensor) -> Tensor:
        """(W, H) -> (R, T, H), zero after the end of a caption."""
        return pad_packed_sequence(PackedSequence(values, self.batch_sizes), batch_first=True)[0]

    def pack(self, values: Tensor) -> Tensor:
        """(R, T, H) -> (W, H)."""
        return pack_padded_sequence(values, self.lengths, batch_first=True).data


class FeedForward(nn.Sequential):
    """W_2 dropout(relu(W_1 x))   (Vaswani et al., eq. 2)"""

    def __init__(self, size: int, inner_size: int, dropout: nn.Dropout):
        super().__init__(nn.Linear(size, inner_size), nn.ReLU(), dropout, nn.Linear(inner_size, size))


class EncoderLayer(nn.Module):
    """Self-attention of the cells and of M memory slots, learnt keys and values of no cell; then a feed-forward layer.

    attention(W_q X, [W_k X, M_k], [W_v X, M_v])   (Cornia et al. 2020, section 3.1)
    """

    def __init__(self, size: int, heads: int, inner_size: int, dropout: nn.Dropout, memory_slots: int = 0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(size)
        self.query_keys_values = nn.Linear(size, 3 * size)
        self.attention_output = nn.Linear(size, size)
        self.feed_forward_norm = nn.LayerNorm(size)
        self.feed_forward = FeedForward(size, inner_size, dropout)
        init_xavier(self)
        slots = torch.randn(memory_slots, 2 * size) / math.sqrt(size // heads) if memory_slots else None
        self.memory_slots = None if slots is None else nn.Parameter(slots)  # (M, 2H): M_k and M_v

    def forward(self, cells: Tensor) -> Tensor:
        """(B, N, H) -> (B, N, H)."""
        query, keys_values = split_query(self.query_keys_values(self.attention_norm(cells)))
        if self.memory_slots is not None:
            slots = self.memory_slots.to(keys_values.dtype).expand(cells.shape[0], -1, -1)
            keys_values = torch.cat([keys_values, slots], 1)
        attended = attend(query, keys_values, self.heads, self.dropout)
        cells = cells + self.dropout(self.attention_output(attended))
        return cells + self.dropout(self.feed_forward(self.feed_forward_norm(cells)))


class DecoderLayer(nn.Module):
    """Self-attention of the words, attention of the words to the cells, a feed-forward layer."""

    def __init__(self, size: int, heads: int, inner_size: int, dropout: nn.Dropout):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(size)
        self.query_keys_values = nn.Linear(size, 3 * size)
        self.attention_output = nn.Linear(size, size)
        self.cell_attention_norm = nn.LayerNorm(size)
        self.cell_query = nn.Linear(size, size)
        self.cell_keys_values = nn.Linear(size, 2 * size)
        self.cell_attention_output = nn.Linear(size, size)
        self.feed_forward_norm = nn.LayerNorm(size)
        self.feed_forward = FeedForward(size, inner_size, dropout)
        init_xavier(self)

    def forward(self, hidden: Tensor, of_cells: Tensor, packing: Packing) -> Tensor:
        """All words: hidden (W, H); keys and values of the cells, of_cells (R, N, 2H) -> (W, H)."""
        query, of_words = split_query(packing.pad(self.query_keys_values(self.attention_norm(hidden))))
        attended = packing.pack(attend(query, of_words, self.heads, self.dropout, causal=True))
        hidden = hidden + self.dropout(self.attention_output(attended))
        query = packing.pad(self.cell_query(self.cell_attention_norm(hidden)))
        attended = packing.pack(attend(query, of_cells, self.heads, self.dropout))
        return self._finish(hidden, attended)

    def step(self, hidden: Tensor, of_cells: Tensor, of_words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One word of R = B K captions: hidden (R, H); keys and values of_cells (B, N, 2H) and of_words (R, t, 2H).

        Returns hidden (R, H), the attention to the cells (B, K, N), and of_words with this word (R, t + 1, 2H).
        """
        query, of_word = split_query(self.query_keys_values(self.attention_norm(hidden))[:, None])
        of_words = torch.cat([of_words, of_word], 1)
        attended = attend(query, of_words, self.heads, self.dropout)[:, 0]
        hidden = hidden + self.dropout(self.attention_output(attended))
        query = self.cell_query(self.cell_attention_norm(hidden))
        query = query.view(of_cells.shape[0], -1, query.shape[1])  # (B, K, H)
        attended, attention = attend_visibly(query, of_cells, self.heads, self.dropout)
        return self._finish(hidden, attended.flatten(0, 1)), attention, of_words

    def _finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Add the attended cells (W, H) to hidden (W, H), and run the feed-forward layer."""
        hidden = hidden + self.dropout(self.cell_attention_output(attended))
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))


def attend(query: Tensor, keys_values: Tensor, heads: int, dropout: nn.Dropout, causal: bool = False) -> Tensor:
    """Multi-head attention (Vaswani et al., eq. 1): query (B, T, H), keys_values (B, N, 2H) -> (B, T, H)."""
    keys, values = keys_values.chunk(2, 2)
    probability = dropout.p if dropout.training else 0.0
    attended = F.scaled_dot_product_attention(
        split_heads(query, heads), split_heads(keys, heads), split_heads(values, heads), None, probability, causal
    )
    return join_heads(attended)


def attend_visibly(query: Tensor, keys_values: Tensor, heads: int, dropout: nn.Dropout) -> tuple[Tensor, Tensor]:
    """What `attend` returns, and the attention itself (B, T, N), the mean of the heads, before dropout."""
    keys, values = (split_heads(part, heads) for part in keys_values.chunk(2, 2))
    scores = split_heads(query, heads) @ keys.mT / math.sqrt(keys.shape[3])  # (B, heads, T, N)
    attention = upcast(scores).softmax(3)
    return join_heads(dropout(attention).to(values.dtype) @ values), attention.mean(1)


def split_query(query_keys_values: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, 3H) -> query (B, T, H), keys and values (B, T, 2H)."""
    size = query_keys_values.shape[2] // 3
    return query_keys_values[..., :size], query_keys_values[..., size:]


def split_heads(values: Tensor, heads: int) -> Tensor:
    """(B, T, H) -> (B, heads, T, H / heads)."""
    return values.unflatten(2, (heads, -1)).transpose(1, 2)


def join_heads(values: Tensor) -> Tensor:
    """The inverse of split_heads."""
    return values.transpose(1, 2).flatten(2)


def init_xavier(module: nn.Module) -> None:
    """Initialise the linear layers as torch.nn.Transformer does: Xavier uniform, with zero bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
