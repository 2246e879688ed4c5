"""Memory does not grow with the photos but for their words and names: see bench/memory.py."""

import gc
import tracemalloc
from pathlib import Path

import numpy as np

import extract_features
import train
from config import ExtractFeatures, Train
from tests.small import TINY
from tests.test_bench import bench

SLACK = 100e6  # bytes: batches under way, which few photos never fill, and up to 5,000 val photos that are scored
A_PHOTO = 500  # its features would be 8,448, its captions as Python's own objects 2,500


def test_a_photo_more_takes_the_room_of_its_words_at_most(tmp_path, times, tally):
    memory, photos = bench("memory"), times(40, 50_000)
    few, many = (memory.measure(tmp_path, size) for size in (times(20, 2_000), photos))
    for command, taken in many.items():
        assert 0 < taken.own < few[command].own + SLACK + A_PHOTO * photos, command
    tally("photos whose features take no memory", photos)
    assert list(tmp_path.iterdir()) == []


def test_a_photo_is_a_few_hundred_bytes_to_an_extraction_and_to_a_trainer(tmp_path, monkeypatch):
    """What Python and numpy hold, of two tries the less: a table that Python makes anew at times is no photo's."""
    memory, extract, held = bench("memory"), extract_features.extract, []

    def look() -> None:
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()

    def hold(photos: int) -> np.ndarray:
        folder = tmp_path / str(len(held))
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
        look()
        assert len(trainer.train.split) + len(trainer.val.split) == photos
        return np.array(held[-2:])

    monkeypatch.setattr(extract_features, "extract", lambda *everything: (look(), extract(*everything)))
    hold(10)  # to warm up
    few, many = (np.minimum(hold(photos), hold(photos)) for photos in (400, 1_200))
    extraction, training = (many - few) / (1_200 - 400)
    assert 0 < extraction < 200 and 0 < training < 300
