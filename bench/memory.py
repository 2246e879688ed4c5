"""How much memory extract_features.py and train.py take for more and more photos: the commands themselves, whole.

    python bench/memory.py FOLDER                     1 GB is written there, and removed
    python bench/memory.py FOLDER --sizes 1000 20000

Four drawn photos stand for all (links to them), each with five captions of its own. The features of a photo take
8 KB, so that whatever keeps them would show: 0.8 GB of 100,000 photos. An eighth of the photos is val, as in AI
Challenger; train.py trains for an epoch, from the disk, and then scores 125 photos of val, as many as there are of the
smallest size: "score" is the same with train.py's own 5,000, however many more there are.

own     the most memory that a command and its workers have taken for themselves, looked at 20 times a second
held    the most the command held, mapped pages of files included, which the system takes back where it needs them
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from PIL import Image
from tyro.conf import Positional

from preprocess.captions import CAPTIONS_FILE, Photo, write_captions
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary

HOUSE = Path(__file__).parents[1]
CAPTIONS, LENGTH, WORDS = 5, 11, 200  # captions a photo, words a caption, words in all
COMMANDS = {
    "extract": "extract_features.py . --encoder resnet18.layer1 --weights random --image-size 32 --grid native "
    "--batch-size 128 --workers 1 --device cpu",
    "train": "train.py . --run bench --features-on disk --epochs 1 --batch-size 1000 --embedding-size 8 "
    "--attention-size 8 --hidden-size 8 --preview-photos 0 --device cpu --val-photos 125",
}
COMMANDS["score"] = COMMANDS["train"].replace("bench", "score").replace("125", "5000")


@dataclass(frozen=True)
class Bench:
    folder: Positional[Path]  # to write in; what is written is removed
    sizes: tuple[int, ...] = (1_000, 10_000, 100_000)  # photos


class Taken(NamedTuple):
    own: int  # bytes
    held: int
    seconds: float


def main(bench: Bench) -> None:
    print(f"{'photos':>8}  {'command':>8}  {'own':>8}  {'held':>8}  {'own, a photo more':>18}  seconds")
    before: dict[str, tuple[int, int]] = {}
    for size in bench.sizes:
        for command, taken in measure(bench.folder, size).items():
            fewer, less = before.get(command, (size, taken.own))
            more = f"{(taken.own - less) / (size - fewer):,.0f} bytes" if size > fewer else ""
            print(
                f"{size:8,}  {command:>8}  {taken.own / 1e6:5,.0f} MB  {taken.held / 1e6:5,.0f} MB  {more:>18}  "
                f"{taken.seconds:7.0f}",
                flush=True,
            )
            before[command] = size, taken.own


def measure(folder: Path, photos: int) -> dict[str, Taken]:
    """What each command takes for so many photos; all that is written in the folder is removed."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        make_data(Path(place), photos)
        return {name: watch(command, Path(place)) for name, command in COMMANDS.items()}


def make_data(folder: Path, photos: int) -> None:
    random = np.random.default_rng(0)
    (folder / "photos").mkdir()
    drawn = [folder / f"{i}.png" for i in range(4)]
    for path in drawn:
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    for i in range(photos):
        os.symlink(drawn[i % 4], folder / "photos" / f"{i:012}.png")
    words = [f"word{number}" for number in range(WORDS)]
    write_captions(
        folder / CAPTIONS_FILE,
        (
            Photo(
                f"photos/{i:012}.png",
                f"{i:012}",
                "val" if i % 8 == 7 else "train",
                tuple(tuple(words[j] for j in row) for row in random.integers(0, WORDS, (CAPTIONS, LENGTH))),
            )
            for i in range(photos)
        ),
    )
    Vocabulary.build([words], language="en", tokenizer="whitespace", min_count=1, max_words=WORDS).save(
        folder / VOCABULARY_FILE
    )


def watch(command: str, folder: Path) -> Taken:
    """Run a command that must end well, and look at its memory."""
    own, held, began = 0, 0, time.monotonic()
    script, *flags = command.split()
    with open(folder / "said", "w+") as said:
        process = subprocess.Popen([sys.executable, HOUSE / script, *flags], cwd=folder, stdout=said, stderr=said)
        while process.poll() is None:
            own = max(own, sum(kilobytes(member, "smaps_rollup", "Pss_Anon:") for member in family(process.pid)))
            held = max(held, kilobytes(process.pid, "status", "VmHWM:"))
            time.sleep(0.05)
        said.seek(0)
        if process.returncode:
            raise SystemExit(f"error: {command}: {said.read()[-2000:]}")
    return Taken(own * 1024, held * 1024, time.monotonic() - began)


def family(process: int) -> list[int]:
    """The process and all it has started (Linux)."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:  # it has ended meanwhile
        return []
    return [process, *(member for text in lists for child in text.split() for member in family(int(child)))]


def kilobytes(process: int, file: str, name: str) -> int:
    """A figure of the kernel's; memory that several processes share is divided among them. 0 once they have ended."""
    try:
        lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)


if __name__ == "__main__":
    main(tyro.cli(Bench))
