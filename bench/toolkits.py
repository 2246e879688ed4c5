"""UpDown, X-LAN and AoANet for the benchmarks, written the way of captioning toolkits such as self-critical.pytorch.

Bottom-Up and Top-Down Attention: Anderson et al., 2018, https://arxiv.org/abs/1707.07998
X-Linear Attention Networks: Pan et al., 2020, https://arxiv.org/abs/2003.14080
Attention on Attention: Huang et al., 2019, https://arxiv.org/abs/1908.06954

What depends on the photo alone is computed once per photo and repeated for its captions. Then every step computes all
rows of the padded captions: an LSTMCell per LSTM, the attention, the output layer and its log-softmax. A beam search
runs the same step, with a row per hypothesis.

Letters: B photos, R captions, T words of the longest caption, P cells, C channels, A attention size, H hidden size,
D attention size of X-LAN, h heads, d = D / h (of AoANet H / h).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioning.decoders.aoa import AoaDecoder, RefiningLayer
from captioning.decoders.updown import UpDownDecoder
from captioning.decoders.xlan import XlanDecoder, XLinearAttention
from preprocess.vocabulary import END, START


class Toolkit(nn.Module):
    """The loop over the words of padded captions, which the decoders share."""

    num_states: int  # tensors (R, H) that a step hands to the next

    def __init__(self, vocabulary: int, embedding: int, hidden: int, dropout: float):
        super().__init__()
        self.hidden = hidden
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.dropout = nn.Dropout(dropout)
        self.output_layer = nn.Linear(hidden, vocabulary)

    def loss(self, cells: Tensor, photo_index: Tensor, captions: Tensor, lengths: list[int]) -> Tensor:
        """cells (B, P, C), photo_index (R,), captions (R, T + 1) padded with 0 -> the mean over the words."""
        per_photo = [tensor[photo_index] for tensor in self.prepare(cells)]
        state = [cells.new_zeros(len(captions), self.hidden) for _ in range(self.num_states)]
        outputs = cells.new_zeros(len(captions), max(lengths), self.output_layer.out_features)
        for step in range(max(lengths)):
            output, state = self.core(self.embedding(captions[:, step]), per_photo, state)
            outputs[:, step] = F.log_softmax(self.output_layer(self.dropout(output)), 1)
        targets = captions[:, 1 : max(lengths) + 1]
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return -(outputs.gather(2, targets[:, :, None]).squeeze(2) * mask).sum() / mask.sum()

    @torch.no_grad()
    def beam_search(self, cells: Tensor, size: int, max_length: int) -> list[list[int]]:
        """Cells (B, P, C) of a batch -> the ids of the best caption of each photo, without <start> and <end>.

        What depends on the photo is repeated for its beams, and the states are reordered with the beams. As in
        captioning/search/beam_search.py, hypotheses that end leave the beam, which is refilled. All steps are computed.
        """
        photos = len(cells)
        per_photo = [tensor.repeat_interleave(size, 0) for tensor in self.prepare(cells)]
        state = [cells.new_zeros(photos * size, self.hidden) for _ in range(self.num_states)]
        words = torch.full((photos * size, 1), START)
        totals = cells.new_full((photos, size), -torch.inf)
        totals[:, 0] = 0  # the beams of a photo are still equal: continue one of them
        finished = [(-torch.inf, list[int]()) for _ in range(photos)]
        for step in range(max_length + 1):
            output, state = self.core(self.embedding(words[:, -1]), per_photo, state)
            log_probabilities = F.log_softmax(self.output_layer(self.dropout(output)), 1)
            log_probabilities[:, : START + 1] = -torch.inf  # never <pad>, <unk>, <start>
            candidates = totals[:, :, None] + log_probabilities.view(photos, size, -1)
            totals, indices = candidates.flatten(1).topk(size)
            parents = indices // candidates.shape[2] + size * torch.arange(photos)[:, None]
            following = indices % candidates.shape[2]
            for photo, beam in (following == END).nonzero().tolist():
                ended = totals[photo, beam].item(), words[parents[photo, beam], 1:].tolist()
                finished[photo] = max(finished[photo], ended)
            if step == max_length:
                break
            totals = totals.masked_fill(following == END, -torch.inf)
            words = torch.cat([words[parents.flatten()], following.view(-1, 1)], 1)
            state = [tensor[parents.flatten()] for tensor in state]
        best = words.view(photos, size, -1)[:, 0, 1:].tolist()  # where none has ended
        return [caption if score > -torch.inf else rest for (score, caption), rest in zip(finished, best, strict=True)]

    def prepare(self, cells: Tensor) -> tuple[Tensor, ...]:
        """cells (B, P, C) -> what the steps need of each photo."""
        raise NotImplementedError

    def core(self, word: Tensor, per_photo: list[Tensor], state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One step: word (R, E), what `prepare` returned, repeated, and the state -> output (R, H), next state."""
        raise NotImplementedError

    def copy_common(self, decoder: UpDownDecoder | XlanDecoder | AoaDecoder) -> None:
        self.embedding.load_state_dict(decoder.embedding.state_dict())
        self.output_layer.load_state_dict(decoder.output_layer.state_dict())


class ToolkitUpDown(Toolkit):
    """Bottom-Up and Top-Down Attention on the 14x14 cells."""

    num_states = 4

    def __init__(self, vocabulary: int, channels: int, embedding: int, attention: int, hidden: int, dropout: float):
        super().__init__(vocabulary, embedding, hidden, dropout)
        self.key = nn.Linear(channels, attention)
        self.query = nn.Linear(hidden, attention, bias=False)
        self.score = nn.Linear(attention, 1, bias=False)
        self.attention_lstm = one_bias(nn.LSTMCell(hidden + channels + embedding, hidden))
        self.language_lstm = one_bias(nn.LSTMCell(channels + hidden, hidden))

    def prepare(self, cells: Tensor) -> tuple[Tensor, ...]:
        return cells, cells.mean(1), self.key(cells)

    def core(self, word: Tensor, per_photo: list[Tensor], state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        cells, mean, keys = per_photo
        hidden1, cell1, hidden2, cell2 = state
        hidden1, cell1 = self.attention_lstm(torch.cat([hidden2, mean, word], 1), (hidden1, cell1))
        scores = self.score(torch.tanh(keys + self.query(hidden1)[:, None])).squeeze(2)
        context = torch.bmm(scores.softmax(1)[:, None], cells).squeeze(1)
        hidden2, cell2 = self.language_lstm(torch.cat([context, hidden1], 1), (hidden2, cell2))
        return hidden2, [hidden1, cell1, hidden2, cell2]

    @torch.no_grad()
    def copy_weights(self, decoder: UpDownDecoder) -> ToolkitUpDown:
        """Take the weights of Kantu's decoder."""
        self.copy_common(decoder)
        for name in ("key", "query", "score"):
            getattr(self, name).load_state_dict(getattr(decoder, name).state_dict())
        from_h2, from_h1 = decoder.attention_gates.weight.chunk(2, 1)
        inputs = [from_h2, decoder.photo_gates.weight, decoder.word_gates.weight]
        copy_cell(self.attention_lstm, inputs, from_h1, decoder.word_gates.bias)
        from_h1, from_h2 = decoder.language_gates.weight.chunk(2, 1)
        copy_cell(self.language_lstm, [decoder.context_gates.weight, from_h1], from_h2, decoder.context_gates.bias)
        return self


class ToolkitXLinear(nn.Module):
    """The X-Linear attention block."""

    def __init__(self, query_size: int, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.projections = nn.ModuleList(  # of the query, twice, of the keys and of the values
            nn.Sequential(nn.Linear(inputs, size), nn.ELU(), nn.GroupNorm(heads, size))
            for inputs in (query_size, query_size, size, size)
        )
        self.bilinear = nn.Linear(size // heads, size // heads // 2)
        self.spatial = nn.Linear(size // heads // 2, 1, bias=False)
        self.channel = nn.Linear(size // heads // 2, size // heads)

    def keys_and_values(self, cells: Tensor) -> list[Tensor]:
        """(B, P, D) -> (B, h, P, d) twice."""
        projected = (project(cells.flatten(0, 1)) for project in self.projections[2:])
        return [x.view(*cells.shape[:2], self.heads, -1).transpose(1, 2) for x in projected]

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(R, Q), (R, h, P, d) twice -> (R, D)."""
        query, gate = (project(query).view(len(query), self.heads, -1) for project in self.projections[:2])
        pooled = self.bilinear(query[:, :, None] * keys).relu()
        spatial = self.spatial(pooled).squeeze(3).softmax(2)
        channel = self.channel(pooled.mean(2)).sigmoid()
        return (channel * gate * torch.matmul(spatial[:, :, None], values).squeeze(2)).flatten(1)

    def copy_weights(self, block: XLinearAttention) -> None:
        for name in ("bilinear", "spatial", "channel"):
            getattr(self, name).load_state_dict(getattr(block, name).state_dict())
        for first, layer, norm in ((0, block.query, block.query_norm), (2, block.cell, block.cell_norm)):
            for half in (0, 1):
                projection = self.projections[first + half]
                for target, source in ((projection[0], layer), (projection[2], norm)):
                    target.weight.copy_(source.weight.chunk(2)[half])
                    target.bias.copy_(source.bias.chunk(2)[half])


class ToolkitXlan(Toolkit):
    """X-Linear Attention Networks on the native cells."""

    num_states = 3

    def __init__(self, vocabulary: int, channels: int, size: int, dropout: float, layers: int, heads: int):
        super().__init__(vocabulary, size, size, dropout)
        self.cell = nn.Linear(channels, size)
        self.blocks = nn.ModuleList(ToolkitXLinear(size, size, heads) for _ in range(layers + 1))  # the decoder's last
        self.joint = nn.ModuleList(nn.Linear(2 * size, size) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(layers))
        self.photo = nn.Linear((layers + 1) * size, size)
        self.photo_norm = nn.LayerNorm(size)
        self.lstm = one_bias(nn.LSTMCell(2 * size, size))
        self.context = nn.Linear(2 * size, 2 * size)

    def prepare(self, cells: Tensor) -> tuple[Tensor, ...]:
        cells = self.dropout(F.elu(self.cell(cells)))
        photos = [cells.mean(1)]
        for block, joint, norm in zip(self.blocks, self.joint, self.norms, strict=False):
            photos.append(self.dropout(block(photos[-1], *block.keys_and_values(cells))))
            both = torch.cat([photos[-1][:, None].expand_as(cells), cells], 2)
            cells = norm(joint(both).relu() + cells)
        photo = self.photo_norm(self.photo(torch.cat(photos, 1)))
        return photo, *self.blocks[-1].keys_and_values(cells)

    def core(self, word: Tensor, per_photo: list[Tensor], state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        photo, keys, values = per_photo
        hidden, cell, context = state
        hidden, cell = self.lstm(torch.cat([word, photo + self.dropout(context)], 1), (hidden, cell))
        attended = self.dropout(self.blocks[-1](hidden, keys, values))
        context = F.glu(self.context(torch.cat([attended, hidden], 1)), 1)
        return context, [hidden, cell, context]

    @torch.no_grad()
    def copy_weights(self, decoder: XlanDecoder) -> ToolkitXlan:
        """Take the weights of Kantu's decoder."""
        self.copy_common(decoder)
        for name in ("cell", "photo", "photo_norm", "context"):
            getattr(self, name).load_state_dict(getattr(decoder, name).state_dict())
        attentions = [*(layer.attention for layer in decoder.layers), decoder.attention]
        for block, attention in zip(self.blocks, attentions, strict=True):
            block.copy_weights(attention)
        for joint, norm, layer in zip(self.joint, self.norms, decoder.layers, strict=True):
            joint.weight.copy_(torch.cat([layer.from_photo.weight, layer.from_cell.weight], 1))
            joint.bias.copy_(layer.from_photo.bias)
            norm.load_state_dict(layer.norm.state_dict())
        inputs = [decoder.word_gates.weight, decoder.context_gates.weight]
        copy_cell(self.lstm, inputs, decoder.hidden_gates.weight, decoder.word_gates.bias)
        return self


class ToolkitAoaAttention(nn.Module):
    """Multi-head attention, and attention on it, with keys and values that are given."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(size, size)
        self.information = nn.Linear(2 * size, 2 * size)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, dropout: nn.Module) -> Tensor:
        """(R, T, H), (R, P, H) twice -> (R, T, H). dropout: of the inputs of the information and the gate."""
        query = self.query(query)
        heads = (x.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for x in (query, keys, values))
        query_heads, key_heads, value_heads = heads
        scores = torch.matmul(query_heads, key_heads.transpose(2, 3)) / math.sqrt(query_heads.shape[3])
        attended = torch.matmul(scores.softmax(3), value_heads).transpose(1, 2).flatten(2)
        return F.glu(self.information(torch.cat([dropout(attended), dropout(query)], 2)), 2)


class ToolkitRefiner(nn.Module):
    """A layer of AoANet's encoder."""

    def __init__(self, size: int, heads: int, dropout: float):
        super().__init__()
        self.attention = ToolkitAoaAttention(size, heads)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, cells: Tensor) -> Tensor:
        return self.norm(cells + self.attention(cells, self.key(cells), self.value(cells), self.dropout))

    def copy_weights(self, layer: RefiningLayer) -> None:
        targets = self.attention.query, self.key, self.value
        weights, biases = layer.query_keys_values.weight.chunk(3), layer.query_keys_values.bias.chunk(3)
        for target, weight, bias in zip(targets, weights, biases, strict=True):
            target.weight.copy_(weight)
            target.bias.copy_(bias)
        self.attention.information.load_state_dict(layer.information.state_dict())
        self.norm.load_state_dict(layer.norm.state_dict())


class ToolkitAoa(Toolkit):
    """Attention on Attention on the native cells."""

    num_states = 3

    def __init__(self, vocabulary: int, channels: int, size: int, dropout: float, layers: int, heads: int):
        super().__init__(vocabulary, size, size, dropout)
        self.cell = nn.Linear(channels, size)
        self.refiners = nn.ModuleList(ToolkitRefiner(size, heads, dropout / 2) for _ in range(layers))
        self.keys_values = nn.Linear(size, 2 * size)
        self.lstm = one_bias(nn.LSTMCell(2 * size, size))
        self.attention = ToolkitAoaAttention(size, heads)

    def prepare(self, cells: Tensor) -> tuple[Tensor, ...]:
        cells = self.dropout(self.cell(cells).relu())
        for refiner in self.refiners:
            cells = refiner(cells)
        return cells.mean(1), self.keys_values(cells)

    def core(self, word: Tensor, per_photo: list[Tensor], state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        photo, keys_values = per_photo
        hidden, cell, context = state
        hidden, cell = self.lstm(torch.cat([word, photo + self.dropout(context)], 1), (hidden, cell))
        context = self.attention(hidden[:, None], *keys_values.chunk(2, 2), nn.Identity()).squeeze(1)
        return context, [hidden, cell, context]

    @torch.no_grad()
    def copy_weights(self, decoder: AoaDecoder) -> ToolkitAoa:
        """Take the weights of Kantu's decoder."""
        self.copy_common(decoder)
        for refiner, layer in zip(self.refiners, decoder.layers, strict=True):
            refiner.copy_weights(layer)
        for name in ("query", "information"):
            getattr(self.attention, name).load_state_dict(getattr(decoder, name).state_dict())
        for name in ("cell", "keys_values"):
            getattr(self, name).load_state_dict(getattr(decoder, name).state_dict())
        inputs = [decoder.word_gates.weight, decoder.context_gates.weight]
        copy_cell(self.lstm, inputs, decoder.hidden_gates.weight, decoder.word_gates.bias)
        return self


def one_bias(cell: nn.LSTMCell) -> nn.LSTMCell:
    """The cell with one bias, as in Kantu; the second, which adds nothing, stays 0."""
    zeros = torch.zeros_like(cell.bias_hh)
    del cell.bias_hh
    cell.register_buffer("bias_hh", zeros.detach())
    return cell


def copy_cell(cell: nn.LSTMCell, inputs: list[Tensor], hidden: Tensor, bias: Tensor) -> None:
    """Copy the weights of the gates from each input, from the hidden state, and the bias."""
    cell.weight_ih.copy_(torch.cat(inputs, 1))
    cell.weight_hh.copy_(hidden)
    cell.bias_ih.copy_(bias)
