"""The same seed gives the same run to the byte, for any hash seed of Python and any start method of worker processes;
another seed gives another run."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch

from captioning.encoders.loading import load_encoder
from captioning.evaluation import score_report
from captioning.evaluation.java_metrics import meteor_score
from captioning.runtime.checkpoint import load_checkpoint
from tests.small import make_small_data, same
from tests.torture.artefacts import RECIPE, run_ok

ROOT = Path(__file__).parents[2]
ENCODER = "--encoder resnet18.layer2 --image-size 64 --weights random"
TUNE = (
    f"train.py data/small {RECIPE} --epochs 1 --fine-tune --flip --crop 0.8 {ENCODER.replace('random', 'weights.pth')}"
)
RUN = f"train.py data/drawn {RECIPE} --dropout 0.3 --epochs"
EVERY_COMMAND = (
    "preprocess data/drawn --scenes 24 --language zh --min-count 1",
    f"extract_features.py data/drawn {ENCODER} --precision float32 --workers 1",
    f"{RUN} 2 --run att",
    f"{RUN} 2 --run hard --decoder hard-attention --scheduled-sampling 0.5",
    f"{RUN} 1 --run cider --objective cider --start-from checkpoints/att",
    "generate.py checkpoints/att --data data/drawn --split val --json out.json --scores scores.json --workers 1",
)
MEASURED = ("seconds", "per_second", "waiting", "time", "peak_memory")  # parts of log keys that no seed decides


def files(folder: Path) -> dict[str, object]:
    """The path of every file below the folder -> its content; of a log, what does not depend on the clock."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def content(path: Path) -> object:
    if path.name == "log.jsonl":
        return reproducible_part(path)
    return without_photo_times(path) if path.suffix == ".h5" else path.read_bytes()


def without_photo_times(features: Path) -> bytes:
    """The bytes of a feature file except the modification times of its photos, which were drawn a moment before."""
    copied = bytearray(features.read_bytes())
    with h5py.File(features) as file:
        photo_files = file["photo_files"]
        start = photo_files.id.get_offset()
        copied[start : start + photo_files.id.get_storage_size()] = bytes(photo_files.id.get_storage_size())
    return bytes(copied)


def reproducible_part(log: Path) -> list[dict]:
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    lines = [line for line in lines if line["event"] != "step"]  # written every few seconds
    return [{key: line[key] for key in line if not any(word in key for word in MEASURED)} for line in lines]


def run_in_new_process(folder: Path, hash_seed: str) -> dict[str, object]:
    """Run every command in a new Python with this hash seed. Return what they write."""
    folder.mkdir()
    script = (
        "import sys; from tests.torture.artefacts import run_ok; print('imported', file=sys.stderr, flush=True)\n"
        f"for command in {EVERY_COMMAND}: run_ok(command)"
    )
    paths = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": paths, "PATH": ""}  # hides Java
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("imported\n"), f"importing the commands emits a warning: {done.stderr}"
    return files(folder)


def run_here(folder: Path) -> dict[str, object]:
    """Run every command in this process, whose hash seed is random unless PYTHONHASHSEED is set."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PATH", "")  # as in a new process: hides Java and git
        patch.setattr(score_report, "meteor_score", meteor_score)
        for command in EVERY_COMMAND:
            run_ok(command)
    return files(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, times):
    """What every command writes with hash seed 0, and the folder. In the suite: with the hash seed of the tests."""
    folder = tmp_path_factory.mktemp("same") / "0"
    written = run_here(folder) if times(True, False) else run_in_new_process(folder, "0")
    return written, folder


@pytest.mark.parametrize("hash_seed", ["1", "random"])
def test_the_same_seed_writes_the_same_bytes_for_any_hash_seed(undisturbed, tmp_path, hash_seed, times, tally):
    """Also, importing the commands, and so every encoder, emits no warning."""
    if hash_seed == "random" and times(True, False):
        pytest.skip("long form: make torture")
    expected, _ = undisturbed
    found = run_in_new_process(tmp_path / hash_seed, hash_seed)
    assert {"data/drawn/captions.jsonl", "data/drawn/features.h5", "checkpoints/att/last.pt"} <= found.keys()
    assert found.keys() == expected.keys() and {"checkpoints/hard/last.pt", "out.json"} <= found.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    tally("commands with other hashes", len(EVERY_COMMAND))


def test_another_seed_gives_another_run(undisturbed, monkeypatch):
    monkeypatch.chdir(undisturbed[1])
    run_ok(f"{RUN} 2 --run att-1 --seed 1")
    one, other = (load_checkpoint(undisturbed[1] / "checkpoints" / run / "last.pt") for run in ("att", "att-1"))
    assert not same(one["decoder"]["state"], other["decoder"]["state"])


def run_with_workers(method: str, workers: int) -> tuple:
    """Features, and a fine-tuned run, whose photos are read by workers with this start method."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        run_ok(f"extract_features.py data/small {ENCODER} --precision float32 --overwrite --workers {workers}")
        run_ok(f"{TUNE} --run tuned --overwrite --workers {workers}")
    finally:
        multiprocessing.set_start_method(before, force=True)
    return Path("data/small/features.h5").read_bytes(), load_checkpoint(Path("checkpoints/tuned/last.pt"))


def test_workers_give_the_same_results_with_any_start_method(tmp_path, monkeypatch, times, tally):
    """The same as no workers: they receive all they need and draw no random numbers of their own.

    In the suite: workers of a fork server, which has imported for all of them what each spawned one would import.
    """
    multiprocessing.set_forkserver_preload(["captioning.encoders.images"])
    monkeypatch.chdir(tmp_path)
    make_small_data(Path(""), photos=12)
    torch.save(load_encoder("resnet18.layer2", "random", 64).body.state_dict(), "weights.pth")
    features, alone = run_with_workers("fork", 0)
    for method in ("forkserver", "fork", "spawn")[: times(1, 3)]:
        found, run = run_with_workers(method, times(1, 2))
        assert found == features, method
        for part in ("decoder", "encoder"):
            assert same(run[part]["state"], alone[part]["state"]), (method, part)
        tally("commands with workers of another start", 2)
