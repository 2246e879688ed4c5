"""Worker processes hand over what they load, whatever the size of /dev/shm; one that fails or dies is one line."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from captioning.encoders.images import PhotoBatch
from captioning.errors import PhotoError, UserError
from captioning.runtime import loader
from captioning.runtime.loader import PackedItem, SafeLoader, lost_worker_as_user_error


class Items(Dataset):
    """What is given; or a misfortune, by its name."""

    def __init__(self, items):
        self.items = items

    def __getitem__(self, index):
        kind = self.items[index]
        if not isinstance(kind, str):
            return kind
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "photo":
            raise PhotoError("1.jpg: broken")
        if kind == "bug":
            raise ZeroDivisionError("division by zero")
        if kind == "unpicklable":
            return lambda: 0


def load(*items, workers=1):
    with lost_worker_as_user_error():
        return list(SafeLoader(Items(items), range(len(items)), workers, pin=False))


def nested_item():
    photos = torch.randint(0, 255, (2, 5, 4, 3), dtype=torch.uint8).permute(0, 3, 1, 2)  # channels-last
    return {
        "batch": PhotoBatch([0, 7], photos, ["2.jpg: broken"]),
        "floats": torch.randn(3, 4).T,
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3, 8, 8),
        "array": np.arange(6).reshape(2, 3),
        "text": "看图",
    }


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_item_arrives_with_its_values_and_memory_layout(monkeypatch, in_memory):
    if not in_memory:  # as on a system without memfd_create
        monkeypatch.delattr(os, "memfd_create", raising=False)
    item = nested_item()
    found = PackedItem(item).unpack()
    assert found["batch"].indices == [0, 7] and found["text"] == "看图" and type(found["batch"]) is PhotoBatch
    np.testing.assert_array_equal(found["array"], item["array"])
    for name in ("floats", "scalar", "empty"):
        assert torch.equal(found[name], item[name]) and found[name].dtype == item[name].dtype
    assert torch.equal(found["batch"].photos, item["batch"].photos)
    assert found["batch"].photos.stride() == item["batch"].photos.stride()
    found["batch"].photos.zero_()  # it may be written to


def test_nothing_crosses_in_dev_shm(monkeypatch):
    """Docker gives it 64 MB."""

    def full(*_):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_using_fd_cpu", full)
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    items = [torch.full((1000,), value) for value in range(6)]
    assert all(torch.equal(*pair) for pair in zip(load(*items, workers=2), items, strict=True))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("photo", "^1.jpg: broken$"),
        ("bug", "^a worker process failed .ZeroDivisionError: division by zero.; give fewer --workers if .*$"),
        ("unpicklable", "a worker process failed"),
        ("kill", "^a worker process was lost .DataLoader worker.*: give fewer --workers .* goes on$"),
    ],
)
def test_a_worker_that_fails_or_dies_is_one_line_within_seconds(kind, message):
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        load(torch.ones(3), kind, torch.ones(3), torch.ones(3))
    assert "\n" not in str(error.value) and time.monotonic() - start < 30
    assert not any(worker.is_alive() for worker in loader._workers), "also while the error is kept"


def test_a_worker_that_dies_before_its_item_is_fetched_is_one_line(monkeypatch):
    def refused(_):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(PackedItem, "unpack", refused)
    with pytest.raises(
        UserError, match="^a worker process was lost .DataLoader worker exited unexpectedly.: give fewer"
    ):
        load(torch.ones(3))


def test_without_workers_an_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        load("bug", workers=0)


def test_workers_that_cannot_be_started_are_one_line(monkeypatch):
    def denied(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", denied)
    with pytest.raises(UserError, match="--workers 2: cannot be started .No space left on device.; give fewer"):
        load(workers=2)


def test_an_open_files_limit_in_a_worker_is_one_line(monkeypatch):
    def denied():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(loader, "anonymous_file", denied)
    with pytest.raises(UserError, match="a worker process failed .OSError: Too many open files"):
        load(torch.ones(3))
