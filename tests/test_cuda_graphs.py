"""A batch that is padded into a static batch and replayed, against the batch itself."""

from functools import partial
from pathlib import Path

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
from captioning.runtime.cuda_graphs import CaptureError, GraphCapture
from captioning.runtime.distributed import SINGLE
from captioning.training.cuda_graphs import CudaGraphRunner
from captioning.training.objectives import CrossEntropy, LossWeights
from captioning.training.trainer import Trainer
from config import Train
from preprocess.vocabulary import PAD
from tests.small import TINY, log_of, weights
from tests.test_decoders import SIZES

CPU = torch.device("cpu")
CAPTURABLE = [name for name, decoder in DECODERS.items() if decoder.uses_attention]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def repeat(work):
    """In place of a CUDA graph: repeat the work on the same tensors."""
    return work


def random_batch(lengths, photos, seed=0):
    rng = np.random.default_rng(seed)
    lengths = torch.tensor(sorted(lengths, reverse=True))
    words = torch.from_numpy(rng.integers(PAD + 1, SIZES["vocabulary_size"], (len(lengths), int(lengths[0]) + 1)))
    packed = pack_padded_sequence(words[:, :-1], lengths, batch_first=True)
    targets = pack_padded_sequence(words[:, 1:], lengths, batch_first=True).data
    cells = torch.from_numpy(rng.standard_normal((photos, 64, SIZES["channels"])))
    photo_index = torch.from_numpy(rng.permutation(np.arange(len(lengths)) % photos))
    return Batch(Grid(cells, grid_pooling(8, 8).double()), packed, targets, photo_index, np.arange(photos))


def eager_and_replayed(name, **settings):
    """Two functions of a batch that return its loss and gradients, eagerly and by replaying; the list of captures."""
    torch.manual_seed(0)
    decoder = build_decoder(name, SIZES).double().train()
    parameters = list(decoder.parameters())
    objective = CrossEntropy(Train("data", "run", **settings)).double()

    def backward(batch):
        loss = objective(decoder, batch.photos, batch, LossWeights())
        loss.objective.backward()
        return loss

    def results(work, batch):
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        objective.reinforce.baseline.fill_(-2)
        loss = work(batch)
        baseline = objective.reinforce.baseline.clone()
        return [loss.objective.detach(), loss.value, baseline, *(p.grad.clone() for p in parameters)], loss.count

    captures = []

    def capture(work):
        captures.append(work)
        return repeat(work)

    runner = CudaGraphRunner(backward, parameters, CPU, torch.float64, capture)
    return partial(results, backward), partial(results, runner), captures


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1, "alpha_c": 0.5}])
@pytest.mark.parametrize("name", CAPTURABLE)
def test_a_padded_batch_has_the_loss_and_the_gradients_of_the_batch(name, settings, monkeypatch):
    hard = "captioning.decoders.hard_attention"
    monkeypatch.setattr(f"{hard}.HardAttentionDecoder.expectation_fraction", 0.0)  # always hard, and ...
    monkeypatch.setattr(f"{hard}.sample_categorical", lambda attention: attention.argmax(-1))  # ... deterministic
    eager, replayed, captures = eager_and_replayed(name, **settings)
    batches = [random_batch([7, 5, 5, 3, 2, 1], 3, seed) for seed in range(3)] + [
        random_batch([3], 1),
        random_batch([6, 6, 4, 1, 1], 2),
        random_batch([8] * 9, 9),
        random_batch([5, 4], 2),
        random_batch([7] + [1] * 23, 3),
        random_batch([7] * 24, 3),
    ]
    for batch in batches + batches:
        results, count = replayed(batch)
        expected, expected_count = eager(batch)
        assert count == expected_count == len(batch.targets)
        for result, value in zip(results, expected, strict=True):
            torch.testing.assert_close(result, value, rtol=1e-10, atol=1e-12)
    assert 0 < len(captures) < len(batches), "a static batch is captured once and reused by many batches"


def test_a_static_batch_is_captured_on_its_second_use_and_grows_only_when_a_batch_does_not_fit():
    _, replayed, captures = eager_and_replayed("attention")
    counts = []
    for lengths in ([4] * 8, [4] * 8, [3] * 8, [4] * 20, [4] * 20, [4] * 20 + [3] * 4, [3] * 24, [4] * 24, [4] * 24):
        replayed(random_batch(lengths, 4))
        counts.append(len(captures))
    assert counts == [0, 1, 1, 1, 2, 2, 2, 2, 2], "20 and 24 captions share a static batch, as do 3 and 4 words"
    replayed(random_batch([4] * 8 + [1] * 16, 4))
    assert len(captures) == 2, "fewer captions at a step fit into a static batch of more"


def test_gradients_add_up_over_batches():
    eager, replayed, _ = eager_and_replayed("attention")
    batch = random_batch([4, 3], 2)
    for _ in range(2):
        (_, _, _, *gradients), _ = replayed(batch)
    for gradient, expected in zip(gradients, eager(batch)[0][3:], strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    "changes", [{"decoder": "lstm"}, {"grad_accumulation": 2}, {"scheduled_sampling": 0.1}, {"cuda_graphs": False}, {}]
)
def test_a_run_uses_cuda_graphs_only_if_every_batch_is_the_same_work(changes):
    trainer = Trainer.__new__(Trainer)
    trainer.options = Train("data", "run", **changes)
    trainer.encoder, trainer.decoder = None, DECODERS[trainer.options.decoder]
    trainer.device, trainer.distributed = torch.device("cuda"), SINGLE
    assert trainer.can_capture() == (changes == {})
    trainer.device = CPU
    assert not trainer.can_capture()


def test_a_run_with_cuda_graphs_trains_the_same_weights(here, monkeypatch):
    """On a CPU, where a replay repeats the work: how the trainer uses the runner."""
    setting = {**TINY, "epochs": 2, "precision": "float32", "dropout": 0.0}
    train.main(Train(Path("data/small"), "eager", **setting))
    monkeypatch.setattr(Trainer, "can_capture", lambda self: True)
    monkeypatch.setattr("captioning.training.cuda_graphs.GraphCapture", lambda: repeat)
    train.main(Train(Path("data/small"), "replayed", **setting))
    for name, values in weights("eager").items():
        torch.testing.assert_close(values, weights("replayed")[name], rtol=1e-3, atol=1e-5, msg=name)
    assert log_of("replayed")[-1]["train_loss"] == pytest.approx(log_of("eager")[-1]["train_loss"], rel=1e-4)


class FakeGraph:
    """In place of torch.cuda.CUDAGraph and of the context torch.cuda.graph; `ends`: the capture can be ended."""

    def __init__(self, ends):
        self.ends = ends

    def __call__(self, *arguments, **options):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if not self.ends:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def pool(self):
        return "pool"


@pytest.mark.parametrize(
    "error, ends, raised, message",
    [
        (ValueError("no compiler\nsecond line"), True, CaptureError, "no compiler"),
        (
            RuntimeError("CUDA error: operation not permitted when stream is capturing\nSearch for it in"),
            False,
            UserError,
            "work cannot be captured as a CUDA graph (CUDA error: operation not permitted when stream is capturing), "
            "and the GPU is left in an unknown state; run again with --no-cuda-graphs",
        ),
        (torch.OutOfMemoryError("of 80 GB"), True, torch.OutOfMemoryError, "of 80 GB"),
        (torch.OutOfMemoryError("of 80 GB"), False, torch.OutOfMemoryError, "of 80 GB"),
    ],
)
def test_a_failed_capture_reports_its_first_error(error, ends, raised, message, monkeypatch):
    graph = FakeGraph(ends)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)

    def work():
        raise error

    with pytest.raises(raised) as caught:
        GraphCapture()(work)
    assert str(caught.value) == message


def test_a_captured_graph_is_never_destroyed(monkeypatch):
    graph = FakeGraph(ends=True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    capture = GraphCapture()
    capture(lambda: 1)
    capture(lambda: 2)
    assert capture.graphs == [graph, graph]
    assert capture.pool == "pool"


# ---- on a GPU


@needs_gpu
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("decoder", CAPTURABLE)
def test_cuda_graphs_change_nothing_but_the_time(here, decoder, ema_decay):
    setting = {
        **TINY,
        "decoder": decoder,
        "epochs": 4,
        "precision": "float32",
        "dropout": 0.0,
        "device": "cuda",
        "ema_decay": ema_decay,
        "reinforce_weight": 0.0,
    }
    for graphs in (True, False):
        run = f"{decoder} {ema_decay} {graphs}"
        train.main(Train(Path("data/small"), run, cuda_graphs=graphs, **setting))
    if decoder != "hard-attention":  # which samples other cells
        for name, values in weights(f"{decoder} {ema_decay} True").items():
            torch.testing.assert_close(values, weights(f"{decoder} {ema_decay} False")[name], rtol=1e-2, atol=1e-3)
    losses = [log_of(f"{decoder} {ema_decay} {graphs}")[-1]["train_loss"] for graphs in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=0.2 if decoder == "hard-attention" else 1e-3)


@needs_gpu
def test_a_resumed_run_with_cuda_graphs_continues_as_if_uninterrupted(here):
    setting = {**TINY, "precision": "float32", "device": "cuda", "dropout": 0.5}
    train.main(Train(Path("data/small"), "uninterrupted on gpu", epochs=4, **setting))
    train.main(Train(Path("data/small"), "resumed on gpu", epochs=2, **setting))
    train.main(Train(Path("data/small"), "resumed on gpu", epochs=4, resume=True, **setting))
    for name, values in weights("uninterrupted on gpu").items():
        torch.testing.assert_close(values, weights("resumed on gpu")[name], rtol=1e-3, atol=1e-4, msg=name)
