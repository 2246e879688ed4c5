"""The fraction of the training time in which train.py waits for features, by decoder and by location of the features.

    python bench/waiting.py FOLDER                    a folder on the disk to measure; 0.3 GB are written there
    python bench/waiting.py FOLDER --photos 4000 --device cuda --features-on gpu ram disk

Features and captions are random: they take the same time as real ones. The feature file has just been written, so it
is in the page cache. The fraction is `waiting` of the run's log.jsonl, for each epoch.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tyro.conf import Positional

import train
from captioning.encoders.images import Transform, split_batches
from captioning.encoders.loading import encoder_file
from captioning.features.feature_writer import FeatureWriter, describe_features
from captioning.runtime.checkpoint import save_checkpoint
from config import Train
from preprocess.captions import CAPTIONS_FILE, Photo, write_captions
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary

RECIPE = {"name": "bench", "weights": "none", "sha256": "", "transform": Transform().to_dict()}
CAPTIONS = 5  # per photo
LENGTH = 11  # words per caption
WORDS = 5000  # size of the vocabulary


@dataclass(frozen=True)
class Bench:
    folder: Positional[Path]  # to write to; everything written is removed
    photos: int = 400
    channels: int = 2048  # of the features; the grid has 8x8 cells, as for a photo of 256 pixels
    batch_size: int = 32  # captions
    epochs: int = 2
    decoders: tuple[str, ...] = ("attention", "lstm")
    features_on: tuple[str, ...] = ("disk", "ram")
    device: str = "auto"


def main(bench: Bench) -> None:
    original = os.getcwd()
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        os.chdir(folder)  # train.py writes to checkpoints/
        try:
            make_data(bench)
            rows = [measure(bench, decoder, location) for decoder in bench.decoders for location in bench.features_on]
        finally:
            os.chdir(original)
    print(f"{'decoder':>15} {'on':>5}  {'captions/s':>10}  {'MB/s':>7}  waiting, per epoch")
    print("\n".join(rows))
    print(
        f"{bench.photos} photos of {bench.channels} channels, {CAPTIONS} captions each, {bench.batch_size} captions "
        f"per batch, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def make_data(bench: Bench) -> None:
    """Write captions.jsonl, vocab.json, features.h5 and its encoder to the working directory."""
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(WORDS)]
    photos = [
        Photo(
            f"{i}.jpg",
            str(i),
            "val" if i < 4 else "train",
            tuple(tuple(rng.choice(words, LENGTH).tolist()) for _ in range(CAPTIONS)),
        )
        for i in range(bench.photos)
    ]
    write_captions(Path(CAPTIONS_FILE), photos)
    sentences = [caption for photo in photos for caption in photo.captions]
    Vocabulary.build(sentences, language="en", tokenizer="whitespace", min_count=1, max_words=WORDS).save(
        Path(VOCABULARY_FILE)
    )
    writer = FeatureWriter(
        Path("features.h5"),
        [photo.id for photo in photos],
        describe_features(RECIPE, (8, 8), "14", "float32"),
        bench.channels,
        "float16",
        overwrite=False,
    )
    cells = torch.randn(8, 14, 14, bench.channels)
    for rows in split_batches(np.arange(bench.photos), len(cells)):
        writer.write(rows, cells[: len(rows)], cells[: len(rows)].mean((1, 2)))
    writer.close()
    save_checkpoint(encoder_file(Path("features.h5")), {"encoder": {**RECIPE, "state": None}})


def measure(bench: Bench, decoder: str, location: str) -> str:
    """Train and return a row of the table."""
    config = Train(
        Path("."),
        f"{decoder}-{location}",
        decoder=decoder,
        features_on=location,
        batch_size=bench.batch_size,
        preview_photos=0,
        epochs=bench.epochs,
        device=bench.device,
    )
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):
        train.main(config)
    events = [json.loads(line) for line in (config.folder / "log.jsonl").read_text().splitlines()]
    epochs = [event for event in events if event["event"] == "epoch"]
    size = (4 if decoder == "lstm" else 64 * 2) * bench.channels  # bytes per photo: the mean, or the 8x8 cells
    last = epochs[-1]
    return (
        f"{decoder:>15} {location:>5}  {last['captions_per_second']:10,.0f}  "
        f"{last['photos_per_second'] * size / 1e6:7,.1f}  "
        f"{', '.join(format(epoch['waiting'], '.1%') for epoch in epochs)}"
    )


if __name__ == "__main__":
    main(tyro.cli(Bench))
