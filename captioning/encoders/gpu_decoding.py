"""Copies photos to the device that encodes them, and features back, while it computes.

On a GPU both copies use pinned memory and a separate CUDA stream. With nvJPEG the GPU also decodes, and worker
processes only read the files. Files that nvJPEG cannot decode, or may decode differently from Pillow, are decoded on
the CPU: CMYK, grey, rotated or damaged JPEGs and all other formats.

Letters: B photos, S pixels per side.
"""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor

from captioning.encoders.images import (
    IndexBatch,
    PhotoBatch,
    Transform,
    is_plain_jpeg,
    make_loader,
    open_image,
    read_photos,
)
from captioning.errors import PhotoError, UserError
from captioning.runtime.device import empty_pinned, pin
from captioning.runtime.library_errors import reason

MAX_IN_FLIGHT = {"cuda": 1}  # device type -> batches that may still be computing when the next one is submitted
END_OF_IMAGE = b"\xff\xd9"  # the last bytes of a complete JPEG
DecodeJpegs = Callable[[list[Tensor], torch.device], list[Tensor]]


def load_photos(
    device: torch.device,
    paths: Sequence[Path | str],
    batches: Iterable[IndexBatch],
    transform: Transform,
    workers: int,
    read: Callable[..., PhotoBatch] = read_photos,
) -> Iterator[PhotoBatch]:
    """Like `photo_batches`, with the photos on the device and ascending indices within a batch.

    On a GPU, `transform.nvjpeg` selects decoding by nvJPEG. Otherwise `read` decodes: `read_photos` or a `ReadViews`.
    """
    if device.type != "cuda":
        for batch in make_loader(read, paths, batches, transform, workers, pin=False):
            yield batch._replace(photos=batch.photos.to(device))
        return
    copy_stream = torch.cuda.Stream(device)
    compute_stream = torch.cuda.current_stream(device)
    read_on_cpu = read_files if transform.nvjpeg else read
    for loaded in make_loader(read_on_cpu, paths, batches, transform, workers, pin=True):
        copy_stream.synchronize()  # nvJPEG may write on a stream unknown to torch, and must not overtake this one
        with torch.cuda.stream(copy_stream):
            if transform.nvjpeg:
                batch = decode_files(loaded, paths, transform, device)
            else:
                batch = loaded._replace(photos=loaded.photos.to(device, non_blocking=True))
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
    """The files of a batch: JPEGs for nvJPEG, and photos that the CPU has decoded."""

    indices: list[int]  # of the JPEGs, into the list of paths
    jpegs: Tensor  # (bytes,) uint8: all files in one tensor, since each tensor from a worker costs a file descriptor
    sizes: list[int]  # of each JPEG, bytes
    decoded: PhotoBatch  # the other photos, and the failures

    def pin_memory(self) -> FileBatch:
        """Copy the files and photos to page-locked memory. DataLoader calls it."""
        return self._replace(jpegs=pin(self.jpegs), decoded=self.decoded.pin_memory())


def read_files(paths: Sequence[Path | str], indices: IndexBatch, transform: Transform) -> FileBatch:
    """Read paths[i] for each i of `indices`: JPEGs for nvJPEG stay encoded, all others are decoded and resized."""
    files = {int(i): file for i in indices if (file := read_jpeg(paths[i])) is not None}
    return FileBatch(
        indices=list(files),
        jpegs=torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *files.values()])),
        sizes=[len(file) for file in files.values()],
        decoded=read_photos(paths, [i for i in indices if i not in files], transform),
    )


def read_jpeg(path: Path | str) -> np.ndarray | None:
    """A JPEG's bytes (N,) uint8.

    None for files that nvJPEG may decode differently from Pillow, or may accept although they are truncated.
    """
    try:
        with open_image(path) as image:
            is_plain = is_plain_jpeg(image)
            file = np.fromfile(path, np.uint8)
    except PhotoError:
        return None  # read_photos will report the reason
    return file if is_plain and file[-2:].tobytes() == END_OF_IMAGE else None


def decode_files(
    files: FileBatch, paths: Sequence[Path | str], transform: Transform, device: torch.device
) -> PhotoBatch:
    """All photos of the batch, resized, on the device. The CPU decodes the files that nvJPEG rejects."""
    photos: dict[int, Tensor] = {}
    rejected = []
    jpegs = decode_jpegs(list(files.jpegs.split(files.sizes)), device)
    for index, jpeg in zip(files.indices, jpegs, strict=True):
        if jpeg is None:
            rejected.append(index)
        else:
            photos[index] = resize(jpeg, transform.image_size, transform.interpolation)
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
        return [*find_decoder(device)(files, device)]
    except RuntimeError:  # a single damaged file rejects the batch
        if len(files) == 1:
            return [None]
        return [photo for file in files for photo in decode_jpegs([file], device)]


@lru_cache
def find_decoder(device: torch.device) -> DecodeJpegs:
    """The library that decodes JPEGs on the device. Raises UserError, with each one's reason, if none does.

    TorchCodec's comes second: it follows torchvision's, which was measured here, and decodes with nvJPEG like it.
    """
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    jpeg = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    reasons = []
    for name, decode in (("torchvision", decode_with_torchvision), ("torchcodec", decode_with_torchcodec)):
        try:
            decode([jpeg], device)
            return decode
        except Exception as error:  # not installed, built without CUDA, for another torch, its decoder removed ...
            reasons.append(f"{name} ({reason(error)})")
    raise UserError(
        f"--nvjpeg: {' and '.join(reasons)} cannot decode JPEGs on {device}; "
        "install torchcodec 0.16 or newer with CUDA, or leave it out"
    )


def decode_with_torchvision(files: list[Tensor], device: torch.device) -> list[Tensor]:
    """JPEG files -> (3, H, W) uint8 each."""
    with warnings.catch_warnings():
        # torchvision 0.29 deprecates its decoders in favour of TorchCodec
        warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)
        return torchvision.io.decode_jpeg(files, torchvision.io.ImageReadMode.RGB, device)


def decode_with_torchcodec(files: list[Tensor], device: torch.device) -> list[Tensor]:
    """Like `decode_with_torchvision`. It also turns a photo as its EXIF says, but ours are upright already."""
    from torchcodec.decoders import decode_jpeg  # optional; torchcodec's own versions follow torch's

    return decode_jpeg(files, mode="RGB", device=device)


def resize(photo: Tensor, size: int, interpolation: str = "bilinear") -> Tensor:
    """(3, H, W) uint8 -> (3, S, S) uint8, antialiased like Transform.resize."""
    resized = F.interpolate(photo[None].float(), (size, size), mode=interpolation, antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)  # clamp: bicubic weights overshoot


def check_nvjpeg(device: torch.device, remedy: str = "leave it out") -> None:
    """Raise UserError if JPEGs cannot be decoded on the device. remedy: if the device is no CUDA GPU."""
    if device.type != "cuda":
        raise UserError(f"--nvjpeg: decodes on a CUDA GPU, but this extraction runs on {device}; {remedy}")
    find_decoder(device)
