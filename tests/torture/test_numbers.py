"""Extreme numbers: non-finite values, and data sets of one or very many items. The correct result, or one line."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import extract_features
import generate
import train
from captioning.decoders import DECODERS
from captioning.errors import UserError
from captioning.evaluation.metrics import METRICS
from captioning.features.feature_reader import FeatureReader
from captioning.runtime.checkpoint import load_checkpoint
from captioning.training.trainer import Trainer
from config import ExtractFeatures, Generate, Preprocess, Train
from preprocess.__main__ import main as preprocess
from tests.small import TINY, log_of
from tests.torture.annotations import ai_challenger

DATA = Path("data/small")
OBJECTIVES = ("cross-entropy", "cider")
NON_FINITE = [np.nan, np.inf, -np.inf]


def refusal(work, config):
    with pytest.raises(UserError) as error:
        work(config)
    assert "\n" not in str(error.value) and "; " in str(error.value)
    return str(error.value)


@pytest.fixture
def broken_features(here, tmp_path):
    """broken_features(value, id): a copy of the small features in which one photo has this value everywhere."""

    def put(value, id):
        path = tmp_path / "features.h5"
        shutil.copy(DATA / "features.h5", path)
        shutil.copy(DATA / "features.encoder.pt", tmp_path)
        reader = FeatureReader(path)
        for name in ("features", "pooled"):
            block = reader.arrays[name]
            row = np.full(block.shape[1:], value, block.dtype)
            with open(path, "r+b") as file:
                file.seek(block.offset + reader.rows_of([id])[0] * block.row_bytes)
                file.write(row.tobytes())
        return path

    yield put
    shutil.rmtree("checkpoints/broken", ignore_errors=True)


def splits():
    photos = [json.loads(line) for line in (DATA / "captions.jsonl").read_text("utf-8").splitlines()]
    return {split: [photo["id"] for photo in photos if photo["split"] == split] for split in ("train", "val")}


@pytest.fixture
def value(request, decoder, times):
    """In the suite, each decoder meets one value, and each value several decoders. Under --torture, each meets all."""
    if request.param is not NON_FINITE[list(DECODERS).index(decoder) % len(NON_FINITE)] and times(True, False):
        pytest.skip("long form: make torture")
    return request.param


@pytest.mark.parametrize("value", NON_FINITE, indirect=True)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_non_finite_features_stop_training_with_their_photo(value, broken_features, decoder, objective, tally):
    id = splits()["train"][3]
    start = {"objective": objective, "start_from": Path("checkpoints") / decoder} if objective == "cider" else {}
    config = Train(
        DATA,
        "broken",
        decoder=decoder,
        features=(broken_features(value, id),),
        precision="float32",
        epochs=1,
        **start,
        **TINY,
    )
    text = refusal(train.main, config)
    assert id in text and "--verify" in text
    assert not list(Path("checkpoints/broken").glob("*.pt"))
    tally("features that are not finite")


@pytest.mark.parametrize("decoder", DECODERS)
def test_non_finite_validation_features_choose_no_checkpoint(broken_features, decoder, tally):
    id = splits()["val"][0]
    config = Train(
        DATA,
        "broken",
        decoder=decoder,
        features=(broken_features(np.nan, id),),
        precision="float32",
        epochs=1,
        best_metric="loss",
        **TINY,
    )
    text = refusal(train.main, config)
    assert id in text and "--verify" in text
    assert not Path("checkpoints/broken/best.pt").exists()
    tally("features that are not finite")


@pytest.mark.parametrize("value", NON_FINITE, indirect=True)
@pytest.mark.parametrize("decoder", DECODERS)
def test_no_captions_are_written_from_non_finite_features(value, broken_features, tmp_path, decoder, tally):
    id = splits()["val"][1]
    config = Generate(
        Path("checkpoints") / decoder,
        data=DATA,
        features=(broken_features(value, id),),
        workers=0,
        precision="float32",
        json=tmp_path / "a.json",
    )
    text = refusal(generate.main, config)
    assert id in text and "--verify" in text and not (tmp_path / "a.json").exists()
    tally("features that are not finite")


def test_verify_finds_non_finite_features(broken_features, capsys):
    path = broken_features(np.nan, "photo7")
    text = refusal(extract_features.main, ExtractFeatures(DATA, out=path, verify=True))
    assert "photo7" in text and not FeatureReader(path).done()[7]


@contextlib.contextmanager
def sabotage(update, what):
    """Call `what(trainer, loss)` after that many updates of the weights."""
    with pytest.MonkeyPatch.context() as patch:
        plain, seen = Trainer.train_step, []

        def train_step(self, *arguments, **settings):
            loss = plain(self, *arguments, **settings)
            seen.append(1)
            return what(self, loss) if len(seen) == update else loss

        patch.setattr(Trainer, "train_step", train_step)
        yield


def nan_loss(trainer, loss):
    return loss._replace(objective=torch.tensor(float("nan")))


def nan_weights(trainer, loss):
    """As after a gradient that overflows although the loss is finite."""
    with torch.no_grad():
        trainer.state.parameters[0].fill_(float("nan"))
    return loss


@pytest.mark.parametrize("what", [nan_loss, nan_weights])
@pytest.mark.parametrize("moment", ["first", "middle", "last"])
def test_non_finite_values_are_never_saved_and_resume_continues_from_the_last_good_weights(here, what, moment, tally):
    setting = {**TINY, "precision": "float32"}
    updates = updates_per_epoch()
    with sabotage(updates + {"first": 1, "middle": 2, "last": updates}[moment], what):
        text = refusal(train.main, Train(DATA, "sabotaged", epochs=3, save_every=0, overwrite=True, **setting))
    assert "in epoch 2" in text and "--resume" in text
    if what is nan_loss:
        assert (
            f"at update {updates if moment == 'last' else {'first': 1, 'middle': 2}[moment]}, the photos photo" in text
        )
    for name in ("last.pt", "best.pt"):
        state = load_checkpoint(Path("checkpoints/sabotaged") / name)["decoder"]["state"]
        assert all(bool(weights.isfinite().all()) for weights in state.values())
    train.main(Train(DATA, "sabotaged", epochs=3, resume=True, **setting))
    resumed, undisturbed = (
        load_checkpoint(Path("checkpoints") / run / "last.pt")["decoder"]["state"] for run in ("sabotaged", "attention")
    )
    assert all(torch.equal(resumed[key], undisturbed[key]) for key in undisturbed)
    tally("losses and weights that are not finite")


def updates_per_epoch() -> int:
    """Read from checkpoints/attention, which was trained for three epochs with the same settings."""
    return int(load_checkpoint(Path("checkpoints/attention/last.pt"))["optimizer"]["state"][0]["step"]) // 3


# ---- data sets of extreme size


def one(_):
    return ("dog",)


def long(number):
    return ("dog", "dog cat " * 250)


def many_words(number):
    """A caption of 10,000 words that occur in no other photo."""
    return (" ".join(f"w{10_000 * number + word}" for word in range(10_000)),)


SETS = {  # number of train and of val photos, captions, --max-length
    "one photo of each, one caption of one word, five words": (1, 1, one, 52),
    "seven photos, so that one is alone in its batch": (7, 1, one, 52),
    "captions of one word and of five hundred": (4, 2, long, 500),
    "five hundred words truncated to one": (4, 2, long, 1),
    "two hundred thousand words": (20, 1, many_words, 52),
}


def data_set(folder, photos, captions):
    """Draw photos, and run preprocess and extract_features.py on them. Return the data folder."""
    (folder / "photos").mkdir()
    annotations = {}
    for split, numbers in photos.items():
        entries = []
        for number in numbers:
            pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"photos/{number}.png")
            entries += ai_challenger(f"{number}.png", captions(number))
        (folder / f"{split}.json").write_text(json.dumps(entries), "utf-8")
        annotations[split] = (folder / f"{split}.json", folder / "photos")
    preprocess(
        Preprocess(
            folder / "data",
            **annotations,
            language="en",
            tokenizer="whitespace",
            min_count=1,
            max_words=200_000,
            workers=1,
        )
    )
    extract_features.main(ExtractFeatures(folder / "data", "resnet18.layer1", "random", 32, workers=0))
    return folder / "data"


@pytest.mark.parametrize("case", SETS)
def test_all_commands_accept_a_data_set_of_extreme_size(tmp_path, monkeypatch, case, times, tally):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "captioning.evaluation.score_report.meteor_score", lambda *_: "skipped: Java takes seconds to start"
    )
    training, validation, captions, longest = SETS[case]
    if captions is many_words and times(True, False):
        training = 2  # of 10,000 words each
    data = data_set(tmp_path, {"train": range(training), "val": range(training, training + validation)}, captions)
    first = list(SETS).index(case) % len(DECODERS)
    for decoder in [*DECODERS, *DECODERS][first : first + times(1, 4)]:
        setting = dict(decoder=decoder, epochs=1, max_length=longest, precision="float32", preview_photos=1, **TINY)
        train.main(Train(data, decoder, **setting))
        start = {"objective": "cider", "start_from": Path("checkpoints") / decoder}
        train.main(Train(data, f"{decoder}-cider", **start, **setting))
        for run in (decoder, f"{decoder}-cider"):
            files = {"json": Path("captions.json"), "scores": Path("scores.json"), "html": Path("page.html")}
            generate.main(Generate(Path("checkpoints") / run, data=data, workers=0, **files))
            lines, scores = (json.loads(Path(name).read_text("utf-8")) for name in ("captions.json", "scores.json"))
            assert len(lines) == validation and all(np.isfinite(line["log_probability"]) for line in lines)
            assert all(0 <= scores["word"][name] <= 1000 for name in METRICS)
            assert all(np.isfinite(log[name]) for log in log_of(run) for name in ("val_loss", "top5", "CIDEr-D"))
        tally("data sets at their ends")
