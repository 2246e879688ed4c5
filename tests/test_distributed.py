"""Several processes train as one: real processes, gloo, on this machine's CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import extract_features
import train
from captioning.dataset.batches import plan_batches
from captioning.dataset.caption_dataset import CaptionDataset
from captioning.decoders import DECODERS
from captioning.decoders.hard_attention import HardAttentionDecoder
from captioning.errors import UserError
from captioning.runtime.checkpoint import load_checkpoint
from captioning.runtime.distributed import SINGLE, DistributedContext, SyncBatchNorm1d
from captioning.runtime.log import Log
from captioning.runtime.signals import StopRequest
from config import ExtractFeatures, Train
from preprocess.captions import Photo
from preprocess.vocabulary import Vocabulary

HOUSE = Path(__file__).parents[1]
TINY = {"embedding_size": 16, "attention_size": 16, "hidden_size": 24, "dropout": 0.0, "precision": "float32"}
CACHED = {"batch_size": 8, **TINY}
SPLIT_UP = {**CACHED, "batch_size": 4, "grad_accumulation": 2}
LIVE = {
    **CACHED,
    "fine_tune": True,
    "weights": "start.pth",
    "encoder": "resnet18.layer2",
    "image_size": 64,
    "workers": 0,
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A small data set with features, and weights for a live encoder; the tests run in its folder."""
    from torchvision import models

    from tests.small import make_small_data

    folder = tmp_path_factory.mktemp("ranks")
    make_small_data(folder)
    before = os.getcwd()
    os.chdir(folder)
    torch.manual_seed(0)
    torch.save(models.resnet18().state_dict(), "start.pth")
    extract_features.main(ExtractFeatures(Path("data/small"), "resnet18.layer2", "start.pth", 64, workers=0))
    yield folder
    os.chdir(before)


def in_ranks(work, *arguments, size=2):
    """Run work(ranks, *arguments) in so many processes that can talk -> what each returned, rank 0's first."""
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    port = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        context.Process(target=_rank, args=(results, port.port, rank, size, work, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    for rank in range(size):
        assert not isinstance(found[rank], Exception), found[rank]
    return [found[rank] for rank in range(size)]


def _rank(results, port, rank, size, work, arguments):
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        results.put((rank, work(DistributedContext(rank, size), *arguments)))
    except Exception as error:
        results.put((rank, RuntimeError(repr(error))))


def weights_after_an_epoch(ranks, setting):
    """Plain steps of gradient descent: the weights tell the gradients, which Adam would rescale."""
    setting = {**setting, "learning_rate": 0.1, "grad_clip": 0.0}
    trainer = train.make_trainer(Train(Path("data/small"), "none", **setting), distributed=ranks)
    trainer.state.optimizer = torch.optim.SGD([{"params": trainer.state.parameters, "rate": "learning_rate"}], lr=0.0)
    before = {name: value.clone() for name, value in trainer.loss_module.state_dict().items()}
    with StopRequest() as stop:
        figures = trainer.train_epoch(Log(trainer.options.folder, {}, None, first=False), stop)
        figures |= trainer.validate(stop)
    after = {name: value.numpy() for name, value in trainer.loss_module.state_dict().items()}
    del after["objective.reinforce.baseline"]  # each rank has a moving average of its own
    moved = {name for name, value in before.items() if name in after and not np.array_equal(value.numpy(), after[name])}
    wanted = ("train_loss", "val_loss", "top5", "BLEU-4", "CIDEr-D", "panel", "scored")
    return after, moved, {name: figures[name] for name in wanted}


def close(one, other, tolerance=1e-5):
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    "setting",
    [
        *({**CACHED, "decoder": name} for name in DECODERS),
        LIVE,
        SPLIT_UP,
    ],
    ids=[*DECODERS, "fine-tuning", "accumulated"],
)
def test_two_ranks_on_half_of_each_batch_train_as_one(here, setting, monkeypatch):
    """The captions differ in length, so a mean of the two halves' means would be another loss."""
    monkeypatch.setattr(HardAttentionDecoder, "expectation_fraction", 1.0)  # what is drawn differs from rank to rank
    alone, moved, figures = weights_after_an_epoch(SINGLE, setting)
    assert len(moved) > 8
    for weights, _, together in in_ranks(weights_after_an_epoch, setting):
        close(weights, alone)
        close(
            {k: v for k, v in together.items() if k != "panel"},
            {k: v for k, v in figures.items() if k != "panel"},
        )
        assert together["panel"] == figures["panel"] and together["scored"] == 4


def test_the_gradients_of_accumulated_batches_are_those_of_the_batch_they_add_up_to(here):
    whole, _, _ = weights_after_an_epoch(SINGLE, {**CACHED, "batch_size": 100})
    parts, _, _ = weights_after_an_epoch(SINGLE, {**CACHED, "batch_size": 6, "grad_accumulation": 100})
    close(parts, whole)


def normalised(ranks, rows, upstream):
    norm = SyncBatchNorm1d(3, momentum=0.1)
    mine = ranks.shard(rows).clone().requires_grad_()
    norm(mine).backward(ranks.shard(upstream))
    gradients = ranks.all_reduce([*norm.weight.grad.tolist(), *norm.bias.grad.tolist()])
    return mine.grad.numpy(), gradients, norm.running_mean.numpy(), norm.running_var.numpy()


def test_batch_norm_over_ranks_is_torchs_own_over_all_rows(here):
    rows, upstream = torch.randn(5, 3) * 3 + 1, torch.randn(5, 3)
    norm, whole = nn.BatchNorm1d(3, momentum=0.1), rows.clone().requires_grad_()
    norm(whole).backward(upstream)
    for rank, (gradient, affine, mean, variance) in enumerate(in_ranks(normalised, rows, upstream)):
        np.testing.assert_allclose(gradient, whole.grad[rank::2], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(affine, [*norm.weight.grad.tolist(), *norm.bias.grad.tolist()], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mean, norm.running_mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance, norm.running_var, rtol=1e-5, atol=1e-6)


def test_shares_are_disjoint_and_leave_nothing_out():
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


# ---- torchrun, as a user runs it


def torchrun(*arguments, size=2):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(size),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        "--",
        *map(str, arguments),
    ]


def variables():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOUSE)}


def run(command, **settings):
    return subprocess.run(command, capture_output=True, text=True, env=variables(), timeout=300, **settings)


def log_of(name):
    lines = [json.loads(line) for line in (Path("checkpoints") / name / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "epoch"]


LEAVE = """
from captioning.runtime.distributed import joined_ranks
with joined_ranks("") as ranks:
    ranks.all_gather("all that one has to say")
    ranks.from_first("and the other")
"""


@pytest.mark.skipif(torch.__version__ >= "2.8", reason="torch ends a group by itself from 2.8 on")
def test_ranks_that_leave_never_wait_for_one_another(tmp_path):
    (tmp_path / "leave.py").write_text(LEAVE)
    pairs = [subprocess.Popen(torchrun(tmp_path / "leave.py"), env=variables()) for _ in range(10)]  # they crowd
    try:
        assert [pair.wait(timeout=300) for pair in pairs] == [0] * 10
    finally:
        for pair in pairs:
            pair.terminate()  # who waits, waits for ever


def test_two_ranks_extract_the_very_file_that_one_does(here, tmp_path):
    arguments = [
        "data/small",
        "--encoder",
        "resnet18.layer2",
        "--weights",
        "random",
        "--image-size",
        "64",
        "--precision",
        "float32",
        "--workers",
        "0",
        "--batch-size",
        "1",
        "--out",
    ]
    done = run(torchrun(HOUSE / "extract_features.py", *arguments, tmp_path / "two.h5"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: 24 photos, 0 skipped") == 1
    extract_features.main(
        ExtractFeatures(
            Path("data/small"),
            "resnet18.layer2",
            "random",
            64,
            precision="float32",
            workers=0,
            batch_size=1,
            out=tmp_path / "one.h5",
        )
    )
    assert (tmp_path / "two.h5").read_bytes() == (tmp_path / "one.h5").read_bytes()


def test_a_run_of_two_ranks_is_logged_once_and_goes_on_with_one(here):
    flags = [
        "data/small",
        "--run",
        "two",
        "--device",
        "cpu",
        "--batch-size",
        "8",
        "--embedding-size",
        "16",
        "--attention-size",
        "16",
        "--hidden-size",
        "24",
        "--dropout",
        "0",
        "--precision",
        "float32",
    ]
    done = run(torchrun(HOUSE / "train.py", *flags, "--epochs", "1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch  1:") == 1 and "2 processes" in done.stdout
    train.main(Train(Path("data/small"), "two", epochs=2, resume=True, **CACHED))
    train.main(Train(Path("data/small"), "one", epochs=2, **CACHED))
    for two, one in zip(log_of("two"), log_of("one"), strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-3) and two["scored"] == one["scored"] == 4
    assert load_checkpoint(Path("checkpoints/two/last.pt"))["progress"]["epoch"] == 2


def test_a_killed_rank_ends_all_with_a_message(here):
    flags = ["data/small", "--run", "killed", "--epochs", "100000", "--patience", "100000", "--device", "cpu"]
    process = subprocess.Popen(
        torchrun(HOUSE / "train.py", *flags, "--batch-size", "8", "--embedding-size", "16"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables(),
    )
    deadline = time.monotonic() + 240
    while not Path("checkpoints/killed/last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    second = next(pid for pid in ranks if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes() + b"\0")
    os.kill(second, signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: another of the 2 processes was lost; continue with --resume" in said
