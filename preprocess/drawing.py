"""A scene invented by chance, and its photo: shapes with smooth edges, light from above and soft shadows.

Positions are whole pixels, so that a shape is painted once (`_stamp`) and pasted ever after.
"""

from __future__ import annotations

import functools
import hashlib
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 128  # pixels a side
SUPERSAMPLING = 8  # shapes are drawn this many times larger, then shrunk: smooth edges
SIDES = {"big": 54, "small": 36}  # pixels of a shape's box; the big one first
GAP = 6  # pixels between boxes, and from a box to the border

COLOURS = {
    "red": (226, 59, 62), "yellow": (255, 205, 50), "green": (38, 168, 92),
    "blue": (44, 103, 222), "purple": (146, 74, 200), "white": (250, 248, 242),
}  # fmt: skip
CORNERS = {  # in the box from -1 to 1, y downwards
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "triangle": ((0, -0.95), (1, 0.95), (-1, 0.95)),
    "star": tuple((r * np.sin(np.pi * k / 5), 0.1 - r * np.cos(np.pi * k / 5)) for k, r in enumerate((1.05, 0.5) * 5)),
}
SHAPES = ("circle", *CORNERS)
SHADOW = (20, 24, 40)  # colour
CLEAR = 1.6  # a caption states a relation where one distance is this many times the other
RELATIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}  # where the first lies, (x, y)

Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of the photo's width and height


@dataclass(frozen=True)
class Background:
    top: tuple[int, int, int]  # colour, and it changes down to
    bottom: tuple[int, int, int]
    texture: tuple[int, int]  # rows and columns of smooth noise
    strength: int  # of that noise
    specks: int  # bright ones
    hides: str  # the colour that would be hard to see on it


BACKGROUNDS = {
    "grass": Background((190, 224, 130), (116, 180, 84), (14, 64), 13, 0, hides="green"),
    "sky": Background((84, 162, 230), (160, 208, 242), (5, 4), 12, 0, hides="blue"),
    "sand": Background((246, 226, 180), (226, 190, 134), (26, 5), 8, 60, hides="yellow"),
    "night": Background((14, 18, 48), (52, 48, 98), (4, 4), 9, 70, hides="purple"),
}


@dataclass(frozen=True)
class SceneObject:
    shape: str
    colour: str
    size: str
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[SceneObject, ...]


def random_scene(split: str, rng: random.Random) -> Scene:
    """Scenes at random until one belongs to this split."""
    count = rng.choice((1, 2))
    while True:
        background = rng.choice(list(BACKGROUNDS))
        things = _place(count, BACKGROUNDS[background].hides, rng)
        if things and _may_be_in(split, scene := Scene(background, things)):
            return scene


def _place(count: int, hidden: str, rng: random.Random) -> tuple[SceneObject, ...] | None:
    """One thing, or a big one and a small one that differ in colour, keep apart and have a clear relation; or None.

    The big one is named first: where the order of two were chance, no decoder could know whose colour comes next.
    """
    sizes = [rng.choice(list(SIDES))] if count == 1 else SIDES
    things = tuple(_thing(size, hidden, rng) for size in sizes)
    if count == 1:
        return things
    big, small = things
    fits = big.colour != small.colour and _apart(big.box, small.box) and clear_relation(big, small)
    return things if fits else None


def _thing(size: str, hidden: str, rng: random.Random) -> SceneObject:
    left, top = (rng.randint(GAP, SIZE - GAP - SIDES[size]) for _ in range(2))
    box = tuple(edge / SIZE for edge in (left, top, left + SIDES[size], top + SIDES[size]))
    colour = rng.choice([colour for colour in COLOURS if colour != hidden])
    return SceneObject(rng.choice(SHAPES), colour, size, box)


def _apart(one: Box, other: Box) -> bool:
    return max(other[0] - one[2], one[0] - other[2], other[1] - one[3], one[1] - other[3]) >= GAP / SIZE


def _may_be_in(split: str, scene: Scene) -> bool:
    """Of the combinations of two things a tenth is val's, a tenth test's, wherever they lie; one thing is anyone's."""
    if len(scene.things) == 1:
        return True
    combination = scene.background, sorted((thing.shape, thing.colour, thing.size) for thing in scene.things)
    tenth = int(hashlib.sha256(repr(combination).encode()).hexdigest(), 16) % 10
    return {0: "val", 1: "test"}.get(tenth, "train") == split


def holds(relation: str, first: SceneObject, second: SceneObject, clear: float = 1) -> bool:
    """Whether `first` lies there, seen from `second`: more than it lies to any side, `clear` times more."""
    x, y = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    to_x, to_y = RELATIONS[relation]
    forward, sideways = x * to_x + y * to_y, abs(x * to_y) + abs(y * to_x)
    return forward >= clear * sideways  # things keep apart: never are both zero


def clear_relation(first: SceneObject, second: SceneObject) -> str | None:
    return next((relation for relation in RELATIONS if holds(relation, first, second, CLEAR)), None)


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as an RGB photo of SIZE x SIZE pixels, with a texture by chance."""
    photo = _background(BACKGROUNDS[scene.background], np.random.default_rng(rng.getrandbits(64)))
    for thing in scene.things:
        left, top = (round(SIZE * value) - GAP for value in thing.box[:2])
        paint, shadow = _stamp(thing.shape, thing.colour, thing.size)
        photo.paste(SHADOW, (left, top, left + shadow.width, top + shadow.height), shadow)
        photo.paste(paint, (left, top), paint)
    return photo


def _background(background: Background, rng: np.random.Generator) -> Image.Image:
    noise = Image.fromarray(rng.standard_normal(background.texture).astype(np.float32))
    noise = np.asarray(noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC))[:, :, None]
    down = np.linspace(0, 1, SIZE)[:, None, None]
    pixels = (1 - down) * background.top + down * background.bottom + background.strength * noise
    rows, columns = rng.integers(0, SIZE, (2, background.specks))
    pixels[rows, columns] += rng.uniform(20, 150, (background.specks, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@functools.cache
def _stamp(shape: str, colour: str, size: str) -> tuple[Image.Image, Image.Image]:
    """A shape lit from above (RGBA), and its shadow (L), both with GAP pixels around its box."""
    full = SIDES[size] + 2 * GAP
    mask = _outline(shape, SIDES[size]).resize((full, full), Image.Resampling.LANCZOS)
    light = np.linspace(1.12, 0.86, full)[:, None, None] * np.full((full, full, 3), COLOURS[colour])
    paint = Image.fromarray(light.clip(0, 255).astype(np.uint8))
    paint.putalpha(mask)
    shadow = Image.new("L", (full, full))
    shadow.paste(mask.point(lambda value: value * 0.55), (1, 2))
    return paint, shadow.filter(ImageFilter.GaussianBlur(2))


def _outline(shape: str, side: int) -> Image.Image:
    """The shape in white on black, SHARPER times larger, with GAP around it."""
    full, first, last = (pixels * SUPERSAMPLING for pixels in (side + 2 * GAP, GAP, GAP + side))
    mask = Image.new("L", (full, full))
    pencil = ImageDraw.Draw(mask)
    if shape == "circle":
        pencil.ellipse((first, first, last - 1, last - 1), fill=255)
    else:
        middle, radius = full / 2, (last - first) / 2
        pencil.polygon([(middle + radius * x, middle + radius * y) for x, y in CORNERS[shape]], fill=255)
    # Blurring and cutting at one half rounds the corners, outer and inner ones alike.
    return mask.filter(ImageFilter.GaussianBlur(1.2 * SUPERSAMPLING)).point(lambda value: 255 * (value > 127))
