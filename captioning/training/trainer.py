"""The training loop: epochs, updates, validation and checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import nn

from captioning.dataset.batches import Batch, CachedPhotos, LivePhotos, Update, epoch_order, plan_batches, plan_updates
from captioning.encoders.images import FailureLimit
from captioning.errors import UserError
from captioning.runtime.checkpoint import save_checkpoint
from captioning.runtime.device import autocast, pick_precision
from captioning.runtime.distributed import SINGLE, DistributedContext, data_parallel
from captioning.runtime.log import Log
from captioning.runtime.meter import Meter
from captioning.runtime.progress import tqdm
from captioning.runtime.signals import StopRequest
from captioning.search.graphs import DecodingGraphs
from captioning.training.cuda_graphs import StaticSize, plan_sampled_sizes, plan_static_sizes
from captioning.training.data import TrainingData, load_batches
from captioning.training.fast_path import FastPath, Trial, Way, common_obstacles, obstacles, possible_ways
from captioning.training.objectives import Cider, Loss, LossWeights, Objective
from captioning.training.optimizer import learning_rate_factor
from captioning.training.options import TrainingOptions
from captioning.training.run_state import build_run_state
from captioning.training.self_check import Gradients
from captioning.training.validation import Validation, validation_batch_size
from captioning.viewing.preview import Preview
from preprocess.vocabulary import Vocabulary

SYNC_INTERVAL = 20  # updates between reading losses from a GPU, which waits for it to finish
BEST_METRICS = {"cider": "CIDEr-D", "bleu4": "BLEU-4", "loss": "val_loss"}  # --best-metric -> key in the log


class PendingLoss(NamedTuple):
    """A loss that is still on the device, with what the log needs of its batch."""

    loss: Loss
    averaged: int  # words or captions that its value averages over
    captions: int
    photos: np.ndarray  # (B,) int64: indices in the train split
    update: int  # number in the epoch, from 1


class Trainer:
    """Trains, validates, saves and resumes one run, in one process or as one of several."""

    def __init__(
        self,
        options: TrainingOptions,
        vocabulary: Vocabulary,
        data: TrainingData,
        objective: Objective,
        device: torch.device,
        distributed: DistributedContext = SINGLE,
    ):
        self.options = options = options.for_device(device.type)
        self.device = device
        self.distributed = distributed
        self.train = data.train
        self.val = data.val
        self.precision = pick_precision(options.precision, device)
        self.state = build_run_state(options, vocabulary, data, objective, device, self.precision)
        self.loss_module = self.state.loss_module
        self.encoder = data.encoder
        self.decoder = self.loss_module.decoder
        self.objective = objective
        self.encoder_from_scratch = options.weights == "random"  # its BatchNorm statistics are trained
        of_processes = distributed.all_gather(obstacles(options, device, self.decoder, data))
        self.fast_path_obstacles = common_obstacles(of_processes)
        self.fast_path = self.make_fast_path()
        self.parallel_module = self.make_parallel()
        num_photos = len(self.train.split) + len(self.val.split)
        self.failures = FailureLimit(num_photos, options.allow_missing)
        preview = Preview(self.val.split, options.preview_photos, options.folder)
        decoding_graphs = self.make_decoding_graphs()
        self.validation = Validation(
            self.val.split, vocabulary, preview, self.failures, options.max_length, distributed, decoding_graphs
        )
        if isinstance(objective, Cider):
            objective.graphs = decoding_graphs

    def make_parallel(self) -> nn.Module:
        """Return the loss module, wrapped if there are several processes and no fast path, which adds up gradients."""
        if self.distributed.size == 1 or self.fast_path:
            return self.loss_module
        # BatchNorm statistics that are trained are rank 0's; other buffers need no synchronisation.
        return data_parallel(self.loss_module, sync_buffers=self.encoder_from_scratch)

    def make_fast_path(self) -> FastPath | None:
        """Return the fast path, or None if neither CUDA graphs nor fused kernels may be used."""
        ways = possible_ways(**{name: not obstacle for name, obstacle in self.fast_path_obstacles.items()})
        if not ways:
            return None
        sizes = []
        if any(way.cuda_graphs for way in ways):
            sizes = self.plan_sizes()
        trained = {id(parameter) for parameter in self.state.parameters}
        parameters = {name: value for name, value in self.loss_module.named_parameters() if id(value) in trained}
        return FastPath(
            self.backward,
            Gradients(parameters),
            [*self.loss_module.buffers()],
            ways,
            sizes,
            self.device,
            self.precision,
            self.distributed,
        )

    def plan_sizes(self) -> list[StaticSize]:
        """Return the sizes of the static batches of CUDA graphs."""
        options = self.options
        if self.objective.prepares:  # it samples captions of the photos
            return plan_sampled_sizes(
                self.train.split, options.batch_size, options.samples, options.seed, self.distributed
            )
        return plan_static_sizes(self.train.split, options.batch_size, options.seed, self.distributed)

    def make_decoding_graphs(self) -> DecodingGraphs | None:
        """Return what generates captions in CUDA graphs, which share their memory with those of training."""
        options = self.options
        if self.device.type != "cuda" or not (options.fast_path and options.cuda_graphs):
            return None
        return DecodingGraphs(self.fast_path.graphs.capture if self.fast_path else None)

    # ---- epochs

    def fit(self, log: Log, stop: StopRequest) -> None:
        """Train, validate, log and save epoch by epoch, until --epochs, or --patience epochs without a better score."""
        progress = self.state.progress
        options = self.options
        self.seed_rank()
        self.start_fast_path(log)
        while progress.epoch < options.epochs and progress.epochs_without_better < options.patience:
            cpu_seconds = time.process_time()
            metrics = {"epoch": progress.epoch + 1} | self.train_epoch(log, stop)
            metrics |= {group["rate"]: group["lr"] for group in self.state.optimizer.param_groups}
            self.save_last(stop)  # before validation: a resumed run repeats a validation that is stopped
            ema = self.state.ema
            with ema.average_parameters() if ema else contextlib.nullcontext():
                metrics |= self.validate(stop)
                better = self.update_best(metrics)
                progress.finish_epoch()
                if better and self.distributed.is_main:
                    save_checkpoint(options.folder / "best.pt", self.state.checkpoint(for_resume=False))
            metrics["cpu_seconds"] = time.process_time() - cpu_seconds  # of this process, with its validation
            log.epoch(metrics, better)
            self.explain_zeros(log, metrics)
            self.save_last(stop)
        log.end(progress.best, progress.best_loss, BEST_METRICS[options.best_metric])

    def update_best(self, metrics: dict) -> bool:
        """Return whether an epoch with these metrics is the best so far, by --best-metric, and record it."""
        metric = BEST_METRICS[self.options.best_metric]
        score, loss = metrics[metric], metrics["val_loss"]
        if metric == "val_loss":
            score = -loss
        return self.state.progress.update_best(score, loss, informative=metric not in metrics["uninformative"])

    def explain_zeros(self, log: Log, metrics: dict) -> None:
        """Say once why a score says nothing about the captions, or that no reward trained the decoder."""
        chosen_by = BEST_METRICS[self.options.best_metric]
        for metric, reason in metrics["uninformative"].items():
            note = f"{metric} of val says nothing about the captions: {reason}"
            if metric == chosen_by:
                note += "; best.pt is chosen by the val loss, and --patience does not count such epochs"
            log.note(note)
        if metrics.get("train_reward") == 0:
            log.note(
                "every reward of an epoch was 0, so it taught the decoder nothing: no sampled caption shares a telling "
                "n-gram with the references of its photo; give --start-from a run that captions better"
            )

    def seed_rank(self) -> None:
        """Give each process its own dropout masks. Rank 0 keeps the random numbers of a single process."""
        if not self.distributed.is_main:
            progress = self.state.progress
            entropy = [self.options.seed, self.distributed.rank, progress.epoch, progress.step]
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def start_fast_path(self, log: Log) -> None:
        """Continue with the way of the run that is resumed, if it ran on the same device. Log the proofs."""
        if not self.fast_path:
            return
        progress = self.state.progress

        def report(trials: list[Trial], way: Way) -> None:
            progress.way = {**way._asdict(), "device": self.device_name()}
            event = {"epoch": progress.epoch + 1, "step": progress.step, "way": str(way)}
            event["trials"] = [trial.to_dict() for trial in trials]
            log.self_check(event, [f"self-check: batches are computed with {way}", *map(str, trials)])

        self.fast_path.report = report
        if progress.way and progress.way["device"] == self.device_name():
            self.fast_path.resume(Way(progress.way["cuda_graphs"], progress.way["kernels"]))

    def train_epoch(self, log: Log, stop: StopRequest) -> dict:
        """Train the rest of the current epoch. Returns its metrics."""
        progress = self.state.progress
        plan = self.start_epoch()
        remaining = plan[progress.step :]
        batches = self.load_shard(remaining)
        meter = Meter(self.device)
        pending: list[PendingLoss] = []
        name = f"epoch {progress.epoch + 1}"
        with self.progress_bar(total=len(plan), initial=progress.step, desc=name, unit="update") as bar:
            for update in remaining:
                self.set_learning_rates(len(plan))
                pending += self.train_update(update, batches, meter)
                progress.step += 1
                bar.update()
                finished = progress.step == len(plan)
                if finished or progress.step % SYNC_INTERVAL == 0 or self.device.type == "cpu":
                    mean, save_due = self.reduce_losses(pending, meter, stop)
                    pending.clear()
                    bar.set_postfix_str(f"{self.objective.quantity} {mean:.3f}, {meter.rate():.0f} captions/s")
                    self.log_step(log, meter, len(plan), mean)
                    if save_due and not finished:
                        self.save_last(stop)
        metrics = {f"train_{self.objective.quantity}": progress.mean(), **meter.metrics()}
        if self.fast_path:
            metrics["batches_without_graph"] = self.fast_path.batches_without_graph
        return metrics

    def start_epoch(self) -> list[Update]:
        """Set the epoch and the modules' modes. Returns the epoch's updates, a function of seed and epoch."""
        epoch = self.state.progress.epoch
        self.objective.epoch = epoch
        self.train.start_epoch(epoch)
        if self.fast_path:
            self.fast_path.start_epoch()
        self.decoder.train()
        if self.encoder:
            self.encoder.train_mode(batch_norm=self.encoder_from_scratch)
        split = self.train.split
        order = epoch_order(len(split), self.options.seed, epoch)
        batches = plan_batches(split, self.options.batch_size, order, self.distributed.size)
        return plan_updates(split, batches, self.options.grad_accumulation)

    def load_shard(self, updates: list[Update]) -> Iterator[Batch]:
        """Load this process's shard of every batch of these updates."""
        plan = [self.distributed.shard(batch) for update in updates for batch in update.batches]
        return iter(self.load(self.train, plan))

    def load(self, photos: CachedPhotos | LivePhotos, plan: list[np.ndarray]) -> Iterable[Batch]:
        """Load the batches of a plan: see `load_batches`."""
        return load_batches(photos, plan, self.device, live=bool(self.encoder), workers=self.options.workers)

    def log_step(self, log: Log, meter: Meter, num_updates: int, mean: float) -> None:
        """Log the update that was just made, of num_updates in the epoch. mean: of its losses."""
        event = {
            "epoch": self.state.progress.epoch + 1,
            "step": self.state.progress.step,
            "of": num_updates,
            "captions_per_second": meter.rate(),
            "waiting": meter.waiting_fraction(),
        }
        log.step(event, self.objective.quantity, mean)

    def progress_bar(self, iterable: Iterable | None = None, **settings: Any) -> tqdm:
        """A progress bar that only rank 0 shows."""
        return tqdm(iterable, disable=not self.distributed.is_main, **settings)

    # ---- updates

    def set_learning_rates(self, num_updates: int) -> None:
        """Set the learning rates of the next update, of num_updates in the epoch."""
        progress = self.state.progress
        epoch_start = progress.epoch + progress.step / num_updates
        epoch_end = progress.epoch + (progress.step + 1) / num_updates
        factor = learning_rate_factor(self.options, epoch_start, epoch_end)
        for group in self.state.optimizer.param_groups:
            group["lr"] = factor * group.get("scale", 1.0) * getattr(self.options, group["rate"])

    def train_update(self, update: Update, batches: Iterator[Batch], meter: Meter) -> list[PendingLoss]:
        """Make one update of the weights from its batches."""
        pending = []
        for number in range(1, len(update.batches) + 1):
            with meter.waiting():
                batch = next(batches)
            loss = self.train_step(batch, update, last=number == len(update.batches))
            averaged = self.objective.count(batch)
            position = self.state.progress.step + 1
            pending.append(PendingLoss(loss, averaged, batch.num_captions, batch.indices, position))
        return pending

    def train_step(self, batch: Batch, update: Update, last: bool) -> Loss:
        """Accumulate the gradients of a batch. last: it is the last batch of the update, which is then made."""
        self.failures.add(batch.failures)
        weights = self.loss_weights(batch, update)
        if self.fast_path:
            loss = self.fast_path(self.prepare(batch), weights)
            if last:
                self.fast_path.sum_gradients()
        else:
            synchronises = last or self.distributed.size == 1
            with contextlib.nullcontext() if synchronises else self.parallel_module.no_sync():
                loss = self.backward(batch.to(self.device, self.precision), weights, self.precision)
        if last:
            self.optimizer_step()
        return loss

    def prepare(self, batch: Batch) -> Batch:
        """Do the objective's work on the CPU before the fast path runs, and proves itself on, the rest."""
        if not self.objective.prepares:
            return batch
        with autocast(self.device, self.precision):
            return self.loss_module.prepare(batch.to(self.device, self.precision))

    def loss_weights(self, batch: Batch, update: Update) -> LossWeights:
        """The batch's fractions of its update; times the processes where gradients are averaged, not added up."""
        size = 1 if self.fast_path else self.distributed.size
        return LossWeights(
            words=size * len(batch.targets) / update.words,
            captions=size * batch.num_captions / update.captions,
            photos=size * len(batch.indices) / update.photos,
        )

    def backward(self, batch: Batch, weights: LossWeights, precision: torch.dtype) -> Loss:
        """Add the gradients of a batch on the device to `grad`. Returns its detached loss."""
        with autocast(self.device, precision):
            loss = self.parallel_module(batch, weights)
        self.state.scaler.scale(loss.objective).backward()
        return loss._replace(objective=loss.objective.detach())

    def optimizer_step(self) -> None:
        """Update the weights, and their average, from the accumulated gradients."""
        state = self.state
        state.scaler.unscale_(state.optimizer)
        if self.options.grad_clip:
            nn.utils.clip_grad_value_(state.parameters, self.options.grad_clip)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=not self.fast_path)  # graphs need the same gradient tensors
        if state.ema:
            state.ema.update()

    def reduce_losses(self, pending: list[PendingLoss], meter: Meter, stop: StopRequest) -> tuple[float, bool]:
        """Add the pending losses of all processes to the epoch's sums.

        Returns their mean, and whether to save a checkpoint now. Raises UserError if a loss is not finite.
        """
        sums = np.zeros(4)  # loss, words or captions it averages, captions, photos
        losses = torch.stack([torch.stack(item.loss) for item in pending]).tolist()  # in one copy from a GPU
        for item, (objective, value) in zip(pending, losses, strict=True):
            self.check_finite(objective, item)
            sums += value * item.averaged, item.averaged, item.captions, len(item.photos)
        save_due = self.distributed.is_main and meter.seconds_since_save() > 60 * self.options.save_every
        loss_sum, count, captions, photos, num_stops, num_due = self.distributed.all_reduce(
            [*sums.tolist(), stop.requested, save_due]
        )
        if num_stops:
            stop.requested = True
        self.state.progress.total += loss_sum
        self.state.progress.count += int(count)
        saves = bool(num_stops or num_due)
        meter.add(captions, photos, saved=saves)
        return loss_sum / count, saves

    def check_finite(self, loss: float, pending: PendingLoss) -> None:
        """Raise UserError, naming the photos, if the loss is not finite."""
        if not np.isfinite(loss):
            ids = ", ".join(self.train.split.ids[index] for index in pending.photos[:8])
            self.abort(
                f"the loss became {loss} in epoch {self.state.progress.epoch + 1}, at update {pending.update}, "
                f"the photos {ids}"
            )

    def abort(self, what: str) -> NoReturn:
        """Raise UserError, so that the run ends without saving weights that are not finite. what: what happened."""
        raise UserError(
            f"{what}; no weights were saved since; --resume continues from the last checkpoint; if it happens again, "
            f"lower --learning-rate, now {self.options.learning_rate}"
        )

    # ---- validation and checkpoints

    def validate(self, stop: StopRequest) -> dict:
        """Return the metrics of the val split: see captioning/training/validation.py."""
        split = self.val.split
        batch_size = validation_batch_size(split, len(self.state.vocabulary), self.device, self.distributed.size)
        plan = self.distributed.shard(plan_batches(split, batch_size, range(len(split))))
        batches = self.load(self.val, plan)
        bar = self.progress_bar(batches, total=len(plan), desc="validate", unit="batch", leave=False)
        return self.validation.run(self.loss_module, self.precision, bar, self.state.progress.epoch + 1, stop)

    def save_last(self, stop: StopRequest) -> None:
        """Save last.pt. Raises KeyboardInterrupt if a stop is requested, UserError if a weight is not finite."""
        if self.distributed.is_main:
            if not all(bool(weight.isfinite().all()) for weight in self.state.parameters):
                self.abort(f"the weights are no longer finite in epoch {self.state.progress.epoch + 1}")
            save_checkpoint(self.options.folder / "last.pt", self.state.checkpoint())
        stop.check()

    def describe(self) -> dict:
        """Return the description of the run for the log's start event."""
        if self.encoder:
            encoder = self.encoder.recipe()
        else:
            encoder = {key: value for key, value in self.state.encoder_recipe.items() if key != "state"}
        return {
            "encoder": encoder,
            "device": self.device_name(),
            "processes": self.distributed.size,
            "precision": str(self.precision).removeprefix("torch."),
            "fast_path": {
                "CUDA graphs": self.fast_path_obstacles["cuda_graphs"],
                "fused kernels": self.fast_path_obstacles["kernels"],
            },
            "views": list(self.state.views),
            "train_photos": len(self.train.split),
            "val_photos": len(self.val.split),
            "vocabulary": len(self.state.vocabulary),
            "captions_cut": self.train.split.num_truncated,
            "decoder_parameters": sum(parameter.numel() for parameter in self.decoder.parameters()),
        }

    def device_name(self) -> str:
        """The model of the GPU, or the kind of another device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
