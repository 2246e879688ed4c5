"""A small data set: photos of coloured squares with one or two captions each; and helpers that read runs on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from captioning.runtime.checkpoint import load_checkpoint
from preprocess.captions import CAPTIONS_FILE, Photo, write_captions
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary

ENCODER = {
    "encoder": "resnet18.layer2",
    "weights": "random",
    "image_size": 64,
    "workers": 0,
    "precision": "float32",
    "device": "cpu",
}
TINY = {
    "embedding_size": 16,
    "attention_size": 16,
    "hidden_size": 24,
    "batch_size": 6,
    "learning_rate": 1e-2,
    "device": "cpu",  # sums on a GPU are not reproducible
}
# With 8 heads, a head would have two numbers, and their norm would amplify rounding.
SPECIAL = {"xlan": {"heads": 2}}
QUICK = {**TINY, "max_length": 12, "preview_photos": 1}  # less validation; the captions have up to 5 words
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}


def make_small_data(folder: Path, photos: int = 24, seed: int = 0) -> Path:
    """Write data/small below `folder`: photos of 64x64 pixels, captions.jsonl and vocab.json. Return data/small."""
    random = np.random.default_rng(seed)
    data = folder / "data" / "small"
    (data / "photos").mkdir(parents=True)
    records = []
    for i in range(photos):
        colour, background = map(str, random.choice(list(COLOURS), 2, replace=False))
        pixels = np.full((64, 64, 3), COLOURS[background], np.uint8)
        x, y = random.integers(4, 36, 2)
        pixels[y : y + 24, x : x + 24] = COLOURS[colour]
        path = data / "photos" / f"{i}.png"
        Image.fromarray(pixels).save(path)
        captions = [("a", colour, "square", "on", background), ("a", colour, "square")][: 1 + i % 2]
        split = "val" if i % 6 == 5 else "train"
        records.append(Photo(str(path), f"photo{i}", split, tuple(captions)))
    write_captions(data / CAPTIONS_FILE, records)
    train = [caption for record in records if record.split == "train" for caption in record.captions]
    Vocabulary.build(train, language="en", tokenizer="whitespace", min_count=1, max_words=100).save(
        data / VOCABULARY_FILE
    )
    return data


def weights(run: str) -> dict[str, torch.Tensor]:
    """The decoder's weights in the last checkpoint of a run."""
    return load_checkpoint(Path("checkpoints") / run / "last.pt")["decoder"]["state"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states are bit-equal."""
    return all(torch.equal(one[key], other[key]) for key in one)


def log_of(run: str, *events: str) -> list[dict]:
    """The events of these kinds in the log of a run; without kinds, its epochs."""
    lines = [json.loads(line) for line in (Path("checkpoints") / run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] in (events or ["epoch"])]
