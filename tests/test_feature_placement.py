"""Training sees the same features wherever they are placed, and with or without prefetching."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from captioning.dataset.prefetch import Prefetch
from captioning.errors import UserError
from captioning.features import feature_placement
from captioning.features.feature_placement import choose_placement, place_features
from captioning.features.feature_reader import FeatureReader
from captioning.training.data import load_batches
from config import Train
from tests.small import TINY, log_of, same, weights
from tests.test_feature_cache import write

GB = 10**9
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """A machine with 100 GB free on the GPU and 200 GB in memory."""
    monkeypatch.setattr(feature_placement, "free_gpu_memory", lambda device: 100 * GB if device.type == "cuda" else 0)
    monkeypatch.setattr(feature_placement, "free_main_memory", lambda: 200 * GB)


@pytest.mark.parametrize(
    "requested, device, nbytes, location",
    [
        ("auto", GPU, 50 * GB, "gpu"),
        ("auto", GPU, 70 * GB, "ram"),
        ("auto", GPU, 150 * GB, "disk"),
        ("auto", CPU, 1 * GB, "disk"),
        ("ram", CPU, 90 * GB, "ram"),
        ("gpu", GPU, 59 * GB, "gpu"),
        ("disk", GPU, 1 * GB, "disk"),
    ],
)
def test_features_are_placed_where_they_fit_with_memory_to_spare(machine, requested, device, nbytes, location):
    placement = choose_placement(requested, nbytes, device)
    assert placement.location == location and f"{nbytes / GB:.1f} GB of features" in placement.reason


@pytest.mark.parametrize(
    "requested, device, nbytes, message",
    [
        ("gpu", CPU, 1, "--features-on gpu: the run is on cpu"),
        ("gpu", GPU, 61 * GB, "more than 60% of the 100.0 GB free"),
        ("ram", CPU, 101 * GB, "--features-on ram: 101.0 GB of features are more than 50%"),
    ],
)
def test_features_that_do_not_fit_where_requested_are_refused(machine, requested, device, nbytes, message):
    with pytest.raises(UserError, match=message):
        choose_placement(requested, nbytes, device)


def test_free_memory_is_measured_and_divided_among_the_processes_of_a_machine(monkeypatch):
    free = feature_placement.free_main_memory()
    assert 10**7 < free < 10**14
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert feature_placement.free_main_memory() == pytest.approx(free / 4, rel=0.3)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("native, grid", [((8, 8), "14"), ((8, 8), "native"), ((10, 10), "14")])
def test_rows_in_memory_equal_those_of_the_file(tmp_path, native, grid, pooled, monkeypatch):
    monkeypatch.setattr(feature_placement, "LOAD_BATCH_SIZE", 3)
    write(tmp_path / "f.h5", native, grid)
    reader = FeatureReader(tmp_path / "f.h5")
    rows = np.array([9, 2, 4, 0, 7, 1, 5])
    read_memory, in_memory = place_features(reader, rows, pooled, "ram", CPU)
    read_disk, on_disk = place_features(reader, rows, pooled, "disk", CPU)
    assert (in_memory.location, on_disk.location) == ("ram", "disk")
    batches = (np.array([4, 0]), rows[::-1].copy(), np.array([5, 5]))
    expected = [read_disk(batch) for batch in batches]
    (tmp_path / "f.h5").unlink()  # rows in memory do not need it
    reader._maps.clear()
    for batch, from_disk in zip(batches, expected, strict=True):
        from_memory = read_memory(batch)
        assert torch.equal(from_memory.cells, from_disk.cells)
        assert torch.equal(from_memory.pooling, from_disk.pooling)
        assert from_memory.cells.dtype == from_disk.cells.dtype


@pytest.mark.parametrize("decoder", ["attention", "lstm"])
def test_training_from_memory_equals_training_from_disk(here, decoder, capsys):
    setting = {**TINY, "decoder": decoder, "epochs": 3, "precision": "float32"}
    train.main(Train(Path("data/small"), f"{decoder} in ram", features_on="ram", **setting))
    assert "features.h5: read from main memory (0.0 GB of features)" in capsys.readouterr().out
    assert same(weights(f"{decoder} in ram"), weights(decoder))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_from_the_gpu_equals_training_from_disk(here):
    setting = {**TINY, "epochs": 2, "precision": "float32", "device": "cuda"}
    for where in ("gpu", "ram", "disk"):
        train.main(Train(Path("data/small"), f"from {where}", features_on=where, **setting))
    for where in ("ram", "disk"):
        for name, values in weights("from gpu").items():
            torch.testing.assert_close(values, weights(f"from {where}")[name], msg=name)


def test_the_log_records_the_fraction_of_time_that_training_waited(here, monkeypatch):
    read = FeatureReader.read

    def read_slowly(self, rows):
        time.sleep(0.3)
        return read(self, rows)

    train.main(Train(Path("data/small"), "waits little", features_on="ram", epochs=1, **TINY))
    monkeypatch.setattr(FeatureReader, "read", read_slowly)
    train.main(Train(Path("data/small"), "waits long", features_on="disk", epochs=1, **TINY))
    assert log_of("waits long")[0]["waiting"] > 0.5 > log_of("waits little")[0]["waiting"]


def test_batches_for_a_gpu_are_read_into_pinned_memory(tmp_path, monkeypatch):
    loader = load_batches({0: Pinned()}, [0], GPU)
    assert list(loader) == ["pinned"]
    assert not load_batches({}, [], CPU).pin
    write(tmp_path / "f.h5")
    empty, pins = torch.empty, []

    def record_pin_memory(*size, pin_memory, **settings):
        pins.append(pin_memory)
        return empty(*size, **settings)

    monkeypatch.setattr(torch, "empty", record_pin_memory)
    for pin in (True, False):
        FeatureReader(tmp_path / "f.h5", pin).read(np.array([1, 2]))
    assert pins == [True, False]


class Pinned:
    def pin_memory(self):
        return "pinned"


# ---- prefetch


def test_items_are_returned_in_the_order_of_the_plan_and_the_thread_ends():
    plan = [3, 1, 4, 1, 5, 9, 2, 6]
    squares = {number: number**2 for number in plan}
    assert list(Prefetch(squares, plan)) == [number**2 for number in plan] and len(Prefetch(squares, plan)) == 8
    assert list(Prefetch({}, [])) == []
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


class RecordingDataset:
    """Records the indices that are requested."""

    def __init__(self):
        self.requested = []

    def __getitem__(self, index):
        self.requested.append(index)
        if index == 13:
            raise UserError("thirteen cannot be read")
        return index


def test_prefetch_reads_only_a_few_items_ahead():
    dataset = RecordingDataset()
    items = iter(Prefetch(dataset, range(100)))
    assert next(items) == 0
    deadline = time.monotonic() + 10
    while len(dataset.requested) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert dataset.requested == [0, 1, 2, 3], "one returned, two in the queue, one waiting for a slot"
    items.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_an_error_is_raised_where_its_item_would_be_returned():
    items = iter(Prefetch(RecordingDataset(), [1, 2, 13, 4]))
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(UserError, match="thirteen"):
        next(items)
