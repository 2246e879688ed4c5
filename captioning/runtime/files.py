"""Files that are there whole or not at all, and folders that one process at a time writes to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from captioning.errors import UserError


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "xb", **text: str) -> Iterator[IO]:
    """A file beside `path` that is synced at the end and renamed to `path`. Raises OSError where it cannot be.

    When the block raises, nothing has happened to `path`. The name beside it is always the same, so that what a
    process left there that was killed goes with the next one; a link that anyone laid there goes, too.
    """
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.unlink(missing_ok=True)
    with open(temporary, mode, **text) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not _is_still(temporary, file.fileno()):
                raise UserError(f"{path}: another process writes it, too; write to another place")
            os.replace(temporary, path)
        finally:
            if _is_still(temporary, file.fileno()):
                temporary.unlink()


@contextlib.contextmanager
def atomic_text(path: Path, binary: bool = False) -> Iterator[IO]:
    """As `whole`, of text with the line breaks of Unix unless binary. Raises UserError where it cannot be written."""
    # backslashreplace: what is no text in a file's name becomes an escape, which JSON knows.
    text = {} if binary else {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    try:
        with atomic_write(path, "xb" if binary else "x", **text) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free the place or write elsewhere") from error


def _is_still(path: Path, file: int) -> bool:
    """Does the name still mean the file that is open?"""
    try:
        return os.path.samefile(path, file)
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(what: Path, lock: Path, wanted: bool = True) -> Iterator[None]:
    """`what` is this process's alone to write to while the block lasts. lock: a file that says whose it is.

    The system frees the lock of a process that has died, however it died. Raises UserError where another has it;
    where files cannot be locked, nobody is refused.
    """
    made, file = not lock.parent.exists(), None
    try:
        with contextlib.suppress(OSError):  # no leave to write, no room: the work itself says it better
            file = _locked(what, lock) if wanted else None
        yield
    finally:
        with contextlib.suppress(OSError):
            if file is not None:
                lock.unlink()  # before it is free: who has opened it then sees that it is no longer the one
                os.close(file)
            if made:
                lock.parent.rmdir()  # where nothing came of it


def _locked(what: Path, lock: Path) -> int:
    """The lock file, open and ours. Raises OSError where there can be none."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: a worker that we fork would hold it after us
        except BlockingIOError:
            time.sleep(0.1)  # it may have locked it, and not yet said who it is
            holder = os.read(file, 100).decode(errors="replace")
            raise UserError(
                f"{what}: process {holder} is writing to it; wait for it, or stop it first (kill lets it save its work)"
            ) from None
        except OSError:  # this file system has no locks
            lock.unlink()
            raise
        if _is_still(lock, file):
            os.truncate(file, 0)
            os.write(file, f"{os.getpid()} on {platform.node()}".encode())
            return file
        os.close(file)  # the one before has just removed it
