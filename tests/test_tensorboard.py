"""TensorBoard: what an event file holds, read back with TensorBoard's own reader."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

import extract_features
import train
from captioning import dashboard
from captioning.errors import UserError
from captioning.runtime.files import locked
from captioning.runtime.log import read_log
from captioning.viewing import LOGGERS, log_tailer
from config import Dashboard, ExtractFeatures, Train
from tests.small import ENCODER, TINY
from tests.test_dashboard import CAPTION, MALICIOUS, make_log, write_log

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError)
tensor_util = pytest.importorskip("tensorboard.util.tensor_util")
hparams = pytest.importorskip("tensorboard.plugins.hparams.metadata")


def read(run):
    everything = dict.fromkeys(("scalars", "tensors", "images"), 0)
    return accumulators.EventAccumulator(str(run / "tensorboard"), size_guidance=everything).Reload()


def points(accumulator, tag):
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def texts(accumulator, tag):
    return [tensor_util.make_ndarray(event.tensor_proto).item().decode() for event in accumulator.Tensors(tag)]


def write(folder, events):
    write_log(folder, events)
    dashboard.main(Dashboard(tensorboard=(folder,)))
    return read(folder)


def test_an_event_file_has_every_curve_and_counts_updates_and_epochs(tmp_path, capsys):
    found = write(tmp_path / "att", make_log(epochs=2, steps=3))
    assert points(found, "loss/train") == [(1, 5.0), (2, 5.0), (3, 5.0), (4, 2.5), (5, 2.5), (6, 2.5)]
    assert points(found, "loss/train, mean of the epoch") == [(1, 5.0), (2, 2.5)]
    assert points(found, "loss/validation") == [(1, 3.0), (2, 3.0)]
    assert points(found, "scores of generated captions/CIDEr-D") == [(1, 31.0), (2, 32.0)]
    assert points(found, "top-5 accuracy, %/validation") == [(1, 50.0), (2, 50.0)]
    others = {"captions per second/train", "waiting for data, %/train", "learning rate/decoder"}
    assert others <= set(found.Tags()["scalars"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("tensorboard --logdir ")


def test_the_rewards_of_short_epochs_are_their_means(tmp_path):
    events = [{**event, "train_reward": 9.0} for event in make_log(epochs=2, steps=0)]
    assert points(write(tmp_path, events), "reward: CIDEr-D of sampled captions/train, mean of the epoch") == [
        (1, 9.0),
        (2, 9.0),
    ]


def test_pictures_captions_and_settings_are_those_of_the_log(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (30, 20), "red").save(tmp_path / "pictures" / "epoch-01-0.png")
    found = write(tmp_path, make_log(epochs=2, picture="pictures/epoch-01-0.png"))
    picture = found.Images("attention/photo 1")[1]
    assert (picture.step, picture.width, picture.height) == (2, 30, 20)
    assert picture.encoded_image_string == (tmp_path / "pictures" / "epoch-01-0.png").read_bytes()
    assert CAPTION in texts(found, "captions/photo 1")[0] and "一匹马" in texts(found, "captions/photo 1")[0]
    assert "| torch | 2 |" in texts(found, "settings")[0]
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = hparams.parse_session_start_info_plugin_data(content).hparams
    assert settings["run"].string_value == "att" and settings["seed"].string_value == MALICIOUS


def test_a_picture_that_is_damaged_or_elsewhere_is_left_out(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "bad.png").write_bytes(b"no picture")
    Image.new("RGB", (3, 2)).save(tmp_path / "secret.png")
    for picture in ("bad.png", "secret.png", "../secret.png", None):
        found = write(tmp_path, make_log(epochs=1, picture=picture))
        assert found.Tags()["images"] == [] and len(texts(found, "captions/photo 1")) == 1


def test_text_from_the_log_is_no_markup(tmp_path):
    events = make_log(epochs=1, caption="<b>[x](http://y)* `z` |\n# \ud800")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    dashboard.main(Dashboard(tensorboard=(tmp_path,)))
    found = texts(read(tmp_path), "captions/photo 1")[0]
    assert found.startswith(r"**&lt;b&gt;\[x\]\(http://y\)\* \`z\` \| \# \\ud800**") and "<script" not in found


def test_the_times_of_points_follow_the_seconds_of_the_epochs(tmp_path):
    known = {"start": {"time": "2026-11-30T12:00:00+0000"}, "epoch": {"train_seconds": 50, "val_seconds": 5}}
    events = [event | known.get(event["event"], {}) for event in make_log(epochs=2, steps=1)]
    found = write(tmp_path, events)
    start = found.Tensors("settings")[0].wall_time
    assert start == 1796040000
    assert [event.wall_time - start for event in found.Scalars("loss/train")] == [10, 65]
    assert [event.wall_time - start for event in found.Scalars("loss/validation")] == [55, 110]


def test_writing_again_doubles_no_point_even_in_a_tensorboard_that_is_open(tmp_path):
    open_page = write(tmp_path, make_log(epochs=2))
    events = [*make_log(epochs=1), *make_log(epochs=3)[5:]]  # resumed after the first epoch, it ran on
    for found in (write(tmp_path, events), open_page.Reload()):
        assert [step for step, _ in points(found, "loss/train")] == list(range(1, 10))
        assert [step for step, _ in points(found, "loss/validation")] == [1, 2, 3]
    sizes = [file.stat().st_size for file in sorted((tmp_path / "tensorboard").iterdir())]
    assert sizes[0] == 0 and len(sizes) == 2, "the points are in one file"


def test_a_resumed_run_has_every_point_once(small_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_data, "data/small")
    extract_features.main(ExtractFeatures(Path("data/small"), **ENCODER))
    monkeypatch.setattr(log_tailer, "POLL_INTERVAL", 0.05)
    setting = {**TINY, "preview_photos": 1, "max_length": 6, "tensorboard": True}
    train.main(Train(Path("data/small"), "att", epochs=1, **setting))
    train.main(Train(Path("data/small"), "att", epochs=2, resume=True, **setting))
    run = Path("checkpoints/att")
    assert "tensorboard: tensorboard --logdir checkpoints\n" in capsys.readouterr().out
    found = read(run)
    losses = [event["val_loss"] for event in read_log(run) if event["event"] == "epoch"]
    assert points(found, "loss/validation") == [(1, pytest.approx(losses[0])), (2, pytest.approx(losses[1]))]
    assert [picture.step for picture in found.Images("attention/photo 1")] == [1, 2]
    assert len(texts(found, "settings")) == 2, "one for each start"


def test_a_run_that_cannot_be_written_trains_on_and_is_complete_later(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(log_tailer, "POLL_INTERVAL", 0.01)
    write_log(tmp_path, make_log(epochs=1))
    (tmp_path / "tensorboard").touch()  # a file where the folder should be
    tailer = LOGGERS["tensorboard"](tmp_path, True)
    for _ in range(3):
        tailer._update()
    assert capsys.readouterr().out.count("cannot be written (File exists); training continues") == 1
    (tmp_path / "tensorboard").unlink()
    tailer._update()
    write_log(tmp_path, make_log(epochs=2))
    tailer._update()
    assert capsys.readouterr().out.count("is written again, and holds the whole run") == 1
    assert points(read(tmp_path), "loss/validation") == [(1, 3.0), (2, 3.0)]


@pytest.mark.parametrize(
    "content, message",
    [(None, "cannot be read"), ("no json\n", "damaged"), ('{"event": "epoch", "epoch": 1, "top5": []}\n', "damaged")],
)
def test_a_folder_without_a_valid_log_is_refused_in_one_line(tmp_path, content, message):
    if content:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(UserError, match=f"log.jsonl.*{message}") as error:
        dashboard.main(Dashboard(tensorboard=(tmp_path,)))
    assert "\n" not in str(error.value)


def test_a_run_that_is_being_trained_is_left_alone(tmp_path):
    before = write(tmp_path, make_log(epochs=1)).Tags()
    (held, holds), (ends, end) = os.pipe(), os.pipe()
    process = os.fork()  # a lock is a process's own
    if not process:
        with locked(tmp_path, tmp_path / ".lock"):
            os.write(holds, b"x")
            os.read(ends, 1)
        os._exit(0)
    os.read(held, 1)
    with pytest.raises(UserError, match=f"process {process} on .* is writing to it; wait for it"):
        dashboard.main(Dashboard(tensorboard=(tmp_path,)))
    os.write(end, b"x")
    os.waitpid(process, 0)
    assert read(tmp_path).Tags() == before


def test_without_tensorboard_one_line_says_how_to_get_it_before_anything_is_written(small_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    monkeypatch.delitem(sys.modules, "captioning.viewing.tensorboard", raising=False)
    monkeypatch.setattr(LOGGERS, "_entries", {"tensorboard": "captioning.viewing.tensorboard:TensorBoardTailer"})
    with pytest.raises(UserError, match=r"--tensorboard: tensorboard is not installed; run: pip .*\[tensorboard\]"):
        train.main(Train(Path("data/small"), "att", tensorboard=True, **TINY))
    assert not Path("checkpoints/att").exists()
