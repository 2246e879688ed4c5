"""Memory grows with the words and names of the photos, and with nothing else: see bench/memory.py."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import extract_features
import train
from config import ExtractFeatures, Train
from tests.small import TINY
from tests.test_bench import bench

SLACK = 100e6  # bytes: prefetched batches, which few photos never fill, and up to 5,000 val photos that are scored
BYTES_PER_PHOTO = 500  # its features would be 8,448, its captions as Python objects 2,500


def test_a_further_photo_takes_no_more_memory_than_its_words(tmp_path, request, tally):
    """The peak memory of whole processes: their features would be larger than SLACK from 12,000 photos on."""
    if not request.config.getoption("--torture"):
        pytest.skip("needs tens of thousands of photos: make torture")
    memory, photos = bench("memory"), 50_000
    few, many = memory.measure(tmp_path, 2_000), memory.measure(tmp_path, photos)
    for command, taken in many.items():
        assert 0 < taken.own < few[command].own + SLACK + BYTES_PER_PHOTO * photos, command
    tally("photos whose features take no memory", photos)
    assert list(tmp_path.iterdir()) == [], "the data sets are removed"


def test_a_photo_takes_a_few_hundred_bytes_in_an_extraction_and_in_a_trainer(tmp_path, monkeypatch, times):
    """Memory allocated by Python and numpy. Some of Python's tables grow at times: then the lower of two attempts."""
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
                encoder="resnet18.maxpool",
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

    def bytes_per_photo(attempts: int) -> tuple[float, float]:
        lowest = [np.min([measure(photos) for _ in range(attempts)], axis=0) for photos in (few, many)]
        extraction, training = (lowest[1] - lowest[0]) / (many - few)
        return extraction, training

    extraction, training = bytes_per_photo(1)
    if not (0 < extraction < 200 and 0 < training < 300):
        extraction, training = bytes_per_photo(2)
    assert 0 < extraction < 200 and 0 < training < 300
