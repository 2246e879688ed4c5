"""Show and Tell (Vinyals et al. 2015): the photo is the first word that an LSTM reads.

Letters: B photos, R captions, W words of all captions packed, C channels, E embedding, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captioning.decoders.protocol import State, Step, TeacherForced, full, initialise
from captioning.grid import Grid
from captioning.ranks import RanksBatchNorm


class LstmDecoder(nn.Module):
    """x_-1 = BatchNorm(W mean(F));  x_t = E y_t;  p(y_t+1) = softmax(W_o LSTM(x_t))   (eq. 10-12)."""

    sees_cells = False  # the pooled map is all it looks at
    has_sentinel = False

    def __init__(self, vocabulary_size: int, channels: int, embedding_size: int, hidden_size: int, dropout: float):
        super().__init__()
        self.image = nn.Linear(channels, embedding_size)
        self.norm = RanksBatchNorm(embedding_size, momentum=0.01)
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.lstm = nn.LSTM(embedding_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.vocabulary = nn.Linear(hidden_size, vocabulary_size)
        initialise(self.embedding, self.vocabulary)

    def begin(self, grid: Grid) -> State:
        """The LSTM has read the photo, once however many captions it has: rows hold h and c (B, H)."""
        image = self.norm(self.image(grid.mean()))  # (B, E)
        _, (hidden, cell) = self.lstm(image[None])
        return State((), (hidden[0], cell[0]))

    def step(self, words: Tensor, state: State) -> Step:
        hidden, cell = state.rows
        _, (hidden, cell) = self.lstm(self.embedding(words)[None], (hidden[None], cell[None]))
        scores = self.vocabulary(hidden[0])  # (R, V)
        return Step(F.log_softmax(full(scores), 1), None, State((), (hidden[0], cell[0])))

    def forward(self, grid: Grid, words: PackedSequence, photo: Tensor) -> TeacherForced:
        hidden, cell = (rows[None] for rows in self.begin(grid).of_captions(photo).rows)
        packed = PackedSequence(self.embedding(words.data), words.batch_sizes)
        output, _ = self.lstm(packed, (hidden, cell))
        return TeacherForced(self.vocabulary(self.dropout(output.data)), None)  # (W, V)
