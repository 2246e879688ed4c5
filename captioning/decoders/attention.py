"""Show, Attend and Tell (Xu et al. 2015), soft attention.

Letters: B photos, R captions, K captions a photo, W words of all captions packed, N native cells, P output cells,
C channels, A attention, E embedding, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from captioning.decoders.protocol import State, Step, TeacherForced, initialise
from captioning.grid import Grid


class AttentionDecoder(nn.Module):
    """e_t = w . relu(W_f F + W_h h_t-1)          the score of each cell       (eq. 4)
    a_t = softmax(e_t)                            the attention                (eq. 5)
    z_t = sigmoid(W_b h_t-1) * sum(a_t F)         the gated context            (eq. 13, section 4.2.1)
    h_t = LSTM([E y_t-1, z_t], h_t-1)             from W_i mean(F)             (eq. 1-3)
    p(y_t) = softmax(W_o h_t)
    """

    sees_cells = True

    def __init__(
        self, vocabulary_size: int, channels: int, embedding_size: int, attention_size: int, hidden_size: int,
        dropout: float,
    ):  # fmt: skip
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.key = nn.Linear(channels, attention_size)
        self.query = nn.Linear(hidden_size, attention_size)
        self.score = nn.Linear(attention_size, 1, bias=False)
        self.gate = nn.Linear(hidden_size, channels)
        self.initial = nn.Linear(channels, 2 * hidden_size)
        self.lstm = nn.LSTMCell(embedding_size + channels, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.vocabulary = nn.Linear(hidden_size, vocabulary_size)
        initialise(self.embedding, self.vocabulary)

    def begin(self, grid: Grid) -> State:
        """photos: cells (B, N, C), keys (B, P, A), pooling (B, P, N); rows: h and c (B, H)."""
        keys = grid.spread(self.key(grid.cells))  # projected once a photo, on the native cells: P (W_f F)
        pooling = grid.pooling.expand(len(grid), -1, -1)  # a view: it takes no memory
        return State((grid.cells, keys, pooling), self.initial(grid.mean()).float().chunk(2, 1))

    def step(self, words: Tensor, state: State) -> Step:
        hidden, cell, attention = self._advance(self._word_gates(words), *state.rows, *state.photos)
        scores = self.vocabulary(hidden)  # (R, V)
        return Step(F.log_softmax(scores.float(), 1), attention, State(state.photos, (hidden, cell)))

    def forward(self, grid: Grid, words: PackedSequence, photo: Tensor) -> TeacherForced:
        """Captions run longest first, so that the batch shrinks as they end: no padded row is ever computed."""
        state = self.begin(grid)
        cells, keys = (tensor.index_select(0, photo) for tensor in state.photos[:2])  # (R, N, C), (R, P, A)
        hidden, cell = (tensor.index_select(0, photo) for tensor in state.rows)  # (R, H)
        hiddens, attentions = [], []
        for gates in self._word_gates(words.data).split(words.batch_sizes.tolist()):
            rows = len(gates)
            hidden, cell, attention = self._advance(
                gates, hidden[:rows], cell[:rows], cells[:rows], keys[:rows], grid.pooling
            )
            hiddens.append(hidden)
            attentions.append(attention)
        scores = self.vocabulary(self.dropout(torch.cat(hiddens)))  # (W, V): one product for all words
        attention, _ = pad_packed_sequence(PackedSequence(torch.cat(attentions), words.batch_sizes), batch_first=True)
        return TeacherForced(scores, attention.sum(1))

    def _word_gates(self, words: Tensor) -> Tensor:
        """The words' part of the LSTM's gates (W, 4H): it waits for no hidden state, so all words go at once."""
        embedded = self.embedding(words)
        return F.linear(embedded, self.lstm.weight_ih[:, : embedded.shape[1]], self.lstm.bias_ih)

    def _advance(
        self, word_gates: Tensor, hidden: Tensor, cell: Tensor, cells: Tensor, keys: Tensor, pooling: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of R = B K rows over B photos -> h (R, H), c (R, H), attention (R, P)."""
        photos, rows = len(cells), len(hidden)
        query = self.query(hidden).view(photos, -1, 1, keys.shape[2])  # (B, K, 1, A)
        scores = self.score((keys[:, None] + query).relu_()).squeeze(3)  # (B, K, P)
        attention = scores.float().softmax(2)
        seen = (attention @ pooling).to(cells.dtype) @ cells  # (B, K, C): (a P) F
        context = torch.sigmoid(self.gate(hidden)) * seen.view(rows, -1)
        gates = (
            word_gates
            + F.linear(context, self.lstm.weight_ih[:, -context.shape[1] :])
            + F.linear(hidden, self.lstm.weight_hh, self.lstm.bias_hh)
        )
        let_in, forget, candidate, let_out = gates.float().chunk(4, 1)
        cell = forget.sigmoid() * cell + let_in.sigmoid() * candidate.tanh()
        hidden = let_out.sigmoid() * cell.tanh()
        return hidden, cell, attention.view(rows, -1)
