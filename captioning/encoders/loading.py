"""Encoders from the command line's flags, from weight files and from checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from captioning.encoders.encoder import Encoder, Pooled
from captioning.encoders.images import SIMPLEJPEG_AND_TORCH, Transform, photo_batches, split_batches
from captioning.encoders.protocol import default_transform, find_family, full_name
from captioning.encoders.weight_files import fit_weights, read_state_dict
from captioning.errors import UserError
from captioning.runtime.checkpoint import (
    checkpoint_errors,
    load_checkpoint,
    read_checkpoint,
    state_sha256,
)
from captioning.runtime.packed_run import CHECKPOINTS

DEFAULT_ENCODER = "resnet101"
ENCODER_ENDING = ".encoder.pt"  # of the file that stores the encoder of a feature file
PUBLISHED = ("imagenet", "pretrained")  # what families call their published weights
CALIBRATION_PHOTOS = 256


def load_encoder(
    name: str | None,
    weights: str | None,
    image_size: int | None,
    seed: int = 0,
    pooled: Pooled | None = None,
    drop_path: float = 0.0,
    decoding: str = SIMPLEJPEG_AND_TORCH,
) -> Encoder:
    """An encoder from the flags --encoder, --weights, --image-size, --pooled and --drop-path; None selects the default.

    weights: "imagenet" (torchvision) or "pretrained" (timm), "random", a state-dict file; or a run or an encoder stored
    with features, which determine encoder and decoding. Random weights are generated from `seed`; call
    `calibrate_batch_norm` before using them.
    Raises UserError if a name, a file or a run is unknown or damaged.
    """
    if weights and weights not in (*PUBLISHED, "random") and _is_run(Path(weights)):
        run = load_checkpoint(Path(weights))
        if name or image_size or pooled:
            raise UserError(
                f"--weights {weights}: a run has its own --encoder, --image-size and --pooled; leave those out"
            )
        return encoder_from_checkpoint(run, weights, drop_path)
    if weights and weights.endswith(ENCODER_ENDING):
        if name or image_size or pooled:
            raise UserError(f"--weights {weights}: has its own --encoder, --image-size and --pooled; leave those out")
        saved = read_checkpoint(Path(weights), ["encoder"], "give other --weights")
        return encoder_from_checkpoint(saved, drop_path=drop_path)
    name = full_name(name or DEFAULT_ENCODER)
    family, _ = find_family(name)
    weights = weights or family.published
    if weights in PUBLISHED and weights != family.published:
        raise UserError(f"--weights {weights}: the published weights of {name} are --weights {family.published}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transform = replace(default_transform(name, image_size), decoding=decoding)
        encoder = Encoder(name, weights, transform, pooled or "mean", drop_path)
    if weights == family.published:
        _load_published_weights(encoder)
    elif weights != "random":
        _load_weights(encoder, read_state_dict(Path(weights)), weights)
    return encoder


def encoder_from_checkpoint(checkpoint: dict, weights: str | None = None, drop_path: float = 0.0) -> Encoder:
    """The encoder stored in a checkpoint. weights: replaces the recorded source of its weights.

    Raises UserError if the checkpoint is damaged, or its weights are no longer the same.
    """
    with checkpoint_errors("the run's encoder"):
        saved = checkpoint["encoder"]
        transform = Transform.from_dict(saved["transform"])
        pooled = saved.get("pooled", "mean")  # absent in older checkpoints
        encoder = Encoder(saved["name"], weights or saved["weights"], transform, pooled, drop_path)
        if saved["state"]:
            encoder.body.load_state_dict(saved["state"])
        else:
            _load_published_weights(encoder)
        same = state_sha256(encoder.body.state_dict()) == saved["sha256"]
    if not same:
        raise UserError(f"{saved['name']}: its weights differ from those of the run; extract and train again")
    return encoder


def encoder_file(features: Path) -> Path:
    """The file, next to a feature file, that stores its encoder for the runs trained on it."""
    return features.with_suffix(ENCODER_ENDING)


def read_encoder_checkpoint(features: Path, sha256: str | None = None) -> dict:
    """The checkpoint {"encoder": ...} next to a feature file.

    sha256: of the weights, from the feature file's attributes.
    Raises UserError if the checkpoint is missing or damaged, or its sha256 differs.
    """
    file = encoder_file(features)
    remedy = "extract again with --overwrite"
    if not file.exists():
        raise UserError(f"{file}: the encoder of {features} is missing; {remedy}")
    saved = read_checkpoint(file, ["encoder"], remedy)
    with checkpoint_errors(file):
        same = sha256 in (None, saved["encoder"]["sha256"])
    if not same:
        raise UserError(f"{file}: is not the encoder of {features}; {remedy}")
    return saved


@torch.no_grad()
def calibrate_batch_norm(encoder: Encoder, paths: Sequence[str], batch_size: int, workers: int) -> None:
    """Set BatchNorm's statistics from the first photos; without this the features of random weights may overflow."""
    encoder.output_shape()  # raises if the photos are too small
    photos = range(min(CALIBRATION_PHOTOS, len(paths)))
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    batches = split_batches(photos, batch_size) if norms else []
    for batch in photo_batches(paths, batches, encoder.transform, workers):
        if batch.indices:
            encoder(batch.photos)
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()
    calibrated = f"; its BatchNorm is calibrated on {len(photos)} photos" if norms else ""
    print(f"--weights random: {encoder.name} is untrained{calibrated}")


def _is_run(path: Path) -> bool:
    return path.is_dir() or path.name in CHECKPOINTS


def _load_published_weights(encoder: Encoder) -> None:
    family, name = find_family(encoder.name)
    _load_weights(encoder, family.published_weights(name, encoder.body_options), family.published)


def _load_weights(encoder: Encoder, state: dict[str, Tensor], source: str) -> None:
    family, _ = find_family(encoder.name)
    encoder.body.load_state_dict(fit_weights(state, family, encoder.body, encoder.name, source))
