"""What `python -m preprocess --check` finds of faults that are planted in a data set with cached features.

    python bench/doctor.py data/f8k-en --seeds 0 1

Swapped captions: 200 photos are drawn, and a caption of each; every caption moves to the next of these photos. Copies:
50 photos of train are saved anew as JPEGs of quality 30 to 90, at 0.75 to 0.95 of their size, and join val. The cached
features of everything else stay as they are, and no file of the data set is changed.

What is found beside the planted faults may be right: those captions are printed with --show, to be looked at.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from captioning.doctor.checkup import read_features
from captioning.doctor.findings import Check, Finding
from captioning.doctor.mismatches import check_mismatches
from captioning.doctor.near_duplicates import check_near_duplicates
from captioning.encoders.gpu_decoding import load_photos
from captioning.encoders.images import open_photo, split_batches
from captioning.encoders.loading import encoder_from_checkpoint, read_encoder_checkpoint
from preprocess.captions import Photo, read_captions
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary

SWAPPED = 200
COPIES = 50


def swap_captions(photos: Sequence[Photo], seed: int) -> tuple[list[Photo], set[tuple[str, tuple[str, ...]]]]:
    """The photos with SWAPPED captions at other photos, and these: (id of the photo, words)."""
    random = np.random.default_rng(seed)
    swapped = list(photos)
    chosen = random.choice(len(photos), SWAPPED, replace=False)
    places = [(int(photo), int(random.integers(len(photos[photo].captions)))) for photo in chosen]
    planted = set()
    for (source, number), (target, place) in zip(places, places[1:] + places[:1], strict=True):
        caption = photos[source].captions[number]
        captions = list(photos[target].captions)
        captions[place] = caption
        swapped[target] = replace(photos[target], captions=tuple(captions))
        planted.add((photos[target].id, caption))
    return swapped, planted


def save_copies(photos: Sequence[Photo], folder: Path, seed: int) -> list[Photo]:
    """Copies of COPIES photos of train, as photos of val: smaller, and compressed anew."""
    random = np.random.default_rng(seed)
    train = [photo for photo in photos if photo.split == "train"]
    copies = []
    for index in random.choice(len(train), COPIES, replace=False):
        photo = train[index]
        image = open_photo(photo.image)
        scale = random.uniform(0.75, 0.95)
        path = folder / f"{len(copies)}.jpg"
        size = (round(image.width * scale), round(image.height * scale))
        image.resize(size).save(path, quality=int(random.integers(30, 91)))
        copies.append(replace(photo, image=str(path), id=f"copy of {photo.id}", split="val"))
    return copies


@torch.inference_mode()
def encode(photos: Sequence[Photo], features: Path) -> Tensor:
    """The mean feature of each photo (B, C) float32, by the encoder of a feature file."""
    encoder = encoder_from_checkpoint(read_encoder_checkpoint(features)).eval()
    paths = [photo.image for photo in photos]
    batches = load_photos(torch.device("cpu"), paths, split_batches(np.arange(len(photos)), 25), encoder.transform, 0)
    return torch.cat([encoder(batch.photos).mean() for batch in batches])


def report_swaps(check: Check, planted: set[tuple[str, tuple[str, ...]]], show: int) -> float:
    """Print the precision among the first SWAPPED findings, and return it."""

    def is_planted(finding: Finding) -> bool:
        return (finding.photos[0].id, finding.caption) in planted

    first = check.findings[:SWAPPED]
    precision = sum(map(is_planted, first)) / SWAPPED
    recall = sum(map(is_planted, check.findings)) / SWAPPED
    half = sum(map(is_planted, first[: SWAPPED // 2])) / (SWAPPED // 2)
    print(
        f"swapped captions: {precision:.1%} of the first {SWAPPED} findings are planted, {half:.1%} of the first "
        f"{SWAPPED // 2}; {len(check.findings):,} findings hold {recall:.1%} of the planted"
    )
    for rank, finding in enumerate(first):
        if show and not is_planted(finding):
            show -= 1
            others = " / ".join(" ".join(words) for words in finding.photos[0].captions if words != finding.caption)
            print(f"  {rank + 1} {finding.photos[0].id}: {' '.join(finding.caption or ())} | {others}")
    return precision


def report_copies(check: Check) -> float:
    """Print how many of the copies are found, and return the fraction."""
    pairs = [{photo.id for photo in finding.photos} for finding in check.findings]
    found = sum(any(id.startswith("copy of ") and id.removeprefix("copy of ") in pair for id in pair) for pair in pairs)
    print(f"copies: {found} of {COPIES} found, among {len(pairs)} findings")
    return found / COPIES


def measure(data: Path, features: Path, seed: int, show: int = 0) -> tuple[float, float]:
    """Plant the faults, check, and report. Returns the precision of swaps, and the fraction of copies found."""
    language = Vocabulary.load(data / VOCABULARY_FILE).language
    photos, pooled = read_features(list(read_captions(data)), data, features, allow_missing=0.01)
    swapped, planted = swap_captions(photos, seed)
    started, cpu_started = time.monotonic(), time.process_time()
    check = check_mismatches(swapped, pooled, language)
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    print(f"{data}, seed {seed}: mismatches took {seconds:.0f} s, {cpu_seconds:.0f} CPU seconds")
    precision = report_swaps(check, planted, show)
    with tempfile.TemporaryDirectory() as folder:
        copies = save_copies(photos, Path(folder), seed)
        both = torch.cat([pooled, encode(copies, features).to(pooled.device)])
        return precision, report_copies(check_near_duplicates([*photos, *copies], both))


def main() -> None:
    """Measure, for each seed."""
    parser = argparse.ArgumentParser(description="faults planted in a data set, and what --check finds of them")
    parser.add_argument("data", type=Path, help="a data folder with captions.jsonl")
    parser.add_argument("--features", type=Path, help="features.h5 in the data folder unless given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--show", type=int, default=0, help="print so many findings that were not planted")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        measure(arguments.data, arguments.features or arguments.data / "features.h5", seed, arguments.show)


if __name__ == "__main__":
    main()
