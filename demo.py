"""The whole of Kantu in minutes, on any laptop: `make demo`. No download, no GPU.

Draws scenes with captions, trains a small ResNet with its decoder on them, caches that encoder's features, trains an
attention decoder on the cache, captions scenes it has never seen, and judges each caption against its scene.

    python demo.py [--language en]
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from captioning.caption import CaptionResult
from captioning.captioner import Captioner
from captioning.encoders.grid import SIDE
from captioning.encoders.images import open_photo
from captioning.features.feature_cache import FeatureReader
from captioning.runtime.command_line import run
from captioning.viewing.attention_plots import CaptionedImage, contact_sheet
from preprocess.captions import Photo, read_captions
from preprocess.scenes import is_true, named_objects, read_scenes

CARDS = 10  # on the contact sheet


@dataclass(frozen=True)
class Demo:
    """Draw scenes, train on them, caption new ones, judge the captions."""

    language: Literal["zh", "en"] = "zh"  # of the captions
    scenes: int = 2000  # to draw; a tenth of them is the test


def main(config: Demo) -> None:
    began = time.monotonic()
    name = f"scenes-{config.language}"
    data, run = Path("data") / name, Path("checkpoints") / name
    # Small and without dropout: drawn scenes are quickly learnt. alpha_c 0: a shape is looked at, not every cell once.
    recipe = (
        "--embedding-size 128 --attention-size 64 --hidden-size 256 --dropout 0 --alpha-c 0 "
        "--batch-size 64 --learning-rate 2e-3 --lr-decay 0.3"
    )
    step(
        "Drawing scenes with captions",
        f"-m preprocess {data} --scenes {config.scenes} --language {config.language} --overwrite",
    )
    step(
        "Training a small ResNet from nothing, with its decoder",
        f"train.py {data} --run {name}-encoder --fine-tune --encoder resnet18.layer1 --weights random "
        f"--image-size 56 --encoder-learning-rate 5e-4 --epochs 10 --lr-decay-every 7 {recipe} "
        f"--overwrite",
    )
    step("Caching that encoder's features", f"extract_features.py {data} --weights {run}-encoder --overwrite")
    step(
        "Training a fresh attention decoder on the cache",
        f"train.py {data} --run {name} --epochs 5 --lr-decay-every 3 {recipe} --overwrite",
    )
    step(
        "Captioning scenes it has never seen",
        f"generate.py {run} --data {data} --split test --json {run}/captions.json --scores {run}/scores.json",
    )
    judge(data, run, config.language)
    print(f"\n{time.monotonic() - began:.0f} seconds in all")


def step(title: str, command: str) -> None:
    """Run one of the commands, exactly as a user would."""
    print(f"\n== {title}\n$ python {command}", flush=True)
    done = subprocess.run([sys.executable, *shlex.split(command)])
    if done.returncode:
        sys.exit(done.returncode)


def judge(data: Path, run: Path, language: str) -> None:
    """How many captions are true of their scene, how often attention lies on what is named; and the contact sheet."""
    scenes = read_scenes(data)
    photos = [photo for photo in read_captions(data) if photo.split == "test"]
    captioned = caption_cached(data, run, photos)
    truths, hits, chances = [], [], []
    for photo, caption in zip(photos, captioned, strict=True):
        scene = scenes[photo.id]
        truths.append(is_true(caption.words, scene, language))
        for word, boxes in named_objects(caption.words, scene, language):
            hits.append(peak_is_inside(caption.attention[word].numpy(), boxes))
            chances.append(sum((right - left) * (bottom - top) for left, top, right, bottom in boxes))
    print(f"\n{np.mean(truths):.1%} of {len(truths)} captions are true of their scene")
    print(
        f"{np.mean(hits):.1%} of {len(hits)} named shapes have the attention's peak on them "
        f"(by chance: {np.mean(chances):.1%})"
    )
    draw_sheet(run / "contact-sheet.png", photos, captioned, truths)
    print(f"{run / 'contact-sheet.png'}: look at it")


def caption_cached(data: Path, run: Path, photos: list[Photo]) -> list[CaptionResult]:
    captioner, reader = Captioner.load(run), FeatureReader(data / "features.h5")
    return captioner.caption_grid(reader.read(reader.rows_of(photo.id for photo in photos)))


def peak_is_inside(attention: np.ndarray, boxes: list[tuple[float, float, float, float]]) -> bool:
    """attention (196,) over 14x14 cells; boxes left, top, right, bottom in 0..1."""
    row, column = divmod(int(attention.argmax()), SIDE)
    x, y = (column + 0.5) / SIDE, (row + 0.5) / SIDE
    return any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes)


def draw_sheet(path: Path, photos: list[Photo], captioned: list[CaptionResult], truths: list[bool]) -> None:
    """The first captions, as they come: none is chosen."""
    entries = [
        CaptionedImage(
            open_photo(photo.image), caption.text, caption.words, caption.attention.numpy(), caption.grid, truth
        )
        for photo, caption, truth in zip(photos[:CARDS], captioned, truths, strict=False)
    ]
    contact_sheet(entries, path, "看图说话")


if __name__ == "__main__":
    run(Demo, main)
