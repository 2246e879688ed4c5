"""Views of a photo: the whole photo, its mirror image, and crops of both.

A crop keeps 80 to 100 % of each side. It depends on the photo's id and the number of the crop alone, through SHA-256,
so that it is the same on every machine and with every version of the libraries.

Letters: H x W pixels.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from captioning.errors import UserError

MIN_SIDE = 0.8  # smallest fraction of each side that a crop keeps; another value would need other names of the crops
DecodedPhoto = Image.Image | np.ndarray  # array: (H, W, 3) uint8, upright and RGB


class View(NamedTuple):
    """How a photo is looked at. Its name is whole, flip, crop:N or flip+crop:N."""

    flip: bool = False
    crop: int = 0  # number of the crop, from 1; 0: the whole photo

    @classmethod
    def parse(cls, name: str) -> View:
        """The view of this name. Raises UserError if there is none."""
        found = re.fullmatch(r"whole|(?P<flip>flip)?(?P<plus>\+)?(?:crop:(?P<crop>[1-9]\d{0,5}))?", name)
        if not name or found is None or bool(found["plus"]) != bool(found["flip"] and found["crop"]):
            raise UserError(f"--view {name}: must be whole, flip, crop:N or flip+crop:N, such as crop:1")
        return cls(found["flip"] is not None, int(found["crop"] or 0))

    def __str__(self) -> str:
        parts = ["flip"] * self.flip + [f"crop:{self.crop}"] * bool(self.crop)
        return "+".join(parts) or "whole"

    def file(self, whole: Path) -> Path:
        """The feature file of this view, given that of the whole photos: features.h5 -> features.flip+crop2.h5."""
        suffix = "" if self == WHOLE else f".{self}".replace(":", "")
        return whole.with_name(whole.stem + suffix + whole.suffix)

    def __call__(self, photo: DecodedPhoto, photo_id: str) -> DecodedPhoto:
        """The view of a photo; of an array without a copy."""
        if self.crop:
            pixels = np.asarray(photo)
            left, top, right, bottom = crop_box(pixels.shape[1], pixels.shape[0], photo_id, self.crop)
            photo = pixels[top:bottom, left:right]
        return np.asarray(photo)[:, ::-1] if self.flip else photo


WHOLE = View()


def first_views(number: int) -> tuple[View, ...]:
    """The whole photo, flip, crop:1, flip+crop:2, crop:3, flip+crop:4 and so on: the first `number` of them."""
    return tuple(View(bool(i % 2), max(0, i - 1)) for i in range(number))


def crop_box(width: int, height: int, photo_id: str, number: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a crop, in pixels; the sides and the place are uniform.

    number: 1 or more; another number is another crop.
    """
    digest = hashlib.sha256(f"{number} {photo_id}".encode("utf-8", "surrogatepass")).digest()
    fractions = np.frombuffer(digest, "<u8") / 2**64  # (4,) in 0..1
    sides = MIN_SIDE + (1 - MIN_SIDE) * fractions[:2]
    left, right = _interval(width, sides[0], fractions[2])
    top, bottom = _interval(height, sides[1], fractions[3])
    return left, top, right, bottom


def _interval(pixels: int, side: float, place: float) -> tuple[int, int]:
    """Start and end, in pixels, of a fraction of a side. place: 0 is at its start, 1 at its end."""
    length = max(1, round(pixels * side))
    start = round((pixels - length) * place)
    return start, start + length
