"""A batch that is padded into a static batch and replayed, against the batch itself."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import train
from captioning.dataset.batches import Batch, epoch_order, plan_batches
from captioning.dataset.caption_dataset import CaptionDataset
from captioning.decoders import DECODERS
from captioning.decoders.factory import build_decoder
from captioning.encoders.grid import Grid, grid_pooling
from captioning.errors import UserError
from captioning.runtime.cuda_graphs import CaptureError, GraphCapture
from captioning.runtime.distributed import DistributedContext
from captioning.training import cuda_graphs
from captioning.training.cuda_graphs import CudaGraphRunner, StaticSize, plan_sampled_sizes, plan_static_sizes
from captioning.training.objectives import CrossEntropy, Loss, LossWeights
from config import Train
from preprocess.captions import Photo
from preprocess.vocabulary import PAD, SPECIAL, Vocabulary
from tests.small import TINY, log_of, weights
from tests.test_decoders import OWN_SIZES, SIZES

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


def eager_and_replayed(name, batches, **settings):
    """Two functions of a batch that return its loss and gradients, eagerly and by replaying; the runner.

    The static batches have the sizes of these batches.
    """
    torch.manual_seed(0)
    decoder = build_decoder(name, {**SIZES, **OWN_SIZES.get(name, {})}).double().train()
    parameters = list(decoder.parameters())
    objective = CrossEntropy(Train("data", "run", **settings)).double()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def backward(batch, weights):
        loss = objective(decoder, batch.photos, batch, weights)
        loss.objective.backward()
        return Loss(loss.objective.detach(), loss.value)

    def results(work, batch):
        for parameter in parameters:
            parameter.grad.zero_()
        objective.reinforce.baseline.fill_(-2)
        loss = work(batch, LossWeights(0.5, 0.25, 0.125))
        baseline = objective.reinforce.baseline.clone()
        return [loss.objective, loss.value, baseline, *(parameter.grad.clone() for parameter in parameters)]

    def replay(batch, weights):
        return runner.run(runner.fill(batch, weights))

    state = [*(parameter.grad for parameter in parameters), objective.reinforce.baseline]
    sizes = [StaticSize(len(batch.photos), batch.words.batch_sizes.numpy()) for batch in batches]
    runner = CudaGraphRunner(backward, sizes, state, CPU, torch.float64, repeat)
    return partial(results, backward), partial(results, replay), runner


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1, "alpha_c": 0.5}])
@pytest.mark.parametrize("name", CAPTURABLE)
def test_a_padded_batch_has_the_loss_and_the_gradients_of_the_batch(name, settings, monkeypatch):
    hard = "captioning.decoders.hard_attention"
    monkeypatch.setattr(f"{hard}.HardAttentionDecoder.expectation_fraction", 0.0)  # always hard, and ...
    monkeypatch.setattr(f"{hard}.sample_categorical", lambda attention: attention.argmax(-1))  # ... deterministic
    held = [random_batch([5, 5, 4, 1, 1], 2), random_batch([8] * 24, 9)]
    eager, replayed, runner = eager_and_replayed(name, held, **settings)
    batches = [random_batch([7, 5, 5, 3, 2, 1], 3, seed) for seed in range(3)] + [
        *held,
        random_batch([3], 1),
        random_batch([5, 4], 2),
        random_batch([7] + [1] * 23, 3),
    ]
    for batch in batches + batches:
        for result, value in zip(replayed(batch), eager(batch), strict=True):
            torch.testing.assert_close(result, value, rtol=1e-10, atol=1e-12)
    assert sorted(runner.replays) == [(0, None), (1, None)], "each static batch is captured once"


def test_the_largest_static_batch_is_captured_first_and_each_only_once():
    held = [random_batch([3, 3], 1), random_batch([6] * 4, 2), random_batch([9] * 8, 4)]
    _, replayed, runner = eager_and_replayed("attention", held)
    captured = []
    runner.capture = lambda work: captured.append(work) or work
    for batch in [held[1], held[0], held[1], random_batch([7, 2], 1), held[0], held[2]]:
        replayed(batch)
    assert [number for number, _ in runner.replays] == [2, 1, 0]
    assert len(captured) == 3


def test_what_is_captured_of_batches_with_rewards_has_rewards_too():
    """Without rewards, the objective would sample captions inside the capture, which waits for the GPU."""
    held = [random_batch([3, 3], 1), random_batch([6] * 4, 2)]
    _, _, runner = eager_and_replayed("attention", held)
    rewarded = []

    def backward(batch, weights):
        rewarded.append(batch.rewards is not None and batch.advantages is not None)
        return Loss(torch.zeros(()), torch.zeros(()))

    runner.backward = backward
    batch = replace(held[0], rewards=torch.ones(2), advantages=torch.ones(2))
    static_batch = runner.fill(batch, LossWeights())
    runner.run(static_batch)
    assert len(runner.replays) == 2 and all(rewarded)
    assert static_batch.batch.rewards.tolist() == [1, 1]


def test_a_batch_that_no_static_batch_holds_is_not_filled_in():
    _, _, runner = eager_and_replayed("attention", [random_batch([3, 3], 2)])
    for lengths, photos in (([4, 1], 2), ([3, 3, 1], 2), ([3, 3], 3)):
        assert runner.fill(random_batch(lengths, photos), LossWeights()) is None
    assert runner.fill(random_batch([3, 1], 1), LossWeights()) is not None


def test_a_capture_changes_neither_gradients_nor_state_nor_random_numbers():
    batch = random_batch([4, 3], 2)
    eager, replayed, runner = eager_and_replayed("hard-attention", [batch])
    torch.manual_seed(1)
    expected = eager(batch)
    torch.manual_seed(1)
    for value, expected_value in zip(replayed(batch), expected, strict=True):  # the first use captures
        torch.testing.assert_close(value, expected_value, rtol=1e-10, atol=1e-12)


def test_gradients_add_up_over_batches():
    batch = random_batch([4, 3], 2)
    eager, _, runner = eager_and_replayed("attention", [batch])
    _, _, _, *expected = eager(batch)
    for gradient in runner.state:
        gradient.zero_()
    for _ in range(2):
        runner.run(runner.fill(batch, LossWeights(0.5, 0.25, 0.125)))
    for gradient, value in zip(runner.state[:-1], expected, strict=True):
        torch.testing.assert_close(gradient, 2 * value)


# ---- the sizes of the static batches


def coco_lengths(num_photos):
    """Lengths of five captions per photo, distributed like those of COCO: most short, a few very long."""
    rng = np.random.default_rng(0)
    return np.minimum(8 + rng.geometric(0.35, (num_photos, 5)) + 20 * (rng.random((num_photos, 5)) < 0.003), 50)


def dataset_of(lengths):
    vocabulary = Vocabulary("en", "whitespace", 1, (*SPECIAL, "a"))
    photos = [Photo("", str(i), "train", tuple(("a",) * n for n in of_photo)) for i, of_photo in enumerate(lengths)]
    return CaptionDataset(photos, vocabulary, 52)


def as_batch(split, photos):
    words, targets, photo_index = split.pack(photos)
    return Batch(Grid(torch.zeros(len(photos), 1, 1), grid_pooling(1, 1)), words, targets, photo_index, photos)


def test_the_planned_sizes_hold_every_batch_of_the_planned_epochs():
    split = dataset_of(coco_lengths(200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graphs, "PLANNED_BATCHES", 50)
        sizes = plan_static_sizes(split, 100, seed=3)
    assert 1 < len(sizes) <= len(cuda_graphs.STEP_QUANTILES)
    for smaller, larger in zip(sizes, sizes[1:], strict=False):
        assert smaller.photos <= larger.photos
        assert (smaller.batch_sizes <= larger.batch_sizes[: len(smaller.batch_sizes)]).all()
    padded, words = 0, 0
    for epoch in range(5):  # 10 batches each
        for photos in plan_batches(split, 100, epoch_order(200, 3, epoch)):
            batch = as_batch(split, photos)
            size = next(size for size in sizes if size.fits(batch))
            padded += size.batch_sizes.sum()
            words += len(batch.targets)
    assert words <= padded < 1.35 * words


def test_batches_of_later_epochs_hardly_ever_outgrow_the_planned_sizes():
    """With sizes that grow as batches come, a tenth of the runs outgrew one, which ended in an error on a GPU."""
    split = dataset_of(coco_lengths(1000))
    sizes = plan_static_sizes(split, 100, seed=0)
    planned_epochs = cuda_graphs.PLANNED_BATCHES // 50
    later = [
        as_batch(split, photos)
        for epoch in (planned_epochs + 1, planned_epochs + 2)
        for photos in plan_batches(split, 100, epoch_order(1000, 0, epoch))
    ]
    assert sum(any(size.fits(batch) for size in sizes) for batch in later) >= 0.98 * len(later)


def test_the_planned_sizes_depend_on_the_data_and_the_seed_alone():
    split = dataset_of(coco_lengths(100))
    first, again = (plan_static_sizes(split, 50, seed=1) for _ in range(2))
    assert all(map(np.array_equal, [size.batch_sizes for size in first], [size.batch_sizes for size in again]))


def test_the_sizes_for_samples_hold_captions_that_are_a_quarter_longer():
    split = dataset_of(coco_lengths(200))
    longer = dataset_of([[round(1.2 * n) for n in of_photo[:3]] for of_photo in coco_lengths(200)])
    sizes = plan_sampled_sizes(split, 100, samples=3, seed=0)
    plan = plan_batches(split, 100, epoch_order(200, 0, 0))
    held = [any(size.fits(as_batch(longer, photos)) for size in sizes) for photos in plan]
    assert sum(held) >= 0.9 * len(plan)
    for size in sizes:
        assert size.batch_sizes[0] <= size.photos * 3
        assert len(size.batch_sizes) <= split.max_length + 1
        assert (np.diff(size.batch_sizes) <= 0).all()


def test_each_process_plans_for_its_shard_of_every_batch():
    split = dataset_of([[n + 1] * 5 for n in range(8)])
    shards = [plan_static_sizes(split, 20, 0, DistributedContext(rank, 2))[-1] for rank in range(2)]
    for rank, size in enumerate(shards):
        for photos in plan_batches(split, 20, epoch_order(8, 0, 0), 2):
            assert size.fits(as_batch(split, photos[rank::2]))
        assert size.batch_sizes[0] <= 16


# ---- capturing


class FakeGraph:
    """In place of torch.cuda.CUDAGraph and of the context torch.cuda.graph; `ends`: the capture can be ended."""

    def __init__(self, ends):
        self.ends = ends
        self.calls = []

    def __call__(self, *arguments, **options):
        self.calls.append(arguments)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if not self.ends:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def pool(self):
        return "pool"


def use_fake_graphs(monkeypatch, ends=True):
    graph = FakeGraph(ends)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    return graph


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
        (
            torch.OutOfMemoryError("of 80 GB"),
            False,
            UserError,
            "out of memory on the GPU while a CUDA graph was captured: lower --batch-size, give --features-on ram or "
            "disk, or --no-cuda-graphs",
        ),
    ],
)
def test_a_failed_capture_reports_its_first_error(error, ends, raised, message, monkeypatch):
    use_fake_graphs(monkeypatch, ends)

    def work():
        raise error

    with pytest.raises(raised) as caught:
        GraphCapture()(work)
    assert str(caught.value) == message


def test_no_graph_is_ever_destroyed_not_even_one_whose_work_failed(monkeypatch):
    """With a graph, torch frees the cuBLAS workspaces of its stream, which other graphs still use."""

    def fail():
        raise ValueError

    use_fake_graphs(monkeypatch)
    capture = GraphCapture()
    capture(lambda: 1)
    with pytest.raises(CaptureError):
        capture(fail)
    capture(lambda: 2)
    assert len(capture.graphs) == 3
    assert capture.pool == "pool"


def test_each_capture_has_its_own_stream(monkeypatch):
    """Its graphs may then be destroyed without those of another one, which live on."""
    graph = use_fake_graphs(monkeypatch)
    first, second = GraphCapture(), GraphCapture()
    for capture in (first, first, second):
        capture(lambda: 1)
    streams = [arguments[2] for arguments in graph.calls if arguments]
    assert streams[0] is streams[1] and streams[0] is not streams[2]


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
