"""What a feature file holds, and whether it is right: extract_features.py --info and --verify."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from captioning.encoders.encoder import Encoder, encoder_from_checkpoint, saved_encoder
from captioning.encoders.gpu_decoding import load_photos
from captioning.encoders.grid import Grid, grid_pooling, to_stored_layout
from captioning.encoders.images import in_batches
from captioning.errors import UserError
from captioning.features.feature_cache import FeatureReader, forget_rows
from captioning.runtime.device import autocast

SAMPLE = 64  # photos that are encoded again
TOLERANCE = 0.1  # of a row's norm: half precision rounds by less; another photo or other weights are off by far more
ROUNDING = 1e-3  # of a row's mean: half precision moves it by less, and a page of zeros in the row by far more


def describe(reader: FeatureReader) -> str:
    """The recipe, the size and the rows done, a line each."""
    block, done = reader.blocks["features"], reader.done()
    size = reader.path.stat()
    lines = {
        "photos": f"{len(done):,}, of which {done.sum():,} are done",
        "a row": f"{'x'.join(map(str, block.shape[1:]))} {block.dtype}, {block.row_bytes:,} bytes",
        "size": f"{size.st_size / 1e9:.2f} GB, {size.st_blocks * 512 / 1e9:.2f} GB of it on the disk",
        **{name: str(value) for name, value in reader.attributes.items()},
    }
    return "\n".join(f"{name:>16}  {value}" for name, value in lines.items())


def verify(reader: FeatureReader, ids: Sequence[str], paths: Sequence[str], device: torch.device) -> str:
    """Every done row is sound, and some, made anew with the encoder kept beside the file, are what it holds.

    -> what was found, for a person. Raises UserError where rows are wrong; those that are damaged are then marked
    as not done, so that the next extraction makes them anew.
    """
    if [*reader.ids] != [*ids]:
        raise UserError(f"{reader.path}: holds the photos of another data set")
    bad = damaged_rows(reader)
    if len(bad):
        forget_rows(reader.path, bad)
        raise UserError(
            f"{reader.path}: {len(bad):,} rows are damaged, such as that of {reader.ids[bad[0]]}; they now count as "
            "not done: the same command without --verify makes them anew"
        )
    encoder = encoder_from_checkpoint(saved_encoder(reader.path, reader.attributes["weights_sha256"]))
    encoder = encoder.to(device).eval().requires_grad_(False)
    difference, photo, compared = largest_difference(reader, encoder, paths)
    if difference > TOLERANCE:
        raise UserError(
            f"{reader.path}: the row of {photo} is {difference:.0%} off what {encoder.name} ({encoder.weights}) makes "
            "of the photo now; was the photo replaced? Extract again with --overwrite"
        )
    done = int(reader.done().sum())
    return (
        f"{reader.path}: {done:,} of {len(reader.ids):,} rows are done, and sound; "
        f"{compared} made anew differ by {difference:.2%} at most"
    )


def damaged_rows(reader: FeatureReader) -> np.ndarray:
    """The done rows (M,) int64 whose mean is not the one kept beside them: not finite, or not what was written.

    Every byte of them is read.
    """
    rows, bad = np.flatnonzero(reader.done()), []
    *sides, channels = reader.blocks["features"].shape[1:]
    for batch in tqdm(in_batches(rows, 64), desc="verify", unit="batch"):
        cells = torch.from_numpy(reader.read_stored(batch)).float().view(len(batch), -1, channels)
        gap = Grid(cells, grid_pooling(*sides)).mean() - torch.from_numpy(reader.read_stored(batch, "pooled"))
        sound = gap.norm(dim=1) <= ROUNDING * cells.abs().mean(1).norm(dim=1)  # false of NaN
        bad += batch[~sound.numpy()].tolist()
    return np.array(bad, np.int64)


@torch.inference_mode()
def largest_difference(reader: FeatureReader, encoder: Encoder, paths: Sequence[str]) -> tuple[float, str, int]:
    """Of up to SAMPLE rows made anew: the largest difference, as a share of the row's norm; its photo; how many."""
    rows = np.flatnonzero(reader.done())
    rows = np.sort(np.random.default_rng(0).choice(rows, min(SAMPLE, len(rows)), replace=False))
    device, worst, block = next(encoder.parameters()).device, (0.0, ""), reader.blocks["features"]
    precision = getattr(torch, reader.attributes["precision"])
    for batch in load_photos(device, paths, in_batches(rows, 16), encoder.transform, 0):
        if batch.failures:
            raise UserError(f"{batch.failures[0]}; its row cannot be verified")
        with autocast(device, precision):
            grid = encoder(batch.photos)
        there = torch.from_numpy(reader.read_stored(np.array(batch.indices))).float()
        again = to_stored_layout(grid, block.shape[1:], str(block.dtype))[0].float().flatten(1).cpu()
        shares = (there - again).norm(dim=1) / again.norm(dim=1).clamp_min(1e-12)
        worst = max([worst, *zip(shares.tolist(), [reader.ids[row] for row in batch.indices], strict=True)])
    return *worst, len(rows)
