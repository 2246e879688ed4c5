"""Adaptive attention with a visual sentinel: Lu et al. 2017, Knowing When to Look, https://arxiv.org/abs/1612.01887.

Legend: B photos, R captions, K captions per photo, W words of all captions packed, N native cells, P output cells,
C channels, A attention size, E embedding size, H hidden size, V vocabulary size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captioning.decoders.fused_ops import ChunkedAttentionScores, DeferredGradLinear, OutputLayer, attend_all_steps
from captioning.decoders.positions import make_positions
from captioning.decoders.protocol import (
    DecoderOutput,
    State,
    Step,
    init_gates,
    init_weights,
    photo_of_each_word,
    repeat_for_captions,
    upcast,
)
from captioning.encoders.grid import Grid


class AdaptiveDecoder(nn.Module):
    """An LSTM whose words attend to the cells of the photo and to a sentinel, which stands for the language context.

    v = relu(W_a F),  v^g = relu(W_b mean(F))                              (section 2.3)
    x_t = [E y_t-1, v^g],  h_t, m_t = LSTM(x_t, h_t-1)                     (section 2.3)
    s_t = sigmoid(W_x x_t + W_h h_t-1) * tanh(m_t)                         the sentinel     (eq. 9-10)
    z_t = w . tanh(W_v v + W_g h_t),  z^s_t = w . tanh(W_s s_t + W_g h_t)                   (eq. 6, 12)
    [a_t, beta_t] = softmax([z_t, z^s_t])                                  one softmax over the cells and the sentinel
    c_t = sum(a_t v) + beta_t s_t                                          (eq. 11: a_t is (1 - beta_t) alpha_t)
    p(y_t) = softmax(W_p (c_t + h_t))                                      (eq. 13)

    The attention a_t of a word sums to 1 - beta_t, where beta_t is the weight of the sentinel.
    """

    uses_attention = True
    has_sentinel = True
    uses_coverage = False

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
        self.value = nn.Linear(channels, hidden_size)  # W_a
        self.whole = nn.Linear(channels, embedding_size)  # W_b; checkpoints have this name
        self.key = nn.Linear(hidden_size, attention_size, bias=False)
        self.query = nn.Linear(hidden_size, attention_size)
        self.sentinel_key = nn.Linear(hidden_size, attention_size, bias=False)
        self.score = nn.Linear(attention_size, 1, bias=False)
        # The LSTM's four gates and the sentinel's: from the word, from the photo, from the hidden state
        self.word_gates = nn.Linear(embedding_size, 5 * hidden_size)
        self.photo_gates = nn.Linear(embedding_size, 5 * hidden_size, bias=False)
        self.hidden_gates = nn.Linear(hidden_size, 5 * hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.output_layer = OutputLayer(hidden_size, vocabulary_size)
        init_weights(self.embedding, self.output_layer)
        init_gates(hidden_size, self.word_gates, self.photo_gates, self.hidden_gates)

    def init_state(self, grid: Grid) -> State:
        """per_photo: values (B, P, H), keys (B, P, A), photo_gates (B, 5H). per_caption: h and m (B, H)."""
        grid = self.positions.add_to_cells(grid)
        values = grid.spread(self.value(grid.cells)).relu()  # linear up to the relu: project the native cells
        photo_gates = self.photo_gates(self.whole(grid.mean()).relu())
        zeros = self._zeros(photo_gates, values.shape[0])
        return State((values, self.key(values), photo_gates), (zeros, zeros))

    def step(self, words: Tensor, state: State) -> Step:
        """See Decoder.step in captioning/decoders/protocol.py."""
        values, keys, photo_gates = state.per_photo
        hidden, memory = state.per_caption
        gates = self.word_gates(self.embedding(words)) + repeat_for_captions(photo_gates, words)
        hidden, memory, sentinel = self.lstm_cell(gates + self.hidden_gates(hidden), memory)
        attention, attended = self.attend(values, keys, hidden, sentinel)
        logits = self.output_layer(self.dropout(attended))  # (R, V)
        return Step(F.log_softmax(upcast(logits), 1), attention, State(state.per_photo, (hidden, memory)))

    def forward(self, grid: Grid, words: PackedSequence, photo_index: Tensor) -> DecoderOutput:
        """See Decoder.forward in captioning/decoders/protocol.py.

        The LSTM does not read the attended context: compute all hidden states first, then the attention of all words.
        Captions are packed longest first, so the batch shrinks as they end and no padding is computed.
        """
        values, keys, photo_gates = self.init_state(grid).per_photo
        step_sizes = words.batch_sizes.tolist()
        photo_of_word = photo_of_each_word(photo_index, step_sizes)  # (W,)
        gates = self.word_gates(self.embedding(words.data)) + photo_gates.index_select(0, photo_of_word)  # (W, 5H)
        from_hidden = DeferredGradLinear(self.hidden_gates)
        hidden = memory = self._zeros(gates, len(photo_index))
        hiddens: list[Tensor] = []
        sentinels: list[Tensor] = []
        for step_gates in gates.split(step_sizes):
            rows = len(step_gates)
            hidden, memory, sentinel = self.lstm_cell(step_gates + from_hidden(hidden[:rows]), memory[:rows])
            hiddens.append(hidden)
            sentinels.append(sentinel)
        per_word = torch.cat(hiddens), torch.cat(sentinels)  # (W, H)
        attended = attend_all_steps(
            lambda *tensors: self.attend(*tensors)[1], (values, keys), per_word, photo_index, step_sizes
        )
        return DecoderOutput(self.output_layer(self.dropout(attended)), None)  # (W, V): one product for all words

    def _zeros(self, gates: Tensor, rows: int) -> Tensor:
        """The initial hidden state or memory (rows, H)."""
        return gates.new_zeros(rows, self.hidden_gates.in_features, dtype=upcast(gates).dtype)

    def lstm_cell(self, gates: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """LSTM cell with a sentinel: summed gate pre-activations (R, 5H), m_t-1 (R, H) -> h_t, m_t, s_t (R, H)."""
        input_gate, forget_gate, candidate, output_gate, sentinel_gate = upcast(gates).chunk(5, 1)
        memory = forget_gate.sigmoid() * memory + input_gate.sigmoid() * candidate.tanh()
        activated = memory.tanh()
        return output_gate.sigmoid() * activated, memory, sentinel_gate.sigmoid() * activated

    def attend(self, values: Tensor, keys: Tensor, hidden: Tensor, sentinel: Tensor) -> tuple[Tensor, Tensor]:
        """values (B, P, H), keys (B, P, A), h_t and s_t (R, H) of R = B K rows -> a_t (R, P), c_t + h_t (R, H)."""
        shape = (values.shape[0], hidden.shape[0] // values.shape[0], -1)  # (B, K, ...)
        query = self.query(hidden)  # (R, A)
        cell_scores = ChunkedAttentionScores("tanh", keys, self.score.weight)(query.view(shape))  # (B, K, P)
        sentinel_score = self.score((self.sentinel_key(sentinel) + query).tanh()).view(shape)  # (B, K, 1)
        weights = torch.cat([upcast(cell_scores), upcast(sentinel_score)], 2).softmax(2)
        attention = weights[..., :-1]
        beta = weights[..., -1:]
        context = attention.to(values.dtype) @ values + beta * sentinel.view(shape)  # (B, K, H)
        return attention.flatten(0, 1), context.flatten(0, 1) + hidden
