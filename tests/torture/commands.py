"""Run commands in this process; list the contents of a folder; make permissions bind root."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import demo
import extract_features
import generate
import preprocess.__main__
import train
from captioning import dashboard, runs
from captioning.runtime import command_line
from config import Dashboard, ExtractFeatures, Generate, Preprocess, Runs, Train

COMMANDS = {
    "preprocess": (Preprocess, preprocess.__main__.main),
    "extract_features.py": (ExtractFeatures, extract_features.work),
    "train.py": (Train, train.work),
    "generate.py": (Generate, generate.work),
    "dashboard": (Dashboard, dashboard.main),
    "runs": (Runs, runs.main),
    "demo.py": (demo.Demo, demo.main),
}


class Outcome(NamedTuple):
    status: int
    stderr: str  # without what logging and tqdm write
    stdout: str


def run_command(command: str, *more: object) -> Outcome:
    """Run a command line such as "train.py data/small --run a". Exceptions other than SystemExit propagate.

    more: further arguments, which may contain any characters.
    """
    words = [*shlex.split(command), *map(str, more)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", words):
        try:
            command_line.run(*COMMANDS[words[0]])
        except SystemExit as stop:
            if isinstance(stop.code, str):  # Python would print it and exit with status 1
                return Outcome(1, stop.code, out.getvalue())
            return Outcome(stop.code or 0, err.getvalue().strip(), out.getvalue())
    return Outcome(0, "", out.getvalue())


def stamp(path: Path) -> tuple[int, ...]:
    """A value that changes whenever the file is written or replaced; for folders always the same."""
    status = path.lstat()
    return () if path.is_dir() else (status.st_mtime_ns, status.st_size, status.st_ino)


def contents() -> dict[str, tuple[int, ...]]:
    """The path of every file and folder below the current folder -> its stamp."""
    return {str(path): stamp(path) for path in Path("").rglob("*")}


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Capabilities(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint32)
        for name in ("effective", "permitted", "inheritable", "effective_2", "permitted_2", "inheritable_2")
    ]


OVERRIDE = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextlib.contextmanager
def bound_by_permissions() -> Iterator[None]:
    """Apply file permissions even to root, in this thread and the threads it starts (Linux; elsewhere a no-op)."""
    if os.geteuid() != 0:
        yield
        return
    libc, header, capabilities = ctypes.CDLL(None), _Header(0x20080522, 0), _Capabilities()
    assert libc.capget(ctypes.byref(header), ctypes.byref(capabilities)) == 0
    before = capabilities.effective
    capabilities.effective = before & ~OVERRIDE
    try:
        assert libc.capset(ctypes.byref(header), ctypes.byref(capabilities)) == 0
        yield
    finally:
        capabilities.effective = before
        libc.capset(ctypes.byref(header), ctypes.byref(capabilities))
