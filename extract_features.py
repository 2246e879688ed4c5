"""Stage 1b: encode every photo once with a frozen CNN and store its features in data/NAME/features.h5.

    python extract_features.py data/aic
    python extract_features.py data/aic --encoder mobilenet_v2 --weights FILE --grid native    (small, for a laptop)
    python extract_features.py data/aic --encoder timm/vit_base_patch16_clip_224.openai        (docs/encoders.md)

    torchrun --nproc-per-node 4 -- extract_features.py data/aic            (four GPUs write rows of one file)

    python extract_features.py data/aic --info             print what the file holds
    python extract_features.py data/aic --verify           check it for damage

The same command resumes an extraction that was killed.
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.signals import install_exit_handlers  # before torch, which takes seconds to import

    install_exit_handlers()

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from captioning.encoders.encoder import Encoder
from captioning.encoders.gpu_decoding import check_nvjpeg, copy_to_host, load_photos
from captioning.encoders.images import PILLOW, SIMPLEJPEG_AND_TORCH, FailureLimit, IndexBatch, PhotoBatch
from captioning.encoders.loading import (
    DEFAULT_ENCODER,
    calibrate_batch_norm,
    encoder_file,
    encoder_from_checkpoint,
    load_encoder,
    read_encoder_checkpoint,
)
from captioning.encoders.protocol import default_transform, full_name
from captioning.errors import PhotoError
from captioning.features.feature_reader import FeatureReader
from captioning.features.feature_writer import FeatureWriter, describe_features, to_stored_rows
from captioning.features.inspection import describe, verify
from captioning.runtime.checkpoint import save_checkpoint
from captioning.runtime.command_line import one_line, run
from captioning.runtime.device import autocast, encoder_precision, oom_as_user_error, pick_device
from captioning.runtime.distributed import SINGLE, DistributedContext, init_distributed
from captioning.runtime.files import atomic_text, locked
from captioning.runtime.string_array import StringArray
from config import ExtractFeatures
from preprocess.captions import read_captions


def main(config: ExtractFeatures, distributed: DistributedContext = SINGLE) -> None:
    """Extract features, or describe or verify the file. Raises UserError."""
    if config.info:
        print(describe(FeatureReader(config.file)))
        return
    ids, paths = read_photo_list(config.data)
    device = pick_device(config.device)
    if config.verify:
        print(verify(FeatureReader(config.file), ids, paths, device))
        return
    if config.nvjpeg:
        check_nvjpeg(device)
    precision = encoder_precision(config.precision, device)
    encoder, writer, rows = prepare_on_all_ranks(config, ids, paths, device, precision, distributed)
    print_plan(config, encoder, writer, num_rows=len(rows))
    if config.compile and len(rows):
        print(f"--compile: took {encoder.compile_for(config.batch_size, precision):.0f} s")
    extract_rows(config, encoder, writer, paths, rows, precision, distributed)


def read_photo_list(data: Path) -> tuple[StringArray, StringArray]:
    """The ids and the paths of all photos in captions.jsonl, in order."""
    ids = StringArray()
    paths = StringArray()
    for photo in read_captions(data):
        ids.append(photo.id)
        paths.append(photo.image)
    return ids, paths


def prepare_on_all_ranks(
    config: ExtractFeatures,
    ids: Sequence[str],
    paths: Sequence[str],
    device: torch.device,
    precision: torch.dtype,
    distributed: DistributedContext,
) -> tuple[Encoder, FeatureWriter, np.ndarray]:
    """Each rank's encoder and writer, and the rows still to extract, (M,) int64, of all ranks together."""
    if distributed.is_main:
        encoder, writer = prepare(config, ids, paths, device, precision)
        rows = distributed.broadcast(writer.missing())
    else:  # rank 0 has created the file and stored the encoder; the broadcast waits for that
        rows = distributed.broadcast(None)
        encoder, writer = prepare(replace(config, overwrite=False), ids, paths, device, precision)
    return encoder, writer, rows


def prepare(
    config: ExtractFeatures, ids: Sequence[str], paths: Sequence[str], device: torch.device, precision: torch.dtype
) -> tuple[Encoder, FeatureWriter]:
    """The encoder, and the writer of a new file or of the one that this command resumes."""
    encoder = prepare_encoder(config, paths).to(device).eval().requires_grad_(False)
    height, width, channels = encoder.output_shape()
    precision_name = str(precision).removeprefix("torch.")
    attributes = describe_features(encoder.recipe(), (height, width), config.grid, precision_name)
    checkpoint = {"encoder": encoder.to_checkpoint()}
    if not config.file.exists():  # before the file: a kill in between must not lose the random weights behind its rows
        save_checkpoint(encoder_file(config.file), checkpoint)
    writer = FeatureWriter(config.file, ids, attributes, channels, config.dtype, config.overwrite)
    if config.overwrite or not encoder_file(config.file).exists():
        save_checkpoint(encoder_file(config.file), checkpoint)
    return encoder, writer


def prepare_encoder(config: ExtractFeatures, paths: Sequence[str]) -> Encoder:
    """The encoder that the flags describe. One with random weights is calibrated once and stored with the features."""
    decoding = choose_decoding(config)
    changes = {"scaled_decoding": config.scaled_decoding, "nvjpeg": config.nvjpeg}
    if config.weights == "random" and not config.overwrite and encoder_file(config.file).exists():
        stored = encoder_from_checkpoint(read_encoder_checkpoint(config.file))
        name = full_name(config.encoder or DEFAULT_ENCODER)
        requested = (
            name,
            "random",
            replace(default_transform(name, config.image_size), decoding=decoding, **changes),
            config.pooled or "mean",
        )
        if (stored.name, stored.weights, stored.transform, stored.pooled) == requested:
            return stored
    encoder = load_encoder(config.encoder, config.weights, config.image_size, pooled=config.pooled, decoding=decoding)
    changes["scaled_decoding"] |= encoder.transform.scaled_decoding and not config.nvjpeg
    encoder.transform = replace(encoder.transform, **changes)
    if config.weights == "random":
        calibrate_batch_norm(encoder, paths, config.batch_size, config.workers)
    return encoder


def choose_decoding(config: ExtractFeatures) -> str:
    """Who decodes the photos: of a file that this command resumes the one that made its first rows."""
    if config.overwrite or not config.file.exists():
        return SIMPLEJPEG_AND_TORCH
    return FeatureReader(config.file).attributes.get("decoding", PILLOW)


def print_plan(config: ExtractFeatures, encoder: Encoder, writer: FeatureWriter, num_rows: int) -> None:
    """Print the sizes of the file, and how many of its rows are still to extract."""
    photos, stored_height, stored_width, channels = writer.shape
    height, width, _ = encoder.output_shape()
    print(
        f"{config.file}: {photos:,} photos, {encoder.name}, {height}x{width} cells of {channels}, stored as "
        f"{stored_height}x{stored_width}x{channels} {config.dtype}: {writer.nbytes() / 1e9:.2f} GB; "
        f"{photos - num_rows:,} photos done, {num_rows:,} to do"
    )


def extract_rows(
    config: ExtractFeatures,
    encoder: Encoder,
    writer: FeatureWriter,
    paths: Sequence[str],
    rows: np.ndarray,
    precision: torch.dtype,
    distributed: DistributedContext,
) -> None:
    """Extract this rank's shard of the rows (M,) int64, and report the photos that cannot be read.

    Raises PhotoError if there are too many of them.
    """
    failures = FailureLimit(writer.shape[0], config.allow_missing)
    batches = distributed.shard(aligned_batches(rows, config.batch_size))
    num_photos = sum(map(len, batches))
    try:
        with tqdm(total=num_photos, unit="photo", desc="extract", disable=not distributed.is_main) as progress_bar:
            extract(encoder, writer, paths, batches, precision, config.workers, failures, progress_bar)
        for reasons in distributed.all_gather(list(failures.reasons)):
            failures.add(reasons)
    except PhotoError:  # too many photos failed: report which
        if distributed.is_main:
            report_failures(config, failures)
        raise
    if distributed.is_main:
        report_failures(config, failures)
    print(f"done: {len(rows) - len(failures.reasons):,} photos, {len(failures.reasons):,} skipped")


def aligned_batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Split the rows to extract so that a batch never crosses a multiple of `size`.

    A row is then always encoded in the same batch. The last bit of a CNN's output may depend on the batch size.
    """
    return [batch for batch in np.split(rows, np.flatnonzero(np.diff(rows // size)) + 1) if len(batch)]


def extract(
    encoder: Encoder,
    writer: FeatureWriter,
    paths: Sequence[str],
    batches: Iterable[IndexBatch],
    precision: torch.dtype,
    workers: int,
    failures: FailureLimit,
    progress_bar: tqdm,
) -> None:
    """Decode, resize, encode and write each batch of rows; then close the writer."""
    device = next(encoder.parameters()).device
    try:
        photos = load_photos(device, paths, batches, encoder.transform, workers)
        encoded = encode_batches(encoder, writer, photos, precision, failures, progress_bar)
        for rows, *values in copy_to_host(encoded, device):
            writer.write(rows, *values)
            progress_bar.update(len(rows))
    finally:
        writer.close()


@torch.inference_mode()
def encode_batches(
    encoder: Encoder,
    writer: FeatureWriter,
    batches: Iterable[PhotoBatch],
    precision: torch.dtype,
    failures: FailureLimit,
    progress_bar: tqdm,
) -> Iterator[tuple]:
    """Batches of photos -> (rows, features, pooled, scales if the file has them), still on the device."""
    for batch in batches:
        failures.add(batch.failures)
        progress_bar.update(len(batch.failures))
        if batch.indices:
            with autocast(batch.photos.device, precision):
                grid, class_vector = encoder.encode(batch.photos)
            features, mean, *scales = to_stored_rows(grid, writer.shape[1:], str(writer.dtype))
            yield batch.indices, features, mean if class_vector is None else class_vector.float(), *scales


def report_failures(config: ExtractFeatures, failures: FailureLimit) -> None:
    """Print the first photos that could not be read, and list all of them in a file, one per line."""
    path = config.file.with_suffix(".unreadable.txt")
    path.unlink(missing_ok=True)
    for reason in list(failures.reasons)[:10]:
        print(f"skipped: {one_line(reason)}")
    if failures.reasons:
        with atomic_text(path) as file:
            file.writelines(f"{one_line(reason)}\n" for reason in failures.reasons)
        print(f"{path}: lists all {len(failures.reasons):,} of them")


def work(config: ExtractFeatures) -> None:
    """`main` on all processes of the job, with the feature file locked."""
    remedy = f"lower --batch-size, now {config.batch_size}"
    lock = config.file.with_name(config.file.name + ".lock")
    writes = not (config.info or config.verify)
    with init_distributed("the same command goes on") as distributed, oom_as_user_error(remedy):
        with locked(config.file, lock, distributed.is_main and writes):
            main(config, distributed)


if __name__ == "__main__":
    run(ExtractFeatures, work)
