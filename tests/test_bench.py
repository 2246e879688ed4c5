"""The benches run, and compare like with like before they time anything. What they find is not tested."""

import importlib.util
import re
import sys
from pathlib import Path


def bench(name):
    path = Path(__file__).parents[1] / "bench" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_bench_of_the_cider_reward_runs(small_data, capsys):
    cider = bench("cider")
    cider.main(cider.Bench(small_data, batch_size=6, steps=1, channels=8, device="cpu", threads=1))
    assert re.search(r"of it the reward +[\d.]+ ms, [\d.]+%", capsys.readouterr().out)


def test_the_bench_of_the_feature_cache_runs_and_leaves_nothing(tmp_path, capsys):
    cache = bench("cache")
    cache.main(cache.Bench(tmp_path, photos=5, channels=4, batch_size=2, rounds=1))
    said = capsys.readouterr().out
    assert said.count(" photos/s ") == 13 and "times as fast as the plain way" in said
    assert list(tmp_path.iterdir()) == []


def test_the_bench_of_the_extraction_runs(small_data, capsys):
    extraction = bench("extraction")
    settings = {"encoder": "resnet18.layer1", "image_size": 32, "precision": "float32", "device": "cpu"}
    folder = small_data / "photos"
    extraction.main(extraction.Bench(folder, photos=5, batch_size=2, workers=0, rounds=1, **settings))
    assert "the extraction reaches" in capsys.readouterr().out
