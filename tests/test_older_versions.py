"""Runs of older versions, whose settings and log entries had other names, are refused in one line."""

import json

import pytest
import torch

from captioning.errors import UserError
from captioning.runtime.checkpoint import FORMAT, RUN, STATE, load_checkpoint, load_for_resume
from captioning.runtime.log import Log, read_log
from captioning.runtime.settings import OLD_SETTINGS
from config import Train

REFUSED = "^{}: written by an older version of Kantu, with other names; start a new run$"


def write_checkpoint(path, config):
    torch.save({"format": FORMAT, **dict.fromkeys(RUN + STATE), "config": config}, path)


@pytest.mark.parametrize("name", ["accumulate", "panel"])
def test_a_checkpoint_with_an_old_setting_is_refused_in_one_line(tmp_path, name):
    write_checkpoint(tmp_path / "last.pt", {"run": "a", name: 1})
    with pytest.raises(UserError, match=REFUSED.format(tmp_path / "last.pt")):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match=REFUSED.format(tmp_path / "last.pt")):
        load_for_resume(tmp_path, {"resume": True, "overwrite": False})


def test_a_checkpoint_with_todays_settings_is_loaded(tmp_path):
    write_checkpoint(tmp_path / "best.pt", {"run": "a", "grad_accumulation": 1})
    assert load_checkpoint(tmp_path)["config"] == {"run": "a", "grad_accumulation": 1}


@pytest.mark.parametrize(
    "event",
    [
        {"event": "start", "config": {"run": "a", "accumulate": 1}},
        {"event": "start", "config": {"run": "a", "panel": 4}},
        {"event": "epoch", "epoch": 1, "panel": []},
    ],
    ids=["setting", "another setting", "epoch"],
)
def test_a_log_with_old_names_is_refused_in_one_line(tmp_path, event):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(event) + "\n")
    with pytest.raises(UserError, match=REFUSED.format(path)):
        read_log(tmp_path)
    with pytest.raises(UserError, match=REFUSED.format(path)):
        Log(tmp_path, {}, (1, 0), is_main=True)
    assert path.read_text() == json.dumps(event) + "\n"


def test_a_log_with_todays_names_is_read(tmp_path):
    events = [
        {"event": "start", "config": {"run": "a", "preview_photos": 4}},
        {"event": "epoch", "epoch": 1, "preview": []},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert read_log(tmp_path) == events


def test_no_setting_of_today_has_an_old_name():
    assert OLD_SETTINGS.isdisjoint(Train.__dataclass_fields__)
