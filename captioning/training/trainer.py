"""A decoder (and, fine-tuning, its live encoder) on the way from its first batch to its best checkpoint."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm import tqdm

from captioning.dataset.batches import Batch, Update, epoch_order, plan_batches, plan_updates
from captioning.dataset.prefetch import Prefetch
from captioning.decoders.factory import build_decoder, decoder_arguments, load_decoder
from captioning.encoders.encoder import Encoder
from captioning.encoders.images import FailureLimit, SignalSafeLoader
from captioning.errors import UserError
from captioning.runtime.checkpoint import checkpoint_errors, save_checkpoint
from captioning.runtime.device import autocast, pick_precision, restore_rng, rng_state
from captioning.runtime.distributed import DistributedContext
from captioning.runtime.log import Log
from captioning.runtime.meter import Meter
from captioning.runtime.settings import as_plain_data
from captioning.runtime.signals import StopRequest
from captioning.training.cuda_graphs import CudaGraphRunner
from captioning.training.ema import EMA
from captioning.training.loss_module import LossModule
from captioning.training.objectives import Loss, LossWeights, Objective
from captioning.training.optimizer import learning_rate_factor, make_optimizer, parameter_groups
from captioning.training.options import TrainingOptions
from captioning.training.validation import Validation
from captioning.viewing.preview import Preview
from preprocess.vocabulary import Vocabulary

VALIDATION_CAPTIONS = 160  # a batch: validation keeps no gradients, so it may be larger
LOOK_EVERY = 20  # updates: each look at a GPU's loss waits for the GPU
WHOLE = LossWeights()
BEST = {"cider": "CIDEr-D", "bleu4": "BLEU-4", "loss": "val_loss"}


@dataclass
class Progress:
    """Where a run is, as plain data: what --resume needs beside the weights."""

    epoch: int = 0  # epochs finished, validation and all
    step: int = 0  # updates of the weights in the current epoch
    count: int = 0  # of what the loss is a mean of, such as words, in the current epoch so far, of all ranks
    total: float = 0.0  # of the loss over them
    best: float | None = None  # the score of best.pt; of the loss, its negative
    epochs_without_better: int = 0


class PendingLoss(NamedTuple):
    """What is still to be said of a batch that was learnt from; the batch itself may go."""

    loss: Loss
    captions: int
    photos: np.ndarray  # of the split
    update: int  # of the epoch, from 1


class Trainer:
    """Trains, validates, saves and resumes one run, alone or with other ranks."""

    def __init__(
        self,
        config: TrainingOptions,
        vocabulary: Vocabulary,
        train: Dataset,
        val: Dataset,
        objective: Objective,
        encoder: Encoder | None,
        described: dict | None,
        channels: int,
        device: torch.device,
        ranks: DistributedContext,
    ):
        """train and val: CachedPhotos or LivePhotos; described: the cache's encoder."""
        torch.manual_seed(config.seed)
        self.config, self.vocabulary, self.device, self.ranks = config, vocabulary, device, ranks
        self.train, self.val = train, val
        self.precision = pick_precision(config.precision, device)
        settings = {"vocabulary_size": len(vocabulary), "channels": channels, **as_plain_data(config)}
        self.sizes = decoder_arguments(config.decoder, settings)
        self.encoder, self.described = encoder, described
        self.from_scratch = config.weights == "random"  # such an encoder has its BatchNorm still to learn
        self.decoder = build_decoder(config.decoder, self.sizes)
        if config.tie_embeddings:
            self.decoder.output_layer.weight = self.decoder.embedding.weight
        self.decoder.embedding.weight.requires_grad_(not config.freeze_embeddings)
        self.objective = objective
        self.whole = LossModule(encoder, self.decoder, objective, config.feature_dropout).to(device)
        trained = {"learning_rate": self.decoder.parameters()}
        if encoder:
            trained["encoder_learning_rate"] = encoder.unfreeze(
                config.unfreeze_from or ("all" if self.from_scratch else None)
            )
            if config.checkpoint_activations:
                encoder.checkpoint_activations()
        groups = parameter_groups(trained, config.weight_decay)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.average = EMA(self.parameters, config.ema_decay) if config.ema_decay else None
        self.optimizer = make_optimizer(groups)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.learner: nn.Module = self.whole
        if ranks.size > 1:  # statistics that a new encoder learns are rank 0's; all others are the same anyway
            self.learner = DistributedDataParallel(
                self.whole, broadcast_buffers=self.from_scratch, gradient_as_bucket_view=True
            )
        self.replay = (
            CudaGraphRunner(self.gradients, self.parameters, device, self.precision) if self.replays() else None
        )
        self.progress = Progress()
        self.unreadable = FailureLimit(len(train.split) + len(val.split), config.allow_missing)
        panel = Preview(val.split, config.preview_photos, config.folder)
        self.validation = Validation(val.split, vocabulary, panel, self.unreadable, ranks)

    def fit(self, log: Log, stop: StopRequest) -> None:
        """Epoch by epoch: train, validate, log, save; until --epochs, or --patience without a better score."""
        progress, config = self.progress, self.config
        self.part_random_numbers()
        while progress.epoch < config.epochs and progress.epochs_without_better < config.patience:
            figures = {"epoch": progress.epoch + 1} | self.train_epoch(log, stop)
            figures |= {group["rate"]: group["lr"] for group in self.optimizer.param_groups}
            self.save_last(stop)  # a validation that is stopped is done again
            with self.average.in_place() if self.average else contextlib.nullcontext():
                figures |= self.validate(stop)
                better = self.judge(figures[BEST[config.best_metric]])
                progress.epoch, progress.step, progress.count, progress.total = progress.epoch + 1, 0, 0, 0.0
                if better and self.ranks.is_main:
                    save_checkpoint(config.folder / "best.pt", self.checkpoint(for_resume=False))
            log.epoch(figures, better)
            self.save_last(stop)
        log.end(progress.best, BEST[config.best_metric])

    def part_random_numbers(self) -> None:
        """Each rank drops other units. Rank 0 keeps the numbers that a single process has."""
        if not self.ranks.is_main:
            where = [self.config.seed, self.ranks.rank, self.progress.epoch, self.progress.step]
            torch.manual_seed(int(np.random.SeedSequence(where).generate_state(1)[0]))

    def train_epoch(self, log: Log, stop: StopRequest) -> dict:
        """One epoch from where it stands -> its figures."""
        split, progress, config = self.train.split, self.progress, self.config
        order = epoch_order(len(split), config.seed, progress.epoch)
        plan = plan_updates(
            split, plan_batches(split, config.batch_size, order, self.ranks.size), config.grad_accumulation
        )
        self.train.epoch = self.objective.epoch = progress.epoch
        self.decoder.train()
        if self.encoder:
            self.encoder.train_mode(batch_norm=self.from_scratch)
        batches = self.batches_of(plan[progress.step :])
        meter = Meter(self.device)
        pending: list[PendingLoss] = []  # not yet looked at
        with self.bar(total=len(plan), initial=progress.step, desc=f"epoch {progress.epoch + 1}", unit="update") as bar:
            for update in plan[progress.step :]:
                self.set_rates(*(progress.epoch + step / len(plan) for step in (progress.step, progress.step + 1)))
                for place in range(1, len(update.batches) + 1):
                    with meter.waiting():
                        batch = next(batches)
                    loss = self.learn(batch, update, last=place == len(update.batches))
                    pending.append(PendingLoss(loss, batch.captions, batch.indices, progress.step + 1))
                progress.step += 1
                bar.update()
                done = progress.step == len(plan)
                if done or progress.step % LOOK_EVERY == 0 or self.device.type == "cpu":
                    mean, save = self.settle(pending, meter, stop)
                    bar.set_postfix_str(f"{self.objective.measures} {mean:.3f}, {meter.rate():.0f} captions/s")
                    log.step(
                        {
                            "epoch": progress.epoch + 1,
                            "step": progress.step,
                            "of": len(plan),
                            "captions_per_second": meter.rate(),
                            "waiting": meter.share_waited(),
                        },
                        self.objective.measures,
                        mean,
                    )
                    if save and not done:
                        self.save_last(stop)
        return {f"train_{self.objective.measures}": progress.total / max(1, progress.count), **meter.figures()}

    def set_rates(self, behind: float, after: float) -> None:
        """The learning rates of one update; epochs before it and with it."""
        factor = learning_rate_factor(self.config, behind, after)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * getattr(self.config, group["rate"])

    def learn(self, batch: Batch, update: Update, last: bool) -> Loss:
        """Add this batch's gradients to the update's; with the last of its batches, make the update."""
        self.unreadable.add(batch.failures)
        if self.replay:
            loss = self.replay(batch)
        else:
            ranks = self.ranks.size  # DistributedDataParallel divides by it
            here = len(batch.targets), batch.captions, len(batch.indices)
            share = LossWeights(*(ranks * ours / all for ours, all in zip(here, update[1:], strict=True)))
            with contextlib.nullcontext() if last or ranks == 1 else self.learner.no_sync():
                loss = self.gradients(batch.to(self.device, self.precision), share)
        if last:
            self.scaler.unscale_(self.optimizer)
            if self.config.grad_clip:
                nn.utils.clip_grad_value_(self.parameters, self.config.grad_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=not self.replay)
            if self.average:
                self.average.update()
        return loss

    def gradients(self, batch: Batch, share: LossWeights = WHOLE) -> Loss:
        """Add those of a batch, which is on the device, to what is there."""
        with autocast(self.device, self.precision):
            loss = self.learner(batch, share)
        self.scaler.scale(loss.objective).backward()
        return loss._replace(objective=loss.objective.detach())

    def replays(self) -> bool:
        """Is a batch of this run always the same work: nothing decided on the way, no other rank waited for?"""
        config = self.config
        return (
            config.cuda_graphs
            and self.device.type == "cuda"
            and self.ranks.size == config.grad_accumulation == 1
            and not self.encoder
            and self.decoder.uses_attention
            and config.objective == "cross-entropy"
            and not config.scheduled_sampling
        )

    def settle(self, pending: list[PendingLoss], meter: Meter, stop: StopRequest) -> tuple[float, bool]:
        """Add the pending losses of all ranks to the epoch's sums -> their mean, and whether it is time to save.

        Raises UserError where one is not finite.
        """
        sums = np.zeros(4)  # loss, what it is a mean of, captions, photos
        for loss, captions, photos, update in pending:
            if not np.isfinite(float(loss.objective)):
                ids = [self.train.split.ids[i] for i in photos]
                self.refuse(
                    f"the loss became {float(loss.objective)} in epoch {self.progress.epoch + 1}, at update {update}, "
                    f"the photos {', '.join(ids[:8])}"
                )
            sums += float(loss.value) * loss.count, loss.count, captions, len(photos)
        pending.clear()
        due = self.ranks.is_main and meter.since_save() > 60 * self.config.save_every
        total, count, captions, photos, stops, due = self.ranks.all_reduce([*sums.tolist(), stop.requested, due])
        if stops:
            stop.requested = True
        self.progress.total += total
        self.progress.count += int(count)
        save = bool(stops or due)
        meter.add(captions, photos, saved=save)
        return total / count, save

    def refuse(self, what: str) -> NoReturn:
        """End the run: what is not finite is never saved."""
        raise UserError(
            f"{what}; nothing of it was saved: --resume goes on from the last good weights; if it happens again, lower "
            f"--learning-rate, now {self.config.learning_rate}"
        )

    def validate(self, stop: StopRequest) -> dict:
        """The figures of the validation photos: see captioning/training/validation.py."""
        plan = self.ranks.shard(plan_batches(self.val.split, VALIDATION_CAPTIONS, range(len(self.val.split))))
        batches = self.bar(self.loader(self.val, plan), total=len(plan), desc="validate", unit="batch", leave=False)
        return self.validation.run(self.whole, self.precision, batches, self.progress.epoch + 1, stop)

    def judge(self, value: float) -> bool:
        """Is this the best score so far?"""
        value = -value if self.config.best_metric == "loss" else value
        better = self.progress.best is None or value > self.progress.best
        self.progress.best = value if better else self.progress.best
        self.progress.epochs_without_better = 0 if better else self.progress.epochs_without_better + 1
        return better

    def batches_of(self, plan: list[Update]) -> Iterator[Batch]:
        """This rank's share of the plan's batches."""
        return iter(self.loader(self.train, [self.ranks.shard(batch) for update in plan for batch in update.batches]))

    def loader(self, photos: Dataset, plan: list[np.ndarray]) -> Iterable[Batch]:
        if not self.encoder:
            return Prefetch(photos, plan, pin=self.device.type == "cuda")
        workers = self.config.workers
        if workers is None:
            workers = torch.get_num_threads() if self.device.type == "cpu" else os.cpu_count()
        return SignalSafeLoader(photos, plan, workers, pin=self.device.type == "cuda")

    def bar(self, *items: object, **settings: object) -> tqdm:
        return tqdm(*items, disable=not self.ranks.is_main, **settings)

    def save_last(self, stop: StopRequest) -> None:
        if self.ranks.is_main:
            if not all(bool(weights.isfinite().all()) for weights in self.parameters):  # of a gradient after its loss
                self.refuse(f"the weights are no longer finite in epoch {self.progress.epoch + 1}")
            save_checkpoint(self.config.folder / "last.pt", self.checkpoint())
        stop.check()

    def checkpoint(self, for_resume: bool = True) -> dict:
        encoder = self.encoder.to_checkpoint() if self.encoder else self.described
        checkpoint = {
            "config": as_plain_data(self.config),
            "vocabulary": self.vocabulary.to_dict(),
            "encoder": encoder,
            "decoder": {"name": self.config.decoder, "sizes": self.sizes, "state": self.decoder.state_dict()},
            "progress": asdict(self.progress),
        }
        if for_resume:
            checkpoint |= {
                "optimizer": self.optimizer.state_dict(),
                "objective": self.objective.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": rng_state(self.device),
                "average": self.average.state_dict() if self.average else None,
            }
        return checkpoint

    def restore(self, saved: dict) -> None:
        """Go on where `saved` stands."""
        self.start_from(saved, str(self.config.folder))
        with checkpoint_errors(self.config.folder / "last.pt"):
            self.optimizer.load_state_dict(saved["optimizer"])
            self.objective.load_state_dict(saved["objective"])
            self.scaler.load_state_dict(saved["scaler"])
            if self.average:
                self.average.load_state_dict(saved["average"])
            self.progress = Progress(**saved["progress"])
            restore_rng(saved["rng"], self.device)

    def start_from(self, saved: dict, source: str) -> None:
        """Take over the decoder's weights, where vocabulary, encoder and sizes are the same."""
        with checkpoint_errors(source):
            self._take_over(saved, source)

    def _take_over(self, saved: dict, source: str) -> None:
        theirs, ours = len(saved["vocabulary"]["words"]), len(self.vocabulary)
        if Vocabulary.from_dict(saved["vocabulary"]) != self.vocabulary:
            raise UserError(
                f"{source}: was trained with another vocabulary ({theirs:,} words; {self.config.data} has {ours:,}); "
                "start a new --run"
            )
        if self.described and self.described["sha256"] != saved["encoder"]["sha256"]:
            raise UserError(
                f"{source}: was trained on another encoder ({saved['encoder']['name']}, {saved['encoder']['weights']}) "
                f"than the features ({self.described['name']}, {self.described['weights']}); extract with its encoder"
            )
        load_decoder(self.decoder, saved["decoder"], self.config.decoder, self.sizes, source)

    def describe(self) -> dict:
        """For the first line of the log."""
        encoder = self.encoder.recipe() if self.encoder else {k: v for k, v in self.described.items() if k != "state"}
        return {
            "encoder": encoder,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
            "processes": self.ranks.size,
            "precision": str(self.precision).removeprefix("torch."),
            "train_photos": len(self.train.split),
            "val_photos": len(self.val.split),
            "vocabulary": len(self.vocabulary),
            "captions_cut": self.train.split.num_truncated,
            "decoder_parameters": sum(p.numel() for p in self.decoder.parameters()),
        }
