"""Random photos, captions and features for the benchmarks: they take the same time as real ones.

In memory (`make_training_data`), or as the files of a data folder (`write_data`, `write_features`, `write_photos`).

Letters: N photos, B photos per batch, h x w cells, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from captioning.dataset.batches import CachedPhotos
from captioning.dataset.caption_dataset import CaptionDataset
from captioning.encoders.grid import grid_pooling
from captioning.encoders.images import Transform, split_batches
from captioning.encoders.loading import encoder_file
from captioning.features.cached_grid import FeatureRows
from captioning.features.feature_placement import CPU, FeaturePlacement, FileRows, PlacedFeatures
from captioning.features.feature_writer import FeatureWriter
from captioning.features.recipe import describe_features
from captioning.runtime.checkpoint import save_checkpoint
from captioning.training.data import TrainingData
from preprocess.captions import CAPTIONS_FILE, Photo, write_captions
from preprocess.vocabulary import SPECIAL, VOCABULARY_FILE, Vocabulary

# words per caption -> number of captions, of all 25,014 captions of COCO val2017
COCO_LENGTHS = {
    7: 206,
    8: 4005,
    9: 5549,
    10: 5350,
    11: 3814,
    12: 2507,
    13: 1454,
    14: 851,
    15: 468,
    16: 276,
    17: 175,
    18: 111,
    19: 70,
    20: 45,
    21: 30,
    22: 24,
    23: 23,
    24: 14,
    25: 13,
    26: 29,
}
RECIPE = {"name": "bench", "weights": "none", "sha256": "", "transform": Transform().to_dict()}
MAX_LENGTH = 52  # words of a caption: the default of --max-length
CHUNK = 256  # photos whose features are made or written at once


def coco_lengths(rng: np.random.Generator, captions: int) -> np.ndarray:
    """Words of each caption (captions,) int64, with the frequencies of COCO captions."""
    counts = np.array(list(COCO_LENGTHS.values()))
    return rng.choice(list(COCO_LENGTHS), captions, p=counts / counts.sum())


def make_vocabulary(size: int) -> Vocabulary:
    """A vocabulary of `size` words, with the special ones."""
    return Vocabulary("en", "whitespace", 1, (*SPECIAL, *(f"w{number}" for number in range(size - len(SPECIAL)))))


def make_photos(
    rng: np.random.Generator, vocabulary: Vocabulary, photos: int, lengths: np.ndarray, split: str = "train"
) -> Iterator[Photo]:
    """Photos that share captions of these lengths (captions,) evenly, in order; each word is a random one."""
    words = vocabulary.words[len(SPECIAL) :]
    word_indices = iter(rng.integers(0, len(words), int(lengths.sum())).tolist())
    captions = (tuple(words[i] for i in islice(word_indices, length)) for length in lengths.tolist())
    per_photo = np.diff(np.linspace(0, len(lengths), photos + 1).astype(int))
    for number, count in enumerate(per_photo.tolist()):
        yield Photo(f"{split}{number}.jpg", f"{split}{number}", split, tuple(islice(captions, count)))


class RandomRows(FileRows):
    """Random maps in float16 in place of the rows of a feature file."""

    def __init__(self, side: int, channels: int):
        """side: native cells per side."""
        self.shape = side**2, channels
        self.pooling = grid_pooling(side, side)

    def read(self, rows: np.ndarray, device: torch.device = CPU) -> FeatureRows:
        """Maps for rows (B,) int64, on the device; other ones at every call."""
        return FeatureRows(torch.randn(len(rows), *self.shape, device=device).relu_().half())


def place_random_features(photos: int, side: int, channels: int, device: torch.device) -> PlacedFeatures:
    """Random maps in the memory of the device, held and read as those of a feature file."""
    in_memory = (photos, 0) if device.type == "cuda" else (0, photos)
    placement = FeaturePlacement(photos, *in_memory, reason="random features")
    return PlacedFeatures(RandomRows(side, channels), np.arange(photos), placement, device)


def make_training_data(
    train: Iterable[Photo], val: Iterable[Photo], vocabulary: Vocabulary, side: int, channels: int, device: torch.device
) -> TrainingData:
    """Two splits with random features on the device, of side x side cells; the splits share rows."""
    splits = [CaptionDataset(photos, vocabulary, MAX_LENGTH) for photos in (train, val)]
    features = place_random_features(max(map(len, splits)), side, channels, device)
    train_photos, val_photos = (CachedPhotos(split, np.arange(len(split)), features.read) for split in splits)
    return TrainingData(
        train_photos, val_photos, channels=channels, native_cells=side**2, encoder=None, encoder_recipe=RECIPE
    )


def first_photos(data: TrainingData, photos: int) -> TrainingData:
    """The data with the first photos of its train split only."""
    train = data.train
    assert isinstance(train, CachedPhotos)
    rows = np.arange(min(photos, len(train.split)))
    return data._replace(train=CachedPhotos(train.split.subset(rows), train.rows[rows], train.read))


# ---- files


def write_data(folder: Path, photos: Iterable[Photo], vocabulary: Vocabulary) -> None:
    """Write captions.jsonl and vocab.json."""
    write_captions(folder / CAPTIONS_FILE, photos)
    vocabulary.save(folder / VOCABULARY_FILE)


def write_features(
    path: Path, ids: Sequence[str], side: int, channels: int, grid: str = "native", view: str = "whole"
) -> None:
    """Write a feature file of random maps in float16, and the file of its encoder.

    side: native cells per side. grid: native, or 14 for 14x14 maps. view: that it claims to hold.
    """
    attributes = describe_features(RECIPE, (side, side), grid, "float32", view)
    writer = FeatureWriter(path, ids, attributes, channels, "float16", overwrite=False)
    stored_side = side if grid == "native" else int(grid)
    cells = torch.randn(min(CHUNK, len(ids)), stored_side, stored_side, channels).relu_().half()
    pooled = cells.float().mean((1, 2))
    for rows in split_batches(np.arange(len(ids)), len(cells)):
        writer.write(rows, cells[: len(rows)], pooled[: len(rows)])
    writer.close()
    save_checkpoint(encoder_file(path), {"encoder": {**RECIPE, "state": None}})


def write_photos(folder: Path, photos: int, width: int = 640, height: int = 480) -> list[str]:
    """Write JPEGs of the size of COCO's, 0.15 MB each -> their paths. Smooth noise compresses like photos."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:06}.jpg" for number in range(photos)]
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noise = rng.integers(-12, 13, (height, width, 1), np.int16)
        Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return [str(path) for path in paths]
