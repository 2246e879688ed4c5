"""Follow a run while it trains: a thread reads log.jsonl again whenever it has grown."""

from __future__ import annotations

import threading
from pathlib import Path

from captioning.errors import UserError
from captioning.runtime.log import read_log
from captioning.runtime.progress import tqdm

POLL_INTERVAL = 2.0  # seconds between two reads of the log
EXIT_TIMEOUT = 10.0  # seconds that the end of a run waits for the last update


class LogTailer(threading.Thread):
    """A context manager that shows a run while it trains. A logger implements `read`, `show` and what it prints.

    Training never waits for it. A line is printed when `show` starts failing, and when it succeeds again.
    """

    def __init__(self, folder: Path, name: str):
        """folder: of the run. name: the logger's, such as dashboard; its lines begin with it."""
        super().__init__(daemon=True, name=name)
        self.folder = folder
        self.finished = threading.Event()
        self.succeeded = True
        self.log_size = -1

    def read(self, events: list[dict]) -> None:
        """Take the events of the log, all of them, whenever it has grown."""
        raise NotImplementedError

    def show(self) -> None:
        """Show what was read; called at every poll. Raises OSError or UserError if that fails."""
        raise NotImplementedError

    def announcement(self) -> str:
        """Where the run is shown."""
        raise NotImplementedError

    def problem(self, error: Exception) -> str:
        """What failed, and what to do."""
        raise NotImplementedError

    def recovery(self) -> str:
        """What works again."""
        raise NotImplementedError

    def run(self) -> None:
        """The thread: poll the log until the run ends."""
        while not self.finished.is_set():
            self._update()
            self.finished.wait(POLL_INTERVAL)
        self._update()

    def _update(self) -> None:
        try:
            self._read_log()
            self.show()
        except (OSError, UserError) as error:
            if self.succeeded:
                tqdm.write(f"{self.name}: {self.problem(error)}; training continues")
            self.succeeded = False
        else:
            if not self.succeeded:
                tqdm.write(f"{self.name}: {self.recovery()}")
            self.succeeded = True

    def _read_log(self) -> None:
        size = (self.folder / "log.jsonl").stat().st_size
        if size != self.log_size:
            self.read(read_log(self.folder))
            self.log_size = size

    def __enter__(self) -> LogTailer:
        print(f"{self.name}: {self.announcement()}", flush=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Show a last update, waiting a few seconds at most."""
        self.finished.set()
        self.join(EXIT_TIMEOUT)
