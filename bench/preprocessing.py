"""Time and memory of `python -m preprocess` for a synthetic data set of the size of AI Challenger.

    python bench/preprocessing.py caption_train_annotations_zh.json                       1,050,000 captions
    python bench/preprocessing.py caption_train_annotations_zh.json --photos 2000         a small run

The source is any annotation file in the AI Challenger format. A synthetic caption joins random captions of the source
up to a length of 18 to 26 characters, which is typical of AI Challenger, so that nearly all captions are distinct. The
photos are empty files, because preprocessing only checks that they exist. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Bench:
    source: Positional[Path]  # annotation file in the AI Challenger format
    photos: int = 210_000  # five captions each; AI Challenger's train split has 210,000
    workers: int = os.cpu_count() or 1  # processes that tokenize captions
    tokenizer: str = "jieba"


def main(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        distinct = make_annotations(bench, folder)
        command = [
            sys.executable,
            "-m",
            "preprocess",
            str(folder / "data"),
            "--train",
            str(folder / "captions.json"),
            str(folder / "images"),
            "--workers",
            str(bench.workers),
            "--tokenizer",
            bench.tokenizer,
        ]
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT)
        proportional, resident, processes = watch_memory(process)
        seconds = time.perf_counter() - started
        cpu = os.times()
        if process.returncode:
            sys.exit(f"error: the command ended with status {process.returncode}")
    captions = 5 * bench.photos
    print(f"{'captions':>24}  {captions:,} ({distinct:,} distinct)")
    print(f"{'elapsed time':>24}  {seconds:.1f} s, {captions / seconds:,.0f} captions/s")
    print(f"{'CPU time':>24}  {cpu.children_user + cpu.children_system:.1f} s, all processes")
    print(
        f"{'peak memory':>24}  {resident / 1e9:.2f} GB resident "
        f"({proportional / 1e9:.2f} GB with shared pages counted once)"
    )
    print(f"{'processes':>24}  {processes} at most")


def make_annotations(bench: Bench, folder: Path) -> int:
    """Write captions.json and the empty photos; return the number of distinct captions."""
    rng = random.Random(0)
    source = [caption for entry in json.loads(bench.source.read_bytes()) for caption in entry["caption"]]
    (folder / "images").mkdir()
    entries = []
    for number in range(bench.photos):
        captions = [make_caption(rng, source) for _ in range(5)]
        entries.append({"url": "", "image_id": f"{number:040x}.jpg", "caption": captions})
        (folder / "images" / entries[-1]["image_id"]).touch()
    (folder / "captions.json").write_text(json.dumps(entries), "utf-8")
    return len({caption for entry in entries for caption in entry["caption"]})


def make_caption(rng: random.Random, source: list[str]) -> str:
    """Random captions of the source, joined and truncated to a random length."""
    length = rng.randint(18, 26)
    caption = ""
    while len(caption) < length:
        caption += rng.choice(source).rstrip("。")
    return caption[:length]


def watch_memory(process: subprocess.Popen) -> tuple[int, int, int]:
    """Peaks until the process ends: proportional and resident bytes of its process tree, and number of processes."""
    peaks = (0, 0, 0)
    while process.poll() is None:
        memories = [read_memory(pid) for pid in process_tree(process.pid)]
        proportional = sum(memory[0] for memory in memories)
        resident = sum(memory[1] for memory in memories)
        peaks = (max(peaks[0], proportional), max(peaks[1], resident), max(peaks[2], len(memories)))
        time.sleep(0.2)
    return peaks


def process_tree(pid: int) -> list[int]:
    """The ids of the process and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except OSError:  # the process has ended
        return []
    return [pid] + [member for child in children for member in process_tree(int(child))]


def read_memory(pid: int) -> tuple[int, int]:
    """Proportional and resident bytes of a process; zeros if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    except OSError:
        return 0, 0
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return 1024 * kilobytes["Pss"], 1024 * kilobytes["Rss"]


if __name__ == "__main__":
    main(tyro.cli(Bench))
