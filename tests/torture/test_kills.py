"""Killed or stopped at any moment: the next start works, and ends as if nothing had been.

What cannot be had: in the first hundredths of a second, until our first line runs, Python has its own handlers, and
Ctrl-C ends in Python's own traceback; nothing has been read or written by then. In the last ones, when all is written,
Python has given our handlers back, and the process ends without a word. A worker that a Python newer than 3.13
starts anew, instead of forking it, has such a moment, too, where the whole process group is told to stop.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import pytest

from captioning.encoders.images import init_worker
from captioning.runtime.signals import STOPPED
from tests.torture.artefacts import does
from tests.torture.processes import (
    STOPS,
    WORK,
    ended,
    ends_as_if_nothing_had_been,
    forget,
    killed_at,
    phase,
    said,
    started,
    worked,
    written,
)

HOUSE = Path(__file__).parents[2]
SCRIPTS = {"preprocess": ["-m", "preprocess"]}


def moments(count: int, seconds: float, seed: str) -> Iterator[float]:
    """One by chance in each part of the time; then more of them, earlier and earlier, where some came too late."""
    chance = random.Random(seed)
    for attack in range(6 * count):
        yield (attack % count + chance.random()) / count * seconds * 0.8 ** (attack // count)


# ---- kills


@pytest.mark.parametrize("what", WORK)
def test_killed_at_any_moment_the_next_start_ends_as_if_nothing_had_been(at_work, undisturbed, what, times, tally):
    wanted, seconds = undisturbed(what)
    count, killed, phases = times(2, 50), 0, set()
    for moment in moments(count, seconds, what):
        status = killed_at(WORK[what], moment)
        assert status in (0, -signal.SIGKILL), said()
        killed += status != 0
        phases.add(phase())
        if killed % 3 == 1:  # and the next start, too
            killed_at(WORK[what] + (" --resume" if what.startswith("train") else ""), moment / 2)
        assert ends_as_if_nothing_had_been(what, wanted)
        forget()
        if killed == count:
            break
    assert killed == count and len(phases) >= times(1, 3), (killed, phases)
    tally(f"kills of {what}", killed)


def orphan(pipe: int) -> None:
    """A worker whose command is killed before it has looked who that is."""
    parent = os.getppid()
    os.kill(parent, signal.SIGKILL)
    while os.getppid() == parent:
        pass
    init_worker(0)
    os.write(pipe, b"lives on")


def test_a_worker_ends_even_where_the_command_was_killed_as_it_began():
    read, write = os.pipe()
    process = os.fork()
    if not process:
        get_context("fork").Process(target=orphan, args=(write,)).start()
        signal.pause()
    os.close(write)
    assert ended(process) == -signal.SIGKILL
    with open(read, "rb") as pipe:
        assert pipe.read() == b""


CHANGES = ("replace", "unlink", "mkdir", "rmdir", "truncate", "ftruncate", "fsync", "fdatasync")


def dies_before(number: int):
    """The process kills itself before its number-th change of what lies on the disk."""
    left = [number]

    def counted(change):
        def do(*arguments, **settings):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **settings)

        return do

    def patch():
        for name in CHANGES:
            if hasattr(os, name):
                setattr(os, name, counted(getattr(os, name)))

    return patch


@pytest.mark.parametrize("what", WORK)
def test_killed_before_any_change_of_the_disk_too(at_work, undisturbed, what, times, tally):
    """Chance seldom hits the moment between two renames."""
    wanted, _ = undisturbed(what)
    number, step, kills = (0, 1, 0) if times(0, 1) else (5, 1, 0)
    while ended(started(WORK[what], dies_before(number))):
        assert ends_as_if_nothing_had_been(what, wanted)
        forget()
        number, kills = number + step, kills + 1
        if kills == times(1, 40):
            break
    assert kills
    tally(f"kills of {what} before a change of the disk", kills)


def pair_of(found: dict) -> list:
    return [found.get(f"out/data/{name}") for name in ("captions.jsonl", "vocab.json")]


def test_killed_while_it_replaces_a_data_set_preprocess_never_leaves_captions_beside_a_foreign_vocabulary(
    at_work, undisturbed, tally
):
    """Neither with --overwrite nor, later, without it does a start ask for anything."""
    other = WORK["preprocess"].replace("many.json", "aic.json") + " --overwrite"
    wanted, _ = undisturbed("preprocess")
    does(other)
    old, new = pair_of(written()), pair_of(wanted)
    number, seen = 0, set()
    while ended(started(f"{WORK['preprocess']} --overwrite", dies_before(number))):
        pair = pair_of(written())
        assert pair in (old, new) or pair[0] is None, number
        seen.add("old" if pair == old else "new" if pair == new else "none")
        if pair[0] is None:
            does(WORK["preprocess"])  # even without --overwrite
            assert written() == wanted
        does(f"{WORK['preprocess']} --overwrite")
        assert written() == wanted
        does(other)
        number += 1
    assert seen >= {"old", "none"} and number > 6  # Pythons differ in how they remove a folder
    tally("kills while preprocess replaces a data set", number)


def test_an_encoder_that_was_left_alone_is_replaced(at_work):
    """As by a kill before features.h5 was there, or by whoever removed that one."""
    does(WORK["extract_features.py"])
    Path("out/features.h5").unlink()
    other = WORK["extract_features.py"].replace("--image-size 64", "--image-size 96")
    does(other)
    assert "24 of 24 rows are done and undamaged" in does(f"{other} --verify")


# ---- Ctrl-C and SIGTERM


def saves_what_there_is(what: str, begun: bool) -> bool:
    """A run that had begun has its last.pt."""
    return not (begun and what.startswith("train")) or Path("checkpoints/new/last.pt").exists()


def is_quiet(text: str) -> bool:
    lines = text.splitlines()  # the bars of tqdm are lines, too
    return (
        bool(lines)
        and lines[-1].endswith(STOPPED)
        and text.count(STOPPED) == 1
        and not re.search("Traceback|Exception|Error", text)
    )


@pytest.mark.parametrize("what", WORK)
def test_stopped_at_any_moment_a_command_says_one_line_and_the_next_start_goes_on(
    at_work, undisturbed, what, times, tally
):
    wanted, seconds = undisturbed(what)
    count, stopped = times(2, 50), 0
    for turn, moment in enumerate(moments(count, seconds, f"{what} stops")):
        process = started(WORK[what])
        worked(process, moment)
        log = Path("checkpoints/new/log.jsonl")
        begun = log.exists() and '"start"' in log.read_text()
        (os.killpg if turn // 2 % 2 else os.kill)(process, STOPS[turn % 2])  # with its workers, and without
        status = ended(process)
        assert status == 0 or (status == 130 and is_quiet(said())), (status, moment, said())
        assert status == 0 or saves_what_there_is(what, begun)
        stopped += status == 130
        assert ends_as_if_nothing_had_been(what, wanted)
        forget()
        if stopped == count:
            break
    assert stopped == count
    tally(f"Ctrl-C and SIGTERM to {what}", stopped)


# ---- real ones, from their first moment on


def popen(command: str) -> subprocess.Popen:
    """As a user starts it."""
    name, *words = shlex.split(command)
    code = SCRIPTS.get(name, [str(HOUSE / name)])
    return subprocess.Popen(  # whose stderr fits in a pipe
        [sys.executable, *code, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HOUSE), os.environ["PYTHONPATH"]])},
    )


def real_end(command: str, moment: float, number: int) -> tuple[int, str]:
    """Its status and stderr, sent a signal after so many seconds of work."""
    process = popen(command)
    worked(process.pid, moment)
    os.kill(process.pid, number)
    _, text = process.communicate()
    return process.returncode, text


def seconds_of(command: str) -> float:
    process = popen(command)
    seconds = worked(process.pid)
    assert process.wait() == 0, process.stderr.read()
    return seconds


def test_real_processes_are_killed_and_go_on_as_well(at_work, undisturbed, times, tally):
    killed = 0
    for what in list(WORK)[times(3, 0) : times(4, 6)]:
        wanted, _ = undisturbed(what)
        seconds = seconds_of(WORK[what])
        forget()
        for moment in islice(moments(2, seconds, what), times(1, 2)):
            status, text = real_end(WORK[what], moment if times(0, 1) else 0.9 * seconds, signal.SIGKILL)
            assert status in (0, -signal.SIGKILL), text
            killed += status != 0
            assert ends_as_if_nothing_had_been(what, wanted)
            forget()
    tally("kills of commands that a user starts", killed)


def before_our_first_line(text: str) -> bool:
    """Python's own words on a Ctrl-C while it starts: none of ours has been asked for anything but `stop`."""
    later = r"site-packages/(torch|numpy|tyro|tqdm)|command_line\.py|leave_quietly\(\)"
    return "KeyboardInterrupt" in text and not re.search(later, text)


def test_a_real_process_that_is_stopped_while_it_imports_says_one_line(at_work, undisturbed, times, tally):
    """Or nothing, in its first moments, and in its last ones, when all is written."""
    stopped, silent = 0, 0
    for what in list(WORK)[times(3, 0) : times(4, 6)]:
        wanted, _ = undisturbed(what)
        seconds = seconds_of(WORK[what]) if times(0, 1) else 2.0
        forget()
        for turn, moment in enumerate(islice(moments(times(4, 8), seconds, f"{what} real"), times(4, 8))):
            status, text = real_end(WORK[what], moment, STOPS[turn % 2])
            if status in (130, 0):
                assert status == 0 or is_quiet(text), (moment, text)
                stopped += status == 130
            else:
                assert moment < 1 + seconds / 4 or written() == wanted, (moment, status, text)
                assert status in (1, -signal.SIGTERM, -signal.SIGINT), (status, text)
                assert not re.search("Traceback|Exception|Error", text) or before_our_first_line(text), text
                silent += 1
            forget()
    assert stopped > silent
    tally("Ctrl-C and SIGTERM to commands that a user starts", stopped)
