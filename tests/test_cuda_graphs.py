"""A batch laid into a mould, and replayed, against the batch itself."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import train
from captioning.dataset.batches import Batch
from captioning.decoders import DECODERS
from captioning.decoders.factory import build_decoder
from captioning.encoders.grid import Grid, grid_pooling
from captioning.errors import UserError
from captioning.training.cuda_graphs import CudaGraphRunner, GraphCapture
from captioning.training.objectives import CrossEntropy, LossWeights
from captioning.training.trainer import Trainer
from config import Train
from preprocess.vocabulary import PAD
from tests.small import TINY, log_of, weights
from tests.test_decoders import SIZES

CPU = torch.device("cpu")
REPLAYED = [name for name, decoder in DECODERS.items() if decoder.uses_attention]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def again(work):
    """In place of a CUDA graph: the work, done again on the same tensors."""
    return work


def made_up(lengths, photos, seed=0):
    random = np.random.default_rng(seed)
    lengths = torch.tensor(sorted(lengths, reverse=True))
    words = torch.from_numpy(random.integers(PAD + 1, SIZES["vocabulary_size"], (len(lengths), int(lengths[0]) + 1)))
    packed = pack_padded_sequence(words[:, :-1], lengths, batch_first=True)
    targets = pack_padded_sequence(words[:, 1:], lengths, batch_first=True).data
    cells = torch.from_numpy(random.standard_normal((photos, 64, SIZES["channels"])))
    photo = torch.from_numpy(random.permutation(np.arange(len(lengths)) % photos))
    return Batch(Grid(cells, grid_pooling(8, 8).double()), packed, targets, photo, np.arange(photos))


def plain_and_replayed(name, **settings):
    """A function of a batch that gives loss and gradients, and the same by replaying, which counts its captures."""
    torch.manual_seed(0)
    decoder = build_decoder(name, SIZES).double().train()
    parameters = list(decoder.parameters())
    objective = CrossEntropy(Train("data", "run", **settings)).double()

    def learn(batch):
        loss = objective(decoder, batch.photos, batch, LossWeights())
        loss.objective.backward()
        return loss

    def outcome(work, batch):
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        objective.reinforce.baseline.fill_(-2)
        loss = work(batch)
        baseline = objective.reinforce.baseline.clone()
        return [loss.objective.detach(), loss.value, baseline, *(p.grad.clone() for p in parameters)], loss.count

    captured = []
    replay = CudaGraphRunner(learn, parameters, CPU, torch.float64, lambda work: captured.append(work) or again(work))
    return lambda batch: outcome(learn, batch), lambda batch: outcome(replay, batch), captured


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1, "alpha_c": 0.5}])
@pytest.mark.parametrize("name", REPLAYED)
def test_a_padded_batch_has_the_loss_and_the_gradients_of_the_batch(name, settings, monkeypatch):
    hard = "captioning.decoders.hard_attention"
    monkeypatch.setattr(f"{hard}.HardAttentionDecoder.expectation_fraction", 0.0)  # a cell is always drawn, and ...
    monkeypatch.setattr(f"{hard}.sample_categorical", lambda shares: shares.argmax(-1))  # ... chance has no part in it
    plain, replayed, captured = plain_and_replayed(name, **settings)
    batches = [made_up([7, 5, 5, 3, 2, 1], 3, seed) for seed in range(3)] + [
        made_up([3], 1),
        made_up([6, 6, 4, 1, 1], 2),
        made_up([8] * 9, 9),
        made_up([5, 4], 2),
        made_up([7] + [1] * 23, 3),
        made_up([7] * 24, 3),
    ]
    for batch in batches + batches:
        (ours, count), (expected, words) = replayed(batch), plain(batch)
        assert count == words == len(batch.targets)
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert 0 < len(captured) < len(batches), "a mould is captured once, and serves many batches"


def test_a_mould_is_captured_when_it_is_used_again_and_grows_only_when_it_must():
    _, replayed, captured = plain_and_replayed("attention")
    counts = []
    for lengths in ([4] * 8, [4] * 8, [3] * 8, [4] * 20, [4] * 20, [4] * 20 + [3] * 4, [3] * 24, [4] * 24, [4] * 24):
        replayed(made_up(lengths, 4))
        counts.append(len(captured))
    assert counts == [0, 1, 1, 1, 2, 2, 2, 2, 2], "20 and 24 captions share a mould, as do 3 and 4 words"
    replayed(made_up([4] * 8 + [1] * 16, 4))
    assert len(captured) == 2, "fewer captions at a step fit into a mould of more"


def test_gradients_add_up_over_batches():
    plain, replayed, _ = plain_and_replayed("attention")
    batch = made_up([4, 3], 2)
    for _ in range(2):
        (_, _, _, *once), _ = replayed(batch)
    for one, other in zip(once, plain(batch)[0][3:], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "changes", [{"decoder": "lstm"}, {"grad_accumulation": 2}, {"scheduled_sampling": 0.1}, {"cuda_graphs": False}, {}]
)
def test_a_run_replays_where_each_batch_is_the_same_work(changes):
    config = Train("data", "run", **changes)
    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.encoder, trainer.device = config, None, torch.device("cuda")
    trainer.decoder, trainer.ranks = DECODERS[config.decoder], type("One", (), {"size": 1})
    assert trainer.replays() == (changes == {})
    trainer.device = CPU
    assert not trainer.replays()


def test_a_run_learns_the_same_by_replaying(here, monkeypatch):
    """On a CPU, where what is replayed is done again: the trainer's own use of it."""
    setting = {**TINY, "epochs": 2, "precision": "float32", "dropout": 0.0}
    train.main(Train(Path("data/small"), "as it comes", **setting))
    monkeypatch.setattr(Trainer, "replays", lambda self: True)
    monkeypatch.setattr("captioning.training.cuda_graphs.GraphCapture", lambda: again)
    train.main(Train(Path("data/small"), "replayed", **setting))
    for name, values in weights("as it comes").items():
        torch.testing.assert_close(values, weights("replayed")[name], rtol=1e-3, atol=1e-5, msg=name)
    assert log_of("replayed")[-1]["train_loss"] == pytest.approx(log_of("as it comes")[-1]["train_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "error, raised",
    [
        (RuntimeError("CUDA error: it depends on another stream\nSearch for it in"), UserError),
        (torch.OutOfMemoryError("of 80 GB"), torch.OutOfMemoryError),
    ],
)
def test_what_cannot_be_captured_is_said_in_one_line(error, raised, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(pool=lambda: 1))
    monkeypatch.setattr(torch.cuda, "graph", lambda *graph, **how: contextlib.nullcontext())

    def work():
        raise error

    with pytest.raises(raised) as caught:
        GraphCapture()(work)
    if raised is UserError:
        assert str(caught.value) == (
            "a batch cannot be captured as a CUDA graph (CUDA error: it depends on another stream); "
            "give --no-cuda-graphs"
        )


# ---- on a GPU


@needs_gpu
@pytest.mark.parametrize("average", [0.0, 0.9])
@pytest.mark.parametrize("decoder", REPLAYED)
def test_cuda_graphs_change_nothing_but_the_time(here, decoder, average):
    setting = {
        **TINY,
        "decoder": decoder,
        "epochs": 4,
        "precision": "float32",
        "dropout": 0.0,
        "device": "cuda",
        "average": average,
        "reinforce": 0.0,
    }
    for graphs in (True, False):
        run = f"{decoder} {average} {graphs}"
        train.main(Train(Path("data/small"), run, cuda_graphs=graphs, **setting))
    if decoder != "hard-attention":  # which draws other cells
        for name, values in weights(f"{decoder} {average} True").items():
            torch.testing.assert_close(values, weights(f"{decoder} {average} False")[name], rtol=1e-2, atol=1e-3)
    losses = [log_of(f"{decoder} {average} {graphs}")[-1]["train_loss"] for graphs in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=0.2 if decoder == "hard-attention" else 1e-3)


@needs_gpu
def test_a_resumed_run_goes_on_as_it_would_have(here):
    setting = {**TINY, "precision": "float32", "device": "cuda", "dropout": 0.5}
    train.main(Train(Path("data/small"), "whole on gpu", epochs=4, **setting))
    train.main(Train(Path("data/small"), "in parts on gpu", epochs=2, **setting))
    train.main(Train(Path("data/small"), "in parts on gpu", epochs=4, resume=True, **setting))
    for name, values in weights("whole on gpu").items():
        torch.testing.assert_close(values, weights("in parts on gpu")[name], rtol=1e-3, atol=1e-4, msg=name)
