"""The fast path proves itself, or is not used. On a CPU: a replay repeats the work, and a fault stands for a kernel."""

from pathlib import Path

import pytest
import torch

import train
from captioning.decoders import fused_ops
from captioning.decoders.factory import build_decoder
from captioning.errors import UserError
from captioning.runtime.cuda_graphs import CaptureError
from captioning.runtime.device import autocast
from captioning.runtime.distributed import SINGLE, DistributedContext
from captioning.training import fast_path, trainer
from captioning.training.cuda_graphs import StaticSize, plan_static_sizes
from captioning.training.fast_path import PLAIN, FastPath, Trial, Way, common_obstacles, obstacles, possible_ways
from captioning.training.objectives import CrossEntropy, Loss, LossWeights
from captioning.training.self_check import ALIGNMENT, Gradients, judge
from config import Train
from tests.small import TINY, log_of, weights
from tests.test_cuda_graphs import random_batch, repeat
from tests.test_decoders import SIZES

CPU = torch.device("cpu")
BOTH, GRAPHS, KERNELS = Way(True, True), Way(True, False), Way(False, True)
BATCH = [6, 5, 3, 3]


def float_batch(lengths, photos=2):
    batch = random_batch(lengths, photos)
    return batch.to(CPU, torch.float32)


class Setup:
    """A soft attention decoder with a fast path. `fault` changes the gradients where kernels are used."""

    def __init__(self, ways=(BOTH, GRAPHS, KERNELS), capture=repeat, precision=torch.float32, distributed=SINGLE):
        torch.manual_seed(0)
        self.decoder = build_decoder("attention", SIZES).train()
        self.objective = CrossEntropy(Train("data", "run"))
        self.gradients = Gradients(dict(self.decoder.named_parameters()))
        self.fault = lambda gradients: None
        self.computed = []  # with or without kernels, of each backward
        sizes = [StaticSize(2, torch.tensor([4, 4, 4, 2, 2, 1]).numpy())]
        state = [*self.objective.buffers()]
        self.path = FastPath(
            self.backward, self.gradients, state, ways, sizes, CPU, precision, distributed, capture=capture
        )
        self.reports = []
        self.path.report = lambda trials, way: self.reports.append((trials, way))

    def backward(self, batch, weights, precision):
        kernels = fused_ops._kernels_enabled.get()
        self.computed.append(kernels)
        before = self.gradients.flat.clone()
        with autocast(CPU, precision):
            loss = self.objective(self.decoder, batch.photos, batch, weights)
        loss.objective.backward()
        if kernels:
            added = self.gradients.flat - before
            parts = dict(zip(self.gradients.names, added.split(self.gradients.sizes), strict=True))
            self.fault(parts)
            self.gradients.flat.copy_(before + added)
        return Loss(loss.objective.detach(), loss.value)

    def step(self, lengths=BATCH):
        return self.path(float_batch(lengths), LossWeights())

    def problems(self):
        trials, _ = self.reports[-1]
        return {trial.way: trial.problem for trial in trials if trial.problem}


@pytest.fixture
def slow(monkeypatch):
    """The seconds that a batch seems to take in each way; plain PyTorch 8."""
    seconds = {PLAIN: 8.0, BOTH: 1.0, GRAPHS: 2.0, KERNELS: 4.0}

    def time(self, trial, batch, weights):
        return trial if trial.problem else trial._replace(seconds=seconds[trial.way])

    monkeypatch.setattr(FastPath, "_time", time)
    return seconds


# ---- what is right


@pytest.mark.parametrize(
    "error, plain_error, is_right",
    [
        (0.0, 0.0, True),
        (0.0009, 0.0, True),
        (0.0011, 0.0, False),
        (0.02, 0.01, True),
        (0.0205, 0.01, True),
        (0.022, 0.01, False),
        (float("nan"), 0.01, False),
        (float("inf"), 0.01, False),
        (0.5, float("inf"), True),
    ],
)
def test_a_way_may_err_twice_as_much_as_plain_pytorch_and_a_thousandth_more(error, plain_error, is_right):
    finding = judge(["a", "b"], torch.tensor([0.0, error]), torch.tensor([0.0, plain_error]))
    assert finding.is_right == is_right
    if not is_right:
        assert finding.parameter == "b"


def test_errors_are_relative_to_each_parameters_own_gradient():
    parameters = {name: torch.nn.Parameter(torch.zeros(2)) for name in "abcd"}
    gradients = Gradients(parameters)
    reference, found = torch.zeros(2, 4, ALIGNMENT)
    reference[:, :2] = torch.tensor([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0], [0.0, 0.0]])
    found[:, :2] = torch.tensor([[3.0, 4.5], [300.0, 405.0], [0.0, 0.0], [1.0, 0.0]])
    errors = gradients.errors(found.flatten(), reference.flatten())
    assert errors.tolist() == pytest.approx([0.1, 0.01, 0.0, float("inf")])


def test_the_gradients_of_the_parameters_are_parts_of_one_tensor():
    layer = torch.nn.Linear(2, 3)
    gradients = Gradients(dict(layer.named_parameters()))
    layer(torch.ones(1, 2)).sum().backward()
    assert gradients.flat.sum() == 9
    assert [parameter.grad.storage_offset() % ALIGNMENT for parameter in layer.parameters()] == [0, 0]
    torch.optim.SGD(layer.parameters()).zero_grad(set_to_none=False)
    assert not gradients.flat.any()


# ---- what is used


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_of_the_ways_that_are_right_the_fastest_is_used(slow, precision):
    for fastest in (BOTH, GRAPHS, KERNELS, PLAIN):
        slow[fastest] = 0.5
        setup = Setup(precision=precision)
        setup.step()
        assert setup.path.way == fastest
        assert setup.problems() == {}
        slow[fastest] = 9.0


def test_a_way_is_timed_as_it_trains():
    setup = Setup()
    setup.step()
    trials, way = setup.reports[0]
    assert {trial.way for trial in trials} == {BOTH, GRAPHS, KERNELS, PLAIN}
    assert all(trial.seconds > 0 for trial in trials)
    assert min(trials, key=lambda trial: trial.seconds).way == way == setup.path.way


def scaled(name, factor):
    def fault(gradients):
        gradients[name].mul_(factor)

    return fault


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["key.weight", "from_hidden.bias"])
def test_kernels_that_are_three_percent_wrong_are_not_used(slow, name, precision):
    setup = Setup(precision=precision)
    setup.fault = scaled(name, 1.03)
    setup.step()
    assert setup.path.way == GRAPHS, "the fastest of those that are right"
    assert set(setup.problems()) == {BOTH, KERNELS}
    assert all(f"in the gradient of {name}, plain PyTorch" in problem for problem in setup.problems().values())
    setup.computed.clear()
    setup.step()
    assert not any(setup.computed)


def test_kernels_that_give_nan_are_not_used(slow):
    setup = Setup(ways=[KERNELS])
    setup.fault = scaled("score.weight", float("nan"))
    setup.step()
    assert setup.path.way == PLAIN
    assert "nan% in the gradient of score.weight" in setup.problems()[KERNELS]
    assert setup.gradients.flat.isfinite().all()


def test_work_that_cannot_be_captured_runs_without_graphs(slow):
    def capture(work):
        raise CaptureError("no compiler")

    setup = Setup(capture=capture)
    setup.step()
    assert setup.path.way == KERNELS
    assert setup.problems() == {BOTH: "no compiler", GRAPHS: "no compiler"}


def test_kernels_that_do_not_compile_are_not_used(slow):
    setup = Setup()

    def fault(gradients):
        raise ValueError("out of resource: shared memory\nReducing block sizes may help.")

    setup.fault = fault
    setup.step()
    assert setup.path.way == GRAPHS
    assert setup.problems() == {way: "out of resource: shared memory" for way in (BOTH, KERNELS)}


def test_a_gpu_that_was_lost_is_one_line_that_names_the_flag(monkeypatch):
    setup = Setup(ways=[KERNELS])

    def illegal_access(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")

    setup.fault = illegal_access
    monkeypatch.setattr(fast_path, "synchronize", illegal_access)
    with pytest.raises(UserError) as caught:
        setup.step()
    assert str(caught.value) == (
        "fused kernels failed (CUDA error: an illegal memory access was encountered), and the GPU cannot be used any "
        "more in this process; run again with --no-fast-path"
    )


def test_without_memory_for_the_comparison_nothing_fast_is_used(slow):
    setup = Setup()
    backward = setup.path.backward

    def too_large(batch, weights, precision):
        if len(setup.computed) == 0:
            setup.computed.append(False)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(batch, weights, precision)

    setup.path.backward = too_large
    setup.step()
    assert setup.path.way == PLAIN
    assert set(setup.problems()) == {BOTH, GRAPHS, KERNELS}


def test_all_processes_use_the_same_way(slow):
    class OtherFails(DistributedContext):
        def all_gather(self, trials):
            others = [Trial(trial.way, problem="fails there") if trial.way.kernels else trial for trial in trials]
            return [trials, others]

    setup = Setup(distributed=OtherFails())
    setup.step()
    assert setup.path.way == GRAPHS
    assert set(setup.problems()) == {BOTH, KERNELS}


def test_too_little_memory_for_the_comparison_in_one_process_switches_off_the_fast_path_of_all(slow):
    class OtherHasMemory(DistributedContext):
        def all_gather(self, trials):
            return [trials, [*map(Trial, (BOTH, GRAPHS, KERNELS)), Trial(PLAIN, seconds=8.0)]]

    setup = Setup(distributed=OtherHasMemory())

    def compute(backward):
        raise torch.OutOfMemoryError("CUDA out of memory")

    setup.gradients.compute = compute
    setup.step()
    assert setup.path.way == PLAIN
    assert set(setup.problems()) == {BOTH, GRAPHS, KERNELS}


def test_a_later_batch_that_cannot_be_captured_ends_the_run_with_one_line(slow):
    setup = Setup(ways=[GRAPHS])
    setup.path.graphs.sizes = [StaticSize(2, torch.tensor([4, 2]).numpy()), *setup.path.graphs.sizes]
    setup.step()
    assert setup.path.way == GRAPHS

    def fail(work):
        raise CaptureError("no memory for it")

    setup.path.graphs.capture = fail
    with pytest.raises(UserError) as caught:
        setup.step([2, 2])
    assert str(caught.value) == (
        "a batch cannot be captured as a CUDA graph (no memory for it); continue with --resume and --no-cuda-graphs"
    )


# ---- without a trace


def test_a_proof_leaves_no_trace_in_the_training(slow):
    expected = Setup(ways=[])
    proved = Setup()
    for setup in (expected, proved):
        torch.manual_seed(1)
        for _ in range(2):  # accumulated
            setup.step()
    torch.testing.assert_close(proved.gradients.flat, expected.gradients.flat)
    assert torch.rand(1) == (torch.manual_seed(1), [expected.step() for _ in range(2)], torch.rand(1))[2]


def test_a_batch_that_no_static_batch_holds_is_computed_without_a_graph_and_proves_nothing(slow):
    setup = Setup()
    setup.step([9, 1])
    assert setup.reports == [] and setup.path.is_due
    setup.step()
    assert setup.path.way == BOTH
    captures = len(setup.path.graphs.replays)
    expected = Setup(ways=[])
    for current in (setup, expected):
        current.gradients.flat.zero_()
        torch.manual_seed(2)
        current.step([9, 1])
    torch.testing.assert_close(setup.gradients.flat, expected.gradients.flat)
    assert len(setup.path.graphs.replays) == captures


def test_gradients_that_overflow_in_plain_pytorch_too_prove_nothing(slow):
    setup = Setup()
    backward = setup.path.backward

    def overflows(batch, weights, precision):
        loss = backward(batch, weights, precision)
        setup.gradients.flat[0] = float("inf")
        return loss

    setup.path.backward = overflows
    setup.step()
    assert setup.reports == [] and setup.path.is_due and setup.path.way == PLAIN
    setup.path.backward = backward
    setup.step()
    assert setup.path.way == BOTH


# ---- again, and after --resume


def test_the_proof_is_repeated_each_epoch_while_it_costs_a_hundredth_of_the_time(slow, monkeypatch):
    setup = Setup()
    now = [0.0]
    monkeypatch.setattr(fast_path.time, "monotonic", lambda: now[0])
    setup.path.start_epoch()
    setup.step()
    setup.path.proof_seconds = 2.0
    for seconds, reports in ((100.0, 1), (199.0, 1), (200.0, 2)):
        now[0] = seconds
        setup.path.start_epoch()
        setup.step()
        assert len(setup.reports) == reports
    assert [trial.way for trial in setup.reports[1][0]] == [BOTH], "only the way that is used is proved again"


def test_a_way_that_goes_wrong_later_is_replaced_by_the_fastest_of_the_others(slow):
    setup = Setup()
    setup.step()
    assert setup.path.way == BOTH
    setup.fault = scaled("key.weight", 1.03)
    setup.path.graphs.replays.clear()
    setup.path.is_due = True
    setup.step()
    assert setup.path.way == PLAIN
    setup.step()
    assert setup.path.way == GRAPHS


@pytest.mark.parametrize("way", [PLAIN, GRAPHS, KERNELS])
def test_a_resumed_run_goes_on_in_its_own_way_although_another_is_faster(slow, way):
    setup = Setup()
    setup.path.resume(way)
    setup.step()
    setup.path.start_epoch()
    setup.step()
    assert setup.path.way == way


def test_a_resumed_run_does_not_use_a_way_that_is_switched_off_now(slow):
    setup = Setup(ways=[GRAPHS])
    setup.path.resume(BOTH)
    setup.step()
    assert setup.path.way == GRAPHS


# ---- which ways may be used


@pytest.mark.parametrize(
    "cuda_graphs, kernels, ways",
    [(True, True, [BOTH, GRAPHS, KERNELS]), (True, False, [GRAPHS]), (False, True, [KERNELS]), (False, False, [])],
)
def test_the_possible_ways_combine_what_may_be_used(cuda_graphs, kernels, ways):
    assert possible_ways(cuda_graphs, kernels) == ways


@pytest.mark.parametrize(
    "changes, live, device, graphs, kernels",
    [
        ({}, None, "cuda", None, None),
        ({"grad_accumulation": 2}, None, "cuda", None, None),
        ({"fast_path": False}, None, "cuda", "--no-fast-path", "--no-fast-path"),
        ({"cuda_graphs": False}, None, "cuda", "--no-cuda-graphs", None),
        ({"kernels": False}, None, "cuda", None, "--no-kernels"),
        ({"scheduled_sampling": 0.1}, None, "cuda", "--scheduled-sampling", "--scheduled-sampling"),
        ({"positions": "learnt"}, None, "cuda", None, "--positions learnt"),
        ({"positions": "sinusoidal"}, None, "cuda", None, None),
        ({"decoder": "adaptive"}, None, "cuda", None, "there are none for --decoder adaptive"),
        ({}, "encoder", "cuda", "--fine-tune", "--fine-tune"),
        ({}, None, "cpu", "the run is on cpu", "the run is on cpu"),
    ],
)
def test_each_obstacle_to_the_fast_path_has_a_reason(changes, live, device, graphs, kernels, monkeypatch):
    monkeypatch.setattr(fast_path, "kernels_unavailable", lambda device, native_cells: None)
    options = Train("data", "run", **changes)
    decoder = build_decoder(options.decoder, SIZES)
    data = trainer.TrainingData(None, None, 8, 64, live, None)
    expected = {"cuda_graphs": graphs, "kernels": kernels}
    assert obstacles(options, torch.device(device), decoder, data) == expected


def test_an_obstacle_of_one_process_is_one_of_all():
    of_processes = [{"cuda_graphs": None, "kernels": None}, {"cuda_graphs": None, "kernels": "Triton does not work"}]
    assert common_obstacles(of_processes) == {"cuda_graphs": None, "kernels": "Triton does not work"}


# ---- whole runs


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """Runs use CUDA graphs, whose replay repeats the work."""
    use_graphs_on_cpu(monkeypatch)


def use_graphs_on_cpu(monkeypatch):
    use_on_cpu(monkeypatch, GRAPHS)


def use_on_cpu(monkeypatch, way):
    """Let runs on a CPU use a way. A replay repeats the work, and there are no kernels."""
    found = {name: None if used else "no GPU" for name, used in way._asdict().items()}
    monkeypatch.setattr(trainer, "obstacles", lambda *arguments: found)
    monkeypatch.setattr("captioning.training.cuda_graphs.GraphCapture", lambda: repeat)
    monkeypatch.setattr(FastPath, "_time", lambda self, trial, *work: trial._replace(seconds=-float(trial.way == way)))


@pytest.mark.parametrize("changes", [{}, {"grad_accumulation": 3, "ema_decay": 0.9}])
def test_a_run_with_cuda_graphs_trains_the_same_weights(here, monkeypatch, changes):
    settings = {**TINY, "epochs": 2, "precision": "float32", "dropout": 0.0, **changes}
    runs = [f"{kind} {len(changes)}" for kind in ("eager", "replayed")]
    train.main(Train(Path("data/small"), runs[0], **settings))
    use_graphs_on_cpu(monkeypatch)
    train.main(Train(Path("data/small"), runs[1], **settings))
    assert log_of(runs[1], "self-check")
    for name, values in weights(runs[0]).items():
        torch.testing.assert_close(values, weights(runs[1])[name], rtol=1e-3, atol=1e-5, msg=name)
    eager, replayed = (log_of(run)[-1]["train_loss"] for run in runs)
    assert replayed == pytest.approx(eager, rel=1e-4)


@pytest.mark.parametrize("captions", [6, 5], ids=["all batches fit", "large batches do not fit"])
def test_a_resumed_run_with_cuda_graphs_has_the_same_weights_bit_by_bit(here, graphs_on_cpu, monkeypatch, captions):
    """The dropout masks depend on the padding, which must not depend on the batches that came before."""

    def plan(*arguments):
        sizes = plan_static_sizes(*arguments)
        return [StaticSize(size.photos, size.batch_sizes.clip(max=captions)) for size in sizes]

    monkeypatch.setattr(trainer, "plan_static_sizes", plan)
    settings = {**TINY, "precision": "float32", "dropout": 0.5}
    runs = f"uninterrupted {captions}", f"resumed {captions}"
    train.main(Train(Path("data/small"), runs[0], epochs=4, **settings))
    train.main(Train(Path("data/small"), runs[1], epochs=2, **settings))
    train.main(Train(Path("data/small"), runs[1], epochs=4, resume=True, **settings))
    for name, values in weights(runs[0]).items():
        assert torch.equal(values, weights(runs[1])[name]), name
    without_graph = [epoch["batches_without_graph"] for epoch in log_of(runs[0])]
    assert any(without_graph) == (captions < 6)


@pytest.mark.parametrize("first, then", [("float32", "float16"), ("float16", "float32")])
def test_a_run_can_be_resumed_with_or_without_the_loss_scale_of_float16(here, first, then):
    run = f"{first} then {then}"
    train.main(Train(Path("data/small"), run, **{**TINY, "epochs": 1, "precision": first}))
    train.main(Train(Path("data/small"), run, **{**TINY, "epochs": 2, "precision": then}, resume=True))
    assert len(log_of(run)) == 2


def test_the_log_says_how_batches_are_computed_and_why(here, graphs_on_cpu, capsys):
    train.main(Train(Path("data/small"), "logged", **{**TINY, "epochs": 1}))
    events = log_of("logged", "start", "self-check")
    assert events[0]["fast_path"] == {"CUDA graphs": None, "fused kernels": "no GPU"}
    assert events[1]["way"] == "CUDA graphs"
    assert [trial["way"] for trial in events[1]["trials"]] == ["CUDA graphs", "plain PyTorch"]
    assert "self-check: batches are computed with CUDA graphs\n  CUDA graphs: right (" in capsys.readouterr().out
