"""Two processes that would write to one place: the second is refused with one line, and the first ends undisturbed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
import time
from pathlib import Path

import pytest

from captioning.errors import UserError
from captioning.runtime.files import atomic_write, locked
from tests.torture.artefacts import run_ok
from tests.torture.commands import run_command
from tests.torture.processes import (
    WORK,
    exit_status,
    outputs,
    remove_outputs,
    run_alone,
    start,
    stderr_text,
)

TWICE = {
    "preprocess": "out/data",
    "preprocess --scenes": "out/data",
    "extract_features.py": "out/features.h5",
    "train.py": "checkpoints/new",
    "train.py --fine-tune": "checkpoints/new",
}


def holder(of: str) -> str:
    """What the lock file says, once there is one."""
    lock = Path(f"{of}.lock") if of.endswith(".h5") else Path(of, ".lock")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if text := lock.read_text():
                return text
        time.sleep(0.001)
    raise AssertionError("never locked")


@pytest.mark.parametrize("what", TWICE)
def test_a_second_process_is_refused_and_told_which_is_the_first(workdir, undisturbed, what, tally):
    wanted, _ = undisturbed(what)
    first = start(WORK[what])
    assert holder(TWICE[what]).startswith(f"{first} on ")
    os.kill(first, signal.SIGSTOP)
    for more in ("", " --overwrite", " --resume") if what.startswith("train") else ("", " --overwrite"):
        end = run_command(WORK[what] + more)
        assert end.status == 1 and "\n" not in end.stderr, end
        assert end.stderr.startswith(f"error: {TWICE[what]}: process {first} on ") and "; wait for it, or" in end.stderr
        tally("second processes")
    os.kill(first, signal.SIGCONT)
    assert exit_status(first) == 0, stderr_text()
    assert outputs() == wanted


def speaks_into(name: str):
    """For `started`: what the process says is in a file of its own."""
    return lambda: os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)


@pytest.mark.parametrize("what", TWICE)
def test_of_several_started_at_once_one_works_and_the_others_name_it(workdir, undisturbed, what, times, tally):
    wanted, _ = undisturbed(what)
    for _ in range(times(1, 10)):
        processes = [start(WORK[what], speaks_into(f"said-{place}")) for place in range(3)]
        statuses = [exit_status(process) for process in processes]
        assert 0 in statuses and set(statuses) <= {0, 1}, statuses
        for place, status in enumerate(statuses):
            text = Path(f"said-{place}").read_text()
            named = re.match(r"error: .*: process (\d+) on ", text)
            late = what.startswith("train") and "is there already; go on with --resume" in text
            assert status == 0 or late or int(named[1]) in processes, text
        assert outputs() == wanted
        remove_outputs()
    tally("starts of three at once", times(1, 10))


@pytest.mark.parametrize("what", TWICE)
def test_a_kill_frees_the_lock_at_once_even_while_workers_live_on(workdir, what, tally):
    command = WORK[what].replace("--workers 0", "--workers 1")
    first = start(command)
    holder(TWICE[what])
    time.sleep(0.3)
    os.kill(first, signal.SIGKILL)
    exit_status(first)
    end = run_command(command)
    assert end.status == 0 or "is there already" in end.stderr, end
    tally("locks of the killed")


def test_readers_are_never_refused(workdir):
    for what, read in {
        "extract_features.py": ["extract_features.py data/small --out out/features.h5 --info"],
        "train.py": ["generate.py checkpoints/new data/small/photos/0.png --device cpu --precision float32"],
    }.items():
        remove_outputs()
        run_alone(WORK[what])
        again = WORK[what] + (" --overwrite" if what == "train.py" else "")
        first = start(again)
        holder(TWICE[what])
        os.kill(first, signal.SIGSTOP)
        for command in read:
            run_ok(command)
        os.kill(first, signal.SIGCONT)
        assert exit_status(first) == 0, stderr_text()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_where_files_cannot_be_locked_it_works_without(workdir, undisturbed, number, monkeypatch):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    wanted, _ = undisturbed("preprocess")
    monkeypatch.setattr(fcntl, "lockf", fails)
    run_ok(WORK["preprocess"])
    assert outputs() == wanted


def test_a_lock_that_its_holder_has_just_removed_is_made_anew(tmp_path, monkeypatch):
    """Else this process would hold a file that nobody finds any more, and the next one another."""
    lock, plain, calls = tmp_path / ".lock", fcntl.lockf, []

    def first_without_a_name(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            lock.unlink()
        return plain(*arguments)

    monkeypatch.setattr(fcntl, "lockf", first_without_a_name)
    with locked(tmp_path, lock):
        assert lock.read_text().startswith(f"{os.getpid()} on ") and len(calls) == 2
    assert not lock.exists()


def test_of_two_that_write_one_file_the_later_one_wins_and_the_other_is_told(tmp_path):
    path = tmp_path / "captions.csv"
    with (
        pytest.raises(UserError, match="captions.csv: another process writes it, too; write to"),
        atomic_write(path) as first,
    ):
        first.write(b"half a li")
        with atomic_write(path) as second:
            second.write(b"a line")
    assert path.read_bytes() == b"a line" and list(tmp_path.iterdir()) == [path]


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".lock").symlink_to("victim")
    with locked(tmp_path, tmp_path / ".lock"):
        assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_lock_that_is_refused_or_comes_to_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "a", tmp_path / "a/.lock"):
        assert (tmp_path / "a/.lock").read_text().startswith(f"{os.getpid()} on ")
        raise RuntimeError
    assert not (tmp_path / "a").exists()
