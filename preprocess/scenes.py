"""Drawn scenes with captions in Chinese and English: a data set without a download, whose captions can be verified.

A scene is one to four shapes on a background. Its captions are generated from templates. `parse` reads a caption with
the same templates, so that `judge` can decide which of its statements are true of a scene. A decoder can thus be
measured by the fraction of its captions that are true, and its attention by how often it is on the object that a noun
names.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from captioning.errors import UserError
from captioning.runtime.files import atomic_text, write_errors
from captioning.runtime.progress import tqdm
from preprocess.annotations import Record
from preprocess.drawing import (
    BETWEEN,
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
        "plural": {"circle": ("圆形",), "square": ("正方形",), "triangle": ("三角形",), "star": ("星星",)},
        "article": {"circle": ("一个",), "square": ("一个",), "triangle": ("一个",), "star": ("一颗",)},
        "measure": {"circle": ("个",), "square": ("个",), "triangle": ("个",), "star": ("颗",)},
        "colour": {
            "red": ("红色",), "yellow": ("黄色",), "green": ("绿色",),
            "blue": ("蓝色",), "purple": ("紫色",), "white": ("白色",),
        },
        "size": {"big": ("大",), "small": ("小",)},
        "background": {"grass": ("草地上",), "sky": ("天空里",), "sand": ("沙滩上",), "night": ("夜空里",)},
        "relation": {"left": ("左边",), "right": ("右边",), "above": ("上面",), "below": ("下面",)},
        "between": {BETWEEN: ("之间",)},
        "count": {"2": ("两",), "3": ("三",), "4": ("四",)},
    },
    "en": {
        "shape": {"circle": ("circle",), "square": ("square",), "triangle": ("triangle",), "star": ("star",)},
        "plural": {shape: (f"{shape}s",) for shape in SHAPES},
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
        "between": {BETWEEN: ("between",)},
        "count": {"2": ("two",), "3": ("three",), "4": ("four",)},
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
GROUP_PHRASES = {  # of objects that are all alike
    "zh": ("{count}{measure}{colour}的{size}{plural}",) * 2 + ("{count}{measure}{plural}",),
    "en": ("{count} {colour}, {size} {plural}",) * 2 + ("{count} {plural}",),
}
# What people say of a scene follows from the scene (`_templates`), so a decoder can learn when to state what.
# {a}, {b} and {c} are noun phrases, {group} is one of several objects; {relation} is that of {a} to {b}.
SENTENCES = {
    "zh": {
        "one": ("{background}有{a}", "{a}在{background}"),
        "two": ("{background}有{a}和{b}", "{background}有{count}个图形，{a}和{b}"),
        "relation": ("{background}，{a}在{b}的{relation}", "{background}有{a}，在{b}的{relation}"),
        "simple relation": ("{background}，{a}在{b}的{relation}", "{background}，{b}的{relation}有{a}"),
        "between": ("{background}，{a}在{b}和{c}{between}", "{background}有{a}，在{b}和{c}{between}"),
        "group": ("{background}有{group}", "{group}在{background}"),
    },
    "en": {
        "one": ("{a} {background}", "there is {a} {background}"),
        "two": ("{a} and {b} {background}", "{count} shapes {background}, {a} and {b}"),
        "relation": ("{a} {relation} {b} {background}", "{background}, {a} is {relation} {b}"),
        "simple relation": ("{a} {relation} {b} {background}", "{background}, {a} is {relation} {b}"),
        "between": ("{a} {between} {b} and {c} {background}", "{background}, {a} is {between} {b} and {c}"),
        "group": ("{group} {background}", "there are {group} {background}"),
    },
}
SCENES_FILE = "scenes.json"
OBJECT_SLOTS = ("a", "b", "c")  # slots for noun phrases of one object
PHRASES_OF_SLOT = {**dict.fromkeys(OBJECT_SLOTS, PHRASES), "group": GROUP_PHRASES}
FACTS_OF_PHRASES = {"colour": "colour", "size": "size", "shape": "shape", "plural": "shape", "count": "count"}
FACTS_OF_SENTENCES = ("relation", "between", "background", "count")
SPACE = {"zh": "", "en": " "}  # between words


@dataclass(frozen=True)
class Fact:
    """What a caption states, and where its words are in the normalized caption."""

    value: str
    start: int
    end: int


@dataclass(frozen=True)
class Mention:
    """An object, or several that are alike, as a caption describes it.

    facts: what is stated, by its kind: shape, colour, size; and count, only of several.
    """

    facts: Mapping[str, Fact]

    def stated(self, kind: str) -> str | None:
        """The value of a fact; None if the caption does not state it."""
        return self.facts[kind].value if kind in self.facts else None

    def matches(self, object: SceneObject) -> bool:
        """Whether everything that is stated of a single object is true of this one."""
        kinds = self.facts.keys() & {"shape", "colour", "size"}
        return all(self.facts[kind].value == getattr(object, kind) for kind in kinds)


@dataclass(frozen=True)
class Claim:
    """What a caption states.

    facts: of the whole scene, by their kind: background; count of all objects; relation or between, of the first
    mention to the others.
    """

    mentions: tuple[Mention, ...]
    facts: Mapping[str, Fact]

    def stated(self, kind: str) -> str | None:
        """The value of a fact; None if the caption does not state it."""
        return self.facts[kind].value if kind in self.facts else None


@dataclass(frozen=True)
class Statement:
    """A fact that a caption states, judged.

    kind: background, count, relation, between, shape, colour, size; and combination, of a colour and a shape that are
    stated of one object. object: the one that a mention was taken to mean; None if the scene has too few, and for facts
    of the whole scene.
    """

    kind: str
    fact: Fact
    is_true: bool
    object: SceneObject | None = None


def draw_scenes(folder: Path, count: int, language: str, seed: int, scene_set: str = "simple") -> list[Record]:
    """Draw `count` scenes into folder/photos, list them in folder/scenes.json, and return them with captions.

    scene_set: "simple" has one or two shapes; "relations" up to four, and combinations of a colour and a shape that
    train does not show.

    A tenth each belongs to val and test, the rest to train. Each combination of a background and several objects
    belongs to one split, so that those in val do not occur in train. A scene and the name of its file depend only on
    (seed, split, number) and the set: another language, or more scenes, change no photo.

    Raises UserError for fewer than 3 scenes and for files that cannot be written.
    """
    if count < 3:
        raise UserError(f"--scenes {count}: must be 3 or more, one for each split")
    existing = read_scenes(folder) if (folder / SCENES_FILE).exists() else {}  # of other seeds
    scenes: dict[str, Scene] = {}
    records: list[Record] = []
    for split, number in tqdm(_split_numbers(count), "drawing scenes", unit=" photos"):
        id = f"{split}-{seed}-{number:05}"
        scene = random_scene(split, random.Random(f"{id} scene"), scene_set)
        path = folder / "photos" / f"{id}.png"
        _save_photo(draw(scene, random.Random(f"{id} texture")), path)
        captions = _make_captions(scene, language, random.Random(f"{id} {language}"), scene_set)
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
    path = folder / SCENES_FILE
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
    with atomic_text(folder / SCENES_FILE) as file:
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


def _make_captions(scene: Scene, language: str, rng: random.Random, scene_set: str = "simple") -> tuple[str, ...]:
    """Two different captions."""
    captions: dict[str, None] = {}  # a set that keeps the order
    while len(captions) < 2:
        if caption := _make_caption(scene, language, rng, scene_set):
            captions[caption] = None
    return tuple(captions)


def _make_caption(scene: Scene, language: str, rng: random.Random, scene_set: str) -> str | None:
    """A random sentence that names all objects in their order.

    None if the chosen template names another number of objects, or if its noun phrases do not tell them apart.
    """
    template = rng.choice(_templates(scene, language, scene_set))
    slots = re.findall(r"{(\w+)}", template)
    noun_slots = [slot for slot in slots if slot in PHRASES_OF_SLOT]
    if len(noun_slots) != (1 if scene.is_group else len(scene.objects)):
        return None
    objects = dict(zip(noun_slots, scene.objects, strict=False))  # of a group, the first
    count = str(len(scene.objects))
    facts = {"background": scene.background, "count": count, "between": BETWEEN}
    if "relation" in slots:
        relation = clear_relation(objects["a"].box, objects["b"].box)
        assert relation is not None  # _kind_of_sentence
        facts["relation"] = relation
    words = {slot: _choose_word(slot, facts[slot], language, rng) for slot in slots if slot in facts}
    phrases = {slot: _make_phrase(slot, object, count, language, rng) for slot, object in objects.items()}
    if len(set(phrases.values())) < len(phrases):
        return None  # "a star is to the left of a star" is true of any two
    return template.format(**words, **phrases)


def _templates(scene: Scene, language: str, scene_set: str) -> tuple[str, ...]:
    """The sentences of a scene. People state every clear relation of the set "relations", and half of "simple"."""
    sentences = SENTENCES[language]
    if scene_set == "simple":
        return sentences["one"] + sentences["two"] + sentences["simple relation"]
    return sentences[_kind_of_sentence(scene)]


def _kind_of_sentence(scene: Scene) -> str:
    """What people say of a scene, a key of SENTENCES."""
    objects = scene.objects
    if scene.is_group:
        return "group"
    if len(objects) == 2:
        return "relation" if clear_relation(objects[0].box, objects[1].box) else "two"
    return {1: "one", 3: "between"}[len(objects)]


def _make_phrase(slot: str, object: SceneObject, count: str, language: str, rng: random.Random) -> str:
    """A noun phrase. count: of all objects that are like it."""
    shape, kinds = object.shape, WORDS[language]
    facts = {"article": shape, "size": object.size, "colour": object.colour, "shape": shape}
    if slot == "group":
        facts |= {"count": count, "measure": shape, "plural": shape}
    words = {kind: _choose_word(kind, value, language, rng) for kind, value in facts.items() if kind in kinds}
    return rng.choice(PHRASES_OF_SLOT[slot][language]).format(**words)


def _choose_word(kind: str, value: str, language: str, rng: random.Random) -> str:
    return rng.choice(WORDS[language][kind][value])


# ---- parsing captions


def parse(caption: str | Sequence[str], language: str) -> Claim | None:
    """What a caption states, given as text or as words; None if it matches no template."""
    text = _normalize(caption, language)
    for template in itertools.chain.from_iterable(SENTENCES[language].values()):
        if match := _compile_template(template, language).fullmatch(text):
            mentions = tuple(
                _parse_phrase(slot, match[slot], match.start(slot), language)
                for slot in PHRASES_OF_SLOT
                if slot in match.groupdict()
            )
            kinds = [kind for kind in FACTS_OF_SENTENCES if kind in match.groupdict()]
            return Claim(mentions, {kind: _parse_word(match, kind, 0, language) for kind in kinds})
    return None


def judge(caption: str | Sequence[str], scene: Scene, language: str) -> list[Statement] | None:
    """The statements of a caption, given as text or as words, each judged; None if it matches no template.

    Different mentions are different objects. Which mention means which object is chosen so that as many statements as
    possible are true. A caption need not mention every object.
    """
    claim = parse(caption, language)
    if claim is None:
        return None
    missing = max(0, len(claim.mentions) - len(scene.objects))
    choices = itertools.permutations((*scene.objects, *[None] * missing), len(claim.mentions))
    judged = (list(_judge(claim, objects, scene)) for objects in choices)
    return max(judged, key=lambda statements: sum(statement.is_true for statement in statements))


def is_true(caption: str | Sequence[str], scene: Scene, language: str) -> bool:
    """Whether a caption, given as text or as words, matches a template and all its statements are true of the scene."""
    statements = judge(caption, scene, language)
    return statements is not None and all(statement.is_true for statement in statements)


def _judge(claim: Claim, objects: Sequence[SceneObject | None], scene: Scene) -> Iterator[Statement]:
    """The statements, if the i-th mention means the i-th object."""
    for kind, fact in claim.facts.items():
        yield Statement(kind, fact, _is_true_of_scene(kind, fact.value, objects, scene))
    for mention, object in zip(claim.mentions, objects, strict=True):
        for kind, fact in mention.facts.items():
            if kind == "count":
                holds = object is not None and int(fact.value) == _count_alike(mention, object, scene)
            else:
                holds = object is not None and getattr(object, kind) == fact.value
            yield Statement(kind, fact, holds, object)
        if "colour" in mention.facts:
            colour, shape = mention.facts["colour"], mention.facts["shape"]
            holds = object is not None and object.combination == (colour.value, shape.value)
            value = f"{colour.value} {shape.value}"
            yield Statement("combination", Fact(value, colour.start, shape.end), holds, object)


def _is_true_of_scene(kind: str, value: str, objects: Sequence[SceneObject | None], scene: Scene) -> bool:
    """Whether a fact of the whole scene is true. objects: those of the mentions."""
    if kind == "background":
        return value == scene.background
    if kind == "count":
        return value == str(len(scene.objects))
    present = [object.box for object in objects if object]
    return len(present) == len(objects) and relation_holds(value, *present)


def _count_alike(mention: Mention, object: SceneObject, scene: Scene) -> int:
    """How many objects are like this one, in what the mention states of it."""
    kinds = mention.facts.keys() & {"shape", "colour", "size"}
    return sum(all(getattr(other, kind) == getattr(object, kind) for kind in kinds) for other in scene.objects)


def named_objects(words: Sequence[str], scene: Scene, language: str) -> list[tuple[int, list[Box]]]:
    """For each noun that matches an object: the index of its word, and the boxes of all objects that it matches.

    The nouns are in the order of the caption. Empty if the caption matches no template.
    """
    claim = parse(words, language)
    if claim is None:
        return []
    named = []
    for mention in sorted(claim.mentions, key=lambda mention: mention.facts["shape"].start):
        boxes = [object.box for object in scene.objects if mention.matches(object)]
        if boxes:
            named.append((words_of(mention.facts["shape"], words, language)[0], boxes))
    return named


def words_of(fact: Fact, words: Sequence[str], language: str) -> range:
    """The indices of the words of a caption that state a fact."""
    return range(_word_at(fact.start, words, language), _word_at(fact.end - 1, words, language) + 1)


def _normalize(caption: str | Sequence[str], language: str) -> str:
    """The caption as lower-case text without punctuation, its words joined as in SPACE."""
    text = caption if isinstance(caption, str) else " ".join(caption)
    return re.sub(r"[\W_]+", SPACE[language], text.lower()).strip()


def _word_at(position: int, words: Sequence[str], language: str) -> int:
    """The index of the word that contains the character at `position` of the normalized caption."""
    return next(i for i in range(len(words)) if len(_normalize(words[: i + 1], language)) > position)


def _parse_phrase(slot: str, phrase: str, start: int, language: str) -> Mention:
    """What a noun phrase describes. start: the position of the phrase in the normalized caption."""
    patterns = (_compile_template(template, language) for template in PHRASES_OF_SLOT[slot][language])
    match = next(match for pattern in patterns if (match := pattern.fullmatch(phrase)))
    kinds = {FACTS_OF_PHRASES[slot]: slot for slot in FACTS_OF_PHRASES if slot in match.groupdict()}
    return Mention({kind: _parse_word(match, slot, start, language) for kind, slot in kinds.items()})


def _parse_word(match: re.Match[str], slot: str, start: int, language: str) -> Fact:
    """The value that the word in a slot stands for: the inverse of `_choose_word`. start: that of the matched text."""
    value = next(value for value, words in WORDS[language][slot].items() if match[slot] in words)
    return Fact(value, start + match.start(slot), start + match.end(slot))


@functools.cache
def _compile_template(template: str, language: str) -> re.Pattern[str]:
    """The template as a regular expression for normalized captions, with a named group for each slot."""
    normalized = re.sub(r"[^\w{}]+", SPACE[language], template)
    return re.compile(re.sub(r"{(\w+)}", lambda slot: _slot_pattern(slot[1], language), normalized))


def _slot_pattern(slot: str, language: str) -> str:
    """A regular expression, as a named group, for all that can fill a slot."""
    if slot in PHRASES_OF_SLOT:
        phrases = dict.fromkeys(PHRASES_OF_SLOT[slot][language])
        choices = [re.sub(r"\?P<\w+>", "?:", _compile_template(phrase, language).pattern) for phrase in phrases]
    else:
        choices = list(itertools.chain.from_iterable(WORDS[language][slot].values()))
    return f"(?P<{slot}>{'|'.join(choices)})"
