"""Drawn scenes: photos show their scenes, captions are true, and a caption with one fact changed is false."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
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
from preprocess.languages import default_tokenizer
from preprocess.scenes import WORDS, draw_scenes, is_true, named_objects, parse, read_scenes
from preprocess.tokenizers import tokenize

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
def captioned_scenes(draw_value) -> tuple[str, Scene, str]:
    """A language, a scene, and a caption of the scene."""
    language = draw_value(st.sampled_from(LANGUAGES))
    rng = random.Random(draw_value(st.integers(0, 2**32)))
    scene = random_scene("train", rng)
    return language, scene, draw_value(st.sampled_from(scenes._make_captions(scene, language, rng)))


def change_fact(caption: str, kind: str, old: str, new: str, language: str) -> str:
    """The caption with the word for one of its facts replaced."""
    word = max((word for word in WORDS[language][kind][old] if word in caption), key=len)
    return caption.replace(word, WORDS[language][kind][new][0], 1)


def false_changes(scene: Scene, caption: str, language: str) -> list[tuple[str, str, str]]:
    """Every (kind, stated value, other value) whose replacement makes the caption false."""
    claim = parse(caption, language)
    colours = {object.colour for object in scene.objects}
    shapes = {object.shape for object in scene.objects}
    changes = [("background", claim.background, other) for other in BACKGROUNDS]
    changes += [("count", claim.count, other) for other in WORDS[language]["count"]]
    changes += [("relation", claim.relation, other) for other in RELATIONS]
    for mention in claim.mentions:
        changes += [("colour", mention.colour, other) for other in COLOURS if other not in colours]
        changes += [("shape", mention.shape, other) for other in SHAPES if other not in shapes]
        if {other.size for other in claim.mentions} == {mention.size}:  # else "big" may belong to the other mention
            changes += [("size", mention.size, other) for other in ("big", "small")]
    return [(kind, stated, other) for kind, stated, other in changes if stated is not None and stated != other]


# ---- captions and their truth


@given(captioned_scenes())
def test_every_caption_is_true_of_its_own_scene_as_text_and_as_words(captioned_scene):
    language, scene, caption = captioned_scene
    assert is_true(caption, scene, language), caption
    assert is_true(words_of(caption, language), scene, language), caption


@given(captioned_scenes(), st.data())
def test_a_caption_with_one_fact_changed_is_false(captioned_scene, data):
    language, scene, caption = captioned_scene
    kind, stated, other = data.draw(st.sampled_from(false_changes(scene, caption, language)))
    false_caption = change_fact(caption, kind, stated, other, language)
    assert false_caption != caption and parse(false_caption, language) is not None, false_caption
    assert not is_true(false_caption, scene, language), false_caption


@given(captioned_scenes(), st.data())
def test_a_caption_that_repeats_its_end_is_false(captioned_scene, data):
    language, scene, caption = captioned_scene
    words = words_of(caption, language)
    start = data.draw(st.integers(1, len(words) - 1))
    assert not is_true(words + words[start:], scene, language)


@pytest.mark.parametrize(
    "language, caption, true",
    [
        ("en", "a red, big circle to the left of a blue, small star on the grass", True),
        ("en", "A circle, ON THE GRASS.", True),  # a caption need not name every object
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
def test_is_true_agrees_with_people(language, caption, true):
    assert is_true(caption, PAIR, language) is true


def test_the_relation_of_the_larger_distance_holds():
    below = dataclasses.replace(BLUE, box=(0.3, 0.8, 0.49, 0.99))
    scene = Scene("grass", (RED, below))
    assert is_true("a star below a circle on the grass", scene, "en")
    assert not is_true("a star to the right of a circle on the grass", scene, "en")


def test_the_vocabulary_is_small_and_every_word_is_frequent(drawn):
    language, records, _ = drawn
    captions = [words_of(caption, language) for record in records for caption in record.captions]
    counts = Counter(word for words in captions for word in words)
    assert len(counts) <= 60
    assert sum(counts.values()) / len(counts) > 40
    assert all(len(record.captions) == len(set(record.captions)) == 2 for record in records)


# ---- the objects that nouns name


def test_every_noun_gives_the_boxes_of_its_object(drawn):
    language, records, scenes_by_id = drawn
    nouns = {shape: tuple(words) for shape, words in WORDS[language]["shape"].items()}
    for record in records:
        boxes = {object.box: object.shape for object in scenes_by_id[record.id].objects}
        for caption in record.captions:
            words = words_of(caption, language)
            named = named_objects(words, scenes_by_id[record.id], language)
            assert len(named) == len(parse(words, language).mentions)
            assert all(words[word].endswith(nouns[boxes[box]]) for word, found in named for box in found)
            assert len({box for _, found in named for box in found}) == len(named)
            assert [word for word, _ in named] == sorted(word for word, _ in named)


def test_a_noun_gives_all_objects_that_match_and_a_wrong_one_gives_none():
    twin = dataclasses.replace(RED, size="small", box=(0.7, 0.1, 0.89, 0.29))
    scene = Scene("grass", (RED, twin, BLUE))
    words = "a circle and a green small star on the grass".split()
    assert named_objects(words, scene, "en") == [(1, [RED.box, twin.box])]
    assert named_objects("a red small circle on the grass".split(), scene, "en") == [(3, [twin.box])]
    assert named_objects("circle circle".split(), scene, "en") == []


def test_a_noun_that_jieba_joins_with_its_size_is_found():
    words = ["草地", "上", "有", "一颗", "蓝色", "的", "小星星"]
    assert named_objects(words, PAIR, "zh") == [(6, [BLUE.box])]


# ---- photos


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size, side", SIDES.items())
def test_a_shape_fills_its_box(shape, size, side):
    box = (30 / SIZE, 20 / SIZE, (30 + side) / SIZE, (20 + side) / SIZE)
    object = SceneObject(shape, "red", size, box)
    photo, bare = (draw(Scene("night", objects), random.Random(0)) for objects in ((object,), ()))
    y, x = np.nonzero(_difference(photo, bare) > 60)  # more than its shadow
    edges = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
    assert np.abs(edges - SIZE * np.array(box)).max() <= 3


@given(st.integers(0, 2**32))
def test_every_shape_stands_out_from_its_background_in_its_own_colour(seed):
    scene = random_scene("train", random.Random(seed))
    photo, bare = (draw(Scene(scene.background, objects), random.Random(seed)) for objects in (scene.objects, ()))
    for object in scene.objects:
        left, top, right, bottom = (round(SIZE * value) for value in object.box)
        middle = [(left + right) // 2 - 3, (top + bottom) // 2 - 3, (left + right) // 2 + 3, (top + bottom) // 2 + 3]
        painted, behind = (np.array(image.crop(middle), float).mean((0, 1)) for image in (photo, bare))
        assert min(COLOURS, key=lambda colour: np.abs(painted - COLOURS[colour]).max()) == object.colour
        assert np.abs(painted - behind).max() > 45


def _difference(one: Image.Image, other: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(one, float) - np.asarray(other, float)).max(-1)


def _within(box: tuple, margin: int) -> np.ndarray:
    left, top, right, bottom = (round(SIZE * value) for value in box)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[top + margin : bottom - margin, left + margin : right - margin] = True
    return mask


@given(st.integers(0, 2**32), st.sampled_from(["train", "val", "test"]))
def test_objects_are_apart_inside_the_photo_and_unlike_their_background(seed, split):
    scene = random_scene(split, random.Random(seed))
    inside = [value for object in scene.objects for value in object.box]
    assert 1 <= len(scene.objects) <= 2 and 0 < min(inside) and max(inside) < 1
    masks = sum(_within(object.box, margin=-2).astype(int) for object in scene.objects)
    assert masks.max() == 1
    assert BACKGROUNDS[scene.background].similar_colour not in {object.colour for object in scene.objects}


# ---- splits and files


def test_pairs_in_val_and_test_do_not_occur_in_train(drawn):
    _, records, scenes_by_id = drawn
    seen = {"train": set(), "val": set(), "test": set()}
    for record in records:
        objects = frozenset((object.shape, object.colour, object.size) for object in scenes_by_id[record.id].objects)
        if len(objects) > 1:
            seen[record.split].add((scenes_by_id[record.id].background, objects))
    assert all(seen.values())
    assert not seen["train"] & seen["val"] and not seen["train"] & seen["test"] and not seen["val"] & seen["test"]


def test_of_two_objects_the_big_one_is_named_first(drawn):
    language, records, scenes_by_id = drawn
    for record in records:
        assert [object.size for object in scenes_by_id[record.id].objects] in (["big"], ["small"], ["big", "small"])
        for caption in record.captions:
            mentions = sorted(parse(caption, language).mentions, key=lambda mention: mention.position)
            assert all(map(type(mentions[0]).matches, mentions, scenes_by_id[record.id].objects))


@pytest.mark.parametrize("count, expected", [(3, (1, 1, 1)), (10, (8, 1, 1)), (25, (21, 2, 2))])
def test_val_and_test_are_a_tenth_each_and_at_least_one_photo(tmp_path, count, expected):
    splits = Counter(record.split for record in draw_scenes(tmp_path, count, "en", 0))
    assert tuple(splits[split] for split in ("train", "val", "test")) == expected


def test_equal_seeds_draw_equal_files_and_different_seeds_different_ones(tmp_path):
    one, two, other = (draw_scenes(tmp_path / name, 10, "zh", seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert [record.captions for record in one] == [record.captions for record in two]
    assert not set(files(tmp_path / "c").values()) & set(files(tmp_path / "a").values())
    assert [record.captions for record in one] != [record.captions for record in other]


def test_neither_language_nor_count_changes_a_scene(tmp_path):
    draw_scenes(tmp_path / "a", 10, "zh", 0)
    draw_scenes(tmp_path / "b", 30, "en", 0)
    few, many = files(tmp_path / "a"), files(tmp_path / "b")
    assert all(many[name] == few[name] for name in few if name.endswith(".png"))
    assert read_scenes(tmp_path / "a").items() <= read_scenes(tmp_path / "b").items()


def test_another_seed_leaves_existing_photos_and_scenes(tmp_path):
    draw_scenes(tmp_path, 10, "zh", 0)
    before, scenes_by_id = files(tmp_path), read_scenes(tmp_path)
    draw_scenes(tmp_path, 10, "zh", 1)
    after = files(tmp_path)
    assert all(after[name] == before[name] for name in before if name.endswith(".png"))
    assert read_scenes(tmp_path).items() > scenes_by_id.items()


def test_photos_are_small_squares_and_scenes_json_has_the_documented_format(drawn):
    _, records, scenes_by_id = drawn
    assert {Image.open(record.image).size for record in records} == {(SIZE, SIZE)}
    folder = Path(records[0].image).parents[1]
    plain = json.loads((folder / "scenes.json").read_text("utf-8"))
    assert list(plain) == [record.id for record in records] == list(scenes_by_id)
    scene = scenes_by_id[records[0].id]
    things = [{**dataclasses.asdict(object), "box": list(object.box)} for object in scene.objects]
    assert plain[records[0].id] == {"background": scene.background, "things": things}
    assert sorted(os.listdir(folder)) == ["photos", "scenes.json"]


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}', '{"a": {"background": "sky", "things": [1]}}'])
def test_a_malformed_scenes_json_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "scenes.json").write_text(text, "utf-8")
    with pytest.raises(UserError, match="scenes.json: not a list of scenes .* remove it") as error:
        read_scenes(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_scenes_json_names_the_command_that_draws_scenes(tmp_path):
    with pytest.raises(UserError, match="python -m preprocess .* --scenes"):
        read_scenes(tmp_path)


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "photos").write_text("in the way", "utf-8")
    with pytest.raises(UserError, match="photos.*: cannot be written"):
        draw_scenes(tmp_path, 10, "en", 0)


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_written_by_the_command_are_true(tmp_path, monkeypatch, language):
    monkeypatch.chdir(tmp_path)
    main(Preprocess(Path("data"), scenes=12, language=language, min_count=1, workers=1))
    scenes_by_id = read_scenes(Path("data"))
    for line in Path("data/captions.jsonl").read_text("utf-8").splitlines():
        photo = json.loads(line)
        assert Path("data", photo["image"]).is_file()
        assert all(is_true(words, scenes_by_id[photo["id"]], language) for words in photo["captions"])
