"""Photos as Python programs have them: paths, PIL images, arrays, tensors, bytes and open files.

Letters: H x W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captioning.encoders.images import DecodedPhoto, Transform, to_rgb
from captioning.errors import PhotoError
from captioning.runtime.library_errors import reason
from captioning.runtime.photo_formats import PhotoBytes

PhotoLike = (
    Path | str | os.PathLike[str] | Image.Image | np.ndarray | Tensor | bytes | bytearray | memoryview | BinaryIO
)
WANTED = (
    "give a path, a PIL image, an array (H, W, 3), a tensor (3, H, W), the bytes of a file, or a file opened with 'rb'"
)
MAX_PATH = 4096  # characters


def is_one_photo(photos: object) -> bool:
    """Whether this is one photo, not several. An array of texts is several paths."""
    if isinstance(photos, np.ndarray):
        return photos.dtype.kind not in "UO"
    kinds = (str, os.PathLike, Image.Image, Tensor, bytes, bytearray, memoryview)
    return isinstance(photos, kinds) or hasattr(photos, "read")


def list_photos(photos: Iterable[PhotoLike]) -> list[PhotoLike]:
    """The photos of any iterable that has an order. Raises PhotoError for other objects."""
    if isinstance(photos, (Mapping, Set)) or not isinstance(photos, Iterable):
        raise _wrong_type(photos)
    return list(photos)


def open_photo_object(photo: Any, transform: Transform) -> DecodedPhoto:
    """Decode one photo of any of the types, for `transform.resize`. Raises PhotoError."""
    if isinstance(photo, Tensor):
        return tensor_to_pixels(photo)
    if isinstance(photo, np.ndarray):
        return array_to_pixels(photo)
    if isinstance(photo, Image.Image):
        return _image_to_rgb(photo)
    if isinstance(photo, (bytes, bytearray, memoryview)):
        return transform.open(PhotoBytes(photo, f"photo of {memoryview(photo).nbytes:,} bytes"))
    if hasattr(photo, "read"):
        return transform.open(_read(photo))
    if isinstance(photo, (str, os.PathLike)):
        path = os.fsdecode(photo)
        if len(path) > MAX_PATH:
            raise PhotoError(f"photo of type str: {len(path):,} characters are not a path; decode base64 to bytes")
        return transform.open(path)
    raise _wrong_type(photo)


def _wrong_type(photo: object) -> PhotoError:
    kind = type(photo)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return PhotoError(f"photo of type {name}: {WANTED}")


def _image_to_rgb(photo: Image.Image) -> Image.Image:
    try:
        return to_rgb(photo)
    except Exception as error:  # an image that was opened, but not yet decoded, may turn out to be damaged
        raise PhotoError(f"{getattr(photo, 'filename', '') or 'PIL image'}: {reason(error)}") from None


def _read(file: Any) -> PhotoBytes:
    """The content of an open file, from its beginning where that can be reached."""
    name = getattr(file, "name", None)
    if not isinstance(name, str):
        name = f"photo of type {type(file).__qualname__}"
    try:
        if hasattr(file, "seekable") and file.seekable():
            file.seek(0)
        data = file.read()
    except UnicodeDecodeError:
        data = None
    except Exception as error:  # whatever a file, an archive or an answer of a server may raise
        raise PhotoError(f"{name}: cannot be read ({reason(error)})") from None
    if not isinstance(data, bytes):
        raise PhotoError(f"{name}: was opened as text; open it with 'rb'")
    return PhotoBytes(data, name)


def tensor_to_pixels(photo: Tensor) -> np.ndarray:
    """(3, H, W) uint8, or floating point in 0..1, which is rounded to the nearest of 256 levels -> (H, W, 3) uint8."""
    is_known = photo.dtype == torch.uint8 or photo.is_floating_point()
    if photo.ndim != 3 or photo.shape[0] != 3 or not photo.numel() or not is_known:
        found = f"{photo.dtype} of shape {tuple(photo.shape)}".removeprefix("torch.")
        raise PhotoError(f"photo tensor {found}: must be (3, H, W) RGB, uint8 or floating point in 0..1")
    if photo.is_floating_point():
        if not bool(((photo >= 0) & (photo <= 1)).all()):
            raise PhotoError("photo tensor with values outside 0..1: give it before normalisation")
        photo = (255 * photo.detach().float()).round().to(torch.uint8)
    return photo.permute(1, 2, 0).cpu().numpy()


def array_to_pixels(photo: np.ndarray) -> DecodedPhoto:
    """(H, W, 3) RGB, (H, W, 4) RGBA or (H, W) grey; uint8, or floating point in 0..1 -> RGB, as of a tensor."""
    is_known = photo.dtype == np.uint8 or photo.dtype.kind == "f"
    is_shaped = photo.ndim == 2 or (photo.ndim == 3 and photo.shape[2] in (3, 4))
    if not is_known or not is_shaped or not photo.size:
        found = f"{photo.dtype} of shape {photo.shape}"
        raise PhotoError(f"photo array {found}: must be (H, W, 3) RGB or (H, W), uint8 or floating point in 0..1")
    if photo.dtype.kind == "f":
        if not ((photo >= 0) & (photo <= 1)).all():
            raise PhotoError("photo array with values outside 0..1: give it before normalisation")
        photo = np.rint(255 * photo.astype(np.float32)).astype(np.uint8)
    return photo if photo.shape[2:] == (3,) else to_rgb(Image.fromarray(photo))
