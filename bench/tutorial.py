"""The plain way, as the widely read tutorials of Show, Attend and Tell and of Show and Tell write it: what the benches
compare with. A photo a caption, all 196 cells projected anew at every word, the vocabulary layer once a step over
padded rows, one photo at a time in beam search.

Letters: B captions (each with its own copy of its photo), T words of the longest, C channels, V vocabulary, K beams.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torchvision import models

from captioning.decoders.attention import AttentionDecoder
from captioning.decoders.lstm import LstmDecoder
from captioning.encoders.grid import SIDE
from preprocess.vocabulary import END, START


class TutorialEncoder(nn.Module):
    """The live ResNet: photos (B, 3, S, S) float32 -> (B, 14, 14, C), once for every caption of a photo."""

    def __init__(self, name: str):
        super().__init__()
        self.body = nn.Sequential(*list(models.get_model(name).children())[:-2])
        self.pool = nn.AdaptiveAvgPool2d(SIDE)
        self.eval().requires_grad_(False)

    def forward(self, photos: Tensor) -> Tensor:
        return self.pool(self.body(photos)).permute(0, 2, 3, 1)


class TutorialAttention(nn.Module):
    """Show, Attend and Tell."""

    def __init__(self, vocabulary: int, channels: int, embedding: int, attention: int, hidden: int, dropout: float):
        super().__init__()
        self.of_cells = nn.Linear(channels, attention)
        self.of_hidden = nn.Linear(hidden, attention)
        self.score = nn.Linear(attention, 1)
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.cell = nn.LSTMCell(embedding + channels, hidden)
        self.initial_h = nn.Linear(channels, hidden)
        self.initial_c = nn.Linear(channels, hidden)
        self.gate = nn.Linear(hidden, channels)
        self.dropout = nn.Dropout(dropout)
        self.output_layer = nn.Linear(hidden, vocabulary)

    def attend(self, cells: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.score(F.relu(self.of_cells(cells) + self.of_hidden(hidden)[:, None])).squeeze(2)
        alpha = scores.softmax(1)
        return (cells * alpha[:, :, None]).sum(1), alpha

    def init_state(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        mean = cells.mean(1)
        return self.initial_h(mean), self.initial_c(mean)

    def advance(self, embedded: Tensor, cells: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen, alpha = self.attend(cells, h)
        h, c = self.cell(torch.cat([embedded, self.gate(h).sigmoid() * seen], 1), (h, c))
        return h, c, alpha

    def forward(self, features: Tensor, captions: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """features (B, 14, 14, C), captions (B, T + 1) longest first, lengths: words to say -> scores, alphas."""
        cells = features.flatten(1, 2)
        embedded = self.embedding(captions)
        h, c = self.init_state(cells)
        scores = cells.new_zeros(len(cells), max(lengths), self.output_layer.out_features)
        alphas = cells.new_zeros(len(cells), max(lengths), SIDE * SIDE)
        for step in range(max(lengths)):
            rows = sum(length > step for length in lengths)
            h, c, alpha = self.advance(embedded[:rows, step], cells[:rows], h[:rows], c[:rows])
            scores[:rows, step] = self.output_layer(self.dropout(h)).to(scores.dtype)
            alphas[:rows, step] = alpha
        return scores, alphas

    def loss(self, features: Tensor, captions: Tensor, lengths: list[int], alpha_c: float = 1.0) -> Tensor:
        scores, alphas = self(features, captions, lengths)
        scores = pack_padded_sequence(scores, lengths, batch_first=True).data
        targets = pack_padded_sequence(captions[:, 1:], lengths, batch_first=True).data
        return F.cross_entropy(scores, targets) + alpha_c * ((1 - alphas.sum(1)) ** 2).mean()

    @torch.no_grad()
    def beam_search(self, features: Tensor, beams: int, longest: int, refill: bool = False) -> list[int]:
        """features (14, 14, C) of one photo -> its best caption, without <start> and <end>.

        In the tutorial a beam that ends is gone, and the search goes on until all are. refill: as in our search,
        continuations of the others take its place, until none of them can come out better.
        """
        vocabulary, width = self.output_layer.out_features, beams
        cells = features.flatten(0, 1).expand(beams, -1, -1)
        words, totals = torch.full((beams, 1), START), torch.zeros(beams, 1)
        h, c = self.init_state(cells)
        finished: list[tuple[float, list[int]]] = []
        for step in range(longest + 1):
            h, c, _ = self.advance(self.embedding(words[:, -1]), cells, h, c)
            log_probabilities = F.log_softmax(self.output_layer(h), 1)
            log_probabilities[:, : START + 1] = -torch.inf  # never <pad>, <unk>, <start>
            candidates = totals + log_probabilities
            best, places = (candidates[0] if step == 0 else candidates.flatten()).topk(width)
            parents, following = places // vocabulary, places % vocabulary
            for row in (following == END).nonzero()[:, 0].tolist():
                finished.append((best[row].item(), words[parents[row], 1:].tolist()))
            going = following != END
            width = beams if refill else int(going.sum())
            if step == longest or not going.any() or (refill and finished and best[going].max() <= max(finished)[0]):
                break
            parents, totals = parents[going], best[going][:, None]
            words = torch.cat([words[parents], following[going][:, None]], 1)
            h, c, cells = h[parents], c[parents], features.flatten(0, 1).expand(len(parents), -1, -1)
        return max(finished)[1] if finished else words[0, 1:].tolist()

    @torch.no_grad()
    def take(self, ours: AttentionDecoder) -> TutorialAttention:
        """The same weights as our decoder, which keeps them in fewer, larger matrices."""
        query, gate, gates = ours.from_hidden.weight.split(ours.split_sizes)
        query_bias, gate_bias, gates_bias = ours.from_hidden.bias.split(ours.split_sizes)
        initial_h, initial_c = ours.initial.weight.chunk(2)
        initial_h_bias, initial_c_bias = ours.initial.bias.chunk(2)
        for parameter, value in {
            self.of_cells.weight: ours.key.weight,
            self.of_cells.bias: ours.key.bias,
            self.of_hidden.weight: query,
            self.of_hidden.bias: query_bias,
            self.score.weight: ours.score.weight,
            self.score.bias: torch.zeros(1),
            self.embedding.weight: ours.embedding.weight,
            self.cell.weight_ih: torch.cat([ours.word_gates.weight, ours.context_gates.weight], 1),
            self.cell.bias_ih: ours.word_gates.bias,
            self.cell.weight_hh: gates,
            self.cell.bias_hh: gates_bias,
            self.gate.weight: gate,
            self.gate.bias: gate_bias,
            self.initial_h.weight: initial_h,
            self.initial_h.bias: initial_h_bias,
            self.initial_c.weight: initial_c,
            self.initial_c.bias: initial_c_bias,
            self.output_layer.weight: ours.output_layer.weight,
            self.output_layer.bias: ours.output_layer.bias,
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
        memory = self.cell(photo)
        embedded = self.embedding(captions)
        scores = features.new_zeros(len(features), max(lengths), self.output_layer.out_features)
        for step in range(max(lengths)):
            rows = sum(length > step for length in lengths)
            memory = self.cell(embedded[:rows, step], (memory[0][:rows], memory[1][:rows]))
            scores[:rows, step] = self.output_layer(self.dropout(memory[0])).to(scores.dtype)
        return scores

    def loss(self, features: Tensor, captions: Tensor, lengths: list[int]) -> Tensor:
        scores = pack_padded_sequence(self(features, captions, lengths), lengths, batch_first=True).data
        return F.cross_entropy(scores, pack_padded_sequence(captions[:, 1:], lengths, batch_first=True).data)

    @torch.no_grad()
    def take(self, ours: LstmDecoder) -> TutorialLstm:
        """The same weights as our decoder."""
        self.photo_projection.load_state_dict(ours.photo_projection.state_dict())
        self.norm.load_state_dict(ours.norm.state_dict())
        self.embedding.load_state_dict(ours.embedding.state_dict())
        self.output_layer.load_state_dict(ours.output_layer.state_dict())
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(self.cell, name).copy_(getattr(ours.recurrent, name + "_l0"))
        return self
