"""An extraction survives kills and full disks, and its file can be inspected and verified."""

import contextlib
import os
import random
import shutil
import subprocess
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import extract_features
from captioning.encoders.loading import encoder_file, encoder_from_checkpoint, read_encoder_checkpoint
from captioning.errors import PhotoError, UserError
from captioning.features import hdf5_layout
from captioning.features.feature_reader import FeatureReader
from captioning.features.feature_writer import FeatureWriter, mark_not_done
from captioning.runtime.checkpoint import save_checkpoint
from config import ExtractFeatures
from preprocess.captions import CAPTIONS_FILE, Photo, write_captions
from tests.small import ENCODER
from tests.test_feature_cache import IDS, attributes, write

PHOTOS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 photos of 64x64 pixels, and complete.h5, the file of an uninterrupted extraction."""
    folder = tmp_path_factory.mktemp("extraction")
    pixels = np.random.default_rng(0).integers(0, 255, (PHOTOS, 64, 64, 3), np.uint8)
    records = []
    for number, photo in enumerate(pixels):
        path = folder / f"{number}.png"
        Image.fromarray(photo).save(path)
        records.append(Photo(str(path), f"photo{number}", "train", (("a",),)))
    write_captions(folder / CAPTIONS_FILE, records)
    extract(folder, folder / "complete.h5")
    return folder


def extract(data, out, **settings):
    extract_features.main(ExtractFeatures(data, **ENCODER, batch_size=4, out=out, **settings))


def extract_in_a_process(data, out):
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared with forked processes: a killed one would hold it for ever
    with open(os.devnull, "w", encoding="utf-8") as devnull:
        os.dup2(devnull.fileno(), 1)
        os.dup2(devnull.fileno(), 2)
    extract(data, out)


def test_an_extraction_killed_at_any_moment_ends_bit_equal_and_keeps_its_rows(data, tmp_path, times):
    """Kill real processes, which are forked to save the seconds of importing torch."""
    out, context, rng = tmp_path / "killed.h5", get_context("fork"), random.Random(0)
    shutil.copy(data / "complete.encoder.pt", tmp_path / "killed.encoder.pt")  # the same random weights
    started = time.monotonic()
    extract(data, tmp_path / "timed.h5")
    seconds = time.monotonic() - started
    for _ in range(times(4, 50)):
        process = context.Process(target=extract_in_a_process, args=(data, out))
        before = done_rows(out)
        process.start()
        time.sleep(rng.uniform(0, 1.2 * seconds))
        ended = not process.is_alive()
        process.kill()
        process.join()
        if out.exists():
            after = done_rows(out)
            assert before <= after, "a row that was done stays done"
            rows = np.array(sorted(after), int)
            expected = FeatureReader(data / "complete.h5").read_stored(rows)
            assert np.array_equal(FeatureReader(out).read_stored(rows), expected)
            with h5py.File(out) as file:
                assert file["features"].shape[0] == PHOTOS
        if ended:  # before the kill: the next process starts again
            assert out.read_bytes() == (data / "complete.h5").read_bytes()
            out.unlink()
    extract(data, out)
    assert out.read_bytes() == (data / "complete.h5").read_bytes()


def done_rows(path):
    return set(np.flatnonzero(FeatureReader(path).done()).tolist()) if path.exists() else set()


def test_no_done_row_is_encoded_again(data, tmp_path, monkeypatch):
    out = tmp_path / "resumed.h5"
    shutil.copy(data / "complete.encoder.pt", tmp_path / "resumed.encoder.pt")
    batches = []
    write = FeatureWriter.write

    def interrupted_in_the_third_batch(self, rows, *values):
        batches.append(list(rows))
        if len(batches) == 3:
            raise KeyboardInterrupt
        write(self, rows, *values)

    monkeypatch.setattr(FeatureWriter, "write", interrupted_in_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        extract(data, out)
    extract(data, out)
    assert sum(batches[3:], []) == list(range(8, PHOTOS)), "the first two batches are on disk"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # a file may still be mapped


def test_a_disk_that_fills_up_is_one_line_and_the_same_command_resumes(data, small_disk):
    write(small_disk / "features.h5", rows=range(3))
    free = shutil.disk_usage(small_disk).free
    (small_disk / "others").write_bytes(b"x" * (free - 3000))
    with pytest.raises(UserError, match="features.h5: cannot be written .No space.*run the same command") as error:
        write(small_disk / "features.h5", rows=range(3, 10))
    assert "\n" not in str(error.value) and FeatureReader(small_disk / "features.h5").done().sum() == 3
    (small_disk / "others").unlink()
    write(small_disk / "features.h5", rows=range(3, 10))
    write(data / "expected.h5")
    assert (small_disk / "features.h5").read_bytes() == (data / "expected.h5").read_bytes()
    (small_disk / "others").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 3000))
    with pytest.raises(UserError, match="needs .* GB and the disk has"):
        FeatureWriter(small_disk / "more.h5", IDS, attributes(), 2000, "float16", overwrite=False)


def test_photos_that_cannot_be_read_are_listed_in_a_file(data, tmp_path):
    records = [Photo(str(data / f"{number}.png"), f"photo{number}", "train", (("a",),)) for number in range(20)]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no photo")
    write_captions(tmp_path / CAPTIONS_FILE, [*records, Photo(str(broken), "broken", "train", (("a",),))])
    for allowed in (0.0, 0.1):  # too many failures, and not too many
        with pytest.raises(PhotoError, match="more than") if not allowed else contextlib.nullcontext():
            extract(tmp_path, tmp_path / "f.h5", allow_missing=allowed)
        assert (tmp_path / "f.unreadable.txt").read_text() == f"{broken}: not an image\n"
        (tmp_path / "f.unreadable.txt").write_text("of an earlier extraction")
    Image.new("RGB", (64, 64)).save(broken)
    extract(tmp_path, tmp_path / "f.h5")
    assert not (tmp_path / "f.unreadable.txt").exists() and FeatureReader(tmp_path / "f.h5").done().all()


def test_info_prints_the_recipe_the_sizes_and_the_rows_done(data, capsys):
    extract(data, data / "complete.h5", info=True)
    printed = " ".join(capsys.readouterr().out.split())
    for expected in (
        "photos 40, of which 40 are done",
        "row 14x14x128 float16, 50,176 bytes",
        "encoder resnet18.layer2",
        "weights random",
        "image_size 64",
        "grid 14",
        "native_grid [8, 8]",
    ):
        assert expected in printed
    with pytest.raises(UserError, match="none.h5: no such file"):
        extract(data, data / "none.h5", info=True)


def test_verify_finds_rows_that_are_not_finite_and_the_next_extraction_replaces_them(data, tmp_path, capsys):
    out = tmp_path / "damaged.h5"
    for name in ("h5", "encoder.pt"):
        shutil.copy(data / f"complete.{name}", out.with_suffix(f".{name}"))
    extract(data, out, verify=True)
    assert "40 of 40 rows are done and undamaged; 40 encoded again differ by at most 0.0" in capsys.readouterr().out
    features = FeatureReader(out).arrays["features"]
    with open(out, "r+b") as file:
        file.seek(features.offset + 7 * features.row_bytes + 100)
        file.write(np.array([np.nan], np.float16).tobytes())
    with pytest.raises(UserError, match="1 rows are damaged, such as that of photo7"):
        extract(data, out, verify=True)
    assert np.flatnonzero(~FeatureReader(out).done()).tolist() == [7]
    extract(data, out)
    complete, repaired = (FeatureReader(path).read_stored(np.arange(PHOTOS)) for path in (data / "complete.h5", out))
    np.testing.assert_allclose(complete.astype(float), repaired.astype(float), rtol=1e-2, atol=1e-3)
    extract(data, out, verify=True)


def test_verify_finds_a_row_of_another_photo(data, tmp_path):
    out = tmp_path / "swapped.h5"
    for name in ("h5", "encoder.pt"):
        shutil.copy(data / f"complete.{name}", out.with_suffix(f".{name}"))
    content = bytearray(out.read_bytes())
    for name in ("features", "pooled"):
        array = FeatureReader(out).arrays[name]
        start, middle, end = (array.offset + row * array.row_bytes for row in (3, 4, 5))
        content[start:end] = content[middle:end] + content[start:middle]
    out.write_bytes(content)
    with pytest.raises(
        UserError, match=r"the row of photo[34] differs by \d+% from what resnet18.layer2 .random. computes"
    ):
        extract(data, out, verify=True)
    write_captions(Path(tmp_path) / CAPTIONS_FILE, [Photo("x.png", "x", "train", (("a",),))])
    with pytest.raises(UserError, match="belongs to another data set"):
        extract(tmp_path, out, verify=True)


def test_a_killed_extraction_to_codes_resumes_to_the_same_file(data, tmp_path, monkeypatch, capsys):
    out, complete = tmp_path / "resumed.h5", tmp_path / "complete.h5"
    for path in (out, complete):
        shutil.copy(data / "complete.encoder.pt", path.with_suffix(".encoder.pt"))  # the same random weights
    extract(data, complete, dtype="uint8")
    write_rows = FeatureWriter.write
    calls = []

    def killed_in_the_third_batch(self, rows, *values):
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write_rows(self, rows, *values)

    monkeypatch.setattr(FeatureWriter, "write", killed_in_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        extract(data, out, dtype="uint8")
    assert len(done_rows(out)) == 8
    extract(data, out, dtype="uint8")
    assert out.read_bytes() == complete.read_bytes()
    with pytest.raises(UserError, match="was extracted with dtype uint8, not float16; give --overwrite"):
        extract(data, out, dtype="float16")
    capsys.readouterr()
    extract(data, out, info=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "row 14x14x128 uint8, 25,872 bytes" in printed and f"quantization {hdf5_layout.QUANTIZATION}" in printed


def test_verify_finds_damaged_codes_and_accepts_their_rounding(data, tmp_path, capsys):
    out = tmp_path / "codes.h5"
    shutil.copy(data / "complete.encoder.pt", out.with_suffix(".encoder.pt"))
    extract(data, out, dtype="uint8")
    extract(data, out, verify=True)
    assert "40 of 40 rows are done and undamaged; 40 encoded again differ by at most 0." in capsys.readouterr().out
    arrays = FeatureReader(out).arrays
    with open(out, "r+b") as file:
        file.seek(arrays["features"].offset + 7 * arrays["features"].row_bytes + 50)
        file.write(bytes(4096))  # a lost page
        file.seek(arrays["scales"].offset + 9 * arrays["scales"].row_bytes)
        file.write(np.array([np.nan], np.float32).tobytes())
    with pytest.raises(UserError, match="2 rows are damaged, such as that of photo7"):
        extract(data, out, verify=True)
    assert np.flatnonzero(~FeatureReader(out).done()).tolist() == [7, 9]
    extract(data, out, dtype="uint8")
    extract(data, out, verify=True)


def test_scaled_decoding_is_part_of_the_recipe(data, tmp_path, capsys):
    with pytest.raises(UserError, match="scaled_decoding False, not True; give --overwrite"):
        extract(data, data / "complete.h5", scaled_decoding=True)
    extract(data, tmp_path / "scaled.h5", scaled_decoding=True)
    extract(data, tmp_path / "scaled.h5", info=True)
    assert "scaled_decoding  True" in capsys.readouterr().out
    assert encoder_from_checkpoint(read_encoder_checkpoint(tmp_path / "scaled.h5")).transform.scaled_decoding


def test_a_file_of_before_is_resumed_with_pillows_decoding_byte_for_byte(tmp_path, monkeypatch):
    """Older versions recorded no decoding. It was Pillow's, which differs from ours by a grey level here and there."""
    out, rng = tmp_path / "old.h5", np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (90, 80, 3), np.uint8)).save(tmp_path / f"{i}.jpg")
    write_captions(
        tmp_path / CAPTIONS_FILE, [Photo(str(tmp_path / f"{i}.jpg"), str(i), "train", (("a",),)) for i in range(8)]
    )
    with monkeypatch.context() as before:
        before.setattr(extract_features, "choose_decoding", lambda completed: "pillow")
        extract(tmp_path, out)
    encoder = read_encoder_checkpoint(out)
    del encoder["encoder"]["transform"]["decoding"]
    save_checkpoint(encoder_file(out), encoder)
    with h5py.File(out, "r+") as file:
        del file.attrs["decoding"]
        expected = file["features"][:]
        file["features"][2:7] = 0
    mark_not_done(out, range(2, 7))
    extract(tmp_path, out)
    with h5py.File(out) as file:
        assert np.array_equal(file["features"], expected)
    extract(tmp_path, out, verify=True)
    monkeypatch.setattr(extract_features, "choose_decoding", lambda completed: "simplejpeg+torch")
    with pytest.raises(
        UserError, match=r"decoding pillow, not simplejpeg\+torch; give --overwrite to replace it, or --out"
    ):
        extract(tmp_path, out)
    monkeypatch.undo()
    extract(tmp_path, out, overwrite=True)
    assert FeatureReader(out).attributes["decoding"] == "simplejpeg+torch"
    with h5py.File(out) as file:
        assert not np.array_equal(file["features"], expected)


def test_any_error_of_the_writing_thread_is_raised_instead_of_waiting_for_ever(tmp_path, monkeypatch):
    def fail(self, batches):
        raise RuntimeError("a bug in the writer")

    monkeypatch.setattr(FeatureWriter, "_commit", fail)
    with pytest.raises(RuntimeError, match="a bug in the writer"):
        for _ in range(9):
            write(tmp_path / "features.h5", rows=range(3))
