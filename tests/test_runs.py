"""Runs at a glance: the table, its files, and folders that are no runs."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from captioning import runs
from captioning.errors import UserError
from captioning.runtime.command_line import parse
from captioning.runtime.settings import as_plain_data
from captioning.viewing.run_summaries import COLUMNS, format_table, read_run, sort_runs
from config import Runs, Train

ENCODER = {"name": "resnet101", "transform": {"image_size": 256}}


def write_run(folder, scores=(30.0, 40.0, 35.0), flags=(), intervals=True, views=("whole",), **settings):
    """A run's folder with its log: one epoch per CIDEr-D score."""
    config = parse(Train, ["data/x", "--run", "a", "--epochs", "5", *flags]).for_device("cpu")
    events = [
        {"event": "start", "config": as_plain_data(config) | settings, "encoder": ENCODER, "views": list(views)},
        {"event": "step", "epoch": 1, "step": 1, "of": 1, "loss": 7.0},
    ]
    for epoch, cider in enumerate(scores, start=1):
        event = {"event": "epoch", "epoch": epoch, "CIDEr-D": cider, "BLEU-4": cider / 2, "val_loss": 3.0}
        event |= {"train_loss": 4.0, "train_seconds": 50.0, "val_seconds": 10.0, "best": cider == max(scores[:epoch])}
        if intervals:
            event["intervals"] = {"CIDEr-D": [cider - 3, cider + 3]}
        events.append(event)
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return folder


def cells(folder):
    run = read_run(folder, folder.name)
    return {name: column.cell(run) for name, column in COLUMNS.items()}


def test_a_row_has_the_scores_of_the_best_epoch_and_what_differs_from_the_defaults(tmp_path):
    flags = ["--decoder", "lstm", "--cell", "gru", "--learning-rate", "0.001", "--tie-embeddings", "--no-fast-path"]
    assert cells(write_run(tmp_path / "a", flags=flags, views=("whole", "flip"))) == {
        "run": "a",
        "decoder": "lstm",
        "encoder": "resnet101 256",
        "views": "2",
        "epochs": "3/5",
        "best-epoch": "2",
        "cider": "40.0 (37.0-43.0)",
        "bleu4": "20.0",
        "seconds": "60",
        "settings": "data/x --cell gru --tie-embeddings --learning-rate 0.001 --no-fast-path",
    }


def test_the_settings_of_a_row_give_the_run_again(tmp_path):
    flags = ["--objective", "cider", "--start-from", "checkpoints/b", "--batch-size", "64", "--features", "a", "b"]
    written = cells(write_run(tmp_path / "a", flags=flags))["settings"]
    data, *again = written.split()
    config = parse(Train, [data, "--run", "a", "--epochs", "5", *again])
    assert config == parse(Train, ["data/x", "--run", "a", "--epochs", "5", *flags])


@pytest.mark.parametrize("old", [{"dropout": 0.5, "layers": 1, "features": None}, {"learning_rate": 4e-4}])
def test_a_default_is_no_difference_however_the_log_holds_it(tmp_path, old):
    assert cells(write_run(tmp_path / "a", **old))["settings"] == "data/x"


def test_what_is_unknown_is_a_dash(tmp_path):
    row = cells(write_run(tmp_path / "new", scores=()))
    assert (row["epochs"], row["best-epoch"], row["cider"], row["seconds"]) == ("0/5", "-", "-", "-")
    assert cells(write_run(tmp_path / "old", intervals=False))["cider"] == "40.0"


def test_a_run_that_a_living_process_trains_is_running(tmp_path):
    folder = write_run(tmp_path / "a")
    ended = subprocess.Popen(["true"])
    ended.wait()
    for process, shown in ((os.getpid(), "3/5 running"), (ended.pid, "3/5")):
        (folder / ".lock").write_text(f"{process} on {platform.node()}")
        assert cells(folder)["epochs"] == shown


def test_rows_are_sorted_with_unknown_values_last(tmp_path):
    found = [
        read_run(write_run(tmp_path / name, scores=scores), name)
        for name, scores in (("b", (10.0,)), ("none", ()), ("a", (20.0, 5.0)))
    ]
    assert [run.name for run in sort_runs(found, "cider")] == ["a", "b", "none"]
    assert [run.name for run in sort_runs(found, "epochs")] == ["a", "b", "none"]
    assert [run.name for run in sort_runs(found, "run")] == ["a", "b", "none"]
    assert [run.name for run in sort_runs(found, "best-epoch")] == ["b", "a", "none"]


def test_columns_stay_in_line_beside_chinese_names(tmp_path):
    found = [read_run(write_run(tmp_path / name), name) for name in ("看图说话", "att")]
    header, chinese, latin = format_table(found)
    assert chinese.index("attention") + 4 == latin.index("attention") == header.index("decoder")


def test_what_is_no_run_is_one_line_below_the_table(tmp_path, capsys):
    write_run(tmp_path / "fine")
    (tmp_path / "visdom").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a file").touch()
    for name, log in (
        ("damaged", "{"),
        ("empty", ""),
        ("foreign", '{"event": "start", "config": [], "encoder": 3}\n'),
        ("older", '{"event": "start", "config": {"average": 0}}\n'),
        ("text score", '{"event": "start"}\n'),
        ("new\nline", "[]\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(log)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "best.pt").write_bytes(b"no checkpoint")
    runs.main(Runs((tmp_path,), csv=tmp_path / "runs.csv"))
    _, row, _, _, *problems = capsys.readouterr().out.splitlines()
    assert row.startswith("fine ")
    assert len(problems) == 8 and all(str(tmp_path) in line for line in problems)
    assert "visdom: not a run: it has no log.jsonl, best.pt or last.pt" in problems[-1]


@pytest.mark.parametrize("value", ["high", None, [], {"a": 1}, float("nan")])
@pytest.mark.parametrize("key", ["CIDEr-D", "intervals", "train_seconds", "best", "val_loss"])
def test_a_log_with_any_value_makes_a_row_or_one_line(tmp_path, key, value):
    folder = write_run(tmp_path / "a", scores=(30.0,))
    *others, last = (folder / "log.jsonl").read_text().splitlines()
    lines = [*others, json.dumps(json.loads(last) | {key: value})]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    try:
        format_table([read_run(folder, "a")])
    except UserError as error:
        assert "damaged" in str(error) and "\n" not in str(error)


def test_a_run_without_a_log_is_read_from_its_checkpoint(tmp_path):
    config = as_plain_data(parse(Train, ["data/x", "--run", "a", "--decoder", "adaptive"]).for_device("cpu"))
    progress = {"epoch": 4, "best": 51.5}
    checkpoint = {"format": "kantu checkpoint 1", "config": config, "vocabulary": {}, "encoder": ENCODER}
    torch.save(checkpoint | {"decoder": {}, "progress": progress}, tmp_path / "best.pt")
    row = cells(tmp_path)
    assert (row["decoder"], row["epochs"], row["best-epoch"], row["cider"]) == ("adaptive", "4/20", "4", "51.5")


def test_the_files_hold_every_run(tmp_path, capsys):
    for name, scores in (("看图", (10.0, 20.0)), ("_<b>$x^$", (30.0,)), ("none", ())):
        write_run(tmp_path / "runs" / name, scores=scores)
    paths = {kind: tmp_path / f"runs.{kind}" for kind in ("csv", "html", "png")}
    runs.main(Runs((tmp_path / "runs",), "run", paths["csv"], paths["html"], paths["png"]))
    rows = list(csv.DictReader(paths["csv"].open(encoding="utf-8", newline="")))
    assert [(row["run"], row["CIDEr-D"], row["CIDEr-D low"]) for row in rows] == [
        ("_<b>$x^$", "30.0", "27.0"),
        ("none", "", ""),
        ("看图", "20.0", "17.0"),
    ]
    page = paths["html"].read_text("utf-8")
    assert "<b>" not in page and page.count("<tr data-curves=") == 3 and "看图" in page
    assert set(re.findall(r'id="curve-(\d)-', page)) == {"0", "1", "2"}, "the rows' curves can be told apart"
    assert not re.search(r'(src|href)="(?!#)', page), "it opens offline"
    assert Image.open(paths["png"]).size[0] > 1000
    assert page.count("_&lt;b&gt;$x^$") == 3, "in its row, as a value to sort by, and in the legend"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"folders": ("none",)}, "none: No such file or directory; give a run, or a folder of runs"),
        ({"folders": (".",)}, r"\.: no runs in it; train one with"),
        ({"folders": ("a",), "plot": "x.gif"}, "--plot x.gif: must end in one of .png"),
        ({"folders": ("a",), "plot": "x.png"}, "--plot x.png: none of these runs has a curve yet"),
    ],
)
def test_what_cannot_be_shown_is_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    if "plot" in arguments:
        folder = write_run(tmp_path / "a", scores=())
        first = (folder / "log.jsonl").read_text().splitlines()[0]
        (folder / "log.jsonl").write_text(first + "\n")
    flags = [word for name, value in arguments.items() if name == "plot" for word in ("--plot", value)]
    with pytest.raises(UserError, match=message):
        runs.main(parse(Runs, [*arguments["folders"], *flags]))


def test_reading_logs_loads_no_torch():
    code = "import sys, captioning.runs, captioning.dashboard; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
