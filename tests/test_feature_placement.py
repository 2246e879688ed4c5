"""Training sees the same features wherever they are placed, and with or without prefetching."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from captioning.dataset import batches
from captioning.dataset.batches import CachedPhotos
from captioning.dataset.caption_dataset import CaptionDataset
from captioning.dataset.prefetch import Prefetch
from captioning.errors import UserError
from captioning.features import cached_grid, feature_placement, feature_reader
from captioning.features.feature_files import open_feature_files
from captioning.features.feature_placement import (
    FeaturePlacement,
    FileRows,
    HeldRows,
    PlacedFeatures,
    Sizes,
    choose_placement,
    evenly_spread,
    place_features,
)
from captioning.features.feature_reader import FeatureReader
from captioning.training.cuda_graphs import StaticBatch, StaticSize
from captioning.training.data import load_batches
from captioning.training.objectives import LossWeights
from config import Train
from preprocess.captions import Photo
from preprocess.vocabulary import Vocabulary
from tests.small import TINY, log_of, same, weights
from tests.test_feature_cache import write

GB = 10**9
CPU, GPU = torch.device("cpu"), torch.device("cuda")


COCO = Sizes(photos=123_287, row_bytes=64 * 2048 * 2, quantized_bytes=64 * (2048 + 4))  # 32.3 GB, or 16.2
AS_CODES = COCO._replace(row_bytes=COCO.quantized_bytes)


@pytest.fixture
def machine(monkeypatch):
    """Set the gigabytes of a machine: the GPU's, all free, and the free main memory."""

    def simulate(gpu, ram=200):
        def gpu_memory(device):
            return gpu * GB, gpu * GB

        monkeypatch.setattr(feature_placement, "gpu_memory", gpu_memory)
        monkeypatch.setattr(feature_placement, "free_main_memory", lambda: ram * GB)

    return simulate


@pytest.mark.parametrize(
    "gpu, ram, sizes, on_gpu, in_ram, on_disk",
    [
        (80, 200, COCO, 1.0, 0, 0),  # 12 GB are kept for the decoder
        (48, 200, COCO, 1.0, 0, 0),  # 7.2 GB
        (40, 200, COCO, 1.0, 0, 0),  # 6 GB
        (24, 200, COCO, 0.62, 0.38, 0),  # 4 GB
        (24, 20, COCO, 0.62, 0, 0.38),
        (24, 200, AS_CODES, 1.0, 0, 0),
        (12, 200, COCO, 0.25, 0.75, 0),
        (12, 200, AS_CODES, 0.49, 0.51, 0),
        (4, 200, COCO, 0, 1.0, 0),
        (4, 50, COCO, 0, 0, 1.0),
    ],
)
def test_as_many_features_as_fit_beside_the_decoder_are_on_the_gpu(machine, gpu, ram, sizes, on_gpu, in_ram, on_disk):
    machine(gpu, ram)
    placement = choose_placement("auto", sizes, GPU)
    counts = placement.on_gpu, placement.in_ram, placement.on_disk
    assert sum(counts) == sizes.photos
    assert [count / sizes.photos for count in counts] == pytest.approx([on_gpu, in_ram, on_disk], abs=0.005)
    assert placement.on_gpu * sizes.row_bytes <= GB * (gpu - max(4, 0.15 * gpu))


@pytest.mark.parametrize("gpu, fits", [(40, True), (24, False)])
def test_gpu_means_all_features_and_the_refusal_says_how_many_fit_and_what_to_do(machine, gpu, fits):
    machine(gpu)
    if fits:
        assert choose_placement("gpu", COCO, GPU).on_gpu == COCO.photos
        return
    with pytest.raises(UserError, match="--features-on gpu: 32.3 GB of features; .* 76,293 of 123,287 photos") as error:
        choose_placement("gpu", COCO, GPU)
    assert "--features-on auto" in str(error.value) and "--quantize-features" in str(error.value)
    with pytest.raises(UserError) as error:
        choose_placement("gpu", AS_CODES._replace(photos=200_000), GPU)
    assert "--quantize-features" not in str(error.value), "they are codes already"


@pytest.mark.parametrize(
    "requested, device, message",
    [
        ("gpu", CPU, "--features-on gpu: the run is on cpu"),
        ("ram", CPU, "--features-on ram: 32.3 GB of features are more than 50% of the 60.0 GB free"),
    ],
)
def test_features_that_do_not_fit_where_requested_are_refused(machine, requested, device, message):
    machine(80, ram=60)
    with pytest.raises(UserError, match=message):
        choose_placement(requested, COCO, device)


@pytest.mark.parametrize("requested, device", [("disk", GPU), ("disk", CPU), ("auto", CPU)])
def test_features_are_read_from_disk_if_requested_and_by_the_cpu(requested, device):
    assert choose_placement(requested, COCO, device).on_disk == COCO.photos


def test_the_message_says_how_many_photos_lie_where_and_recommends_what_would_fit(machine):
    machine(24)
    printed = str(choose_placement("auto", COCO, GPU))
    assert printed.startswith("the GPU (76,293 photos) and main memory (46,994 photos): 32.3 GB of features; ")
    assert printed.endswith("; give --quantize-features, with which all fit, in 16.2 GB")
    machine(12)
    assert "--quantize-features" not in str(choose_placement("auto", COCO, GPU)), "the codes do not fit either"
    machine(80)
    assert str(choose_placement("auto", COCO, GPU)).startswith(
        "the GPU (32.3 GB of features; 80.0 GB are free on the GPU, of which 12.0"
    )


@pytest.mark.parametrize("photos, chosen", [(10, 0), (10, 10), (10, 4), (7, 6), (1, 1), (1000, 617), (5, 1)])
def test_the_photos_on_the_gpu_are_spread_evenly(photos, chosen):
    taken = evenly_spread(photos, chosen)
    assert taken.dtype == bool and taken.shape == (photos,) and taken.sum() == chosen
    ends = np.linspace(0, chosen, photos + 1)[1:]
    assert np.abs(taken.cumsum() - ends).max() < 1


def test_free_memory_is_measured_and_divided_among_the_processes_of_a_machine(monkeypatch):
    free = feature_placement.free_main_memory()
    assert 10**7 < free < 10**14
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert feature_placement.free_main_memory() == pytest.approx(free / 4, rel=0.3)


BATCHES = [[4, 0], [5, 1, 7, 0, 4, 2, 9], [5, 5], [9], [2, 4, 7, 5]]  # rows of ROWS, in any order
ROWS = np.array([9, 2, 4, 0, 7, 1, 5])


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(
    "native, grid, dtype", [((8, 8), "14", "float16"), ((10, 10), "14", "float32"), ((8, 8), "native", "uint8")]
)
def test_wherever_rows_are_held_they_are_those_of_the_file(
    tmp_path, monkeypatch, native, grid, dtype, pooled, quantize
):
    """The CPU takes the place of the GPU. Some rows of a batch are on the device, the others in memory or on disk."""
    monkeypatch.setattr(feature_placement, "LOAD_BATCH_SIZE", 3)
    write(tmp_path / "f.h5", native, grid, dtype=dtype)
    files = open_feature_files([tmp_path / "f.h5"], tmp_path)
    reader, source = files.first, FileRows(files, pooled, quantize)
    from_disk = place_features(files, ROWS, pooled, "disk", CPU, quantize)
    expected = [from_disk.read(np.array(batch)).to(CPU, torch.float32) for batch in BATCHES]
    exact = (reader.read_pooled(ROWS[:1]) if pooled else reader.read(ROWS[:1])).cells.float()
    difference = from_disk.read(ROWS[:1]).to(CPU, torch.float32).cells - exact
    assert difference.norm() <= (0.02 if quantize and not pooled else 0) * exact.norm()
    for on_gpu, in_ram in [(0, 7), (7, 0), (3, 4), (3, 0), (6, 1), (1, 0)]:
        features = PlacedFeatures(source, ROWS, FeaturePlacement(7, on_gpu, in_ram, ""), CPU)
        for batch, from_file in zip(BATCHES, expected, strict=True):
            cached = features.read(np.array(batch))
            grid_on_device = cached.to(CPU, torch.float32)
            assert torch.equal(grid_on_device.cells, from_file.cells) and len(cached) == len(batch)
            assert torch.equal(grid_on_device.pooling, from_file.pooling)
            static = torch.full((12, *cached.shape[1:]), torch.nan)
            cached.copy_to(static[: len(batch)])
            assert torch.equal(static[: len(batch)], from_file.cells) and static[len(batch) :].isnan().all()


def test_rows_in_memory_do_not_need_the_file(tmp_path):
    write(tmp_path / "f.h5")
    files = open_feature_files([tmp_path / "f.h5"], tmp_path)
    in_memory = place_features(files, ROWS, False, "ram", CPU)
    expected = files.read(ROWS[::-1]).cells
    (tmp_path / "f.h5").unlink()
    files.first._maps.clear()
    assert torch.equal(in_memory.read(ROWS[::-1]).to(CPU, torch.float16).cells, expected)


def test_a_batch_for_a_gpu_is_gathered_once_into_pinned_memory(tmp_path, monkeypatch):
    """Not copied to fresh memory first: that made main memory slower than the page cache."""
    write(tmp_path / "f.h5", dtype="uint8")
    gathered = []

    def empty_pinned(shape, dtype):
        gathered.append(torch.empty(shape, dtype=dtype))
        return gathered[-1]

    monkeypatch.setattr(cached_grid, "empty_pinned", empty_pinned)
    held = HeldRows(FileRows(open_feature_files([tmp_path / "f.h5"], tmp_path), False, False), ROWS, CPU, pinned=True)
    rows = held.read(np.array([4, 9]))
    assert [tensor.data_ptr() for tensor in gathered] == [rows.cells.data_ptr(), rows.scales.data_ptr()]


def make_batch(features, indices):
    """The batch of these photos, whose rows are ROWS; photo i has i + 1 captions."""
    photos = [Photo(f"{i}.jpg", str(i), "train", (("a",),) * (i + 1)) for i in range(7)]
    vocabulary = Vocabulary.build([["a"]], language="en", tokenizer="whitespace", min_count=1, max_words=9)
    return CachedPhotos(CaptionDataset(photos, vocabulary, 9), ROWS, features.read)[np.array(indices)]


def test_a_static_batch_is_filled_with_rows_from_the_device_and_from_the_host(tmp_path):
    write(tmp_path / "f.h5", dtype="uint8")
    source = FileRows(open_feature_files([tmp_path / "f.h5"], tmp_path), pooled=False, quantize=False)
    batch = make_batch(PlacedFeatures(source, ROWS, FeaturePlacement(7, 3, 4, ""), CPU), [6, 0, 3, 2])
    assert 0 < len(batch.photos.rows) < 4
    size = StaticSize(photos=8, batch_sizes=np.array([16, 16]))
    static = StaticBatch(batch, size, 0, CPU, torch.float32)
    static.fill(batch, LossWeights())
    expected = batch.to(CPU, torch.float32).photos
    assert torch.equal(static.grid.cells[:4], expected.cells) and not static.grid.cells[4:].any()
    assert torch.equal(static.grid.pooling, expected.pooling)


def test_pinning_a_batch_copies_what_lies_on_the_host_and_keeps_every_value(tmp_path, monkeypatch):
    write(tmp_path / "f.h5", dtype="uint8")
    source = FileRows(open_feature_files([tmp_path / "f.h5"], tmp_path), pooled=False, quantize=False)
    features = PlacedFeatures(source, ROWS, FeaturePlacement(7, 3, 0, ""), CPU)
    batch = make_batch(features, [6, 0, 3, 2])
    pinned = []

    def pin(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    for module in (cached_grid, batches):
        monkeypatch.setattr(module, "pin", pin)
    copy = batch.pin_memory()
    assert copy.photos.resident is batch.photos.resident and len(pinned) == 7
    for one, other in zip(tensors_of(batch), tensors_of(copy), strict=True):
        assert torch.equal(one, other) and any(other.data_ptr() == tensor.data_ptr() for tensor in pinned)
    assert torch.equal(copy.to(CPU, torch.float32).photos.cells, batch.to(CPU, torch.float32).photos.cells)


def tensors_of(batch):
    """The tensors of a batch that lie on the host."""
    photos = batch.photos
    return [*photos.host, photos.rows, photos.places, batch.words.data, batch.targets, batch.photo_index]


@pytest.mark.parametrize("on_gpu, in_ram, remedy", [(7, 0, "--features-on ram or disk"), (0, 7, "--features-on disk")])
def test_running_out_of_memory_while_features_are_loaded_names_the_flag(tmp_path, monkeypatch, on_gpu, in_ram, remedy):
    def out_of_memory(self, rows, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    write(tmp_path / "f.h5")
    source = FileRows(open_feature_files([tmp_path / "f.h5"], tmp_path), False, False)
    monkeypatch.setattr(cached_grid.FeatureRows, "empty_like", out_of_memory)
    with pytest.raises(UserError, match=f"out of memory.*{remedy}$"):
        PlacedFeatures(source, ROWS, FeaturePlacement(7, on_gpu, in_ram, ""), CPU)


def test_training_from_partly_resident_codes_equals_training_from_codes_on_disk(here, monkeypatch, capsys):
    """The CPU takes the place of the GPU."""
    setting = {**TINY, "epochs": 1, "precision": "float32", "quantize_features": True}
    train.main(Train(Path("data/small"), "codes from disk", features_on="disk", **setting))
    partly = FeaturePlacement(24, 11, 13, "simulated")
    monkeypatch.setattr(feature_placement, "choose_placement", lambda *arguments: partly)
    train.main(Train(Path("data/small"), "codes partly on gpu", **setting))
    assert "the GPU (11 photos) and main memory (13 photos): simulated" in capsys.readouterr().out
    assert same(weights("codes partly on gpu"), weights("codes from disk"))
    with pytest.raises(UserError, match="--quantize-features False: .* was trained with True"):
        train.main(Train(Path("data/small"), "codes from disk", resume=True, **{**setting, "quantize_features": False}))


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_batches_for_a_gpu_are_complete_although_nothing_waits_for_their_copies(tmp_path, dtype):
    """Pinned memory is not used again before it was copied, even if the GPU lags behind."""
    write(tmp_path / "f.h5", dtype=dtype, channels=256)
    source = FileRows(open_feature_files([tmp_path / "f.h5"], tmp_path, pin=True), pooled=False, quantize=False)
    exact = source.reader.read(np.arange(10)).cells.float()
    for on_gpu, in_ram in [(0, 7), (0, 0), (3, 4), (3, 0), (7, 0)]:
        placed = PlacedFeatures(source, ROWS, FeaturePlacement(7, on_gpu, in_ram, ""), GPU)
        torch.cuda._sleep(10**8)
        plan = [np.roll(ROWS, shift)[: 1 + shift % 7] for shift in range(50)]
        batches = [placed.read(rows).pin_memory().to(GPU, torch.float32).cells for rows in plan]
        for rows, cells in zip(plan, batches, strict=True):
            torch.testing.assert_close(cells.cpu(), exact[rows], rtol=1e-5, atol=1e-6)


def test_the_log_records_the_fraction_of_time_that_training_waited(here, monkeypatch):
    read = FeatureReader.read_into

    def read_slowly(self, *arguments):
        time.sleep(0.3)
        return read(self, *arguments)

    train.main(Train(Path("data/small"), "waits little", features_on="ram", epochs=1, **TINY))
    monkeypatch.setattr(FeatureReader, "read_into", read_slowly)
    train.main(Train(Path("data/small"), "waits long", features_on="disk", epochs=1, **TINY))
    assert log_of("waits long")[0]["waiting"] > 0.5 > log_of("waits little")[0]["waiting"]


def test_batches_for_a_gpu_are_read_into_pinned_memory(tmp_path, monkeypatch):
    loader = load_batches({0: Pinned()}, [0], GPU)
    assert list(loader) == ["pinned"]
    assert not load_batches({}, [], CPU).pin
    write(tmp_path / "f.h5", dtype="uint8")
    shapes = []

    def empty_pinned(shape, dtype):
        shapes.append((shape, dtype))
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr(feature_reader, "empty_pinned", empty_pinned)
    for pin in (True, False):
        FeatureReader(tmp_path / "f.h5", pin).read(np.array([1, 2]))
    assert shapes == [((2, 64, 6), torch.uint8), ((2, 64), torch.float32)], "codes and scales, of the first reader"


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
