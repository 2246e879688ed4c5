"""Copies photos to the device that encodes them, and features back, while it computes.

On a GPU both copies use pinned memory and a separate CUDA stream. With nvJPEG the GPU also decodes, and worker
processes only read the files. Files that nvJPEG cannot decode, or may decode differently from Pillow, are decoded by
Pillow: CMYK, grey or damaged JPEGs and all other formats.

Letters: B photos, S pixels per side.
"""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import ExifTags, Image
from torch import Tensor

from captioning.encoders.images import (
    IndexBatch,
    PhotoBatch,
    Transform,
    make_loader,
    open_image,
    photo_batches,
    read_photos,
)
from captioning.errors import PhotoError, UserError
from captioning.runtime.device import empty_pinned, pin

MAX_IN_FLIGHT = {"cuda": 1}  # device type -> batches that may still be computing when the next one is submitted
END_OF_IMAGE = b"\xff\xd9"  # the last bytes of a complete JPEG
FLIPPED_AXES = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}  # EXIF orientation -> axes of (3, S, S)


def load_photos(
    device: torch.device,
    paths: Sequence[Path | str],
    batches: Iterable[IndexBatch],
    transform: Transform,
    workers: int,
) -> Iterator[PhotoBatch]:
    """Like `photo_batches`, with the photos on the device and ascending indices within a batch.

    On a GPU, `transform.nvjpeg` selects decoding by nvJPEG.
    """
    if device.type != "cuda":
        for batch in photo_batches(paths, batches, transform, workers):
            yield batch._replace(photos=batch.photos.to(device))
        return
    copy_stream = torch.cuda.Stream(device)
    compute_stream = torch.cuda.current_stream(device)
    for files in make_loader(read_files, paths, batches, transform, workers, pin=True):
        copy_stream.synchronize()  # nvJPEG writes on a stream unknown to torch, and must not overtake this one
        with torch.cuda.stream(copy_stream):
            batch = decode_files(files, paths, transform, device)
        compute_stream.wait_stream(copy_stream)
        batch.photos.record_stream(compute_stream)
        yield batch


def copy_to_host(results: Iterable[tuple], device: torch.device) -> Iterator[tuple]:
    """Yield results (rows, tensor, ...) with their tensors on the CPU.

    On a GPU the next result is requested, and so submitted, before the copy of the previous one is awaited.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    in_flight: deque[tuple[Any, list[Tensor], torch.cuda.Event | None]] = deque()
    for rows, *tensors in results:
        copies, copied = _start_copy(tensors, stream)
        in_flight.append((rows, copies, copied))
        if len(in_flight) > MAX_IN_FLIGHT.get(device.type, 0):
            yield _finish_copy(*in_flight.popleft())
    while in_flight:
        yield _finish_copy(*in_flight.popleft())


def _start_copy(
    tensors: list[Tensor], stream: torch.cuda.Stream | None
) -> tuple[list[Tensor], torch.cuda.Event | None]:
    """Copies of the tensors in pinned memory, and the event after which they are valid (None: at once)."""
    if stream is None:
        return [tensor.cpu() for tensor in tensors], None
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        copies = [empty_pinned(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True) for tensor in tensors]
    for tensor in tensors:
        tensor.record_stream(stream)
    return copies, stream.record_event()


def _finish_copy(rows: Any, copies: list[Tensor], copied: torch.cuda.Event | None) -> tuple:
    if copied:
        copied.synchronize()
    return rows, *copies


# ---- nvJPEG


class FileBatch(NamedTuple):
    """The files of a batch: JPEGs for nvJPEG, and photos that Pillow has decoded."""

    indices: list[int]  # of the JPEGs, into the list of paths
    jpegs: Tensor  # (bytes,) uint8: all files in one tensor, since each tensor from a worker costs a file descriptor
    sizes: list[int]  # of each JPEG, bytes
    orientations: list[int]  # EXIF orientation of each JPEG; 1 is upright
    decoded: PhotoBatch  # the other photos, and the failures

    def pin_memory(self) -> FileBatch:
        """Copy the files and photos to page-locked memory. DataLoader calls it."""
        return self._replace(jpegs=pin(self.jpegs), decoded=self.decoded.pin_memory())


def read_files(paths: Sequence[Path | str], indices: IndexBatch, transform: Transform) -> FileBatch:
    """Read paths[i] for each i of `indices`: JPEGs for nvJPEG stay encoded, all others are decoded and resized."""
    jpegs = {}
    if transform.nvjpeg:
        for i in indices:
            if jpeg := read_jpeg(paths[i]):
                jpegs[i] = jpeg
    files = [torch.from_numpy(file) for file, _ in jpegs.values()]
    return FileBatch(
        indices=[int(i) for i in jpegs],
        jpegs=torch.cat(files or [torch.empty(0, dtype=torch.uint8)]),
        sizes=[len(file) for file in files],
        orientations=[orientation for _, orientation in jpegs.values()],
        decoded=read_photos(paths, [i for i in indices if i not in jpegs], transform),
    )


def read_jpeg(path: Path | str) -> tuple[np.ndarray, int] | None:
    """A JPEG's bytes (N,) uint8 and its EXIF orientation.

    None for files that nvJPEG may decode differently from Pillow, or may accept although they are truncated.
    """
    try:
        with open_image(path) as image:
            is_plain = image.format == "JPEG" and image.mode == "RGB" and image.info.get("adobe_transform", 1) == 1
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            file = np.fromfile(path, np.uint8)
    except PhotoError:
        return None  # read_photos will report the reason
    return (file, orientation) if is_plain and file[-2:].tobytes() == END_OF_IMAGE else None


def decode_files(
    files: FileBatch, paths: Sequence[Path | str], transform: Transform, device: torch.device
) -> PhotoBatch:
    """All photos of the batch, resized, on the device. Pillow decodes the files that nvJPEG rejects."""
    photos: dict[int, Tensor] = {}
    rejected = []
    jpegs = decode_jpegs(list(files.jpegs.split(files.sizes)), device)
    for index, jpeg, orientation in zip(files.indices, jpegs, files.orientations, strict=True):
        if jpeg is None:
            rejected.append(index)
        else:
            photos[index] = upright(resize(jpeg, transform.image_size, transform.interpolation), orientation)
    fallback = read_photos(paths, rejected, transform)
    for batch in (files.decoded, fallback):
        photos |= zip(batch.indices, batch.photos.to(device, non_blocking=True), strict=True)
    indices = sorted(photos)
    stacked = torch.stack([photos[index] for index in indices]) if indices else fallback.photos.to(device)
    return PhotoBatch(indices, stacked, [*files.decoded.failures, *fallback.failures])


def decode_jpegs(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Decode JPEG files, uint8 (bytes,) on the CPU -> RGB photos (3, H, W) uint8 on the device; None if rejected."""
    if not files:
        return []
    try:
        with warnings.catch_warnings():
            # torchvision 0.29 deprecates its decoders in favour of another package, TorchCodec
            warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)
            return torchvision.io.decode_jpeg(files, torchvision.io.ImageReadMode.RGB, device)
    except RuntimeError:  # a single damaged file rejects the batch
        if len(files) == 1:
            return [None]
        return [photo for file in files for photo in decode_jpegs([file], device)]


def resize(photo: Tensor, size: int, interpolation: str = "bilinear") -> Tensor:
    """(3, H, W) uint8 -> (3, S, S) uint8, antialiased like Transform.resize. interpolation: bilinear or bicubic."""
    resized = F.interpolate(photo[None].float(), (size, size), mode=interpolation, antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)  # bicubic weights may be negative


def upright(photo: Tensor, orientation: int) -> Tensor:
    """Rotate and mirror a square photo (3, S, S) as its EXIF orientation (1 to 8) requires."""
    if orientation in (5, 6, 7, 8):
        photo = photo.transpose(1, 2)
    return photo.flip(FLIPPED_AXES.get(orientation, []))


def check_nvjpeg(device: torch.device) -> None:
    """Raise UserError if JPEGs cannot be decoded on the device."""
    if device.type != "cuda":
        raise UserError(f"--nvjpeg: decodes on a CUDA GPU, but this extraction runs on {device}; leave it out")
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    try:
        (photo,) = decode_jpegs([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], device)
    except AttributeError:  # torchvision has announced the removal of its decoders
        photo = None
    if photo is None:
        raise UserError(
            f"--nvjpeg: torchvision {torchvision.__version__} cannot decode JPEGs on {device}; leave it out"
        )
