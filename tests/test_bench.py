"""The benchmarks run, and check that results are equal before they time anything. The times are not tested."""

import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from captioning.captioner import Captioner
from captioning.decoders import DECODERS
from captioning.errors import UserError
from captioning.evaluation.metrics import score
from captioning.features.feature_reader import FeatureReader
from captioning.search.options import SearchOptions
from captioning.training import trainer
from captioning.training.fast_path import FastPath
from captioning.training.self_check import Gradients
from preprocess.captions import read_captions
from preprocess.vocabulary import END

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))  # the benchmarks import one another, as Python lets scripts of one folder do


def bench(name):
    """The module bench/NAME.py."""
    path = BENCH / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_cider_benchmark_runs(small_data, capsys):
    cider = bench("cider")
    cider.main(cider.Bench(small_data, batch_size=6, steps=1, channels=8, device="cpu", threads=1))
    assert re.search(r"of which reward +[\d.]+ ms, [\d.]+%", capsys.readouterr().out)


def test_the_cache_benchmark_runs_and_removes_its_files(tmp_path, capsys):
    cache = bench("cache")
    cache.main(cache.Bench(tmp_path, photos=5, channels=4, batch_size=2, rounds=1, sizes=(), simulated_rows=500))
    output = capsys.readouterr().out
    assert "memory for 60% of the rows: fixed ones serve 60% of an epoch's reads, LRU 2" in output
    assert output.count(" photos/s ") == 16 and "times as fast as with plain h5py" in output
    cache.measure_size(cache.Bench(tmp_path, photos=5, channels=4, batch_size=2), 1000)
    assert re.search(r" 1,000 +0.0 GB .* MB\n$", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


def test_the_transformer_benchmark_runs_and_finds_equal_results(capsys):
    transformer = bench("transformer")
    sizes = {"photos": 2, "captions_per_photo": 2, "vocabulary": 30, "channels": 4, "size": 16, "grid_side": 3}
    transformer.main(transformer.Bench(**sizes, beam_size=2, max_length=4, rounds=1, threads=1))
    output = capsys.readouterr().out
    assert "the captions are the same\n" in output
    assert re.findall(r"^(.*): Kantu .* times as fast$", output, re.MULTILINE) == ["training step", "beam search"]


def test_the_quantisation_benchmark_runs(here, capsys):
    quantization = bench("quantization")
    quantization.main(quantization.Bench(Path("data/small"), photos=5))
    output = capsys.readouterr().out
    assert re.search(r"square root, 8 bits +0\.\d+% +0\.\d+% +0\.\d+%", output) and "float8 e4m3" in output


def test_the_waiting_benchmark_runs_and_removes_its_files(tmp_path, capsys, monkeypatch):
    waiting = bench("waiting")
    small = {"embedding_size": 16, "attention_size": 16, "hidden_size": 16}
    monkeypatch.setattr(waiting, "Train", functools.partial(waiting.Train, **small))
    waiting.main(waiting.Bench(tmp_path, photos=9, channels=4, epochs=1, features_on=("ram",), device="cpu"))
    output = capsys.readouterr().out
    assert re.search(r" attention +ram .* [\d.]+%\n +lstm +ram .* [\d.]+%\n9 photos", output)
    assert list(tmp_path.iterdir()) == []
    two = {"views": (1, 2), "decoders": ("lstm",), "features_on": ("disk",), "cold": True}
    waiting.main(waiting.Bench(tmp_path, photos=9, channels=4, epochs=1, device="cpu", **two))
    assert re.search(r" lstm +disk +1 .*\n +lstm +disk +2 ", capsys.readouterr().out)


def test_the_extraction_benchmark_runs(small_data, capsys):
    extraction = bench("extraction")
    settings = {"encoder": "resnet18.layer1", "image_size": 32, "precision": "float32", "device": "cpu"}
    folder = small_data / "photos"
    extraction.main(extraction.Bench(folder, photos=5, batch_size=2, workers=0, rounds=1, **settings))
    assert "the extraction reaches" in capsys.readouterr().out


@pytest.mark.parametrize("precisions", [("float32",), ("float32", "bfloat16")])
def test_the_decoder_benchmark_compares_the_results_before_it_times_them(capsys, monkeypatch, precisions):
    decoders = bench("decoders")
    monkeypatch.setattr(decoders, "pick_precision", lambda name, device: getattr(torch, precisions[-1]))
    small = {"photos": 2, "captions_per_photo": 2, "vocabulary": 30, "channels": 8, "size": 4, "rounds": 1}
    small |= {"heads": 1, "encoder_layers": 1}
    for name in ("attention", "lstm", "updown", "xlan", "aoa"):
        other = "tutorial" if name in ("attention", "lstm") else "toolkit"
        decoders.main(decoders.Bench(name, **small, threads=1))
        output = capsys.readouterr().out
        assert re.search(rf"float64: Kantu and the {other} differ by \S+ in the loss, (0|[1-9])e[-+]\d+", output)
        assert re.findall(r"(\w+)  .*times as fast", output) == [other, *precisions]


def test_the_decoder_benchmark_times_nothing_if_the_results_differ(capsys, monkeypatch):
    decoders = bench("decoders")
    original = decoders.TutorialLstm.loss
    monkeypatch.setattr(decoders.TutorialLstm, "loss", lambda *batch: 1.001 * original(*batch))
    with pytest.raises(SystemExit, match="not the same"):
        decoders.main(decoders.Bench("lstm", photos=2, vocabulary=30, channels=8, size=4, rounds=1, threads=1))
    assert "times as fast" not in capsys.readouterr().out


def test_the_beam_search_benchmark_finds_the_captions_of_the_tutorial(capsys):
    search = bench("beam_search")
    search.main(search.Bench(photos=6, batch_size=4, vocabulary=40, channels=8, size=6, max_length=5, threads=1))
    assert "6 of 6 captions equal the tutorial's with Kantu's rule" in capsys.readouterr().out


@pytest.mark.parametrize("decoder, words", [("updown", 3), ("xlan", None), ("aoa", 3)])
def test_the_beam_search_benchmark_finds_the_captions_of_the_toolkits(decoder, words, capsys):
    search = bench("beam_search")
    sizes = {"vocabulary": 40, "channels": 8, "size": 16, "max_length": 6, "rounds": 1, "threads": 1}
    search.main(search.Bench(decoder, photos=5, batch_size=3, words=words, **sizes))
    assert "all 5 captions are equal in float64" in capsys.readouterr().out


def test_the_epoch_and_scaling_benchmarks_run(capsys, monkeypatch):
    epoch, scaling = bench("epoch"), bench("scaling")
    monkeypatch.setattr(epoch, "peak_operations", lambda device, dtype, side: 1e12)  # measuring takes seconds
    monkeypatch.setattr(epoch, "peak_bandwidth", lambda device, length: 1e10)
    epoch.main(epoch.Bench(photos=4, captions=10, batch_size=5, vocabulary=30, channels=8, grid_side=2, device="cpu"))
    assert "10 captions of 4 photos" in capsys.readouterr().out
    base = scaling.Bench(photos=1, captions_per_photo=2, vocabulary=30, channels=4, size=4)
    scaling.main(scaling.Scaling(base, rounds=1, threads=1))
    assert capsys.readouterr().out.count("times as long") == 12


def test_the_scoring_benchmark_runs(small_data, capsys):
    scoring = bench("scoring")
    scoring.main(scoring.Bench((small_data,), photos=30))
    printed = capsys.readouterr().out
    assert re.search(r"30 photos, 45 references, +word: [\d.]+ s", printed)
    assert re.search(r"by word alone: [\d.]+ s; pycocoevalcap: [\d.]+ s", printed)


def test_complete_given_captions_score_like_references_and_without_given_words_decoding_is_greedy(here, capsys):
    beginnings = bench("beginnings")
    data, run = Path("data/small"), Path("checkpoints/attention")
    photos = [photo for photo in read_captions(data) if photo.split == "val"]
    first = {photo.id: photo.captions[0] for photo in photos}
    expected = score(first, {photo.id: photo.captions[1:] or photo.captions for photo in photos})["CIDEr-D"]
    beginnings.main(beginnings.Bench(data, (run,), words=20, captions=1))
    scores, losses = capsys.readouterr().out.splitlines()
    assert float(scores.rpartition(", ")[2]) == pytest.approx(expected, abs=0.05) and " loss of words 1 to " in losses

    captioner, reader = Captioner.load(run, "cpu", "float32"), FeatureReader(data / "features.h5")
    grid = reader.read(reader.rows_of(list(first))).to(captioner.device, torch.float32)
    with torch.no_grad():
        nothing = torch.empty(len(grid), 0, dtype=torch.long)
        written = beginnings.continue_greedily(captioner.decoder, grid, nothing).tolist()
    greedy = captioner.caption_grid(grid, SearchOptions(beam_size=1, max_length=beginnings.MAX_LENGTH))
    for row, caption in zip(written, greedy, strict=True):
        words = captioner.vocabulary.decode(row[: row.index(END)] if END in row else row)
        assert words[: len(caption.words)] == caption.words


# ---- bench/gpu.py

HIDDEN = (  # a GPU machine may lack them
    *("tyro", "pycocoevalcap", "jieba", "nltk", "visdom", "timm", "mplfonts", "fontTools"),
    *("hypothesis", "pytest", "selenium", "tornado", "onnx", "onnxruntime"),
)
HIDE = f"""
import os, sys
from importlib.machinery import PathFinder

class Filtered(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {HIDDEN} else super().find_spec(name, path, target)

sys.meta_path = [Filtered if finder is PathFinder else finder for finder in sys.meta_path]
import gpu
for step in sys.argv[1:]:
    os.makedirs(step)
    os.chdir(step)
    status = gpu.run_child(gpu.STEPS[step].function, f"../{{step}}.jsonl", "1")
    assert status == 0, step
    os.chdir("..")
"""


class FakeStep(NamedTuple):
    """A step of bench/gpu.py whose process runs a line of Python; `row(value)` writes a row."""

    code: str
    seconds: float = 20.0

    def command(self, rows, toy):
        row = "dict(what='a', value=value, unit='s', target='', met=met, note='')"
        define = f"import json\ndef row(value, met=None):\n print(json.dumps({row}), file=open({str(rows)!r}, 'a'))\n"
        return [sys.executable, "-c", define + self.code]


def test_the_gpu_benchmark_runs_at_toy_size_without_packages_that_a_gpu_machine_may_lack(tmp_path, times):
    gpu = bench("gpu")
    names = [name for name in gpu.STEPS if name != "tests" and name not in times(("library",), ())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH.parent), str(BENCH)])}
    command = [sys.executable, "-c", HIDE, *names]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    rows = {name: gpu.read_rows(tmp_path / f"{name}.jsonl") for name in names}
    for name, found in rows.items():
        assert found and all(row["met"] is not False for row in found), name
        missing = [row["note"] for row in found if row["value"] == "not available" and "package" in row["note"]]
        assert missing == ["needs the package tyro"] * (name == "extraction"), name
    assert len(rows["gradients"]) == 3 * len(DECODERS)
    assert [row["value"] for row in rows["resume"]] == ["bit-equal"] * len(DECODERS)


def test_a_step_of_the_gpu_benchmark_that_hangs_or_crashes_is_recorded_and_the_next_one_runs(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    gpu = bench("gpu")
    steps = {
        "fails": FakeStep("row(1); raise MemoryError('no memory')"),
        "hangs": FakeStep("row(2); import subprocess; subprocess.run(['sleep', '60'])", seconds=1.5),
        "crashes": FakeStep("import os; os.kill(os.getpid(), 9)"),
        "misses": FakeStep("row(3, met=False)"),
        "runs": FakeStep("row(0.000123456, met=True)"),
    }
    out = Path("h200") / "results.json"
    results = gpu.run_steps(steps, out, 60, toy=True)
    assert results == gpu.read_results(out)
    status = {name: step["status"] for name, step in results["steps"].items()}
    assert list(status.values()) == ["failed", "timed out", "failed", "missed", "ok"]
    assert [len(step["rows"]) for step in results["steps"].values()] == [1, 1, 0, 1, 1]
    assert results["steps"]["fails"]["reason"] == "MemoryError: no memory"
    assert "SIGKILL" in results["steps"]["crashes"]["reason"]
    table = gpu.to_table(results)
    assert re.search(r"hangs +timed out +killed after its 2 s", table) and "0.0001235 s" in table
    gpu.main(gpu.parse_arguments(["--out", str(out), "--markdown"]))
    assert "| misses | a | 3 s | MISSED |  |" in capsys.readouterr().out
    assert sorted(path.name for path in out.parent.iterdir()) == ["logs", "results.json", "results.md"]


def test_steps_of_the_gpu_benchmark_that_no_longer_fit_are_skipped_and_say_so(tmp_path):
    gpu = bench("gpu")
    steps = {"first": FakeStep("row(1); import time; time.sleep(60)"), "second": FakeStep("row(2)")}
    results = gpu.run_steps(steps, tmp_path / "results.json", gpu.MARGIN + gpu.MIN_SECONDS - 9, toy=True)
    assert [step["status"] for step in results["steps"].values()] == ["skipped", "skipped"]
    assert "minutes are over" in gpu.to_table(results)


def test_the_gpu_benchmark_needs_a_gpu_unless_toy_and_says_so(tmp_path):
    gpu = bench("gpu")
    steps = {"first": FakeStep(f"import sys; sys.exit({gpu.NO_GPU})"), "second": FakeStep("row(2)")}
    with pytest.raises(UserError, match="has no CUDA GPU; give --toy"):
        gpu.run_steps(steps, tmp_path / "results.json", 60, toy=False)
    with pytest.raises(UserError, match="no results there .* measure them with"):
        gpu.main(gpu.parse_arguments(["--out", str(tmp_path / "none.json"), "--markdown"]))


def test_the_gpu_benchmark_runs_gpu_tests_first_and_keeps_their_outcomes_when_time_runs_out(tmp_path, monkeypatch):
    gpu_tests = importlib.import_module("gpu_steps.gpu_tests")
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pytest\nran = []\n"
        "def test_comes_last(): assert ran == ['passes', 'fails']\n"
        "needs_gpu = pytest.mark.skipif(False, reason='needs a GPU')\n"
        "@needs_gpu\ndef test_passes(): ran.append('passes')\n"
        "@needs_gpu\ndef test_fails(): ran.append('fails'); assert 1 == 2\n"
        "@pytest.mark.skipif(True, reason='needs a GPU')\ndef test_skips(): pass\n"
    )
    run = subprocess.run

    def run_out_of_time(command, timeout, **settings):
        run(command, **settings)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run_out_of_time)
    rows = {row.what: row for row in gpu_tests.run_tests([tests], tmp_path, seconds=8)}
    assert [rows[name].value for name in ("passed", "skipped", "failed")] == [2, 1, 1]
    assert rows["failed"].met is False and rows["skipped"].note == "needs a GPU"
    assert "1 == 2" in rows["failed: test_fails"].value
    assert rows["passed"].note == "of 4 in test_some.py; pytest: stopped after 8 s"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=3))
    nothing = list(gpu_tests.run_tests([tests], tmp_path / "none"))
    assert [row.met for row in nothing] == [False], "what cannot run is no success"


@pytest.fixture
def simulated_graphs(monkeypatch):
    """Runs on a CPU take CUDA graphs for possible, whose replay repeats the work and then calls `fault`, a list of
    functions of the flat gradients."""
    flat = []
    fault = []

    class WatchedGradients(Gradients):
        def __init__(self, parameters):
            super().__init__(parameters)
            flat[:] = [self.flat]

    def capture(work):
        def replay():
            loss = work()
            for function in fault:
                function(flat[0])
            return loss

        return replay

    def obstacles(options, *_):
        return {"cuda_graphs": None if options.fast_path else "--no-fast-path", "kernels": "no GPU"}

    monkeypatch.setattr(trainer, "obstacles", obstacles)
    monkeypatch.setattr(trainer, "Gradients", WatchedGradients)
    monkeypatch.setattr("captioning.training.cuda_graphs.GraphCapture", lambda: capture)
    return fault


def test_the_gpu_benchmark_finds_a_fast_path_with_wrong_gradients(simulated_graphs, monkeypatch, tmp_path, times):
    correctness = importlib.import_module("gpu_steps.correctness")
    common = importlib.import_module("gpu_steps.common")
    monkeypatch.setattr(correctness, "DECODERS", {"attention": DECODERS["attention"]})
    proving = []
    prove = FastPath.prove

    def watched_prove(self, *arguments):
        proving.append(True)
        prove(self, *arguments)
        proving.clear()

    monkeypatch.setattr(FastPath, "prove", watched_prove)

    def fault(gradients):
        if kind == "always" or (kind != "none" and not proving):
            gradients *= float("nan") if "NaN" in kind else 2.0

    simulated_graphs.append(fault)
    few = ("none", "after the proof")
    for kind in times(few, (*few, "always", "after the proof, NaN")):
        rows = list(correctness.gradient_errors(common.make_setting(True, tmp_path)))
        assert [row.met for row in rows] == [kind == "none"] * 3, (kind, rows)
        way = "plain PyTorch" if kind == "always" else "CUDA graphs"  # the run's own check sees only its proofs
        assert {row.note.partition(";")[0] for row in rows} == {way}


def test_the_gpu_benchmark_records_the_memory_after_each_capture(monkeypatch):
    common = importlib.import_module("gpu_steps.common")
    ended = []
    segments = [{"total_size": 5, "segment_pool_id": (0, 0)}, {"total_size": 7, "segment_pool_id": (0, 1)}]
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", lambda self: ended.append(self))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 12)
    original = torch.cuda.CUDAGraph.capture_end
    with common.watch_captures() as captures:
        torch.cuda.CUDAGraph.capture_end("one")
        segments.append({"total_size": 2, "segment_pool_id": (0, 2)})
        torch.cuda.CUDAGraph.capture_end("two")
    assert captures == [(7, 12), (9, 12)] and ended == ["one", "two"]
    assert torch.cuda.CUDAGraph.capture_end is original


def test_the_gpu_benchmark_counts_overlapping_kernels_once():
    speed = importlib.import_module("gpu_steps.speed")
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    spans = [(10, 30, cuda), (0, 20, cuda), (12, 14, cuda), (50, 60, cuda), (0, 1000, cpu)]
    events = [
        SimpleNamespace(device_type=device, time_range=SimpleNamespace(start=start, end=end))
        for start, end, device in spans
    ]
    assert speed.busy_seconds(SimpleNamespace(events=lambda: events)) == pytest.approx(40e-6)
