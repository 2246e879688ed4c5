"""Drawn scenes: the photo shows what the scene says, every caption is true, and a changed fact makes it false."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from captioning.errors import UserError
from config import Preprocess
from preprocess import scenes
from preprocess.__main__ import main
from preprocess.drawing import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIDES,
    SIZE,
    Scene,
    SceneObject,
    draw,
    random_scene,
)
from preprocess.scenes import WORDS, draw_scenes, is_true, named_objects, parse, read_scenes
from preprocess.tokenizers import default_tokenizer, tokenize

LANGUAGES = ["zh", "en"]
RED = SceneObject("circle", "red", "big", (0.1, 0.3, 0.46, 0.66))
BLUE = SceneObject("star", "blue", "small", (0.7, 0.35, 0.89, 0.54))
PAIR = Scene("grass", (RED, BLUE))


@pytest.fixture(scope="module", params=LANGUAGES)
def drawn(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, draw_scenes(folder, 100, request.param, seed=0), read_scenes(folder)


def words_of(caption: str, language: str) -> list[str]:
    return tokenize(caption, default_tokenizer(language))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@st.composite
def told_scenes(draw_one) -> tuple[str, Scene, str]:
    """A language, a scene and a caption of it."""
    language, rng = draw_one(st.sampled_from(LANGUAGES)), random.Random(draw_one(st.integers(0, 2**32)))
    scene = random_scene("train", rng)
    return language, scene, draw_one(st.sampled_from(scenes._captions(scene, language, rng)))


def changed(caption: str, kind: str, old: str, new: str, language: str) -> str:
    """The caption with another word for one of its facts."""
    form = max((form for form in WORDS[language][kind][old] if form in caption), key=len)
    return caption.replace(form, WORDS[language][kind][new][0], 1)


def other_facts(scene: Scene, caption: str, language: str) -> list[tuple[str, str, str]]:
    """Every (kind, what the caption says, what the scene does not show)."""
    claim = parse(caption, language)
    facts = [("place", claim.background, other) for other in BACKGROUNDS] + [
        ("count", claim.count, n) for n in WORDS[language]["count"]
    ]
    facts += [("relation", claim.relation, other) for other in RELATIONS]
    for mention in claim.mentions:
        colours, shapes = ({getattr(thing, kind) for thing in scene.things} for kind in ("colour", "shape"))
        facts += [("colour", mention.colour, other) for other in COLOURS if other not in colours]
        facts += [("shape", mention.shape, other) for other in SHAPES if other not in shapes]
        if {known.size for known in claim.mentions} == {mention.size}:  # else the first "big" may be another's
            facts += [("size", mention.size, other) for other in ("big", "small")]
    return [(kind, said, other) for kind, said, other in facts if said is not None and said != other]


# ---- captions and their judge


@settings(max_examples=150)
@given(told_scenes())
def test_every_caption_is_true_of_its_own_scene_as_text_and_as_words(told):
    language, scene, caption = told
    assert is_true(caption, scene, language), caption
    assert is_true(words_of(caption, language), scene, language), caption


@settings(max_examples=150)
@given(told_scenes(), st.data())
def test_a_caption_with_one_fact_changed_is_false(told, data):
    language, scene, caption = told
    facts = other_facts(scene, caption, language)
    kind, said, other = data.draw(st.sampled_from(facts))
    lie = changed(caption, kind, said, other, language)
    assert lie != caption and parse(lie, language) is not None, lie
    assert not is_true(lie, scene, language), lie


@settings(max_examples=100)
@given(told_scenes(), st.data())
def test_a_caption_that_repeats_its_end_is_false(told, data):
    language, scene, caption = told
    words = words_of(caption, language)
    cut = data.draw(st.integers(1, len(words) - 1))
    assert not is_true(words + words[cut:], scene, language)


@pytest.mark.parametrize(
    "language, caption, true",
    [
        ("en", "a red, big circle to the left of a blue, small star on the grass", True),
        ("en", "A circle, ON THE GRASS.", True),  # a part of the scene is enough
        ("en", "a blue, small star to the right of a circle on the grass", True),
        ("en", "a star to the left of a circle on the grass", False),
        ("en", "a circle above a star on the grass", False),
        ("en", "a circle and a circle on the grass", False),  # there is only one
        ("en", "three shapes on the grass, a circle and a star", False),
        ("en", "two shapes on the grass, a circle and a star", True),
        ("en", "a blue, big circle and a star on the grass", False),
        ("en", "circle grass", False),
        ("en", "a circle on the grass on the grass", False),
        ("en", "a <unk> on the grass", False),
        ("en", "", False),
        ("zh", "草地上，一个红色的大圆形在一颗蓝色的小星星的左边", True),
        ("zh", "草地上，一个圆形在一颗蓝色的小星星的左边", True),
        ("zh", "草地上，一个圆形在一颗蓝色的小星星的", False),
        ("zh", "草地上，一个圆形在一颗蓝色的小星星的右边", False),
        ("zh", "草地上，一颗蓝色的小星星在一个圆形的右边", True),
        ("zh", "草地上有一个圆形和一颗星星", True),
        ("zh", "沙滩上有一个圆形和一颗星星", False),
        ("zh", "草地上有一个红色的小圆形", False),
        ("zh", "草地上有红色", False),
        ("zh", "", False),
    ],
)
def test_the_judge_says_what_a_person_would(language, caption, true):
    assert is_true(caption, PAIR, language) is true


def test_a_relation_holds_where_it_is_stronger_than_the_other():
    below = dataclasses.replace(BLUE, box=(0.3, 0.8, 0.49, 0.99))
    scene = Scene("grass", (RED, below))
    assert is_true("a star below a circle on the grass", scene, "en")
    assert not is_true("a star to the right of a circle on the grass", scene, "en")


def test_few_words_are_enough_and_each_is_learnt_from_many_captions(drawn):
    language, records, _ = drawn
    captions = [words_of(caption, language) for record in records for caption in record.captions]
    counts = Counter(word for words in captions for word in words)
    assert len(counts) <= 60
    assert sum(counts.values()) / len(counts) > 40
    assert all(len(record.captions) == len(set(record.captions)) == 2 for record in records)


# ---- what a noun names


def test_every_noun_names_the_boxes_of_what_it_speaks_of(drawn):
    language, records, listed = drawn
    nouns = {shape: tuple(forms) for shape, forms in WORDS[language]["shape"].items()}
    for record in records:
        boxes = {thing.box: thing.shape for thing in listed[record.id].things}
        for caption in record.captions:
            words = words_of(caption, language)
            named = named_objects(words, listed[record.id], language)
            assert len(named) == len(parse(words, language).mentions)
            assert all(words[word].endswith(nouns[boxes[box]]) for word, found in named for box in found)
            assert len({box for _, found in named for box in found}) == len(named)
            assert [word for word, _ in named] == sorted(word for word, _ in named)


def test_a_noun_that_fits_several_names_them_all_and_a_wrong_one_names_none():
    twin = dataclasses.replace(RED, size="small", box=(0.7, 0.1, 0.89, 0.29))
    scene = Scene("grass", (RED, twin, BLUE))
    said = "a circle and a green small star on the grass".split()
    assert named_objects(said, scene, "en") == [(1, [RED.box, twin.box])]
    assert named_objects("a red small circle on the grass".split(), scene, "en") == [(3, [twin.box])]
    assert named_objects("circle circle".split(), scene, "en") == []


def test_a_noun_that_jieba_joins_to_its_size_is_still_found():
    words = ["草地", "上", "有", "一颗", "蓝色", "的", "小星星"]
    assert named_objects(words, PAIR, "zh") == [(6, [BLUE.box])]


# ---- photos


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size, side", SIDES.items())
def test_a_shape_fills_its_box_and_keeps_inside(shape, size, side):
    box = (30 / SIZE, 20 / SIZE, (30 + side) / SIZE, (20 + side) / SIZE)
    thing = SceneObject(shape, "red", size, box)
    photo, bare = (draw(Scene("night", things), random.Random(0)) for things in ((thing,), ()))
    y, x = np.nonzero(_difference(photo, bare) > 60)  # more than its shadow
    edges = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
    assert np.abs(edges - SIZE * np.array(box)).max() <= 3


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_every_shape_stands_out_from_its_background_in_its_own_colour(seed):
    scene = random_scene("train", random.Random(seed))
    photo, bare = (draw(Scene(scene.background, things), random.Random(seed)) for things in (scene.things, ()))
    for thing in scene.things:
        left, top, right, bottom = (round(SIZE * value) for value in thing.box)
        middle = [(left + right) // 2 - 3, (top + bottom) // 2 - 3, (left + right) // 2 + 3, (top + bottom) // 2 + 3]
        painted, behind = (np.array(image.crop(middle), float).mean((0, 1)) for image in (photo, bare))
        assert min(COLOURS, key=lambda colour: np.abs(painted - COLOURS[colour]).max()) == thing.colour
        assert np.abs(painted - behind).max() > 45


def _difference(one: Image.Image, other: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(one, float) - np.asarray(other, float)).max(-1)


def _within(box: tuple, margin: int) -> np.ndarray:
    left, top, right, bottom = (round(SIZE * value) for value in box)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[top + margin : bottom - margin, left + margin : right - margin] = True
    return mask


@settings(max_examples=100)
@given(st.integers(0, 2**32), st.sampled_from(["train", "val", "test"]))
def test_things_keep_apart_lie_inside_and_differ_from_their_background(seed, split):
    scene = random_scene(split, random.Random(seed))
    inside = [value for thing in scene.things for value in thing.box]
    assert 1 <= len(scene.things) <= 2 and 0 < min(inside) and max(inside) < 1
    masks = sum(_within(thing.box, margin=-2).astype(int) for thing in scene.things)
    assert masks.max() == 1
    assert BACKGROUNDS[scene.background].hides not in {thing.colour for thing in scene.things}


# ---- splits and files


def test_what_pairs_val_and_test_show_was_never_seen_in_train(drawn):
    _, records, listed = drawn
    seen = {"train": set(), "val": set(), "test": set()}
    for record in records:
        things = frozenset((thing.shape, thing.colour, thing.size) for thing in listed[record.id].things)
        if len(things) > 1:
            seen[record.split].add((listed[record.id].background, things))
    assert all(seen.values())
    assert not seen["train"] & seen["val"] and not seen["train"] & seen["test"] and not seen["val"] & seen["test"]


def test_of_two_things_the_big_one_is_named_first(drawn):
    language, records, listed = drawn
    for record in records:
        assert [thing.size for thing in listed[record.id].things] in (["big"], ["small"], ["big", "small"])
        for caption in record.captions:
            mentions = sorted(parse(caption, language).mentions, key=lambda mention: mention.position)
            assert all(map(type(mentions[0]).fits, mentions, listed[record.id].things))


@pytest.mark.parametrize("count, expected", [(3, (1, 1, 1)), (10, (8, 1, 1)), (25, (21, 2, 2))])
def test_splits_are_a_tenth_each_and_one_photo_at_least(tmp_path, count, expected):
    splits = Counter(record.split for record in draw_scenes(tmp_path, count, "en", 0))
    assert tuple(splits[split] for split in ("train", "val", "test")) == expected


def test_the_same_seed_draws_the_same_files_and_another_draws_others(tmp_path):
    one, two, other = (draw_scenes(tmp_path / name, 10, "zh", seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert [record.captions for record in one] == [record.captions for record in two]
    assert not set(files(tmp_path / "c").values()) & set(files(tmp_path / "a").values())
    assert [record.captions for record in one] != [record.captions for record in other]


def test_neither_language_nor_number_changes_a_scene(tmp_path):
    draw_scenes(tmp_path / "a", 10, "zh", 0)
    draw_scenes(tmp_path / "b", 30, "en", 0)
    few, many = files(tmp_path / "a"), files(tmp_path / "b")
    assert all(many[name] == few[name] for name in few if name.endswith(".png"))
    assert read_scenes(tmp_path / "a").items() <= read_scenes(tmp_path / "b").items()


def test_other_seeds_leave_the_photos_and_scenes_that_captions_may_speak_of(tmp_path):
    draw_scenes(tmp_path, 10, "zh", 0)
    before, listed = files(tmp_path), read_scenes(tmp_path)
    draw_scenes(tmp_path, 10, "zh", 1)
    after = files(tmp_path)
    assert all(after[name] == before[name] for name in before if name.endswith(".png"))
    assert read_scenes(tmp_path).items() > listed.items()


def test_photos_are_small_squares_and_the_list_is_plain_json(drawn):
    _, records, listed = drawn
    assert {Image.open(record.image).size for record in records} == {(SIZE, SIZE)}
    folder = Path(records[0].image).parents[1]
    plain = json.loads((folder / "scenes.json").read_text("utf-8"))
    assert list(plain) == [record.id for record in records] == list(listed)
    assert plain[records[0].id] == json.loads(json.dumps(dataclasses.asdict(listed[records[0].id])))
    assert sorted(os.listdir(folder)) == ["photos", "scenes.json"]


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}', '{"a": {"background": "sky", "things": [1]}}'])
def test_a_list_that_is_none_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "scenes.json").write_text(text, "utf-8")
    with pytest.raises(UserError, match="scenes.json: no list of scenes .* remove it") as raised:
        read_scenes(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_missing_list_names_the_command_that_draws_scenes(tmp_path):
    with pytest.raises(UserError, match="python -m preprocess .* --scenes"):
        read_scenes(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "photos").write_text("in the way", "utf-8")
    with pytest.raises(UserError, match="photos.*: cannot be written"):
        draw_scenes(tmp_path, 10, "en", 0)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_command_keeps_every_caption_true(tmp_path, monkeypatch, language):
    monkeypatch.chdir(tmp_path)
    main(Preprocess(Path("data"), scenes=12, language=language, min_count=1, workers=1))
    listed = read_scenes(Path("data"))
    for line in Path("data/captions.jsonl").read_text("utf-8").splitlines():
        photo = json.loads(line)
        assert Path(photo["image"]).is_file()
        assert all(is_true(words, listed[photo["id"]], language) for words in photo["captions"])
