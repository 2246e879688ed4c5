"""Drawn scenes with captions in Chinese and English: a data set without a download, whose captions can be verified.

A scene is one or two shapes on a background. Its captions are generated from templates. `parse` reads a caption with
the same templates, so that `is_true` can decide whether the caption is true of a scene. A decoder can thus be measured
by the fraction of its captions that are true, and its attention by how often it is on the object that a noun names.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from captioning.errors import UserError
from captioning.runtime.files import atomic_text, write_errors
from captioning.runtime.progress import tqdm
from preprocess.annotations import Record
from preprocess.drawing import (
    COLOURS,
    SHAPES,
    Box,
    Scene,
    SceneObject,
    clear_relation,
    draw,
    random_scene,
    relation_holds,
)

# language -> kind of fact -> value -> the words for it. Captions are generated and parsed with the same tables.
WORDS = {
    "zh": {
        "shape": {"circle": ("圆形",), "square": ("正方形",), "triangle": ("三角形",), "star": ("星星",)},
        "article": {"circle": ("一个",), "square": ("一个",), "triangle": ("一个",), "star": ("一颗",)},
        "colour": {
            "red": ("红色",), "yellow": ("黄色",), "green": ("绿色",),
            "blue": ("蓝色",), "purple": ("紫色",), "white": ("白色",),
        },
        "size": {"big": ("大",), "small": ("小",)},
        "background": {"grass": ("草地上",), "sky": ("天空里",), "sand": ("沙滩上",), "night": ("夜空里",)},
        "relation": {"left": ("左边",), "right": ("右边",), "above": ("上面",), "below": ("下面",)},
        "count": {"1": ("一",), "2": ("两",)},
    },
    "en": {
        "shape": {"circle": ("circle",), "square": ("square",), "triangle": ("triangle",), "star": ("star",)},
        "article": dict.fromkeys(SHAPES, ("a",)),
        "colour": {colour: (colour,) for colour in COLOURS},
        "size": {"big": ("big",), "small": ("small",)},
        "background": {
            "grass": ("on the grass",), "sky": ("in the sky",),
            "sand": ("on the sand",), "night": ("in the night sky",),
        },
        "relation": {
            "left": ("to the left of",), "right": ("to the right of",), "above": ("above",), "below": ("below",),
        },
        "count": {"1": ("one",), "2": ("two",)},
    },
}  # fmt: skip
# The templates of a noun phrase. Two properties help soft attention, whose query depends on the previous words, to
# learn the shapes, which are the hardest words. Another word separates colour and noun, so that the query
# contains the colour when attention must find the shape. And some phrases have no colour, so that the noun also follows
# the article directly.
PHRASES = {
    "zh": ("{article}{colour}的{size}{shape}",) * 2 + ("{article}{shape}",),
    "en": ("{article} {colour}, {size} {shape}",) * 2 + ("{article} {shape}",),
}
SENTENCES = {  # {a} and {b} are noun phrases, {relation} is that of {a} to {b}
    "zh": (
        "{background}有{a}", "{a}在{background}",
        "{background}有{a}和{b}", "{background}有{count}个图形，{a}和{b}",
        "{background}，{a}在{b}的{relation}", "{background}，{b}的{relation}有{a}",
    ),
    "en": (
        "{a} {background}", "there is {a} {background}",
        "{a} and {b} {background}", "{count} shapes {background}, {a} and {b}",
        "{a} {relation} {b} {background}", "{background}, {a} is {relation} {b}",
    ),
}  # fmt: skip
OBJECT_SLOTS = ("a", "b")  # slots for noun phrases
SPACE = {"zh": "", "en": " "}  # between words


@dataclass(frozen=True)
class Mention:
    """An object as a caption describes it; None for what it does not state. position: where its noun begins."""

    shape: str
    colour: str | None
    size: str | None
    position: int

    def matches(self, object: SceneObject) -> bool:
        """Whether everything that is stated is true of the object."""
        return self.shape == object.shape and self.colour in (None, object.colour) and self.size in (None, object.size)


@dataclass(frozen=True)
class Claim:
    """The statements of a caption; None for what it does not state. relation: of the first mention to the second."""

    mentions: tuple[Mention, ...]
    relation: str | None
    background: str | None
    count: str | None


def draw_scenes(folder: Path, count: int, language: str, seed: int) -> list[Record]:
    """Draw `count` scenes into folder/photos, list them in folder/scenes.json, and return them with captions.

    A tenth each belongs to val and test, the rest to train. Each combination of a background and two objects belongs to
    one split, so that the pairs in val do not occur in train. A scene and the name of its file depend only on (seed,
    split, number): another language, or more scenes, change no photo.

    Raises UserError for fewer than 3 scenes and for files that cannot be written.
    """
    if count < 3:
        raise UserError(f"--scenes {count}: must be 3 or more, one for each split")
    existing = read_scenes(folder) if (folder / "scenes.json").exists() else {}  # of other seeds
    scenes: dict[str, Scene] = {}
    records: list[Record] = []
    for split, number in tqdm(_split_numbers(count), "drawing scenes", unit=" photos"):
        id = f"{split}-{seed}-{number:05}"
        scene = random_scene(split, random.Random(f"{id} scene"))
        path = folder / "photos" / f"{id}.png"
        _save_photo(draw(scene, random.Random(f"{id} texture")), path)
        captions = _make_captions(scene, language, random.Random(f"{id} {language}"))
        scenes[id] = scene
        records.append(Record(str(path), id, split, captions))
    _write_scenes(folder, existing | scenes)
    return records


def _split_numbers(count: int) -> list[tuple[str, int]]:
    """The splits of `count` photos, each photo with its number in its split."""
    held_out = max(1, count // 10)
    sizes = {"train": count - 2 * held_out, "val": held_out, "test": held_out}
    return [(split, number) for split, size in sizes.items() for number in range(size)]


def read_scenes(folder: Path) -> dict[str, Scene]:
    """Photo id -> scene, from folder/scenes.json. Raises UserError if it is missing or malformed."""
    path = folder / "scenes.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {id: _scene_from_dict(scene) for id, scene in data.items()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; draw scenes: python -m preprocess {folder} --scenes 2000") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a list of scenes ({error}); remove it and draw them again") from None


def _scene_from_dict(data: dict) -> Scene:
    objects = tuple(
        SceneObject(object["shape"], object["colour"], object["size"], tuple(object["box"]))
        for object in data["things"]
    )
    return Scene(data["background"], objects)


def _scene_to_dict(scene: Scene) -> dict:
    return {"background": scene.background, "things": [dataclasses.asdict(object) for object in scene.objects]}


def _write_scenes(folder: Path, scenes: dict[str, Scene]) -> None:
    lines = [f"{json.dumps(id)}: {json.dumps(_scene_to_dict(scene))}" for id, scene in scenes.items()]
    with atomic_text(folder / "scenes.json") as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")


def _save_photo(photo: Image.Image, path: Path) -> None:
    """Write a PNG atomically, but without syncing each of thousands of files to the disk."""
    temporary = path.with_suffix(".tmp")
    with write_errors(path, "remove what is there or write elsewhere"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # a leftover, or a symbolic link to anywhere
        with open(temporary, "xb") as file:
            photo.save(file, "png", compress_level=3)  # a third of the time, a tenth larger
        os.replace(temporary, path)


# ---- captions


def _make_captions(scene: Scene, language: str, rng: random.Random) -> tuple[str, ...]:
    """Two different captions."""
    captions: dict[str, None] = {}  # a set that keeps the order
    while len(captions) < 2:
        if caption := _make_caption(scene, language, rng):
            captions[caption] = None
    return tuple(captions)


def _make_caption(scene: Scene, language: str, rng: random.Random) -> str | None:
    """A random sentence that names all objects, the big one first.

    None if the chosen template names another number of objects, or if its noun phrases do not tell them apart.
    """
    template = rng.choice(SENTENCES[language])
    slots = re.findall(r"{(\w+)}", template)
    object_slots = [slot for slot in slots if slot in OBJECT_SLOTS]
    if len(object_slots) != len(scene.objects):
        return None
    objects = dict(zip(object_slots, scene.objects, strict=True))
    facts = {"background": scene.background, "count": str(len(objects))}
    if "relation" in slots:
        relation = clear_relation(objects["a"], objects["b"])
        assert relation is not None  # random_scene ensures it
        facts["relation"] = relation
    words = {slot: _choose_word(slot, facts[slot], language, rng) for slot in slots if slot in facts}
    phrases = {slot: _make_phrase(object, language, rng) for slot, object in objects.items()}
    if len(set(phrases.values())) < len(phrases):
        return None  # "a star is to the left of a star" is true of any two
    return template.format(**words, **phrases)


def _make_phrase(object: SceneObject, language: str, rng: random.Random) -> str:
    facts = {"article": object.shape, "size": object.size, "colour": object.colour, "shape": object.shape}
    words = {kind: _choose_word(kind, value, language, rng) for kind, value in facts.items()}
    return rng.choice(PHRASES[language]).format(**words)


def _choose_word(kind: str, value: str, language: str, rng: random.Random) -> str:
    return rng.choice(WORDS[language][kind][value])


# ---- parsing captions


def parse(caption: str | Sequence[str], language: str) -> Claim | None:
    """The statements of a caption, given as text or as words; None if it matches no template."""
    text = _normalize(caption, language)
    for pattern in _compile_templates(SENTENCES[language], language):
        if match := pattern.fullmatch(text):
            slots = match.groupdict()
            mentions = tuple(
                _parse_phrase(slots[slot], match.start(slot), language) for slot in OBJECT_SLOTS if slot in slots
            )
            facts = {kind: _parse_word(kind, slots.get(kind), language) for kind in ("relation", "background", "count")}
            return Claim(mentions, **facts)
    return None


def is_true(caption: str | Sequence[str], scene: Scene, language: str) -> bool:
    """Whether a caption, given as text or as words, matches a template and all its statements are true of the scene.

    Different mentions must be different objects of the scene. A caption need not mention every object.
    """
    claim = parse(caption, language)
    if claim is None:
        return False
    if claim.background not in (None, scene.background) or claim.count not in (None, str(len(scene.objects))):
        return False
    choices = itertools.permutations(scene.objects, len(claim.mentions))
    return any(_is_true_of_objects(claim, objects) for objects in choices)


def _is_true_of_objects(claim: Claim, objects: Sequence[SceneObject]) -> bool:
    """Whether the i-th mention describes the i-th object, and the relation holds."""
    if not all(mention.matches(object) for mention, object in zip(claim.mentions, objects, strict=True)):
        return False
    return claim.relation is None or relation_holds(claim.relation, objects[0], objects[1])


def named_objects(words: Sequence[str], scene: Scene, language: str) -> list[tuple[int, list[Box]]]:
    """For each noun that matches an object: the index of its word, and the boxes of all objects that it matches.

    The nouns are in the order of the caption. Empty if the caption matches no template.
    """
    claim = parse(words, language)
    if claim is None:
        return []
    named = []
    for mention in sorted(claim.mentions, key=lambda mention: mention.position):
        boxes = [object.box for object in scene.objects if mention.matches(object)]
        if boxes:
            named.append((_word_at(mention.position, words, language), boxes))
    return named


def _normalize(caption: str | Sequence[str], language: str) -> str:
    """The caption as lower-case text without punctuation, its words joined as in SPACE."""
    text = caption if isinstance(caption, str) else " ".join(caption)
    return re.sub(r"[\W_]+", SPACE[language], text.lower()).strip()


def _word_at(position: int, words: Sequence[str], language: str) -> int:
    """The index of the word that contains the character at `position` of the normalized caption."""
    return next(i for i in range(len(words)) if len(_normalize(words[: i + 1], language)) > position)


def _parse_phrase(phrase: str, start: int, language: str) -> Mention:
    """The object that a noun phrase describes. start: the position of the phrase in the normalized caption."""
    matches = (pattern.fullmatch(phrase) for pattern in _compile_templates(PHRASES[language], language))
    match = next(match for match in matches if match)
    slots = match.groupdict()
    shape, colour, size = (_parse_word(kind, slots.get(kind), language) for kind in ("shape", "colour", "size"))
    assert shape is not None  # every template has a noun
    return Mention(shape, colour, size, start + match.start("shape"))


def _parse_word(kind: str, word: str | None, language: str) -> str | None:
    """The value that a word stands for: the inverse of `_choose_word`."""
    return next((value for value, words in WORDS[language][kind].items() if word in words), None)


@functools.cache
def _compile_templates(templates: tuple[str, ...], language: str) -> list[re.Pattern[str]]:
    """The templates as regular expressions for normalized captions, with a named group for each slot."""
    normalized = [re.sub(r"[^\w{}]+", SPACE[language], template) for template in templates]
    return [
        re.compile(re.sub(r"{(\w+)}", lambda slot: _slot_pattern(slot[1], language), template))
        for template in normalized
    ]


def _slot_pattern(slot: str, language: str) -> str:
    """A regular expression, as a named group, for all that can fill a slot."""
    if slot in OBJECT_SLOTS:
        phrases = _compile_templates(PHRASES[language], language)
        choices = [re.sub(r"\?P<\w+>", "?:", phrase.pattern) for phrase in phrases]
    else:
        choices = list(itertools.chain.from_iterable(WORDS[language][slot].values()))
    return f"(?P<{slot}>{'|'.join(choices)})"
