"""Any torchvision classifier, cut before its last pooling: photos -> Grid.

Letters: B photos, S pixels a side, C channels, h x w native cells (N = h w).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision import models

from captioning.encoders.grid import Grid, grid_pooling
from captioning.encoders.images import Transform, in_batches, photo_batches
from captioning.encoders.torchvision_backbone import checkpoint_segments, truncate_classifier
from captioning.errors import UserError
from captioning.runtime.checkpoint import (
    checkpoint_errors,
    load_checkpoint,
    load_tensors,
    read_checkpoint,
    state_sha256,
)
from captioning.runtime.device import autocast
from captioning.runtime.library_errors import reason

CALIBRATION_PHOTOS = 256


class Encoder(nn.Module):
    """name: torchvision's, `.LAYER` added where cut earlier; weights: where they came from."""

    def __init__(self, name: str, weights: str, transform: Transform):
        super().__init__()
        self.name, self.weights, self.transform = name, weights, transform
        self.body = truncate_classifier(name)
        self.segments: tuple[nn.Module, ...] = ()  # the body in pieces, where activations are computed twice
        self.compiled_for = 0  # photos: of another number the body would be compiled anew
        self.eval()  # eval: BatchNorm must not learn from our photos

    def forward(self, photos: Tensor) -> Grid:
        """Photos (B, 3, S, S) uint8 -> their Grid; the cells have the type that autocast computes in."""
        features = self._spatial(self._map(self.transform.normalise(photos)))  # (B, C, h, w)
        height, width = features.shape[2:]
        cells = features.permute(0, 2, 3, 1).flatten(1, 2)  # channels last in memory: no copy
        return Grid(cells, grid_pooling(height, width, cells.device))

    def _map(self, photos: Tensor) -> Tensor:
        if self.compiled_for and (missing := max(0, self.compiled_for - len(photos))):
            return self.body(F.pad(photos, (0, 0) * 3 + (0, missing)))[: len(photos)]
        if not (self.segments and torch.is_grad_enabled()):
            return self.body(photos)
        for segment in self.segments:
            photos = checkpoint(segment, photos, use_reentrant=False)
        return photos

    @torch.no_grad()
    def checkpoint_activations(self) -> None:
        """Keep only the activations between segments; the backward pass computes those inside once more."""
        size, device = self.transform.image_size, next(self.parameters()).device
        self.segments = tuple(checkpoint_segments(self.body, torch.zeros(1, 3, size, size, device=device)))

    @torch.inference_mode()
    def compile_for(self, photos: int, precision: torch.dtype) -> float:
        """Compile the body for batches of at most so many photos, in inference mode -> seconds it took.

        Raises UserError where it cannot be compiled.
        """
        self.compiled_for, began = photos, time.monotonic()
        # Code is kept there and run: in the folder of temporary files, torch's own choice, anyone could have put some.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(torch.hub.get_dir()).with_name("inductor")))
        self.body.compile(dynamic=False)
        size, device = self.transform.image_size, next(self.parameters()).device
        try:
            with autocast(device, precision):
                self(torch.zeros(photos, 3, size, size, dtype=torch.uint8, device=device)).cells.cpu()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(f"--compile: {reason(error)}; mend that, or leave it out") from None
        return time.monotonic() - began

    @torch.no_grad()
    def output_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of the native map."""
        size = self.transform.image_size
        try:
            features = self.body(torch.zeros(1, 3, size, size, device=next(self.parameters()).device))
        except RuntimeError as error:
            raise UserError(f"--image-size {size}: too small for {self.name} ({reason(error)})") from None
        channels, height, width = self._spatial(features).shape[1:]
        return height, width, channels

    def _spatial(self, features: Tensor) -> Tensor:
        if features.dim() != 4:
            shape = tuple(features.shape[1:])
            raise UserError(f"--encoder {self.name}: ends in no spatial map but in {shape}; try resnet101")
        return features

    def unfreeze(self, first: str | None) -> list[nn.Parameter]:
        """Let the layers from `first` on learn -> their parameters. None: from layer2 in a ResNet, else all."""
        names = [name for name, _ in self.body.named_parameters()]
        if first is None:
            first = "layer2" if any(name.startswith("layer2.") for name in names) else "all"
        begin = (
            0 if first == "all" else next((i for i, n in enumerate(names) if (n + ".").startswith(first + ".")), None)
        )
        if begin is None:
            layers = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise UserError(f"--unfreeze-from {first}: {self.name} has {layers}, or say all")
        for i, parameter in enumerate(self.body.parameters()):
            parameter.requires_grad_(i >= begin)
        return [parameter for parameter in self.body.parameters() if parameter.requires_grad]

    def train_mode(self, batch_norm: bool) -> None:
        """Ready for training. BatchNorm keeps ImageNet's statistics unless it still has everything to learn."""
        self.eval()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(batch_norm)

    def recipe(self) -> dict:
        """What decides the features, as plain data: kept in feature files and checkpoints."""
        return {
            "name": self.name,
            "weights": self.weights,
            "sha256": state_sha256(self.body.state_dict()),
            "transform": self.transform.to_dict(),
        }

    def to_checkpoint(self) -> dict:
        """The recipe and the weights; torchvision's own are left out: their name and sha256 find them again."""
        state = None if self.weights == "imagenet" else self.body.state_dict()
        return {**self.recipe(), "state": state}


def load_encoder(name: str | None, weights: str | None, image_size: int | None, seed: int = 0) -> Encoder:
    """An encoder as the flags --encoder, --weights, --image-size describe it; a run brings all three.

    Random weights are those of `seed`; their BatchNorm still wants `calibrate_on`.
    """
    weights = weights or "imagenet"
    if weights not in ("imagenet", "random") and _is_run(Path(weights)):
        run = load_checkpoint(Path(weights))
        if name or image_size:
            raise UserError(f"--weights {weights}: a run brings its --encoder and --image-size; leave those out")
        return encoder_from_checkpoint(run, weights)
    name, transform = name or "resnet101", Transform(image_size or 256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(name, weights, transform)
    if weights == "imagenet":
        encoder.body.load_state_dict(_body_part(_torchvision_weights(name), encoder, "torchvision"))
    elif weights != "random":
        encoder.body.load_state_dict(_body_part(_read_state(Path(weights)), encoder, weights))
    return encoder


def encoder_from_checkpoint(checkpoint: dict, weights: str | None = None) -> Encoder:
    """The very encoder that a run was trained with."""
    with checkpoint_errors("the run's encoder"):
        saved = checkpoint["encoder"]
        encoder = Encoder(saved["name"], weights or saved["weights"], Transform.from_dict(saved["transform"]))
        state = saved["state"] or _body_part(_torchvision_weights(saved["name"]), encoder, "torchvision")
        encoder.body.load_state_dict(state)
        same = state_sha256(encoder.body.state_dict()) == saved["sha256"]
    if not same:
        raise UserError(f"{saved['name']}: its weights are not those the run was trained with; extract and train again")
    return encoder


def _is_run(path: Path) -> bool:
    return path.is_dir() or path.name in ("best.pt", "last.pt")


def _torchvision_weights(name: str) -> dict[str, Tensor]:
    """The first ImageNet weights that torchvision published: those of the papers' recipes."""
    weights = next(iter(models.get_model_weights(name.partition(".")[0])))
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except OSError as error:
        raise UserError(
            f"{weights.url}: cannot be downloaded ({reason(error)}); fetch it and give --weights FILE"
        ) from None


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"--weights {path}: no such file or run; give imagenet, random, a state-dict file or checkpoints/RUN"
        )
    state = load_tensors(path, "a state dict that can be read safely", "save model.state_dict() there")
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"--weights {path}: holds no state dict; save model.state_dict() there")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _body_part(state: dict[str, Tensor], encoder: Encoder, source: str) -> dict[str, Tensor]:
    """The body's share of a classifier's state dict, in the body's types; the classifier itself is left out."""
    part = {}
    for key, own in encoder.body.state_dict().items():
        if key not in state and key.endswith("num_batches_tracked"):  # files older than torch 0.4.1 lack it
            part[key] = own
        elif key not in state or state[key].shape != own.shape:
            there = f"shape {tuple(state[key].shape)}, not {tuple(own.shape)}" if key in state else "missing"
            raise UserError(f"--weights {source}: not of {encoder.name} ({key}: {there}); name its --encoder")
        else:
            part[key] = state[key].to(own.dtype)
    return part


@torch.no_grad()
def calibrate_on(encoder: Encoder, paths: Sequence[str], batch_size: int, workers: int) -> None:
    """Set BatchNorm's statistics to those of the first photos: random weights say nothing without it."""
    encoder.output_shape()  # or it says that the photos are too small
    some = range(min(CALIBRATION_PHOTOS, len(paths)))
    batches = photo_batches(paths, in_batches(some, batch_size), encoder.transform, workers)
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
    print(f"--weights random: {encoder.name} has learnt nothing; its BatchNorm is calibrated on {len(some)} photos")


def encoder_file(features: Path) -> Path:
    """Where the encoder that made a feature file is kept: a run that trains on it takes it along."""
    return features.with_suffix(".encoder.pt")


def saved_encoder(features: Path, sha256: str | None = None) -> dict:
    """A checkpoint with the encoder behind a feature file; sha256: the file's own word of it. Raises UserError."""
    file, remedy = encoder_file(features), "extract again with --overwrite"
    if not file.exists():
        raise UserError(f"{file}: the encoder of {features} is missing; {remedy}")
    saved = read_checkpoint(file, ["encoder"], remedy)
    with checkpoint_errors(file):
        same = sha256 in (None, saved["encoder"]["sha256"])
    if not same:
        raise UserError(f"{file}: is not the encoder of {features}; {remedy}")
    return saved
