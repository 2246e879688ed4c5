"""Read batches ahead in a thread while the training step computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

QUEUE_SIZE = 3  # batches read ahead


class Prefetch:
    """The items `dataset[key]` for the keys of a plan, in order.

    One thread is enough for cached features: reading them waits for disk or memory with Python's global lock released,
    and a thread, unlike a process, hands them over without a copy.
    """

    def __init__(self, dataset: Any, plan: Sequence[Any], pin: bool = False):
        """pin: call pin_memory() on every item, so that a GPU copies it asynchronously."""
        self.dataset = dataset
        self.plan = plan
        self.pin = pin

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Any]:
        """An error while reading an item is raised where that item is due."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        try:
            queue = deque(thread.submit(self._read, key) for key in self.plan[:QUEUE_SIZE])
            for key in self.plan[QUEUE_SIZE:]:
                queue.append(thread.submit(self._read, key))
                yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)

    def _read(self, key: Any) -> Any:
        item = self.dataset[key]
        return item.pin_memory() if self.pin else item
