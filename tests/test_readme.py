"""Run every command of README.md, docs/*.md and RELIABILITY.md on small stand-in data, in one process.

Each command is parsed as written; then only settings that cost time and that it leaves at their defaults are reduced
(see `reduced`). The stand-in photos and weights are random and lie at the paths that the README names.
"""

from __future__ import annotations

import asyncio
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
from captioning import calibrate as calibration
from captioning import dashboard as dashboard_command
from captioning import export, runs, serve, share, truth
from captioning.doctor import checkup, matching_model, mismatches
from captioning.errors import UserError
from captioning.runtime import command_line
from captioning.viewing import dashboard
from captioning.web.precision import Choice
from captioning.web.site import RUNTIME

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "RELIABILITY.md"]
TRANSLATIONS = [ROOT / "README.zh-CN.md", *sorted((ROOT / "docs" / "zh-CN").glob("*.md"))]  # of their commands: no need
README = "\n".join(page.read_text("utf-8") for page in PAGES)
ZH = ["一个男人在骑马。", "草地上有两只狗", "一个穿红色衣服的小孩在玩球"]
EN = ["A man rides a horse .", "Two dogs run on the grass .", "A child in a red shirt plays with a ball ."]


def commands(language: str) -> list[str]:
    """Return the lines of the pages' fenced blocks in `language`, with continued lines joined and comments removed."""
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
    annotations = [{"url": "", "image_id": name, "caption": ZH} for name in names]
    (folder / file).write_text(json.dumps(annotations, ensure_ascii=False), encoding="utf-8")


def write_karpathy(file: Path, images: Path, names: list[str], splits: list[str]) -> None:
    draw_photos(images, names)
    sentences = [{"raw": raw, "tokens": raw.lower().split()} for raw in EN]
    records = [
        {"filename": name, "split": split, "sentences": sentences} for name, split in zip(names, splits, strict=True)
    ]
    file.write_text(json.dumps({"images": records, "dataset": "stand-in"}), encoding="utf-8")


class ThinResNet(models.ResNet):
    """A ResNet with one narrow block per stage: the same stages and output channels, a fraction of the work."""

    def __init__(self, block, layers, **settings):
        super().__init__(block, [1] * len(layers), width_per_group=4, **settings)


class ThinMobileNet(models.MobileNetV2):
    """MobileNetV2 without expansions: the same blocks and output channels, half the operations."""

    def __init__(self, **settings):
        rows = [
            [1, 16, 1, 1],
            [1, 24, 2, 2],
            [1, 32, 3, 2],
            [1, 64, 4, 2],
            [1, 96, 3, 1],
            [1, 160, 3, 2],
            [1, 320, 1, 1],
        ]
        super().__init__(inverted_residual_setting=rows, **settings)


def calibrate(model: torch.nn.Module) -> torch.nn.Module:
    """Set the BatchNorm statistics from a batch of noise and the scales to 0.1, so that features fit in float16."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            torch.nn.init.constant_(module.weight, 0.1)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    return model


def make_timm_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow CLIP, whose weights are in the hub's cache, and a file with the weights of a narrow EfficientNet."""
    timm = pytest.importorskip("timm")
    hub = pytest.importorskip("huggingface_hub")
    save_file = pytest.importorskip("safetensors.torch").save_file
    name = "vit_base_patch16_clip_quickgelu_224"
    create = timm.create_model
    small = {"embed_dim": 16, "depth": 12, "num_heads": 1}

    def create_small(full_name, **settings):
        return create(full_name, **(small if full_name.startswith(name) else {}), **settings)

    monkeypatch.setattr(timm, "create_model", create_small)
    monkeypatch.setattr(timm.models.efficientnet, "round_channels", lambda *_, **__: 8)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    repository = timm.get_pretrained_cfg(f"{name}.openai").hf_hub_id
    files = folder / "hub" / f"models--{repository.replace('/', '--')}"
    (files / "snapshots" / "0").mkdir(parents=True)
    (files / "refs").mkdir()
    (files / "refs" / "main").write_text("0")
    save_file(timm.create_model(name).state_dict(), files / "snapshots" / "0" / "model.safetensors")
    efficientnet = calibrate(timm.create_model("tf_efficientnet_lite2"))
    torch.save(efficientnet.state_dict(), folder / "tf_efficientnet_lite2_imagenet.pth")


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """A user's working folder with everything that the README tells them to download."""
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
    write_kaggle(tmp_path / "kaggle")
    draw_photos(tmp_path / "folder", names[:2])
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    monkeypatch.setenv("PATH", "")  # hides Java: METEOR would take seconds in each of many commands
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(models.resnet, "ResNet", ThinResNet)
    monkeypatch.setattr(models.mobilenetv2, "MobileNetV2", ThinMobileNet)
    torch.save(
        calibrate(models.resnet101()).state_dict(),
        cache / models.ResNet101_Weights.IMAGENET1K_V1.url.rpartition("/")[2],
    )
    torch.save(calibrate(models.mobilenet_v2()).state_dict(), tmp_path / "mobilenet_v2_imagenet.pth")
    make_timm_small(tmp_path, monkeypatch)
    return tmp_path


COMMANDS = {
    "-m preprocess": (config.Preprocess, preprocess.__main__.main),
    "extract_features.py": (config.ExtractFeatures, extract_features.main),
    "train.py": (config.Train, train.work),
    "generate.py": (config.Generate, generate.work),
    "-m captioning.dashboard": (config.Dashboard, dashboard_command.main),
    "-m captioning.runs": (config.Runs, runs.main),
    "-m captioning.export": (config.Export, export.main),
    "-m captioning.share": (config.Share, share.main),
    "-m captioning.calibrate": (config.Calibrate, calibration.work),
    "-m captioning.serve": (config.Serve, serve.main),
    "-m captioning.truth": (config.Truth, truth.main),
}


CHEAPER = {
    "epochs": 1,
    "workers": 0,
    "min_count": 1,
    "embedding_size": 16,
    "attention_size": 16,
    "hidden_size": 16,
    "max_length": 6,
    "preview_photos": 1,
}


def reduced(settings: object) -> object:
    """Return the settings with one epoch and no workers, and with small sizes where the command line gives none."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    always = {"epochs", "workers", "min_count"}
    changes = {
        name: value
        for name, value in CHEAPER.items()
        if name in defaults and (name in always or getattr(settings, name) == defaults[name])
    }
    if isinstance(settings, config.ExtractFeatures) and not Path(settings.weights or "none").is_dir():  # not of a run
        changes["image_size"] = settings.image_size or 64
    if isinstance(settings, config.Preprocess):
        scenes = settings.scenes and 12
        changes = {} if settings.check else {**changes, "workers": 1, "scenes": scenes}  # it needs a worker
    if isinstance(settings, (config.Calibrate, config.Truth)) or (
        isinstance(settings, config.Generate) and settings.run
    ):
        changes["search"] = dataclasses.replace(settings.search, max_length=6)
    return dataclasses.replace(settings, **changes)


def write_runtime(folder: Path) -> Path:
    """Write stand-ins of the scripts that a page needs."""
    folder.mkdir(exist_ok=True)
    for name in (name for names in RUNTIME.values() for name in names):
        (folder / name).touch()
    return folder


def run_command(line: str) -> None:
    name = next(name for name in COMMANDS if f"{line} ".startswith(f"python {name} "))
    dataclass, main = COMMANDS[name]
    main(reduced(command_line.parse(dataclass, shlex.split(line.removeprefix(f"python {name}")))))


def runnable_lines() -> list[str]:
    """Return the Python commands of all pages in an order in which each finds what it reads."""
    lines = [re.sub(r"^torchrun .* --\s+", "python ", line) for line in commands("bash")]  # as a single process
    lines = [line for line in lines if line.startswith("python ")]
    try:
        export.check_onnx()
    except UserError:  # the export extra needs a newer torch than the rest
        lines = [line for line in lines if not re.search(r" -m captioning\.(export|serve) ", line)]
    names = ("dashboard", "runs", "export", "serve", "share", "truth")
    last = (" generate.py ", *(f" -m captioning.{name}" for name in names))

    def stage(line: str) -> int:
        if " -m preprocess " in line:
            return 2 if " --check" in line else 0
        return 2 if any(name in line for name in last) else 1

    return sorted(lines, key=stage)  # the README shows generate.py before the commands that train its runs


def example_lines() -> list[str]:
    """Return the commands of examples/flickr8k.sh, as `examples/flickr8k.sh kaggle` runs them."""
    script = (ROOT / "examples" / "flickr8k.sh").read_text("utf-8")
    lines = re.findall("^python .*", script, re.MULTILINE)
    assert len(lines) == 4
    return [line.replace('"$folder"', "kaggle").replace(' "$@"', "") for line in lines]


def write_kaggle(folder: Path) -> None:
    """Kaggle's Flickr8k: captions.txt and Images/, without splits."""
    names = [f"{i}.jpg" for i in range(16)]
    draw_photos(folder / "Images", names)
    lines = [f"{name},{caption}" for name in names for caption in EN]
    (folder / "captions.txt").write_text("\n".join(["image,caption", *lines]) + "\n", encoding="utf-8")


def test_every_command_of_the_readme_runs(user_folder, monkeypatch, times):
    sent = []
    if times(True, False):  # tests/test_export.py runs this part, which takes seconds for each run
        monkeypatch.setattr(export, "export_module", lambda name, module, file_format: b"")
        float32 = dict.fromkeys(("encoder", "begin", "step"), "float32")
        monkeypatch.setattr(export, "smallest_models", lambda run, models, *_: Choice(float32, models, 0.0))
    monkeypatch.setattr(export, "fetch_runtime", lambda: write_runtime(user_folder / "runtime"))
    monkeypatch.setattr(serve, "listen", lambda application, *_: asyncio.sleep(0))
    monkeypatch.setattr(calibration, "check_examples", lambda *_: None)  # there are three val photos
    monkeypatch.setattr(checkup, "MIN_PHOTOS", 1)
    for module, name in ((matching_model, "EPOCHS"), (matching_model, "MIN_STEPS"), (mismatches, "CLASSIFIER_STEPS")):
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(dashboard.VisdomClient, "send", lambda self, windows: sent.append((self.environment, windows)))
    lines = runnable_lines()
    assert len(lines) >= 10
    for line in lines:
        try:
            run_command(line)
        except Exception as error:
            raise AssertionError(f"{line}\n{type(error).__name__}: {error}") from error
    names = {re.sub("-[0-9a-f]{8}$", "", environment) for environment, _ in sent}  # without the code of their folders
    assert names == {"watched", "watched and att"} and all("loss" in shown for _, shown in sent)
    assert (user_folder / "captions.json").exists() and list((user_folder / "attention").glob("*.png"))
    for line in example_lines():
        run_command(line)
    assert json.loads((user_folder / "kaggle-scores.json").read_bytes())["photos"] >= 1
    for line in commands("python"):
        exec(line, globals())  # the Python interface, line by line


def test_torchrun_accepts_the_flags_that_the_readme_gives_it():
    lines = [shlex.split(line)[1:] for line in commands("bash") if line.startswith("torchrun ")]
    assert len(lines) >= 3
    for line in lines:
        options = get_args_parser().parse_args(line)
        assert [options.training_script, *options.training_script_args] == line[line.index("--") + 1 :]


def test_every_make_target_of_the_readme_exists():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wanted = [line.split()[1] for line in commands("bash") if line.startswith("make ")]
    assert wanted and set(wanted) <= set(targets)


def test_make_bench_runs_the_commands_behind_the_table_of_speed():
    table = re.findall(r"^\|.*`(python bench/.*)` \|$", PAGES[0].read_text("utf-8"), re.MULTILINE)
    target = re.search(r"^bench:.*\n((\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    run = re.findall(r"^\t\.venv/bin/(python bench/.*)", target[1], re.MULTILINE)
    assert table and run == table


def headings(page: Path) -> set[str]:
    """Return the page's headings in the form of link anchors."""
    lines = re.findall(r"^#+ (.*)", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines}


def test_every_file_that_the_pages_name_exists():
    for page in [*PAGES, *TRANSLATIONS]:
        text = page.read_text("utf-8")
        for name in re.findall(r"`((?:captioning|preprocess|docs|tests|bench)/[\w./]*)`", text):
            assert (ROOT / name).exists(), name


def test_every_link_of_a_page_leads_to_a_file_and_its_heading():
    for page in [*PAGES, *TRANSLATIONS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for link, heading in re.findall(r"\]\((?!http)([^)#]+)#?([^)]*)\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), link
            assert not heading or heading in headings(page.parent / link), heading


def test_every_name_of_the_architecture_page_is_defined_in_the_file_it_gives():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    found = re.findall(r"`([\w.]+)` in\s+`((?:captioning|preprocess)/[\w./]*\.py)`", text)
    assert len(found) > 10
    for name, file in found:
        source = (ROOT / file).read_text("utf-8")
        for part in name.split("."):
            assert re.search(rf"(class|def) {part}\b|^{part} = ", source, re.MULTILINE), f"{name} in {file}"
