"""Decoding, and THE transform: the one place where a photo becomes a tensor.

The whole photo is squashed to a square (bilinear, antialiased), RGB in 0..1, then ImageNet's mean and
deviation. Workers hand over bytes (uint8); the normalisation happens on the device, where it is free.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captioning.errors import PhotoError
from captioning.runtime.signals import STOP_SIGNALS

PHOTO_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # whatever the ending; Pillow also runs EPS, in Ghostscript


@dataclass(frozen=True)
class Transform:
    """What is done to a photo. Kept in feature files and checkpoints, and compared on load."""

    image_size: int = 256  # pixels a side
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's, RGB in 0..1
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    scaled_decoding: bool = False  # JPEGs of four times the size or more are decoded at 1/2, 1/4 or 1/8 of it
    nvjpeg: bool = (
        False  # extraction decodes JPEGs on the GPU (captioning/encoders/gpu_decoding.py); all else does as always
    )

    @classmethod
    def from_dict(cls, saved: dict) -> Transform:
        """As to_dict gave it, perhaps through JSON."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})

    def open(self, path: Path | str) -> Image.Image:
        """A photo file as an upright RGB image, for `squash`. Raises PhotoError.

        Scaled decoding leaves out frequencies of a JPEG that squashing would average away. It keeps twice the size of
        the square: cosine similarity of MobileNetV2's maps to those of full decoding 0.9998 in the mean, but 0.996 for
        the worst of 60 photos of COCO (128 px), so it is off unless asked for.
        """
        return open_photo(path, 2 * self.image_size if self.scaled_decoding else None)

    def resize(self, photo: Image.Image) -> Tensor:
        """An RGB photo of any size -> (3, S, S) uint8."""
        size = (self.image_size, self.image_size)
        if photo.size != size:
            photo = photo.resize(size, Image.Resampling.BILINEAR)  # PIL's bilinear is antialiased
        return torch.from_numpy(np.array(photo)).permute(2, 0, 1)

    def normalise(self, photos: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> float32, channels last in memory, on the device it is on."""
        mean, std = (_on_device(values, photos.device) for values in (self.mean, self.std))
        photos = photos.to(torch.float32, memory_format=torch.channels_last)
        return (photos - 255 * mean) / (255 * std)

    def to_dict(self) -> dict:
        return asdict(self)


@lru_cache
def _on_device(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """(3, 1, 1) float32, kept there: to bring it anew would wait for all that a GPU has still to do."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(3, 1, 1)


@dataclass(frozen=True)
class Augment:
    """Other views of the training photos: a function of seed, epoch and photo, so a resumed run sees the same."""

    flip: bool = False  # mirror every second photo, unless its captions tell left from right
    crop: float = 1.0  # keep at least this share of each side, somewhere in the photo
    seed: int = 0

    def __call__(self, photo: Image.Image, index: int, epoch: int, may_flip: bool) -> Image.Image:
        random = np.random.default_rng([self.seed, epoch, index])
        if self.crop < 1:
            (width, height), (across, down) = photo.size, random.uniform(self.crop, 1, 2)
            left, top = random.uniform(0, (width * (1 - across), height * (1 - down)))
            box = (round(left), round(top), round(left + width * across), round(top + height * down))
            photo = photo.crop((box[0], box[1], max(box[2], box[0] + 1), max(box[3], box[1] + 1)))
        if self.flip and random.random() < 0.5 and may_flip:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return photo


def open_photo(path: Path | str, at_least: int | None = None) -> Image.Image:
    """A photo file as an upright RGB image: grey, CMYK, palette, alpha and 16-bit are converted.

    at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, with so many pixels a side at the least.
    Raises PhotoError as `opened`.
    """
    with open_image(path) as image:
        if at_least:
            image.draft(None, (at_least, at_least))
        return to_rgb(image)


@contextlib.contextmanager
def open_image(path: Path | str) -> Iterator[Image.Image]:
    """A photo file of which only the head has been read.

    Raises PhotoError where the file is missing, truncated, no image, or absurdly large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of damaged EXIF data: the photo itself is sound
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                yield image
    except FileNotFoundError:
        raise PhotoError(f"{path}: no such file") from None
    except Image.UnidentifiedImageError:
        raise PhotoError(f"{path}: not an image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PhotoError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # PIL's readers raise whatever a broken file makes them stumble over
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PhotoError(f"{path}: {reason}".replace("\n", " ")) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as an upright RGB one."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):  # 16-bit grey: PIL would clip it to white
        image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")  # what is transparent looks white, as on a page
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


class PhotoBatch(NamedTuple):
    indices: list[int]  # of the photos that could be read, into the list of paths
    photos: Tensor  # (B, 3, S, S) uint8
    failures: list[str]  # why the others could not


def read_photos(
    paths: Sequence[Path | str],
    indices: Sequence[int],
    transform: Transform,
    view: Callable[[Image.Image, int], Image.Image] | None = None,
) -> PhotoBatch:
    """The photos paths[i] for each i of `indices`, squashed; those that cannot be read are left out.

    view(photo, i), where given, is what is seen of photo i.
    """
    readable, photos, failures = [], [], []
    for index in indices:
        try:
            photo = transform.open(paths[index])
            photos.append(transform.resize(view(photo, index) if view else photo))
            readable.append(int(index))
        except PhotoError as error:
            failures.append(str(error))
    size = transform.image_size
    return PhotoBatch(readable, torch.stack(photos) if photos else torch.empty(0, 3, size, size), failures)


class _PhotoFiles(Dataset):
    """A list of indices -> what `read` makes of these photos."""

    def __init__(self, read: Callable, paths: Sequence[Path | str], transform: Transform):
        self.read, self.paths, self.transform = read, paths, transform

    def __getitem__(self, indices: Sequence[int]) -> Any:
        return self.read(self.paths, indices, self.transform)


def photo_batches(
    paths: Sequence[Path | str], batches: Iterable[Sequence[int]], transform: Transform, workers: int
) -> Iterable[PhotoBatch]:
    """Read the photos of each batch of indices, in order, in `workers` processes (0: in this one)."""
    return make_loader(read_photos, paths, batches, transform, workers)


def make_loader(
    read: Callable,
    paths: Sequence[Path | str],
    batches: Iterable[Sequence[int]],
    transform: Transform,
    workers: int,
    pin: bool = False,
) -> Iterable:
    """As photo_batches, with what `read` makes of a batch. pin: in memory that a GPU can fetch from."""
    return SignalSafeLoader(_PhotoFiles(read, paths, transform), batches, workers, pin)


class SignalSafeLoader(DataLoader):
    """A loader whose processes never hear of a stop: the command itself ends them, without a word."""

    def __init__(self, dataset: Dataset, plan: Iterable, workers: int, pin: bool):
        """plan: the items in their order; pin: into memory that a GPU can fetch from."""
        super().__init__(
            dataset,
            sampler=plan,
            batch_size=None,
            num_workers=workers,
            pin_memory=pin,
            worker_init_fn=quiet_worker,
            generator=torch.Generator(),  # of its own: reading must not move the training's random numbers
        )

    def __iter__(self) -> Iterator:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # so they start with them blocked
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def quiet_worker(_: int) -> None:
    for number in STOP_SIGNALS:  # which reach the whole process group; torch has just set a handler of its own
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if multiprocessing.get_start_method() == "fork" and os.getppid() != multiprocessing.parent_process().pid:
        os._exit(1)  # the command was just killed: torch would take whoever adopted us for it, and wait for ever
    gc.freeze()  # its garbage is not ours to collect: to free its tensors on a GPU would end this process


def in_batches(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[first : first + size] for first in range(0, len(indices), size)]


class FailureLimit:
    """Counts the photos that cannot be read; too many of them stop the work."""

    def __init__(self, total: int, allowed: float):
        self.total, self.allowed = total, allowed
        self.reasons: dict[str, None] = {}  # in order, each once however many epochs meet it

    def add(self, failures: Sequence[str]) -> None:
        """Raises PhotoError once more than the allowed share has failed."""
        self.reasons.update(dict.fromkeys(failures))
        if len(self.reasons) > self.allowed * self.total:
            raise PhotoError(
                f"{next(iter(self.reasons))}; {len(self.reasons)} of {self.total} photos cannot be read, more than "
                f"--allow-missing {self.allowed}: mend them, or allow more"
            )
