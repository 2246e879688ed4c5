"""The same seed gives the same run, byte for byte: in another process, whatever Python's hashes and however its workers
start; and another seed gives another."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from captioning.runtime.checkpoint import load_checkpoint
from tests.small import make_small_data, same
from tests.torture.artefacts import RECIPE, run_ok

ROOT = Path(__file__).parents[2]
LIVE = "--encoder resnet18.layer2 --image-size 64 --weights random"
TUNE = f"train.py data/small {RECIPE} --epochs 1 --fine-tune --flip --crop 0.8 {LIVE}"
RUN = f"train.py data/drawn {RECIPE} --epochs 2 --dropout 0.3"
EVERY_COMMAND = (
    "preprocess data/drawn --scenes 24 --language zh --min-count 1",
    f"extract_features.py data/drawn {LIVE} --precision float32 --workers 1",
    f"{RUN} --run att",
    f"{RUN} --run att-1 --seed 1",
    f"{RUN} --run hard --decoder hard-attention --scheduled-sampling 0.5",
    f"{RUN} --run cider --objective cider --start-from checkpoints/att",
    "generate.py checkpoints/att --data data/drawn --split val --json out.json --scores scores.json --workers 1",
)
TIMES = ("seconds", "per_second", "waiting", "time", "peak_memory")  # what a log says that no seed decides


def files(folder: Path) -> dict[str, object]:
    """What every file below the folder says; of a log, what does not depend on the clock."""
    return {
        str(path.relative_to(folder)): told(path) if path.name == "log.jsonl" else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def told(log: Path) -> list[dict]:
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    lines = [line for line in lines if line["event"] != "step"]  # one every few seconds
    return [{key: line[key] for key in line if not any(word in key for word in TIMES)} for line in lines]


def in_a_process(folder: Path, hash_seed: str) -> dict[str, object]:
    """Every command, in a new Python with these hashes -> what it has written."""
    folder.mkdir()
    script = f"from tests.torture.artefacts import run_ok\nfor command in {EVERY_COMMAND}: run_ok(command)"
    paths = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": paths, "PATH": ""}  # without Java
    subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, check=True)
    return files(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What every command writes, and the folder it is in."""
    folder = tmp_path_factory.mktemp("same") / "0"
    return in_a_process(folder, "0"), folder


@pytest.mark.parametrize("hash_seed", ["1", "random"])
def test_the_same_seed_writes_the_same_bytes_whatever_the_hashes(undisturbed, tmp_path, hash_seed, tally):
    expected, _ = undisturbed
    found = in_a_process(tmp_path / hash_seed, hash_seed)
    assert found.keys() == expected.keys() >= {"data/drawn/captions.jsonl", "checkpoints/hard/last.pt", "out.json"}
    assert [name for name in expected if found[name] != expected[name]] == []
    tally("commands with other hashes", len(EVERY_COMMAND))


def test_another_seed_is_another_run(undisturbed):
    one, other = (load_checkpoint(undisturbed[1] / "checkpoints" / run / "last.pt") for run in ("att", "att-1"))
    assert not same(one["decoder"]["state"], other["decoder"]["state"])


def with_workers(method: str, workers: int) -> tuple:
    """Features, and the weights of a run with the live encoder, whose photos are read by workers that start so."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        run_ok(f"extract_features.py data/small {LIVE} --precision float32 --overwrite --workers {workers}")
        run_ok(f"{TUNE} --run tuned --overwrite --workers {workers}")
    finally:
        multiprocessing.set_start_method(before, force=True)
    return Path("data/small/features.h5").read_bytes(), load_checkpoint(Path("checkpoints/tuned/last.pt"))


def test_workers_make_the_same_however_they_start(tmp_path, monkeypatch, times, tally):
    """As the command alone: they get all they need, and draw nothing of their own."""
    monkeypatch.chdir(tmp_path)
    make_small_data(Path(""), photos=12)
    features, alone = with_workers("fork", 0)
    for method in ("fork", "spawn", "forkserver")[: times(2, 3)]:
        found, run = with_workers(method, times(1, 2))
        assert found == features, method
        for part in ("decoder", "encoder"):
            assert same(run[part]["state"], alone[part]["state"]), (method, part)
        tally("commands with workers of another start", 2)
