"""All stages of Kantu in minutes, on a laptop without a GPU and without a download: `make demo`.

Draws scenes with captions, trains a small ResNet together with a decoder, caches the features of that encoder, trains
an attention decoder on the cache, captions the test scenes, and checks every caption against its scene.

    python demo.py [--language en] [--scene-set relations]
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
from captioning.encoders.images import open_photo
from captioning.evaluation.statements import JudgedCaption, report
from captioning.runtime.command_line import run
from captioning.truth import judge_run
from captioning.viewing.attention_plots import CaptionedImage, contact_sheet

SHEET_PHOTOS = 10  # photos on the contact sheet


@dataclass(frozen=True)
class Demo:
    """Draw scenes, train on them, caption the test scenes, and check the captions."""

    language: Literal["zh", "en"] = "zh"  # of the captions
    scenes: int = 2000  # scenes to draw; a tenth of them is the test split
    # one or two shapes; or one to four, with relations and counts, which are not learnt in minutes (docs/truth.md)
    scene_set: Literal["simple", "relations"] = "simple"


def main(config: Demo) -> None:
    """Run all stages, and evaluate the captions."""
    started = time.monotonic()
    prefix = "scenes" if config.scene_set == "simple" else config.scene_set
    data = Path("data") / f"{prefix}-{config.language}"
    run = Path("checkpoints") / data.name
    run_commands(config, data, run)
    evaluate(data, run)
    print(f"\n{time.monotonic() - started:.0f} seconds in total")


def run_commands(config: Demo, data: Path, run: Path) -> None:
    """Run the commands of all stages, exactly as a user would."""
    # Small and without dropout, because drawn scenes are easy. alpha_c is 0: attention need not cover every cell.
    settings = (
        "--embedding-size 128 --attention-size 64 --hidden-size 256 --dropout 0 --alpha-c 0 "
        "--batch-size 64 --learning-rate 2e-3 --lr-decay 0.3"
    )
    if config.scene_set == "relations":
        settings += " --positions sinusoidal"
    run_command(
        "Drawing scenes with captions",
        f"-m preprocess {data} --scenes {config.scenes} --scene-set {config.scene_set} "
        f"--language {config.language} --overwrite",
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


def evaluate(data: Path, run: Path) -> None:
    """Print how many captions are true and how often attention is on the named objects; draw the contact sheet."""
    captions = judge_run(Captioner.load(run), data)
    print(f"\n== What is true of the test scenes\n$ python -m captioning.truth {run}\n{report(captions)}")
    draw_sheet(run / "contact-sheet.png", captions[:SHEET_PHOTOS])
    print(f"contact sheet: {run / 'contact-sheet.png'}")


def draw_sheet(path: Path, captions: list[JudgedCaption]) -> None:
    """Draw the first captions of the split; they are not selected."""
    entries = [
        CaptionedImage(
            open_photo(caption.photo.image),
            caption.result.text,
            caption.result.words,
            attention_of(caption.result),
            caption.result.grid,
            caption.is_true,
        )
        for caption in captions
    ]
    contact_sheet(entries, path, "看图说话")


def attention_of(result: CaptionResult) -> np.ndarray:
    """(words, 196) float32: the attention of each word over 14x14 cells."""
    assert result.attention is not None  # only the lstm decoder has none
    return result.attention.numpy()


if __name__ == "__main__":
    run(Demo, main)
