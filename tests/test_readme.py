"""The commands of the README, of the pages in docs/ and of RELIABILITY.md, run as they stand, on small stand-ins that
lie where the README says the data lie.

Only what costs time is cut: one epoch instead of twenty, no worker processes. The stand-in weights are random.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser
from torchvision import models

import config
import extract_features
import generate
import preprocess.__main__
import train
from captioning import export
from captioning.errors import UserError
from captioning.runtime import command_line
from captioning.viewing import dashboard

HOUSE = Path(__file__).parents[1]
PAGES = [HOUSE / "README.md", *sorted((HOUSE / "docs").glob("*.md")), HOUSE / "RELIABILITY.md"]
README = "\n".join(page.read_text("utf-8") for page in PAGES)
ZH = ["一个男人在骑马。", "草地上有两只狗", "一个穿红色衣服的小孩在玩球"]
EN = ["A man rides a horse .", "Two dogs run on the grass .", "A child in a red shirt plays with a ball ."]


def commands(language: str) -> list[str]:
    """The lines of the README's fenced blocks in this language, without comments, continued lines joined."""
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```", README, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s+#.*", "", line).strip() for line in lines) if line]


def draw_photos(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 255, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((80, 60)).save(folder / name)


def write_aic(folder: Path, file: str, images: str, names: list[str]) -> None:
    draw_photos(folder / images, names)
    listed = [{"url": "", "image_id": name, "caption": ZH} for name in names]
    (folder / file).write_text(json.dumps(listed, ensure_ascii=False), encoding="utf-8")


def write_karpathy(file: Path, images: Path, names: list[str], splits: list[str]) -> None:
    draw_photos(images, names)
    listed = [
        {"filename": name, "split": split, "sentences": [{"raw": raw, "tokens": raw.lower().split()} for raw in EN]}
        for name, split in zip(names, splits, strict=True)
    ]
    file.write_text(json.dumps({"images": listed, "dataset": "stand-in"}), encoding="utf-8")


def stand_in(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights whose features float16 can hold by far: BatchNorm has seen a batch of noise, and says a tenth."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            torch.nn.init.constant_(module.weight, 0.1)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    return model


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A user's folder, with everything that the README tells them to fetch."""
    monkeypatch.chdir(tmp_path)
    names = [f"{i}.jpg" for i in range(6)]
    write_aic(tmp_path, "caption_train_annotations_20170902.json", "caption_train_images_20170902", names)
    write_aic(
        tmp_path,
        "caption_validation_annotations_20170910.json",
        "caption_validation_images_20170910",
        ["v" + name for name in names[:3]],
    )
    flickr = tmp_path / "flickr8k"
    write_aic(flickr, "caption_train_annotations_zh.json", "images", names)
    write_aic(flickr, "caption_val_annotations_zh.json", "images", ["v" + name for name in names[:3]])
    all_names = names + ["v" + name for name in names[:3]]
    write_karpathy(flickr / "dataset_flickr8k.json", flickr / "images", all_names, ["train"] * 6 + ["val"] * 3)
    write_karpathy(
        tmp_path / "dataset_coco.json", tmp_path / "coco", all_names, ["train"] * 4 + ["val"] * 3 + ["test"] * 2
    )
    numbers = " ".join(["0.1"] * 300)
    (tmp_path / "cc.zh.300.vec.gz").write_bytes(gzip.compress(f"2 300\n男人 {numbers}\n狗 {numbers}\n".encode()))
    draw_photos(tmp_path, ["photo.jpg"])
    draw_photos(tmp_path / "folder", names[:2])
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    monkeypatch.setenv("PATH", "")  # without Java: METEOR would take ten seconds each of many times
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch.save(
        stand_in(models.resnet101()).state_dict(), cache / models.ResNet101_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    )
    torch.save(stand_in(models.mobilenet_v2()).state_dict(), tmp_path / "mobilenet_v2_imagenet.pth")
    return tmp_path


ROOMS = {
    "-m preprocess": (config.Preprocess, preprocess.__main__.main),
    "extract_features.py": (config.ExtractFeatures, extract_features.main),
    "train.py": (config.Train, train.work),
    "generate.py": (config.Generate, generate.work),
    "-m captioning.viewing.dashboard": (config.Dashboard, dashboard.main),
    "-m captioning.export": (config.Export, export.main),
}


def run_as_it_stands(command: str) -> None:
    room = next(room for room in ROOMS if command.startswith(f"python {room} "))
    dataclass, work = ROOMS[room]
    settings = command_line.parse(dataclass, shlex.split(command.removeprefix(f"python {room} ")))
    cheaper = {"epochs": 1, "workers": 1 if room == "-m preprocess" else 0, "min_count": 1}
    fields = {field.name for field in dataclasses.fields(dataclass)}
    work(dataclasses.replace(settings, **{key: value for key, value in cheaper.items() if key in fields}))


def test_every_command_of_the_readme_runs(user, monkeypatch):
    sent = []
    lines = [re.sub(r"^torchrun .* --\s+", "python ", line) for line in commands("bash")]  # one process does
    lines = [line for line in lines if line.startswith("python ")]
    try:
        export.check_onnx()
    except UserError:  # what it writes is an extra, and wants a newer torch than the rest
        lines = [line for line in lines if " -m captioning.export " not in line]
    monkeypatch.setattr(dashboard.VisdomClient, "send", lambda self, windows: sent.append((self.environment, windows)))
    order = {
        "-m preprocess": 0,
        "generate.py": 2,
        "-m captioning.viewing.dashboard": 2,
        "-m captioning.export": 2,
    }  # what the first blocks of the README show needs what the later ones make
    lines.sort(key=lambda line: next((place for room, place in order.items() if f" {room} " in line), 1))
    assert len(lines) >= 10
    for line in lines:
        try:
            run_as_it_stands(line)
        except Exception as error:
            raise AssertionError(f"{line}\n{type(error).__name__}: {error}") from error
    assert {name for name, _ in sent} == {"watched", "watched and att"} and all("loss" in shown for _, shown in sent)
    assert (user / "captions.json").exists() and list((user / "attention").glob("*.png"))
    for line in commands("python"):
        exec(line, globals())  # the Python interface, line by line


def test_torchrun_takes_the_flags_that_the_readme_gives_it():
    lines = [shlex.split(line)[1:] for line in commands("bash") if line.startswith("torchrun ")]
    assert len(lines) >= 3
    for line in lines:
        options = get_args_parser().parse_args(line)
        assert [options.training_script, *options.training_script_args] == line[line.index("--") + 1 :]


def test_every_make_target_of_the_readme_is_there():
    targets = re.findall(r"^(\w+):", (HOUSE / "Makefile").read_text(), re.MULTILINE)
    wanted = [line.split()[1] for line in commands("bash") if line.startswith("make ")]
    assert wanted and set(wanted) <= set(targets)


def test_make_bench_runs_what_made_the_table_of_speed():
    table = re.findall(r"^\|.*`(python bench/.*)` \|$", PAGES[0].read_text("utf-8"), re.MULTILINE)
    run = re.findall(r"^\t\.venv/bin/(python bench/.*)", (HOUSE / "Makefile").read_text(), re.MULTILINE)
    assert table and run == table


def headings(page: Path) -> set[str]:
    """As links call them."""
    lines = re.findall(r"^#+ (.*)", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines}


def test_every_file_that_the_readme_names_is_there():
    for page in PAGES:
        text = page.read_text("utf-8")
        for name in re.findall(r"`((?:captioning|preprocess|docs|tests|bench)/[\w./]*)`", text):
            assert (HOUSE / name).exists(), name
        for link, heading in re.findall(r"\]\((?!http)([^)#]+)#?([^)]*)\)", text):
            assert (page.parent / link).exists(), link
            assert not heading or heading in headings(page.parent / link), heading
