"""The memory of extract_features.py and train.py, as commands, for increasing numbers of photos.

    python bench/memory.py FOLDER                     writes 1 GB to FOLDER, and removes it
    python bench/memory.py FOLDER --sizes 1000 20000

The photos are links to four random images; each has five captions. The features of a photo take 8 KB, so that
features that are kept in memory would show: 0.8 GB for 100,000 photos. An eighth of the photos is val, as in AI
Challenger. "train" trains for one epoch, with features on the disk, and scores 125 photos of val, which is all of val
at the smallest size. "score" is the same with train.py's default of 5,000 photos.

own     peak memory that the command and its workers use for themselves, sampled 20 times per second
held    peak memory of the command, including mapped pages of files, which the system reclaims when it needs them
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from PIL import Image
from synthetic import make_photos, make_vocabulary, write_data
from tyro.conf import Positional

ROOT = Path(__file__).parents[1]
CAPTIONS = 5  # per photo
LENGTH = 11  # words per caption
WORDS = 200  # size of the vocabulary
COMMANDS = {
    "extract": "extract_features.py . --encoder resnet18.layer1 --weights random --image-size 32 --grid native "
    "--batch-size 128 --workers 1 --device cpu",
    "train": "train.py . --run bench --features-on disk --epochs 1 --batch-size 1000 --embedding-size 8 "
    "--attention-size 8 --hidden-size 8 --preview-photos 0 --device cpu --val-photos 125",
}
COMMANDS["score"] = COMMANDS["train"].replace("bench", "score").replace("125", "5000")


@dataclass(frozen=True)
class Bench:
    folder: Positional[Path]  # to write to; everything written is removed
    sizes: tuple[int, ...] = (1_000, 10_000, 100_000)  # photos


class Usage(NamedTuple):
    own: int  # bytes
    held: int  # bytes
    seconds: float


def main(bench: Bench) -> None:
    print(f"{'photos':>8}  {'command':>8}  {'own':>8}  {'held':>8}  {'own, per photo':>18}  seconds")
    previous: dict[str, tuple[int, int]] = {}
    for size in bench.sizes:
        for command, usage in measure(bench.folder, size).items():
            previous_size, previous_own = previous.get(command, (size, usage.own))
            growth = ""
            if size > previous_size:
                growth = f"{(usage.own - previous_own) / (size - previous_size):,.0f} bytes"
            print(
                f"{size:8,}  {command:>8}  {usage.own / 1e6:5,.0f} MB  {usage.held / 1e6:5,.0f} MB  {growth:>18}  "
                f"{usage.seconds:7.0f}",
                flush=True,
            )
            previous[command] = size, usage.own


def measure(folder: Path, photos: int) -> dict[str, Usage]:
    """The usage of each command for this number of photos. Everything written to the folder is removed."""
    with tempfile.TemporaryDirectory(dir=folder) as data:
        make_data(Path(data), photos)
        return {name: run_and_watch(command, Path(data)) for name, command in COMMANDS.items()}


def make_data(folder: Path, photos: int) -> None:
    """Write the photos, captions.jsonl and vocab.json."""
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    images = [folder / f"{i}.png" for i in range(4)]
    for path in images:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    for i in range(photos):
        os.symlink(images[i % 4], folder / "photos" / f"{i:012}.png")
    vocabulary = make_vocabulary(WORDS)
    lengths = np.full(CAPTIONS * photos, LENGTH)
    write_data(
        folder,
        (
            replace(photo, image=f"photos/{i:012}.png", id=f"{i:012}", split="val" if i % 8 == 7 else "train")
            for i, photo in enumerate(make_photos(rng, vocabulary, photos, lengths))
        ),
        vocabulary,
    )


def run_and_watch(command: str, folder: Path) -> Usage:
    """Run a command and sample its memory. Exits if the command fails."""
    own = 0
    held = 0
    started = time.monotonic()
    script, *flags = command.split()
    with open(folder / "output", "w+", encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, ROOT / script, *flags], cwd=folder, stdout=output, stderr=output)
        while process.poll() is None:
            own = max(own, sum(kilobytes(member, "smaps_rollup", "Pss_Anon:") for member in process_tree(process.pid)))
            held = max(held, kilobytes(process.pid, "status", "VmHWM:"))
            time.sleep(0.05)
        output.seek(0)
        if process.returncode:
            raise SystemExit(f"error: {command}: {output.read()[-2000:]}")
    return Usage(own * 1024, held * 1024, time.monotonic() - started)


def process_tree(process: int) -> list[int]:
    """The ids of the process and its descendants (Linux)."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:  # the process has ended
        return []
    return [process, *(member for text in lists for child in text.split() for member in process_tree(int(child)))]


def kilobytes(process: int, file: str, name: str) -> int:
    """A field of /proc/PROCESS/FILE; 0 if the process has ended. Pss divides shared memory among the processes."""
    try:
        lines = Path(f"/proc/{process}/{file}").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)


if __name__ == "__main__":
    main(tyro.cli(Bench))
