"""The fraction of the training time in which train.py waits for features, by decoder, location and number of views.

    python bench/waiting.py FOLDER                    a folder on the disk to measure; 0.3 GB are written there
    python bench/waiting.py FOLDER --photos 4000 --device cuda --features-on gpu ram disk
    python bench/waiting.py FOLDER --views 1 4 1 4 --cold        four views beside one; 1.3 GB

Features and captions are random: they take the same time as real ones. The feature files have just been written, so
they are in the page cache, unless --cold drops them from it before each run. The fraction is `waiting` of the run's
log.jsonl, for each epoch.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from cache import drop_from_page_cache
from synthetic import make_photos, make_vocabulary, write_data, write_features
from tyro.conf import Positional

import train
from captioning.encoders.views import View, first_views
from config import Train

CAPTIONS = 5  # per photo
LENGTH = 11  # words per caption
WORDS = 5000  # size of the vocabulary
VAL_PHOTOS = 4


@dataclass(frozen=True)
class Bench:
    folder: Positional[Path]  # to write to; everything written is removed
    photos: int = 400
    channels: int = 2048  # of the features; the grid has 8x8 cells, as for a photo of 256 pixels
    batch_size: int = 32  # captions
    epochs: int = 2
    decoders: tuple[str, ...] = ("attention", "lstm")
    features_on: tuple[str, ...] = ("disk", "ram")
    views: tuple[int, ...] = (1,)  # cached views of each photo, one run for each number
    cold: bool = False  # read from the disk itself: drop the files from the page cache before each run
    device: str = "auto"


def main(bench: Bench) -> None:
    original = os.getcwd()
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        os.chdir(folder)  # train.py writes to checkpoints/
        try:
            make_data(bench)
            rows = [
                measure(bench, decoder, location, views)
                for decoder in bench.decoders
                for location in bench.features_on
                for views in bench.views
            ]
        finally:
            os.chdir(original)
    print(
        f"{'decoder':>15} {'on':>5} {'views':>5}  {'seconds':>8}  {'captions/s':>10}  {'MB/s':>7}  waiting, per epoch"
    )
    print("\n".join(rows))
    print(
        f"{bench.photos} photos of {bench.channels} channels, {CAPTIONS} captions each, {bench.batch_size} captions "
        f"per batch, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def make_data(bench: Bench) -> None:
    """Write captions.jsonl, vocab.json, the feature files of all views and their encoders to the working directory."""
    rng = np.random.default_rng(0)
    vocabulary = make_vocabulary(WORDS)
    lengths = np.full(CAPTIONS * bench.photos, LENGTH)
    train = list(make_photos(rng, vocabulary, bench.photos, lengths))
    photos = [replace(photo, split="val") if i < VAL_PHOTOS else photo for i, photo in enumerate(train)]
    write_data(Path("."), photos, vocabulary)
    ids = [photo.id for photo in photos]
    for view, path in feature_files(max(bench.views)).items():
        write_features(path, ids, 8, bench.channels, grid="14", view=str(view))


def feature_files(views: int) -> dict[View, Path]:
    """The feature file of each of so many views."""
    return {view: view.file(Path("features.h5")) for view in first_views(views)}


def measure(bench: Bench, decoder: str, location: str, views: int) -> str:
    """Train and return a row of the table."""
    files = tuple(feature_files(views).values())
    if bench.cold:
        for path in files:
            drop_from_page_cache(path)
    config = Train(
        Path("."),
        f"{decoder}-{location}-{views}",
        features=files,
        overwrite=True,
        decoder=decoder,
        features_on=location,
        batch_size=bench.batch_size,
        preview_photos=0,
        epochs=bench.epochs,
        device=bench.device,
    )
    with open(os.devnull, "w", encoding="utf-8") as devnull, contextlib.redirect_stdout(devnull):
        train.main(config)
    events = [json.loads(line) for line in (config.folder / "log.jsonl").read_text("utf-8").splitlines()]
    epochs = [event for event in events if event["event"] == "epoch"]
    size = (4 if decoder == "lstm" else 64 * 2) * bench.channels  # bytes per photo: the mean, or the 8x8 cells
    last = epochs[-1]
    return (
        f"{decoder:>15} {location:>5} {views:5}  {last['train_seconds']:8.2f}  {last['captions_per_second']:10,.0f}  "
        f"{last['photos_per_second'] * size / 1e6:7,.1f}  "
        f"{', '.join(format(epoch['waiting'], '.1%') for epoch in epochs)}"
    )


if __name__ == "__main__":
    main(tyro.cli(Bench))
