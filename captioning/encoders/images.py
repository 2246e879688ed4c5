"""Photo decoding and the transform that turns a photo into a tensor, for extraction, training and captioning.

The transform resizes the whole photo to a square (antialiased), scales RGB to 0..1 and normalises it with the encoder's
mean and standard deviation. Worker processes return uint8; normalisation runs on the device.

`Transform.decoding` names who decodes and resizes. Pillow reads every header. Of the pixels, simplejpeg decodes plain
JPEGs and Pillow everything else; both use libjpeg-turbo and return the same bytes. torch resizes with integer weights,
as Pillow does, but fewer bits of them: a pixel may differ by a grey level, rarely two. It returns the same bytes on any
CPU (its AVX2 and NEON kernels equal the portable one). Files and runs made before have "pillow", and keep it.

A decoded photo is a PIL image or an array (H, W, 3) uint8, upright and RGB.

Letters: B photos, H x W pixels, S pixels per side of the square.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset

from captioning.encoders.views import DecodedPhoto, View
from captioning.errors import PhotoError, UserError
from captioning.runtime.device import pin
from captioning.runtime.library_errors import reason
from captioning.runtime.loader import SafeLoader
from captioning.runtime.photo_formats import PhotoBytes, PhotoFile, open_header, without_warnings

IndexBatch = Sequence[int] | np.ndarray  # (B,) indices into a list of paths
Indices = TypeVar("Indices", Sequence, np.ndarray)
DEEP_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # Pillow's modes of more than 8 bits
UPRIGHT = {  # EXIF's orientation -> what makes the photo upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PILLOW = "pillow"  # Transform.decoding: of files and runs that do not name any
SIMPLEJPEG_AND_TORCH = "simplejpeg+torch"


@dataclass(frozen=True)
class Transform:
    """How a photo becomes a tensor. Stored in feature files and checkpoints, and compared when they are loaded."""

    image_size: int = 256  # pixels per side
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's, RGB in 0..1
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    scaled_decoding: bool = False  # decode JPEGs of at least four times the size at 1/2, 1/4 or 1/8 of it
    nvjpeg: bool = False  # extraction decodes JPEGs on the GPU (encoders/gpu_decoding.py); nothing else does
    interpolation: str = "bilinear"  # of the resize: bilinear or bicubic, antialiased
    decoding: str = SIMPLEJPEG_AND_TORCH  # who decodes and resizes

    def __post_init__(self) -> None:
        if self.decoding not in (PILLOW, SIMPLEJPEG_AND_TORCH):
            raise UserError(f"decoding {self.decoding}: unknown to this version; install the one that made the file")

    @classmethod
    def from_dict(cls, saved: dict) -> Transform:
        """Rebuild a transform from `to_dict`, also after a round trip through JSON."""
        settings: dict[str, Any] = {"decoding": PILLOW, **saved}
        for name in ("mean", "std"):
            if name in settings:
                settings[name] = tuple(settings[name])
        return cls(**settings)

    def open(self, path: PhotoFile) -> DecodedPhoto:
        """Decode a photo file, for `resize`. Raises PhotoError.

        Scaled decoding drops JPEG frequencies that resizing would average away. It decodes to at least twice the size
        of the square. The cosine similarity of MobileNetV2's maps to those of full decoding is 0.9998 on average, but
        0.996 for the worst of 60 COCO photos (128 px), so it is off by default.
        """
        decode = open_photo if self.decoding == PILLOW else decode_photo
        return decode(path, 2 * self.image_size if self.scaled_decoding else None)

    def resize(self, photo: DecodedPhoto) -> Tensor:
        """A decoded photo -> (3, S, S) uint8, in channels-last memory."""
        resize = resize_with_pillow if self.decoding == PILLOW else resize_with_torch
        return resize(photo, self.image_size, self.interpolation)

    def normalise(self, photos: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> float32 on the same device, in channels-last memory format."""
        mean = _channel_values(self.mean, photos.device)
        std = _channel_values(self.std, photos.device)
        photos = photos.to(torch.float32, memory_format=torch.channels_last)
        return (photos - 255 * mean) / (255 * std)

    def to_dict(self) -> dict:
        """The settings as plain data."""
        return asdict(self)

    def differences(self, other: Transform) -> str:
        """In words, how this transform differs from another one; empty if it does not."""
        names = [name for name in self.to_dict() if getattr(self, name) != getattr(other, name)]
        return ", ".join(f"{name} {getattr(self, name)} instead of {getattr(other, name)}" for name in names)


@lru_cache
def _channel_values(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """(3, 1, 1) float32, cached: a copy to a GPU at every batch would synchronise with it."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(3, 1, 1)


@dataclass(frozen=True)
class Augment:
    """Random flips and crops of training photos.

    They depend on seed, epoch and photo alone, so a resumed run sees the same augmentations.
    """

    flip: bool = False  # mirror half of the photos, except those whose captions mention left or right
    crop: float = 1.0  # smallest fraction of each side that a random crop keeps
    seed: int = 0

    def __call__(self, photo: np.ndarray, index: int, epoch: int, may_flip: bool) -> np.ndarray:
        """A photo (H, W, 3) uint8 -> a view of its pixels."""
        rng = np.random.default_rng([self.seed, epoch, index])
        if self.crop < 1:
            photo = self._random_crop(photo, rng)
        if self.flip and rng.random() < 0.5 and may_flip:
            photo = photo[:, ::-1]
        return photo

    def _random_crop(self, photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = photo.shape[:2]
        width_fraction, height_fraction = rng.uniform(self.crop, 1, 2)
        left, top = rng.uniform(0, (width * (1 - width_fraction), height * (1 - height_fraction)))
        right = max(round(left + width * width_fraction), round(left) + 1)
        bottom = max(round(top + height * height_fraction), round(top) + 1)
        return photo[round(top) : bottom, round(left) : right]


def resize_with_torch(photo: DecodedPhoto, size: int, interpolation: str = "bilinear") -> Tensor:
    """A decoded photo -> (3, S, S) uint8, antialiased, in channels-last memory. interpolation: bilinear or bicubic."""
    pixels = np.require(photo, np.uint8, ["C_CONTIGUOUS", "WRITEABLE"])  # copies only PIL images, crops and mirrors
    # A view in channels-last memory, for which torch has its fastest kernels. They return the same. The order matters:
    # permute(2, 0, 1)[None] would have other strides, and torch would not take it for channels-last.
    channels_first = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    return F.interpolate(channels_first, (size, size), mode=interpolation, antialias=True)[0]


def resize_with_pillow(photo: DecodedPhoto, size: int, interpolation: str = "bilinear") -> Tensor:
    """Like `resize_with_torch`, with the rounding of Pillow."""
    image = photo if isinstance(photo, Image.Image) else Image.fromarray(photo)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling[interpolation.upper()])  # Pillow always antialiases
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode_photo(path: PhotoFile, min_side: int | None = None) -> DecodedPhoto:
    """Like `open_photo`, with the same pixels, in half the time for plain JPEGs."""
    with open_image(path) as image:
        if is_plain_jpeg(image):
            pixels = _decode_jpeg(_read_file(path), image.size, min_side)
            if pixels is not None:
                return pixels
        return _load(image, min_side)  # a damaged JPEG too: Pillow decides what can be read, and gives the reason


def _read_file(path: PhotoFile) -> np.ndarray:
    """(bytes,) uint8"""
    return np.frombuffer(path.getbuffer(), np.uint8) if isinstance(path, PhotoBytes) else np.fromfile(path, np.uint8)


def is_plain_jpeg(image: Image.Image) -> bool:
    """Whether every JPEG decoder would return the same upright RGB photo. image: not yet decoded."""
    return (
        image.format == "JPEG"
        and image.mode == "RGB"
        and image.info.get("adobe_transform", 1) == 1  # its colours are YCbCr
        and _orientation(image) not in UPRIGHT
    )


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation: 1, which is upright, where there is none or nonsense."""
    with contextlib.suppress(Exception):  # PIL's reader raises many kinds of exceptions for damaged tags
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        if isinstance(orientation, int):
            return orientation
    return 1


def reduction(size: tuple[int, int], min_side: int | None) -> int:
    """By how much the sides of a JPEG of this size (W, H) are divided while it is decoded: 1, 2, 4 or 8.

    The largest that leaves `min_side` pixels per side, if given; and enough for the photo to have no more pixels than
    Pillow allows.
    """
    width, height = size
    scales = (1, 2, 4, 8)
    allowed = max(scale for scale in scales if scale == 1 or (min_side and min(size) // scale >= min_side))
    limit = Image.MAX_IMAGE_PIXELS or width * height
    needed = next((scale for scale in scales if width * height <= scale**2 * limit), 8)
    return max(allowed, needed)


def _decode_jpeg(file: np.ndarray, size: tuple[int, int], min_side: int | None) -> np.ndarray | None:
    """A JPEG file (bytes,) uint8 -> (H, W, 3) uint8; None if it is damaged, or is not of this size (W, H).

    min_side: see `reduction`.
    """
    width, height = size
    scale = reduction(size, min_side)
    try:
        if simplejpeg.decode_jpeg_header(file)[:2] != (height, width):
            return None  # a file made to deceive: Pillow has checked the number of pixels of the size that it found
        return simplejpeg.decode_jpeg(file, min_height=-(-height // scale), min_width=-(-width // scale))
    except ValueError:
        return None


def open_photo(path: PhotoFile, min_side: int | None = None) -> Image.Image:
    """Decode a photo file to an upright RGB image; grey, CMYK, palette, alpha and deep images are converted.

    min_side: allows a JPEG to be decoded at 1/2, 1/4 or 1/8 of its size, with at least this many pixels per side.
    Raises PhotoError like `open_image`.
    """
    with open_image(path) as image:
        return _load(image, min_side)


def _load(image: Image.Image, min_side: int | None) -> Image.Image:
    scale = reduction(image.size, min_side)
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))  # JPEGs only
    return to_rgb(image)


@contextlib.contextmanager
def open_image(path: PhotoFile) -> Iterator[Image.Image]:
    """Open a photo file and read its header; pixels are decoded on demand.

    Raises PhotoError, also from the body, if the file is missing, truncated, not an image, or has too many pixels.
    """
    try:
        with open_header(path) as image, without_warnings():
            yield image
    except PhotoError:
        raise
    except FileNotFoundError:
        raise PhotoError(f"{path}: no such file") from None
    except Exception as error:  # PIL's readers raise many kinds of exceptions for broken files
        raise PhotoError(f"{path}: {reason(error)}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL image to an upright RGB image."""
    is_tiff = image.format == "TIFF"  # what is made of an image has no format
    image.load()  # which turns a TIFF
    if (turn := UPRIGHT.get(_orientation(image))) is not None:
        image = image.transpose(turn)  # the pixels alone: ImageOps.exif_transpose also writes the tags, odd ones too
    if image.mode in DEEP_GREY:  # PIL's own conversion would clip it to white
        image = Image.fromarray(to_8_bits(np.asarray(image, np.float32), image.mode, is_tiff))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")  # transparent pixels become white, as on a web page
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def to_8_bits(grey: np.ndarray, mode: str, is_tiff: bool) -> np.ndarray:
    """Deep grey values (H, W) float32 of one of Pillow's modes -> (H, W) uint8.

    16 bits are scaled by 65535, in a TIFF of 12 bits by 4095. 32-bit integers and floats, which only TIFFs have, know
    no white: they are scaled from their least to their greatest value, floats within 0..1 by 1.
    """
    finite = grey[np.isfinite(grey)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif mode not in ("I", "F") or (mode == "I" and not is_tiff):  # a PNG of 16 bits has mode I in older Pillow
        low, high = 0.0, 4095.0 if is_tiff and high <= 4095 else 65535.0
    scaled = (grey - low) / ((high - low or 1) / 255)
    return np.nan_to_num(scaled, nan=0).clip(0, 255).astype(np.uint8)


class PhotoBatch(NamedTuple):
    """The photos of a batch that can be read."""

    indices: list[int]  # of the photos, into the list of paths
    photos: Tensor  # (B, 3, S, S) uint8, in channels-last memory; of `ReadViews` (B V, 3, S, S)
    failures: list[str]  # one message per photo that cannot be read

    def pin_memory(self) -> PhotoBatch:
        """Copy the photos to page-locked memory, from which a GPU copies asynchronously. DataLoader calls it."""
        return self._replace(photos=pin(self.photos))


def read_photos(
    paths: Sequence[Path | str],
    indices: IndexBatch,
    transform: Transform,
    augment: Callable[[np.ndarray, int], np.ndarray] | None = None,
) -> PhotoBatch:
    """Decode and resize paths[i] for each i of `indices`, skipping photos that cannot be read.

    augment(photo, i), if given, replaces photo i, (H, W, 3) uint8, before it is resized.
    """
    return _read_views(
        paths, indices, transform, lambda photo, i: [augment(np.asarray(photo), i) if augment else photo]
    )


@dataclass(frozen=True)
class ReadViews:
    """Like `read_photos`, with V views of each photo, which is decoded once.

    The photos of the batch are (B V, 3, S, S): the views of a photo are adjacent.
    """

    views: Sequence[View]
    ids: Sequence[str]  # of the photos, in the order of the paths: crops depend on them

    def __call__(self, paths: Sequence[Path | str], indices: IndexBatch, transform: Transform) -> PhotoBatch:
        """paths[i] for each i of `indices`."""
        return _read_views(
            paths, indices, transform, lambda photo, i: [view(photo, self.ids[i]) for view in self.views]
        )


def _read_views(
    paths: Sequence[Path | str],
    indices: IndexBatch,
    transform: Transform,
    views_of: Callable[[Any, int], list[DecodedPhoto]],
) -> PhotoBatch:
    """Decode paths[i] for each i of `indices`, and resize all of views_of(photo, i)."""
    readable: list[int] = []
    photos: list[Tensor] = []
    failures: list[str] = []
    for index in indices:
        try:
            photo = transform.open(paths[index])
            photos += [transform.resize(view) for view in views_of(photo, index)]
            readable.append(int(index))
        except PhotoError as error:
            failures.append(str(error))
    return PhotoBatch(readable, stack_photos(photos, transform.image_size), failures)


def stack_photos(photos: Sequence[Tensor], size: int) -> Tensor:
    """Photos (3, S, S) uint8, from `Transform.resize` -> (B, 3, S, S) uint8, in channels-last memory."""
    if not photos:
        return torch.empty(0, 3, size, size, dtype=torch.uint8)
    return torch.stack([photo.permute(1, 2, 0) for photo in photos]).permute(0, 3, 1, 2)


class _PhotoFiles(Dataset):
    """Maps a list of indices to read(paths, indices, transform)."""

    def __init__(self, read: Callable, paths: Sequence[Path | str], transform: Transform):
        self.read = read
        self.paths = paths
        self.transform = transform

    def __getitem__(self, indices: IndexBatch) -> Any:
        return self.read(self.paths, indices, self.transform)


def photo_batches(
    paths: Sequence[Path | str], batches: Iterable[IndexBatch], transform: Transform, workers: int
) -> Iterable[PhotoBatch]:
    """Read each batch of photo indices in order, in `workers` processes (0: in this process)."""
    return make_loader(read_photos, paths, batches, transform, workers)


def make_loader(
    read: Callable,
    paths: Sequence[Path | str],
    batches: Iterable[IndexBatch],
    transform: Transform,
    workers: int,
    pin: bool = False,
) -> Iterable:
    """Like `photo_batches`, but yields read(paths, indices, transform). pin: return tensors in pinned memory."""
    return SafeLoader(_PhotoFiles(read, paths, transform), batches, workers, pin)


def split_batches(indices: Indices, size: int) -> list[Indices]:
    """Split a sequence into consecutive batches of `size`; the last one may be smaller."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


class FailureLimit:
    """Collects the photos that cannot be read, and raises once there are too many."""

    def __init__(self, total: int, allowed: float):
        """total: number of photos; allowed: the largest fraction of them that may fail."""
        self.total = total
        self.allowed = allowed
        self.reasons: dict[str, None] = {}  # an ordered set: a photo that fails in every epoch counts once

    def add(self, failures: Sequence[str]) -> None:
        """Record failures. Raises PhotoError if more than the allowed fraction of the photos has failed."""
        self.collect(failures)
        self.check()

    def collect(self, failures: Sequence[str]) -> None:
        """Record failures, of any number, until `check`."""
        self.reasons.update(dict.fromkeys(failures))

    def check(self) -> None:
        """Raise PhotoError if more than the allowed fraction of the photos has failed."""
        if len(self.reasons) > self.allowed * self.total:
            raise PhotoError(
                f"{next(iter(self.reasons))}; {len(self.reasons)} of {self.total} photos cannot be read, more than "
                f"--allow-missing {self.allowed}: repair them, or raise the limit"
            )
