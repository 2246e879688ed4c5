"""Photos on their way to the device that encodes them, and features on their way back, while it computes.

On a GPU both travel through pinned memory, each on a stream of its own. With nvJPEG the GPU decodes as well: processes
only read the files. What nvJPEG does not read as Pillow would, such as CMYK, grey or damaged JPEGs and all other
formats, is decoded the ordinary way.

Letters: B photos, S pixels a side.
"""

from __future__ import annotations

import io
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

from captioning.encoders.images import PhotoBatch, Transform, make_loader, open_image, photo_batches, read_photos
from captioning.errors import PhotoError, UserError

BEHIND = {"cuda": 1}  # batches that a device of this kind has still to compute when the next one is given to it


def load_photos(
    device: torch.device,
    paths: Sequence[Path | str],
    batches: Iterable[Sequence[int]],
    transform: Transform,
    workers: int,
) -> Iterator[PhotoBatch]:
    """As photo_batches, ascending within a batch, with the photos on the device, decoded there where so wanted."""
    if device.type != "cuda":
        for batch in photo_batches(paths, batches, transform, workers):
            yield batch._replace(photos=batch.photos.to(device))
        return
    stream, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for files in make_loader(read_files, paths, batches, transform, workers, pin=True):
        stream.synchronize()  # nvJPEG writes on a stream that torch does not know, perhaps where this one still reads
        with torch.cuda.stream(stream):
            batch = decode_files(files, paths, transform, device)
        computing.wait_stream(stream)
        batch.photos.record_stream(computing)
        yield batch


def copy_to_host(results: Iterable[tuple], device: torch.device) -> Iterator[tuple]:
    """Results (rows, tensor, ...) with their tensors on the CPU. A GPU is given the next before one is waited for."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    under_way: deque[tuple[Any, list[Tensor], torch.cuda.Event | None]] = deque()
    for rows, *tensors in results:
        under_way.append((rows, *_fetch(tensors, stream)))
        if len(under_way) > BEHIND.get(device.type, 0):
            yield _arrived(*under_way.popleft())
    while under_way:
        yield _arrived(*under_way.popleft())


def _fetch(tensors: list[Tensor], stream: torch.cuda.Stream | None) -> tuple[list[Tensor], torch.cuda.Event | None]:
    """The tensors on their way to the CPU, into pinned memory; and the event that says they are there."""
    if stream is None:
        return [tensor.cpu() for tensor in tensors], None
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    for tensor in tensors:
        tensor.record_stream(stream)
    return copies, stream.record_event()


def _arrived(rows: Any, tensors: list[Tensor], event: torch.cuda.Event | None) -> tuple:
    if event:
        event.synchronize()
    return rows, *tensors


# ---- nvJPEG


class FileBatch(NamedTuple):
    indices: list[int]  # of the JPEGs that the GPU decodes, into the list of paths
    files: Tensor  # (bytes,) uint8: one after the other, since each tensor from a process costs it an open file
    sizes: list[int]  # of each, bytes
    orientations: list[int]  # of each, as in EXIF: 1 is upright
    others: PhotoBatch  # decoded already, or not to be read


def read_files(paths: Sequence[Path | str], indices: Sequence[int], transform: Transform) -> FileBatch:
    """The photos paths[i] for each i of `indices`: JPEGs for the GPU as they lie on the disk, others squashed."""
    jpegs = {i: jpeg for i in indices if transform.nvjpeg and (jpeg := read_jpeg(paths[i]))}
    files = [torch.from_numpy(file) for file, _ in jpegs.values()]
    others = read_photos(paths, [i for i in indices if i not in jpegs], transform)
    return FileBatch(
        [*map(int, jpegs)],
        torch.cat(files or [torch.empty(0, dtype=torch.uint8)]),
        [*map(len, files)],
        [orientation for _, orientation in jpegs.values()],
        others,
    )


def read_jpeg(path: Path | str) -> tuple[np.ndarray, int] | None:
    """A JPEG's bytes (N,) uint8 and its EXIF orientation.

    None for all that nvJPEG might read otherwise than Pillow, or not refuse though it is cut short.
    """
    try:
        with open_image(path) as image:
            usual = image.format == "JPEG" and image.mode == "RGB" and image.info.get("adobe_transform", 1) == 1
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            file = np.fromfile(path, np.uint8)
    except PhotoError:
        return None  # the ordinary way will say why
    return (file, orientation) if usual and file[-2:].tobytes() == b"\xff\xd9" else None  # the end of an image


def decode_files(
    files: FileBatch, paths: Sequence[Path | str], transform: Transform, device: torch.device
) -> PhotoBatch:
    """All photos of the batch, squashed, on the device. What nvJPEG refuses is decoded the ordinary way."""
    photos, refused = {}, []
    jpegs = decode_jpegs(list(files.files.split(files.sizes)), device)
    for index, jpeg, orientation in zip(files.indices, jpegs, files.orientations, strict=True):
        if jpeg is None:
            refused.append(index)
        else:
            photos[index] = upright(resize(jpeg, transform.image_size), orientation)
    again = read_photos(paths, refused, transform)
    for batch in (files.others, again):
        photos |= zip(batch.indices, batch.photos.to(device, non_blocking=True), strict=True)
    indices = sorted(photos)
    together = torch.stack([photos[index] for index in indices]) if indices else again.photos.to(device)
    return PhotoBatch(indices, together, [*files.others.failures, *again.failures])


def decode_jpegs(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """JPEG files (bytes,) uint8 on the CPU -> RGB photos (3, H, W) uint8 on the device; None where one is refused."""
    if not files:
        return []
    try:
        return torchvision.io.decode_jpeg(files, torchvision.io.ImageReadMode.RGB, device)
    except RuntimeError:  # one of them spoils the batch
        return [photo for file in files for photo in decode_jpegs([file], device)] if len(files) > 1 else [None]


def resize(photo: Tensor, size: int) -> Tensor:
    """(3, H, W) uint8 -> (3, S, S) uint8, bilinear and antialiased as Transform.squash."""
    squashed = F.interpolate(photo[None].float(), (size, size), mode="bilinear", antialias=True)[0]
    return squashed.round().to(torch.uint8)


def upright(photo: Tensor, orientation: int) -> Tensor:
    """A square photo (3, S, S), turned and mirrored as EXIF's `orientation` asks (1 to 8)."""
    if orientation in (5, 6, 7, 8):
        photo = photo.transpose(1, 2)
    mirrored = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation, [])
    return photo.flip(mirrored)


def check_nvjpeg(device: torch.device) -> None:
    """Raises UserError where JPEGs cannot be decoded on the device."""
    if device.type != "cuda":
        raise UserError(f"--nvjpeg: decodes on a CUDA GPU, and this extraction runs on {device}; leave it out")
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    try:
        decoded = decode_jpegs([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], device)
    except AttributeError:  # torchvision has announced that it will drop it
        decoded = [None]
    if decoded[0] is None:
        raise UserError(
            f"--nvjpeg: torchvision {torchvision.__version__} cannot decode JPEGs on {device}; leave it out"
        )
