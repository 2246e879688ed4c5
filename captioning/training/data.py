"""The photos and captions a run trains on: cached features, or the photos themselves for a live encoder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from captioning.dataset.batches import Batch, CachedPhotos, LivePhotos
from captioning.dataset.caption_dataset import CaptionDataset, check_captions_complete
from captioning.dataset.prefetch import Prefetch
from captioning.decoders import DECODERS
from captioning.encoders.encoder import Encoder
from captioning.encoders.images import Augment
from captioning.encoders.loading import (
    calibrate_batch_norm,
    encoder_from_checkpoint,
    load_encoder,
    read_encoder_checkpoint,
)
from captioning.encoders.views import WHOLE
from captioning.features.feature_files import FeatureFiles, open_feature_files
from captioning.features.feature_placement import place_features
from captioning.runtime.checkpoint import trained_views
from captioning.runtime.loader import SafeLoader
from captioning.training.options import TrainingOptions

CALIBRATION_BATCH_SIZE = 32  # photos


class TrainingData(NamedTuple):
    """Batches of the two splits, and the encoder of their features."""

    train: CachedPhotos | LivePhotos
    val: CachedPhotos | LivePhotos
    channels: int  # of the features
    native_cells: int  # of a photo
    encoder: Encoder | None  # the live encoder; None with cached features
    encoder_recipe: dict | None  # of the encoder of the cached features; None with a live encoder
    views: tuple[str, ...] = ("whole",)  # of the cached photos, between which each epoch chooses


def cached_data(
    options: TrainingOptions,
    captions: CaptionDataset,
    train: np.ndarray,
    val: np.ndarray,
    device: torch.device,
    saved: dict | None = None,
) -> TrainingData:
    """Open the feature cache, and place the features of these photos on the GPU, in RAM or on disk.

    train, val: (N,) int64, indices of photos in `captions`. Photos without features are left out. saved: the checkpoint
    that the run resumes from: without --features, its views are used. Raises UserError if there is no feature file, if
    too many photos lack features (--allow-missing), or if the features do not fit.
    """
    views = trained_views(saved) if saved else None
    files = open_feature_files(options.features, options.data, pin=device.type == "cuda", views=views)
    first = files.first
    located = files.locate(captions.ids)
    files.check_dataset(located, options.data)
    if not options.features:
        for column, reader in zip(located.T, files.readers, strict=True):
            check_captions_complete(column, reader.path, len(reader.ids), options.allow_missing)
    recipe = read_encoder_checkpoint(first.path, first.attributes["weights_sha256"])["encoder"]
    rows = files.rows_of_views(located)  # (N, V), of all photos
    train = train[files.available(rows[train], WHOLE, options.allow_missing, options.data)]
    val = val[files.available(rows[val], WHOLE, options.allow_missing, options.data)]
    train_split = captions.subset(train)
    train_rows = usable_views(options, files, rows[train], train_split.mentions_side())
    val_rows = rows[val, 0]
    pooled = not DECODERS[options.decoder].uses_attention
    placed = place_features(
        files,
        np.concatenate([train_rows[train_rows >= 0], val_rows]),
        pooled,
        options.features_on,
        device,
        options.quantize_features,
        kernels=options.fast_path and options.kernels,
    )
    print(f"{files}: read from {placed.placement}")
    return TrainingData(
        train=CachedPhotos(train_split, train_rows, placed.read, options.seed),
        val=CachedPhotos(captions.subset(val), val_rows, placed.read),
        channels=first.channels,
        native_cells=1 if pooled else first.height * first.width,
        encoder=None,
        encoder_recipe=recipe,
        views=tuple(map(str, files.views)),
    )


def usable_views(
    options: TrainingOptions, files: FeatureFiles, rows: np.ndarray, mentions_side: np.ndarray
) -> np.ndarray:
    """The rows (N, V) int64 of the training photos' views, -1 for those that must not be used.

    Mirrored views of photos whose captions say left or right, mentions_side (N,) bool, are not. Raises UserError if too
    many photos lack a view.
    """
    rows = rows.copy()
    for column, view in enumerate(files.views):
        files.available(rows, view, options.allow_missing, options.data)
        if view.flip:
            rows[mentions_side, column] = -1
    if len(files.views) > 1:
        mirrored = any(view.flip for view in files.views)
        never = f"; {mentions_side.sum():,} of {len(rows):,} are never mirrored" if mirrored else ""
        print(f"each epoch shows every photo in one of the views {', '.join(map(str, files.views))}{never}")
    return rows


def live_data(
    options: TrainingOptions, train: CaptionDataset, val: CaptionDataset, saved: dict | None, start: dict | None
) -> TrainingData:
    """Load the encoder to fine-tune, and decode the photos for it.

    saved: the checkpoint that the run resumes from; start: the checkpoint of --start-from; see `live_encoder`.
    """
    encoder = live_encoder(options, train.paths, saved, start)
    encoder.for_attention = DECODERS[options.decoder].uses_attention
    height, width, channels = encoder.output_shape()
    augments = options.flip or options.crop < 1
    augment = Augment(options.flip, options.crop, options.seed) if augments else None
    return TrainingData(
        train=LivePhotos(train, encoder.transform, augment, train.mentions_side()),
        val=LivePhotos(val, encoder.transform),
        channels=channels,
        native_cells=height * width,
        encoder=encoder,
        encoder_recipe=None,
    )


def live_encoder(options: TrainingOptions, paths: Sequence[str], saved: dict | None, start: dict | None) -> Encoder:
    """Return the encoder of `saved` (the resumed run), else of `start` (--start-from), else a new one from the options.

    paths: training photos, which calibrate the BatchNorm of an encoder with random weights.
    """
    if saved:
        return encoder_from_checkpoint(saved, drop_path=options.drop_path)
    if start:
        encoder = encoder_from_checkpoint(start, drop_path=options.drop_path)
    else:
        encoder = load_encoder(
            options.encoder, options.weights, options.image_size, options.seed, drop_path=options.drop_path
        )
    if encoder.weights == "random":
        calibrate_batch_norm(encoder, paths, CALIBRATION_BATCH_SIZE, options.workers or 0)
    encoder.weights = f"{encoder.weights}, fine-tuned in {options.folder}"
    return encoder


def load_batches(
    photos: CachedPhotos | LivePhotos,
    plan: Sequence[np.ndarray],
    device: torch.device,
    live: bool = False,
    workers: int | None = None,
) -> Iterable[Batch]:
    """Load the batches of a plan ahead of their use, into pinned memory for a GPU.

    plan: the photos of each batch, (B,) int64. live: photos are decoded in `workers` processes, by default one per
    core; cached features are read in one thread.
    """
    pin = device.type == "cuda"
    if not live:
        return Prefetch(photos, plan, pin=pin)
    if workers is None:
        workers = torch.get_num_threads() if device.type == "cpu" else os.cpu_count() or 1
    return SafeLoader(photos, plan, workers, pin=pin)
