"""Make a data set, its features, a run, and one of every other kind of file that a command reads."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from captioning.encoders.loading import load_encoder
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary
from tests.small import make_small_data
from tests.torture.commands import run_command, stamp

ENCODER = "--encoder resnet18.layer2 --image-size 64 --workers 0"
EXTRACT = f"extract_features.py data/small {ENCODER} --weights random --precision float32"
RECIPE = "--embedding-size 16 --attention-size 16 --hidden-size 24 --batch-size 6 --preview-photos 0 --device cpu"
TRAIN = f"train.py data/small {RECIPE} --epochs 1 --run new"
RESUME = f"train.py data/small {RECIPE} --epochs 2 --run att --resume"
GENERATE = "generate.py checkpoints/att --device cpu --workers 0 --precision float32"
SCORE = "generate.py --score results.json --references data/small"
PREPROCESS = "preprocess data/read --min-count 1 --workers 1"
READ_AIC = f"{PREPROCESS} --train aic.json data/small/photos"
SCENES = "preprocess data/scenes --scenes 20 --language en --min-count 1 --workers 1 --overwrite"
NOWHERE = "--url http://127.0.0.1:9"  # no visdom server answers there


class Artefacts:
    """A folder of these files, which tests damage and `restore` repairs."""

    def __init__(self, folder: Path):
        self.folder = folder
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            make_artefacts()
            paths = [path for path in sorted(Path("").rglob("*")) if path.is_file()]
            self.files = {path: path.read_bytes() for path in paths}
            self.stamps = {path: stamp(path) for path in paths}

    def enter(self, patch: pytest.MonkeyPatch) -> None:
        patch.chdir(self.folder)
        patch.setenv("PATH", "")  # hides Java, which takes seconds to start

    def restore(self) -> None:
        """Write back what was damaged or removed, and delete what is new, in this folder and nowhere else."""
        files = {self.folder / path: path for path in self.files}
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_symlink() or (path.is_file() and path not in files):
                path.unlink()
            elif path.is_dir() and (path in files or not any(path.iterdir())):
                path.rmdir()
        for path, name in files.items():
            if not path.exists() or stamp(path) != self.stamps[name]:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.files[name])
                modified = self.stamps[name][0]  # features know when their photos were
                os.utime(path, ns=(modified, modified))
                self.stamps[name] = stamp(path)


def make_artefacts(scenes: bool = True) -> None:
    """Write all files into the current folder, in about a second."""
    data = make_small_data(Path(""))
    write_annotations()
    run_ok(EXTRACT)
    run_ok(TRAIN.replace("--run new", "--run att"))
    run_ok(f"{GENERATE} --data data/small --json results.json")
    torch.save(load_encoder("resnet18.layer2", "random", 64).body.state_dict(), "weights.pth")
    words = Vocabulary.load(data / VOCABULARY_FILE).words[4:]
    lines = [f"{len(words)} 16", *(f"{word} {' '.join(['0.25'] * 16)}" for word in words)]
    Path("vectors.vec").write_text("\n".join(lines) + "\n", encoding="utf-8")
    Path("vectors.vec.gz").write_bytes(gzip.compress(Path("vectors.vec").read_bytes()))
    if scenes:
        run_ok(SCENES)


def write_annotations() -> None:
    """Write the annotations of the first twelve photos in the three supported formats."""
    names, texts = [f"{i}.png" for i in range(12)], ["a red square", "a square"]
    aic = [{"image_id": name, "caption": texts} for name in names]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    annotations = [{"image_id": i, "caption": text} for i in range(12) for text in texts]
    karpathy = [
        {
            "filename": name,
            "split": "val" if name in ("3.png", "7.png") else "train",
            "sentences": [{"raw": text} for text in texts],
        }
        for name in names
    ]
    formats = {"aic": aic, "coco": {"images": images, "annotations": annotations}, "karpathy": {"images": karpathy}}
    for name, content in formats.items():
        Path(f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def run_ok(command: str, *more: object) -> str:
    """Run a command that must succeed and return its stdout."""
    outcome = run_command(command, *more)
    assert outcome.status == 0, outcome.stderr
    return outcome.stdout
