"""Stage 1b: encode every photo once with a frozen CNN and store its features in data/NAME/features.h5.

    python extract_features.py data/aic
    python extract_features.py data/aic --encoder mobilenet_v2 --weights FILE --grid native    (small, for a laptop)
    python extract_features.py data/aic --encoder timm/vit_base_patch16_clip_224.openai        (docs/encoders.md)

    python extract_features.py data/aic --view flip        mirrored, in data/aic/features.flip.h5 (docs/features.md)
    python extract_features.py data/aic --views 4          the whole photo and three other views

    python extract_features.py data/aic --part 1/4         on the first of four machines without a shared disk
    python extract_features.py data/aic --missing-only --out data/aic/features.2.h5     photos added since

    torchrun --nproc-per-node 4 -- extract_features.py data/aic            (four GPUs write rows of one file)

    python extract_features.py data/aic --info             print what the file holds
    python extract_features.py data/aic --verify           check it for damage

The same command resumes an extraction that was killed.
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.start import start_command  # before torch, which takes seconds to import

    start_command()

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from captioning.encoders.encoder import Encoder
from captioning.encoders.gpu_decoding import check_nvjpeg, copy_to_host, load_photos
from captioning.encoders.images import SIMPLEJPEG_AND_TORCH, FailureLimit, IndexBatch, PhotoBatch, ReadViews
from captioning.encoders.loading import (
    DEFAULT_ENCODER,
    calibrate_batch_norm,
    encoder_file,
    encoder_from_checkpoint,
    load_encoder,
    read_encoder_checkpoint,
)
from captioning.encoders.protocol import default_transform, full_name
from captioning.encoders.views import WHOLE, View
from captioning.errors import PhotoError, UserError
from captioning.features.feature_files import recipe_difference
from captioning.features.feature_reader import FeatureReader
from captioning.features.feature_writer import FeatureWriter, mark_not_done, to_stored_rows
from captioning.features.inspection import describe, verify
from captioning.features.photo_files import changed_photos, stat_photos, with_hashes
from captioning.features.recipe import describe_features, first_difference
from captioning.runtime.checkpoint import save_checkpoint
from captioning.runtime.command_line import one_line, run
from captioning.runtime.device import autocast, encoder_precision, oom_as_user_error, pick_device
from captioning.runtime.distributed import SINGLE, DistributedContext, init_distributed
from captioning.runtime.files import atomic_text, locked
from captioning.runtime.loader import lost_worker_as_user_error
from captioning.runtime.progress import tqdm
from captioning.runtime.string_array import StringArray
from config import ExtractFeatures
from preprocess.captions import read_captions

NVJPEG_OF_FILE = "the rows that are done were made with it: go on on a GPU, or extract all again with --overwrite"


def main(config: ExtractFeatures, distributed: DistributedContext = SINGLE) -> None:
    """Extract features, or describe or verify the files. Raises UserError."""
    if config.info:
        print("\n\n".join(describe(FeatureReader(file)) for file in config.files.values()))
        return
    photos = read_photo_list(config.data)
    device = pick_device(config.device)
    if config.verify:
        for file in config.files.values():
            reader = FeatureReader(file)
            own = photos.of_file(reader)
            print(verify(reader, own.ids, own.paths, device))
        return
    given = config.nvjpeg
    config = with_settings_of_file(config)
    if config.nvjpeg:
        check_nvjpeg(device, "leave it out" if given else NVJPEG_OF_FILE)
    precision = encoder_precision(config.precision, device)
    chosen = distributed.broadcast(choose_photos(config, photos) if distributed.is_main else None)
    if chosen is not None and not len(chosen.ids):
        print(f"{config.file}: not written: the other files hold all photos")
        return
    encoder, outputs = prepare_on_all_ranks(config, photos, chosen, device, precision, distributed)
    print_plan(encoder, outputs)
    outputs = [output for output in outputs if len(output.rows)]
    if config.compile and outputs:
        print(f"--compile: took {encoder.compile_for(config.batch_size, precision):.0f} s")
    extract_rows(config, encoder, outputs, chosen, precision, distributed)


class PhotoList(NamedTuple):
    """The photos of captions.jsonl, in order."""

    ids: StringArray
    paths: StringArray

    def select(self, indices: Iterable[int]) -> PhotoList:
        """These photos, in this order."""
        indices = list(indices)
        return PhotoList(StringArray(self.ids[i] for i in indices), StringArray(self.paths[i] for i in indices))

    def of_file(self, reader: FeatureReader) -> PhotoList:
        """Those that a feature file holds, in its order."""
        index = {photo: i for i, photo in enumerate(self.ids)}
        return self.select(index[photo] for photo in reader.ids if photo in index)


class Output(NamedTuple):
    """The feature file of one view."""

    view: View
    writer: FeatureWriter
    rows: np.ndarray  # (M,) int64: still to extract, by all ranks together


def read_photo_list(data: Path) -> PhotoList:
    """The ids and the paths of all photos in captions.jsonl, in order."""
    photos = PhotoList(StringArray(), StringArray())
    for photo in read_captions(data):
        photos.ids.append(photo.id)
        photos.paths.append(photo.image)
    return photos


def choose_photos(config: ExtractFeatures, photos: PhotoList) -> PhotoList:
    """The photos of --part, without those that other files hold with --missing-only.

    A file of --missing-only that exists keeps the photos with which it was created.
    """
    number, parts = config.part_of_parts
    indices = part_of(len(photos.ids), number, parts)
    if not indices:
        raise UserError(f"--part {config.part}: has no photos, there are {len(photos.ids):,} in all; give fewer parts")
    if not config.missing_only:
        return photos if parts == 1 else photos.select(indices)
    if config.file.exists() and not config.overwrite:
        own = photos.of_file(FeatureReader(config.file))
        if not own.ids:
            raise UserError(f"{config.file}: has no photo of {config.data}; give --out for another file")
        return own
    held = {photo for reader in neighbours(config, report=True) for photo in reader.ids}
    return photos.select(i for i in indices if photos.ids[i] not in held)


def part_of(photos: int, number: int, parts: int) -> range:
    """The indices of part `number`, from 1, of so many `parts` of the photos; each photo is in one part.

    Where there are enough photos, a part begins at a multiple of 256: batches of 32 are then those of the whole data
    set, and so are all bits of the features.
    """
    size = 256
    while size > 1 and 4 * size > photos // parts:
        size //= 2
    start, end = (photos * part // parts // size * size if part < parts else photos for part in (number - 1, number))
    return range(start, end)


def neighbours(config: ExtractFeatures, report: bool = False) -> list[FeatureReader]:
    """The other feature files of the same view in the data folder and beside --out, with the recipe of the first.

    report: print why files there are not counted.
    """
    folders = (config.data, config.file.parent)
    paths = {path.resolve(): path for folder in folders for path in sorted(folder.glob("*.h5"))}
    paths.pop(config.file.resolve(), None)
    [view] = config.files
    readers: list[FeatureReader] = []
    for path in sorted(paths.values(), key=lambda path: (path != config.data / "features.h5", path)):
        try:
            reader = FeatureReader(path)
        except UserError as error:  # any HDF5 file may lie there
            if report:
                print(f"not counted: {error}")
            continue
        if reader.view == view and not (readers and recipe_difference(reader, readers[0])):
            readers.append(reader)
    return readers


def prepare_on_all_ranks(
    config: ExtractFeatures,
    photos: PhotoList,
    chosen: PhotoList,
    device: torch.device,
    precision: torch.dtype,
    distributed: DistributedContext,
) -> tuple[Encoder, list[Output]]:
    """Each rank's encoder, and its writers of the files of the `chosen` photos."""
    photo_files = stat_photos(chosen.paths)
    if distributed.is_main:
        encoder, writers = prepare(config, photos, chosen, photo_files, device, precision)
        for writer in writers:
            redo_changed(writer, chosen.paths, photo_files)
        rows = distributed.broadcast([writer.missing() for writer in writers])
    else:  # rank 0 has created the files and stored the encoder; the broadcast waits for that
        rows = distributed.broadcast(None)
        encoder, writers = prepare(replace(config, overwrite=False), photos, chosen, photo_files, device, precision)
    outputs = [Output(*output) for output in zip(config.files, writers, rows, strict=True)]
    if config.photo_hash:
        hashed = with_hashes(photo_files, chosen.paths, rows_to_extract(outputs))
        for writer in writers:
            writer.photo_files = hashed
    return encoder, outputs


def prepare(
    config: ExtractFeatures,
    photos: PhotoList,
    chosen: PhotoList,
    photo_files: np.ndarray,
    device: torch.device,
    precision: torch.dtype,
) -> tuple[Encoder, list[FeatureWriter]]:
    """The encoder, and the writers of new files of the `chosen` photos or of those that this command resumes.

    photo_files (N, 2) int64: of the chosen photos, see photo_files.py.
    """
    encoder = prepare_encoder(config, photos.paths).to(device).eval().requires_grad_(False)
    height, width, channels = encoder.output_shape()
    precision_name = str(precision).removeprefix("torch.")
    checkpoint = {"encoder": encoder.to_checkpoint()}
    new = [file for file in config.files.values() if config.overwrite or not file.exists()]
    writers = []
    for view, file in config.files.items():
        attributes = describe_features(encoder.recipe(), (height, width), config.grid, precision_name, str(view))
        if config.missing_only:
            check_same_recipe(config, attributes)
        if not file.exists():  # before the file: a kill in between must not lose the random weights behind its rows
            save_checkpoint(encoder_file(file), checkpoint)
        others = len(new) - new.index(file) - 1 if file in new else 0
        writers.append(
            FeatureWriter(
                file, chosen.ids, attributes, channels, config.dtype, config.overwrite, photo_files, others=others
            )
        )
        if config.overwrite or not encoder_file(file).exists():
            save_checkpoint(encoder_file(file), checkpoint)
    return encoder, writers


def check_same_recipe(config: ExtractFeatures, attributes: dict) -> None:
    """Raise UserError if the rows of --missing-only would have another recipe than those of the files beside it."""
    for reader in neighbours(config)[:1]:
        expected = {**attributes, "dtype": config.dtype}
        if name := first_difference(reader.complete_attributes, expected):
            raise UserError(
                f"{config.file}: would have {name} {expected[name]}, but {reader.path}, which it is to complete, has "
                f"{reader.recipe.get(name)}; give the flags of that file"
            )


def redo_changed(writer: FeatureWriter, paths: Sequence[str], photo_files: np.ndarray) -> None:
    """Mark the rows of photos whose file has changed as not done, and name the first of these photos.

    photo_files (N, 2) int64: of the photos now, from `stat_photos`.
    """
    done = np.setdiff1d(np.arange(len(paths)), writer.missing())
    changed = changed_photos(writer.stored_photo_files(), photo_files, paths, done)
    if not len(changed):
        return
    for row in changed[:10]:
        print(f"changed: {one_line(paths[row])}")
    print(f"{writer.path}: {len(changed):,} photos have changed since they were encoded, and are encoded again")
    mark_not_done(writer.path, changed)


def completed_file(config: ExtractFeatures) -> FeatureReader | None:
    """The feature file that this command resumes or adds to; None if it starts anew.

    A new view is added to the whole photos beside it: training uses the two together.
    """
    existing = [file for file in config.files.values() if file.exists() and not config.overwrite]
    whole = config.data / "features.h5"
    if not existing and config.missing_only:
        return next(iter(neighbours(config)), None)
    if not existing and WHOLE not in config.files and whole.exists():
        existing = [whole]
    return FeatureReader(existing[0]) if existing else None


def with_settings_of_file(config: ExtractFeatures) -> ExtractFeatures:
    """The settings that are not given: those of the file that this command completes, or else the defaults."""
    completed = completed_file(config)
    if completed is None:
        return replace(config, grid=config.grid or "14", dtype=config.dtype or "float16")
    found = completed.recipe
    if found["nvjpeg"] and [*config.files] != [WHOLE]:
        raise UserError(
            f"{completed.path}: was extracted with --nvjpeg, which decodes whole photos only; extract it again with "
            "--overwrite before other views"
        )
    return replace(
        config,
        grid=config.grid or found["grid"],
        dtype=config.dtype or found["dtype"],
        precision=found["precision"] if config.precision == "auto" else config.precision,
        scaled_decoding=config.scaled_decoding or found["scaled_decoding"],
        nvjpeg=config.nvjpeg or found["nvjpeg"],
    )


def prepare_encoder(config: ExtractFeatures, paths: Sequence[str]) -> Encoder:
    """The encoder that the flags describe, or without any that of the file which this command completes.

    One with random weights is calibrated once and stored with the features.
    """
    completed = completed_file(config)
    if completed and not any((config.encoder, config.weights, config.image_size, config.pooled)):
        saved = read_encoder_checkpoint(completed.path, completed.attributes["weights_sha256"])
        return encoder_from_checkpoint(saved)
    decoding = choose_decoding(completed)
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


def choose_decoding(completed: FeatureReader | None) -> str:
    """Who decodes the photos: the same as for the first rows of a file that this command completes."""
    return completed.recipe["decoding"] if completed else SIMPLEJPEG_AND_TORCH


def print_plan(encoder: Encoder, outputs: Sequence[Output]) -> None:
    """Print the sizes of the files, and how many of their rows are still to extract."""
    height, width, _ = encoder.output_shape()
    for _, writer, rows in outputs:
        photos, stored_height, stored_width, channels = writer.shape
        print(
            f"{writer.path}: {photos:,} photos, {encoder.name}, {height}x{width} cells of {channels}, stored as "
            f"{stored_height}x{stored_width}x{channels} {writer.dtype}: {writer.nbytes() / 1e9:.2f} GB; "
            f"{photos - len(rows):,} photos done, {len(rows):,} to do"
        )
    if len(outputs) > 1:
        print(f"all {len(outputs)} views: {sum(output.writer.nbytes() for output in outputs) / 1e9:.2f} GB")


def extract_rows(
    config: ExtractFeatures,
    encoder: Encoder,
    outputs: Sequence[Output],
    photos: PhotoList,
    precision: torch.dtype,
    distributed: DistributedContext,
) -> None:
    """Extract this rank's shard of the rows of all files, and report the photos that cannot be read.

    Raises PhotoError if there are too many of them.
    """
    failures = FailureLimit(len(photos.ids), config.allow_missing)
    rows = rows_to_extract(outputs)
    batches = distributed.shard(aligned_batches(rows, config.batch_size))
    num_photos = sum(map(len, batches))
    try:
        with tqdm(total=num_photos, unit="photo", desc="extract", disable=not distributed.is_main) as progress_bar:
            extract(encoder, outputs, photos, batches, precision, config.workers, failures, progress_bar)
        for reasons in distributed.all_gather(list(failures.reasons)):
            failures.add(reasons)
    except PhotoError:  # too many photos failed: report which
        if distributed.is_main:
            report_failures(config, failures)
        raise
    if distributed.is_main:
        report_failures(config, failures)
    print(f"done: {len(rows) - len(failures.reasons):,} photos, {len(failures.reasons):,} skipped")


def rows_to_extract(outputs: Sequence[Output]) -> np.ndarray:
    """The rows (M,) int64 that any of the files lacks."""
    return np.unique(np.concatenate([np.empty(0, np.int64), *(output.rows for output in outputs)]))


def aligned_batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Split the rows to extract so that a batch never crosses a multiple of `size`.

    A row is then always encoded in the same batch. The last bit of a CNN's output may depend on the batch size.
    """
    return [batch for batch in np.split(rows, np.flatnonzero(np.diff(rows // size)) + 1) if len(batch)]


def extract(
    encoder: Encoder,
    outputs: Sequence[Output],
    photos: PhotoList,
    batches: Iterable[IndexBatch],
    precision: torch.dtype,
    workers: int,
    failures: FailureLimit,
    progress_bar: tqdm,
) -> None:
    """Decode, resize, encode and write each batch of rows; then close the writers."""
    device = next(encoder.parameters()).device
    read = ReadViews([output.view for output in outputs], photos.ids)
    try:
        loaded = load_photos(device, photos.paths, batches, encoder.transform, workers, read)
        encoded = encode_batches(encoder, outputs, loaded, precision, failures, progress_bar)
        for (writer, rows), *values in copy_to_host(encoded, device):
            writer.write(rows, *values)
    finally:
        with contextlib.ExitStack() as stack:  # closes all, even if one raises
            for output in outputs:
                stack.callback(output.writer.close)


@torch.inference_mode()
def encode_batches(
    encoder: Encoder,
    outputs: Sequence[Output],
    batches: Iterable[PhotoBatch],
    precision: torch.dtype,
    failures: FailureLimit,
    progress_bar: tqdm,
) -> Iterator[tuple]:
    """Batches of photos -> ((writer, rows), features, pooled, scales if the file has them), still on the device.

    Each file gets only those rows that it lacks.
    """
    for batch in batches:
        failures.add(batch.failures)
        views = batch.photos.unflatten(0, (-1, len(outputs)))  # (B, V, 3, S, S)
        for number, (_, writer, missing) in enumerate(outputs):
            lacks = np.isin(batch.indices, missing)
            if lacks.any():
                photos = views[:, number]
                if not lacks.all():
                    photos = photos[torch.from_numpy(lacks).to(photos.device)]
                yield (writer, np.array(batch.indices)[lacks]), *encode(encoder, photos, precision, writer)
        progress_bar.update(len(batch.indices) + len(batch.failures))


def encode(encoder: Encoder, photos: Tensor, precision: torch.dtype, writer: FeatureWriter) -> tuple[Tensor, ...]:
    """Photos (B, 3, S, S) uint8 -> what the writer takes for them: features, pooled and, in a file of uint8, scales."""
    with autocast(photos.device, precision):
        grid, class_vector = encoder.encode(photos)
    features, mean, *scales = to_stored_rows(grid, writer.shape[1:], str(writer.dtype))
    return features, mean if class_vector is None else class_vector.float(), *scales


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
    """`main` on all processes of the job, with the feature files locked."""
    remedy = f"lower --batch-size, now {config.batch_size}"
    writes = not (config.info or config.verify)
    with (
        init_distributed("the same command goes on") as distributed,
        lost_worker_as_user_error(),
        oom_as_user_error(remedy),
    ):
        with contextlib.ExitStack() as locks:
            for file in config.files.values():
                lock = file.with_name(file.name + ".lock")
                locks.enter_context(locked(file, lock, distributed.is_main and writes))
            main(config, distributed)


if __name__ == "__main__":
    run(ExtractFeatures, work)
