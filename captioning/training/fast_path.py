"""The fast path of training on a GPU, CUDA graphs and fused kernels, which proves itself on the user's own card.

The first batch of a run is computed in every way that may be used, and by plain PyTorch. Of the ways that are right
(see captioning/training/self_check.py), the fastest one is kept. The proof is repeated now and then. What cannot
compile or be captured, or is wrong, is not used, and one line says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from captioning.dataset.batches import Batch
from captioning.decoders.fused_ops import kernels_unavailable, use_kernels
from captioning.errors import UserError
from captioning.runtime.cuda_graphs import Capture, CaptureError
from captioning.runtime.device import restore_rng, restored, rng_state, synchronize
from captioning.runtime.distributed import SINGLE, DistributedContext
from captioning.runtime.library_errors import reason
from captioning.training.cuda_graphs import CudaGraphRunner, StaticSize
from captioning.training.data import TrainingData
from captioning.training.objectives import Loss, LossWeights
from captioning.training.options import TrainingOptions
from captioning.training.self_check import Finding, Gradients, judge

TIMED_RUNS = 3
PROOF_FRACTION = 0.01  # at most, of the training time, goes into proofs after the first one


class Backward(Protocol):
    """Adds the gradients of a batch on the device to the parameters' `grad`. Returns its detached Loss."""

    def __call__(self, batch: Batch, weights: LossWeights, precision: torch.dtype) -> Loss: ...


class Way(NamedTuple):
    """A way to compute a batch."""

    cuda_graphs: bool
    kernels: bool

    def __str__(self) -> str:
        names = ["CUDA graphs"] * self.cuda_graphs + ["fused kernels"] * self.kernels
        return " and ".join(names) or "plain PyTorch"


PLAIN = Way(cuda_graphs=False, kernels=False)


class Trial(NamedTuple):
    """What is known of a way after one batch."""

    way: Way
    finding: Finding | None = None  # None: it could not be run, or is plain PyTorch itself
    problem: str | None = None  # why it cannot be used
    seconds: float | None = None  # for one batch; None: not timed

    def to_dict(self) -> dict:
        """As plain data, for the log."""
        finding = self.finding._asdict() if self.finding else None
        return {**self._asdict(), "way": str(self.way), "finding": finding}

    def __str__(self) -> str:
        if self.problem:
            return f"{self.way}: not used ({self.problem})"
        timing = "" if self.seconds is None else f", {1000 * self.seconds:.1f} ms per batch"
        return f"{self.way}: {'right' if self.finding is None else f'right ({self.finding})'}{timing}"


def obstacles(
    options: TrainingOptions, device: torch.device, decoder: nn.Module, data: TrainingData
) -> dict[str, str | None]:
    """Why CUDA graphs and fused kernels are not used, each one phrase; None where they may be."""
    common = None
    if not options.fast_path:
        common = "--no-fast-path"
    elif device.type != "cuda":
        common = f"the run is on {device}"
    elif data.encoder:
        common = "--fine-tune"
    return {
        "cuda_graphs": common or _graph_obstacle(options, decoder),
        "kernels": common or _kernel_obstacle(options, decoder, device, data.native_cells),
    }


def common_obstacles(of_processes: Sequence[dict[str, str | None]]) -> dict[str, str | None]:
    """What is not used by one process is used by none: they compute each batch together."""
    return {name: next(filter(None, (found[name] for found in of_processes)), None) for name in of_processes[0]}


def _graph_obstacle(options: TrainingOptions, decoder: nn.Module) -> str | None:
    if not options.cuda_graphs:
        return "--no-cuda-graphs"
    if not decoder.uses_attention:
        return f"--decoder {options.decoder} needs few kernels"
    if options.scheduled_sampling:
        return "--scheduled-sampling"
    return None


def _kernel_obstacle(
    options: TrainingOptions, decoder: nn.Module, device: torch.device, native_cells: int
) -> str | None:
    if not options.kernels:
        return "--no-kernels"
    if not getattr(decoder, "supports_kernels", False):
        return f"there are none for --decoder {options.decoder}"
    if options.scheduled_sampling:
        return "--scheduled-sampling"
    if options.positions == "learnt":
        return "--positions learnt"  # makes the cells need a gradient, which the kernels do not compute
    return kernels_unavailable(device, native_cells)


def possible_ways(cuda_graphs: bool, kernels: bool) -> list[Way]:
    """All combinations of what may be used, except PLAIN."""
    ways = [Way(True, True), Way(True, False), Way(False, True)]
    return [way for way in ways if way.cuda_graphs <= cuda_graphs and way.kernels <= kernels]


class FastPath:
    """Batch -> Loss: forward and backward of a batch in the fastest way that has proved right."""

    def __init__(
        self,
        backward: Backward,
        gradients: Gradients,
        buffers: Sequence[Tensor],
        ways: Sequence[Way],
        sizes: Sequence[StaticSize],
        device: torch.device,
        precision: torch.dtype,
        distributed: DistributedContext = SINGLE,
        capture: Capture | None = None,
    ):
        """buffers: tensors that backward changes, apart from the gradients. ways: those that may be used besides PLAIN.

        sizes: of the static batches of CUDA graphs.
        """
        self.backward = backward
        self.gradients = gradients
        self.state = [gradients.flat, *buffers]
        self.ways = [*ways]
        self.device = device
        self.precision = precision
        self.distributed = distributed
        work = partial(backward, precision=precision)
        self.graphs = CudaGraphRunner(work, sizes, self.state, device, precision, capture)
        self.way = PLAIN
        self.is_chosen = False  # the way was chosen by a proof, or by the run that is resumed
        self.is_due = bool(ways)  # a proof is due with the next batch
        self.proof_seconds = 0.0
        self.proved_at = 0.0
        self.batches_without_graph = 0  # although CUDA graphs are used: no static batch holds them
        self.report: Callable[[list[Trial], Way], None] = lambda trials, way: None  # takes the result of a proof

    def __call__(self, batch: Batch, weights: LossWeights) -> Loss:
        """Add the gradients of a batch, on any device."""
        if self.is_due:
            self.prove(batch, weights)
        try:
            return self.compute(self.way, batch, weights)
        except CaptureError as error:  # of a size that no proof has used
            raise UserError(
                f"a batch cannot be captured as a CUDA graph ({error}); continue with --resume and --no-cuda-graphs"
            ) from None

    def compute(self, way: Way, batch: Batch, weights: LossWeights) -> Loss:
        """Add the gradients of a batch in this way. A batch that no static batch holds runs without a graph."""
        with use_kernels(way.kernels):
            static_batch = self.graphs.fill(batch, weights) if way.cuda_graphs else None
            if static_batch is not None:
                return self.graphs.run(static_batch, variant=way.kernels)
            self.batches_without_graph += way.cuda_graphs
            return self.backward(batch.to(self.device, self.precision), weights, self.precision)

    def resume(self, way: Way) -> None:
        """Start in the way of the run that is resumed: another one would draw other dropout masks."""
        if way in (PLAIN, *self.ways):
            self.way = way
            self.is_chosen = True
            self.is_due = way != PLAIN

    def start_epoch(self) -> None:
        """Repeat the proof with the next batch, unless proofs would then take more than their fraction of the time."""
        self.batches_without_graph = 0
        affordable = time.monotonic() - self.proved_at >= self.proof_seconds / PROOF_FRACTION
        due = self.is_due or (self.way != PLAIN and affordable)
        self.is_due = self.distributed.all_reduce([float(due)])[0] > 0  # processes prove together

    def sum_gradients(self) -> None:
        """Replace the gradients by their sums over all processes."""
        self.distributed.all_reduce_tensor(self.gradients.flat)

    # ---- proof

    def prove(self, batch: Batch, weights: LossWeights) -> None:
        """Try the ways on a batch, and keep the best one. Leaves no trace in weights, gradients and random numbers.

        The proof stays due if the batch proves nothing: no static batch holds it, or plain gradients are not finite,
        as in the first batches of float16, whose loss scale is still too large.
        """
        started_at = time.monotonic()
        with restored(self.state, self.device):
            trials = self._try_ways(batch, weights)
        of_ranks = self.distributed.all_gather(trials)
        if all(of_ranks):
            self._choose([_worst(trials) for trials in zip(*of_ranks, strict=True)])
        self.proved_at = time.monotonic()
        self.proof_seconds = self.proved_at - started_at

    def _try_ways(self, batch: Batch, weights: LossWeights) -> list[Trial]:
        """A Trial of each way in question and, unless one is chosen already, of PLAIN. Empty: nothing is proved."""
        work = self._padded_work(batch, weights)
        if work is None:
            return []
        ways = [self.way] if self.is_chosen else self.ways
        trials = self._compare(ways, work)
        if trials and not self.is_chosen:
            trials = [self._time(trial, batch, weights) for trial in [*trials, Trial(PLAIN)]]
        return trials

    def _compare(self, ways: Sequence[Way], work: Callable[[Way, torch.dtype], Loss]) -> list[Trial]:
        """A Trial of each way, not timed. Empty: plain gradients are not finite."""
        try:
            reference = self.gradients.compute(partial(work, PLAIN, torch.float32))
            plain = self.gradients.compute(partial(work, PLAIN, self.precision))
        except torch.OutOfMemoryError:
            problem = "plain PyTorch in float32, with which it is compared, needs more memory; lower --batch-size"
            return [Trial(way, problem=problem) for way in ways]
        if not (reference.isfinite().all() and plain.isfinite().all()):
            return []
        plain_errors = self.gradients.errors(plain, reference)
        return [self._try(way, work, reference, plain_errors) for way in ways]

    def _padded_work(self, batch: Batch, weights: LossWeights) -> Callable[[Way, torch.dtype], Loss] | None:
        """A function that computes the batch in a way and a precision, each time from the same random state.

        All ways compute the same shapes, on which dropout masks depend: those of the static batch if one of the ways
        uses CUDA graphs. None if no static batch holds this batch.
        """
        static_batch = None
        padded, padded_weights = batch, weights
        if any(way.cuda_graphs for way in self.ways):
            static_batch = self.graphs.fill(batch, weights)
            if static_batch is None:
                return None
            padded, padded_weights = static_batch.batch, static_batch.weights

        def work(way: Way, precision: torch.dtype) -> Loss:
            restore_rng(random_state, self.device)
            with use_kernels(way.kernels):
                if way.cuda_graphs and static_batch is not None:
                    return self.graphs.run(static_batch, variant=way.kernels)
                return self.backward(padded.to(self.device, precision), padded_weights, precision)

        random_state = rng_state(self.device)
        return work

    def _try(
        self, way: Way, work: Callable[[Way, torch.dtype], Loss], reference: Tensor, plain_errors: Tensor
    ) -> Trial:
        """Compare the gradients of a way with the reference, float32 like `Gradients.flat`."""
        try:
            gradients = self.gradients.compute(partial(work, way, self.precision))
        except UserError:  # the GPU cannot be used any more
            raise
        except Exception as error:  # no compiler, an old GPU, too little memory: each raises a different error
            self._check_gpu(way, error)
            return Trial(way, problem=reason(error))
        finding = judge(self.gradients.names, self.gradients.errors(gradients, reference), plain_errors)
        return Trial(way, finding, None if finding.is_right else f"it is wrong: {finding}")

    def _check_gpu(self, way: Way, error: Exception) -> None:
        """Raise UserError if the GPU does not work any more after this error of a way."""
        try:
            synchronize(self.device)
            torch.zeros(1, device=self.device).add_(1)
            synchronize(self.device)
        except RuntimeError:
            raise UserError(
                f"{way} failed ({reason(error)}), and the GPU cannot be used any more in this process; run again with "
                "--no-fast-path"
            ) from None

    def _time(self, trial: Trial, batch: Batch, weights: LossWeights) -> Trial:
        """Add the seconds of a batch, as it would be trained on, to the Trial of a way that is right."""
        if trial.problem:
            return trial
        try:
            self.compute(trial.way, batch, weights)
            synchronize(self.device)
            started_at = time.perf_counter()
            for _ in range(TIMED_RUNS):
                self.compute(trial.way, batch, weights)
            synchronize(self.device)
        except torch.OutOfMemoryError as error:
            return trial._replace(problem=reason(error))
        return trial._replace(seconds=(time.perf_counter() - started_at) / TIMED_RUNS)

    def _choose(self, trials: list[Trial]) -> None:
        """Keep the chosen way if it is right, else choose the fastest of those that are."""
        self.ways = [way for way in self.ways if not any(trial.problem and trial.way == way for trial in trials)]
        right = [trial for trial in trials if not trial.problem]
        if self.is_chosen and not right:  # find the fastest of the others with the next batch
            self.way = PLAIN
            self.is_chosen = False
            self.is_due = bool(self.ways)
        else:
            if not self.is_chosen and right:
                self.way = min(right, key=lambda trial: trial.seconds or 0.0).way
            self.is_chosen = True
            self.is_due = False
        self.report(trials, self.way)


def _worst(trials: Sequence[Trial]) -> Trial:
    """The Trials of one way by all processes, in one: a problem of any, the largest error and the longest time."""
    problem = next((trial for trial in trials if trial.problem), None)
    if problem:
        return problem
    worst = max(trials, key=lambda trial: trial.finding.error if trial.finding else 0.0)
    seconds = [trial.seconds for trial in trials if trial.seconds is not None]
    return worst._replace(seconds=max(seconds, default=None))
