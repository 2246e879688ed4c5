"""Show and Tell: Vinyals et al. 2015, https://arxiv.org/abs/1411.4555.

A recurrent network reads the photo as its first word.

Legend: B photos, R captions, W words of all captions packed, L layers, C channels, E embedding size, H hidden size,
V vocabulary size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captioning.decoders.fused_ops import OutputLayer
from captioning.decoders.protocol import DecoderOutput, State, Step, init_weights, upcast
from captioning.encoders.grid import Grid
from captioning.runtime.distributed import SyncBatchNorm1d

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class LstmDecoder(nn.Module):
    """x_-1 = norm(W mean(F));  x_t = E y_t;  p(y_t+1) = softmax(W_o LSTM(x_t))   (eq. 10-12)"""

    uses_attention = False
    has_sentinel = False
    uses_coverage = False

    def __init__(
        self,
        vocabulary_size: int,
        channels: int,
        embedding_size: int = 512,
        hidden_size: int = 512,
        dropout: float = 0.5,
        cell: str = "lstm",
        layers: int = 1,
        photo_norm: str = "batch",
    ):
        """cell: "lstm", "gru" or "rnn" (tanh).

        photo_norm: "batch", batch normalisation of the photo's embedding, common in tutorials; "none", as in the paper.
        """
        super().__init__()
        self.photo_projection = nn.Linear(channels, embedding_size)
        self.norm = SyncBatchNorm1d(embedding_size, momentum=0.01) if photo_norm == "batch" else nn.Identity()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.recurrent = CELLS[cell](embedding_size, hidden_size, layers, dropout=dropout if layers > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)
        self.output_layer = OutputLayer(hidden_size, vocabulary_size)
        init_weights(self.embedding, self.output_layer)

    def init_state(self, grid: Grid) -> State:
        """The state after reading the photo, once for all its captions. per_caption: h (B, L, H), and c of an LSTM."""
        photo = self.norm(self.photo_projection(grid.mean()))  # (B, E)
        _, memory = self._recur(photo[None])
        return State((), _to_per_caption(memory))

    def step(self, words: Tensor, state: State) -> Step:
        """See Decoder.step in captioning/decoders/protocol.py."""
        output, memory = self._recur(self.embedding(words)[None], _to_memory(state.per_caption))
        logits = self.output_layer(self.dropout(output[0]))  # (R, V)
        return Step(F.log_softmax(upcast(logits), 1), None, State((), _to_per_caption(memory)))

    def forward(self, grid: Grid, words: PackedSequence, photo_index: Tensor) -> DecoderOutput:
        """See Decoder.forward in captioning/decoders/protocol.py."""
        embedded = PackedSequence(self.embedding(words.data), words.batch_sizes)
        state = self.init_state(grid).expand_to_captions(photo_index)
        output, _ = self._recur(embedded, _to_memory(state.per_caption))
        return DecoderOutput(self.output_layer(self.dropout(output.data)), None)  # (W, V)

    def _recur(self, inputs: Any, memory: Any = None) -> tuple[Any, Any]:
        """The recurrent network, in float32 where autocast would run it in float16 in place of bfloat16.

        The loss is not scaled for bfloat16, so gradients in float16 would underflow.
        """
        device_type = self.embedding.weight.device.type
        if not cudnn_takes_float16(device_type):
            return self.recurrent(inputs, memory)
        if isinstance(inputs, Tensor):
            inputs = upcast(inputs)
        with torch.autocast(device_type, enabled=False):
            return self.recurrent(inputs, memory)


def cudnn_takes_float16(device_type: str) -> bool:
    """Whether autocast converts to bfloat16 here, but what cuDNN's recurrent networks read always to float16."""
    if device_type != "cuda" or not torch.is_autocast_enabled(device_type):
        return False
    return torch.get_autocast_dtype(device_type) == torch.bfloat16


def _to_per_caption(memory: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """PyTorch's memory, h (L, R, H) or the pair (h, c) -> one row per caption, (R, L, H) each."""
    tensors = memory if isinstance(memory, tuple) else (memory,)
    return tuple(tensor.transpose(0, 1) for tensor in tensors)


def _to_memory(per_caption: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """The inverse of _to_per_caption."""
    memory = tuple(tensor.transpose(0, 1).contiguous() for tensor in per_caption)
    return memory if len(memory) > 1 else memory[0]
