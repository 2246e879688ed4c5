"""The feature maps of the photos of a data set, or of any photos, batch by batch: cached, or computed from their files.

Letters: N photos, V views of each, B photos per batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from captioning.captioner import Captioner
from captioning.dataset.caption_dataset import check_captions_complete
from captioning.encoders.grid import Grid
from captioning.encoders.images import FailureLimit, ReadViews, make_loader, split_batches
from captioning.encoders.views import first_views
from captioning.errors import UserError
from captioning.features.feature_files import FeatureFiles, find_feature_files, open_feature_files
from preprocess.captions import Photo

PhotoGrids = Iterator[tuple[list[Photo], list[Grid]]]  # photos of a batch, and the maps of each of their views


def open_matching_features(
    captioner: Captioner,
    run: Path,
    data: Path,
    ids: Sequence[str],
    features: tuple[Path, ...] = (),
    views: int = 1,
    allow_missing: float = 0.01,
) -> FeatureFiles | None:
    """Open the cached features of a data set, or return None, with a printed reason, to encode the photos instead.

    run: the captioner's, for messages. ids: of all photos of captions.jsonl. features: files; those of `data` unless
    given. Raises UserError if given files are of another encoder.
    """
    path, *_ = find_feature_files(data)
    if not features and not path.exists():
        print(f"{path}: does not exist; encoding the photos")
        return None
    files = open_feature_files(features, data, views=map(str, first_views(views)))
    located = files.locate(ids)
    files.check_dataset(located, data)
    reader = files.first
    path = reader.path
    if not features:
        for rows, file in zip(located.T, files.readers, strict=True):
            check_captions_complete(rows, file.path, len(file.ids), allow_missing)
    if reader.attributes["weights_sha256"] == captioner.encoder_sha256:
        difference = reader.transform().differences(captioner.transform)
        if difference:
            print(f"{path}: made from other pixels than those of {run}: {difference}; captions may differ")
        return files
    encoder = f"{reader.attributes['encoder']} ({reader.attributes['weights']})"
    mismatch = f"{path}: made by {encoder}, not by the encoder of {run}"
    if features:
        raise UserError(f"{mismatch}; leave out --features to encode the photos")
    print(f"{mismatch}; encoding the photos")
    return None


def available_rows(
    files: FeatureFiles, photos: list[Photo], data: Path, views: int, allow_missing: float
) -> tuple[list[Photo], np.ndarray]:
    """The photos that have features of all views, and the rows of these views (N, V) int64.

    Raises UserError if there are no features of a view, or if too many photos lack one.
    """
    rows = files.rows_of_views(files.locate([photo.id for photo in photos]))
    columns = []
    for view in first_views(views):
        if view not in files.views:
            raise UserError(
                f"--views {views}: {files}: no features of the view {view}; run: python extract_features.py "
                f"{data} --views {views}"
            )
        files.available(rows, view, allow_missing, data)
        columns.append(rows[:, files.views.index(view)])
    wanted = np.stack(columns, 1)
    present = (wanted >= 0).all(axis=1)
    return [photos[i] for i in np.flatnonzero(present)], wanted[present]


def cached_grids(
    captioner: Captioner, files: FeatureFiles, photos: list[Photo], rows: np.ndarray, batch_size: int
) -> PhotoGrids:
    """Read the maps from the cache. rows (N, V): from `available_rows`."""
    pooled = not captioner.decoder.uses_attention
    for indices in split_batches(range(len(photos)), batch_size):
        grids = [files.read(view_rows, pooled) for view_rows in rows[list(indices)].T]
        yield [photos[index] for index in indices], grids


def encoded_grids(
    captioner: Captioner, photos: list[Photo], batch_size: int, views: int, workers: int, failures: FailureLimit
) -> PhotoGrids:
    """Decode and encode the photos. Those that cannot be read are left out and collected in `failures`."""
    indices = split_batches(range(len(photos)), batch_size)
    workers = workers if len(indices) > 1 else 0
    paths = [photo.image for photo in photos]
    read = ReadViews(first_views(views), [photo.id for photo in photos])
    for batch in make_loader(read, paths, indices, captioner.encoder.transform, workers):
        failures.collect(batch.failures)
        if batch.indices:
            yield [photos[index] for index in batch.indices], captioner.encode(batch.photos, views)
