"""The commands as a user runs them, on a small data set: extract, train, resume, generate."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import models

import extract_features
import generate
import train
from captioning.captioner import Captioner
from captioning.decoders import DECODERS
from captioning.encoders.images import Transform, open_photo
from captioning.encoders.loading import encoder_file, load_encoder
from captioning.errors import PhotoError, UserError
from captioning.features.feature_reader import FeatureReader
from captioning.runtime import command_line, signals
from captioning.runtime.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from captioning.runtime.loader import SafeLoader
from captioning.search.options import SearchOptions
from captioning.training.objectives import LossWeights
from captioning.training.trainer import Trainer
from config import ExtractFeatures, Generate, Train
from preprocess.captions import CAPTIONS_FILE, Photo, read_captions, write_captions
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary
from tests.small import ENCODER, QUICK, SPECIAL, TINY, log_of, same, weights
from tests.torture.artefacts import EXTRACT
from tests.torture.processes import exit_status, has_exited, start

LONG = SearchOptions(length_penalty=9.0, max_length=6)  # these barely trained runs would write empty captions


# ---- extract_features.py


def test_every_row_equals_the_encoder_of_the_tutorial_to_half_precision(here, tmp_path):
    """torchvision's body, AdaptiveAvgPool2d(14), NHWC; in batches of one, where the file was made in batches."""
    torch.manual_seed(1)
    model = models.resnet18().eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    extract_features.main(
        ExtractFeatures(
            Path("data/small"),
            "resnet18",
            str(tmp_path / "weights.pth"),
            64,
            workers=0,
            precision="float32",
            batch_size=7,
            out=tmp_path / "f.h5",
        )
    )
    body, transform = torch.nn.Sequential(*list(model.children())[:-2]), Transform(64)
    with h5py.File(tmp_path / "f.h5") as file, torch.no_grad():
        for row, photo in enumerate(read_captions(Path("data/small"))):
            pixels = np.asarray(open_photo(photo.image).resize((64, 64), Image.Resampling.BILINEAR))
            x = torch.from_numpy(pixels / 255).permute(2, 0, 1).float()
            x = (x - torch.tensor(transform.mean)[:, None, None]) / torch.tensor(transform.std)[:, None, None]
            expected = F.adaptive_avg_pool2d(body(x[None]), 14).permute(0, 2, 3, 1)[0]
            torch.testing.assert_close(torch.from_numpy(file["features"][row]).float(), expected, rtol=2e-3, atol=2e-3)
            mean = expected.mean((0, 1))
            torch.testing.assert_close(torch.from_numpy(file["pooled"][row]), mean, rtol=1e-4, atol=1e-4)
            assert file["images"].asstr()[row] == photo.id


def test_native_cells_and_the_14x14_file_train_to_the_same_losses(here, tmp_path):
    extract_features.main(ExtractFeatures(Path("data/small"), **ENCODER, grid="native", out=tmp_path / "native.h5"))
    assert (tmp_path / "native.h5").stat().st_size < Path("data/small/features.h5").stat().st_size / 2
    train.main(
        Train(Path("data/small"), "native", features=(tmp_path / "native.h5",), epochs=3, precision="float32", **QUICK)
    )
    for line, other in zip(log_of("native"), log_of("attention"), strict=True):
        assert line["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)


def test_a_killed_extraction_continues_and_ends_bit_equal(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(here / "data")
    process = start(f"{EXTRACT} --batch-size 2 --out killed.h5")
    while not has_exited(process) and not Path("killed.h5").exists():
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    exit_status(process)
    settings = {**ENCODER, "batch_size": 2}
    for name in ("killed.h5", "undisturbed.h5"):
        extract_features.main(ExtractFeatures(Path("data/small"), **settings, out=Path(name)))
    assert Path("killed.h5").read_bytes() == Path("undisturbed.h5").read_bytes()


def test_unreadable_photos_are_skipped_up_to_the_allowed_fraction(here, tmp_path, monkeypatch, capsys):
    photos = list(read_captions(Path("data/small")))
    Path(tmp_path / "data").mkdir()
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no photo")
    write_captions(
        tmp_path / "data" / CAPTIONS_FILE, [*photos[:-1], type(photos[0])(str(broken), "b", "val", (("a",),))]
    )
    with pytest.raises(UserError, match="broken.jpg.*--allow-missing"):
        extract_features.work(ExtractFeatures(tmp_path / "data", **ENCODER))
    extract_features.main(ExtractFeatures(tmp_path / "data", **ENCODER, allow_missing=0.1))
    assert "skipped: " in capsys.readouterr().out
    assert FeatureReader(tmp_path / "data" / "features.h5").done().sum() == len(photos) - 1


# ---- train.py


def test_training_lowers_the_loss_and_writes_a_log(here):
    for run in DECODERS:
        epochs = log_of(run)
        assert epochs[-1]["val_loss"] < epochs[0]["val_loss"]
        assert {"top5", "BLEU-4", "CIDEr-D", "waiting", "captions_per_second", "learning_rate"} <= set(epochs[0])
        assert epochs[0]["cpu_seconds"] > 0
        start = json.loads((Path("checkpoints") / run / "log.jsonl").read_text().splitlines()[0])
        assert {"versions", "device", "config", "encoder", "commit"} <= set(start)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_resumed_run_equals_an_uninterrupted_one(here, decoder):
    run, setting = f"resumed-{decoder}", {"decoder": decoder, "precision": "float32", **QUICK}
    train.main(Train(Path("data/small"), run, epochs=1, **setting))
    train.main(Train(Path("data/small"), run, epochs=3, resume=True, **setting))
    assert same(weights(run), weights(decoder))
    assert [line["train_loss"] for line in log_of(run)] == [line["train_loss"] for line in log_of(decoder)]


def test_a_run_stopped_inside_an_epoch_resumes_to_the_same_weights(here, monkeypatch):
    setting = {"epochs": 3, "precision": "float32", **QUICK}
    steps, plain = [], Trainer.train_step

    def stop_at_the_seventh(self, *batch, **last):
        steps.append(batch)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *batch, **last)

    monkeypatch.setattr(Trainer, "train_step", stop_at_the_seventh)
    with pytest.raises(KeyboardInterrupt):
        train.main(Train(Path("data/small"), "stopped", **setting))
    progress = load_checkpoint(Path("checkpoints/stopped/last.pt"))["progress"]
    assert progress["epoch"] * len(steps) + progress["step"] == 7 or progress["step"] > 0
    train.main(Train(Path("data/small"), "stopped", resume=True, **setting))
    assert same(weights("stopped"), weights("attention"))
    assert [line["train_loss"] for line in log_of("stopped")] == pytest.approx(
        [line["train_loss"] for line in log_of("attention")]
    )


def test_patience_ends_a_run_that_no_longer_improves(here):
    train.main(
        Train(
            Path("data/small"),
            "patient",
            epochs=9,
            patience=1,
            learning_rate=1e-9,
            **{k: v for k, v in QUICK.items() if k != "learning_rate"},
        )
    )
    assert len(log_of("patient")) == 2


def test_the_best_checkpoint_is_chosen_by_the_named_score(here):
    train.main(Train(Path("data/small"), "by-loss", epochs=3, best_metric="loss", **QUICK))
    losses = [line["val_loss"] for line in log_of("by-loss")]
    assert load_checkpoint(Path("checkpoints/by-loss/best.pt"))["progress"]["best"] == pytest.approx(-min(losses))


def test_the_learning_rate_decays_in_steps(here):
    train.main(Train(Path("data/small"), "decays", epochs=4, lr_decay=0.5, lr_decay_every=2, **QUICK))
    assert [line["learning_rate"] for line in log_of("decays")] == pytest.approx([1e-2, 1e-2, 5e-3, 5e-3])


def test_fine_tuning_moves_the_encoder_and_its_features_can_be_cached(here):
    setting = {"fine_tune": True, "weights": "random", "encoder": "resnet18.layer2", "image_size": 64, "workers": 0}
    train.main(Train(Path("data/small"), "tuned", epochs=1, **setting, **QUICK))
    tuned = load_checkpoint(Path("checkpoints/tuned"))
    before = load_encoder("resnet18.layer2", "random", 64, seed=0).body.state_dict()
    for name in ("conv1.weight", "layer2.1.conv2.weight"):  # not BatchNorm alone, whose statistics move by themselves
        assert not torch.allclose(before[name], tuned["encoder"]["state"][name], atol=1e-4)
    extract_features.main(
        ExtractFeatures(Path("data/small"), weights="checkpoints/tuned", workers=0, out=Path("data/tuned.h5"))
    )
    reader = FeatureReader(Path("data/tuned.h5"))
    assert (
        reader.attributes["weights_sha256"]
        == tuned["encoder"]["sha256"]
        != FeatureReader(Path("data/small/features.h5")).attributes["weights_sha256"]
    )
    train.main(
        Train(
            Path("data/small"),
            "again",
            epochs=1,
            features=(Path("data/tuned.h5"),),
            start_from=Path("checkpoints/tuned"),
            **QUICK,
        )
    )
    with pytest.raises(UserError, match="another encoder"):
        train.main(Train(Path("data/small"), "mixed", epochs=1, start_from=Path("checkpoints/tuned"), **QUICK))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 2e-3)])
def test_live_photos_and_cached_features_give_the_same_losses_and_gradients(
    here, tmp_path, decoder, dtype, tolerance, times
):
    """Frozen encoder, no augmentation: the decoder cannot tell a Grid of the cache from one of the live encoder."""
    if (dtype == "float16" and decoder in ("updown", "xlan") or decoder == "aoa") and times(True, False):
        pytest.skip("long form: make torture")
    torch.manual_seed(2)
    torch.save(models.resnet18().state_dict(), tmp_path / "start.pth")
    encoder = {"encoder": "resnet18.layer2", "weights": str(tmp_path / "start.pth"), "image_size": 64}
    extract_features.main(
        ExtractFeatures(
            Path("data/small"), **encoder, dtype=dtype, workers=0, precision="float32", out=tmp_path / "f.h5"
        )
    )
    setting = {**QUICK, "decoder": decoder, "precision": "float32", "dropout": 0.0, **SPECIAL.get(decoder, {})}
    live = train.make_trainer(Train(Path("data/small"), "none", fine_tune=True, **encoder, **setting))
    cached = train.make_trainer(Train(Path("data/small"), "none", features=(tmp_path / "f.h5",), **setting))
    assert same(live.decoder.state_dict(), cached.decoder.state_dict())
    for trainer in (live, cached):
        trainer.decoder.train()
        torch.manual_seed(4)  # hard attention draws
        batches = [
            trainer.train[photos].to(trainer.device, trainer.precision) for photos in np.split(np.arange(20), [7])
        ]
        losses = [trainer.loss_module(batch, LossWeights()) for batch in batches]
        sum(loss.objective for loss in losses).backward()
        trainer.losses = torch.stack([loss.objective.detach() for loss in losses])
    torch.testing.assert_close(live.losses, cached.losses, rtol=tolerance, atol=0)
    for (name, one), other in zip(live.decoder.named_parameters(), cached.decoder.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 5 * tolerance * other.grad.norm() + 1e-7, name


def test_fine_tuning_in_float16_scales_its_loss_and_resumes(here):
    setting = {
        "fine_tune": True,
        "encoder": "resnet18.layer1",
        "image_size": 32,
        "weights": "random",
        "workers": 0,
        "precision": "float16",
        "flip": True,
        "crop": 0.8,
        **QUICK,
    }
    train.main(Train(Path("data/small"), "half", epochs=2, **setting))
    train.main(Train(Path("data/small"), "half-resumed", epochs=1, **setting))
    train.main(Train(Path("data/small"), "half-resumed", epochs=2, resume=True, **setting))
    assert same(weights("half"), weights("half-resumed"))
    assert load_checkpoint(Path("checkpoints/half/last.pt"))["scaler"]["scale"] > 1
    assert log_of("half")[1]["train_loss"] < log_of("half")[0]["train_loss"]


def test_the_log_of_fine_tuning_has_photos_per_second_and_peak_memory(here):
    for line in log_of("half"):
        assert 0 < line["photos_per_second"] < line["captions_per_second"] and line["peak_memory_gb"] > 0


def test_the_moving_average_of_the_weights_is_saved_as_best_and_resumes(here):
    setting = {"precision": "float32", "ema_decay": 0.9, "best_metric": "loss", **QUICK}
    train.main(Train(Path("data/small"), "average", epochs=3, **setting))
    train.main(Train(Path("data/small"), "average-resumed", epochs=1, **setting))
    train.main(Train(Path("data/small"), "average-resumed", epochs=3, resume=True, **setting))
    assert same(weights("average"), weights("average-resumed")) and log_of("average")[-1]["best"]
    assert same(weights("average"), weights("attention")), "averaging does not change training"
    kept = [load_checkpoint(Path("checkpoints") / run)["decoder"]["state"] for run in ("average", "average-resumed")]
    assert same(*kept) and not same(kept[0], weights("average"))
    assert [line["val_loss"] for line in log_of("average")] == [line["val_loss"] for line in log_of("average-resumed")]


def test_a_non_finite_loss_stops_the_run_and_names_the_photos(here, monkeypatch):
    plain = Trainer.train_step
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr(Trainer, "train_step", lambda *a, **k: plain(*a, **k)._replace(objective=nan))
    with pytest.raises(UserError, match="nan.*photo.*--learning-rate"):
        train.main(Train(Path("data/small"), "nan", epochs=1, **QUICK))


# ---- generate.py


def test_a_photo_a_folder_and_a_split_are_captioned(here, capsys):
    generate.main(Generate(Path("checkpoints/attention"), (Path("data/small/photos/0.png"),), precision="float32"))
    one = capsys.readouterr().out.splitlines()
    assert len(one) == 1 and one[0].startswith("data/small/photos/0.png: ")
    generate.main(Generate(Path("checkpoints/attention"), (Path("data/small/photos"),), workers=0, precision="float32"))
    assert one[0] in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("run", DECODERS)
def test_a_split_gives_the_same_coco_results_and_scores_from_cache_and_from_photos(here, tmp_path, run):
    def results(name, **more):
        generate.main(
            Generate(
                Path("checkpoints") / run,
                data=Path("data/small"),
                json=tmp_path / name,
                workers=0,
                precision="float32",
                **more,
            )
        )
        lines = json.loads((tmp_path / name).read_text())
        return [{key: line[key] for key in ("image_id", "caption")} for line in lines]

    cached = results("cached.json", scores=tmp_path / "scores.json")
    assert [line["image_id"] for line in cached] == ["photo5", "photo11", "photo17", "photo23"]
    assert all(isinstance(line["caption"], str) for line in cached)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["photos"] == 4 and scores["tokenizer"] == "whitespace" and 0 <= scores["word"]["BLEU-1"] <= 100
    longer = results("longer.json", search=SearchOptions(length_penalty=9.0))
    assert sum(len(line["caption"]) for line in longer) > sum(len(line["caption"]) for line in cached)
    Path("data/small/features.h5").rename("data/small/aside.h5")
    try:
        assert results("live.json") == cached
        assert results("live-longer.json", search=SearchOptions(length_penalty=9.0)) == longer
    finally:
        Path("data/small/aside.h5").rename("data/small/features.h5")
    assert len(results("two.json", limit=2)) == 2


def test_batched_captions_equal_those_of_one_photo_at_a_time(here):
    captioner = Captioner.load("checkpoints/attention", precision="float32")
    paths = sorted(Path("data/small/photos").glob("*.png"))[:5]
    together = [caption.text for caption in captioner.caption(paths)]
    assert together == [captioner.caption([path])[0].text for path in paths]
    images = [Image.open(path) for path in paths]
    assert together == [caption.text for caption in captioner.caption(images)]


def test_attention_is_drawn(here, tmp_path):
    run, photos = Path("checkpoints/attention"), (Path("data/small/photos/0.png"),)
    for name, more in (("drawn", {}), ("cells", {"view": "grid"}), ("moving", {"animate": True})):
        generate.main(Generate(run, photos, pictures=tmp_path / name, search=LONG, **more))
    drawn, cells, moving = (next((tmp_path / name).iterdir()) for name in ("drawn", "cells", "moving"))
    assert Image.open(drawn).width > 200 and drawn.read_bytes() != cells.read_bytes()
    assert moving.suffix == ".gif" and Image.open(moving).n_frames > 2
    with pytest.raises(UserError, match="has no attention"):
        generate.main(Generate(Path("checkpoints/lstm"), (Path("data/small/photos/0.png"),), pictures=tmp_path))


def test_the_sentinel_weight_of_each_word_is_written_and_drawn(here, tmp_path):
    generate.main(
        Generate(
            Path("checkpoints/adaptive"),
            data=Path("data/small"),
            json=tmp_path / "captions.json",
            pictures=tmp_path / "drawn",
            precision="float32",
        )
    )
    for line in json.loads((tmp_path / "captions.json").read_text()):
        assert line["caption"].split() == line["words"] and len(line["sentinel"]) == len(line["words"])
        assert all(0 < beta < 1 for beta in line["sentinel"])
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 4


def test_a_split_gives_a_csv_table_an_html_report_and_the_extremes(here, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("csv", "html", "extremes")}
    setting = {"search": LONG}  # otherwise the captions would be empty
    generate.main(Generate(Path("checkpoints/attention"), data=Path("data/small"), **files, **setting))
    assert "photo5" not in capsys.readouterr().out, "captions are in the files"
    header, *lines = files["csv"].read_text("utf-8-sig").splitlines()
    assert len(lines) == 4 and header.endswith("CIDEr-D") and lines[0].startswith("photo5,")
    page = files["html"].read_text("utf-8")
    assert page.count("<article>") == 4 and page.count("CIDEr-D") == 4 and "data:image/png" in page
    assert files["extremes"].read_text("utf-8").count("<article>") == 4
    generate.main(Generate(Path("checkpoints/attention"), (Path("data/small/photos/0.png"),), html=files["html"]))
    assert "CIDEr-D" not in files["html"].read_text("utf-8"), "this photo has no references"


def test_captions_in_a_file_score_the_same_as_when_they_were_generated(here, tmp_path, capsys):
    def scored(**settings):
        search = LONG if "run" in settings else SearchOptions()
        generate.main(Generate(scores=tmp_path / "scores.json", search=search, **settings))
        return json.loads((tmp_path / "scores.json").read_text())

    generated = scored(run=Path("checkpoints/attention"), data=Path("data/small"), json=tmp_path / "a.json")
    from_file = scored(score=(tmp_path / "a.json",), references=Path("data/small"))
    assert all(generated[key] == from_file[key] for key in ("word", "intervals", "facts", "photos"))
    assert generated["word"]["BLEU-1"] > 0
    scored(run=Path("checkpoints/lstm"), data=Path("data/small"), json=tmp_path / "b.json")
    capsys.readouterr()
    both = scored(score=(tmp_path / "a.json", tmp_path / "b.json"), references=Path("data/small"))
    gap = both["difference"]["word"]["ROUGE-L"]["difference"]
    one, other = (both[str(tmp_path / name)]["word"]["ROUGE-L"] for name in ("a.json", "b.json"))
    assert (
        one == generated["word"]["ROUGE-L"]
        and gap == pytest.approx(other - one)
        and "better in" in capsys.readouterr().out
    )


def test_captions_of_some_photos_are_scored_but_not_compared_with_captions_of_others(here, tmp_path, capsys):
    for name, ids in (("some", ["photo5"]), ("others", ["photo11"])):
        (tmp_path / name).write_text(json.dumps([{"image_id": id, "caption": "a red square"} for id in ids]))
    generate.main(Generate(score=(tmp_path / "some",), references=Path("data/small")))
    assert "has 1 of the 4 photos" in capsys.readouterr().out
    with pytest.raises(UserError, match="some.*others: have captions of different photos"):
        generate.main(Generate(score=(tmp_path / "some", tmp_path / "others"), references=Path("data/small")))


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({}, "give a run"),
        ({"photos": (Path("a.jpg"),)}, "give a run"),
        ({"run": Path("r")}, "give a run, and photos"),
        ({"score": (Path("a"),)}, "--references"),
        ({"score": (Path("a"),) * 3, "references": Path("r")}, "or two"),
        ({"score": (Path("a"),), "references": Path("r"), "run": Path("r")}, "leave out the run"),
        ({"score": (Path("a"),), "references": Path("r"), "html": Path("h")}, "leave out --html"),
        ({"score": (Path("a"),) * 2, "references": Path("r"), "csv": Path("c")}, "describe one file"),
        ({"run": Path("r"), "photos": (Path("a"),), "references": Path("r")}, "--references requires --score"),
        ({"run": Path("r"), "photos": (Path("a"),), "tokenizer": "jieba"}, "--tokenizer requires --score"),
        ({"run": Path("r"), "photos": (Path("a"),), "extremes": Path("e")}, "--extremes require --data"),
        ({"run": Path("r"), "photos": (Path("a"),), "animate": True}, "--animate requires --pictures"),
        ({"run": Path("r"), "photos": (Path("a"),), "view": "grid"}, "--view requires --pictures"),
    ],
)
def test_contradictory_settings_of_generate_are_refused(wrong, words):
    with pytest.raises(UserError, match=words) as error:
        Generate(**wrong)
    assert "\n" not in str(error.value)


def test_a_command_on_only_unreadable_photos_is_refused(here, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    with pytest.raises(UserError, match="broken.jpg: not an image; none of 1 photos can be read"):
        generate.main(Generate(Path("checkpoints/lstm"), (tmp_path / "broken.jpg",), allow_missing=1.0, workers=0))


@pytest.fixture
def odd_folder(here, tmp_path):
    """Photos with odd names and no endings, links in a circle, a hidden one, a text, a broken photo."""
    folder, photo = tmp_path / "photos", Path("data/small/photos/0.png").read_bytes()
    for name in ("one/a.jpg", "two/a.jpg", "two/a.png", "noending", "图 😀.heic", "new\nline.jpg", ".hidden/b.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(photo)
    (folder / "one" / "circle").symlink_to("..")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    (folder / "notes.txt").write_text("no photo")
    return folder


def test_an_unreadable_photo_does_not_void_the_captions_of_the_others(odd_folder, tmp_path, capsys):
    out, pictures = tmp_path / "captions.json", tmp_path / "pictures"
    settings = {"json": out, "pictures": pictures, "workers": 0, "search": LONG}
    with pytest.raises(PhotoError, match="circle.jpg.*1 of 7 photos cannot be read, more than --allow-missing"):
        generate.main(Generate(Path("checkpoints/attention"), (odd_folder,), **settings))
    printed = capsys.readouterr().out
    assert f"{odd_folder}: 1 files that are no photos passed over, such as {odd_folder}/notes.txt" in printed
    assert f"{odd_folder}: 1 hidden files and folders passed over, such as {odd_folder}/.hidden" in printed
    assert f"skipped: {odd_folder}/circle.jpg" in printed and "captions.json: 6 captions" in printed
    assert len(json.loads(out.read_text())) == 6
    assert len([*pictures.iterdir()]) == 6, "a picture each"


def test_a_picture_never_replaces_a_photo(here, tmp_path):
    shutil.copy("data/small/photos/0.png", tmp_path / "photo5.png")
    write_captions(tmp_path / CAPTIONS_FILE, [Photo(str(tmp_path / "photo5.png"), "photo5", "val", (("a",),))])
    with pytest.raises(UserError, match="--pictures .*: .*photo5.png is one of the photos; give another folder"):
        generate.main(Generate(Path("checkpoints/attention"), data=tmp_path, pictures=tmp_path, workers=0))


def test_english_captions_are_refused_as_a_submission(here, tmp_path):
    with pytest.raises(UserError, match="AI Challenger is Chinese"):
        generate.main(Generate(Path("checkpoints/lstm"), data=Path("data/small"), submission=tmp_path / "a.json"))


def test_a_checkpoint_needs_no_other_file(here, tmp_path):
    """It contains random encoder weights, the vocabulary and the transform."""
    photo = Path("data/small/photos/3.png").resolve()
    expected = Captioner.load("checkpoints/attention", precision="float32").caption([photo])[0].text
    moved = tmp_path / "moved.pt"
    moved.write_bytes(Path("checkpoints/attention/best.pt").read_bytes())
    os.chdir(tmp_path)
    assert Captioner.load(moved, precision="float32").caption([photo])[0].text == expected


# ---- mistakes of users: one line each, and nothing is damaged


def test_features_of_another_data_set_are_refused(here, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    photos = [type(p)(p.image, "x" + p.id, p.split, p.captions) for p in read_captions(Path("data/small"))]
    write_captions(other / CAPTIONS_FILE, photos)
    Vocabulary.load(Path("data/small") / VOCABULARY_FILE).save(other / VOCABULARY_FILE)
    with pytest.raises(UserError, match="another data set.*extract_features.py"):
        train.main(Train(other, "other", features=(Path("data/small/features.h5"),), **QUICK))


def test_captions_are_not_generated_from_the_features_of_another_encoder(here, tmp_path, capsys):
    other = tmp_path / "other.h5"
    extract_features.main(ExtractFeatures(Path("data/small"), "resnet18.layer2", "random", 96, workers=0, out=other))
    setting = {"data": Path("data/small"), "workers": 0, "precision": "float32"}
    with pytest.raises(UserError, match="other.h5: made by resnet18.layer2.*leave out --features") as error:
        generate.main(Generate(Path("checkpoints/tuned"), features=(other,), **setting))
    assert "\n" not in str(error.value)
    generate.main(Generate(Path("checkpoints/tuned"), **setting))
    assert (
        "features.h5: made by resnet18.layer2 (random), not by the encoder of checkpoints/tuned; encoding the photos"
        in capsys.readouterr().out
    )


def test_features_made_from_other_pixels_are_never_mixed_without_a_word(here, tmp_path, capsys):
    """The same encoder, whose photos another library has decoded and resized."""
    features = tmp_path / "pillow.h5"
    shutil.copy("data/small/features.h5", features)
    with h5py.File(features, "r+") as file:
        file.attrs["decoding"] = np.bytes_(b"pillow")
    encoder = torch.load(encoder_file(Path("data/small/features.h5")), weights_only=True)
    encoder["encoder"]["transform"]["decoding"] = "pillow"
    torch.save(encoder, encoder_file(features))
    difference = "decoding simplejpeg+torch instead of pillow"

    last = (Path("checkpoints/attention/last.pt")).read_bytes()
    with pytest.raises(UserError) as error:
        train.main(Train(Path("data/small"), "attention", features=(features,), resume=True, epochs=9, **TINY))
    assert str(error.value) == (
        f"checkpoints/attention: its features were made from other pixels than these: {difference}; give its own"
    )
    assert Path("checkpoints/attention/last.pt").read_bytes() == last

    generate.main(Generate(Path("checkpoints/attention"), data=Path("data/small"), features=(features,), workers=0))
    assert (
        "pillow.h5: made from other pixels than those of checkpoints/attention: decoding pillow instead of "
        "simplejpeg+torch; captions may differ"
    ) in capsys.readouterr().out


def test_a_run_is_not_overwritten_or_resumed_by_mistake(here):
    with pytest.raises(UserError, match="--resume.*--overwrite"):
        train.main(Train(Path("data/small"), "attention", **QUICK))
    with pytest.raises(UserError, match="--hidden-size 99.*trained with 24"):
        train.main(Train(Path("data/small"), "attention", resume=True, epochs=9, **{**QUICK, "hidden_size": 99}))


def test_another_vocabulary_is_refused_with_both_sizes(here, tmp_path):
    vocabulary = Vocabulary.build([["a", "square"]], language="en", tokenizer="whitespace", min_count=1, max_words=9)
    write_captions(tmp_path / CAPTIONS_FILE, read_captions(Path("data/small")))
    vocabulary.save(tmp_path / VOCABULARY_FILE)
    with pytest.raises(UserError, match="vocabulary.*words"):
        train.main(
            Train(
                tmp_path,
                "start",
                features=(Path("data/small/features.h5"),),
                start_from=Path("checkpoints/attention"),
                **QUICK,
            )
        )


@pytest.mark.parametrize("content", ["text", "pickle", "foreign", "nothing"])
def test_a_foreign_checkpoint_is_refused_and_never_executed(here, tmp_path, content):
    path, proof = tmp_path / "best.pt", tmp_path / "executed"
    if content == "text":
        path.write_text("hello")
    elif content == "pickle":

        class Evil:
            def __reduce__(self):
                return (os.mkdir, (str(proof),))

        torch.save({"format": Evil()}, path)
    elif content == "foreign":
        torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError) as error:
        generate.main(Generate(path, (Path("data/small/photos/0.png"),)))
    assert "\n" not in str(error.value) and not proof.exists()


def test_a_checkpoint_is_written_atomically(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", {"epoch": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space"):
        save_checkpoint(tmp_path / "last.pt", {"epoch": 2})
    assert read_checkpoint(tmp_path / "last.pt", ["epoch"], "")["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train.py", "data/none", "--run", "x"], "vocab.json"),
        (["train.py", "data/small", "--run", "x", "--device", "cuda:7"], "--device cuda:7"),
        (["train.py", "data/small", "--run", "../x"], "--run"),
        (["train.py", "data/small", "--run", "x", "--epochs", "0"], "--epochs 0"),
        (["generate.py", "checkpoints/none", "a.jpg"], "checkpoints/none"),
        (["generate.py", "checkpoints/attention", "none.jpg"], "none.jpg"),
        (["extract_features.py", "data/small", "--encoder", "resnet9"], "resnet9"),
        (["extract_features.py", "data/small", "--weights", "none.pth"], "none.pth"),
    ],
)
def test_a_mistake_gives_one_line_on_stderr_and_status_1(here, monkeypatch, capsys, arguments, words):
    commands = {
        "train.py": (Train, train.work),
        "generate.py": (Generate, generate.work),
        "extract_features.py": (ExtractFeatures, extract_features.work),
    }
    from captioning.runtime import command_line

    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        command_line.run(*commands[arguments[0]])
    assert isinstance(stop.value.code, str), "sys.exit with a text: printed on stderr, status 1"
    assert stop.value.code.startswith("error: ") and words in stop.value.code and "\n" not in stop.value.code


def test_several_captions_are_printed_and_written_and_samples_depend_on_the_seed_only(here, tmp_path, capsys):
    photos = (Path("data/small/photos/0.png"),)

    def printed(**settings):
        generate.main(Generate(Path("checkpoints/attention"), photos, precision="float32", **settings))
        return capsys.readouterr().out.splitlines()

    assert (
        len(printed(search=SearchOptions(6, num_captions=3, beam_groups=3, diversity_penalty=9.0, max_length=5))) == 3
    )
    drawing = SearchOptions(num_captions=4, temperature=3.0, max_length=5)
    assert printed(search=drawing, seed=1) == printed(search=drawing, seed=1) != printed(search=drawing, seed=2)
    printed(search=drawing, json=tmp_path / "all.json")
    (line,) = json.loads((tmp_path / "all.json").read_text())
    assert len(line["others"]) == 3 and line["others"][0].keys() == {"caption", "log_probability", "finished"}


@pytest.fixture
def interruptible():
    """Both stop signals raise KeyboardInterrupt, even if the shell set one to be ignored."""
    previous = {number: signal.signal(number, signal.default_int_handler) for number in signals.STOP_SIGNALS}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_deferred_signal_is_delivered_after_the_block(number, interruptible):
    events = []
    with signals.StopRequest() as stop:
        with signals.defer_signals():
            os.kill(os.getpid(), number)
            events.append(stop.requested)
        assert events == [False] and stop.requested and stop.number == number
    with pytest.raises(KeyboardInterrupt):
        with signals.defer_signals():
            os.kill(os.getpid(), number)
            events.append("the rest of the block")
    assert events[1:] == ["the rest of the block"]
    assert {signal.getsignal(one) for one in signals.STOP_SIGNALS} == {signal.default_int_handler}


def test_flags_are_parsed_before_a_stop_signal_is_an_exception(interruptible, monkeypatch):
    """Python's own parser, which tyro uses, would turn that exception into a SystemError."""
    handlers = []
    monkeypatch.setattr(command_line, "parse", lambda command: handlers.append(signal.getsignal(signal.SIGINT)))
    command_line.run(Train, lambda config: handlers.append(signal.getsignal(signal.SIGINT)))
    assert handlers[0] is signal.default_int_handler and handlers[1] is not signal.default_int_handler


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_stop_signal_does_not_hide_an_error_that_is_being_reported(number, interruptible, monkeypatch):
    def escape(text):
        os.kill(os.getpid(), number)
        return text

    def work(config):
        raise UserError("a mistake")

    monkeypatch.setattr(command_line, "parse", lambda command: None)
    monkeypatch.setattr(command_line, "one_line", escape)
    with pytest.raises(SystemExit) as end:
        command_line.run(Train, work)
    assert end.value.code == "error: a mistake"
    assert signal.getsignal(number) is signal.default_int_handler


class SignalState(torch.utils.data.Dataset):
    def __getitem__(self, _):
        handlers = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
        return handlers, signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_loader_workers_ignore_stop_signals(interruptible, monkeypatch):
    [(handlers, blocked)] = SafeLoader(SignalState(), [0], workers=1, pin=False)
    assert handlers == [signal.SIG_IGN] * 2 and not blocked.intersection(signals.STOP_SIGNALS)
    states = []
    start = torch.utils.data.DataLoader.__iter__

    def record_state(self):
        states.append(SignalState()[0])
        return start(self)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", record_state)
    assert list(SafeLoader(SignalState(), [], workers=1, pin=False)) == []
    assert states[0][1].issuperset(signals.STOP_SIGNALS), "not even while they start"
    assert not SignalState()[0][1].intersection(signals.STOP_SIGNALS)
