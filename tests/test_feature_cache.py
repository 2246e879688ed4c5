"""features.h5: what is read is what was written, in any process, however writing was interrupted."""

import errno
import multiprocessing
import os
import pickle

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from captioning.encoders.grid import Grid, grid_pooling
from captioning.errors import UserError
from captioning.features.feature_reader import FeatureReader
from captioning.features.feature_writer import FeatureWriter
from captioning.features.quantization import quantize
from captioning.features.recipe import describe_features, first_difference

IDS = [f"照片{i}" for i in range(10)]
RECIPE = {
    "name": "resnet18",
    "weights": "random",
    "sha256": "ab" * 32,
    "transform": {"image_size": 256, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)},
}


def attributes(native=(8, 8), grid="14", **changes):
    return describe_features({**RECIPE, **changes}, native, grid, "float32")


def write(path, native=(8, 8), grid="14", rows=range(10), channels=6, dtype="float16", overwrite=False):
    """Write these rows of random features -> the native maps (10, h, w, C) of all rows."""
    torch.manual_seed(0)
    maps = torch.randn(10, *native, channels).half().float()
    writer = FeatureWriter(path, IDS, attributes(native, grid), channels, dtype, overwrite)
    f14 = F.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2), 14).permute(0, 2, 3, 1)
    rows = np.array(list(rows), int)
    cells = (f14 if grid == "14" else maps)[rows]
    pooled = f14.mean((1, 2))[rows]
    if dtype == "uint8":
        codes, scales = quantize(cells)
        writer.write(rows, codes, pooled, scales)
    else:
        writer.write(rows, cells, pooled)
    writer.close()
    return maps


@pytest.mark.parametrize(
    "native, grid",
    [
        ((8, 8), "14"),
        ((8, 8), "native"),
        ((7, 7), "14"),
        ((10, 10), "14"),
        ((10, 10), "native"),
        ((14, 14), "14"),
        ((4, 6), "14"),
    ],
)
def test_the_reader_returns_the_pooled_map_whatever_grid_is_stored(tmp_path, native, grid):
    maps = write(tmp_path / "features.h5", native, grid)
    reader = FeatureReader(tmp_path / "features.h5")
    rows = np.array([7, 0, 3])
    grid = reader.read(rows)
    expected = F.adaptive_avg_pool2d(maps[rows].permute(0, 3, 1, 2), 14).flatten(2).transpose(1, 2)
    torch.testing.assert_close(grid.spread(grid.cells.float()), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(reader.read_pooled(rows).mean(), expected.mean(1), rtol=1e-4, atol=1e-4)
    if native == (8, 8):
        assert grid.cells.shape == (3, 64, 6)  # 64 of the 196 cells are enough
        torch.testing.assert_close(grid.cells.float(), maps[rows].flatten(1, 2), rtol=0, atol=0)


def test_the_file_has_the_layout_of_the_design(tmp_path):
    write(tmp_path / "features.h5", rows=[2, 5])
    with h5py.File(tmp_path / "features.h5") as file:
        assert file["features"].shape == (10, 14, 14, 6) and file["features"].dtype == np.float16
        assert file["pooled"].shape == (10, 6) and file["pooled"].dtype == np.float32
        assert file["images"].asstr()[:].tolist() == IDS
        assert file["done"][:].tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0, 0] and file["done"].dtype == np.uint8
        for name in ("features", "pooled", "done"):
            assert file[name].chunks is None and file[name].id.get_offset() is not None  # contiguous
        wanted = {
            "format",
            "encoder",
            "weights",
            "weights_sha256",
            "image_size",
            "grid",
            "native_grid",
            "mean",
            "std",
            "torch",
        }
        assert wanted <= set(file.attrs)


def read_all_rows(path):
    return FeatureReader(path).read(np.arange(10)).cells.numpy()


class ReaderAsDataset(torch.utils.data.Dataset):
    def __init__(self, reader):
        self.reader = reader

    def __len__(self):
        return 10

    def __getitem__(self, row):
        return self.reader.read(np.array([row])).cells[0]


def test_any_start_method_and_number_of_workers_reads_the_same_rows(tmp_path, times):
    """A worker that is spawned gets a pickled reader. In the suite, one that is forked reads with it, in less time."""
    write(tmp_path / "features.h5")
    reader = FeatureReader(tmp_path / "features.h5")
    serial = reader.read(np.arange(10)).cells
    pickled = pickle.loads(pickle.dumps(ReaderAsDataset(reader)))
    for data, method, workers in [
        (ReaderAsDataset(reader), "fork", 2),
        (pickled, "fork", 1),
        *times([], [(ReaderAsDataset(reader), "spawn", 1)]),
    ]:
        loader = DataLoader(data, batch_size=2, num_workers=workers, multiprocessing_context=method)
        assert torch.equal(torch.cat(list(loader)), serial)


def test_resumed_writing_gives_a_bit_equal_file(tmp_path):
    write(tmp_path / "complete.h5")
    write(tmp_path / "resumed.h5", rows=[0, 1, 2])
    writer = FeatureWriter(tmp_path / "resumed.h5", IDS, attributes(), 6, "float16", overwrite=False)
    assert writer.missing().tolist() == list(range(3, 10))
    writer.close()
    write(tmp_path / "resumed.h5", rows=range(3, 10))
    assert (tmp_path / "resumed.h5").read_bytes() == (tmp_path / "complete.h5").read_bytes()


def test_several_processes_write_rows_of_one_file(tmp_path):
    path = tmp_path / "features.h5"
    write(path, rows=[])
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=write, kwargs={"path": path, "rows": list(range(rank, 10, 2))}) for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    write(tmp_path / "complete.h5")
    assert np.array_equal(read_all_rows(path), read_all_rows(tmp_path / "complete.h5"))
    assert FeatureReader(path).done().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "resnet50"}, "encoder"),
        ({"sha256": "cd" * 32}, "weights_sha256"),
        ({"native": (7, 7)}, "native_grid"),
        ({"grid": "native"}, "grid"),
        ({"dtype": "float32"}, "dtype"),
        ({"transform": {**RECIPE["transform"], "decoding": "simplejpeg+torch"}}, "decoding pillow, not simplejpeg"),
        ({"ids": [f"other{photo}" for photo in IDS]}, "another data set"),
    ],
)
def test_a_stale_file_is_refused_with_the_difference_and_the_remedy(tmp_path, change, message):
    write(tmp_path / "features.h5")
    before = (tmp_path / "features.h5").read_bytes()
    recipe = {key: value for key, value in change.items() if key in RECIPE}
    new = attributes(change.get("native", (8, 8)), change.get("grid", "14"), **recipe)
    with pytest.raises(UserError, match=f"{message}.*--overwrite"):
        FeatureWriter(tmp_path / "features.h5", change.get("ids", IDS), new, 6, change.get("dtype", "float16"), False)
    assert (tmp_path / "features.h5").read_bytes() == before
    FeatureWriter(
        tmp_path / "features.h5", change.get("ids", IDS), new, 6, change.get("dtype", "float16"), True
    ).close()


def test_an_attribute_that_a_file_lacks_is_a_difference_and_one_that_is_not_asked_for_is_none():
    assert first_difference({"grid": "14"}, {"grid": "14", "quantization": "new"}) == "quantization"
    assert first_difference({"grid": "14", "torch": "2.6"}, {"grid": "14"}) is None


def test_the_same_weights_at_another_path_are_no_difference():
    found = {"weights": "/data/a.pth", "weights_sha256": "1f"}
    assert first_difference(found, {"weights": "a.pth", "weights_sha256": "1f"}) is None
    assert first_difference(found, {"weights": "a.pth", "weights_sha256": "20"}) == "weights"
    assert first_difference({"weights": "a.pth"}, {"weights": "b.pth"}) == "weights"


def test_a_file_of_an_older_version_without_later_attributes_is_resumed(tmp_path):
    write(tmp_path / "features.h5", rows=[0, 1])
    with h5py.File(tmp_path / "features.h5", "r+") as file:
        for name in ("scaled_decoding", "nvjpeg", "decoding"):
            del file.attrs[name]
    write(tmp_path / "features.h5", rows=range(2, 10))
    assert FeatureReader(tmp_path / "features.h5").done().all()


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="GB free"):
        FeatureWriter(tmp_path / "features.h5", IDS, attributes(), 2**48, "float16", overwrite=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["missing", "text", "truncated", "foreign", "folder"])
def test_an_unreadable_file_is_one_line(tmp_path, damage):
    path = tmp_path / "features.h5"
    write(path)
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("hello")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:10_000])
    elif damage == "foreign":
        with h5py.File(path, "w") as file:
            file["features"] = np.zeros(3)
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    with pytest.raises(UserError, match="features.h5") as error:
        FeatureReader(path)
    assert "\n" not in str(error.value)


def test_an_error_without_a_message_is_named_by_its_class(tmp_path, monkeypatch):
    def out_of_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr(h5py, "File", out_of_memory)
    with pytest.raises(UserError, match=r"x.h5: cannot be read as a Kantu feature file \(MemoryError\); check"):
        FeatureReader(tmp_path / "x.h5")


def test_grid_on_a_device_keeps_its_values():
    grid = Grid(torch.randn(2, 64, 3).half(), grid_pooling(8, 8)).to(torch.device("cpu"), torch.float32)
    assert grid.cells.dtype == torch.float32 and len(grid) == 2


def test_features_that_half_precision_cannot_hold_are_refused(tmp_path):
    writer = FeatureWriter(tmp_path / "features.h5", IDS, attributes(), 6, "float16", overwrite=False)
    with pytest.raises(UserError, match="--dtype float32"):
        writer.write(np.array([0]), torch.full((1, 14, 14, 6), 1e6), torch.zeros(1, 6))
    assert writer.missing().tolist() == list(range(10))


def test_a_row_is_marked_as_done_only_after_it_is_synced_and_everything_is_synced_at_the_end(tmp_path, monkeypatch):
    """A power failure, which no test can cause, keeps what was synced and any part of the rest."""
    events = []

    def recorded(kind, function):
        def call(*arguments):
            events.append((kind, *arguments[2:]))  # of a write: its offset
            return function(*arguments)

        return call

    monkeypatch.setattr("os.pwrite", recorded("write", os.pwrite))
    monkeypatch.setattr("os.replace", recorded("rename", os.replace))
    for name in ("os.fsync", "captioning.features.feature_writer.fdatasync"):
        monkeypatch.setattr(name, recorded("sync", os.fsync))
    for rows in ([0, 1, 2], [3, 4, 8], [9, 5, 6, 7]):
        write(tmp_path / "f.h5", rows=rows)
    assert events[:3] == [("sync",), ("sync",), ("rename",)] and events[-1] == ("sync",)
    arrays = FeatureReader(tmp_path / "f.h5").arrays
    unsynced, written, done = set(), set(), arrays["done"].offset
    for kind, *offset in events:
        if kind == "sync":
            written, unsynced = written | unsynced, set()
        elif kind == "write" and done <= offset[0] < done + 10:
            row = offset[0] - done  # the first of a run of consecutive rows
            assert {arrays[name].offset + row * arrays[name].row_bytes for name in ("features", "pooled")} <= written
        elif kind == "write":
            unsynced.add(offset[0])
    assert len(written) == 20 and not unsynced


@pytest.mark.parametrize("obstacle", ["read-only file", "read-only folder", "file as folder"])
def test_a_path_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, obstacle):
    path = tmp_path / "features.h5"
    if obstacle == "read-only file":
        write(path)
        monkeypatch.setattr("os.open", refuse)  # root may write to any file
    elif obstacle == "read-only folder":
        monkeypatch.setattr("h5py.File", refuse)
    else:
        path.write_text("no folder")
        path = path / "features.h5"
    with pytest.raises(
        UserError, match="features.h5: cannot be written .*; fix that and run the same command"
    ) as error:
        write(path)
    assert "\n" not in str(error.value)


def refuse(*_, **__):
    raise OSError(errno.EROFS, "Unable to synchronously create file (unable to open file: errno = 30, and so on)")


def test_a_missing_folder_is_created(tmp_path):
    write(tmp_path / "new" / "folder" / "features.h5")
    assert FeatureReader(tmp_path / "new" / "folder" / "features.h5").done().all()
