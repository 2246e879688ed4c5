"""What `python -m preprocess --check` finds of faults that are planted in a data set with cached features.

    python bench/doctor.py data/f8k-en --seeds 0 1

Swapped captions: 200 photos are drawn, and a caption of each; every caption moves to the next of these photos. Copies:
50 photos of train are saved anew as JPEGs of quality 30 to 90, at 0.75 to 0.95 of their size, and join val. The cached
features of everything else stay as they are, and no file of the data set is changed.

What is found beside the planted faults may be wrong, too: those captions are printed with --show, to be looked at.
bench/flickr8k_cn_wrong.tsv names those of Flickr8k-CN that were found wrong beside their photos, without repeating the
data: an id and the digest of a text a line.

    python bench/doctor.py data/f8k-zh --wrong bench/flickr8k_cn_wrong.tsv              # counts them apart
    python bench/doctor.py data/f8k-zh --wrong bench/flickr8k_cn_wrong.tsv --leave-out  # takes them out first
"""

from __future__ import annotations

import argparse
import hashlib
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

Caption = tuple[str, tuple[str, ...]]  # the id of the photo, and the words


def read_wrong(path: Path, photos: Sequence[Photo], vocabulary: Vocabulary) -> set[Caption]:
    """The captions that a file lists, each as the id of the photo, a tab, and the `digest` of the text."""
    words_of = {(photo.id, digest(vocabulary.join(words))): words for photo in photos for words in photo.captions}
    listed = [tuple(line.split("\t")) for line in path.read_text("utf-8").splitlines()]
    if missing := [caption for caption in listed if caption not in words_of]:
        raise SystemExit(f"{path}: the data set has no caption {missing[0]}")
    return {(caption[0], words_of[caption]) for caption in listed}


def digest(text: str) -> str:
    """What stands for a text in a list of captions."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def leave_out(photos: Sequence[Photo], wrong: set[Caption]) -> list[Photo]:
    """The photos without these captions. A photo keeps at least one."""
    kept = [tuple(words for words in photo.captions if (photo.id, words) not in wrong) for photo in photos]
    return [replace(photo, captions=captions or photo.captions) for photo, captions in zip(photos, kept, strict=True)]


def swap_captions(photos: Sequence[Photo], seed: int) -> tuple[list[Photo], set[Caption]]:
    """The photos with SWAPPED captions at other photos, and these."""
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


def report_swaps(check: Check, planted: set[Caption], wrong: set[Caption], show: int) -> float:
    """Print the precision among the first SWAPPED findings, and return it."""

    def of(findings: Sequence[Finding], captions: set[Caption]) -> int:
        return sum((finding.photos[0].id, finding.caption) in captions for finding in findings)

    first = check.findings[:SWAPPED]
    precision = of(first, planted) / SWAPPED
    print(
        f"swapped captions: {precision:.1%} of the first {SWAPPED} findings are planted, "
        f"{of(first[: SWAPPED // 2], planted) / (SWAPPED // 2):.1%} of the first {SWAPPED // 2}; "
        f"{len(check.findings):,} findings hold {of(check.findings, planted) / SWAPPED:.1%} of the planted"
    )
    if wrong:
        print(f"planted or known to be wrong: {of(first, planted | wrong) / SWAPPED:.1%} of the first {SWAPPED}")
    for rank, finding in enumerate(first):
        if show and not of([finding], planted | wrong):
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


def measure(
    data: Path, features: Path, seed: int, show: int = 0, wrong: Path | None = None, clean: bool = False
) -> tuple[float, float]:
    """Plant the faults, check, and report. Returns the precision of swaps, and the fraction of copies found.

    wrong: lists captions that are wrong, as for `read_wrong`; clean: they are left out.
    """
    vocabulary = Vocabulary.load(data / VOCABULARY_FILE)
    photos = list(read_captions(data))
    if len(photos) < SWAPPED:
        raise SystemExit(f"error: {data}: {len(photos)} photos, of which {SWAPPED} would swap captions; use more")
    photos, pooled = read_features(photos, data, features, allow_missing=0.01)
    known = read_wrong(wrong, photos, vocabulary) if wrong else set()
    if clean:
        photos = leave_out(photos, known)
    swapped, planted = swap_captions(photos, seed)
    started, cpu_started = time.monotonic(), time.process_time()
    check = check_mismatches(swapped, pooled, vocabulary.language)
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    print(f"{data}, seed {seed}: mismatches took {seconds:.0f} s, {cpu_seconds:.0f} CPU seconds")
    precision = report_swaps(check, planted, known, show)
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
    parser.add_argument("--show", type=int, default=0, help="print so many findings that are neither planted nor known")
    parser.add_argument("--wrong", type=Path, help="captions known to be wrong; see above")
    parser.add_argument("--leave-out", action="store_true", help="take the captions of --wrong out first")
    arguments = parser.parse_args()
    if arguments.leave_out and not arguments.wrong:
        parser.error("--leave-out requires --wrong")
    features = arguments.features or arguments.data / "features.h5"
    for seed in arguments.seeds:
        measure(arguments.data, features, seed, arguments.show, arguments.wrong, arguments.leave_out)


if __name__ == "__main__":
    main()
