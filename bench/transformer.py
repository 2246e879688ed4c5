"""The time of a training step and of beam search of the transformer, beside the way of self-critical.pytorch.

    python bench/transformer.py                              32 captions of 8 photos, 7x7 cells; beams of 5 of 8 photos

Its way (TransformerModel; written anew here, from the same weights): the encoder runs once per caption; all words of
all captions are padded to the longest one and computed in every layer; and each step of a search reads its whole prefix
again, for which every layer projects the cells anew. Both read the same native cells, so Kantu's shortcut of the 14x14
map is not part of the difference. Losses, gradients and captions are compared before anything is timed.

A step is gradients, clipping and Adam. The implementations alternate for --rounds rounds; the best time counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
import tyro
from decoders import Bench as DataSizes
from decoders import Data, best_of
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from captioning.decoders.factory import build_decoder
from captioning.decoders.protocol import Decoder, State, Step, spread_attention
from captioning.decoders.transformer import EncoderLayer, TransformerDecoder, sinusoids
from captioning.encoders.grid import Grid
from captioning.search.beam_search import beam_search
from captioning.search.options import SearchOptions
from captioning.training.optimizer import make_optimizer
from preprocess.vocabulary import PAD


@dataclass(frozen=True)
class Bench:
    photos: int = 8
    captions_per_photo: int = 4
    vocabulary: int = 9490
    channels: int = 1280
    size: int = 512
    grid_side: int = 7
    beam_size: int = 5
    max_length: int = 12  # words per caption; random weights always reach it
    rounds: int = 3
    threads: int = torch.get_num_threads()


class PlainTransformer(nn.Module):
    """self-critical.pytorch's way with the modules, and so the weights, of a TransformerDecoder."""

    uses_attention = True
    has_sentinel = False

    def __init__(self, kantu: TransformerDecoder):
        super().__init__()
        self.kantu = kantu

    def encode(self, cells: Tensor, pooling: Tensor) -> Tensor:
        kantu = self.kantu
        hidden = kantu.dropout(kantu.cell_projection(cells).relu() + kantu.positions(pooling))
        for layer in kantu.encoder_layers:
            assert isinstance(layer, EncoderLayer)
            query, keys, values = layer.query_keys_values(layer.attention_norm(hidden)).chunk(3, 2)
            hidden = hidden + layer.dropout(layer.attention_output(self.attend(query, keys, values)[0]))
            hidden = hidden + layer.dropout(layer.feed_forward(layer.feed_forward_norm(hidden)))
        return kantu.encoder_norm(hidden)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Softmax of all scores, in plain operations."""
        heads = self.kantu.decoder_layers[0].heads
        query, keys, values = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, keys, values))
        scores = query @ keys.transpose(2, 3) / math.sqrt(query.shape[3])
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(3)
        return (self.kantu.dropout(weights) @ values).transpose(1, 2).flatten(2), weights

    def decode(self, memory: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """memory (R, N, H), words (R, T) -> hidden (R, T, H), attention of the last layer (R, heads, T, N)."""
        kantu = self.kantu
        length = words.shape[1]
        hidden = kantu.embed(words)
        steps = torch.arange(length)[:, None]
        hidden = kantu.dropout(hidden + sinusoids(steps, hidden.shape[2], hidden))
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        weights = hidden
        for layer in kantu.decoder_layers:
            query, keys, values = layer.query_keys_values(layer.attention_norm(hidden)).chunk(3, 2)
            hidden = hidden + layer.dropout(layer.attention_output(self.attend(query, keys, values, causal)[0]))
            query = layer.cell_query(layer.cell_attention_norm(hidden))
            attended, weights = self.attend(query, *layer.cell_keys_values(memory).chunk(2, 2))
            hidden = hidden + layer.dropout(layer.cell_attention_output(attended))
            hidden = hidden + layer.dropout(layer.feed_forward(layer.feed_forward_norm(hidden)))
        return kantu.norm(hidden), weights

    def loss(self, grid: Grid, captions: Tensor, photo_index: Tensor) -> Tensor:
        """The mean loss of the words: all positions are computed, then those after the end masked."""
        memory = self.encode(grid.cells[photo_index], grid.pooling)
        hidden, _ = self.decode(memory, captions[:, :-1])
        log_probabilities = self.kantu.output_layer(hidden).log_softmax(2)
        targets = captions[:, 1:]
        mask = (targets != PAD).to(log_probabilities.dtype)
        return -(log_probabilities.gather(2, targets[:, :, None])[..., 0] * mask).sum() / mask.sum()

    def init_state(self, grid: Grid) -> State:
        memory = self.encode(grid.cells, grid.pooling)
        pooling = grid.pooling.expand(len(memory), -1, -1)
        return State((memory, pooling), (), (torch.zeros(len(memory), 0, dtype=torch.long),))

    def step(self, words: Tensor, state: State) -> Step:
        (memory, pooling), (prefixes,) = state.per_photo, state.growing
        prefixes = torch.cat([prefixes, words[:, None]], 1)
        captions_per_photo = len(words) // len(memory)
        hidden, weights = self.decode(memory.repeat_interleave(captions_per_photo, 0), prefixes)
        logits = self.kantu.output_layer(hidden[:, -1])
        attention = weights[:, :, -1].mean(1).unflatten(0, (len(memory), -1))
        return Step(
            logits.log_softmax(1), spread_attention(attention, pooling), State(state.per_photo, (), (prefixes,))
        )


def make_pair(bench: Bench, dropout: float, dtype: torch.dtype) -> tuple[TransformerDecoder, PlainTransformer]:
    """Kantu's decoder and the plain one, with the same weights."""
    torch.manual_seed(0)
    sizes = {"embedding_size": bench.size, "hidden_size": bench.size, "channels": bench.channels}
    pair = [
        build_decoder("transformer", {**sizes, "vocabulary_size": bench.vocabulary, "dropout": dropout}).to(dtype)
        for _ in range(2)
    ]
    pair[1].load_state_dict(pair[0].state_dict())
    kantu, other = pair
    assert isinstance(kantu, TransformerDecoder) and isinstance(other, TransformerDecoder)
    return kantu, PlainTransformer(other)


def losses(
    bench: Bench, data: Data, dropout: float, dtype: torch.dtype
) -> list[tuple[nn.Module, Callable[[], Tensor]]]:
    """Of Kantu and of the plain way: the model, and a function that computes its loss of the batch."""
    kantu, plain = make_pair(bench, dropout, dtype)
    batch = data.kantu_batch(dtype)
    grid = batch.photos
    assert isinstance(grid, Grid)

    def kantu_loss() -> Tensor:
        return F.cross_entropy(kantu(grid, batch.words, batch.photo_index).logits, batch.targets)

    return [(kantu, kantu_loss), (plain, lambda: plain.loss(grid, data.captions, data.photo_index))]


def compare(bench: Bench, data: Data, grid: Grid, search: SearchOptions) -> None:
    """Print how much losses, gradients and captions differ. Exits if it is more than rounding."""
    values, gradients = [], []
    for model, loss in losses(bench, data, 0.0, torch.float64):
        value = loss()
        value.backward()
        values.append(value.item())
        gradients.append(parameters_to_vector([parameter.grad for parameter in model.parameters()]))
    loss_error = abs(values[0] / values[1] - 1)
    gradient_error = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    double = Grid(grid.cells.double(), grid.pooling.double())
    captions = [
        [best.words for best, *_ in beam_search(cast(Decoder, model.eval()), double, search)]
        for model in make_pair(bench, 0.0, torch.float64)
    ]
    print(
        f"float64: the loss differs by {loss_error:.0e}, the gradient by {gradient_error:.0e}; the captions are "
        f"{'the same' if captions[0] == captions[1] else 'different'}"
    )
    if max(loss_error, gradient_error) > 1e-10 or captions[0] != captions[1]:
        raise SystemExit("error: the results are not the same; nothing was timed")


def update(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """One training step."""
    loss().backward()
    nn.utils.clip_grad_value_(model.parameters(), 5.0)
    optimizer.step()
    optimizer.zero_grad()


def print_times(name: str, kantu_task: Callable[[], object], plain_task: Callable[[], object], rounds: int) -> None:
    """Print the best times of Kantu and the plain way, which take turns."""
    kantu, plain = best_of(rounds, {"Kantu": kantu_task, "plain": plain_task}).values()
    print(f"{name}: Kantu {1000 * kantu:,.0f} ms, plain {1000 * plain:,.0f} ms: {plain / kantu:.1f} times as fast")


def main(bench: Bench) -> None:
    torch.set_num_threads(bench.threads)
    data = Data(
        DataSizes(
            photos=bench.photos,
            captions_per_photo=bench.captions_per_photo,
            vocabulary=bench.vocabulary,
            channels=bench.channels,
            grid_side=bench.grid_side,
        )
    )
    search = SearchOptions(bench.beam_size, bench.max_length)
    compare(bench, data, data.grid, search)
    steps = []
    for model, loss in losses(bench, data, 0.1, torch.float32):
        model.train()
        optimizer = make_optimizer([{"params": list(model.parameters())}])
        steps.append(partial(update, loss, optimizer, model))
    print_times("training step", *steps, bench.rounds)
    pair = [model.eval() for model in make_pair(bench, 0.1, torch.float32)]
    searches = [partial(beam_search, cast(Decoder, model), data.grid, search) for model in pair]
    print_times("beam search", *searches, bench.rounds)


if __name__ == "__main__":
    main(tyro.cli(Bench))
