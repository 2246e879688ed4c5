"""All stages of Kantu in minutes, on a laptop without a GPU and without a download: `make demo`.

Draws scenes with captions, trains a small ResNet together with a decoder, caches the features of that encoder, trains
an attention decoder on the cache, captions the test scenes, and checks every caption against its scene.

    python demo.py [--language en]
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.start import start_command  # before torch, which takes seconds to import

    start_command()

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
from captioning.encoders.grid import GRID_SIZE
from captioning.encoders.images import open_photo
from captioning.features.feature_reader import FeatureReader
from captioning.runtime.command_line import run
from captioning.viewing.attention_plots import CaptionedImage, contact_sheet
from preprocess.captions import Photo, read_captions
from preprocess.drawing import Box
from preprocess.scenes import is_true, named_objects, read_scenes

SHEET_PHOTOS = 10  # photos on the contact sheet


@dataclass(frozen=True)
class Demo:
    """Draw scenes, train on them, caption the test scenes, and check the captions."""

    language: Literal["zh", "en"] = "zh"  # of the captions
    scenes: int = 2000  # scenes to draw; a tenth of them is the test split


def main(config: Demo) -> None:
    """Run all stages, and evaluate the captions."""
    started = time.monotonic()
    data = Path("data") / f"scenes-{config.language}"
    run = Path("checkpoints") / data.name
    run_commands(config, data, run)
    evaluate(data, run, config.language)
    print(f"\n{time.monotonic() - started:.0f} seconds in total")


def run_commands(config: Demo, data: Path, run: Path) -> None:
    """Run the commands of all stages, exactly as a user would."""
    # Small and without dropout, because drawn scenes are easy. alpha_c is 0: attention need not cover every cell.
    settings = (
        "--embedding-size 128 --attention-size 64 --hidden-size 256 --dropout 0 --alpha-c 0 "
        "--batch-size 64 --learning-rate 2e-3 --lr-decay 0.3"
    )
    run_command(
        "Drawing scenes with captions",
        f"-m preprocess {data} --scenes {config.scenes} --language {config.language} --overwrite",
    )
    run_command(
        "Training a small ResNet from random weights, together with a decoder",
        f"train.py {data} --run {run.name}-encoder --fine-tune --encoder resnet18.layer1 --weights random "
        f"--image-size 56 --encoder-learning-rate 5e-4 --epochs 10 --lr-decay-every 7 {settings} "
        f"--overwrite",
    )
    run_command(
        "Caching the features of that encoder", f"extract_features.py {data} --weights {run}-encoder --overwrite"
    )
    run_command(
        "Training a new attention decoder on the cached features",
        f"train.py {data} --run {run.name} --epochs 5 --lr-decay-every 3 {settings} --overwrite",
    )
    run_command(
        "Captioning the test scenes",
        f"generate.py {run} --data {data} --split test --json {run}/captions.json --scores {run}/scores.json",
    )


def run_command(title: str, command: str) -> None:
    """Print and run `python COMMAND`. Exits with its status if it fails."""
    print(f"\n== {title}\n$ python {command}", flush=True)
    process = subprocess.run([sys.executable, *shlex.split(command)])
    if process.returncode:
        sys.exit(process.returncode)


def evaluate(data: Path, run: Path, language: str) -> None:
    """Print how many captions are true and how often attention is on the named objects; draw the contact sheet."""
    scenes = read_scenes(data)
    photos = [photo for photo in read_captions(data) if photo.split == "test"]
    results = caption_cached(data, run, photos)
    truths = [is_true(result.words, scenes[photo.id], language) for photo, result in zip(photos, results, strict=True)]
    hits: list[bool] = []
    chances: list[float] = []
    for photo, result in zip(photos, results, strict=True):
        for word, boxes in named_objects(result.words, scenes[photo.id], language):
            hits.append(peak_is_inside(attention_of(result)[word], boxes))
            chances.append(sum((right - left) * (bottom - top) for left, top, right, bottom in boxes))
    print(f"\n{np.mean(truths):.1%} of {len(truths)} captions are true of their scene")
    print(
        f"{np.mean(hits):.1%} of {len(hits)} named shapes contain the attention's peak (chance: {np.mean(chances):.1%})"
    )
    draw_sheet(run / "contact-sheet.png", photos, results, truths)
    print(f"contact sheet: {run / 'contact-sheet.png'}")


def caption_cached(data: Path, run: Path, photos: list[Photo]) -> list[CaptionResult]:
    """Caption photos from their cached features."""
    captioner = Captioner.load(run)
    reader = FeatureReader(data / "features.h5")
    return captioner.caption_grid(reader.read(reader.rows_of(photo.id for photo in photos)))


def attention_of(result: CaptionResult) -> np.ndarray:
    """(words, 196) float32: the attention of each word over 14x14 cells."""
    assert result.attention is not None  # only the lstm decoder has none
    return result.attention.numpy()


def peak_is_inside(attention: np.ndarray, boxes: list[Box]) -> bool:
    """Whether the centre of the cell with the most attention is in one of the boxes. attention: (196,), 14x14 cells."""
    row, column = divmod(int(attention.argmax()), GRID_SIZE)
    x = (column + 0.5) / GRID_SIZE
    y = (row + 0.5) / GRID_SIZE
    return any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes)


def draw_sheet(path: Path, photos: list[Photo], results: list[CaptionResult], truths: list[bool]) -> None:
    """Draw the first captions of the split; they are not selected."""
    entries = [
        CaptionedImage(open_photo(photo.image), result.text, result.words, attention_of(result), result.grid, truth)
        for photo, result, truth in zip(photos[:SHEET_PHOTOS], results, truths, strict=False)
    ]
    contact_sheet(entries, path, "看图说话")


if __name__ == "__main__":
    run(Demo, main)
