"""Knowing When to Look (Lu et al. 2017): adaptive attention, with a visual sentinel.

Letters: B photos, R captions, K captions a photo, W words of all captions packed, N native cells, P output cells,
C channels, A attention, E embedding, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captioning.decoders.fast import AllSteps, Layer, in_parts
from captioning.decoders.protocol import State, Step, TeacherForced, full, initialise
from captioning.grid import Grid


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

    sees_cells = True
    has_sentinel = True
    covers = False

    def __init__(
        self, vocabulary_size: int, channels: int, embedding_size: int, attention_size: int, hidden_size: int,
        dropout: float,
    ):  # fmt: skip
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
        self.vocabulary = nn.Linear(hidden_size, vocabulary_size)
        initialise(self.embedding, self.vocabulary)
        for gates in (self.word_gates, self.photo_gates, self.hidden_gates):
            nn.init.uniform_(gates.weight, -(hidden_size**-0.5), hidden_size**-0.5)  # as torch.nn.LSTMCell

    def begin(self, grid: Grid) -> State:
        """photos: values (B, P, H), keys (B, P, A), the photo's share of the gates (B, 5H); rows: h and m (B, H)."""
        values = grid.spread(self.value(grid.cells)).relu()  # linear up to the relu: projected on the native cells
        gates = self.photo_gates(self.whole(grid.mean()).relu())
        nothing = values.new_zeros(values.shape[0], self.hidden_gates.in_features, dtype=full(gates).dtype)
        return State((values, self.key(values), gates), (nothing, nothing))

    def step(self, words: Tensor, state: State) -> Step:
        word_gates = self.word_gates(self.embedding(words))
        layers = self.hidden_gates, self.query, self.sentinel_key
        hidden, memory, attention, said = self._advance(word_gates, *state.rows, *state.photos, *layers)
        scores = self.vocabulary(self.dropout(said))  # (R, V)
        return Step(F.log_softmax(full(scores), 1), attention, State(state.photos, (hidden, memory)))

    def forward(self, grid: Grid, words: PackedSequence, photo: Tensor) -> TeacherForced:
        """Captions run longest first, so that the batch shrinks as they end: no padded row is ever computed."""
        state = self.begin(grid).of_captions(photo)
        says = []
        word_gates = self.word_gates(self.embedding(words.data))  # (W, 5H): they wait for no hidden state
        layers = [AllSteps(layer) for layer in (self.hidden_gates, self.query, self.sentinel_key)]
        for gates in word_gates.split(words.batch_sizes.tolist()):
            photos, rows = state.first(len(gates))
            hidden, memory, _, said = self._advance(gates, *rows, *photos, *layers)
            state = State(photos, (hidden, memory))
            says.append(said)
        return TeacherForced(self.vocabulary(self.dropout(torch.cat(says))), None)  # (W, V): one product for all words

    def _advance(
        self, word_gates: Tensor, hidden: Tensor, memory: Tensor, values: Tensor, keys: Tensor, photo_gates: Tensor,
        hidden_gates: Layer, query_of: Layer, sentinel_key: Layer,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """One step of R = B K rows over B photos -> h (R, H), m (R, H), attention (R, P), c + h (R, H)."""
        photos, rows = values.shape[0], hidden.shape[0]
        each = (photos, rows // photos, -1)  # (B, K, ...)
        gates = word_gates.view(each) + photo_gates[:, None] + hidden_gates(hidden).view(each)
        let_in, forget, candidate, let_out, let_speak = full(gates).view(rows, -1).chunk(5, 1)
        memory = forget.sigmoid() * memory + let_in.sigmoid() * candidate.tanh()
        hidden, sentinel = let_out.sigmoid() * memory.tanh(), let_speak.sigmoid() * memory.tanh()
        query = query_of(hidden)  # (R, A)
        cells = in_parts(self._scores, keys, query.view(each))  # (B, K, P)
        own = self.score((sentinel_key(sentinel) + query).tanh()).view(each)  # (B, K, 1)
        weights = full(torch.cat([cells, own], 2)).softmax(2)
        attention, beta = weights[..., :-1], weights[..., -1:]
        context = attention.to(values.dtype) @ values + beta * sentinel.view(each)  # (B, K, H)
        return hidden, memory, attention.reshape(rows, -1), context.view(rows, -1) + hidden

    def _scores(self, keys: Tensor, query: Tensor, out: Tensor | None = None) -> Tensor:
        """(B, P, A) and (B, K, A) -> the score of each cell (B, K, P); out (B, K, P, A): where to put the sums."""
        return self.score(torch.add(keys[:, None], query[:, :, None], out=out).tanh_()).squeeze(3)
