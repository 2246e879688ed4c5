"""Runs all checks on a data folder: `python -m preprocess data/NAME --check`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from captioning.doctor.mismatches import check_mismatches
from captioning.doctor.near_duplicates import check_near_duplicates
from captioning.doctor.report import write_check_json, write_check_page
from captioning.doctor.text_checks import check_texts
from captioning.errors import UserError
from captioning.features.feature_files import FeatureFiles
from captioning.features.feature_reader import FeatureReader
from captioning.runtime.device import pick_device
from preprocess.captions import Photo, read_captions
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary

PAGE = "check.html"
JSON_FILE = "check.json"
MIN_PHOTOS = 100  # from which the models of mismatches learn


def check_data(data: Path, features: Path | None, allow_missing: float) -> None:
    """Check captions.jsonl, and with a feature file the photos, and write check.html and check.json into `data`.

    features: a feature file, or the name of one in `data`. Raises UserError if a file is missing or damaged, if the
    features are those of other photos, or if a larger fraction than `allow_missing` of the photos has none.
    """
    started = time.monotonic()
    vocabulary = Vocabulary.load(data / VOCABULARY_FILE)
    photos = list(read_captions(data))
    checks = check_texts(photos, vocabulary.language)
    if features is None:
        print("--features features.h5 adds captions that fit another photo better, and near-duplicate photos")
    else:
        with_features, pooled = read_features(photos, data, features, allow_missing)
        mismatches = check_mismatches(with_features, pooled, vocabulary.language)
        checks = [mismatches, check_near_duplicates(with_features, pooled), *checks]
    write_check_json(data / JSON_FILE, checks)
    write_check_page(data / PAGE, f"{data}: what looks wrong", vocabulary, checks)
    for check in checks:
        print(f"{len(check.findings):>9,}  {check.title}")
    print(f"wrote {data / PAGE} and {data / JSON_FILE} in {time.monotonic() - started:.0f} s")


def read_features(
    photos: Sequence[Photo], data: Path, features: Path, allow_missing: float
) -> tuple[list[Photo], Tensor]:
    """The photos that have features, and the mean of each (N, F) float32, on the GPU if there is one.

    Raises UserError like `check_data`, or if there are too few photos to learn from.
    """
    path = features if features.exists() else data / features
    files = FeatureFiles([FeatureReader(path)])
    located = files.locate([photo.id for photo in photos])
    files.check_dataset(located, data)
    rows = files.rows_of_views(located)[:, 0]  # a file has one view
    missing = int((rows < 0).sum())
    if missing > allow_missing * len(rows):
        raise UserError(
            f"{path}: no features for {missing:,} of {len(rows):,} photos; run: python extract_features.py {data}"
        )
    if missing:
        print(f"{path}: no features for {missing:,} of {len(rows):,} photos; only their captions are checked")
    if len(rows) - missing < MIN_PHOTOS:
        raise UserError(f"{data}: has fewer than {MIN_PHOTOS} photos, too few to learn from; leave out --features")
    pooled = files.read(rows[rows >= 0], pooled=True).cells[:, 0].float()
    return [photo for photo, row in zip(photos, rows, strict=True) if row >= 0], pooled.to(pick_device("auto"))
