"""A DataLoader that users cannot make wait for ever.

torch sends what its workers load through /dev/shm, which has 64 MB in a Docker container. An item that does not fit is
lost in a thread of the worker, and the main process waits for it for ever. Here an item crosses in anonymous memory
(memfd_create), which only the memory of the machine or container limits, and whatever goes wrong in a worker crosses
instead of it.
"""

from __future__ import annotations

import atexit
import contextlib
import copyreg
import gc
import io
import itertools
import mmap
import multiprocessing
import os
import pickle
import signal
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from captioning.errors import UserError
from captioning.runtime.library_errors import reason
from captioning.runtime.signals import STOP_SIGNALS

ALIGNMENT = 64  # bytes: arrays start at multiples of it
LOST_WORKERS = ("DataLoader worker", "Pin memory thread exited")  # how torch's errors begin


_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


@atexit.register
def _kill_workers() -> None:
    """End workers whose work an error cut short: multiprocessing would wait, after a SIGTERM that they ignore."""
    workers = [worker for worker in _workers if worker.is_alive()]
    if workers:
        _ignore_further_deaths()
    for worker in workers:
        worker.kill()


def _ignore_further_deaths() -> None:
    """Keep torch's handler from raising an error for each worker that ends after the first was lost."""
    with contextlib.suppress(ValueError):  # not in the main thread, where it is not installed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class SafeLoader(DataLoader):
    """A DataLoader over a plan of indices.

    A worker that fails or dies is a UserError within seconds. Workers ignore Ctrl-C and SIGTERM; the main process
    handles them and ends the workers.
    """

    def __init__(self, dataset: Dataset, plan: Iterable, workers: int, pin: bool):
        """plan: the dataset's indices, in order; pin: copy tensors to pinned memory."""
        super().__init__(
            _Sender(dataset),
            sampler=plan,
            batch_size=None,
            num_workers=workers,
            pin_memory=pin,
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # a separate one: loading must not advance the training's random numbers
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The workers start now. Raises UserError if they cannot, and while items are taken if one fails or dies."""
        iterator = self._start()
        return self._receive(iterator) if self.num_workers else iterator

    def _start(self) -> Iterator[Any]:
        # Workers inherit this mask and keep it until init_worker runs.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        others = {*multiprocessing.active_children()}
        try:
            return super().__iter__()
        except OSError as error:  # no more processes, files or, for semaphores, space in /dev/shm
            raise UserError(
                f"--workers {self.num_workers}: cannot be started ({reason(error)}); give fewer, or --workers 0"
            ) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            _workers.update({*multiprocessing.active_children()} - others)

    def _receive(self, iterator: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from self._items(iterator)
        finally:
            # Workers end only if torch tells them while their queues are open. Once an error that is kept somewhere has
            # put the iterator into a cycle, garbage collection closes the queues first: the workers, which ignore
            # SIGTERM, would stay, after a wait of ten seconds.
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def _items(self, iterator: Iterator[Any]) -> Iterator[Any]:
        end = object()
        while True:
            with lost_worker_as_user_error():
                try:
                    item = next(iterator, end)
                    item = item.unpack() if isinstance(item, PackedItem) else item
                except (ConnectionError, EOFError, FileNotFoundError):  # it died before its item was fetched
                    raise RuntimeError(f"{LOST_WORKERS[0]} exited unexpectedly") from None
            if item is end:
                return
            if isinstance(item, UserError):
                raise item
            yield item


class _Sender(Dataset):
    """The items of a dataset; in a worker process packed, or the UserError that stands for one that failed."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        if get_worker_info() is None:
            return self.dataset[index]
        try:
            return PackedItem(self.dataset[index])
        except UserError as error:
            return error
        except Exception as error:  # torch would show its traceback, of which the first line names no cause
            return UserError(
                f"a worker process failed ({type(error).__name__}: {reason(error)}); give fewer --workers if memory or "
                "files ran out, or --workers 0 to see where"
            )


class PackedItem:
    """An item on its way from a worker: pickled, with the bytes of its arrays and tensors in an anonymous file."""

    def __init__(self, item: Any):
        buffers: list[pickle.PickleBuffer] = []
        pickled = io.BytesIO()
        pickler = pickle.Pickler(pickled, 5, buffer_callback=buffers.append)
        pickler.dispatch_table = {**copyreg.dispatch_table, Tensor: _reduce_tensor}
        pickler.dump(item)
        self.pickled = pickled.getvalue()
        self.sizes = [buffer.raw().nbytes for buffer in buffers]
        with anonymous_file() as file:
            *starts, end = _starts(self.sizes)
            for start, buffer in zip(starts, buffers, strict=True):
                file.seek(start)
                file.write(buffer.raw())
            file.truncate(end)
            file.flush()
            self.file = DupFd(file.fileno())  # another process may ask this one for it

    def unpack(self) -> Any:
        """The item. Its arrays and tensors lie in the memory that the worker has written: nothing is copied."""
        descriptor = self.file.detach()
        try:
            *starts, end = _starts(self.sizes)
            memory = memoryview(mmap.mmap(descriptor, end))
        finally:
            os.close(descriptor)
        buffers = [memory[start : start + size] for start, size in zip(starts, self.sizes, strict=True)]
        return pickle.loads(self.pickled, buffers=buffers)

    def pin_memory(self) -> Any:
        """The item in page-locked memory. DataLoader calls it."""
        item = self.unpack()
        return item.pin_memory() if hasattr(item, "pin_memory") else item


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where buffers of these sizes start in the file, and where it ends, in bytes. No file is empty."""
    blocks = (size // ALIGNMENT + 1 for size in sizes)
    *starts, end = (ALIGNMENT * number for number in itertools.accumulate(blocks, initial=0))
    return [*starts, max(end, ALIGNMENT)]


def anonymous_file() -> BinaryIO:
    """A file without a name: in memory, or a temporary one on a system that has none in memory."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux; forbidden in this container
        return open(os.memfd_create("kantu"), "w+b")
    return tempfile.TemporaryFile()


def _reduce_tensor(tensor: Tensor) -> tuple:
    """How a tensor on the CPU is pickled: as an array, whose bytes leave the stream. It keeps its memory layout."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return _to_tensor, (np.asarray(tensor.detach().permute(order).numpy(), order="C"), np.argsort(order).tolist())


def _to_tensor(array: np.ndarray, order: list[int]) -> Tensor:
    return torch.from_numpy(array).permute(order)


def init_worker(_: int) -> None:
    """Prepare a worker process: ignore the stop signals, and end if the main process no longer exists."""
    # A terminal sends the signals to the whole process group, and torch has just set its own handlers.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    parent = multiprocessing.parent_process()
    if multiprocessing.get_start_method() == "fork" and parent is not None and os.getppid() != parent.pid:
        os._exit(1)  # the main process was killed: torch would watch the adopting process instead and never end
    gc.freeze()  # do not collect the parent's CUDA tensors in a forked worker: that would end the process


@contextlib.contextmanager
def lost_worker_as_user_error() -> Iterator[None]:
    """Turn the death of a worker process, which torch reports wherever the main thread is, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(LOST_WORKERS):
            raise
        _ignore_further_deaths()
        raise UserError(
            f"a worker process was lost ({reason(error)}): give fewer --workers if memory ran out; the same command "
            "(train.py: with --resume) goes on"
        ) from None
