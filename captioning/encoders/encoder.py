"""The encoder: a network from a family of encoders, applied to photos -> Grid.

Letters: B photos, S pixels per side, C channels, h x w native cells (N = h w).
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from captioning.encoders.activation_checkpointing import checkpoint_segments
from captioning.encoders.grid import Grid, grid_pooling
from captioning.encoders.images import Transform
from captioning.encoders.protocol import BODY_PREFIX, BodyOptions, find_family, full_name
from captioning.errors import UserError
from captioning.runtime.checkpoint import state_sha256
from captioning.runtime.device import autocast
from captioning.runtime.library_errors import reason

Pooled = Literal["mean", "class"]
BLANK_ERRORS = (RuntimeError, AssertionError, ValueError)  # of networks that photos of a size do not suit


class Encoder(nn.Module):
    """A network without its classification head, and the transform of its input. Created in eval mode.

    name: of the network in its family, such as `resnet101`, `resnet101.LAYER` to truncate it after a layer, or
    `timm/NAME`.
    weights: their source, for messages and files; this class does not load them (see loading.py).
    pooled: what a decoder without attention reads: the mean of the cells, or the class token or attention pooling.
    drop_path: probability that training skips the last residual branch of a photo.
    Raises UserError for an unknown name.
    """

    def __init__(self, name: str, weights: str, transform: Transform, pooled: Pooled = "mean", drop_path: float = 0.0):
        super().__init__()
        self.name = full_name(name)
        self.weights = weights
        self.transform = transform
        self.pooled = pooled
        self.body_options = BodyOptions(transform.image_size, pooled == "class", drop_path)
        family, name_in_family = find_family(self.name)
        self.body = family.build(name_in_family, self.body_options)
        self.segments: tuple[nn.Module, ...] = ()  # of the body, for activation checkpointing
        self.compiled_batch_size = 0  # smaller batches are padded to it, since another size would recompile the body
        self.for_attention = True  # False: a decoder without attention reads the grids
        self.eval()  # BatchNorm must keep its statistics

    def forward(self, photos: Tensor) -> Grid:
        """Photos (B, 3, S, S) uint8 -> their Grid. Under autocast its cells have the lower precision.

        With pooled="class" and for_attention=False the grid has one cell, the class vector.
        """
        grid, class_vector = self.encode(photos)
        if class_vector is None or self.for_attention:
            return grid
        return Grid(class_vector[:, None], grid_pooling(1, 1, photos.device))

    def encode(self, photos: Tensor) -> tuple[Grid, Tensor | None]:
        """Photos (B, 3, S, S) uint8 -> their Grid and, with pooled="class", class vectors (B, C)."""
        features, class_vector = self._run_body(self.transform.normalise(photos))  # (B, C, h, w)
        height, width = self._check_spatial(features).shape[2:]
        cells = features.permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, C), no copy: the memory is channels-last
        return Grid(cells, grid_pooling(height, width, cells.device)), class_vector

    def _run_body(self, photos: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised photos -> the map (B, C, h, w) and, with pooled="class", class vectors (B, C)."""
        count = photos.shape[0]
        # compiled_batch_size first: comparing the count would fix the batch size of an export
        padded = self.compiled_batch_size > 0 and count < self.compiled_batch_size
        if padded:
            photos = F.pad(photos, (0, 0) * 3 + (0, self.compiled_batch_size - count))
        outputs = self._run_segments(photos) if self.segments and torch.is_grad_enabled() else self.body(photos)
        features, class_vector = outputs if self.body_options.class_vector else (outputs, None)
        if padded:
            features = features[:count]
            class_vector = None if class_vector is None else class_vector[:count]
        return features, class_vector

    def _run_segments(self, photos: Tensor) -> Tensor:
        for segment in self.segments:
            photos = checkpoint(segment, photos, use_reentrant=False)
        return photos

    def _check_spatial(self, features: Tensor) -> Tensor:
        if features.dim() != 4:
            shape = tuple(features.shape[1:])
            raise UserError(f"--encoder {self.name}: returns {shape}, not a spatial map; try resnet101")
        return features

    @torch.no_grad()
    def output_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of the native map. Raises UserError if photos of this size are too small for the network."""
        try:
            features, _ = self._run_body(self._blank_photos(torch.float32))
        except BLANK_ERRORS as error:
            size = self.transform.image_size
            raise UserError(f"--image-size {size}: too small for {self.name} ({reason(error)})") from None
        channels, height, width = self._check_spatial(features).shape[1:]
        return height, width, channels

    def _blank_photos(self, dtype: torch.dtype, count: int = 1) -> Tensor:
        size = self.transform.image_size
        return torch.zeros(count, 3, size, size, dtype=dtype, device=next(self.parameters()).device)

    @torch.no_grad()
    def checkpoint_activations(self) -> None:
        """Store only the activations between segments of the body; the backward pass recomputes those within.

        Raises UserError if the body can do no such thing and has no torch.fx graph to split.
        """
        body: Any = self.body
        if hasattr(body, "checkpoint_activations"):
            body.checkpoint_activations()
            return
        if not isinstance(self.body, fx.GraphModule):
            raise UserError(f"--checkpoint-activations: {self.name} has no torch.fx graph; leave it out")
        self.segments = tuple(checkpoint_segments(self.body, self._blank_photos(torch.float32)))

    @torch.inference_mode()
    def compile_for(self, batch_size: int, precision: torch.dtype) -> float:
        """Compile the body for inference on batches of at most `batch_size` photos -> the seconds it took.

        Raises UserError if it cannot be compiled.
        """
        self.compiled_batch_size = batch_size
        start = time.monotonic()
        _cache_code_at_home()
        self.body.compile(dynamic=False)
        photos = self._blank_photos(torch.uint8, batch_size)
        try:
            with autocast(photos.device, precision):
                self(photos).cells.cpu()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = getattr(error, "inner_exception", error)  # torch wraps what the backend raised
            raise UserError(f"--compile: {reason(cause)}; fix that, or leave it out") from None
        return time.monotonic() - start

    def unfreeze(self, from_layer: str | None) -> list[nn.Parameter]:
        """Enable gradients for the body's layers from `from_layer` on -> their parameters.

        None: from layer2 on in a ResNet, else all. Raises UserError for an unknown layer.
        """
        names = self._parameter_names()
        if from_layer is None:
            from_layer = "layer2" if any(name.startswith("layer2.") for name in names) else "all"
        inside = [i for i, name in enumerate(names) if from_layer == "all" or f"{name}.".startswith(f"{from_layer}.")]
        if not inside:
            raise UserError(
                f"--unfreeze-from {from_layer}: {self.name} has only {_list_layers(names)}; give one of them, or all"
            )
        for i, parameter in enumerate(self.body.parameters()):
            parameter.requires_grad_(i >= inside[0])
        return [parameter for parameter in self.body.parameters() if parameter.requires_grad]

    def layers(self) -> list[list[nn.Parameter]]:
        """The trained parameters by depth, for layer-wise learning rates: first those next to the photo.

        Raises UserError if the family does not know the depths.
        """
        body: Any = self.body
        if not hasattr(body, "layer_depths"):
            raise UserError(f"--layer-decay: requires a timm/ encoder, not {self.name}; leave it out")
        depths = body.layer_depths()
        layers: list[list[nn.Parameter]] = [[] for _ in range(max(depths.values()) + 1)]
        for name, parameter in self.body.named_parameters():
            if parameter.requires_grad:
                layers[depths[name]].append(parameter)
        return layers

    def _parameter_names(self) -> list[str]:
        """The names of the body's parameters as its library knows them."""
        return [name.removeprefix(BODY_PREFIX) for name, _ in self.body.named_parameters()]

    def train_mode(self, batch_norm: bool) -> None:
        """Prepare for training.

        batch_norm: update BatchNorm's statistics, as a body trained from scratch needs; else keep those it has.
        """
        self.eval()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(batch_norm)
            elif type(module).__name__ == "DropPath":  # timm's: with --drop-path it skips branches at random
                module.train()

    def recipe(self) -> dict:
        """Everything that determines the features, as plain data for feature files and checkpoints."""
        return {
            "name": self.name,
            "weights": self.weights,
            "sha256": state_sha256(self.body.state_dict()),
            "transform": self.transform.to_dict(),
            "pooled": self.pooled,
        }

    def to_checkpoint(self) -> dict:
        """The recipe and the state dict.

        "state" is None for torchvision's ImageNet weights: name and sha256 identify them.
        """
        state = None if self.weights == "imagenet" else self.body.state_dict()
        return {**self.recipe(), "state": state}


def _list_layers(names: list[str]) -> str:
    """The layers in the names of parameters, such as "conv1, blocks (.0 to .11), norm"."""
    layers: dict[str, list[int]] = {}
    for name in names:
        layer, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        numbers = layers.setdefault(layer, [])
        if number.isdigit():
            numbers.append(int(number))
    return ", ".join(f"{k} (.{min(v)} to .{max(v)})" if v else k for k, v in layers.items())


def _cache_code_at_home() -> None:
    """Let Inductor, which runs the code that it finds in its cache, keep it where no other user may write.

    Its default is a temporary folder. Recent versions of torch write that to the environment when they are imported.
    """
    default = os.path.join(tempfile.gettempdir(), "torchinductor_")
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default).startswith(default):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(torch.hub.get_dir()).with_name("inductor"))
