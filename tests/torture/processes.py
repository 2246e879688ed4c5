"""Run commands in child processes, which tests kill or stop, and compare what they write.

The children are forks of this process, which has imported torch already: that saves each of them seconds of imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from captioning.runtime.checkpoint import load_checkpoint
from captioning.runtime.signals import install_exit_handlers
from tests.torture.artefacts import EXTRACT, GENERATE, RECIPE
from tests.torture.commands import run_command

WITH_PREVIEW = RECIPE.replace("--preview-photos 0", "--preview-photos 1")
TRAIN_FLAGS = f"{WITH_PREVIEW} --precision float32 --save-every 0 --epochs 2 --run new"
FINE_TUNE_FLAGS = "--fine-tune --encoder resnet18.layer1 --weights random --image-size 32 --workers 1"
FILES = " ".join(f"--{kind} out/x.{kind}" for kind in ("json", "csv", "html", "scores"))
WORK = {  # these commands write only below out/ and checkpoints/new/
    "preprocess": "preprocess out/data --train many.json data/small/photos --min-count 1 --workers 1",
    "preprocess --scenes": "preprocess out/data --scenes 40 --language en --min-count 1 --workers 1",
    "extract_features.py": f"{EXTRACT} --batch-size 2 --out out/features.h5",
    "train.py": f"train.py data/small {TRAIN_FLAGS}",
    "train.py --fine-tune": f"train.py data/small {TRAIN_FLAGS} {FINE_TUNE_FLAGS}",
    "generate.py": f"{GENERATE} --data data/small --limit 3 --max-length 8 {FILES} --pictures out/pictures",
}
STOPS = (signal.SIGINT, signal.SIGTERM)
TEMPORARY = (".tmp", ".lock", ".draft")
OUTPUT_FOLDERS = (Path("out"), Path("checkpoints/new"))
STDERR = Path("stderr.txt")


def write_many_captions() -> None:
    """Write annotations that take a while to read and tokenize."""
    texts = [f"a square number {number} {number * number}" for number in range(600)]
    Path("many.json").write_text(
        json.dumps([{"image_id": f"{i}.png", "caption": texts} for i in range(24)]), encoding="utf-8"
    )


def start(command: str, before: Callable[[], None] = lambda: None) -> int:
    """Run the command in a child in a process group of its own, as a terminal does. Return its process id.

    before: called in the child before the command.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until the child has its own handlers
    process = os.fork()
    if not process:
        try:
            _run_in_child(command, before)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(99)
    with contextlib.suppress(OSError):  # the child may have done so itself and exited
        os.setpgid(process, process)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    return process


def _run_in_child(command: str, before: Callable[[], None]) -> None:
    os.setpgrp()
    log = os.open(STDERR, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared by all forks: a killed one might never release it
    install_exit_handlers()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    before()
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
    outcome = run_command(command)
    os.write(2, f"{outcome.stderr}\n".encode())
    os._exit(outcome.status)


def exit_status(process: int) -> int:
    """Wait for the process. Return its exit status, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def has_exited(process: int) -> bool:
    return bool(os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT))


def wait_for_cpu_seconds(process: int, limit: float) -> None:
    """Wait until the process has used `limit` CPU seconds or has exited.

    CPU time, so that the load of the machine does not move the moment of a kill. Outside Linux, which gives access to
    the clock of another process, it is wall time.
    """
    began = time.monotonic()
    while not has_exited(process) and cpu_seconds(process, began) < limit:
        time.sleep(0.001)


def cpu_seconds(process: int, began: float) -> float:
    if sys.platform == "linux":
        return time.clock_gettime(~process << 3 | 2)  # the clock id of another process
    return time.monotonic() - began


def kill_after(command: str, seconds: float) -> int:
    """Start the command and kill it after that many CPU seconds. Return its exit status."""
    process = start(command)
    wait_for_cpu_seconds(process, seconds)
    os.kill(process, signal.SIGKILL)
    return exit_status(process)


def run_alone(command: str) -> float:
    """Run the command in a child process. It must succeed. Return its CPU seconds."""
    began = time.monotonic()
    process = start(command)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    seconds = cpu_seconds(process, began)
    status = exit_status(process)
    assert status == 0, (status, stderr_text())
    return seconds


def stderr_text() -> str:
    return STDERR.read_text(encoding="utf-8")


def rerun(name: str) -> None:
    """Run the command of WORK again, train.py with --resume."""
    run_alone(WORK[name] + (" --resume" if name.startswith("train") else ""))


def files_so_far() -> frozenset[str]:
    """The output files that exist, which show how far a command had come."""
    return frozenset(str(path) for folder in OUTPUT_FOLDERS for path in folder.rglob("*") if path.suffix != ".lock")


def remove_outputs() -> None:
    for folder in OUTPUT_FOLDERS:
        shutil.rmtree(folder, ignore_errors=True)


def outputs() -> dict:
    """All output files and their contents, except the settings in checkpoints and the times in logs."""
    files = (path for folder in OUTPUT_FOLDERS for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): _content(path) for path in files}


def _content(path: Path) -> object:
    if path.name.endswith(".encoder.pt"):  # its bytes also depend on which equal strings are one object
        return _plain(torch.load(path, weights_only=True))
    if path.parts[0] == "checkpoints" and path.suffix == ".pt":
        return _plain({name: part for name, part in load_checkpoint(path).items() if name != "config"})
    if path.suffix == ".jsonl" and path.parts[0] == "checkpoints":
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        compared = ("epoch", "train_loss", "val_loss", "CIDEr-D", "best", "preview")
        return [[event.get(name) for name in compared] for event in events if event["event"] == "epoch"]
    return path.read_bytes()


def _plain(value: object) -> object:
    """Replace tensors by bytes, which == compares."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def rerun_equals(name: str, expected: dict) -> bool:
    """Run the command again. Its outputs must equal those of an undisturbed run, with no temporary file left."""
    rerun(name)
    found = outputs()
    assert found.keys() == expected.keys()
    assert [path for path in found if found[path] != expected[path]] == []
    paths = [path for folder in OUTPUT_FOLDERS for path in folder.rglob("*")]
    assert not [path for path in paths if any(part in path.name for part in TEMPORARY)]
    return True
