"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from config import UserError


@contextlib.contextmanager
def draft(path: Path, binary: bool = False) -> Iterator[IO]:
    """A file beside `path` that is synced at the end and renamed to `path`: of text, with the line breaks of Unix.

    When the block raises, nothing has happened to `path`. Raises UserError where it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a process that was killed, or a link that anyone laid there
        # backslashreplace: what is no text in a file's name becomes an escape, which JSON knows.
        text = {} if binary else {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
        with open(temporary, "xb" if binary else "x", **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free the place or write elsewhere") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
