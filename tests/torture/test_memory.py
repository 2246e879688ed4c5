"""Memory grows with the words and names of the photos, and with nothing else: see bench/memory.py."""

from __future__ import annotations

import gc
import os
import subprocess
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import extract_features
import train
from config import ExtractFeatures, Train
from tests.small import TINY
from tests.test_bench import bench
from tests.torture.processes import has_exited, start

SLACK = 100e6  # bytes: prefetched batches, which few photos never fill, and up to 5,000 val photos that are scored
BYTES_PER_PHOTO = 500  # its features would be 8,448, its captions as Python objects 2,500


class ForkedCommand:
    """Stands in for the subprocess.Popen of bench/memory.py: a fork of this process, which has imported torch."""

    def __init__(self, command: list[str | Path], cwd: Path, **_: object):
        _python, script, *flags = map(str, command)
        self.returncode: int | None = None
        self.pid = start(" ".join([Path(script).name, *flags]), before=lambda: os.chdir(cwd))

    def poll(self) -> int | None:
        if self.returncode is None and has_exited(self.pid):
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def test_a_further_photo_takes_no_more_memory_than_its_words(tmp_path, monkeypatch, times, tally):
    """Under --torture with thousands of photos, in new processes."""
    monkeypatch.chdir(tmp_path)
    memory, photos = bench("memory"), times(40, 50_000)
    monkeypatch.setattr(memory, "subprocess", times(SimpleNamespace(Popen=ForkedCommand), subprocess))
    few = memory.measure(tmp_path, times(20, 2_000))
    many = memory.measure(tmp_path, photos)
    for command, taken in many.items():
        assert 0 < taken.own < few[command].own + SLACK + BYTES_PER_PHOTO * photos, command
    tally("photos whose features take no memory", photos)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "the data sets are removed"


def test_a_photo_takes_a_few_hundred_bytes_in_an_extraction_and_in_a_trainer(tmp_path, monkeypatch, times):
    """Memory allocated by Python and numpy. The lower of two measurements: some of Python's tables grow at times."""
    memory, extract, allocated = bench("memory"), extract_features.extract, []

    def stop_tracing() -> None:
        gc.collect()
        allocated.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()

    def measure(photos: int) -> np.ndarray:
        """Bytes allocated when an extraction starts, and when a trainer has been built."""
        folder = tmp_path / str(len(allocated))
        folder.mkdir()
        monkeypatch.chdir(folder)
        memory.make_data(folder, photos)
        tracemalloc.start()
        extract_features.main(
            ExtractFeatures(
                Path("."),
                workers=0,
                image_size=32,
                grid="native",
                device="cpu",
                encoder="resnet18.layer1",
                weights="random",
            )
        )
        tracemalloc.start()
        trainer = train.make_trainer(Train(Path("."), "none", **{**TINY, "device": "cpu"}))
        stop_tracing()
        assert len(trainer.train.split) + len(trainer.val.split) == photos
        return np.array(allocated[-2:])

    monkeypatch.setattr(extract_features, "extract", lambda *settings: (stop_tracing(), extract(*settings)))
    measure(10)  # to warm up
    few, many = times(200, 400), times(600, 1_200)
    least = [np.minimum(measure(photos), measure(photos)) for photos in (few, many)]
    extraction, training = (least[1] - least[0]) / (many - few)
    assert 0 < extraction < 200 and 0 < training < 300
