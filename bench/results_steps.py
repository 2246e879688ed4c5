"""Makes the steps of bench/results_plan.py in a work folder: each once, and anew only when something has changed.

Beside the outputs of a step lies steps/NAME.json: the command that made them, which outputs of other steps it read, and
what it cost. While a process makes a step, it holds the lock steps/NAME.lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from results_plan import Step

from captioning.errors import UserError
from captioning.runtime.files import atomic_text, locked
from captioning.runtime.log import commit
from captioning.runtime.recipes import requested_recipe

ROOT = Path(__file__).parents[1]
POLL_SECONDS = 5.0  # between looks at steps that another process is making
TQDM_SECONDS = "60"  # between updates of a progress bar in a log


class Workshop:
    """A work folder and the steps that are made in it."""

    def __init__(self, folder: Path, steps: Mapping[str, Step], threads: int | None = None):
        """threads: of each step; all cores unless given."""
        self.folder = folder
        self.steps = steps
        self.threads = threads

    def is_made(self, name: str) -> bool:
        """Whether a step's outputs are there, by its command of today, from what it reads today."""
        return self._made_at(name) is not None

    def record(self, name: str) -> dict[str, Any]:
        """What is known of a step: empty if it was never begun."""
        try:
            return json.loads(self._record_file(name).read_text("utf-8"))
        except FileNotFoundError:
            return {}

    def left(self, chosen: Sequence[str]) -> dict[str, str]:
        """The steps that are not made, or whose inputs are not, and why, in the given order."""
        left: dict[str, str] = {}
        for name in chosen:
            if any(need in left for need in self.steps[name].needs) or not self.is_made(name):
                left[name] = self._why(name)
        return left

    def make(self, chosen: Sequence[str]) -> list[str]:
        """Make the steps that are not made, in the given order, each after those that it needs.

        A step that fails is one line; those that do not need it go on. Waits for steps that another process is making.
        Returns the names of the steps that were not made.
        """
        failed: list[str] = []
        waits = False
        while pending := [name for name in chosen if name not in failed and not self.is_made(name)]:
            ended = [self._try(name, failed) for name in pending]
            if any(ended):
                waits = False
                continue
            if not waits:
                print(f"waiting for what another process is making: {pending[0]}, or what it needs", flush=True)
            waits = True
            time.sleep(POLL_SECONDS)
        return failed

    # ---- one step

    def _try(self, name: str, failed: list[str]) -> bool:
        """Make a step if it can be made now -> whether it has ended, made or failed."""
        needs = self.steps[name].needs
        if missing := [need for need in needs if need in failed]:
            print(f"{name}: left out: {missing[0]} failed", flush=True)
            failed.append(name)
            return True
        if not all(map(self.is_made, needs)):
            return False
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder / name, self.folder / "steps" / f"{name}.lock"))
            except UserError:  # another process is making it
                return False
            if not self.is_made(name):  # by another process, just now
                self._make(name, failed)
        return True

    def _make(self, name: str, failed: list[str]) -> None:
        """Make a step, whose lock this process holds."""
        started = time.monotonic()
        try:
            words = self._prepare(name)
            print(f"{time.strftime('%H:%M')} {name}: {shlex.join(words)}", flush=True)
            self._run(name, words)
        except UserError as error:
            print(f"{name}: failed: {error}", flush=True)
            failed.append(name)
        else:
            print(f"{name}: made in {(time.monotonic() - started) / 60:.1f} minutes", flush=True)

    def _prepare(self, name: str) -> list[str]:
        """Clear away what another command has made, and record the begin -> the words of the command.

        Raises UserError if an output is there that no step has made.
        """
        step, record, inputs = self.steps[name], self.record(name), self._inputs(name)
        command = expand(step.command)
        is_resumed = record.get("command") == command and record.get("inputs") == inputs and not record.get("made")
        there = [self.folder / output for output in step.outputs if (self.folder / output).exists()]
        if there and not record:
            raise UserError(f"{there[0]}: was not made by this command; move it away")
        if not is_resumed:
            for path in there:
                remove(path)
            record = {"command": command, "typed": step.command, "inputs": inputs, "attempts": []}
            self._write_record(name, record)
        return [*shlex.split(step.command), *(shlex.split(step.resume) if is_resumed else [])]

    def _run(self, name: str, words: Sequence[str]) -> None:
        """Run a command and record what it cost. Raises UserError if it fails."""
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as output:
            print(f"$ {shlex.join(words)}", file=output, flush=True)
            status = self._run_process(name, words, output)
        if status != 0:
            raise UserError(f"{last_words(log)} ({log})")
        made = {"made": now(), "commit": commit(marks_changes=True) or "", "machine": processor()}
        self._write_record(name, self.record(name) | made)
        if missing := [output for output in self.steps[name].outputs if not (self.folder / output).exists()]:
            raise UserError(f"the command has made no {missing[0]} ({log})")

    def _run_process(self, name: str, words: Sequence[str], output: Any) -> int:
        """Run a command in the work folder and record what it cost, also if it is stopped -> its exit status."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "TQDM_MININTERVAL": TQDM_SECONDS,
        }
        if self.threads:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        started = time.monotonic()
        process = subprocess.Popen(
            executable(words),
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=os.setpgrp,  # Ctrl-C comes to this process alone, which hands it on once
        )
        try:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # wait4 below takes its exit status
        except BaseException:
            os.kill(process.pid, signal.SIGTERM)  # a training saves its state first
            raise
        finally:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            self._add_attempt(name, time.monotonic() - started, usage.ru_utime + usage.ru_stime)
        return process.returncode

    def _add_attempt(self, name: str, seconds: float, cpu_seconds: float) -> None:
        """Record what an attempt cost."""
        record = self.record(name)
        record["attempts"].append({"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)})
        self._write_record(name, record)

    # ---- records

    def _made_at(self, name: str) -> str | None:
        """When a step was made; None if it was not, or by another command, or from other inputs."""
        step, record = self.steps[name], self.record(name)
        if not all((self.folder / output).exists() for output in step.outputs):
            return None
        if record.get("command") != expand(step.command) or record.get("inputs") != self._inputs(name):
            return None
        return record.get("made")

    def _inputs(self, name: str) -> dict[str, str | None]:
        """When the steps that a step needs were made."""
        return {need: self.record(need).get("made") for need in self.steps[name].needs}

    def _why(self, name: str) -> str:
        """Why a step is left to do."""
        record = self.record(name)
        if not record:
            return "not made yet"
        if record["command"] != expand(self.steps[name].command):
            return "its command has changed"
        if not record.get("made"):
            return "interrupted"
        return "what it reads will change" if record["inputs"] == self._inputs(name) else "what it reads has changed"

    def _record_file(self, name: str) -> Path:
        return self.folder / "steps" / f"{name}.json"

    def _write_record(self, name: str, record: dict[str, Any]) -> None:
        with atomic_text(self._record_file(name)) as file:
            json.dump(record, file, indent=1, ensure_ascii=False)


def expand(command: str) -> str:
    """A command with the flags of its recipe, so that another content of the recipe is another command."""
    words = shlex.split(command)
    recipe = requested_recipe(words)
    return shlex.join(recipe.complete(words)) if recipe else command


def executable(words: Sequence[str]) -> list[str]:
    """The command `python FILE ...` or `python -m MODULE ...` by this Python, FILE from the repository."""
    python, first, *rest = words
    assert python == "python"
    script = [first] if first.startswith("-") else [str(ROOT / first)]
    return [sys.executable, *script, *rest]


def now() -> str:
    """The time in UTC, to the millisecond: no two versions of an output have the same."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def last_words(log: Path) -> str:
    """The line in which a failed command says why, or else its last line. Earlier attempts do not count."""
    text = log.read_text("utf-8", "replace")
    lines = [line for line in re.split(r"[\r\n]+", text[text.rfind("\n$ ") + 1 :]) if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1].strip()


def processor() -> str:
    """The model of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text("utf-8")) if cpuinfo.exists() else None
    return found[1] if found else platform.processor()


def link(target: Path, path: Path) -> None:
    """Make `path` a link to a folder. Raises UserError if there is no such folder, or another one is linked already."""
    if not target.is_dir():
        raise UserError(f"{target}: no such folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.symlink_to(target.absolute(), target_is_directory=True)
    if not path.exists() or not path.samefile(target):
        raise UserError(f"{path}: is another folder than {target}; remove it, or give another --work")
