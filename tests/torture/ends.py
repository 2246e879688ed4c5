"""How a command ends, run in this process; what lies in a folder; and root without its rights."""

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
from captioning.runtime import command_line
from captioning.viewing import dashboard
from config import Dashboard, ExtractFeatures, Generate, Preprocess, Train

COMMANDS = {
    "preprocess": (Preprocess, preprocess.__main__.main),
    "extract_features.py": (ExtractFeatures, extract_features.work),
    "train.py": (Train, train.work),
    "generate.py": (Generate, generate.work),
    "dashboard": (Dashboard, dashboard.main),
    "demo.py": (demo.Demo, demo.main),
}


class End(NamedTuple):
    status: int
    said: str  # the line of the end, on stderr
    told: str  # stdout


def end_of(command: str, *more: object) -> End:
    """How `command`, such as "train.py data/small --run a", ends. An exception that is no exit goes through.

    more: further words, which may have any characters.
    """
    words = [*shlex.split(command), *map(str, more)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", words):
        try:
            command_line.run(*COMMANDS[words[0]])
        except SystemExit as stop:
            if isinstance(stop.code, str):  # Python prints it, and ends with 1
                return End(1, stop.code, out.getvalue())
            return End(stop.code or 0, err.getvalue().strip(), out.getvalue())
    return End(0, "", out.getvalue())


def stamp(path: Path) -> tuple[int, ...]:
    """Another one whenever the file was written to or replaced; of a folder always the same."""
    status = path.lstat()
    return () if path.is_dir() else (status.st_mtime_ns, status.st_size, status.st_ino)


def contents() -> dict[str, tuple[int, ...]]:
    """Every file and folder below the current one, with its stamp."""
    return {str(path): stamp(path) for path in Path("").rglob("*")}


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Rights(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint32)
        for name in ("effective", "permitted", "inheritable", "effective_2", "permitted_2", "inheritable_2")
    ]


OVERRIDE = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextlib.contextmanager
def bound_by_permissions() -> Iterator[None]:
    """Permissions bind even root, in this thread and those it starts (Linux; others are bound as they are)."""
    if os.geteuid() != 0:
        yield
        return
    system, header, rights = ctypes.CDLL(None), _Header(0x20080522, 0), _Rights()
    assert system.capget(ctypes.byref(header), ctypes.byref(rights)) == 0
    before = rights.effective
    rights.effective = before & ~OVERRIDE
    try:
        assert system.capset(ctypes.byref(header), ctypes.byref(rights)) == 0
        yield
    finally:
        rights.effective = before
        system.capset(ctypes.byref(header), ctypes.byref(rights))
