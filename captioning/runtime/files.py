"""Atomic writes, and locks that keep two processes from writing to the same path."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from captioning.errors import UserError
from captioning.runtime.library_errors import reason


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file next to `path`; at the end of the block, sync it and rename it to `path`.

    If the block raises, `path` stays as it was. The temporary file always has the same name, so the next writer
    removes what a killed process left, or a link that someone created under that name.

    Raises OSError if the file cannot be written, and UserError if another process writes it at the same time.
    """
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not _is_same_file(temporary, file.fileno()):
                raise UserError(f"{path}: another process writes it, too; write to another path")
            os.replace(temporary, path)
        finally:
            if _is_same_file(temporary, file.fileno()):
                temporary.unlink()


@contextlib.contextmanager
def atomic_text(path: Path) -> Iterator[TextIO]:
    """`atomic_write` for UTF-8 text with Unix line endings. Raises UserError if the file cannot be written."""
    with write_errors(path), atomic_write(path) as file:
        # backslashreplace: undecodable bytes of a file's name become escapes, which JSON knows.
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="\n")
        try:
            yield text
        finally:
            text.detach()  # flushes, and leaves the file open for atomic_write


@contextlib.contextmanager
def write_errors(path: Path, remedy: str = "free the path or write elsewhere") -> Iterator[None]:
    """Turn an OSError raised while `path` is written into a UserError that ends in `remedy`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason(error)}); {remedy}") from error


def _is_same_file(path: Path, descriptor: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samefile(path, descriptor)
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(path: Path, lock: Path, enabled: bool = True) -> Iterator[None]:
    """Keep other processes from writing to `path` while the block runs. lock: a file that names the process.

    The system releases the lock when the process dies, however it dies. Raises UserError if another process holds the
    lock. Does nothing where files cannot be locked.
    """
    creates_folder = not lock.parent.exists()
    descriptor = None
    try:
        if enabled:
            with contextlib.suppress(OSError):  # no permission, disk full: the work itself reports it better
                descriptor = _acquire(path, lock)
        yield
    finally:
        with contextlib.suppress(OSError):
            if descriptor is not None:
                lock.unlink()  # before it is released: a process that has opened it notices that it no longer exists
                os.close(descriptor)
            if creates_folder:
                lock.parent.rmdir()  # fails unless it is empty


def _acquire(path: Path, lock: Path) -> int:
    """Open and lock the lock file -> its descriptor. Raises OSError where that is impossible."""
    import fcntl  # Windows lacks it: no command runs there, but the library can be imported

    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would be inherited by forked workers
        except BlockingIOError:
            raise _held_by_another(path, descriptor) from None
        except OSError:  # this file system has no locks
            lock.unlink()
            raise
        if _is_same_file(lock, descriptor):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} on {platform.node()}".encode())
            return descriptor
        os.close(descriptor)  # its previous holder has just removed it: try again


def _held_by_another(path: Path, descriptor: int) -> UserError:
    time.sleep(0.1)  # the holder may have locked it and not yet written its name
    holder = os.read(descriptor, 100).decode(errors="replace")
    return UserError(
        f"{path}: process {holder} is writing to it; wait for it, or stop it first (kill lets it save its work)"
    )


def lock_holder(lock: Path) -> str | None:
    """The process that holds a lock, "PID on MACHINE", or None. Without taking the lock: it is never in the way.

    A file that a killed process of another machine left counts as held.
    """
    try:
        with open(lock, encoding="utf-8", errors="replace") as file:
            holder = file.read(100)
    except OSError:
        return None
    process, _, machine = holder.partition(" on ")
    if machine == platform.node() and process.isdecimal():
        try:
            os.kill(int(process), 0)  # no signal: asks whether there is such a process
        except (ProcessLookupError, OverflowError):
            return None
        except PermissionError:
            pass  # it is another user's
    return holder or None
