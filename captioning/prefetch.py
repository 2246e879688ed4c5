"""Batches that a thread reads ahead, while the ones before are learnt from."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

AHEAD = 2  # batches
PATIENCE = 0.1  # seconds until the thread looks again whether it is still wanted


class Prefetch:
    """The items of a dataset, in the order of a plan.

    A thread is enough for cached features: copying them waits for the disk or the memory, not for Python, and what it
    reads needs no copy from process to process.
    """

    def __init__(self, dataset: Any, plan: Sequence[Any], pin: bool = False):
        """pin: into memory that a GPU can fetch from while it computes."""
        self.dataset, self.plan, self.pin = dataset, plan, pin

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Any]:
        """Raises what reading an item raised."""
        ready: queue.Queue = queue.Queue(AHEAD)
        unwanted = threading.Event()
        thread = threading.Thread(target=self._read, args=(ready, unwanted), name="prefetch", daemon=True)
        thread.start()
        try:
            for _ in self.plan:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            unwanted.set()
            thread.join()

    def _read(self, ready: queue.Queue, unwanted: threading.Event) -> None:
        for place in self.plan:
            try:
                item = self.dataset[place]
                item = item.pin_memory() if self.pin else item
            except Exception as error:
                item = error
            while not unwanted.is_set():
                try:
                    ready.put(item, timeout=PATIENCE)
                    break
                except queue.Full:
                    continue
            if unwanted.is_set() or isinstance(item, Exception):
                return
