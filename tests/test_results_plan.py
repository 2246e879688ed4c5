"""`make results`: the plan, the steps that are made once, and the tables that are made of JSON alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from captioning.errors import UserError
from captioning.runtime.command_line import parse
from config import Calibrate, ExtractFeatures, Generate, Preprocess, Train

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

import results  # noqa: E402
import results_page  # noqa: E402
import results_plan  # noqa: E402
import results_steps  # noqa: E402
from results_plan import GROUPS, Step, plan_steps  # noqa: E402
from results_steps import Workshop  # noqa: E402

STEPS = plan_steps(has_weights=False)
COMMANDS = {
    "preprocess": Preprocess,
    "extract_features.py": ExtractFeatures,
    "train.py": Train,
    "generate.py": Generate,
    "captioning.calibrate": Calibrate,
}


def test_every_step_of_the_plan_is_a_command_that_is_accepted(times):
    seen = set()
    for step in plan_steps(has_weights=True).values():
        words = [word for word in shlex.split(step.command) if word != "-m"]
        assert words[0] == "python"
        flags = {word for word in words if word.startswith("--")} | {words[1]}
        if times(flags - seen, flags):  # a flag that no other step has
            parse(COMMANDS[words[1]], words[2:])
        seen |= flags


def test_what_a_step_of_the_plan_reads_another_one_makes():
    assert "--weights" not in STEPS["features-lite2-384"].command
    made = {}  # step -> outputs of it and of those that it needs
    for name, step in STEPS.items():
        made[name] = {*step.outputs}.union(*(made[need] for need in step.needs))
        for word in shlex.split(step.command)[2:]:
            is_made = word.startswith(("data/", "checkpoints/", "captions/"))
            assert not is_made or word in made[name], f"{name}: {word} is made by no step that it needs"


def test_groups_rows_and_patterns_select_steps_with_what_they_need():
    chosen = results.choose(STEPS, ["best/zh-best"])
    assert chosen == ["data-zh", "features-lite2-384", "zh-best", "zh-best-beam1", "zh-best-beam3", "zh-best-beam5"]
    assert "zh-lite2-256-against-zh-mobilenet-256" in results.choose(STEPS, ["encoders"])
    assert results.choose(STEPS, []) == list(STEPS)
    with pytest.raises(UserError, match="--only zh-wurst: no such group, row or step"):
        results.choose(STEPS, ["zh-wurst"])
    assert "    zh-best-ensemble: " in "\n".join(results.describe_groups())


# ---- steps


def copy_step(name, text, needs=(), **settings):
    """A step whose command appends a text to its output, and says so in made.txt."""
    code = f"open('{name}.txt', 'a').write('{text}'); print('{name}', file=open('made.txt', 'a'))"
    return Step(name, f"python -c {shlex.quote(code)}", (f"{name}.txt",), needs, **settings)


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """Makes a workshop of steps in one folder."""
    monkeypatch.setattr(results_steps, "POLL_SECONDS", 0.02)
    return lambda *steps: Workshop(tmp_path, {step.name: step for step in steps})


def made(folder):
    """The steps that were run since the last call."""
    path = folder / "made.txt"
    names = path.read_text("utf-8").split() if path.exists() else []
    path.write_text("", encoding="utf-8")
    return names


def test_a_step_is_made_once_and_anew_if_its_command_or_what_it_reads_has_changed(workshop, tmp_path):
    first, second, other = copy_step("a", "x"), copy_step("b", "y", ("a",)), copy_step("c", "z")
    shop = workshop(first, second, other)
    assert list(shop.left("abc")) == ["a", "b", "c"]
    assert shop.make("abc") == [] and made(tmp_path) == ["a", "b", "c"]
    assert shop.make("abc") == [] and made(tmp_path) == [] and shop.left("abc") == {}
    changed = workshop(copy_step("a", "new"), second, other)
    assert changed.left("abc") == {"a": "its command has changed", "b": "what it reads will change"}
    assert changed.make("abc") == [] and made(tmp_path) == ["a", "b"]
    assert [(tmp_path / f"{name}.txt").read_text("utf-8") for name in "abc"] == ["new", "y", "z"]
    (tmp_path / "c.txt").unlink()
    assert list(changed.left("abc")) == ["c"], "its output is gone"


def test_a_changed_recipe_is_a_changed_command(workshop, tmp_path):
    recipe = tmp_path / "mine.txt"
    step = copy_step("a", "x")
    step = step._replace(command=f"{step.command} --recipe {recipe}")
    recipe.write_text("--epochs 3", encoding="utf-8")
    shop = workshop(step)
    assert shop.make("a") == [] and shop.left("a") == {}
    recipe.write_text("# a comment\n--epochs 3", encoding="utf-8")
    assert shop.left("a") == {}
    recipe.write_text("--epochs 4", encoding="utf-8")
    assert shop.left("a") == {"a": "its command has changed"}
    code = f"open({str(recipe)!r}, 'w').write('--epochs 5'); open('b.txt', 'w')"
    changing = Step("b", f"python -c {shlex.quote(code)} --recipe {recipe}", ("b.txt",))
    shop = workshop(changing)
    assert shop.make("b") == [] and "--epochs 5" in shop.record("b")["command"], "it was changed while it was made"


def test_a_failed_step_is_one_line_and_those_that_do_not_need_it_go_on(workshop, tmp_path, capsys):
    failing = Step("bad", "python -c \"import sys; print('work'); sys.exit('error: no photos; give some')\"", ())
    shop = workshop(failing, copy_step("needs-it", "x", ("bad",)), copy_step("other", "y"))
    assert shop.make(list(shop.steps)) == ["bad", "needs-it"] and made(tmp_path) == ["other"]
    output = capsys.readouterr().out
    assert f"bad: failed: no photos; give some ({tmp_path / 'logs' / 'bad.log'})\n" in output
    assert "needs-it: left out: bad failed\n" in output
    assert list(shop.left(list(shop.steps))) == ["bad", "needs-it"]
    silent = workshop(Step("none", "python -c pass", ("none.txt",)))
    assert silent.make(["none"]) == ["none"], "no output, no success"


def test_why_a_step_failed_is_what_its_last_attempt_said(tmp_path):
    log = tmp_path / "a.log"
    log.write_text("$ python a\nerror: no photos\n", encoding="utf-8")
    assert results_steps.last_words(log) == "no photos"
    log.write_text("$ python a\nerror: no photos\n$ python a --resume\nMemoryError\n", encoding="utf-8")
    assert results_steps.last_words(log) == "MemoryError"


def test_an_interrupted_step_is_resumed_and_files_of_another_command_are_not_its(workshop, tmp_path):
    code = "import sys; open('a.txt', 'a').write(sys.argv[-1]); sys.exit(sys.argv[-1] != '--resume')"
    step = Step("a", f"python -c {shlex.quote(code)} begin", ("a.txt",), resume="--resume")
    shop = workshop(step)
    assert shop.make("a") == ["a"] and shop.left("a") == {"a": "interrupted"}
    assert shop.make("a") == [] and (tmp_path / "a.txt").read_text("utf-8") == "begin--resume"
    assert len(shop.record("a")["attempts"]) == 2
    changed = workshop(step._replace(command=step.command.replace("begin", "anew")))
    assert changed.make("a") == ["a"] and (tmp_path / "a.txt").read_text("utf-8") == "anew", "the old one is removed"
    (tmp_path / "b.txt").write_text("by hand", encoding="utf-8")
    assert workshop(copy_step("b", "x")).make("b") == ["b"]
    assert (tmp_path / "b.txt").read_text("utf-8") == "by hand"


def start_shop(shop, names):
    """Make steps in a process of its own. Forked: importing everything again takes longer than all tests here."""

    def make():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and background jobs ignore it
        sys.exit(len(shop.make(names)))

    process = multiprocessing.get_context("fork").Process(target=make)
    process.start()
    return process


def slow_step(name):
    """A step that has written its output half a second before it ends."""
    code = (
        f"import time; open('{name}.txt', 'a').write('x'); time.sleep(0.5); print('{name}', file=open('made.txt', 'a'))"
    )
    return Step(name, f"python -c {shlex.quote(code)}", (f"{name}.txt",))


def test_two_processes_in_one_folder_make_no_step_twice(workshop, tmp_path):
    shop = workshop(slow_step("a"), copy_step("b", "y", ("a",)), copy_step("c", "z"))
    processes = [start_shop(shop, "abc"), start_shop(shop, "abc")]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(made(tmp_path)) == ["a", "b", "c"] and (tmp_path / "a.txt").read_text("utf-8") == "x"


def test_a_stop_is_handed_on_to_the_command_which_is_resumed_next_time(workshop, tmp_path):
    code = (
        "import os, time; open('a.txt', 'a').write('x'); open('process.txt', 'a').write(f'{os.getpid()}\\n'); "
        "time.sleep(60 if open('a.txt').read() == 'x' else 0)"  # only the first time
    )
    shop = workshop(Step("a", f"python -c {shlex.quote(code)}", ("a.txt",)))
    process = start_shop(shop, "a")
    command = tmp_path / "process.txt"
    while not (command.exists() and command.read_text("utf-8").endswith("\n")):
        time.sleep(0.01)
    start = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    process.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(command.read_text("utf-8")), 0)
    assert time.monotonic() - start < 50, "the command was stopped, too"
    assert shop.left("a") == {"a": "interrupted"} and shop.make("a") == []
    assert (tmp_path / "a.txt").read_text("utf-8") == "xx"
    assert len(shop.record("a")["attempts"]) == 2, "what the stopped one cost counts, too"


# ---- the page


def scores(cider):
    """A file of `generate.py --scores`, as far as the page reads it."""
    values = {metric: cider / 4 for metric in results_page.METRICS} | {"CIDEr-D": cider}
    return {"word": values, "intervals": {"word": {metric: [cider - 5, cider + 5] for metric in values}}}


def finish(folder, name, cider, device="cpu", difference=None):
    """Write the outputs and the record of a step of the plan, as if its command had made them."""
    step = STEPS[name]
    for output in step.outputs:
        path = folder / output
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps(difference or scores(cider)), encoding="utf-8")
        elif path.suffix:
            path.write_bytes(bytes(10**6))
    if step.outputs[0].startswith("checkpoints/"):
        start = {"event": "start", "device": device, "precision": "bfloat16", "versions": {"torch": "2.15.0"}}
        events = [start | {"decoder_parameters": 10**7, "config": {}}]
        for epoch, score in ((1, cider - 9), (2, cider), (3, cider - 1)):
            event = {"event": "epoch", "epoch": epoch, "CIDEr-D": score, "BLEU-4": score / 4, "val_loss": 3.0}
            event |= {"cpu_seconds": 120.0, "train_seconds": 500.0, "val_seconds": 100.0, "peak_memory_gb": 2.5}
            events.append(event | {"best": epoch == 2})
        text = "".join(json.dumps(event) + "\n" for event in events)
        (folder / step.outputs[1] / "log.jsonl").write_text(text, encoding="utf-8")
    record = {"command": results_steps.expand(step.command), "made": "2026-12-01T12:00:00.000+00:00"}
    record |= {"inputs": dict.fromkeys(step.needs, record["made"]), "commit": "abc1234", "machine": "EPYC"}
    record["attempts"] = [{"seconds": 400.0, "cpu_seconds": 300.0}, {"seconds": 400.0, "cpu_seconds": 300.0}]
    (folder / "steps").mkdir(exist_ok=True)
    (folder / "steps" / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")


@pytest.fixture
def finished(tmp_path):
    """A work folder in which some rows of the group `best` are made."""
    folder = tmp_path / "work"
    ciders = {"zh-best": 80.0, "zh-best-1": 84.0, "zh-best-ensemble": 90.0}
    for name in ("data-zh", "features-lite2-384", "zh-best", "zh-best-1", "zh-best-2"):
        finish(folder, name, ciders.get(name, 70.0))
    for row, cider in ciders.items():
        for beam in (1, 3, 5):
            finish(folder, f"{row}-beam{beam}", cider + beam)
    gain = {"CIDEr-D": {"difference": 10.0, "interval": [7.04, 13.0], "better": 1.0}}
    finish(folder, "zh-best-ensemble-against-zh-best", 0, difference={"difference": {"word": gain}})
    return Workshop(folder, STEPS)


def test_tables_hold_the_scores_differences_means_and_costs_of_what_is_made(finished):
    found = results_page.collect("best", finished)
    results_page.write_json(found, path := finished.folder / "best.json")
    text = results_page.render("best", results_page.read_json(path))
    label = "`--recipe best`"
    assert (
        f"| {label}, seed 0 | `zh-best` | 20.8 | 20.8 | 83.0 (78.0 to 88.0) | 20.2, 81.0 | 21.2, 85.0 |  | 3, 2 | 6 |"
        in text
    )
    assert f"| {label}, mean of 2 seeds (standard deviation) |  | 21.2 (0.7) | 21.2 (0.7) | 85.0 (2.8) |" in text
    assert f"| {label}, ensemble of 3 | `zh-best-ensemble` |" in text
    assert "| +10.0 (+7.0 to +13.0), `zh-best` |  |  |  |  |" in text
    assert "both languages: `lite2-384` 10 CPU minutes, 0.0 GB." in text, "of both attempts"
    assert "seed 2 |" not in text, "its captions are not scored yet"
    assert "Not made yet: `zh-best-2`, `zh-best-cider`, " in text and "English" not in text
    assert "from 2026-12-01 to 2026-12-01 on EPYC (cpu, bfloat16, torch 2.15.0), commits abc1234" in text
    assert found["rows"][0]["training"]["curve"]["seconds"] == [120.0, 240.0, 360.0], "CPU seconds on a CPU"
    assert found["rows"][0]["training"]["features"] == 0.001


def test_a_row_whose_recipe_has_changed_since_is_not_in_the_tables(finished):
    path = finished.folder / "steps" / "zh-best.json"
    record = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(record | {"command": record["command"] + " --epochs 9"}), encoding="utf-8")
    assert [row["name"] for row in results_page.collect("best", finished)["rows"]] == ["zh-best-1"]


def test_publishing_writes_json_pictures_and_the_regions_of_the_page_and_nothing_else(finished, tmp_path):
    page = "# Mine\n\n<!-- made by make results: best -->\nold\n<!-- end -->\n\nStays.\n"
    page += "<!-- made by make results: encoders -->\n<!-- end -->\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text(page, encoding="utf-8")
    collected = {group: results_page.collect(group, finished) for group in ("best", "encoders")}
    written = results_page.publish(collected, tmp_path)
    assert [Path(path).relative_to(tmp_path).as_posix() for path in written] == [
        "bench/results/best.json",
        "docs/results-best.png",
        "docs/results.md",
    ]
    text = (tmp_path / "docs" / "results.md").read_text("utf-8")
    assert "old" not in text and "\n\nStays.\n" in text and "| `zh-best` |" in text
    assert text.endswith("<!-- made by make results: encoders -->\n\n*Not made yet.*\n\n<!-- end -->\n")
    assert results_page.fill_regions(text, tmp_path / "bench" / "results") == text
    assert (tmp_path / "docs" / "results-best.png").read_bytes().startswith(b"\x89PNG")
    assert "data-zh" not in text and str(tmp_path) not in text + (tmp_path / "bench/results/best.json").read_text(
        "utf-8"
    )


def test_the_tables_of_the_page_are_those_of_the_json_beside_it():
    page = (ROOT / results_page.PAGE).read_text("utf-8")
    assert results_page.fill_regions(page, ROOT / results_page.JSON_FOLDER) == page, "run make results ... --publish"
    regions = [match[2] for match in results_page.REGION.finditer(page)]
    assert sorted(regions) == sorted(GROUPS), "every group of the plan has its place"


# ---- everything


def write_flickr8k(folder, photos=20):
    """Folders in the form of Flickr8k-CN's, with photos of one colour."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    captions = ["一个男人在骑马", "草地上有两只狗", "一个小孩在玩球"]
    entries = [{"image_id": f"{number}.jpg", "caption": captions} for number in range(photos)]
    for entry in entries:
        Image.fromarray(np.full((64, 64, 3), rng.integers(0, 255, 3), np.uint8)).save(
            folder / "images" / entry["image_id"]
        )
    for split, chosen in (("train", entries[6:]), ("val", entries[:6])):
        path = folder / f"caption_{split}_annotations_zh.json"
        path.write_text(json.dumps(chosen, ensure_ascii=False), encoding="utf-8")


def test_the_whole_way_from_annotation_files_to_the_tables(tmp_path, monkeypatch, times, capsys):
    if not times(False, True):
        pytest.skip("long form: make torture")
    write_flickr8k(tmp_path / "flickr8k")
    (tmp_path / "weights").mkdir()
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights" / "resnet18.pth")
    monkeypatch.setitem(results_plan.FEATURES, "tiny", results_plan.Features("resnet18.layer1", "resnet18.pth", 64))
    sizes = "--embedding-size 16 --attention-size 16 --hidden-size 16 --batch-size 6 --epochs 2"
    run = results_plan.Run("zh-tiny", "zh", sizes, ("tiny",))
    cider = results_plan.cider_run(run, sizes.replace("--epochs", "--objective cider --epochs"))
    rows = [results_plan.Row("first", run, beams=(3,)), results_plan.Row("second", cider, beams=(3,), against=run.name)]
    for group in GROUPS:
        monkeypatch.setitem(GROUPS, group, ("Tiny", rows if group == "best" else []))
    work = tmp_path / "work"
    results.main(results.Results(tmp_path / "flickr8k", tmp_path / "weights", work, threads=1))
    page = (work / "page" / "results.md").read_text("utf-8")
    assert "| first | `zh-tiny` |" in page and "| second | `zh-tiny-cider` |" in page and "), `zh-tiny` | 2, " in page
    assert "Not made yet: " not in page and (work / "page" / "results-best.png").exists()
    capsys.readouterr()
    results.main(results.Results(work=work))
    assert capsys.readouterr().out == f"{work / 'page' / 'results.md'}: the tables of what is made\n", "nothing to do"
    assert sorted(path.name for path in work.iterdir() if not path.is_symlink()) == [
        "captions",
        "checkpoints",
        "data",
        "logs",
        "page",
        "scores",
        "steps",
    ]
