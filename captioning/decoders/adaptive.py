"""Knowing When to Look (Lu et al. 2017): adaptive attention, with a visual sentinel.

Letters: B photos, R captions, K captions a photo, W words of all captions packed, N native cells, P output cells,
C channels, A attention, E embedding, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captioning.decoders.fused_ops import ChunkedAttentionScores, DeferredGradLinear, all_words
from captioning.decoders.protocol import DecoderOutput, State, Step, init_weights, upcast
from captioning.encoders.grid import Grid


class AdaptiveDecoder(nn.Module):
    """v = relu(W_a F),  v^g = relu(W_b mean(F))                           (eq. 14-15)
    x_t = [E y_t-1, v^g],  h_t, m_t = LSTM(x_t, h_t-1)                     (section 2.3)
    s_t = sigmoid(W_x x_t + W_h h_t-1) * tanh(m_t)                         the sentinel     (eq. 9-10)
    z_t = w . tanh(W_v v + W_g h_t),  z^s_t = w . tanh(W_s s_t + W_g h_t)                   (eq. 6, 12)
    [a_t, beta_t] = softmax([z_t, z^s_t])                                  one softmax over the cells and the sentinel
    c_t = sum(a_t v) + beta_t s_t                                          (eq. 11: a_t is (1 - beta_t) alpha_t)
    p(y_t) = softmax(W_p (c_t + h_t))                                      (eq. 13)

    A word's attention a_t sums to 1 - beta_t: what is missing to one came from language alone.
    """

    uses_attention = True
    has_sentinel = True
    uses_coverage = False

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
        self.value = nn.Linear(channels, hidden_size)
        self.whole = nn.Linear(channels, embedding_size)
        self.key = nn.Linear(hidden_size, attention_size, bias=False)
        self.query = nn.Linear(hidden_size, attention_size)
        self.sentinel_key = nn.Linear(hidden_size, attention_size, bias=False)
        self.score = nn.Linear(attention_size, 1, bias=False)
        # The LSTM's four gates and the sentinel's, from the word, from the photo, from the hidden state
        self.word_gates = nn.Linear(embedding_size, 5 * hidden_size)
        self.photo_gates = nn.Linear(embedding_size, 5 * hidden_size, bias=False)
        self.hidden_gates = nn.Linear(hidden_size, 5 * hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.output_layer = nn.Linear(hidden_size, vocabulary_size)
        init_weights(self.embedding, self.output_layer)
        for gates in (self.word_gates, self.photo_gates, self.hidden_gates):
            nn.init.uniform_(gates.weight, -(hidden_size**-0.5), hidden_size**-0.5)  # as torch.nn.LSTMCell

    def init_state(self, grid: Grid) -> State:
        """photos: values (B, P, H), keys (B, P, A), the photo's share of the gates (B, 5H); rows: h and m (B, H)."""
        values = grid.spread(self.value(grid.cells)).relu()  # linear up to the relu: projected on the native cells
        gates = self.photo_gates(self.whole(grid.mean()).relu())
        nothing = values.new_zeros(values.shape[0], self.hidden_gates.in_features, dtype=upcast(gates).dtype)
        return State((values, self.key(values), gates), (nothing, nothing))

    def step(self, words: Tensor, state: State) -> Step:
        (values, keys, photo_gates), (hidden, memory) = state
        captions = words.shape[0] // values.shape[0]  # of a photo; not len: torch.export would take it for a constant
        gates = self.word_gates(self.embedding(words)) + photo_gates.repeat_interleave(captions, 0)
        hidden, memory, sentinel = self._remember(gates + self.hidden_gates(hidden), memory)
        attention, said = self._look(values, keys, hidden, sentinel)
        scores = self.output_layer(self.dropout(said))  # (R, V)
        return Step(F.log_softmax(upcast(scores), 1), attention, State(state.per_photo, (hidden, memory)))

    def forward(self, grid: Grid, words: PackedSequence, photo: Tensor) -> DecoderOutput:
        """No hidden state sees what was attended to: all of them come first, then every word looks at its photo.

        Captions run longest first, so that the batch shrinks as they end: no padded row is ever computed.
        """
        values, keys, photo_gates = self.init_state(grid).per_photo
        sizes = words.batch_sizes.tolist()
        whose = torch.cat([photo[:rows] for rows in sizes])  # (W,): each word's photo
        gates = self.word_gates(self.embedding(words.data)) + photo_gates.index_select(0, whose)  # (W, 5H)
        from_hidden = DeferredGradLinear(self.hidden_gates)
        hidden = memory = gates.new_zeros(len(photo), self.hidden_gates.in_features, dtype=upcast(gates).dtype)
        hiddens, sentinels = [], []
        for now in gates.split(sizes):
            hidden, memory, sentinel = self._remember(now + from_hidden(hidden[: len(now)]), memory[: len(now)])
            hiddens.append(hidden)
            sentinels.append(sentinel)
        rows = torch.cat(hiddens), torch.cat(sentinels)  # (W, H)
        said = all_words(lambda *both: self._look(*both)[1], (values, keys), rows, photo, sizes)
        return DecoderOutput(self.output_layer(self.dropout(said)), None)  # (W, V): one product for all words

    def _remember(self, gates: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What all feed to the gates (R, 5H), and m_t-1 (R, H) -> h_t, m_t, s_t (R, H)."""
        let_in, forget, candidate, let_out, let_speak = upcast(gates).chunk(5, 1)
        memory = forget.sigmoid() * memory + let_in.sigmoid() * candidate.tanh()
        said = memory.tanh()
        return let_out.sigmoid() * said, memory, let_speak.sigmoid() * said

    def _look(self, values: Tensor, keys: Tensor, hidden: Tensor, sentinel: Tensor) -> tuple[Tensor, Tensor]:
        """h_t and s_t (R, H) of R = B K rows over B photos -> the cells' attention (R, P), c_t + h_t (R, H)."""
        each = (values.shape[0], hidden.shape[0] // values.shape[0], -1)  # (B, K, ...)
        query = self.query(hidden)  # (R, A)
        cells = ChunkedAttentionScores("tanh", keys, self.score.weight)(query.view(each))  # (B, K, P)
        own = self.score((self.sentinel_key(sentinel) + query).tanh()).view(each)  # (B, K, 1)
        weights = torch.cat([upcast(cells), upcast(own)], 2).softmax(2)
        attention, beta = weights[..., :-1], weights[..., -1:]
        context = attention.to(values.dtype) @ values + beta * sentinel.view(each)  # (B, K, H)
        return attention.flatten(0, 1), context.flatten(0, 1) + hidden
