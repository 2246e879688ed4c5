"""How long `python -m preprocess` takes over a made-up AI Challenger, and how much memory.

    python bench/preprocessing.py caption_train_annotations_zh.json                       1,050,000 captions
    python bench/preprocessing.py caption_train_annotations_zh.json --photos 2000         a quick look

Any annotation file in AI Challenger's form is the source. A caption here is some of its captions side by side,
drawn at random up to a length of 18 to 26 characters, as AI Challenger's are, so that hardly two are alike. The
photos are empty files: preprocessing only asks whether they are there. Linux only: memory is read in /proc.
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
    source: Positional[Path]  # annotation file in AI Challenger's form
    photos: int = 210_000  # five captions each; AI Challenger's train split has 210,000
    workers: int = os.cpu_count() or 1  # processes that cut captions
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
        shared, summed, processes = watch_memory(process)
        seconds = time.perf_counter() - started
        cpu = os.times()
        if process.returncode:
            sys.exit(f"error: the command ended with status {process.returncode}")
    captions = 5 * bench.photos
    print(f"{'captions':>24}  {captions:,} ({distinct:,} distinct)")
    print(f"{'wall':>24}  {seconds:.1f} s, {captions / seconds:,.0f} captions/s")
    print(f"{'processor':>24}  {cpu.children_user + cpu.children_system:.1f} s, all processes")
    print(f"{'peak memory':>24}  {summed / 1e9:.2f} GB resident ({shared / 1e9:.2f} GB with shared pages counted once)")
    print(f"{'processes':>24}  {processes} at most")


def make_annotations(bench: Bench, folder: Path) -> int:
    """Write captions.json and the empty photos; the number of distinct captions."""
    chance = random.Random(0)
    source = [caption for entry in json.loads(bench.source.read_bytes()) for caption in entry["caption"]]
    (folder / "images").mkdir()
    entries = []
    for number in range(bench.photos):
        captions = [make_caption(chance, source) for _ in range(5)]
        entries.append({"url": "", "image_id": f"{number:040x}.jpg", "caption": captions})
        (folder / "images" / entries[-1]["image_id"]).touch()
    (folder / "captions.json").write_text(json.dumps(entries), "utf-8")
    return len({caption for entry in entries for caption in entry["caption"]})


def make_caption(chance: random.Random, source: list[str]) -> str:
    length, caption = chance.randint(18, 26), ""
    while len(caption) < length:
        caption += chance.choice(source).rstrip("。")
    return caption[:length]


def watch_memory(process: subprocess.Popen) -> tuple[int, int, int]:
    """Peaks until the process ends: proportional and resident bytes of it and its children, and their number."""
    peaks = (0, 0, 0)
    while process.poll() is None:
        memories = [memory(pid) for pid in family(process.pid)]
        sums = (*map(sum, zip((0, 0), *memories, strict=True)), len(memories))
        peaks = tuple(map(max, peaks, sums))
        time.sleep(0.2)
    return peaks


def family(pid: int) -> list[int]:
    """A process and its children's children."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return []
    return [pid] + [member for child in children for member in family(int(child))]


def memory(pid: int) -> tuple[int, int]:
    """Proportional and resident bytes."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return 1024 * kilobytes["Pss"], 1024 * kilobytes["Rss"]


if __name__ == "__main__":
    main(tyro.cli(Bench))
