"""The two halves of an extraction, alone and together."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captioning.encoders.encoder import Encoder
from captioning.encoders.gpu_decoding import load_photos
from captioning.encoders.images import FailureLimit
from captioning.encoders.views import WHOLE
from captioning.features.feature_writer import FeatureWriter
from captioning.features.recipe import describe_features
from captioning.runtime.device import autocast
from captioning.runtime.progress import tqdm
from captioning.runtime.string_array import StringArray


def decode_all(encoder: Encoder, paths: Sequence[str], plan: Sequence[Any], device: torch.device, workers: int) -> None:
    """Decode the photos, and bring them to the device. plan: the photos of each batch."""
    for batch in load_photos(device, paths, plan, encoder.transform, workers):
        last = batch.photos
    last.cpu()  # waits for the GPU


@torch.inference_mode()
def encode_all(encoder: Encoder, batches: int, batch_size: int, precision: torch.dtype, device: torch.device) -> None:
    """Run the CNN on one batch of random photos as often as there are batches."""
    shape = batch_size, 3, encoder.transform.image_size, encoder.transform.image_size
    photos = torch.randint(0, 255, shape, dtype=torch.uint8, device=device)
    for _ in range(batches):
        with autocast(device, precision):
            last = encoder(photos).cells
    last.float().cpu()


def extract_all(
    encoder: Encoder,
    paths: Sequence[str],
    plan: Sequence[Any],
    precision: torch.dtype,
    workers: int,
    folder: Path | None = None,
) -> None:
    """Decode, encode and write, as extract_features.py does, to a file that is removed again.

    folder: to write to; the system's folder of temporary files unless given.
    """
    from extract_features import Output, PhotoList, extract  # needs tyro

    height, width, channels = encoder.output_shape()
    recipe = {"name": "bench", "weights": "random", "sha256": "", "transform": encoder.transform.to_dict()}
    precision_name = str(precision).removeprefix("torch.")
    attributes = describe_features(recipe, (height, width), "native", precision_name)
    ids = [str(number) for number in range(len(paths))]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        writer = FeatureWriter(Path(temporary) / "features.h5", ids, attributes, channels, "float16", overwrite=False)
        output = Output(WHOLE, writer, np.arange(len(paths)))
        photos = PhotoList(StringArray(ids), StringArray(paths))
        limit = FailureLimit(len(paths), 0)
        extract(encoder, [output], photos, plan, precision, workers, limit, tqdm(disable=True))
