"""python -m captioning.truth: shares of true statements by kind, their intervals, attention, evidence, probability."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from captioning import truth
from captioning.caption import CaptionResult
from captioning.errors import UserError
from captioning.evaluation.statements import JudgedCaption, Share, report
from config import Preprocess, Truth
from preprocess.__main__ import main as preprocess
from preprocess.captions import Photo
from preprocess.drawing import Scene, SceneObject

CIRCLE = SceneObject("circle", "red", "big", (0.1, 0.3, 0.46, 0.66))
STAR = SceneObject("star", "blue", "small", (0.7, 0.35, 0.95, 0.6))
NEW_STAR = SceneObject("star", "red", "small", (0.7, 0.35, 0.95, 0.6))
PAIR, NEW = Scene("grass", (CIRCLE, STAR)), Scene("grass", (NEW_STAR,))
KNOWN = CIRCLE.combination, STAR.combination
PEOPLE = ("a circle to the left of a star on the grass", "on the grass, a circle is to the left of a blue, small star")


def judged(text: str, scene: Scene = PAIR, people: tuple[str, ...] = PEOPLE, **result: object) -> JudgedCaption:
    photo = Photo("photo.png", "photo", "test", tuple(tuple(caption.split()) for caption in people))
    return JudgedCaption.judge(photo, scene, CaptionResult(text, text.split(), **result), "en", frozenset(KNOWN))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "en"
    preprocess(Preprocess(folder, scenes=12, scene_set="relations", language="en", min_count=1, workers=1))
    return folder


@pytest.mark.parametrize("true, total", [(0, 5), (5, 5), (3, 7), (190, 200)])
def test_the_ends_of_an_interval_are_the_probabilities_that_are_196_deviations_away(true, total):
    for end in Share(true, total).interval:
        assert abs(true / total - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / total), abs=1e-9)


def test_statements_are_counted_by_kind_and_new_combinations_apart():
    rows = report(
        [
            judged("a red, big circle to the right of a blue, small star on the grass"),
            judged("a circle and a star on the sand"),
            judged("a blue, small star on the grass", NEW),
            judged("a red, small star on the grass", NEW),
            judged("circle circle"),
        ]
    ).rows
    assert rows["captions"].known == Share(0, 3) and rows["captions"].new == Share(1, 2)
    assert rows["that state a relation"].known == Share(0, 1)
    assert rows["relation"].known == Share(0, 1)
    assert rows["background"].known == Share(1, 2) and rows["background"].new == Share(2, 2)
    assert rows["colour"].known == Share(2, 2) and rows["colour"].new == Share(1, 2)
    assert rows["combination"].known == Share(2, 2) and rows["combination"].new == Share(1, 2)
    assert rows["shape"].known == Share(4, 4)
    assert rows["count"].known == rows["between"].known == Share(0, 0)
    assert rows["relation"].stated == Share(1, 5) and rows["relation"].stated_by_people == Share(10, 10)


def test_a_combination_is_new_by_its_own_object_and_not_by_its_scene():
    scene = Scene("grass", (CIRCLE, NEW_STAR))
    rows = report([judged("a red, big circle and a blue, small star on the grass", scene)]).rows
    assert rows["combination"].known == Share(1, 1) and rows["combination"].new == Share(0, 1)


def test_captions_that_are_no_sentences_are_false_and_counted():
    counted = report([judged("a circle on the grass"), judged("a circle a circle")])
    assert counted.unreadable == 1 and counted.rows["captions"].known == Share(1, 2)
    assert "captions that match no template and count as false: 1" in str(counted)


def test_the_peak_of_attention_is_compared_with_the_box_of_the_named_object():
    attention = torch.zeros(5, 196)
    attention[1, 6 * 14 + 3] = 1  # inside the circle
    on, off = judged("a circle on the grass", attention=attention), judged("a star on the grass", attention=attention)
    counted = report([on, off])
    assert counted.peaks == Share(1, 2)
    assert counted.peaks_by_chance == pytest.approx((0.36**2 + 0.25**2) / 2)
    assert report([judged("a circle on the grass")]).peaks_by_chance is None  # a decoder without attention


def test_the_evidence_of_a_statement_is_the_sum_over_its_words_and_false_ones_are_left_out():
    evidence = [0.0, 3.0, 0.5, 0.25, 1.0]
    counted = report(
        [judged("a circle on the grass", evidence=evidence), judged("a star on the sand", evidence=evidence)]
    )
    assert counted.evidence == {"background": [1.75], "shape": [3.0, 3.0]}
    assert "background +1.75, shape +3.00" in str(counted)


def test_the_probability_is_judged_by_the_pairs_that_it_ranks_right():
    captions = [judged("a circle on the grass", probability=p) for p in (0.9, 0.5)]
    captions += [judged("a circle on the sand", probability=p) for p in (0.5, 0.1)]
    assert report(captions).ranked_right == pytest.approx(3.5 / 4)
    assert report(captions[:2]).ranked_right is None  # nothing false to compare with


def test_peoples_own_captions_are_all_true_and_state_what_people_state(scenes):
    photos = {photo.image: photo for photo in truth.read_captions(scenes)}

    def caption(paths, search):
        return [CaptionResult("", list(photos[path].captions[0])) for path in paths]

    captioner = SimpleNamespace(vocabulary=SimpleNamespace(language="en"), caption=caption)
    rows = report(truth.judge_run(captioner, scenes, "train")).rows
    assert rows["captions"].known == Share(10, 10)
    for kind in ("relation", "between"):
        assert rows[kind].stated.value == rows[kind].stated_by_people.value
    captioner.vocabulary.language = "zh"
    with pytest.raises(UserError, match="another language"):
        truth.judge_run(captioner, scenes)


def test_the_command_judges_any_run_and_writes_the_figures(here, scenes, tmp_path, capsys):
    truth.main(Truth(Path("checkpoints/attention"), scenes, "val", json=tmp_path / "truth.json", device="cpu"))
    printed = capsys.readouterr().out
    assert "1 scenes of" in printed and "python -m captioning.calibrate checkpoints/attention" in printed
    figures = json.loads((tmp_path / "truth.json").read_text())
    captions = figures["rows"]["captions"]
    assert captions["known"]["total"] + captions["new"]["total"] == 1


def test_other_data_sets_are_refused_in_one_line(here):
    with pytest.raises(UserError, match="scenes.json: no such file; draw scenes"):
        truth.main(Truth(Path("checkpoints/attention"), device="cpu"))
