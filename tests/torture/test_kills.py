"""Kill or stop a command at any moment: the next start works, and ends as if nothing had happened.

Exceptions: in the first hundredths of a second, until our first line runs, Python's own handlers are in place, and
Ctrl-C ends in Python's own traceback; nothing has been read or written by then. In the last hundredths, when all is
written, Python has restored its handlers, and the process ends without a message. A worker that Python 3.14 or newer
starts afresh instead of forking it has such a moment, too, when the whole process group is stopped.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import pytest

from captioning.runtime.loader import init_worker
from captioning.runtime.signals import STOPPED
from tests.torture.artefacts import run_ok
from tests.torture.processes import (
    STOPS,
    WORK,
    cpu_seconds,
    exit_status,
    files_so_far,
    has_exited,
    kill_after,
    outputs,
    remove_outputs,
    rerun_equals,
    start,
    stderr_text,
    wait_for_cpu_seconds,
)

ROOT = Path(__file__).parents[2]
# States of the files that a kill must meet; others than 3. An extraction has none of its two files, or both: one alone
# lasts a moment, which the kills before each change of the disk meet.
LASTING_STATES = {"extract_features.py": 2}
SCRIPTS = {"preprocess": ["-m", "preprocess"]}


def moments(count: int, seconds: float, seed: str) -> Iterator[float]:
    """Yield one random moment in each of `count` parts of the time, then earlier and earlier ones.

    The later ones replace those that came after the end of the command.
    """
    generator = random.Random(seed)
    for attack in range(6 * count):
        yield (attack % count + generator.random()) / count * seconds * 0.8 ** (attack // count)


# ---- kills


@pytest.mark.parametrize("what", WORK)
def test_killed_at_any_moment_the_next_start_ends_as_if_nothing_had_happened(workdir, undisturbed, what, times, tally):
    expected, seconds = undisturbed(what)
    count, killed, phases = times(1, 50), 0, set()
    for moment in moments(count, seconds, what):
        status = kill_after(WORK[what], moment)
        assert status in (0, -signal.SIGKILL), stderr_text()
        killed += status != 0
        phases.add(files_so_far())
        if killed % 3 == 1:  # kill the next start as well
            kill_after(WORK[what] + (" --resume" if what.startswith("train") else ""), moment / 2)
        assert rerun_equals(what, expected)
        remove_outputs()
        if killed == count:
            break
    assert killed == count and len(phases) >= times(1, LASTING_STATES.get(what, 3)), (killed, phases)
    tally(f"kills of {what}", killed)


def orphan(pipe: int) -> None:
    """A worker whose command is killed before the worker has asked for its parent's id."""
    parent = os.getppid()
    os.kill(parent, signal.SIGKILL)
    while os.getppid() == parent:
        pass
    init_worker(0)
    os.write(pipe, b"lives on")


def test_a_worker_ends_even_if_the_command_is_killed_while_the_worker_starts():
    read, write = os.pipe()
    process = os.fork()
    if not process:
        get_context("fork").Process(target=orphan, args=(write,)).start()
        signal.pause()
    os.close(write)
    assert exit_status(process) == -signal.SIGKILL
    with open(read, "rb") as pipe:
        assert pipe.read() == b""


CHANGES = ("replace", "unlink", "mkdir", "rmdir", "truncate", "ftruncate", "fsync", "fdatasync")


def dies_before(number: int):
    """Return a function after which the process kills itself before its number-th change of the disk."""
    remaining = [number]

    def counted(change):
        def do(*arguments, **settings):
            remaining[0] -= 1
            if remaining[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **settings)

        return do

    def patch():
        for name in CHANGES:
            if hasattr(os, name):
                setattr(os, name, counted(getattr(os, name)))

    return patch


@pytest.mark.parametrize("what", WORK)
def test_killed_before_any_change_of_the_disk_the_next_start_ends_as_if_nothing_had_happened(
    workdir, undisturbed, what, times, tally
):
    """Random moments seldom fall between two renames."""
    expected, _ = undisturbed(what)
    number, step, kills = (0, 1, 0) if times(0, 1) else (5, 1, 0)
    while exit_status(start(WORK[what], dies_before(number))):
        assert rerun_equals(what, expected)
        remove_outputs()
        number, kills = number + step, kills + 1
        if kills == times(1, 40):
            break
    assert kills
    tally(f"kills of {what} before a change of the disk", kills)


def pair_of(found: dict) -> list:
    return [found.get(f"out/data/{name}") for name in ("captions.jsonl", "vocab.json")]


def test_killed_while_it_replaces_a_data_set_preprocess_never_leaves_captions_with_the_vocabulary_of_another(
    workdir, tally
):
    """The next start works with --overwrite and, where the captions are missing, without it."""
    Path("few.json").write_text(
        json.dumps([{"image_id": f"{i}.png", "caption": ["a few words"]} for i in range(24)]), encoding="utf-8"
    )
    command, other = (WORK["preprocess"].replace("many.json", name) for name in ("few.json", "aic.json"))
    run_ok(command)
    expected = outputs()
    run_ok(f"{other} --overwrite")
    old, new = pair_of(outputs()), pair_of(expected)
    number, seen = 0, set()
    while exit_status(start(f"{command} --overwrite", dies_before(number))):
        pair = pair_of(outputs())
        assert pair in (old, new) or pair[0] is None, number
        seen.add("old" if pair == old else "new" if pair == new else "none")
        if pair[0] is None:
            run_ok(command)  # even without --overwrite
            assert outputs() == expected
        run_ok(f"{command} --overwrite")
        assert outputs() == expected
        run_ok(f"{other} --overwrite")
        number += 1
    assert seen >= {"old", "none"} and number > 6  # Pythons differ in how they remove a folder
    tally("kills while preprocess replaces a data set", number)


def test_an_encoder_file_without_its_features_is_replaced(workdir):
    """A kill before features.h5 exists leaves such a file, and so does the removal of features.h5."""
    run_ok(WORK["extract_features.py"])
    Path("out/features.h5").unlink()
    other = WORK["extract_features.py"].replace("--image-size 64", "--image-size 96")
    run_ok(other)
    assert "24 of 24 rows are done and undamaged" in run_ok(f"{other} --verify")


# ---- Ctrl-C and SIGTERM


def has_checkpoint_if_begun(what: str, begun: bool) -> bool:
    """Whether a training run that had begun has its last.pt."""
    return not (begun and what.startswith("train")) or Path("checkpoints/new/last.pt").exists()


def is_one_message(text: str) -> bool:
    """Whether the only message is that of the stop, after any progress bars."""
    lines = text.splitlines()
    return (
        bool(lines)
        and lines[-1].endswith(STOPPED)
        and text.count(STOPPED) == 1
        and not re.search("Traceback|Exception|Error", text)
    )


@pytest.mark.parametrize("what", WORK)
def test_stopped_at_any_moment_a_command_prints_one_line_and_the_next_start_continues(
    workdir, undisturbed, what, times, tally
):
    """Ctrl-C and SIGTERM in turn, to the command alone and to its whole process group in turn."""
    expected, seconds = undisturbed(what)
    count, stopped = times(1, 50), 0
    first = list(WORK).index(what)  # in the suite, which stops each command once, the six commands cover the turns
    for turn, moment in enumerate(moments(count, seconds, f"{what} stops"), start=first):
        process = start(WORK[what])
        wait_for_cpu_seconds(process, moment)
        log = Path("checkpoints/new/log.jsonl")
        begun = log.exists() and '"start"' in log.read_text(encoding="utf-8")
        send = os.killpg if turn // 2 % 2 else os.kill
        send(process, STOPS[turn % 2])
        status = exit_status(process)
        assert status == 0 or (status == 130 and is_one_message(stderr_text())), (status, moment, stderr_text())
        assert status == 0 or has_checkpoint_if_begun(what, begun)
        stopped += status == 130
        assert rerun_equals(what, expected)
        remove_outputs()
        if stopped == count:
            break
    assert stopped == count
    tally(f"Ctrl-C and SIGTERM to {what}", stopped)


# ---- new Python processes, from their first moment on


def popen(command: str) -> subprocess.Popen:
    """Start the command as a user does."""
    name, *words = shlex.split(command)
    code = SCRIPTS.get(name, [str(ROOT / name)])
    return subprocess.Popen(
        [sys.executable, *code, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,  # fits into the pipe's buffer: nobody reads it before the end
        text=True,
        env={**os.environ, "PATH": "", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])},
    )  # PATH: without Java, as the tests themselves (see no_java in conftest.py)


def signal_after(command: str, seconds: float, number: int) -> tuple[int, str]:
    """Send the command a signal after that many CPU seconds. Return its exit status and stderr."""
    process = popen(command)
    wait_for_cpu_seconds(process.pid, seconds)
    return finish(process, number)


def signal_once_written(command: str, path: Path, number: int) -> tuple[int, str]:
    """Send the command a signal once the file exists. Return its exit status and stderr."""
    process = popen(command)
    while not path.exists() and not has_exited(process.pid):
        time.sleep(0.001)
    return finish(process, number)


def finish(process: subprocess.Popen, number: int) -> tuple[int, str]:
    os.kill(process.pid, number)
    _, text = process.communicate()
    return process.returncode, text


def seconds_of(command: str) -> float:
    """The CPU seconds of an undisturbed process."""
    began = time.monotonic()
    process = popen(command)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    seconds = cpu_seconds(process.pid, began)
    assert process.wait() == 0, process.stderr.read()
    return seconds


def test_new_processes_are_killed_and_the_next_start_ends_as_if_nothing_had_happened(
    workdir, undisturbed, times, tally
):
    """In the suite: train.py, as soon as its log exists. With --torture: all commands, at two random moments each."""
    killed = 0
    if times(True, False):
        expected, _ = undisturbed("train.py")
        status, text = signal_once_written(WORK["train.py"], Path("checkpoints/new/log.jsonl"), signal.SIGKILL)
        assert status == -signal.SIGKILL, text
        assert rerun_equals("train.py", expected)
        remove_outputs()
        killed = 1
    for what in times([], list(WORK)):
        expected, _ = undisturbed(what)
        seconds = seconds_of(WORK[what])
        remove_outputs()
        for moment in islice(moments(2, seconds, what), 2):
            status, text = signal_after(WORK[what], moment, signal.SIGKILL)
            assert status in (0, -signal.SIGKILL), text
            killed += status != 0
            assert rerun_equals(what, expected)
            remove_outputs()
    tally("kills of commands that a user starts", killed)


def is_before_our_first_line(text: str) -> bool:
    """Whether a traceback of Ctrl-C is Python's own: no module has been imported yet but `signals`."""
    later = r"site-packages/(torch|numpy|tyro|tqdm)|command_line\.py|start_command\(\)"
    return "KeyboardInterrupt" in text and not re.search(later, text)


def test_a_new_process_that_is_stopped_during_its_imports_prints_one_line(workdir, undisturbed, times, tally):
    """Or nothing in its first moments, and in its last moments, when all is written."""
    stopped, silent = 0, 0
    for what in times(["train.py"], list(WORK)):
        expected, _ = undisturbed(what)
        seconds = seconds_of(WORK[what]) if times(False, True) else 1.5  # less than it takes to import torch
        remove_outputs()
        count = times(2, 8)
        for turn, moment in enumerate(islice(moments(count, seconds, f"{what} real"), count)):
            status, text = signal_after(WORK[what], moment, STOPS[turn % 2])
            if status in (130, 0):
                assert status == 0 or is_one_message(text), (moment, text)
                stopped += status == 130
            else:
                assert moment < 1 + seconds / 4 or outputs() == expected, (moment, status, text)
                assert status in (1, -signal.SIGTERM, -signal.SIGINT), (status, text)
                assert not re.search("Traceback|Exception|Error", text) or is_before_our_first_line(text), text
                silent += 1
            remove_outputs()
    assert stopped > silent
    tally("Ctrl-C and SIGTERM to commands that a user starts", stopped)
