"""Encoders from the command line's flags, from weight files and from checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from captioning.encoders.encoder import Encoder
from captioning.encoders.images import SIMPLEJPEG_AND_TORCH, Transform, photo_batches, split_batches
from captioning.encoders.protocol import find_family
from captioning.errors import UserError
from captioning.runtime.checkpoint import (
    checkpoint_errors,
    load_checkpoint,
    load_tensors,
    read_checkpoint,
    state_sha256,
)

DEFAULT_ENCODER = "resnet101"
DEFAULT_IMAGE_SIZE = 256  # pixels per side
CALIBRATION_PHOTOS = 256


def load_encoder(
    name: str | None,
    weights: str | None,
    image_size: int | None,
    seed: int = 0,
    decoding: str = SIMPLEJPEG_AND_TORCH,
) -> Encoder:
    """An encoder from the flags --encoder, --weights and --image-size; None selects the default.

    weights: "imagenet" (default), "random", a state-dict file, or a run, which determines all of them and decoding.
    Random weights are generated from `seed`; call `calibrate_batch_norm` before using them.
    Raises UserError if a name, a file or a run is unknown or damaged.
    """
    weights = weights or "imagenet"
    if weights not in ("imagenet", "random") and _is_run(Path(weights)):
        run = load_checkpoint(Path(weights))
        if name or image_size:
            raise UserError(f"--weights {weights}: a run has its own --encoder and --image-size; leave those out")
        return encoder_from_checkpoint(run, weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(
            name or DEFAULT_ENCODER, weights, Transform(image_size or DEFAULT_IMAGE_SIZE, decoding=decoding)
        )
    if weights == "imagenet":
        _load_imagenet_weights(encoder)
    elif weights != "random":
        encoder.body.load_state_dict(_select_body_weights(_read_state_dict(Path(weights)), encoder, weights))
    return encoder


def encoder_from_checkpoint(checkpoint: dict, weights: str | None = None) -> Encoder:
    """The encoder stored in a checkpoint. weights: replaces the recorded source of its weights.

    Raises UserError if the checkpoint is damaged, or its weights are no longer the same.
    """
    with checkpoint_errors("the run's encoder"):
        saved = checkpoint["encoder"]
        encoder = Encoder(saved["name"], weights or saved["weights"], Transform.from_dict(saved["transform"]))
        if saved["state"]:
            encoder.body.load_state_dict(saved["state"])
        else:
            _load_imagenet_weights(encoder)
        same = state_sha256(encoder.body.state_dict()) == saved["sha256"]
    if not same:
        raise UserError(f"{saved['name']}: its weights differ from those of the run; extract and train again")
    return encoder


def encoder_file(features: Path) -> Path:
    """The file, next to a feature file, that stores its encoder for the runs trained on it."""
    return features.with_suffix(".encoder.pt")


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
    batches = photo_batches(paths, split_batches(photos, batch_size), encoder.transform, workers)
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    for batch in batches:
        if batch.indices:
            encoder(batch.photos)
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()
    print(f"--weights random: {encoder.name} is untrained; its BatchNorm is calibrated on {len(photos)} photos")


def _is_run(path: Path) -> bool:
    return path.is_dir() or path.name in ("best.pt", "last.pt")


def _load_imagenet_weights(encoder: Encoder) -> None:
    family, name = find_family(encoder.name)
    state = family.imagenet_weights(name)
    encoder.body.load_state_dict(_select_body_weights(state, encoder, "imagenet"))


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"--weights {path}: no such file or run; give imagenet, random, a state-dict file or checkpoints/RUN"
        )
    saved = load_tensors(path, "a state dict that can be read safely", "save model.state_dict() there")
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"--weights {path}: holds no state dict; save model.state_dict() there")
    # DistributedDataParallel adds "module." to each key.
    return {key.removeprefix("module."): value for key, value in state.items()}


def _select_body_weights(state: dict[str, Tensor], encoder: Encoder, source: str) -> dict[str, Tensor]:
    """The entries of a classifier's state dict that the body has, in the body's types.

    Raises UserError if one is missing or has another shape.
    """
    selected = {}
    for key, current in encoder.body.state_dict().items():
        if key in state and state[key].shape == current.shape:
            selected[key] = state[key].to(current.dtype)
        elif key not in state and key.endswith("num_batches_tracked"):  # absent in files from before torch 0.4.1
            selected[key] = current
        else:
            found = f"shape {tuple(state[key].shape)}, not {tuple(current.shape)}" if key in state else "missing"
            message = f"--weights {source}: not of {encoder.name} ({key}: {found}); give the --encoder they belong to"
            raise UserError(message)
    return selected
