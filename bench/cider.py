"""The time of the CIDEr reward, as a fraction of a training step and compared with pycocoevalcap's scorer.

    python bench/cider.py data/f8k-en                      captions of a data folder; features are random
    python bench/cider.py data/coco --device cuda --batch-size 500

Implementations of self-critical training (Rennie et al., 2017, https://arxiv.org/abs/1612.00563) usually call
pycocoevalcap's scorer, which counts the n-grams of the references again at every step; the document frequencies are
counted once. Both rewards are equal, which is checked before they are timed, in CPU seconds.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from timeit import repeat

import numpy as np
import torch
import tyro
from pycocoevalcap.cider.cider_scorer import CiderScorer, precook
from torch.nn.utils.rnn import pack_sequence
from tyro.conf import Positional

from captioning.dataset.batches import Batch, plan_batches
from captioning.dataset.caption_dataset import CaptionDataset, photos_in_split
from captioning.decoders.factory import build_decoder
from captioning.encoders.grid import Grid, grid_pooling
from captioning.runtime.device import autocast, pick_device, pick_precision, synchronize
from captioning.runtime.settings import as_plain_data
from captioning.training.cider_reward import CiderReward
from captioning.training.objectives import Cider, LossWeights
from config import Train
from preprocess.captions import read_captions
from preprocess.vocabulary import END, START, VOCABULARY_FILE, Vocabulary


@dataclass(frozen=True)
class Bench:
    data: Positional[Path]  # folder made by python -m preprocess
    batch_size: int = 100  # captions; about as many are sampled
    steps: int = 12  # timed steps, after two warm-up steps
    decoder: str = "attention"
    channels: int = 2048  # of the features; the grid has 8x8 cells, as for a photo of 256 pixels
    device: str = "auto"
    threads: int = torch.get_num_threads()


class TimedReward:
    """A reward that records the time of each call, and the arguments of the last."""

    def __init__(self, reward: CiderReward):
        self.reward = reward
        self.seconds: list[float] = []
        self.arguments: tuple[np.ndarray, np.ndarray]

    def __call__(self, photos: np.ndarray, captions: np.ndarray) -> np.ndarray:
        started = time.perf_counter()
        rewards = self.reward(photos, captions)
        self.seconds.append(time.perf_counter() - started)
        self.arguments = photos, captions
        return rewards


class PycocoevalcapReward:
    """pycocoevalcap's scorer, with document frequencies that are counted once."""

    def __init__(self, photos: list, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.references = [[" ".join([*words, "<end>"]) for words in photo.captions] for photo in photos]
        self.frequencies = Counter(
            ngram
            for captions in self.references
            for ngram in set().union(*(precook(caption, out=True) for caption in captions))
        )

    def __call__(self, photos: np.ndarray, captions: np.ndarray) -> np.ndarray:
        scorer = CiderScorer()
        for photo, caption in zip(photos, captions.tolist(), strict=True):
            ended = END in caption
            words = self.vocabulary.decode(
                caption[: caption.index(END)] if ended else [word for word in caption if word]
            )
            scorer += (" ".join([*words, *["<end>"] * ended]), self.references[photo])
        scorer.document_frequency = self.frequencies
        scorer.crefs = ListWithLength(scorer.crefs, len(self.references))
        return np.array(scorer.compute_cider())


class ListWithLength(list):
    """A list with another len(), which the scorer takes for the number of documents: here all photos of train."""

    def __init__(self, items: list, length: int):
        super().__init__(items)
        self.length = length

    def __len__(self) -> int:
        return self.length


def main(bench: Bench) -> None:
    torch.set_num_threads(bench.threads)
    torch.manual_seed(0)
    device = pick_device(bench.device)
    precision = pick_precision("auto", device)
    config = Train(bench.data, "bench", objective="cider", start_from=Path("none"))
    vocabulary = Vocabulary.load(bench.data / VOCABULARY_FILE)
    photos = photos_in_split(list(read_captions(bench.data)), "train", bench.data)
    split = CaptionDataset(photos, vocabulary, config.max_length)
    started = time.perf_counter()
    reward = TimedReward(CiderReward(split))
    counting_seconds = time.perf_counter() - started
    settings = {**as_plain_data(config), "vocabulary_size": len(vocabulary), "channels": bench.channels}
    decoder = build_decoder(bench.decoder, settings).to(device).train()
    with torch.no_grad():
        # Without this bias, an untrained decoder hardly ever samples <end>.
        decoder.output_layer.bias[END] = np.log(len(vocabulary) / 10)
    objective = Cider(config, reward)
    optimizer = torch.optim.AdamW(decoder.parameters(), 1e-9)
    order = np.random.default_rng(0).permutation(len(split))
    plan = plan_batches(split, bench.batch_size, order)[: bench.steps + 2]
    seconds = [time_step(bench, photos, objective, decoder, optimizer, device, precision) for photos in plan][2:]
    step_seconds = statistics.median(seconds)
    reward_seconds = statistics.median(reward.seconds[2:])

    reference = PycocoevalcapReward(photos, vocabulary)
    arguments = reward.arguments
    np.testing.assert_allclose(reference(*arguments), reward.reward(*arguments), rtol=1e-9, atol=1e-12)
    alone_seconds, reference_seconds = (
        statistics.median(repeat(partial(function, *arguments), timer=time.process_time, number=1, repeat=9))
        for function in (reward.reward, reference)
    )
    captions = arguments[1]
    print(
        f"{len(captions)} captions of {(captions > END).sum() / len(captions):.1f} words per step, "
        f"{len(photos):,} training photos; {bench.decoder}, {device}, "
        f"{str(precision).removeprefix('torch.')}, torch {torch.__version__}"
    )
    print(f"{'document frequencies':>24}  {counting_seconds:.1f} s, once")
    print(f"{'training step':>24}  {1000 * step_seconds:.1f} ms")
    print(f"{'of which reward':>24}  {1000 * reward_seconds:.2f} ms, {reward_seconds / step_seconds:.1%}")
    print(
        f"{'pycocoevalcap':>24}  {1000 * reference_seconds:.2f} ms, {reference_seconds / alone_seconds:.1f} times "
        f"Kantu's reward alone ({1000 * alone_seconds:.2f} ms)"
    )


def time_step(
    bench: Bench,
    photos: np.ndarray,
    objective: Cider,
    decoder: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    precision: torch.dtype,
) -> float:
    """Seconds of one training step, on random features."""
    cells = torch.rand(len(photos), 64, bench.channels, device=device).to(precision)
    grid = Grid(cells, grid_pooling(8, 8).to(device))
    start = pack_sequence([torch.tensor([START])])  # the captions are sampled
    batch = Batch(grid, start, torch.tensor([END]), torch.tensor([0]), photos)
    synchronize(device)
    started = time.perf_counter()
    with autocast(device, precision):
        batch = objective.prepare(decoder, grid, batch).to(device, precision)
        loss = objective(decoder, grid, batch, LossWeights())
    loss.objective.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main(tyro.cli(Bench))
