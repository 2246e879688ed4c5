"""A data set, its features, a run, and every other kind of file that a command reads, in the current folder."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from captioning.encoders.loading import load_encoder
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary
from tests.small import make_small_data
from tests.torture.ends import end_of, stamp

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
NOWHERE = "--url http://127.0.0.1:9"  # where no visdom answers


class Artefacts:
    """All of them in a folder, to be damaged and mended."""

    def __init__(self, folder: Path):
        self.folder = folder
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            make_artefacts()
            paths = [path for path in sorted(Path("").rglob("*")) if path.is_file()]
            self.files, self.stamps = {path: path.read_bytes() for path in paths}, {path: stamp(path) for path in paths}

    def enter(self, patch: pytest.MonkeyPatch) -> None:
        patch.chdir(self.folder)
        patch.setenv("PATH", "")  # without Java: METEOR takes seconds to start

    def mend(self) -> None:
        """What was damaged or removed is back, and what is new goes; from within the folder."""
        for path in sorted(Path("").rglob("*"), reverse=True):
            if path.is_symlink() or (path.is_file() and path not in self.files):
                path.unlink()
            elif path.is_dir() and (path in self.files or not any(path.iterdir())):
                path.rmdir()
        for path, content in self.files.items():
            if not path.exists() or stamp(path) != self.stamps[path]:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                self.stamps[path] = stamp(path)


def make_artefacts(scenes: bool = True) -> None:
    """About a second."""
    data = make_small_data(Path(""))
    write_annotations()
    does(EXTRACT)
    does(TRAIN.replace("--run new", "--run att"))
    does(f"{GENERATE} --data data/small --json results.json")
    torch.save(load_encoder("resnet18.layer2", "random", 64).body.state_dict(), "weights.pth")
    words = Vocabulary.load(data / VOCABULARY_FILE).words[4:]
    lines = [f"{len(words)} 16", *(f"{word} {' '.join(['0.25'] * 16)}" for word in words)]
    Path("vectors.vec").write_text("\n".join(lines) + "\n")
    Path("vectors.vec.gz").write_bytes(gzip.compress(Path("vectors.vec").read_bytes()))
    if scenes:
        does(SCENES)


def write_annotations() -> None:
    """Of the first twelve photos, in the three forms."""
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
    forms = {"aic": aic, "coco": {"images": images, "annotations": annotations}, "karpathy": {"images": karpathy}}
    for name, form in forms.items():
        Path(f"{name}.json").write_text(json.dumps(form))


def does(command: str, *more: object) -> str:
    """Run a command that must work -> what it told."""
    end = end_of(command, *more)
    assert end.status == 0, end.said
    return end.told
