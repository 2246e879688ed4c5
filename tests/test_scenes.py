"""Drawn scenes: photos show their scenes, captions are true, and a caption with one fact changed is false."""

from __future__ import annotations

import dataclasses
import hashlib
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
    DIRECTIONS,
    NEW_COMBINATIONS,
    SCENE_SETS,
    SHAPES,
    SIDES,
    SIZE,
    Scene,
    SceneObject,
    draw,
    random_scene,
)
from preprocess.languages import default_tokenizer
from preprocess.scenes import WORDS, draw_scenes, is_true, judge, named_objects, parse, read_scenes
from preprocess.tokenizers import tokenize

LANGUAGES = ["zh", "en"]
SIMPLE_DIGESTS = {  # of 60 scenes and their captions, drawn on 30 November 2026
    "zh": "331ffefc591b6888b027ff503dec03f7e22e911983ac2a61b176a366957a703b",
    "en": "6c94b3d21bf7210cbbdc8eb7632f0a388dea3dc23212fe4f161f6e85e7ada193",
}
RED = SceneObject("circle", "red", "big", (0.1, 0.3, 0.46, 0.66))
BLUE = SceneObject("star", "blue", "small", (0.7, 0.35, 0.89, 0.54))
PAIR = Scene("grass", (RED, BLUE))
WHITE = SceneObject("square", "white", "small", (0.48, 0.36, 0.68, 0.56))
ROW = Scene("sky", (WHITE, dataclasses.replace(RED, size="small"), BLUE))
GROUP = Scene("sand", tuple(dataclasses.replace(BLUE, box=(x, 0.1, x + 0.2, 0.3)) for x in (0.1, 0.4, 0.7)))


@pytest.fixture(scope="module", params=LANGUAGES)
def drawn(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, draw_scenes(folder, 100, request.param, 0, "relations"), read_scenes(folder)


def words_of(caption: str, language: str) -> list[str]:
    return tokenize(caption, default_tokenizer(language))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@st.composite
def captioned_scenes(draw_value) -> tuple[str, Scene, str]:
    """A language, a scene, and a caption of the scene."""
    language = draw_value(st.sampled_from(LANGUAGES))
    rng = random.Random(draw_value(st.integers(0, 2**32)))
    scene_set = draw_value(st.sampled_from(list(SCENE_SETS)))
    scene = random_scene("train", rng, scene_set)
    return language, scene, draw_value(st.sampled_from(scenes._make_captions(scene, language, rng, scene_set)))


def change_fact(caption: str, kind: str, old: str, new: str, language: str) -> str:
    """The caption with the word for one of its facts replaced; of a group, "plural" is its noun."""
    word = max((word for word in WORDS[language][kind][old] if word in caption), key=len)
    return caption.replace(word, WORDS[language][kind][new][0], 1)


def stated(mentions: tuple, kind: str) -> list[str | None]:
    return [mention.stated(kind) for mention in mentions]


def false_changes(scene: Scene, caption: str, language: str) -> list[tuple[str, str, str]]:
    """Every (kind, stated value, other value) whose replacement makes the caption false."""
    claim = parse(caption, language)
    colours = {object.colour for object in scene.objects}
    shapes = {object.shape for object in scene.objects}
    kinds = {"background": BACKGROUNDS, "count": WORDS[language]["count"], "relation": DIRECTIONS}
    changes = [(kind, claim.stated(kind), other) for kind, values in kinds.items() for other in values]
    noun = "plural" if scene.is_group else "shape"
    for mention in claim.mentions:
        changes += [("colour", mention.stated("colour"), other) for other in COLOURS if other not in colours]
        changes += [("count", mention.stated("count"), other) for other in WORDS[language]["count"]]
        changes += [(noun, mention.stated("shape"), other) for other in SHAPES if other not in shapes]
        if set(stated(claim.mentions, "size")) == {mention.stated("size")}:  # else "big" may belong to another mention
            changes += [("size", mention.stated("size"), other) for other in ("big", "small")]
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
        ("en", "two stars on the grass", False),
        ("en", "there are two circles on the grass", False),
        ("en", "a star between a circle and a square on the grass", False),  # there is no square
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


@pytest.mark.parametrize(
    "language, scene, caption, true",
    [
        ("en", ROW, "a white, small square between a circle and a blue, small star in the sky", True),
        ("en", ROW, "in the sky, a square is between a star and a circle", True),  # either order
        ("en", ROW, "in the sky, a circle is between a square and a star", False),
        ("en", ROW, "a square between a circle and a circle in the sky", False),
        ("en", ROW, "a square to the left of a star in the sky", True),
        ("zh", ROW, "天空里，一个白色的小正方形在一个圆形和一颗蓝色的小星星之间", True),
        ("zh", ROW, "天空里有一个正方形，在一颗星星和一个圆形之间", True),
        ("zh", ROW, "天空里，一颗星星在一个圆形和一个正方形之间", False),
        ("zh", ROW, "天空里，一个正方形在一个圆形之间", False),
        ("en", GROUP, "three blue, small stars on the sand", True),
        ("en", GROUP, "there are three stars on the sand", True),
        ("en", GROUP, "two stars on the sand", False),  # there are three: a count is exact
        ("en", GROUP, "four blue, small stars on the sand", False),
        ("en", GROUP, "three red, small stars on the sand", False),
        ("en", GROUP, "a star on the sand", True),
        ("en", GROUP, "three star on the sand", False),
        ("en", GROUP, "five stars on the sand", False),
        ("zh", GROUP, "沙滩上有三颗蓝色的小星星", True),
        ("zh", GROUP, "三颗星星在沙滩上", True),
        ("zh", GROUP, "两颗星星在沙滩上", False),
        ("zh", GROUP, "沙滩上有三颗蓝色的大星星", False),
        ("zh", GROUP, "沙滩上有三颗", False),
    ],
)
def test_rows_and_groups_are_judged_as_people_do(language, scene, caption, true):
    assert is_true(caption, scene, language) is true


def test_each_statement_is_judged_alone():
    statements = judge("a red, big star to the right of a blue, small star on the sand", PAIR, "en")
    judged = {(s.kind, s.fact.value): s.is_true for s in statements if s.kind != "shape"}
    assert judged == {
        ("background", "sand"): False,
        ("relation", "right"): False,
        ("colour", "red"): True,
        ("size", "big"): True,
        ("combination", "red star"): False,
        ("colour", "blue"): True,
        ("size", "small"): True,
        ("combination", "blue star"): True,
    }
    assert [s.is_true for s in statements if s.kind == "shape"] == [False, True]
    assert judge("a star star", PAIR, "en") is None


def test_the_count_of_a_group_is_judged_apart_from_its_colour():
    statements = judge("three red, small stars on the sand", GROUP, "en")
    false = {statement.kind for statement in statements if not statement.is_true}
    assert false == {"colour", "combination"}


def test_more_mentions_than_objects_are_false_statements():
    statements = judge("a circle and a star on the grass", Scene("grass", (RED,)), "en")
    assert sorted((s.kind, s.is_true) for s in statements) == [("background", True), ("shape", False), ("shape", True)]


def test_the_words_of_a_statement_are_found():
    words = "A circle to the left of a blue, small star, on the grass.".split()
    found = {s.kind: [words[i] for i in scenes.words_of(s.fact, words, "en")] for s in judge(words, PAIR, "en")}
    assert found["background"] == ["on", "the", "grass."]
    assert found["relation"] == ["to", "the", "left", "of"]
    assert found["combination"] == ["blue,", "small", "star,"]
    joined = ["草地", "上", "有", "一颗", "蓝色", "的", "小星星"]  # jieba joins size and noun
    found = {s.kind: [joined[i] for i in scenes.words_of(s.fact, joined, "zh")] for s in judge(joined, PAIR, "zh")}
    assert found["background"] == ["草地", "上"]
    assert found["size"] == found["shape"] == ["小星星"]


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
    nouns = {shape: (*words, *WORDS[language]["plural"][shape]) for shape, words in WORDS[language]["shape"].items()}
    for record in records:
        boxes = {object.box: object.shape for object in scenes_by_id[record.id].objects}
        for caption in record.captions:
            words = words_of(caption, language)
            named = named_objects(words, scenes_by_id[record.id], language)
            assert len(named) == len(parse(words, language).mentions)
            assert all(words[word].endswith(nouns[boxes[box]]) for word, found in named for box in found)
            assert len({box for _, found in named for box in found}) == len(boxes)
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
    scene = random_scene("train", random.Random(seed), "relations")
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
    scene = random_scene(split, random.Random(seed), "relations")
    inside = [value for object in scene.objects for value in object.box]
    assert 1 <= len(scene.objects) <= 4 and 0 < min(inside) and max(inside) < 1
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


def test_objects_are_named_in_the_order_of_the_scene(drawn):
    language, records, scenes_by_id = drawn
    for record in records:
        objects = scenes_by_id[record.id].objects
        assert len(objects) != 2 or scenes_by_id[record.id].is_group or objects[0].size == "big"
        for caption in record.captions:
            mentions = sorted(parse(caption, language).mentions, key=lambda mention: mention.facts["shape"].start)
            assert all(map(type(mentions[0]).matches, mentions, objects))


def test_captions_state_a_relation_where_it_is_clear_and_only_there(drawn):
    language, records, scenes_by_id = drawn
    kinds = Counter()
    for record in records:
        kind = scenes._kind_of_sentence(scenes_by_id[record.id])
        kinds[kind] += 1
        for caption in record.captions:
            claim = parse(caption, language)
            relations = {"relation", "between"}
            assert relations & claim.facts.keys() == relations & {kind}
    assert min(kinds[kind] for kind in ("one", "two", "relation", "between", "group")) >= 5


@pytest.mark.parametrize("language, digest", SIMPLE_DIGESTS.items())
def test_the_simple_set_is_drawn_as_ever_so_that_published_figures_remain_true_of_it(language, digest):
    drawn_scenes = []
    for id in (f"{split}-0-{number:05}" for split in ("train", "val", "test") for number in range(20)):
        scene = random_scene(id.partition("-")[0], random.Random(f"{id} scene"))
        captions = scenes._make_captions(scene, language, random.Random(f"{id} {language}"))
        drawn_scenes.append((scenes._scene_to_dict(scene), captions))
    assert hashlib.sha256(repr(drawn_scenes).encode()).hexdigest() == digest
    first = random_scene("train", random.Random("train-0-00000 scene"))
    pixels = np.asarray(draw(first, random.Random("train-0-00000 texture")), int)
    expected = [(95, 168, 231), (136, 68, 186), (146, 200, 242)]  # other versions of Pillow may round otherwise
    assert np.abs(pixels[(20, 64, 100), (20, 64, 100)] - expected).max() <= 2


def test_simple_scenes_have_one_or_two_objects_and_half_of_their_captions_of_two_state_the_relation():
    rng = random.Random(0)
    simple = [random_scene("train", rng) for _ in range(200)]
    counts = Counter(len(scene.objects) for scene in simple)
    assert set(counts) == {1, 2} and 70 < counts[1] < 130
    claims = [parse(caption, "zh") for scene in simple for caption in scenes._make_captions(scene, "zh", rng)]
    related = [claim.stated("relation") is not None for claim in claims if len(claim.mentions) == 2]
    assert 0.4 < np.mean(related) < 0.6
    assert NEW_COMBINATIONS & frozenset().union(*(scene.combinations for scene in simple))


def test_every_number_of_shapes_that_are_alike_is_equally_frequent():
    rng = random.Random(0)
    drawn_scenes = [random_scene("train", rng, "relations") for _ in range(600)]
    counts = Counter(len(scene.objects) for scene in drawn_scenes if scene.is_group)
    assert set(counts) == {2, 3, 4} and all(24 < number < 56 for number in counts.values())  # 40 are expected


def test_new_combinations_are_in_some_test_scenes_and_in_no_others():
    rng = random.Random(0)
    for split in ("train", "val", "test"):
        drawn_scenes = [random_scene(split, rng, "relations") for _ in range(40)]
        new = [bool(scene.combinations & NEW_COMBINATIONS) for scene in drawn_scenes]
        assert 3 <= sum(new) <= 25 if split == "test" else not any(new)
    known = {(colour, shape) for colour in COLOURS for shape in SHAPES} - NEW_COMBINATIONS
    assert {colour for colour, _ in known} == set(COLOURS) and {shape for _, shape in known} == set(SHAPES)


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
