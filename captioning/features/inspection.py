"""Describes and verifies a feature file: extract_features.py --info and --verify.

Letters: N photos, M rows, h x w cells, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from captioning.encoders.encoder import Encoder
from captioning.encoders.gpu_decoding import load_photos
from captioning.encoders.grid import Grid, grid_pooling, to_stored_layout
from captioning.encoders.images import ReadViews, split_batches
from captioning.encoders.loading import encoder_from_checkpoint, read_encoder_checkpoint
from captioning.errors import UserError
from captioning.features.feature_reader import FeatureReader
from captioning.features.feature_writer import mark_not_done
from captioning.runtime.device import autocast
from captioning.runtime.progress import tqdm

SAMPLE_SIZE = 64  # photos that are encoded again
TOLERANCE = 0.1  # relative to a row's norm: half precision differs by less, another photo or weights by far more
# Relative to a row's mean: rounding to this dtype changes it by less, a page of zeros, two cells in uint8, by more.
ROUNDING = {"float32": 1e-3, "float16": 1e-3, "uint8": 4e-3}


def describe(reader: FeatureReader) -> str:
    """The rows done, the sizes and the attributes, one per line."""
    features = reader.arrays["features"]
    row_bytes = sum(array.row_bytes for name, array in reader.arrays.items() if name in ("features", "scales"))
    done = reader.done()
    size = reader.path.stat()
    lines = {
        "photos": f"{len(done):,}, of which {done.sum():,} are done",
        "row": f"{'x'.join(map(str, features.shape[1:]))} {features.dtype}, {row_bytes:,} bytes",
        "size": f"{size.st_size / 1e9:.2f} GB, {size.st_blocks * 512 / 1e9:.2f} GB of it on the disk",
        **{name: str(value) for name, value in reader.attributes.items()},
    }
    return "\n".join(f"{name:>16}  {value}" for name, value in lines.items())


def verify(reader: FeatureReader, ids: Sequence[str], paths: Sequence[str], device: torch.device) -> str:
    """Check every done row for damage, and compare a sample with what the stored encoder computes now.

    Returns a summary in one line. Raises UserError if rows are wrong; damaged rows are first marked as not done, so
    that the next extraction encodes them again.
    """
    if [*reader.ids] != [*ids]:
        raise UserError(f"{reader.path}: belongs to another data set")
    damaged = damaged_rows(reader)
    if len(damaged):
        mark_not_done(reader.path, damaged)
        raise UserError(
            f"{reader.path}: {len(damaged):,} rows are damaged, such as that of {reader.ids[damaged[0]]}; they are now "
            "marked as not done: the same command without --verify encodes them again"
        )
    encoder = encoder_from_checkpoint(read_encoder_checkpoint(reader.path, reader.attributes["weights_sha256"]))
    encoder = encoder.to(device).eval().requires_grad_(False)
    comparison = compare_sample(reader, encoder, paths)
    if comparison.difference > TOLERANCE:
        raise UserError(
            f"{reader.path}: the row of {comparison.photo} differs by {comparison.difference:.0%} from what "
            f"{encoder.name} ({encoder.weights}) computes now; was the photo replaced? Extract again with --overwrite"
        )
    done = int(reader.done().sum())
    return (
        f"{reader.path}: {done:,} of {len(reader.ids):,} rows are done and undamaged; "
        f"{comparison.num_rows} encoded again differ by at most {comparison.difference:.2%}"
    )


def damaged_rows(reader: FeatureReader) -> np.ndarray:
    """The done rows (M,) int64 that are not finite, or whose mean differs from the stored one. Reads every byte.

    Rows with class vectors have no stored mean: those are damaged that are not finite, or zero everywhere.
    """
    has_mean = reader.recipe["pooled"] == "mean"
    rows = np.flatnonzero(reader.done())
    _, height, width, _ = reader.arrays["features"].shape
    pooling = grid_pooling(height, width)
    rounding = ROUNDING[str(reader.arrays["features"].dtype)]
    damaged: list[int] = []
    for batch in tqdm(split_batches(rows, 64), desc="verify", unit="batch"):
        cells = reader.read_all_cells(batch)
        pooled = torch.from_numpy(reader.read_stored(batch, "pooled"))
        size = cells.abs().mean(1).norm(dim=1)
        if has_mean:
            intact = (Grid(cells, pooling).mean() - pooled).norm(dim=1) <= rounding * size  # False for NaN
        else:
            intact = (size > 0) & size.isfinite() & (pooled.norm(dim=1) > 0) & pooled.isfinite().all(1)
        damaged += batch[~intact.numpy()].tolist()
    return np.array(damaged, np.int64)


class Comparison(NamedTuple):
    """The largest difference between stored rows and what the encoder computes now."""

    difference: float  # relative to the row's norm
    photo: str  # its id
    num_rows: int  # compared


@torch.inference_mode()
def compare_sample(reader: FeatureReader, encoder: Encoder, paths: Sequence[str]) -> Comparison:
    """Encode up to SAMPLE_SIZE done rows again. Raises UserError if a photo cannot be read."""
    rows = np.flatnonzero(reader.done())
    rows = np.sort(np.random.default_rng(0).choice(rows, min(SAMPLE_SIZE, len(rows)), replace=False))
    features = reader.arrays["features"]
    device = next(encoder.parameters()).device
    precision = getattr(torch, reader.attributes["precision"])
    worst = Comparison(0.0, "", len(rows))
    read = ReadViews([reader.view], reader.ids)
    for batch in load_photos(device, paths, split_batches(rows, 16), encoder.transform, 0, read):
        if batch.failures:
            raise UserError(f"{batch.failures[0]}; its row cannot be verified")
        with autocast(device, precision):
            grid = encoder(batch.photos)
        stored = reader.read_all_cells(np.array(batch.indices)).flatten(1)
        encoded = to_stored_layout(grid, features.shape[1:], "float32")[0].flatten(1).cpu()
        differences = (stored - encoded).norm(dim=1) / encoded.norm(dim=1).clamp_min(1e-12)
        for row, difference in zip(batch.indices, differences.tolist(), strict=True):
            worst = max(worst, Comparison(difference, reader.ids[row], len(rows)))
    return worst
