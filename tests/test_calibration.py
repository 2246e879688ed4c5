"""How far to trust a caption: its calibrated probability, the evidence of its words, and the choice among several."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import train
from captioning import calibrate
from captioning.captioner import Captioner
from captioning.decoders import DECODERS
from captioning.encoders.grid import Grid
from captioning.errors import UserError
from captioning.evaluation.calibration import (
    Examples,
    HeldOut,
    calibration_error,
    cross_fit,
    paired_gain,
    perfect_calibration_error,
    reliability,
    risk_coverage,
)
from captioning.evaluation.candidates import feature_names
from captioning.evaluation.consensus import NGramWeights, mean_with_others
from captioning.evaluation.logistic import LogisticModel
from captioning.evaluation.ngrams import known_ngrams
from captioning.features.feature_reader import FeatureReader
from captioning.runtime.checkpoint import load_checkpoint
from captioning.search.beam_search import beam_search
from captioning.search.forced import forced_log_probabilities
from captioning.search.options import SearchOptions
from config import Calibrate, Generate, Train
from preprocess.captions import CAPTIONS_FILE, Photo, read_captions, write_captions
from preprocess.drawing import Scene, SceneObject
from preprocess.scenes import is_true
from preprocess.vocabulary import VOCABULARY_FILE
from tests.small import QUICK, same

# without the length penalty, runs of so few epochs return empty captions
SEARCH = SearchOptions(beam_size=4, max_length=6, length_penalty=9.0)


# ---- the log-probability of given words


@pytest.mark.parametrize("run", DECODERS)
def test_forced_words_have_the_log_probabilities_of_the_search_that_found_them(here, run):
    captioner = Captioner.load(f"checkpoints/{run}", "cpu", "float32")
    reader = FeatureReader(Path("data/small/features.h5"))
    grid = (reader.read if captioner.decoder.uses_attention else reader.read_pooled)(np.arange(3))
    grid = grid.to(torch.device("cpu"), torch.float32)
    found = beam_search(captioner.decoder, grid, SearchOptions(4, 6, num_captions=4))
    words = [[caption.words for caption in captions][: 4 - photo] for photo, captions in enumerate(found)]
    forced = forced_log_probabilities(captioner.decoder, grid, words)
    assert [[len(values) for values in photo] for photo in forced] == [[len(w) + 1 for w in photo] for photo in words]
    for captions, photo in zip(found, forced, strict=True):
        for caption, values in zip(captions, photo, strict=False):
            if caption.finished:
                assert values.sum() == pytest.approx(caption.log_probability, abs=1e-4)
    one = grid.select(torch.tensor([1]))  # one photo for all captions
    alone = forced_log_probabilities(captioner.decoder, one, words)
    np.testing.assert_allclose(alone[1][0], forced[1][0], atol=1e-5)


# ---- agreement of captions


def simple_cider(candidate, reference, document_frequency, photos):
    """CIDEr-D with one reference, as its paper writes it."""
    total = 0.0
    for order in range(1, 5):
        vectors = []
        for words in (candidate, reference):
            counts = Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))
            weights = {g: n * math.log(photos / max(1, document_frequency[g])) for g, n in counts.items()}
            vectors.append(weights)
        first, second = vectors
        norm = math.sqrt(sum(w * w for w in first.values()) * sum(w * w for w in second.values()))
        product = sum(min(first[g], second[g]) * second[g] for g in first if g in second)
        total += product / norm if norm else 0.0
    return 10 * total / 4 * math.exp(-((len(candidate) - len(reference)) ** 2) / 72)


def test_agreement_is_the_cider_d_of_every_pair_with_the_document_frequencies_of_train():
    rng = np.random.default_rng(0)
    train_captions = [[rng.integers(4, 9, rng.integers(1, 7)).tolist() for _ in range(2)] for _ in range(12)]
    flat = [caption for photo in train_captions for caption in photo]
    frequency = Counter()
    for photo in train_captions:
        grams = {tuple(c[i : i + n]) for c in photo for n in range(1, 5) for i in range(len(c) - n + 1)}
        frequency.update(grams)
    lengths = np.array([len(caption) for caption in flat])
    weights = NGramWeights(known_ngrams(np.concatenate(flat), lengths, np.arange(12).repeat(2), 12, min_photos=2))
    weights = NGramWeights.from_dict(weights.to_dict())
    captions = [[rng.integers(4, 11, rng.integers(0, 7)).tolist() for _ in range(count)] for count in (3, 1, 4)]
    for matrix, photo in zip(weights.agreement(captions), captions, strict=True):
        expected = [[simple_cider(one, other, frequency, 12) for other in photo] for one in photo]
        np.testing.assert_allclose(matrix, expected, atol=1e-12)
        for row, caption in enumerate(photo):
            others = [expected[row][k] for k in range(len(photo)) if k != row]
            assert mean_with_others(matrix)[row] == pytest.approx(np.mean(others) if others else 0.0), caption
    assert weights.rarity([5, 99]).tolist() == pytest.approx([math.log(12 / frequency[(5,)]), math.log(12)])


# ---- the numbers


def make_held_out(photos=1000, seed=0):
    rng = np.random.default_rng(seed)
    probability = rng.random(photos)
    good = rng.random(photos) < probability
    return HeldOut(probability, good, good + rng.random(photos))


def test_the_logistic_fit_is_the_maximum_of_its_penalised_likelihood():
    rng = np.random.default_rng(0)
    features = np.column_stack([rng.normal(3, 2, 200), rng.normal(size=200), np.full(200, 7.0)])
    events = rng.random(200) < 1 / (1 + np.exp(-(features[:, 0] - 3)))
    model = LogisticModel.fit(features, events)

    def objective(weights, bias):
        p = LogisticModel(model.mean, model.scale, weights, bias).predict(features)
        return -np.log(np.where(events, p, 1 - p)).sum() + 0.5 * (weights**2).sum()

    best = objective(model.weights, model.bias)
    for direction in np.eye(4):
        for step in (-1e-3, 1e-3):
            assert objective(model.weights + step * direction[:3], model.bias + step * direction[3]) > best - 1e-9
    assert LogisticModel.from_dict(model.to_dict()).predict(features).tolist() == model.predict(features).tolist()
    separable = LogisticModel.fit(np.array([[-1.0], [1.0]]), np.array([False, True]))
    assert np.isfinite(separable.weights).all()


def test_right_probabilities_have_the_calibration_error_of_chance_and_wrong_ones_more():
    held_out = make_held_out()
    chance = perfect_calibration_error(held_out.probability)
    assert 0 < chance < 0.05
    assert calibration_error(held_out.probability, held_out.good) < 2 * chance
    assert calibration_error(np.full(4, 0.5), np.array([True, True, True, False]), 1) == pytest.approx(0.25)
    assert calibration_error(held_out.probability**3, held_out.good) > 5 * chance
    groups = reliability(held_out)
    assert ((groups.interval[0] <= groups.observed) & (groups.observed <= groups.interval[1])).all()
    assert ((groups.interval[0] <= groups.predicted) & (groups.predicted <= groups.interval[1])).mean() >= 0.8
    few = reliability(make_held_out(30))
    assert (few.interval[1] - few.interval[0]).mean() > 3 * (groups.interval[1] - groups.interval[0]).mean()


def test_the_most_probable_captions_are_better_and_the_intervals_contain_the_truth():
    held_out = make_held_out(300)
    values, interval = risk_coverage(held_out, np.array([0.2, 0.5, 1.0]))
    assert values[0] > values[1] > values[2] == pytest.approx(held_out.cider.mean())
    assert (interval[0] < values).all() and (values < interval[1]).all()
    gain, (low, high) = paired_gain(held_out._replace(cider=held_out.cider + 0.1), held_out)
    assert gain == pytest.approx(0.1) and low == pytest.approx(0.1) and high == pytest.approx(0.1)


# ---- a calibrated run


@pytest.fixture(scope="module")
def calibrated(small_runs, tmp_path_factory):
    """A folder with data/val, in which 16 of the 24 photos are val, and checkpoints/NAME of two calibrated runs."""
    folder = tmp_path_factory.mktemp("calibrated")
    data = folder / "data" / "val"
    data.mkdir(parents=True)
    small = small_runs / "data" / "small"
    for name in (VOCABULARY_FILE, "features.h5", "features.encoder.pt"):
        shutil.copy(small / name, data / name)
    photos = []
    for i, photo in enumerate(read_captions(small)):
        # what these runs say of every photo is good for half of them
        further = ("a", *["square"] * (5 if i % 2 else 1))
        split = "train" if i % 3 == 0 else "val"
        photos.append(replace(photo, split=split, captions=(*photo.captions, further)))
    write_captions(data / CAPTIONS_FILE, photos)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for run in ("attention", "lstm"):
            shutil.copytree(small_runs / "checkpoints" / run, folder / "checkpoints" / run)
            search = replace(SEARCH, samples=3 * (run == "lstm"))
            calibrate.work(
                Calibrate(Path("checkpoints", run), Path("data/val"), good="50", search=search, device="cpu")
            )
    return folder


@pytest.fixture
def there(calibrated, monkeypatch):
    monkeypatch.chdir(calibrated)
    return calibrated


def make_config(**settings):
    settings = {"data": Path("data/val"), "search": SEARCH, "device": "cpu", **settings}
    return Generate(Path("checkpoints/attention"), **settings)


def test_a_calibration_changes_nothing_else_in_the_checkpoint(there, small_runs):
    before = load_checkpoint(small_runs / "checkpoints" / "attention")
    after = load_checkpoint(Path("checkpoints/attention"))
    assert after.keys() - before.keys() == {"calibration"}
    assert same(before["decoder"]["state"], after["decoder"]["state"])
    reader = FeatureReader(Path("data/val/features.h5"))
    rows = reader.rows_of(photo.id for photo in read_captions(Path("data/val")) if photo.split == "train")
    mean = reader.read(rows).cells.float().mean(0)
    torch.testing.assert_close(after["calibration"]["mean_photo"].flatten(0, 1), mean)
    held_out = after["calibration"]["held_out"]["log-probability"]
    assert all(len(values) == 16 for values in held_out.values())


def test_generate_writes_probabilities_and_the_evidence_of_each_word(there, tmp_path):
    outputs = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "html")}
    generate.main(make_config(**outputs))
    entries = json.loads(outputs["json"].read_text())
    assert len(entries) == 16
    for entry in entries:
        assert 0 < entry["probability"] < 1
        assert len(entry["evidence"]) == len(entry["words"])
    with open(outputs["csv"], encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["probability"]) for row in rows] == [entry["probability"] for entry in entries]
    page = outputs["html"].read_text("utf-8")
    assert "<p>Pale words come from habit" in page
    assert page.count(" · probability ") == 16 and page.count("opacity:") == sum(len(e["words"]) for e in entries)


def test_doubtful_captions_come_first_or_are_left_out(there, tmp_path, capsys):
    generate.main(make_config(sort="least-certain", json=tmp_path / "sorted.json"))
    sorted_entries = json.loads((tmp_path / "sorted.json").read_text())
    probabilities = [entry["probability"] for entry in sorted_entries]
    assert probabilities == sorted(probabilities) and len(set(probabilities)) > 1
    capsys.readouterr()
    generate.main(make_config(sort="least-certain", min_probability=probabilities[4] + 1e-4))
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("left out ") and last.endswith(f"below --min-probability {probabilities[4] + 1e-4}")
    assert len(lines) == 16 - int(last.split()[2]) and int(last.split()[2]) >= 5
    with pytest.raises(UserError, match=r"--min-probability 1.0: the highest of 16 captions is 0\.\d\d; give less"):
        generate.main(make_config(min_probability=1.0))


@pytest.mark.parametrize("choice", ["consensus", "probability"])
def test_the_chosen_caption_is_the_best_of_all_that_were_found(there, choice):
    captioner = Captioner.load("checkpoints/lstm", "cpu", "float32")
    calibration = captioner.calibration
    search = replace(SEARCH, samples=3, choose=choice, num_captions=2)
    grid = FeatureReader(Path("data/val/features.h5")).read_pooled(np.arange(5))
    torch.manual_seed(3)
    candidates = captioner.find_candidates([grid], search, calibration.mean_photo, calibration.weights)
    torch.manual_seed(3)
    results = captioner.caption_grid(grid, search)
    for photo, result in zip(candidates, results, strict=True):
        if choice == "consensus":  # the expectation, over distinct captions, written out
            number = {tuple(caption.words): index for index, caption in enumerate(photo.captions)}
            values = sum(math.exp(photo.log_probabilities[i].sum()) * photo.agreement[:, i] for i in number.values())
        else:
            values = calibration.ranker.predict(photo.features())
        best = photo.captions[int(values.argmax())]
        assert result.words == captioner.vocabulary.decode(best.words)
        assert result.probability is not None and len(result.others) == 1
        assert result.others[0].words != result.words


def test_a_sampled_caption_with_the_words_of_another_counts_once(there, monkeypatch):
    captioner = Captioner.load("checkpoints/lstm", "cpu", "float32")
    search = replace(SEARCH, samples=3, choose="consensus", num_captions=2)
    grid = FeatureReader(Path("data/val/features.h5")).read_pooled(np.arange(1))
    calibration = captioner.calibration
    (photo,) = captioner.find_candidates([grid], search, calibration.mean_photo, calibration.weights)
    expected = photo.expected_agreement()
    order = [*range(len(expected)), int(expected.argmax())]
    repeated = replace(
        photo,
        captions=[photo.captions[index] for index in order],
        log_probabilities=[photo.log_probabilities[index] for index in order],
        evidence=[photo.evidence[index] for index in order],
        agreement=photo.agreement[np.ix_(order, order)],
        rarity=photo.rarity[order],
    )
    np.testing.assert_allclose(repeated.expected_agreement(), expected[order])
    monkeypatch.setattr(captioner, "find_candidates", lambda *_: [repeated])
    (result,) = captioner.caption_grid(grid, search)
    assert result.others[0].words != result.words


def test_a_word_is_no_likelier_before_the_mean_photo_than_before_itself(there):
    captioner = Captioner.load("checkpoints/attention", "cpu", "float32")
    mean = captioner.calibration.mean_photo
    pooling = FeatureReader(Path("data/val/features.h5")).pooling(False)
    result = captioner.caption_grid(Grid(mean.reshape(1, -1, mean.shape[2]), pooling), SEARCH)[0]
    np.testing.assert_allclose(result.evidence, 0, atol=1e-5)


def test_views_that_disagree_are_a_feature(there):
    captioner = Captioner.load("checkpoints/attention", "cpu", "float32")
    calibration = captioner.calibration
    grid = FeatureReader(Path("data/val/features.h5")).read(np.arange(3))
    for other, disagree in ((grid, False), (grid.select(torch.tensor([2, 0, 1])), True)):
        found = captioner.find_candidates([grid, other], SEARCH, calibration.mean_photo, calibration.weights)
        for candidates in found:
            features = candidates.features()
            assert features.shape[1] == len(feature_names(samples=0, views=2))
            assert (features[:, -1].max() > 1e-3) == disagree
    result = captioner.caption_views([grid, grid], SEARCH)[0]
    assert result.evidence is not None and result.probability is None


def test_the_caption_does_not_depend_on_whether_it_is_judged(there):
    grid = FeatureReader(Path("data/val/features.h5")).read(np.arange(6))
    judged = Captioner.load("checkpoints/attention", "cpu", "float32").caption_grid(grid, SEARCH)
    plain = Captioner.load("checkpoints/attention", "cpu", "float32", trust=False).caption_grid(grid, SEARCH)
    assert [one.words for one in judged] == [one.words for one in plain]
    assert all(one.probability is None and one.evidence is None for one in plain)


def test_a_photos_probability_does_not_depend_on_its_own_references(there):
    captioner = Captioner.load("checkpoints/attention", "cpu", "float32")
    calibration = captioner.calibration
    grid = FeatureReader(Path("data/val/features.h5")).read(np.arange(16))
    candidates = captioner.find_candidates([grid], SEARCH, calibration.mean_photo, calibration.weights)
    ciders = [np.full(len(photo.captions), number % 3 / 2) for number, photo in enumerate(candidates)]
    before = cross_fit(Examples.of(candidates, ciders), 0.5)
    assert before["log-probability"].cider.tolist() == [of_photo[0] for of_photo in ciders]
    changed = [*ciders]
    changed[5] = 1 - ciders[5]
    after = cross_fit(Examples.of(candidates, changed), 0.5)
    for choice in before:
        assert before[choice].probability[5] == after[choice].probability[5]
        assert (before[choice].probability != after[choice].probability).any()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sort": "least-certain"}, "--sort: checkpoints/lstm is not calibrated; run: python -m captioning.calibrate"),
        ({"search": SearchOptions(choose="consensus")}, "--choose: checkpoints/lstm is not calibrated"),
        ({"min_probability": 0.5}, "--min-probability: checkpoints/lstm is not calibrated"),
    ],
)
def test_a_run_without_calibration_says_how_to_make_it(here, settings, message):
    with pytest.raises(UserError, match=message):
        generate.main(Generate(Path("checkpoints/lstm"), data=Path("data/small"), device="cpu", **settings))


def test_settings_that_were_not_calibrated_give_no_probability(there, capsys, tmp_path):
    other = replace(SEARCH, beam_size=2)
    generate.main(make_config(search=other, limit=2, json=tmp_path / "out.json"))
    assert "no probabilities: the run was calibrated with --beam-size 4\n" in capsys.readouterr().out
    entries = json.loads((tmp_path / "out.json").read_text())
    assert all("evidence" in entry and "probability" not in entry for entry in entries)
    with pytest.raises(UserError, match="--sort: the run was calibrated with --beam-size 4; give the same settings"):
        generate.main(make_config(search=other, sort="least-certain"))


def change_photos(change):
    return [changed for photo in read_captions(Path("data/val")) if (changed := change(photo))]


@pytest.mark.parametrize(
    "change, good, message",
    [
        (lambda p: p if p.split == "train" or p.id in ("photo1", "photo2") else None, "3", "2 val photos are too few"),
        (lambda p: replace(p, captions=p.captions[:1]), "people", "one caption, so people's captions cannot be compa"),
        (lambda p: p, "1000", r"none of the 16 captions have a CIDEr-D of 1000.0 or more; give another --good"),
    ],
)
def test_val_photos_that_cannot_calibrate_are_one_line(there, tmp_path, change, good, message):
    shutil.copytree("data/val", tmp_path / "data")
    write_captions(tmp_path / "data" / CAPTIONS_FILE, change_photos(change))
    config = Calibrate(
        Path("checkpoints/attention"),
        tmp_path / "data",
        (Path("data/val/features.h5"),),
        good,
        SEARCH,
        allow_missing=1.0,
        device="cpu",
    )
    with pytest.raises(UserError, match=message):
        calibrate.main(config)


def test_another_data_set_is_refused(there, tmp_path):
    shutil.copytree("data/val", tmp_path / "data")
    vocabulary = json.loads((tmp_path / "data" / VOCABULARY_FILE).read_text())
    vocabulary["words"][-1] = "another"
    (tmp_path / "data" / VOCABULARY_FILE).write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match="has another vocabulary than checkpoints/attention, which was trained on data"):
        calibrate.main(Calibrate(Path("checkpoints/attention"), tmp_path / "data", device="cpu"))


def test_train_calibrates_at_its_end(there, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "check_examples", lambda *_: None)  # after one epoch all captions may be bad
    settings = {**QUICK, "epochs": 1, "preview_photos": 0, "max_length": 6}
    train.work(Train(Path("data/val"), "at-the-end", decoder="lstm", calibrate=True, **settings))
    assert "best.pt: calibrated on 16 photos of data/val" in capsys.readouterr().out
    assert "calibration" in load_checkpoint(Path("checkpoints/at-the-end"))


# ---- the benchmarks


def bench(name):
    """The module bench/NAME.py."""
    path = Path(__file__).parents[1] / "bench" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_planted_lie_is_false_and_the_kinds_of_words_are_told_apart():
    evidence = bench("evidence")
    words = {"zh": "草地 上 有 一个 红色 的 小 圆形 小星星 左边", "en": "a red , small circle on the grass left two"}
    kinds = {language: [evidence.kind_of(word, language) for word in line.split()] for language, line in words.items()}
    zh = ["background", *["function"] * 3, "colour", "function", "size", "shape", "shape", "relation"]
    assert kinds["zh"] == zh
    assert kinds["en"] == "function colour function size shape function function background relation count".split()
    box = (0.1, 0.1, 0.5, 0.5)
    scenes = {
        "0": Scene("grass", (SceneObject("circle", "red", "big", box),)),
        "1": Scene("sky", (SceneObject("star", "blue", "big", box),)),
    }
    photos = [
        Photo(f"{id}.png", id, "test", (tuple(f"a {colour} , big {shape} {where}".split()), ("a", "circle")))
        for id, colour, shape, where in (("0", "red", "circle", "on the grass"), ("1", "blue", "star", "in the sky"))
    ]
    for photo, colour in zip(photos, ("blue", "red"), strict=True):
        assert is_true(photo.captions[0], scenes[photo.id], "en")
        ((lie, place),) = evidence.plant_lie(photo, photos, scenes, "en")
        assert lie[place] == colour and not is_true(lie, scenes[photo.id], "en")


def test_the_curves_are_drawn(tmp_path, times):
    if times(True, False):
        pytest.skip("at full length only: matplotlib takes seconds to load")
    calibration = bench("calibration")
    calibration.draw({"one": make_held_out(60), "other": make_held_out(40)}, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (1210, 506)
