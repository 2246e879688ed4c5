"""Show and Tell (Vinyals et al. 2015): the photo is the first word that a recurrent network reads.

Letters: B photos, R captions, W words of all captions packed, L layers, C channels, E embedding, H hidden,
V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captioning.decoders.protocol import DecoderOutput, State, Step, init_weights, upcast
from captioning.encoders.grid import Grid
from captioning.runtime.distributed import SyncBatchNorm1d

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class LstmDecoder(nn.Module):
    """x_-1 = norm(W mean(F));  x_t = E y_t;  p(y_t+1) = softmax(W_o LSTM(x_t))   (eq. 10-12)

    cell: lstm, gru or rnn (tanh). photo_norm: batch, as the tutorials have it; none, as the paper.
    """

    uses_attention = False  # the pooled map is all it looks at
    has_sentinel = False
    uses_coverage = False

    def __init__(
        self,
        vocabulary_size: int,
        channels: int,
        embedding_size: int,
        hidden_size: int,
        dropout: float,
        cell: str = "lstm",
        layers: int = 1,
        photo_norm: str = "batch",
    ):
        super().__init__()
        self.photo_projection = nn.Linear(channels, embedding_size)
        self.norm = SyncBatchNorm1d(embedding_size, momentum=0.01) if photo_norm == "batch" else nn.Identity()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.recurrent = CELLS[cell](embedding_size, hidden_size, layers, dropout=dropout if layers > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)
        self.output_layer = nn.Linear(hidden_size, vocabulary_size)
        init_weights(self.embedding, self.output_layer)

    def init_state(self, grid: Grid) -> State:
        """The network has read the photo, once however many captions it has: rows hold h (B, L, H), and an LSTM's c."""
        photo = self.norm(self.photo_projection(grid.mean()))  # (B, E)
        return State((), _rows(self.recurrent(photo[None])[1]))

    def step(self, words: Tensor, state: State) -> Step:
        output, memory = self.recurrent(self.embedding(words)[None], _memory(state.per_caption))
        scores = self.output_layer(self.dropout(output[0]))  # (R, V)
        return Step(F.log_softmax(upcast(scores), 1), None, State((), _rows(memory)))

    def forward(self, grid: Grid, words: PackedSequence, photo: Tensor) -> DecoderOutput:
        packed = PackedSequence(self.embedding(words.data), words.batch_sizes)
        output, _ = self.recurrent(packed, _memory(self.init_state(grid).expand_to_captions(photo).per_caption))
        return DecoderOutput(self.output_layer(self.dropout(output.data)), None)  # (W, V)


def _rows(memory: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """torch's memory, (L, R, H) or a pair of it -> a row a caption (R, L, H)."""
    return tuple(tensor.transpose(0, 1) for tensor in (memory if isinstance(memory, tuple) else (memory,)))


def _memory(rows: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    memory = tuple(tensor.transpose(0, 1).contiguous() for tensor in rows)
    return memory if len(memory) > 1 else memory[0]
