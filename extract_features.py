"""Stage 1b: photos -> data/NAME/features.h5, through a frozen CNN, once.

    python extract_features.py data/aic
    python extract_features.py data/aic --encoder mobilenet_v2 --weights FILE --grid native    (small, for a laptop)

    torchrun --nproc-per-node 4 -- extract_features.py data/aic            (four GPUs, each its own rows of one file)

    python extract_features.py data/aic --info             what the file holds
    python extract_features.py data/aic --verify           is it right?

A killed extraction goes on where it stopped with the same command.
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.signals import install_exit_handlers  # before torch, which takes seconds to load

    install_exit_handlers()

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from captioning.encoders.encoder import (
    Encoder,
    calibrate_on,
    encoder_file,
    encoder_from_checkpoint,
    load_encoder,
    saved_encoder,
)
from captioning.encoders.gpu_decoding import check_nvjpeg, copy_to_host, load_photos
from captioning.encoders.grid import to_stored_layout
from captioning.encoders.images import FailureLimit, Transform
from captioning.errors import PhotoError
from captioning.features.feature_cache import FeatureReader, FeatureWriter, describe_features
from captioning.features.inspection import describe, verify
from captioning.runtime.checkpoint import save_checkpoint
from captioning.runtime.command_line import one_line, run
from captioning.runtime.device import autocast, encoder_precision, oom_as_user_error, pick_device
from captioning.runtime.distributed import SINGLE, DistributedContext, init_distributed
from captioning.runtime.files import atomic_text, locked
from captioning.runtime.string_array import StringArray
from config import ExtractFeatures
from preprocess.captions import read_captions


def main(config: ExtractFeatures, ranks: DistributedContext = SINGLE) -> None:
    if config.info:
        print(describe(FeatureReader(config.file)))
        return
    ids, paths = StringArray(), StringArray()
    for photo in read_captions(config.data):
        ids.append(photo.id)
        paths.append(photo.image)
    device = pick_device(config.device)
    if config.verify:
        print(verify(FeatureReader(config.file), ids, paths, device))
        return
    if config.nvjpeg:
        check_nvjpeg(device)
    precision = encoder_precision(config.precision, device)
    if ranks.is_main:
        encoder, writer = begin(config, ids, paths, device, precision)
        rows = ranks.broadcast(writer.missing())
    else:  # rank 0 has made the file, and kept the encoder beside it
        rows = ranks.broadcast(None)
        encoder, writer = begin(replace(config, overwrite=False), ids, paths, device, precision)
    print(
        f"{config.file}: {len(ids):,} photos, {encoder.name}, "
        f"{'x'.join(map(str, encoder.output_shape()[:2]))} cells of {writer.shape[-1]}, stored as "
        f"{'x'.join(map(str, writer.shape[1:]))} {config.dtype}: {writer.nbytes() / 1e9:.2f} GB; "
        f"{len(ids) - len(rows):,} photos done, {len(rows):,} to do"
    )
    if config.compile and len(rows):
        print(f"--compile: took {encoder.compile_for(config.batch_size, precision):.0f} s")
    unreadable = FailureLimit(len(ids), config.allow_missing)
    batches = ranks.shard(fixed_batches(rows, config.batch_size))
    try:
        with tqdm(total=sum(map(len, batches)), unit="photo", desc="extract", disable=not ranks.is_main) as bar:
            extract(config, encoder, writer, paths, batches, precision, unreadable, bar)
        for reasons in ranks.all_gather(list(unreadable.reasons)):
            unreadable.add(reasons)
    except PhotoError:  # too many of them: then it is good to know which
        report(config, unreadable, ranks)
        raise
    report(config, unreadable, ranks)
    print(f"done: {len(rows) - len(unreadable.reasons):,} photos, {len(unreadable.reasons):,} skipped")


def report(config: ExtractFeatures, unreadable: FailureLimit, ranks: DistributedContext) -> None:
    """The photos that could not be read, a line each: the first ones on the screen, all of them in a file."""
    if not ranks.is_main:
        return
    path = config.file.with_suffix(".unreadable.txt")
    path.unlink(missing_ok=True)
    for reason in list(unreadable.reasons)[:10]:
        print(f"skipped: {one_line(reason)}")
    if unreadable.reasons:
        with atomic_text(path) as file:
            file.writelines(f"{one_line(reason)}\n" for reason in unreadable.reasons)
        print(f"{path}: lists all {len(unreadable.reasons):,} of them")


def begin(
    config: ExtractFeatures, ids: StringArray, paths: StringArray, device: torch.device, precision: torch.dtype
) -> tuple[Encoder, FeatureWriter]:
    """The encoder, and the file: a new one, or the one that this command began."""
    encoder = prepare_encoder(config, paths).to(device).eval().requires_grad_(False)
    height, width, channels = encoder.output_shape()
    attributes = describe_features(
        encoder.recipe(), (height, width), config.grid, str(precision).removeprefix("torch.")
    )
    if not config.file.exists():  # first the encoder: it would be lost with a kill in between, if it is a random one
        save_checkpoint(encoder_file(config.file), {"encoder": encoder.to_checkpoint()})
    writer = FeatureWriter(config.file, ids, attributes, channels, config.dtype, config.overwrite)
    if config.overwrite or not encoder_file(config.file).exists():
        save_checkpoint(encoder_file(config.file), {"encoder": encoder.to_checkpoint()})
    return encoder, writer


def prepare_encoder(config: ExtractFeatures, paths: StringArray) -> Encoder:
    """The encoder of the flags. A random one is calibrated once, and then kept beside the features."""
    if config.weights == "random" and not config.overwrite and encoder_file(config.file).exists():
        kept = encoder_from_checkpoint(saved_encoder(config.file))
        wanted = (
            config.encoder or "resnet101",
            "random",
            Transform(config.image_size or 256, scaled_decoding=config.scaled_decoding, nvjpeg=config.nvjpeg),
        )
        if (kept.name, kept.weights, kept.transform) == wanted:
            return kept
    encoder = load_encoder(config.encoder, config.weights, config.image_size)
    scaled = (config.scaled_decoding or encoder.transform.scaled_decoding) and not config.nvjpeg
    encoder.transform = replace(encoder.transform, scaled_decoding=scaled, nvjpeg=config.nvjpeg)
    if config.weights == "random":
        calibrate_on(encoder, paths, config.batch_size, config.workers)
    return encoder


def fixed_batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """The rows to do, with those that any extraction does together: what a CNN makes of a photo depends, in its last
    bit, on how many others there are."""
    return [batch for batch in np.split(rows, np.flatnonzero(np.diff(rows // size)) + 1) if len(batch)]


def extract(config, encoder, writer, paths, batches, precision, unreadable, bar) -> None:
    """Every batch of rows: decode, squash, encode, pool to 14x14 where asked, write."""
    device = next(encoder.parameters()).device
    try:
        arriving = load_photos(device, paths, batches, encoder.transform, config.workers)
        for rows, features, pooled in copy_to_host(
            encoded(encoder, writer, arriving, precision, unreadable, bar), device
        ):
            writer.write(rows, features, pooled)
            bar.update(len(rows))
    finally:
        writer.close()


@torch.inference_mode()
def encoded(encoder, writer, arriving, precision, unreadable, bar) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of photos -> their rows, as they are stored, still on the device."""
    for batch in arriving:
        unreadable.add(batch.failures)
        bar.update(len(batch.failures))
        if batch.indices:
            with autocast(batch.photos.device, precision):
                grid = encoder(batch.photos)
            yield batch.indices, *to_stored_layout(grid, writer.shape[1:], str(writer.dtype))


def work(config: ExtractFeatures) -> None:
    remedy, lock = f"lower --batch-size, now {config.batch_size}", config.file.with_name(config.file.name + ".lock")
    with init_distributed("the same command goes on") as ranks, oom_as_user_error(remedy):
        with locked(config.file, lock, ranks.is_main and not (config.info or config.verify)):
            main(config, ranks)


if __name__ == "__main__":
    run(ExtractFeatures, work)
