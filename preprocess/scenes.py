"""Drawn scenes with captions in Chinese and English: data that needs no download, whose captions can be judged.

A scene is one or two shapes on a background. Its captions are made from templates, and a caption is read back
through the same templates: `is_true` decides whether what it says holds. So a decoder can be measured by the share
of its captions that are true, and its attention by how often it lies on the shape that a word names.
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
from tqdm import tqdm

from captioning.errors import UserError
from captioning.runtime.files import atomic_text
from preprocess.annotations import Record
from preprocess.drawing import COLOURS, SHAPES, Box, Scene, SceneObject, clear_relation, draw, holds, random_scene

# What each thing is called. Captions and their judge read the same tables.
WORDS = {
    "zh": {
        "shape": {"circle": ("圆形",), "square": ("正方形",), "triangle": ("三角形",), "star": ("星星",)},
        "one": {"circle": ("一个",), "square": ("一个",), "triangle": ("一个",), "star": ("一颗",)},
        "colour": {
            "red": ("红色",), "yellow": ("黄色",), "green": ("绿色",),
            "blue": ("蓝色",), "purple": ("紫色",), "white": ("白色",),
        },
        "size": {"big": ("大",), "small": ("小",)},
        "place": {"grass": ("草地上",), "sky": ("天空里",), "sand": ("沙滩上",), "night": ("夜空里",)},
        "relation": {"left": ("左边",), "right": ("右边",), "above": ("上面",), "below": ("下面",)},
        "count": {"1": ("一",), "2": ("两",)},
    },
    "en": {
        "shape": {"circle": ("circle",), "square": ("square",), "triangle": ("triangle",), "star": ("star",)},
        "one": dict.fromkeys(SHAPES, ("a",)),
        "colour": {colour: (colour,) for colour in COLOURS},
        "size": {"big": ("big",), "small": ("small",)},
        "place": {
            "grass": ("on the grass",), "sky": ("in the sky",),
            "sand": ("on the sand",), "night": ("in the night sky",),
        },
        "relation": {
            "left": ("to the left of",), "right": ("to the right of",), "above": ("above",), "below": ("below",),
        },
        "count": {"1": ("one",), "2": ("two",)},
    },
}  # fmt: skip
# Two choices make the shapes, the hardest words, quick to learn for soft attention, which is steered by the words
# before the last one. Words lie between colour and noun: only so can it look for the shape of the colour just told.
# And a noun may stand where a colour may: attention that has found the colours finds the shapes.
PHRASES = {
    "zh": ("{one}{colour}的{size}{shape}",) * 2 + ("{one}{shape}",),
    "en": ("{one} {colour}, {size} {shape}",) * 2 + ("{one} {shape}",),
}
SENTENCES = {  # {relation} is that of {a} to {b}
    "zh": (
        "{place}有{a}", "{a}在{place}",
        "{place}有{a}和{b}", "{place}有{count}个图形，{a}和{b}",
        "{place}，{a}在{b}的{relation}", "{place}，{b}的{relation}有{a}",
    ),
    "en": (
        "{a} {place}", "there is {a} {place}",
        "{a} and {b} {place}", "{count} shapes {place}, {a} and {b}",
        "{a} {relation} {b} {place}", "{place}, {a} is {relation} {b}",
    ),
}  # fmt: skip
SPACE = {"zh": "", "en": " "}  # between words


@dataclass(frozen=True)
class Mention:
    """A thing as a caption speaks of it; None is not told; `position` is where its noun begins."""

    shape: str
    colour: str | None
    size: str | None
    position: int

    def fits(self, thing: SceneObject) -> bool:
        told = (self.shape, thing.shape), (self.colour, thing.colour), (self.size, thing.size)
        return all(said in (None, real) for said, real in told)


@dataclass(frozen=True)
class Claim:
    """What a caption says: the relation is that of the first mention to the second. None is not told."""

    mentions: tuple[Mention, ...]
    relation: str | None
    background: str | None
    count: str | None


def draw_scenes(folder: Path, count: int, language: str, seed: int) -> list[Record]:
    """Draw `count` scenes into folder/photos, list them in folder/scenes.json, and return them with captions.

    Eight tenths are train, a tenth each val and test. A combination of background and two shapes belongs to one
    split, so that the pairs of val were never seen in train. A scene depends on (seed, split, its number) alone,
    and so does its file's name: the language, or more scenes, change no photo. Raises UserError.
    """
    if count < 3:
        raise UserError(f"--scenes {count}: must be 3 or more, one for each split")
    held_out = max(1, count // 10)
    numbers = {"train": count - 2 * held_out, "val": held_out, "test": held_out}
    places = [(split, number) for split, total in numbers.items() for number in range(total)]
    known = read_scenes(folder) if (folder / "scenes.json").exists() else {}  # photos of other seeds
    scenes, records = {}, []
    for split, number in tqdm(places, "drawing scenes", unit=" photos"):
        id = f"{split}-{seed}-{number:05}"
        scenes[id] = random_scene(split, random.Random(f"{id} scene"))
        path = folder / "photos" / f"{id}.png"
        _save(draw(scenes[id], random.Random(f"{id} texture")), path)
        records.append(Record(str(path), id, split, _captions(scenes[id], language, random.Random(f"{id} {language}"))))
    _write_scenes(folder, known | scenes)
    return records


def read_scenes(folder: Path) -> dict[str, Scene]:
    """The scenes drawn into this folder, by their photos' ids. Raises UserError."""
    path = folder / "scenes.json"
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        return {id: Scene(scene["background"], tuple(map(_thing, scene["things"]))) for id, scene in listed.items()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such list; draw scenes: python -m preprocess {folder} --scenes 2000") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: no list of scenes ({error}); remove it and draw them again") from None


def _thing(listed: dict) -> SceneObject:
    return SceneObject(listed["shape"], listed["colour"], listed["size"], tuple(listed["box"]))


def _write_scenes(folder: Path, scenes: dict[str, Scene]) -> None:
    with atomic_text(folder / "scenes.json") as file:
        lines = (f"{json.dumps(id)}: {json.dumps(dataclasses.asdict(scene))}" for id, scene in scenes.items())
        file.write("{\n" + ",\n".join(lines) + "\n}\n")


def _save(photo: Image.Image, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # whatever, or wherever to, it may be
        with open(temporary, "xb") as file:
            photo.save(file, "png", compress_level=3)  # a third of the time, a tenth larger
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free the place or write elsewhere") from error


# ---- captions


def _captions(scene: Scene, language: str, rng: random.Random) -> tuple[str, ...]:
    """Two captions that differ."""
    captions = {}  # a dict keeps the order
    while len(captions) < 2:
        if caption := _caption(scene, language, rng):
            captions[caption] = None
    return tuple(captions)


def _caption(scene: Scene, language: str, rng: random.Random) -> str | None:
    """A sentence by chance that names all things, the big one first; None where it has not as many places for them,
    or tells them not apart."""
    sentence = rng.choice(SENTENCES[language])
    slots = re.findall(r"{(\w+)}", sentence)
    named = [slot for slot in slots if slot in "ab"]
    if len(named) != len(scene.things):
        return None
    things = dict(zip(named, scene.things, strict=True))
    words = {"place": scene.background, "count": str(len(things))}
    if "relation" in slots:
        words["relation"] = clear_relation(things["a"], things["b"])
    said = {slot: _say(slot, words[slot], language, rng) for slot in slots if slot in words}
    phrases = {slot: _phrase(thing, language, rng) for slot, thing in things.items()}
    if len(set(phrases.values())) < len(phrases):
        return None  # "a star is left of a star" is true of any two
    return sentence.format(**said, **phrases)


def _phrase(thing: SceneObject, language: str, rng: random.Random) -> str:
    words = dict(one=thing.shape, size=thing.size, colour=thing.colour, shape=thing.shape)
    slots = {kind: _say(kind, value, language, rng) for kind, value in words.items()}
    return rng.choice(PHRASES[language]).format(**slots)


def _say(kind: str, value: str, language: str, rng: random.Random) -> str:
    return rng.choice(WORDS[language][kind][value])


# ---- judging


def parse(caption: str | Sequence[str], language: str) -> Claim | None:
    """What a caption says, given as text or as words; None where it is no sentence of ours."""
    text = _text(caption, language)
    for sentence in _patterns(SENTENCES[language], language):
        if match := sentence.fullmatch(text):
            slots = match.groupdict()
            mentions = tuple(_mention(slots[slot], match.start(slot), language) for slot in "ab" if slot in slots)
            meanings = (_meaning(kind, slots.get(kind), language) for kind in ("relation", "place", "count"))
            return Claim(mentions, *meanings)
    return None


def is_true(caption: str | Sequence[str], scene: Scene, language: str) -> bool:
    """Whether the caption is a sentence, and all it says holds: each thing it names is one of the scene's own."""
    claim = parse(caption, language)
    if not claim:
        return False
    if claim.background not in (None, scene.background) or claim.count not in (None, str(len(scene.things))):
        return False
    return any(
        all(mention.fits(thing) for mention, thing in zip(claim.mentions, things, strict=True))
        and (claim.relation is None or holds(claim.relation, *things[:2]))
        for things in itertools.permutations(scene.things, len(claim.mentions))
    )


def named_objects(words: Sequence[str], scene: Scene, language: str) -> list[tuple[int, list[Box]]]:
    """For each noun of the caption that fits something: the index of its word, and the boxes of all it fits."""
    claim = parse(words, language)
    mentions = sorted(claim.mentions, key=lambda mention: mention.position) if claim else ()
    named = [
        (_word_at(mention.position, words, language), [thing.box for thing in scene.things if mention.fits(thing)])
        for mention in mentions
    ]
    return [(word, boxes) for word, boxes in named if boxes]


def _text(caption: str | Sequence[str], language: str) -> str:
    """Lower case without punctuation; Chinese without spaces, English with one between words."""
    text = caption if isinstance(caption, str) else " ".join(caption)
    return re.sub(r"[\W_]+", SPACE[language], text.lower()).strip()


def _word_at(position: int, words: Sequence[str], language: str) -> int:
    """The index of the word that the character at `position` of the text belongs to."""
    return next(i for i in range(len(words)) if len(_text(words[: i + 1], language)) > position)


def _mention(phrase: str, start: int, language: str) -> Mention:
    match = next(match for pattern in _patterns(PHRASES[language], language) if (match := pattern.fullmatch(phrase)))
    slots = match.groupdict()
    meanings = (_meaning(kind, slots.get(kind), language) for kind in ("shape", "colour", "size"))
    return Mention(*meanings, start + match.start("shape"))


def _meaning(kind: str, word: str | None, language: str) -> str | None:
    return next((meaning for meaning, words in WORDS[language][kind].items() if word in words), None)


@functools.cache
def _patterns(templates: tuple[str, ...], language: str) -> list[re.Pattern]:
    """The templates as regular expressions over clean text, with a named group a slot."""
    clean = [re.sub(r"[^\w{}]+", SPACE[language], template) for template in templates]
    return [re.compile(re.sub(r"{(\w+)}", lambda slot: _group(slot[1], language), template)) for template in clean]


def _group(slot: str, language: str) -> str:
    """A regular expression for all that may stand in a slot."""
    if slot in "ab":
        choices = [re.sub(r"\?P<\w+>", "?:", phrase.pattern) for phrase in _patterns(PHRASES[language], language)]
    else:
        choices = itertools.chain.from_iterable(WORDS[language][slot].values())
    return f"(?P<{slot}>{'|'.join(choices)})"
