"""Random scenes and their photos: shapes with smooth edges, lit from above, with soft shadows.

Positions are whole pixels, so that each shape is rendered once (`_render_shape`) and then pasted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 128  # pixels per side
SUPERSAMPLING = 8  # shapes are rendered this many times larger and scaled down, for smooth edges
SIDES = {"big": 54, "small": 36}  # pixels of a shape's box; in the order in which captions name two objects
TIGHT_SIDES = {"big": 54, "small": 32}  # the same where three or four must fit
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
# Colours and shapes that train and val of a set that holds them out never show together; test scenes do, of this share.
NEW_COMBINATIONS = frozenset({("red", "star"), ("blue", "circle"), ("white", "triangle"), ("purple", "square")})
NEW_SHARE = 0.25
CLEAR_RATIO = 1.6  # captions state a relation if one of the two distances is this many times the other
UNCLEAR_RATIO = 1.25  # and never if it is less than this many times; no scene is between the two
# relation -> direction (x, y) from the second object to the first
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
BETWEEN = "between"  # the relation of an object to two others
RELATIONS = (*DIRECTIONS, BETWEEN)
BETWEEN_ANGLE = 120  # degrees between the directions to the two others, at least
ROW_SHIFT = 10  # pixels across a row by which the shapes in it may differ; the angle is then at least 150 degrees

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
    def combination(self) -> tuple[str, str]:
        """Colour and shape."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """background: of BACKGROUNDS. The objects are in the order of `Layout`."""

    background: str
    objects: tuple[SceneObject, ...]

    @property
    def combinations(self) -> frozenset[tuple[str, str]]:
        """The colour and the shape of each object."""
        return frozenset(object.combination for object in self.objects)

    @property
    def is_group(self) -> bool:
        """Whether it shows several objects that are all alike."""
        return len(self.objects) > 1 and len({(*object.combination, object.size) for object in self.objects}) == 1


@dataclass(frozen=True)
class Layout:
    """How many objects a scene has, and where.

    Captions name the objects in this order; if it were random, no decoder could predict which colour comes first.
    """

    sizes: tuple[tuple[str, ...], ...]  # of the objects; one of these is chosen
    place: Callable[[Sequence[int], random.Random], Iterator[Box]]  # boxes of these sides in pixels, one by one
    fits: Callable[[Sequence[Box]], bool] = lambda boxes: True
    alike: bool = False  # all objects have one colour and one shape; else their colours differ


@dataclass(frozen=True)
class SceneSet:
    """What scenes a data set has."""

    layouts: tuple[Layout, ...]  # each is equally likely; some are listed several times
    sides: dict[str, int]  # pixels of a shape's box
    holds_out: bool  # NEW_COMBINATIONS from train and val


def random_scene(split: str, rng: random.Random, scene_set: str = "simple") -> Scene:
    """A random scene of this split: scenes are generated until one belongs to it. scene_set: of SCENE_SETS.

    Whoever changes the draws changes the scenes that users have drawn and the figures that pages state of them.
    """
    chosen = SCENE_SETS[scene_set]
    layout = rng.choice(chosen.layouts)
    is_new = chosen.holds_out and split == "test" and rng.random() < NEW_SHARE
    while True:
        background = rng.choice(list(BACKGROUNDS))
        objects = _random_objects(layout, chosen.sides, BACKGROUNDS[background].similar_colour, rng)
        if objects is None:
            continue
        scene = Scene(background, objects)
        allowed = not chosen.holds_out or bool(scene.combinations & NEW_COMBINATIONS) == is_new
        if allowed and _belongs_to_split(scene, split):
            return scene


def _random_objects(
    layout: Layout, sides: Mapping[str, int], avoided_colour: str, rng: random.Random
) -> tuple[SceneObject, ...] | None:
    """Objects that are apart and fit the layout, or else None."""
    sizes = rng.choice(layout.sizes) if len(layout.sizes) > 1 else layout.sizes[0]
    places = layout.place([sides[size] for size in sizes], rng)
    objects = [_random_object(size, box, avoided_colour, rng) for size, box in zip(sizes, places, strict=True)]
    if layout.alike:
        objects = [dataclasses.replace(objects[0], box=object.box) for object in objects]
    elif len({object.colour for object in objects}) < len(objects):
        return None
    boxes = [object.box for object in objects]
    apart = all(_are_apart(one, other) for one, other in itertools.combinations(boxes, 2))
    return tuple(objects) if apart and layout.fits(boxes) else None


def _random_object(size: str, box: Box, avoided_colour: str, rng: random.Random) -> SceneObject:
    colour = rng.choice([colour for colour in COLOURS if colour != avoided_colour])
    return SceneObject(rng.choice(SHAPES), colour, size, box)


def _anywhere(sides: Sequence[int], rng: random.Random) -> Iterator[Box]:
    for side in sides:
        left = rng.randint(GAP, SIZE - GAP - side)
        yield _box(left, rng.randint(GAP, SIZE - GAP - side), side)


def _in_a_row(sides: Sequence[int], rng: random.Random) -> Iterator[Box]:
    """Three boxes of one side: the one in the middle, the left or upper one, and the last one."""
    side = sides[0]
    room = SIZE - 2 * GAP - side
    step = rng.randint(side + GAP, room // 2)
    first = GAP + rng.randint(0, room - 2 * step)
    edge = GAP + rng.randint(0, room - ROW_SHIFT)
    is_horizontal = rng.random() < 0.5
    for number in (1, 0, 2):
        along, across = first + number * step, edge + rng.randint(0, ROW_SHIFT)
        yield _box(along, across, side) if is_horizontal else _box(across, along, side)


def _box(left: int, top: int, side: int) -> Box:
    """Of pixels."""
    return (left / SIZE, top / SIZE, (left + side) / SIZE, (top + side) / SIZE)


def _are_apart(one: Box, other: Box) -> bool:
    distance = max(other[0] - one[2], one[0] - other[2], other[1] - one[3], one[1] - other[3])
    return distance >= GAP / SIZE


def _belongs_to_split(scene: Scene, split: str) -> bool:
    """Whether this split may contain the scene.

    A scene of one object belongs to every split. A combination of a background and several objects, wherever they are,
    belongs to one: a tenth of the combinations to val, a tenth to test, by hash.
    """
    if len(scene.objects) == 1:
        return True
    attributes = sorted((object.shape, object.colour, object.size) for object in scene.objects)
    digest = hashlib.sha256(repr((scene.background, attributes)).encode()).hexdigest()
    return {0: "val", 1: "test"}.get(int(digest, 16) % 10, "train") == split


def relation_holds(relation: str, first: Box, *others: Box) -> bool:
    """Whether this relation holds from the first box to the other, or for `between` to the two others."""
    if (relation == BETWEEN) != (len(others) == 2):
        return False
    return _is_between(first, others) if relation == BETWEEN else _points(relation, first, others[0])


def clear_relation(first: Box, second: Box, ratio: float = CLEAR_RATIO) -> str | None:
    """The direction of the first box from the second, if one distance is `ratio` times the other; else None."""
    return next((relation for relation in DIRECTIONS if _points(relation, first, second, ratio)), None)


def _points(relation: str, first: Box, second: Box, ratio: float = 1) -> bool:
    """Whether the distance of the centres in this direction is at least `ratio` times the distance across.

    Objects do not overlap, so the two distances are never both zero.
    """
    x, y = _difference(first, second)
    direction_x, direction_y = DIRECTIONS[relation]
    along = x * direction_x + y * direction_y
    across = abs(x * direction_y) + abs(y * direction_x)
    return along >= ratio * across


def _is_between(box: Box, others: Sequence[Box]) -> bool:
    """Whether the directions from the box to the two others are at least BETWEEN_ANGLE degrees apart."""
    (x, y), (other_x, other_y) = (_difference(other, box) for other in others)
    return math.degrees(abs(math.atan2(x * other_y - y * other_x, x * other_x + y * other_y))) >= BETWEEN_ANGLE


def _difference(box: Box, other: Box) -> tuple[float, float]:
    """From the centre of the other box to that of this one (x, y)."""
    return (box[0] + box[2] - other[0] - other[2]) / 2, (box[1] + box[3] - other[1] - other[3]) / 2


def _are_clearly_related(boxes: Sequence[Box]) -> bool:
    return clear_relation(*boxes) is not None


def _are_diagonal(boxes: Sequence[Box]) -> bool:
    return clear_relation(*boxes, UNCLEAR_RATIO) is None


ONE = Layout((("big",), ("small",)), _anywhere)
RELATED = Layout((("big", "small"),), _anywhere, _are_clearly_related)
DIAGONAL = Layout((("big", "small"),), _anywhere, _are_diagonal)
ROW = Layout((("small",) * 3,), _in_a_row)
# One for each number, so that four, which rarely are apart, are as frequent as two.
ALIKE = tuple(Layout((("small",) * number,), _anywhere, alike=True) for number in (2, 3, 4))
SCENE_SETS = {
    "simple": SceneSet((ONE, RELATED), SIDES, holds_out=False),
    "relations": SceneSet(
        (ONE,) * 15 + (RELATED,) * 15 + (DIAGONAL,) * 9 + (ROW,) * 9 + ALIKE * 4, TIGHT_SIDES, holds_out=True
    ),
}


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as an RGB photo of SIZE x SIZE pixels, with random background noise."""
    photo = _render_background(BACKGROUNDS[scene.background], np.random.default_rng(rng.getrandbits(64)))
    for object in scene.objects:
        left, top, right, _ = (round(SIZE * value) for value in object.box)
        paint, shadow = _render_shape(object.shape, object.colour, right - left)
        left, top = left - GAP, top - GAP
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
def _render_shape(shape: str, colour: str, box_side: int) -> tuple[Image.Image, Image.Image]:
    """A shape lit from above (RGBA) and its shadow (L), both with GAP pixels around the shape's box."""
    side = box_side + 2 * GAP
    mask = _draw_outline(shape, box_side).resize((side, side), Image.Resampling.LANCZOS)
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
