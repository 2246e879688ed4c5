"""Two processes that write to the same output: the second is refused with one line, the first is not disturbed."""

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
    cpu_seconds,
    exit_status,
    has_exited,
    outputs,
    remove_outputs,
    run_alone,
    start,
    stderr_text,
)

OUTPUTS = {  # command of WORK -> what it locks
    "preprocess": "out/data",
    "preprocess --scenes": "out/data",
    "extract_features.py": "out/features.h5",
    "train.py": "checkpoints/new",
    "train.py --fine-tune": "checkpoints/new",
}


def lock_text(output: str) -> str:
    """Wait for the lock of an output and return its text."""
    lock = Path(f"{output}.lock") if output.endswith(".h5") else Path(output, ".lock")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if text := lock.read_text():
                return text
        time.sleep(0.001)
    raise AssertionError("never locked")


@pytest.fixture
def what(request):
    """A command. The lock of fine-tuning is that of training: both in the suite only where its workers matter."""
    if request.param == "train.py --fine-tune" and not request.config.getoption("--torture"):
        pytest.skip("long form: make torture")
    return request.param


@pytest.mark.parametrize("what", OUTPUTS, indirect=True)
def test_a_second_process_is_refused_with_the_process_id_of_the_first(workdir, undisturbed, what, tally):
    expected, _ = undisturbed(what)
    first = start(WORK[what])
    assert lock_text(OUTPUTS[what]).startswith(f"{first} on ")
    os.kill(first, signal.SIGSTOP)
    for more in ("", " --overwrite", " --resume") if what.startswith("train") else ("", " --overwrite"):
        end = run_command(WORK[what] + more)
        assert end.status == 1 and "\n" not in end.stderr, end
        assert (
            end.stderr.startswith(f"error: {OUTPUTS[what]}: process {first} on ") and "; wait for it, or" in end.stderr
        )
        tally("second processes")
    os.kill(first, signal.SIGCONT)
    assert exit_status(first) == 0, stderr_text()
    assert outputs() == expected


def redirect_stderr(name: str):
    """For `start`: give the process a file of its own for its stderr."""
    return lambda: os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)


@pytest.mark.parametrize("what", OUTPUTS, indirect=True)
def test_of_several_processes_started_at_once_one_works_and_the_others_name_it(
    workdir, undisturbed, what, times, tally
):
    expected, _ = undisturbed(what)
    for _ in range(times(1, 10)):
        processes = [start(WORK[what], redirect_stderr(f"stderr-{number}")) for number in range(3)]
        statuses = [exit_status(process) for process in processes]
        assert 0 in statuses and set(statuses) <= {0, 1}, statuses
        for number, status in enumerate(statuses):
            text = Path(f"stderr-{number}").read_text(encoding="utf-8")
            named = re.match(r"error: .*: process (\d+) on ", text)
            late = what.startswith("train") and "already exists; continue it with --resume" in text
            assert status == 0 or late or int(named[1]) in processes, text
        assert outputs() == expected
        remove_outputs()
    tally("starts of three at once", times(1, 10))


def wait_for_worker(process: int) -> None:
    """Wait until the process has a child. Some commands need none: then for 0.3 CPU seconds, or until it exits."""
    children, began = Path(f"/proc/{process}/task/{process}/children"), time.monotonic()
    while not has_exited(process) and cpu_seconds(process, began) < 0.3:
        if children.exists() and children.read_text(encoding="utf-8"):
            return
        time.sleep(0.001)


@pytest.mark.parametrize("what", OUTPUTS)
def test_a_kill_frees_the_lock_at_once_even_while_workers_are_still_alive(workdir, what, tally):
    command = WORK[what].replace("--workers 0", "--workers 1")
    first = start(command)
    lock_text(OUTPUTS[what])
    wait_for_worker(first)
    os.kill(first, signal.SIGKILL)
    exit_status(first)
    end = run_command(command)
    assert end.status == 0 or "already exists" in end.stderr, end
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
        lock_text(OUTPUTS[what])
        os.kill(first, signal.SIGSTOP)
        for command in read:
            run_ok(command)
        os.kill(first, signal.SIGCONT)
        assert exit_status(first) == 0, stderr_text()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_commands_work_without_locks_where_files_cannot_be_locked(workdir, undisturbed, number, monkeypatch):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    expected, _ = undisturbed("preprocess")
    monkeypatch.setattr(fcntl, "lockf", fails)
    run_ok(WORK["preprocess"])
    assert outputs() == expected


def test_a_lock_that_its_holder_has_just_removed_is_created_again(tmp_path, monkeypatch):
    """Otherwise this process would hold a deleted file, and the next process would lock a new one."""
    lock, plain, calls = tmp_path / ".lock", fcntl.lockf, []

    def remove_before_first_lock(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            lock.unlink()
        return plain(*arguments)

    monkeypatch.setattr(fcntl, "lockf", remove_before_first_lock)
    with locked(tmp_path, lock):
        assert lock.read_text().startswith(f"{os.getpid()} on ") and len(calls) == 2
    assert not lock.exists()


def test_of_two_processes_that_write_one_file_the_later_one_wins_and_the_other_gets_an_error(tmp_path):
    path = tmp_path / "captions.csv"
    with (
        pytest.raises(UserError, match="captions.csv: another process writes it, too; write to"),
        atomic_write(path) as first,
    ):
        first.write(b"half a li")
        with atomic_write(path) as second:
            second.write(b"a line")
    assert path.read_bytes() == b"a line" and list(tmp_path.iterdir()) == [path]


def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".lock").symlink_to("victim")
    with locked(tmp_path, tmp_path / ".lock"):
        assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_lock_whose_work_fails_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "a", tmp_path / "a/.lock"):
        assert (tmp_path / "a/.lock").read_text().startswith(f"{os.getpid()} on ")
        raise RuntimeError
    assert not (tmp_path / "a").exists()
