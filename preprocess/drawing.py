"""Random scenes and their photos: shapes with smooth edges, lit from above, with soft shadows.

Positions are whole pixels, so that each shape is rendered once (`_render_shape`) and then pasted.
"""

from __future__ import annotations

import functools
import hashlib
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 128  # pixels per side
SUPERSAMPLING = 8  # shapes are rendered this many times larger and scaled down, for smooth edges
SIDES = {"big": 54, "small": 36}  # pixels of a shape's box; in the order in which captions name two objects
GAP = 6  # pixels between boxes, and from a box to the border

COLOURS = {
    "red": (226, 59, 62), "yellow": (255, 205, 50), "green": (38, 168, 92),
    "blue": (44, 103, 222), "purple": (146, 74, 200), "white": (250, 248, 242),
}  # fmt: skip
CORNERS = {  # (x, y) from -1 to 1 in the shape's box, y downwards
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "triangle": ((0, -0.95), (1, 0.95), (-1, 0.95)),
    "star": tuple((r * np.sin(np.pi * k / 5), 0.1 - r * np.cos(np.pi * k / 5)) for k, r in enumerate((1.05, 0.5) * 5)),
}
SHAPES = ("circle", *CORNERS)
SHADOW = (20, 24, 40)  # colour
CLEAR_RATIO = 1.6  # captions state a relation only if one of the two distances is this many times the other
# relation -> direction (x, y) from the second object to the first
RELATIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}

Box = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of the photo's width and height


@dataclass(frozen=True)
class Background:
    """The colours and the noise behind the shapes."""

    top: tuple[int, int, int]  # RGB at the upper edge; it changes linearly to `bottom`
    bottom: tuple[int, int, int]  # RGB at the lower edge
    noise_shape: tuple[int, int]  # rows and columns of the noise, before it is interpolated to the size of the photo
    noise_strength: int  # standard deviation of the noise
    bright_pixels: int  # single pixels that are brighter, such as stars
    similar_colour: str  # the colour that would be hard to see on this background; its objects have others


BACKGROUNDS = {
    "grass": Background((190, 224, 130), (116, 180, 84), (14, 64), 13, 0, similar_colour="green"),
    "sky": Background((84, 162, 230), (160, 208, 242), (5, 4), 12, 0, similar_colour="blue"),
    "sand": Background((246, 226, 180), (226, 190, 134), (26, 5), 8, 60, similar_colour="yellow"),
    "night": Background((14, 18, 48), (52, 48, 98), (4, 4), 9, 70, similar_colour="purple"),
}


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene. shape: of SHAPES; colour: of COLOURS; size: big or small."""

    shape: str
    colour: str
    size: str
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """The centre of the box (x, y)."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """background: of BACKGROUNDS. Of two objects, the big one comes first."""

    background: str
    objects: tuple[SceneObject, ...]


def random_scene(split: str, rng: random.Random) -> Scene:
    """A random scene of this split: scenes are generated until one belongs to it."""
    count = rng.choice((1, 2))
    while True:
        background = rng.choice(list(BACKGROUNDS))
        objects = _random_objects(count, BACKGROUNDS[background].similar_colour, rng)
        if objects is None:
            continue
        scene = Scene(background, objects)
        if _belongs_to_split(scene, split):
            return scene


def _random_objects(count: int, avoided_colour: str, rng: random.Random) -> tuple[SceneObject, ...] | None:
    """One object, or two: a big and a small one of different colours, apart and in a clear relation, or else None.

    The big one is first: if the order were random, no decoder could predict which colour a caption names first.
    """
    if count == 1:
        return (_random_object(rng.choice(list(SIDES)), avoided_colour, rng),)
    big, small = (_random_object(size, avoided_colour, rng) for size in SIDES)
    if big.colour == small.colour or not _are_apart(big.box, small.box) or clear_relation(big, small) is None:
        return None
    return big, small


def _random_object(size: str, avoided_colour: str, rng: random.Random) -> SceneObject:
    side = SIDES[size]
    left = rng.randint(GAP, SIZE - GAP - side)
    top = rng.randint(GAP, SIZE - GAP - side)
    box = (left / SIZE, top / SIZE, (left + side) / SIZE, (top + side) / SIZE)
    colour = rng.choice([colour for colour in COLOURS if colour != avoided_colour])
    return SceneObject(rng.choice(SHAPES), colour, size, box)


def _are_apart(one: Box, other: Box) -> bool:
    distance = max(other[0] - one[2], one[0] - other[2], other[1] - one[3], one[1] - other[3])
    return distance >= GAP / SIZE


def _belongs_to_split(scene: Scene, split: str) -> bool:
    """Whether this split may contain the scene.

    A scene of one object belongs to every split. A combination of a background and two objects, wherever they are,
    belongs to one: a tenth of the combinations to val, a tenth to test, by hash.
    """
    if len(scene.objects) == 1:
        return True
    attributes = sorted((object.shape, object.colour, object.size) for object in scene.objects)
    digest = hashlib.sha256(repr((scene.background, attributes)).encode()).hexdigest()
    return {0: "val", 1: "test"}.get(int(digest, 16) % 10, "train") == split


def relation_holds(relation: str, first: SceneObject, second: SceneObject, ratio: float = 1) -> bool:
    """Whether this relation holds from the first object to the second.

    Its distance in the direction must be at least `ratio` times its distance across. Objects do not overlap, so the two
    distances are never both zero.
    """
    x, y = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    direction_x, direction_y = RELATIONS[relation]
    along = x * direction_x + y * direction_y
    across = abs(x * direction_y) + abs(y * direction_x)
    return along >= ratio * across


def clear_relation(first: SceneObject, second: SceneObject) -> str | None:
    """The relation of the first object to the second, if one distance is CLEAR_RATIO times the other; else None."""
    return next((relation for relation in RELATIONS if relation_holds(relation, first, second, CLEAR_RATIO)), None)


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as an RGB photo of SIZE x SIZE pixels, with random background noise."""
    photo = _render_background(BACKGROUNDS[scene.background], np.random.default_rng(rng.getrandbits(64)))
    for object in scene.objects:
        left, top = (round(SIZE * value) - GAP for value in object.box[:2])
        paint, shadow = _render_shape(object.shape, object.colour, object.size)
        photo.paste(SHADOW, (left, top, left + shadow.width, top + shadow.height), shadow)
        photo.paste(paint, (left, top), paint)
    return photo


def _render_background(background: Background, rng: np.random.Generator) -> Image.Image:
    coarse = Image.fromarray(rng.standard_normal(background.noise_shape).astype(np.float32))
    noise = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC))[:, :, None]
    depth = np.linspace(0, 1, SIZE)[:, None, None]  # 0 at the upper edge, 1 at the lower
    pixels = (1 - depth) * background.top + depth * background.bottom + background.noise_strength * noise
    rows, columns = rng.integers(0, SIZE, (2, background.bright_pixels))
    pixels[rows, columns] += rng.uniform(20, 150, (background.bright_pixels, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@functools.cache
def _render_shape(shape: str, colour: str, size: str) -> tuple[Image.Image, Image.Image]:
    """A shape lit from above (RGBA) and its shadow (L), both with GAP pixels around the shape's box."""
    side = SIDES[size] + 2 * GAP
    mask = _draw_outline(shape, SIDES[size]).resize((side, side), Image.Resampling.LANCZOS)
    light = np.linspace(1.12, 0.86, side)[:, None, None] * np.full((side, side, 3), COLOURS[colour])
    paint = Image.fromarray(light.clip(0, 255).astype(np.uint8))
    paint.putalpha(mask)
    shadow = Image.new("L", (side, side))
    shadow.paste(mask.point(lambda value: value * 0.55), (1, 2))
    return paint, shadow.filter(ImageFilter.GaussianBlur(2))


def _draw_outline(shape: str, side: int) -> Image.Image:
    """The shape in white on black (L), SUPERSAMPLING times enlarged, with GAP around its box."""
    first = GAP * SUPERSAMPLING
    last = (GAP + side) * SUPERSAMPLING
    full = (side + 2 * GAP) * SUPERSAMPLING
    mask = Image.new("L", (full, full))
    canvas = ImageDraw.Draw(mask)
    if shape == "circle":
        canvas.ellipse((first, first, last - 1, last - 1), fill=255)
    else:
        centre = full / 2
        radius = (last - first) / 2
        canvas.polygon([(centre + radius * x, centre + radius * y) for x, y in CORNERS[shape]], fill=255)
    # Blurring and thresholding at one half rounds convex and concave corners alike.
    return mask.filter(ImageFilter.GaussianBlur(1.2 * SUPERSAMPLING)).point(lambda value: 255 * (value > 127))
