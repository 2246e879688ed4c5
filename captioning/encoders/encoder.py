"""The encoder: a CNN body from a family of encoders, applied to photos -> Grid.

Letters: B photos, S pixels per side, C channels, h x w native cells (N = h w).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from captioning.encoders import DEFAULT_FAMILY
from captioning.encoders.activation_checkpointing import checkpoint_segments
from captioning.encoders.grid import Grid, grid_pooling
from captioning.encoders.images import Transform
from captioning.encoders.protocol import find_family
from captioning.errors import UserError
from captioning.runtime.checkpoint import state_sha256
from captioning.runtime.device import autocast
from captioning.runtime.library_errors import reason


class Encoder(nn.Module):
    """A CNN without its classification head, and the transform of its input. Created in eval mode.

    name: of the CNN in its family, such as `resnet101`, or `resnet101.LAYER` to truncate it after a layer.
    weights: their source, for messages and files; this class does not load them (see loading.py).
    Raises UserError for an unknown name.
    """

    def __init__(self, name: str, weights: str, transform: Transform):
        super().__init__()
        self.name = name.removeprefix(f"{DEFAULT_FAMILY}/")
        self.weights = weights
        self.transform = transform
        family, name_in_family = find_family(self.name)
        self.body = family.build(name_in_family)
        self.segments: tuple[nn.Module, ...] = ()  # of the body, for activation checkpointing
        self.compiled_batch_size = 0  # smaller batches are padded to it, since another size would recompile the body
        self.eval()  # BatchNorm must keep its statistics

    def forward(self, photos: Tensor) -> Grid:
        """Photos (B, 3, S, S) uint8 -> their Grid. Under autocast its cells have the lower precision."""
        features = self._check_spatial(self._run_body(self.transform.normalise(photos)))  # (B, C, h, w)
        height, width = features.shape[2:]
        cells = features.permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, C), no copy: the memory is channels-last
        return Grid(cells, grid_pooling(height, width, cells.device))

    def _run_body(self, photos: Tensor) -> Tensor:
        # compiled_batch_size first: comparing len(photos) would fix the batch size of an export
        if self.compiled_batch_size and len(photos) < self.compiled_batch_size:
            padding = self.compiled_batch_size - len(photos)
            padded = F.pad(photos, (0, 0) * 3 + (0, padding))
            return self.body(padded)[: len(photos)]
        if not (self.segments and torch.is_grad_enabled()):
            return self.body(photos)
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
        """(h, w, C) of the native map. Raises UserError if photos of this size are too small for the CNN."""
        try:
            features = self.body(self._blank_photos(torch.float32))
        except RuntimeError as error:
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

        Raises UserError if the body has no torch.fx graph to split.
        """
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
        # Inductor runs the code that it finds in its cache. Its default is a temporary folder, where others may write.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(torch.hub.get_dir()).with_name("inductor")))
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

        None: from layer2 on in a ResNet, else all layers. Raises UserError for an unknown layer.
        """
        names = [name for name, _ in self.body.named_parameters()]
        if from_layer is None:
            from_layer = "layer2" if any(name.startswith("layer2.") for name in names) else "all"
        inside = [i for i, name in enumerate(names) if from_layer == "all" or f"{name}.".startswith(f"{from_layer}.")]
        if not inside:
            layers = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise UserError(f"--unfreeze-from {from_layer}: {self.name} has only {layers}; give one of them, or all")
        for i, parameter in enumerate(self.body.parameters()):
            parameter.requires_grad_(i >= inside[0])
        return [parameter for parameter in self.body.parameters() if parameter.requires_grad]

    def train_mode(self, batch_norm: bool) -> None:
        """Prepare for training.

        batch_norm: update BatchNorm's statistics, as a body trained from scratch needs; else keep ImageNet's.
        """
        self.eval()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(batch_norm)

    def recipe(self) -> dict:
        """Everything that determines the features, as plain data for feature files and checkpoints."""
        return {
            "name": self.name,
            "weights": self.weights,
            "sha256": state_sha256(self.body.state_dict()),
            "transform": self.transform.to_dict(),
        }

    def to_checkpoint(self) -> dict:
        """The recipe and the state dict.

        "state" is None for published ImageNet weights: name and sha256 identify them.
        """
        state = None if self.weights == "imagenet" else self.body.state_dict()
        return {**self.recipe(), "state": state}
