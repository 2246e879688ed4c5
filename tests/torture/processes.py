"""Commands as processes of their own, which may be killed or stopped; and what they have written.

A fork of this process, which has imported everything, spares each of them the seconds that importing torch takes.
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
from tests.torture.ends import end_of

DRAWING = RECIPE.replace("--preview-photos 0", "--preview-photos 1")
LEARNS = f"{DRAWING} --precision float32 --save-every 0 --epochs 2 --run new"
LIVE = "--fine-tune --encoder resnet18.layer1 --weights random --image-size 32 --workers 1"
FILES = " ".join(f"--{kind} out/x.{kind}" for kind in ("json", "csv", "html", "scores"))
WORK = {  # all that they write is below out/ and checkpoints/new/
    "preprocess": "preprocess out/data --train many.json data/small/photos --min-count 1 --workers 1",
    "preprocess --scenes": "preprocess out/data --scenes 40 --language en --min-count 1 --workers 1",
    "extract_features.py": f"{EXTRACT} --batch-size 2 --out out/features.h5",
    "train.py": f"train.py data/small {LEARNS}",
    "train.py --fine-tune": f"train.py data/small {LEARNS} {LIVE}",
    "generate.py": f"{GENERATE} --data data/small --limit 3 --max-length 8 {FILES} --pictures out/pictures",
}
STOPS = (signal.SIGINT, signal.SIGTERM)
LITTER = (".tmp", ".lock", ".draft")
PLACES = (Path("out"), Path("checkpoints/new"))


def write_many_captions() -> None:
    """So many that reading and cutting them takes a while."""
    texts = [f"a square number {number} {number * number}" for number in range(600)]
    Path("many.json").write_text(json.dumps([{"image_id": f"{i}.png", "caption": texts} for i in range(24)]))


def started(command: str, before: Callable[[], None] = lambda: None) -> int:
    """A process that runs the command, in a group of its own as a terminal's -> its id. before: called in it first."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until it has its own handlers
    process = os.fork()
    if not process:
        try:
            _become(command, before)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(99)
    with contextlib.suppress(OSError):  # or it has done so itself, and ended
        os.setpgid(process, process)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    return process


def _become(command: str, before: Callable[[], None]) -> None:
    os.setpgrp()
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    tqdm.set_lock(threading.RLock())  # its own is shared by all that are forked: a kill would keep it for ever
    install_exit_handlers()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    before()
    sys.stderr = open(2, "w", closefd=False)
    end = end_of(command)
    os.write(2, f"{end.said}\n".encode())
    os._exit(end.status)


def ended(process: int) -> int:
    """Its status; of a process that a signal has ended, the signal's number below zero."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def worked(process: int, until: float = float("inf")) -> float:
    """Wait until it has computed for so many seconds, or ended -> for how many it has; so a busy machine moves no kill.

    On Linux this is the name of another process's clock; elsewhere, the time on the wall has to do.
    """
    begun, seconds = time.monotonic(), 0.0
    while seconds < until and not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.0005)
        linux = sys.platform == "linux"
        seconds = time.clock_gettime(~process << 3 | 2) if linux else time.monotonic() - begun
    return seconds


def killed_at(command: str, moment: float) -> int:
    """Start the command, and kill it after so many seconds of work -> its status."""
    process = started(command)
    worked(process, moment)
    os.kill(process, signal.SIGKILL)
    return ended(process)


def does_alone(command: str) -> float:
    """In a process, undisturbed, to a good end -> seconds of work."""
    process = started(command)
    seconds = worked(process)
    status = ended(process)
    assert status == 0, (status, said())
    return seconds


def said() -> str:
    return Path("said").read_text()


def goes_on(what: str) -> None:
    """The next start: the same command, train.py's with --resume."""
    does_alone(WORK[what] + (" --resume" if what.startswith("train") else ""))


def phase() -> frozenset[str]:
    """How far a command had come: the files that it has written."""
    return frozenset(str(path) for place in PLACES for path in place.rglob("*") if path.suffix != ".lock")


def forget() -> None:
    for place in PLACES:
        shutil.rmtree(place, ignore_errors=True)


def written() -> dict:
    """Everything that is there, to be compared: of checkpoints all but the settings, of logs what is not time."""
    return {str(path): _content(path) for place in PLACES for path in sorted(place.rglob("*")) if path.is_file()}


def _content(path: Path) -> object:
    if path.parts[0] == "checkpoints" and path.suffix == ".pt":
        return _plain({name: part for name, part in load_checkpoint(path).items() if name != "config"})
    if path.suffix == ".jsonl" and path.parts[0] == "checkpoints":
        events = [json.loads(line) for line in path.read_text().splitlines()]
        kept = ("epoch", "train_loss", "val_loss", "CIDEr-D", "best", "preview")
        return [[event.get(name) for name in kept] for event in events if event["event"] == "epoch"]
    return path.read_bytes()


def _plain(value: object) -> object:
    """Tensors as bytes, which can be compared."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def ends_as_if_nothing_had_been(what: str, wanted: dict) -> bool:
    goes_on(what)
    found = written()
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []
    assert not [path for place in PLACES for path in place.rglob("*") if any(word in path.name for word in LITTER)]
    return True
