"""Stage 1b: photos -> data/NAME/features.h5, through a frozen CNN, once.

    python extract_features.py data/aic
    python extract_features.py data/aic --encoder mobilenet_v2 --weights FILE --grid native    (small, for a laptop)

A killed extraction goes on where it stopped with the same command.
"""

from __future__ import annotations

import torch
from tqdm import tqdm

from captioning.checkpoint import load_checkpoint, save_checkpoint
from captioning.device import autocast, encoder_precision, pick_device
from captioning.encoder import Encoder, calibrate_on, encoder_from_checkpoint, load_encoder
from captioning.feature_cache import FeatureWriter, describe_features, encoder_file
from captioning.grid import SIDE, Grid
from captioning.images import PhotoError, Unreadable, in_batches, photo_batches
from config import ExtractFeatures, UserError, run
from preprocess.captions import Photo, read_captions


def main(config: ExtractFeatures) -> None:
    photos = list(read_captions(config.data))
    device = pick_device(config.device)
    precision = encoder_precision(config.precision, device)
    encoder = prepare_encoder(config, photos).to(device).eval().requires_grad_(False)
    height, width, channels = encoder.output_shape()
    attributes = describe_features(
        encoder.recipe(), (height, width), config.grid, str(precision).removeprefix("torch.")
    )
    writer = FeatureWriter(
        config.file, [photo.id for photo in photos], attributes, channels, config.dtype, config.overwrite
    )
    if config.overwrite or not encoder_file(config.file).exists():
        save_checkpoint(encoder_file(config.file), {"encoder": encoder.to_checkpoint()})
    rows = writer.missing()
    print(f"{config.file}: {len(photos):,} photos, {encoder.name}, {height}x{width} cells of {channels}, stored as "
          f"{'x'.join(map(str, writer.shape[1:]))} {config.dtype}: {writer.nbytes() / 1e9:.2f} GB; "
          f"{len(photos) - len(rows):,} photos done, {len(rows):,} to do")  # fmt: skip
    unreadable = extract(config, encoder, writer, photos, rows, device, precision)
    for reason in list(unreadable.reasons)[:10]:
        print(f"skipped: {reason}")
    if len(unreadable.reasons) > 10:
        print(f"skipped: {len(unreadable.reasons) - 10} more")
    print(f"done: {len(rows) - len(unreadable.reasons):,} photos, {len(unreadable.reasons):,} skipped")


def prepare_encoder(config: ExtractFeatures, photos: list[Photo]) -> Encoder:
    """The encoder of the flags. A random one is calibrated once, and then kept beside the features."""
    if config.weights == "random" and not config.overwrite and encoder_file(config.file).exists():
        kept = encoder_from_checkpoint(load_checkpoint(encoder_file(config.file)))
        wanted = (config.encoder or "resnet101", "random", config.image_size or 256)
        if (kept.name, kept.weights, kept.transform.image_size) == wanted:
            return kept
    encoder = load_encoder(config.encoder, config.weights, config.image_size)
    if config.weights == "random":
        calibrate_on(encoder, [photo.image for photo in photos], config.batch_size, config.workers)
    return encoder


@torch.inference_mode()
def extract(config, encoder, writer, photos, rows, device, precision) -> Unreadable:
    """Every missing row: decode, squash, encode, pool to 14x14 where asked, write."""
    unreadable = Unreadable(len(photos), config.allow_missing)
    batches = in_batches(rows.tolist(), config.batch_size)
    bar = tqdm(total=len(photos), initial=len(photos) - len(rows), unit="photo", desc="extract", smoothing=0.05)
    try:
        for batch in photo_batches([photo.image for photo in photos], batches, encoder.transform, config.workers):
            unreadable.add(batch.failures)
            if batch.indices:
                with autocast(device, precision):
                    grid = encoder(batch.photos.to(device))
                writer.write(batch.indices, *stored(grid, writer.shape))
            bar.update(len(batch.indices) + len(batch.failures))
    except PhotoError as error:
        raise UserError(str(error)) from None
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory on {device}: lower --batch-size, now {config.batch_size}") from None
    finally:
        bar.close()
        writer.close()
    return unreadable


def stored(grid: Grid, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A grid as its rows on disk: cells (B, h, w, C), 14x14 or native, and their mean (B, C); on the CPU."""
    grid = Grid(grid.cells.float(), grid.pooling)
    cells = grid.spread(grid.cells) if shape[1:3] == (SIDE, SIDE) else grid.cells
    return cells.reshape(-1, *shape[1:]).cpu(), grid.mean().cpu()


if __name__ == "__main__":
    run(ExtractFeatures, main)
