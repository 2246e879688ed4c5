"""Several processes train like one: real processes, connected by gloo, on this machine's CPU."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

import extract_features
import train
from captioning.dataset.batches import plan_batches
from captioning.dataset.caption_dataset import CaptionDataset
from captioning.decoders import DECODERS
from captioning.decoders.hard_attention import HardAttentionDecoder
from captioning.errors import UserError
from captioning.runtime.checkpoint import load_checkpoint
from captioning.runtime.distributed import SINGLE, DistributedContext, SyncBatchNorm1d, lost_process_is_stop
from captioning.runtime.log import Log
from captioning.runtime.signals import STOPPED, StopRequest, claim_report
from config import ExtractFeatures, Train
from preprocess.captions import Photo
from preprocess.vocabulary import Vocabulary
from tests.small import SPECIAL
from tests.test_fast_path import use_graphs_on_cpu

REPOSITORY = Path(__file__).parents[1]
TINY = {"embedding_size": 16, "attention_size": 16, "hidden_size": 24, "dropout": 0.0, "precision": "float32"}
CACHED = {"batch_size": 8, **TINY}
ACCUMULATED = {**CACHED, "batch_size": 4, "grad_accumulation": 2}
FINE_TUNED = {
    **CACHED,
    "fine_tune": True,
    "weights": "start.pth",
    "encoder": "resnet18.layer2",
    "image_size": 64,
    "workers": 0,
}


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """A small data set with features, and weights for a live encoder; the current folder of the tests."""
    from torchvision import models

    from tests.small import make_small_data

    folder = tmp_path_factory.mktemp("distributed")
    make_small_data(folder)
    previous = os.getcwd()
    os.chdir(folder)
    torch.manual_seed(0)
    torch.save(models.resnet18().state_dict(), "start.pth")
    extract_features.main(ExtractFeatures(Path("data/small"), "resnet18.layer2", "start.pth", 64, workers=0))
    yield folder
    os.chdir(previous)


def run_ranks(work, *arguments, size=2):
    """Run work(ranks, *arguments) in `size` connected processes -> the results, in the order of the ranks."""
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        context.Process(target=_run_rank, args=(results, store.port, rank, size, work, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    for rank in range(size):
        assert not isinstance(found[rank], Exception), found[rank]
    return [found[rank] for rank in range(size)]


def _run_rank(results, port, rank, size, work, arguments):
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        results.put((rank, work(DistributedContext(rank, size), *arguments)))
    except Exception as error:
        results.put((rank, RuntimeError(repr(error))))


def train_and_validate(ranks, setting):
    """One epoch of plain gradient descent, whose weights show the gradients; Adam would rescale them.

    Returns the weights, the names of those that changed, and the metrics.
    """
    setting = {**setting, "learning_rate": 0.1, "grad_clip": 0.0}
    trainer = train.make_trainer(Train(Path("data/small"), "none", **setting), distributed=ranks)
    trainer.state.optimizer = torch.optim.SGD([{"params": trainer.state.parameters, "rate": "learning_rate"}], lr=0.0)
    before = {name: value.clone() for name, value in trainer.loss_module.state_dict().items()}
    with StopRequest() as stop:
        metrics = trainer.train_epoch(Log(trainer.options.folder, {}, None, is_main=False), stop)
        metrics |= trainer.validate(stop)
    after = {name: value.numpy() for name, value in trainer.loss_module.state_dict().items()}
    del after["objective.reinforce.baseline"]  # each rank has a moving average of its own
    changed = {name for name in after if not np.array_equal(before[name].numpy(), after[name])}
    keys = ("train_loss", "val_loss", "top5", "BLEU-4", "CIDEr-D", "preview", "scored")
    return after, changed, {key: metrics[key] for key in keys}


def assert_close(values, expected, tolerance=1e-5):
    for name in values:
        np.testing.assert_allclose(values[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    "setting",
    [
        *({**CACHED, "decoder": name, **SPECIAL.get(name, {})} for name in DECODERS),
        FINE_TUNED,
        ACCUMULATED,
    ],
    ids=[*DECODERS, "fine-tuning", "accumulated"],
)
def test_two_ranks_on_half_of_each_batch_train_like_one(data_folder, setting, monkeypatch):
    """The captions differ in length, so the mean of the two halves' means would be another loss."""
    monkeypatch.setattr(HardAttentionDecoder, "expectation_fraction", 1.0)  # each rank would sample other cells
    expected_weights, changed, expected = train_and_validate(SINGLE, setting)
    assert len(changed) > 8
    for weights, _, metrics in run_ranks(train_and_validate, setting):
        assert_close(weights, expected_weights)
        assert metrics.pop("preview") == expected["preview"] and metrics["scored"] == 4
        assert_close(metrics, expected)


@pytest.mark.parametrize("setting", [CACHED, ACCUMULATED], ids=["one batch", "accumulated"])
def test_two_ranks_with_cuda_graphs_train_like_one_without(data_folder, setting, monkeypatch):
    """On CPUs, where a replay repeats the work: the ranks add up what their graphs have computed."""
    expected_weights, _, expected = train_and_validate(SINGLE, setting)
    use_graphs_on_cpu(monkeypatch)
    for weights, _, metrics in run_ranks(train_and_validate, setting):
        assert_close(weights, expected_weights)
        metrics.pop("preview")
        assert_close(metrics, {key: value for key, value in expected.items() if key != "preview"})


def test_the_gradients_of_accumulated_batches_equal_those_of_one_large_batch(data_folder):
    expected, _, _ = train_and_validate(SINGLE, {**CACHED, "batch_size": 100})
    accumulated, _, _ = train_and_validate(SINGLE, {**CACHED, "batch_size": 6, "grad_accumulation": 100})
    assert_close(accumulated, expected)


def normalise(ranks, rows, upstream):
    norm = SyncBatchNorm1d(3, momentum=0.1)
    shard = ranks.shard(rows).clone().requires_grad_()
    norm(shard).backward(ranks.shard(upstream))
    gradients = ranks.all_reduce([*norm.weight.grad.tolist(), *norm.bias.grad.tolist()])
    return shard.grad.numpy(), gradients, norm.running_mean.numpy(), norm.running_var.numpy()


def test_batch_norm_over_ranks_equals_torchs_own_over_all_rows(data_folder):
    rows, upstream = torch.randn(5, 3) * 3 + 1, torch.randn(5, 3)
    norm = nn.BatchNorm1d(3, momentum=0.1)
    all_rows = rows.clone().requires_grad_()
    norm(all_rows).backward(upstream)
    gradients = [*norm.weight.grad.tolist(), *norm.bias.grad.tolist()]
    for rank, (gradient, affine, mean, variance) in enumerate(run_ranks(normalise, rows, upstream)):
        np.testing.assert_allclose(gradient, all_rows.grad[rank::2], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(affine, gradients, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mean, norm.running_mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance, norm.running_var, rtol=1e-5, atol=1e-6)


def test_shards_are_disjoint_and_complete():
    for size in (1, 2, 3, 5):
        for count in range(12):
            items = list(range(count))
            assert sorted(sum((DistributedContext(rank, size).shard(items) for rank in range(size)), [])) == items


@pytest.mark.parametrize("photos, ranks", [(7, 2), (9, 4), (12, 5)])
def test_every_rank_has_a_photo_of_every_batch(photos, ranks):
    vocabulary = Vocabulary.build([["a"]], language="en", tokenizer="whitespace", min_count=1, max_words=9)
    split = CaptionDataset([Photo(f"{i}.jpg", str(i), "train", (("a",),)) for i in range(photos)], vocabulary, 9)
    plan = plan_batches(split, 6, range(photos), ranks)
    assert np.concatenate(plan).tolist() == list(range(photos)) and min(map(len, plan)) >= ranks
    with pytest.raises(UserError, match="--batch-size 1:.*2 processes"):
        plan_batches(split, 1, range(photos), 2)


# ---- torchrun, as a user runs it; or its launcher and its ranks as forks of this process, which import nothing


def torchrun(*arguments, size=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [*launcher, *rendezvous, "--", *map(str, arguments)]


def environment(**variables):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **variables}


class ForkedTorchrun:
    """torchrun's launcher in a fork of this process, with two forks of its own that run a script; output: a folder.

    The folder receives stdout and stderr of all three, and the process id of each rank.
    """

    def __init__(self, output, script, *arguments):
        output.mkdir()
        self.output = output
        self.process = mp.get_context("fork").Process(target=self._launch, args=([script, *arguments],))
        self.process.start()

    def _launch(self, arguments):
        os.setpgid(0, 0)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(self.output / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
        sys.stdout, sys.stderr = (
            open(1, "w", encoding="utf-8", closefd=False),
            open(2, "w", encoding="utf-8", closefd=False),
        )
        tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared by all forks: a killed one never releases it
        socket.getfqdn = lambda name="": "localhost"  # tests must not look up names
        configuration = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=2,
            run_id="forked",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method="fork",
        )
        elastic_launch(configuration, self._run_rank)(list(map(str, arguments)))

    def _run_rank(self, arguments):
        torch.set_num_threads(1)
        (self.output / f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")

    def process_of_rank(self, rank):
        return int((self.output / f"rank-{rank}").read_text())

    def wait(self):
        """The exit status, stdout and stderr."""
        self.process.join(timeout=300)
        assert self.process.exitcode is not None, "still running"
        return self.process.exitcode, *((self.output / name).read_text() for name in ("stdout", "stderr"))

    def kill(self):
        """End whatever still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()


def epochs_of(name):
    lines = [json.loads(line) for line in (Path("checkpoints") / name / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "epoch"]


COMMUNICATE = """
from captioning.runtime.distributed import init_distributed
with init_distributed("") as ranks:
    ranks.all_gather("a value")
    ranks.broadcast("another")
"""


@pytest.mark.skipif(torch.__version__ >= "2.8", reason="torch ends a group without a deadlock from 2.8 on")
def test_ranks_that_leave_never_wait_for_one_another(tmp_path):
    (tmp_path / "communicate.py").write_text(COMMUNICATE)
    command = torchrun(tmp_path / "communicate.py")
    pairs = [subprocess.Popen(command, env=environment()) for _ in range(10)]  # at once, for load
    try:
        assert [pair.wait(timeout=300) for pair in pairs] == [0] * 10
    finally:
        for pair in pairs:
            pair.terminate()  # a deadlocked one would wait for ever


def test_two_ranks_extract_the_same_files_as_one(data_folder, tmp_path):
    flags = "--encoder resnet18.layer2 --weights random --image-size 64 --precision float32 --workers 0 --batch-size 1"
    command = [REPOSITORY / "extract_features.py", "data/small", *flags.split(), "--views", "2"]
    status, stdout, stderr = ForkedTorchrun(tmp_path / "output", *command, "--out", tmp_path / "two.h5").wait()
    assert status == 0, stderr
    assert stdout.count("done: 24 photos, 0 skipped") == 1
    setting = {"precision": "float32", "workers": 0, "batch_size": 1, "out": tmp_path / "one.h5", "views": 2}
    extract_features.main(ExtractFeatures(Path("data/small"), "resnet18.layer2", "random", 64, **setting))
    for view in ("", ".flip"):
        assert (tmp_path / f"two{view}.h5").read_bytes() == (tmp_path / f"one{view}.h5").read_bytes()


SIZES = "--embedding-size 16 --attention-size 16 --hidden-size 24 --dropout 0 --precision float32"
TRAIN = [REPOSITORY / "train.py", "data/small", "--device", "cpu", "--batch-size", "8", *SIZES.split()]


def run_with_torchrun(*arguments):
    """The exit status, stdout and stderr."""
    done = subprocess.run(torchrun(*arguments), capture_output=True, text=True, env=environment(), timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_a_run_of_two_ranks_is_logged_once_without_warnings_and_resumes_with_one(data_folder, tmp_path, times):
    arguments = [*TRAIN, "--run", "two", "--epochs", "1"]
    forked = times(True, False)  # three new processes would import torch for 8 s
    run = ForkedTorchrun(tmp_path / "output", *arguments).wait() if forked else run_with_torchrun(*arguments)
    status, stdout, stderr = run
    assert status == 0, stderr
    assert stdout.count("epoch  1:") == 1 and "2 processes" in stdout
    assert "warn" not in stderr.lower(), stderr
    train.main(Train(Path("data/small"), "two", epochs=2, resume=True, **CACHED))
    train.main(Train(Path("data/small"), "one", epochs=2, **CACHED))
    for two, one in zip(epochs_of("two"), epochs_of("one"), strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-3) and two["scored"] == one["scored"] == 4
    assert load_checkpoint(Path("checkpoints/two/last.pt"))["progress"]["epoch"] == 2


@contextlib.contextmanager
def endless_run(folder, name):
    """Two ranks that train without end, once they have written their first checkpoint."""
    run = ForkedTorchrun(folder / "output", *TRAIN, "--run", name, "--epochs", "100000", "--patience", "100000")
    deadline = time.monotonic() + 600
    try:
        while not (Path("checkpoints") / name / "last.pt").exists():
            assert run.process.is_alive() and time.monotonic() < deadline, "no checkpoint"
            time.sleep(0.02)
        yield run
    finally:
        run.kill()


def resume_lines(stderr):
    """The lines that tell the user to resume, without the progress bars before them."""
    return [line.rsplit("\r", 1)[-1] for line in stderr.split("\n") if "--resume" in line]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_all_with_one_line_that_says_resume(data_folder, tmp_path, killed):
    """The launcher may stop the other rank before that one notices the loss, so there are two such lines."""
    with endless_run(tmp_path, f"killed-{killed}") as run:
        os.kill(run.process_of_rank(killed), signal.SIGKILL)
        status, _, stderr = run.wait()
    assert status != 0
    (line,) = resume_lines(stderr)
    prefix = "error (process 1)" if killed == 0 else "error"
    assert line in (f"{prefix}: another of the 2 processes was lost; continue with --resume", STOPPED), stderr
    assert "KeyboardInterrupt" not in stderr


def test_ranks_that_are_stopped_print_one_line(data_folder, tmp_path):
    with endless_run(tmp_path, "stopped") as run:
        run.process.terminate()  # torchrun forwards it
        _, _, stderr = run.wait()
    assert resume_lines(stderr) == [STOPPED]


@pytest.mark.parametrize("requested, expected", [(False, RuntimeError), (True, KeyboardInterrupt)])
def test_a_peer_that_is_lost_after_a_stop_request_has_stopped(requested, expected):
    with StopRequest() as stop, pytest.raises(expected), lost_process_is_stop(stop):
        stop.requested = requested
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with StopRequest() as stop, pytest.raises(RuntimeError, match="a bug"), lost_process_is_stop(stop):
        stop.requested = requested
        raise RuntimeError("a bug")


BLOCKED = """
import ctypes, os, signal
from captioning.runtime import signals

signals.REPORT_SECONDS = 0.5
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with signals.StopRequest(), signals.report_stop_while_blocked():
    libc.pthread_mutex_lock(mutex)
    print("blocked", flush=True)
    libc.pthread_mutex_lock(mutex)  # for ever, like a collective whose peer is lost: no Python signal handler runs
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a zeroed pthread_mutex_t is unlocked on Linux")
@pytest.mark.parametrize("reported", [False, True])
def test_a_stopped_rank_that_is_blocked_reports_it_unless_another_has(tmp_path, reported):
    folder = tmp_path / "attempt_0" / "1"
    folder.mkdir(parents=True)
    if reported:
        (tmp_path / "attempt_0" / "kantu-stop-reported").touch()
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(RANK="1", LOCAL_RANK="1", TORCHELASTIC_ERROR_FILE=str(folder / "error.json")),
    )
    assert process.stdout.readline() == "blocked\n"
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):  # the thread only reports: torchrun ends the process
        process.wait(timeout=2.5)
    process.kill()
    assert process.stderr.read() == ("" if reported else f"\n{STOPPED}\n")


@pytest.mark.parametrize("error_file", ["", "/dev/null", "/tmp/error.json"])
def test_without_torchruns_folder_rank_0_alone_reports_a_stop(monkeypatch, error_file):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", error_file)
    assert claim_report(without_torchrun=True) and not claim_report(without_torchrun=False)


def test_only_the_first_process_of_a_machine_reports_a_stop(monkeypatch, tmp_path):
    (tmp_path / "attempt_0").mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "0" / "error.json"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert claim_report(without_torchrun=False)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert not claim_report(without_torchrun=True)
