"""Batches that a thread reads ahead, while the ones before are learnt from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

AHEAD = 3  # batches


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
        """Raises what reading an item raised, in its place."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        try:
            ahead = deque(thread.submit(self._read, place) for place in self.plan[:AHEAD])
            for place in self.plan[AHEAD:]:
                ahead.append(thread.submit(self._read, place))
                yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)

    def _read(self, place: Any) -> Any:
        item = self.dataset[place]
        return item.pin_memory() if self.pin else item
