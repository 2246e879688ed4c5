"""Wherever the features lie, and whoever reads them ahead, training sees the same."""

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
from captioning.features.feature_placement import choose_residence, reading
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
    monkeypatch.setattr(feature_placement, "free_on_gpu", lambda device: 100 * GB if device.type == "cuda" else 0)
    monkeypatch.setattr(feature_placement, "free_in_memory", lambda: 200 * GB)


@pytest.mark.parametrize(
    "wanted, device, needed, where",
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
def test_features_lie_where_they_fit_with_room_to_spare(machine, wanted, device, needed, where):
    found, why = choose_residence(wanted, needed, device)
    assert found == where and f"{needed / GB:.1f} GB of features" in why


@pytest.mark.parametrize(
    "wanted, device, needed, words",
    [
        ("gpu", CPU, 1, "--features-on gpu: the run is on cpu"),
        ("gpu", GPU, 61 * GB, "more than 60% of the 100.0 GB free"),
        ("ram", CPU, 101 * GB, "--features-on ram: 101.0 GB of features are more than 50%"),
    ],
)
def test_features_that_do_not_fit_where_they_are_wanted_are_refused(machine, wanted, device, needed, words):
    with pytest.raises(UserError, match=words):
        choose_residence(wanted, needed, device)


def test_the_free_memory_is_measured_and_shared_by_the_processes_of_a_machine(monkeypatch):
    free = feature_placement.free_in_memory()
    assert 10**7 < free < 10**14
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert feature_placement.free_in_memory() == pytest.approx(free / 4, rel=0.3)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("native, grid", [((8, 8), "14"), ((8, 8), "native"), ((10, 10), "14")])
def test_rows_in_memory_are_those_of_the_file(tmp_path, native, grid, pooled, monkeypatch):
    monkeypatch.setattr(feature_placement, "LOADED_AT_ONCE", 3)
    write(tmp_path / "f.h5", native, grid)
    reader = FeatureReader(tmp_path / "f.h5")
    rows = np.array([9, 2, 4, 0, 7, 1, 5])
    there, where = reading(reader, rows, pooled, "ram", CPU)
    plain, disk = reading(reader, rows, pooled, "disk", CPU)
    assert (where.where, disk.where) == ("ram", "disk")
    wanted = (np.array([4, 0]), rows[::-1].copy(), np.array([5, 5]))
    expected = [plain(asked) for asked in wanted]
    (tmp_path / "f.h5").unlink()  # what lies in memory needs it no more
    reader._maps.clear()
    for asked, other in zip(wanted, expected, strict=True):
        one = there(asked)
        assert torch.equal(one.cells, other.cells) and torch.equal(one.pooling, other.pooling)
        assert one.cells.dtype == other.cells.dtype


@pytest.mark.parametrize("decoder", ["attention", "lstm"])
def test_training_from_memory_is_training_from_the_disk(here, decoder, capsys):
    setting = {**TINY, "decoder": decoder, "epochs": 3, "precision": "float32"}
    train.main(Train(Path("data/small"), f"{decoder} in ram", features_on="ram", **setting))
    assert "features.h5: read from main memory (0.0 GB of features)" in capsys.readouterr().out
    assert same(weights(f"{decoder} in ram"), weights(decoder))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_from_the_gpu_is_training_from_the_disk(here):
    setting = {**TINY, "epochs": 2, "precision": "float32", "device": "cuda"}
    for where in ("gpu", "ram", "disk"):
        train.main(Train(Path("data/small"), f"from {where}", features_on=where, **setting))
    for where in ("ram", "disk"):
        for name, values in weights("from gpu").items():
            torch.testing.assert_close(values, weights(f"from {where}")[name], msg=name)


def test_the_log_says_how_much_of_its_time_training_waited(here, monkeypatch):
    plain = FeatureReader.read

    def slowly(self, rows):
        time.sleep(0.3)
        return plain(self, rows)

    train.main(Train(Path("data/small"), "waits little", features_on="ram", epochs=1, **TINY))
    monkeypatch.setattr(FeatureReader, "read", slowly)
    train.main(Train(Path("data/small"), "waits long", features_on="disk", epochs=1, **TINY))
    assert log_of("waits long")[0]["waiting"] > 0.5 > log_of("waits little")[0]["waiting"]


def test_for_a_gpu_batches_are_read_into_pinned_memory(tmp_path, monkeypatch):
    loader = load_batches({0: Pinned()}, [0], GPU)
    assert list(loader) == ["pinned"]
    assert not load_batches({}, [], CPU).pin
    write(tmp_path / "f.h5")
    plain, pins = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **how: pins.append(pin_memory) or plain(*size, **how))
    for pin in (True, False):
        FeatureReader(tmp_path / "f.h5", pin).read(np.array([1, 2]))
    assert pins == [True, False]


class Pinned:
    def pin_memory(self):
        return "pinned"


# ---- prefetch


def test_items_come_in_the_order_of_the_plan_and_the_thread_ends():
    plan = [3, 1, 4, 1, 5, 9, 2, 6]
    squares = {number: number**2 for number in plan}
    assert list(Prefetch(squares, plan)) == [number**2 for number in plan] and len(Prefetch(squares, plan)) == 8
    assert list(Prefetch({}, [])) == []
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


class Slow:
    """Notes what was asked of it."""

    def __init__(self):
        self.asked = []

    def __getitem__(self, place):
        self.asked.append(place)
        if place == 13:
            raise UserError("thirteen cannot be read")
        return place


def test_it_reads_ahead_but_not_far():
    slow = Slow()
    items = iter(Prefetch(slow, range(100)))
    assert next(items) == 0
    deadline = time.monotonic() + 10
    while len(slow.asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert slow.asked == [0, 1, 2, 3], "one in hand, two ready, one more waiting for its place"
    items.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_an_error_arrives_where_its_item_would():
    items = iter(Prefetch(Slow(), [1, 2, 13, 4]))
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(UserError, match="thirteen"):
        next(items)
