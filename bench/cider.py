"""How much of a step of CIDEr optimisation its reward takes, and how the reward compares with the plain way.

    python bench/cider.py data/f8k-en                      captions of a data folder; features are random numbers
    python bench/cider.py data/coco --device cuda --batch-size 500

The plain way is pycocoevalcap's scorer, as self-critical training is usually written: the references of the batch are
cut into n-grams again at every step, in dictionaries, with the document frequencies counted once beforehand. Both give
the same scores, which is checked before anything is timed.
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
from tyro.conf import Positional

from captioning.dataset.batches import plan_batches
from captioning.dataset.caption_dataset import CaptionDataset, photos_in_split
from captioning.decoders.factory import build_decoder
from captioning.encoders.grid import Grid, grid_pooling
from captioning.runtime.device import autocast, pick_device, pick_precision
from captioning.runtime.settings import as_plain_data
from captioning.training.cider_reward import CiderReward
from captioning.training.objectives import Cider, LossWeights
from config import Train
from preprocess.captions import read_captions
from preprocess.vocabulary import END, VOCABULARY_FILE, Vocabulary


@dataclass(frozen=True)
class Bench:
    data: Positional[Path]  # folder made by python -m preprocess
    batch_size: int = 100  # captions, and about as many are drawn
    steps: int = 12  # timed, after two that are not
    decoder: str = "attention"
    channels: int = 2048  # of the 8x8 cells of a 256-pixel photo
    device: str = "auto"
    threads: int = torch.get_num_threads()  # of torch


class Clocked:
    """A reward that notes its own time."""

    def __init__(self, reward: CiderReward):
        self.reward, self.seconds, self.captions = reward, [], 0

    def __call__(self, photos: np.ndarray, captions: np.ndarray) -> np.ndarray:
        started = time.perf_counter()
        rewards = self.reward(photos, captions)
        self.seconds.append(time.perf_counter() - started)
        self.asked, self.captions = (photos, captions), len(captions)
        return rewards


class PlainReward:
    """pycocoevalcap's scorer, with document frequencies counted once."""

    def __init__(self, photos: list, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.references = [[" ".join([*words, "<end>"]) for words in photo.captions] for photo in photos]
        self.frequencies = Counter(
            gram
            for captions in self.references
            for gram in {g for caption in captions for g in precook(caption, out=True)}
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
        scorer.crefs = AsMany(scorer.crefs, len(self.references))
        return np.array(scorer.compute_cider())


class AsMany(list):
    """The scorer asks len() of its references how many photos the document frequencies are of: here all of train."""

    def __init__(self, items: list, photos: int):
        super().__init__(items)
        self.photos = photos

    def __len__(self) -> int:
        return self.photos


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
    reward = Clocked(CiderReward(split))
    counted = time.perf_counter() - started
    settings = {**as_plain_data(config), "vocabulary_size": len(vocabulary), "channels": bench.channels}
    decoder = build_decoder(bench.decoder, settings).to(device).train()
    with torch.no_grad():
        decoder.output_layer.bias[END] = np.log(len(vocabulary) / 10)  # untrained, it would hardly ever end
    objective = Cider(config, reward)
    optimizer = torch.optim.AdamW(decoder.parameters(), 1e-9)
    order = np.random.default_rng(0).permutation(len(split))
    plan = plan_batches(split, bench.batch_size, order)[: bench.steps + 2]
    seconds = [step(bench, photos, objective, decoder, optimizer, device, precision) for photos in plan][2:]
    step_seconds, reward_seconds = statistics.median(seconds), statistics.median(reward.seconds[2:])

    plain = PlainReward(photos, vocabulary)
    np.testing.assert_allclose(plain(*reward.asked), reward.reward(*reward.asked), rtol=1e-9, atol=1e-12)
    ours, theirs = (
        statistics.median(repeat(partial(way, *reward.asked), number=1, repeat=9)) for way in (reward.reward, plain)
    )
    words = (reward.asked[1] > END).sum() / reward.captions
    print(
        f"{reward.captions} captions of {words:.1f} words a step, {len(photos):,} photos to train on; "
        f"{bench.decoder}, {device}, {str(precision).removeprefix('torch.')}, torch {torch.__version__}"
    )
    print(f"{'document frequencies':>24}  {counted:.1f} s, once")
    print(f"{'a step':>24}  {1000 * step_seconds:.1f} ms")
    print(f"{'of it the reward':>24}  {1000 * reward_seconds:.2f} ms, {reward_seconds / step_seconds:.1%}")
    print(
        f"{'the plain reward':>24}  {1000 * theirs:.2f} ms, {theirs / ours:.1f} times ours alone ({1000 * ours:.2f} ms)"
    )


def step(bench, photos, objective, decoder, optimizer, device, precision) -> float:
    """Seconds of one step, on random features."""
    cells = torch.rand(len(photos), 64, bench.channels, device=device).to(precision)
    grid = Grid(cells, grid_pooling(8, 8).to(device))
    batch = type("Batch", (), {"indices": photos})
    synchronise(device)
    started = time.perf_counter()
    with autocast(device, precision):
        loss = objective(decoder, grid, batch, LossWeights())
    loss.objective.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(tyro.cli(Bench))
