"""Where features lie while training, and how fast they are extracted."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from extraction_runs import decode_all, encode_all, extract_all
from synthetic import MAX_LENGTH, write_data, write_features, write_photos
from trainer_runs import make_trainer, train_epoch

from captioning.dataset.caption_dataset import CaptionDataset
from captioning.encoders.encoder import Encoder
from captioning.encoders.gpu_decoding import check_nvjpeg
from captioning.encoders.images import split_batches
from captioning.encoders.loading import calibrate_batch_norm, load_encoder
from captioning.errors import UserError
from captioning.runtime.device import encoder_precision
from captioning.training.data import cached_data
from captioning.training.options import TrainingOptions
from gpu_steps.common import Row, Setting, memory_pressure, not_available

RESERVED_FRACTION = 0.15  # of the GPU's memory, at least RESERVED_GB: what features leave free for the decoder
RESERVED_GB = 4.0
CNN_TARGET = 4500.0  # photos/s
OVERLAP_TARGET = 0.9  # of the slower of decoding and the CNN
CALIBRATION_PHOTOS = 32

# ---- residence


def residence(setting: Setting) -> Iterator[Row]:
    """Training with features on the GPU, partly there, as uint8, in main memory and on disk: the share it waits."""
    scale = setting.scale
    photos = setting.photos(scale.residence_photos)
    write_data(setting.folder, photos, setting.vocabulary)
    path = setting.folder / "features.h5"
    write_features(path, [photo.id for photo in photos], scale.side, scale.channels)
    gigabytes = path.stat().st_size / 1e9
    captions = CaptionDataset(photos, setting.vocabulary, MAX_LENGTH)
    memory = "gpu" if setting.device.type == "cuda" else "ram"
    places: dict[str, dict[str, Any]] = {
        "gpu": {"features_on": "gpu"},
        "partial": {"features_on": "auto"},
        "uint8": {"features_on": memory, "quantize_features": True},
        "ram": {"features_on": "ram"},
        "disk": {"features_on": "disk"},
    }
    for name, changes in places.items():
        missing = [option for option in changes if option not in {field.name for field in fields(TrainingOptions)}]
        if missing:
            yield not_available(name, f"this version has no option {missing[0]}")
            continue
        with half_fits(setting, gigabytes) if name == "partial" else contextlib.nullcontext():
            yield train_on(setting, name, captions, changes, gigabytes)
        gc.collect()  # the features of this run leave the GPU


def half_fits(setting: Setting, gigabytes: float) -> contextlib.AbstractContextManager:
    """Leave so little GPU memory in the block that half of these features fit beside what is kept for the decoder."""
    if setting.device.type != "cuda":
        return contextlib.nullcontext()
    _, total = torch.cuda.mem_get_info(setting.device)
    return memory_pressure(setting, max(RESERVED_GB, RESERVED_FRACTION * total / 1e9) + gigabytes / 2)


def train_on(setting: Setting, name: str, captions: CaptionDataset, changes: dict[str, Any], gigabytes: float) -> Row:
    """The row of two epochs with the features in one place."""
    options = replace(setting.options(batch_size=setting.scale.library_batch_size, **changes), data=setting.folder)
    rows = np.arange(len(captions))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            data = cached_data(options, captions, rows, rows[:1], setting.device)
    except UserError as error:
        return not_available(name, str(error))
    trainer = make_trainer(options, setting.vocabulary, data, setting.device)
    train_epoch(trainer)
    metrics = train_epoch(trainer)
    placed = printed.getvalue().strip().rpartition("read from ")[2]
    return Row(
        f"features {name}: share of the time waited",
        f"{metrics['waiting']:.1%}",
        note=f"{metrics['captions_per_second']:,.0f} captions/s, {gigabytes:.2f} GB of features, {placed}",
    )


# ---- extraction


def extraction(setting: Setting) -> Iterator[Row]:
    """Photos/s of decoding alone, of the CNN alone and of both together."""
    scale = setting.scale
    files = write_photos(setting.folder / "photos", scale.jpegs)
    paths = list(itertools.islice(itertools.cycle(files), scale.extraction_photos))
    for name in scale.encoders:
        try:
            yield from extraction_with(setting, name, paths)
        except UserError as error:  # such as: the extra is not installed
            yield not_available(name, str(error))


def extraction_with(setting: Setting, name: str, paths: list[str]) -> Iterator[Row]:
    """The rows of one encoder. With the first encoder also by nvJPEG, and compiled, which takes longest."""
    scale = setting.scale
    encoder = load_encoder(name, "random", scale.image_size if name.startswith("resnet") else None)
    # without calibration the features would overflow float16
    calibrate_batch_norm(encoder, paths[:CALIBRATION_PHOTOS], scale.extraction_batch_size, workers=0)
    encoder = encoder.to(setting.device).eval().requires_grad_(False)
    yield from extraction_rows(setting, encoder, name, paths)
    if name != scale.encoders[0]:
        return
    try:
        check_nvjpeg(setting.device)
        encoder.transform = replace(encoder.transform, nvjpeg=True)
        yield from extraction_rows(setting, encoder, f"{name}, nvJPEG", paths)
        encoder.transform = replace(encoder.transform, nvjpeg=False)
    except UserError as error:
        yield not_available(f"{name}, nvJPEG", str(error))


def compiled_extraction(setting: Setting) -> Iterator[Row]:
    """The same with a compiled CNN: a step of its own, since compiling may take longer than all the rest."""
    if setting.device.type != "cuda":
        yield not_available("compiled", "needs a GPU: on a CPU it gained nothing")
        return
    scale = setting.scale
    name = scale.encoders[0]
    files = write_photos(setting.folder / "photos", scale.jpegs)
    paths = list(itertools.islice(itertools.cycle(files), scale.extraction_photos))
    encoder = load_encoder(name, "random", scale.image_size)
    calibrate_batch_norm(encoder, paths[:CALIBRATION_PHOTOS], scale.extraction_batch_size, workers=0)
    encoder = encoder.to(setting.device).eval().requires_grad_(False)
    seconds = encoder.compile_for(scale.extraction_batch_size, encoder_precision("auto", setting.device))
    yield Row(f"{name}: compilation", seconds, "s")
    yield from extraction_rows(setting, encoder, f"{name}, compiled", paths)


def extraction_rows(setting: Setting, encoder: Encoder, name: str, paths: list[str]) -> Iterator[Row]:
    """The rows of an encoder that is on the device."""
    device = setting.device
    batch_size = setting.scale.extraction_batch_size
    workers = os.cpu_count() or 1 if device.type == "cuda" else 0
    precision = encoder_precision("auto", device)
    plan = split_batches(list(range(len(paths))), batch_size)
    encode_all(encoder, 2, batch_size, precision, device)  # warm-up
    cnn = rate(len(plan) * batch_size, lambda: encode_all(encoder, len(plan), batch_size, precision, device))
    decode = rate(len(paths), lambda: decode_all(encoder, paths, plan, device, workers))
    is_cuda = device.type == "cuda"
    is_target = is_cuda and name.startswith("resnet101")
    shown = f"batches of {batch_size}, {str(precision).removeprefix('torch.')}"
    target = f">= {CNN_TARGET:,.0f} photos/s" if is_target else ""
    yield Row(f"{name}: CNN alone", cnn, "photos/s", target, cnn >= CNN_TARGET if is_target else None, shown)
    note = f"{workers} processes, {setting.scale.jpegs} JPEGs of COCO's size"
    yield Row(f"{name}: decoding alone", decode, "photos/s", note=note)
    try:
        both = rate(len(paths), lambda: extract_all(encoder, paths, plan, precision, workers, setting.folder))
    except ModuleNotFoundError as error:
        yield not_available(f"{name}: an extraction", f"needs the package {error.name}")
        return
    share = both / min(cnn, decode)
    yield Row(f"{name}: an extraction", both, "photos/s", note=f"{len(paths):,} photos")
    target = f">= {OVERLAP_TARGET:.0%}" if is_cuda else ""
    met = share >= OVERLAP_TARGET if is_cuda else None
    yield Row(f"{name}: of the slower of the two", f"{share:.0%}", "", target, met)


def rate(photos: int, function: Callable[[], object]) -> float:
    """Photos/s of one call."""
    started = perf_counter()
    function()
    return photos / (perf_counter() - started)
