"""Reference implementations for the benchmarks, written like the widely read tutorials of the two papers.

Show, Attend and Tell: Xu et al., 2015, https://arxiv.org/abs/1502.03044
Show and Tell: Vinyals et al., 2015, https://arxiv.org/abs/1411.4555

One copy of the photo per caption, all 196 cells projected at every word, the output layer once per step over padded
rows, beam search over one photo at a time.

Letters: B captions (each with its own copy of its photo), T words of the longest caption, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torchvision import models

from captioning.decoders.attention import AttentionDecoder
from captioning.decoders.lstm import LstmDecoder
from captioning.encoders.grid import GRID_SIZE
from preprocess.vocabulary import END, START


class TutorialEncoder(nn.Module):
    """A frozen ResNet: photos (B, 3, S, S) float32 -> (B, 14, 14, C), run once per caption."""

    def __init__(self, name: str):
        super().__init__()
        self.body = nn.Sequential(*list(models.get_model(name).children())[:-2])
        self.pool = nn.AdaptiveAvgPool2d(GRID_SIZE)
        self.eval().requires_grad_(False)

    def forward(self, photos: Tensor) -> Tensor:
        return self.pool(self.body(photos)).permute(0, 2, 3, 1)


class TutorialAttention(nn.Module):
    """Show, Attend and Tell."""

    def __init__(self, vocabulary: int, channels: int, embedding: int, attention: int, hidden: int, dropout: float):
        super().__init__()
        self.key = nn.Linear(channels, attention)
        self.query = nn.Linear(hidden, attention)
        self.score = nn.Linear(attention, 1)
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.cell = nn.LSTMCell(embedding + channels, hidden)
        self.initial_h = nn.Linear(channels, hidden)
        self.initial_c = nn.Linear(channels, hidden)
        self.gate = nn.Linear(hidden, channels)
        self.dropout = nn.Dropout(dropout)
        self.output_layer = nn.Linear(hidden, vocabulary)

    def attend(self, cells: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """cells (B, 196, C), hidden (B, H) -> the context (B, C), and the attention (B, 196)."""
        scores = self.score(F.relu(self.key(cells) + self.query(hidden)[:, None])).squeeze(2)
        alpha = scores.softmax(1)
        return (cells * alpha[:, :, None]).sum(1), alpha

    def init_state(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        mean = cells.mean(1)
        return self.initial_h(mean), self.initial_c(mean)

    def step(self, embedded: Tensor, cells: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context, alpha = self.attend(cells, h)
        h, c = self.cell(torch.cat([embedded, self.gate(h).sigmoid() * context], 1), (h, c))
        return h, c, alpha

    def forward(self, features: Tensor, captions: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """features (B, 14, 14, C), captions (B, T + 1) longest first, lengths: target words -> logits, alphas."""
        cells = features.flatten(1, 2)
        embedded = self.embedding(captions)
        h, c = self.init_state(cells)
        logits = cells.new_zeros(len(cells), max(lengths), self.output_layer.out_features)
        alphas = cells.new_zeros(len(cells), max(lengths), GRID_SIZE * GRID_SIZE)
        for step in range(max(lengths)):
            rows = sum(length > step for length in lengths)
            h, c, alpha = self.step(embedded[:rows, step], cells[:rows], h[:rows], c[:rows])
            logits[:rows, step] = self.output_layer(self.dropout(h)).to(logits.dtype)
            alphas[:rows, step] = alpha
        return logits, alphas

    def loss(self, features: Tensor, captions: Tensor, lengths: list[int], alpha_c: float = 1.0) -> Tensor:
        logits, alphas = self(features, captions, lengths)
        logits = pack_padded_sequence(logits, lengths, batch_first=True).data
        targets = pack_padded_sequence(captions[:, 1:], lengths, batch_first=True).data
        return F.cross_entropy(logits, targets) + alpha_c * ((1 - alphas.sum(1)) ** 2).mean()

    @torch.no_grad()
    def beam_search(self, features: Tensor, beams: int, max_length: int, refill: bool = False) -> list[int]:
        """features (14, 14, C) of one photo -> the ids of its best caption, without <start> and <end>.

        In the tutorial, a finished hypothesis leaves the beam, which becomes smaller until it is empty. refill: as in
        captioning/search/beam_search.py, the beam keeps its size until no unfinished hypothesis can become the best.
        """
        vocab_size = self.output_layer.out_features
        width = beams
        cells = features.flatten(0, 1).expand(beams, -1, -1)
        words = torch.full((beams, 1), START)
        totals = torch.zeros(beams, 1)
        h, c = self.init_state(cells)
        finished: list[tuple[float, list[int]]] = []
        for step in range(max_length + 1):
            h, c, _ = self.step(self.embedding(words[:, -1]), cells, h, c)
            log_probabilities = F.log_softmax(self.output_layer(h), 1)
            log_probabilities[:, : START + 1] = -torch.inf  # never <pad>, <unk>, <start>
            candidates = totals + log_probabilities
            best, indices = (candidates[0] if step == 0 else candidates.flatten()).topk(width)
            parents = indices // vocab_size
            following = indices % vocab_size
            for row in (following == END).nonzero()[:, 0].tolist():
                finished.append((best[row].item(), words[parents[row], 1:].tolist()))
            unfinished = following != END
            width = beams if refill else int(unfinished.sum())
            if (
                step == max_length
                or not unfinished.any()
                or (refill and finished and best[unfinished].max() <= max(finished)[0])
            ):
                break
            parents = parents[unfinished]
            totals = best[unfinished][:, None]
            words = torch.cat([words[parents], following[unfinished][:, None]], 1)
            h = h[parents]
            c = c[parents]
            cells = features.flatten(0, 1).expand(len(parents), -1, -1)
        return max(finished)[1] if finished else words[0, 1:].tolist()

    @torch.no_grad()
    def copy_weights(self, decoder: AttentionDecoder) -> TutorialAttention:
        """Take the weights of Kantu's decoder, which stores them in fewer, larger matrices."""
        query, gate, gates = decoder.from_hidden.weight.split(decoder.split_sizes)
        query_bias, gate_bias, gates_bias = decoder.from_hidden.bias.split(decoder.split_sizes)
        initial_h, initial_c = decoder.initial.weight.chunk(2)
        initial_h_bias, initial_c_bias = decoder.initial.bias.chunk(2)
        for parameter, value in {
            self.key.weight: decoder.key.weight,
            self.key.bias: decoder.key.bias,
            self.query.weight: query,
            self.query.bias: query_bias,
            self.score.weight: decoder.score.weight,
            self.score.bias: torch.zeros(1),
            self.embedding.weight: decoder.embedding.weight,
            self.cell.weight_ih: torch.cat([decoder.word_gates.weight, decoder.context_gates.weight], 1),
            self.cell.bias_ih: decoder.word_gates.bias,
            self.cell.weight_hh: gates,
            self.cell.bias_hh: gates_bias,
            self.gate.weight: gate,
            self.gate.bias: gate_bias,
            self.initial_h.weight: initial_h,
            self.initial_h.bias: initial_h_bias,
            self.initial_c.weight: initial_c,
            self.initial_c.bias: initial_c_bias,
            self.output_layer.weight: decoder.output_layer.weight,
            self.output_layer.bias: decoder.output_layer.bias,
        }.items():
            parameter.copy_(value)
        return self


class TutorialLstm(nn.Module):
    """Show and Tell, with a loop over an LSTMCell."""

    def __init__(self, vocabulary: int, channels: int, embedding: int, hidden: int, dropout: float):
        super().__init__()
        self.photo_projection = nn.Linear(channels, embedding)
        self.norm = nn.BatchNorm1d(embedding, momentum=0.01)
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.cell = nn.LSTMCell(embedding, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output_layer = nn.Linear(hidden, vocabulary)

    def forward(self, features: Tensor, captions: Tensor, lengths: list[int]) -> Tensor:
        photo = self.norm(self.photo_projection(features.flatten(1, 2).mean(1)))
        state = self.cell(photo)
        embedded = self.embedding(captions)
        logits = features.new_zeros(len(features), max(lengths), self.output_layer.out_features)
        for step in range(max(lengths)):
            rows = sum(length > step for length in lengths)
            state = self.cell(embedded[:rows, step], (state[0][:rows], state[1][:rows]))
            logits[:rows, step] = self.output_layer(self.dropout(state[0])).to(logits.dtype)
        return logits

    def loss(self, features: Tensor, captions: Tensor, lengths: list[int]) -> Tensor:
        logits = pack_padded_sequence(self(features, captions, lengths), lengths, batch_first=True).data
        return F.cross_entropy(logits, pack_padded_sequence(captions[:, 1:], lengths, batch_first=True).data)

    @torch.no_grad()
    def copy_weights(self, decoder: LstmDecoder) -> TutorialLstm:
        """Take the weights of Kantu's decoder."""
        self.photo_projection.load_state_dict(decoder.photo_projection.state_dict())
        self.norm.load_state_dict(decoder.norm.state_dict())
        self.embedding.load_state_dict(decoder.embedding.state_dict())
        self.output_layer.load_state_dict(decoder.output_layer.state_dict())
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(self.cell, name).copy_(getattr(decoder.recurrent, name + "_l0"))
        return self
