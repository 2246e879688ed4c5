"""A decoder (and, fine-tuning, its live encoder) on the way from its first batch to its best checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from captioning.average import WeightAverage
from captioning.batches import Batch, Update, plan_batches, plan_updates, shuffled
from captioning.checkpoint import save_checkpoint
from captioning.decoders import build_decoder, load_decoder
from captioning.device import autocast, pick_precision, restore_rng, rng_state
from captioning.encoder import Encoder
from captioning.images import Unreadable, quiet_worker
from captioning.log import Log
from captioning.meter import Meter
from captioning.objectives import CrossEntropy, Loss, Share
from captioning.panel import Panel
from captioning.ranks import Ranks
from captioning.stop import StopRequest
from captioning.validation import Validation
from captioning.whole import Whole
from config import Train, UserError, as_plain_data
from preprocess.vocabulary import Vocabulary

VALIDATION_CAPTIONS = 160  # a batch: validation keeps no gradients, so it may be larger
LOOK_EVERY = 20  # updates: each look at a GPU's loss waits for the GPU
BEST = {"cider": "CIDEr-D", "bleu4": "BLEU-4", "loss": "val_loss"}


@dataclass
class Progress:
    """Where a run is, as plain data: what --resume needs beside the weights."""

    epoch: int = 0  # epochs finished, validation and all
    step: int = 0  # updates of the weights in the current epoch
    words: int = 0  # of the current epoch so far, of all ranks
    cross_entropy: float = 0.0  # summed over those words
    best: float | None = None  # the score of best.pt; of the loss, its negative
    epochs_without_better: int = 0


class Learnt(NamedTuple):
    """What is still to be said of a batch that was learnt from; the batch itself may go."""

    loss: Loss
    words: int
    captions: int
    photos: np.ndarray  # of the split


class Trainer:
    """Trains, validates, saves and resumes one run, alone or with other ranks."""

    def __init__(self, config: Train, vocabulary: Vocabulary, train: Dataset, val: Dataset, references: dict,
                 encoder: Encoder | None, described: dict | None, channels: int, device: torch.device,
                 ranks: Ranks):  # fmt: skip
        """train and val: CachedPhotos or LivePhotos; references: of val, in words; described: the cache's encoder."""
        torch.manual_seed(config.seed)
        self.config, self.vocabulary, self.device, self.ranks = config, vocabulary, device, ranks
        self.train, self.val = train, val
        self.precision = pick_precision(config.precision, device)
        self.sizes = {
            "vocabulary_size": len(vocabulary), "channels": channels, "embedding_size": config.embedding_size,
            "attention_size": config.attention_size, "hidden_size": config.hidden_size, "dropout": config.dropout,
        }  # fmt: skip
        self.encoder, self.described = encoder, described
        self.from_scratch = config.weights == "random"  # such an encoder has its BatchNorm still to learn
        self.decoder = build_decoder(config.decoder, self.sizes)
        self.whole = Whole(encoder, self.decoder, CrossEntropy(config.alpha_c)).to(device)
        groups = [{"params": list(self.decoder.parameters()), "lr": config.learning_rate}]
        if encoder:
            tuned = encoder.unfreeze(config.unfreeze_from or ("all" if self.from_scratch else None))
            groups.append({"params": tuned, "lr": config.encoder_learning_rate})
            if config.checkpoint_activations:
                encoder.checkpoint_activations()
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.average = WeightAverage(self.parameters, config.average) if config.average else None
        self.optimizer = torch.optim.Adam(groups)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, config.decay_every, config.decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.learner: nn.Module = self.whole
        if ranks.size > 1:  # statistics that a new encoder learns are rank 0's; all others are the same anyway
            self.learner = DistributedDataParallel(
                self.whole, broadcast_buffers=self.from_scratch, gradient_as_bucket_view=True
            )
        self.progress = Progress()
        self.unreadable = Unreadable(len(train.split) + len(val.split), config.allow_missing)
        panel = Panel(val.split, config.panel, config.folder)
        self.validation = Validation(val.split, references, vocabulary, panel, self.unreadable, ranks)

    def fit(self, log: Log, stop: StopRequest) -> None:
        """Epoch by epoch: train, validate, log, save; until --epochs, or --patience without a better score."""
        progress, config = self.progress, self.config
        self.part_random_numbers()
        while progress.epoch < config.epochs and progress.epochs_without_better < config.patience:
            rates = zip(("learning_rate", "encoder_learning_rate"), self.optimizer.param_groups, strict=False)
            figures = {"epoch": progress.epoch + 1} | {name: group["lr"] for name, group in rates}
            figures |= self.train_epoch(log, stop)
            self.save_last(stop)  # a validation that is stopped is done again
            with self.average.in_place() if self.average else contextlib.nullcontext():
                figures |= self.validate(stop)
                self.scheduler.step()
                better = self.judge(figures[BEST[config.best]])
                progress.epoch, progress.step, progress.words, progress.cross_entropy = progress.epoch + 1, 0, 0, 0.0
                if better and self.ranks.first:
                    save_checkpoint(config.folder / "best.pt", self.checkpoint(for_resume=False))
            log.epoch(figures, better)
            self.save_last(stop)
        log.end(progress.best, BEST[config.best])

    def part_random_numbers(self) -> None:
        """Each rank drops other units. Rank 0 keeps the numbers that a single process has."""
        if not self.ranks.first:
            where = [self.config.seed, self.ranks.rank, self.progress.epoch, self.progress.step]
            torch.manual_seed(int(np.random.SeedSequence(where).generate_state(1)[0]))

    def train_epoch(self, log: Log, stop: StopRequest) -> dict:
        """One epoch from where it stands -> its figures."""
        split, progress, config = self.train.split, self.progress, self.config
        order = shuffled(len(split), config.seed, progress.epoch)
        plan = plan_updates(split, plan_batches(split, config.batch_size, order, self.ranks.size), config.accumulate)
        self.train.epoch = progress.epoch
        self.decoder.train()
        if self.encoder:
            self.encoder.tune(batch_norm=self.from_scratch)
        batches = self.batches_of(plan[progress.step :])
        meter = Meter(self.device)
        pending: list[Learnt] = []  # not yet looked at
        bar = self.bar(total=len(plan), initial=progress.step, desc=f"epoch {progress.epoch + 1}", unit="update")
        for update in plan[progress.step :]:
            for place in range(1, len(update.batches) + 1):
                with meter.waiting():
                    batch = next(batches)
                loss = self.learn(batch, update, last=place == len(update.batches))
                pending.append(Learnt(loss, len(batch.targets), batch.captions, batch.indices))
            progress.step += 1
            bar.update()
            done = progress.step == len(plan)
            if done or progress.step % LOOK_EVERY == 0 or self.device.type == "cpu":
                mean, save = self.settle(pending, meter, stop)
                bar.set_postfix_str(f"loss {mean:.3f}, {meter}")
                log.step({"epoch": progress.epoch + 1, "step": progress.step, "of": len(plan), "loss": mean,
                          "captions_per_second": meter.rate(), "waiting": meter.share_waited()})  # fmt: skip
                if save and not done:
                    self.save_last(stop)
        bar.close()
        return {"train_loss": progress.cross_entropy / max(1, progress.words), **meter.figures()}

    def learn(self, batch: Batch, update: Update, last: bool) -> Loss:
        """Add this batch's gradients to the update's; with the last of its batches, make the update."""
        self.unreadable.add(batch.failures)
        batch = batch.to(self.device, self.precision)
        ranks = self.ranks.size  # DistributedDataParallel divides by it
        share = Share(ranks * len(batch.targets) / update.words, ranks * batch.captions / update.captions)
        with contextlib.nullcontext() if last or ranks == 1 else self.learner.no_sync():
            with autocast(self.device, self.precision):
                loss = self.learner(batch, share)
            self.scaler.scale(loss.objective).backward()
        if last:
            self.scaler.unscale_(self.optimizer)
            if self.config.clip:
                nn.utils.clip_grad_value_(self.parameters, self.config.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            if self.average:
                self.average.update()
        return Loss(*(value.detach() for value in loss))

    def settle(self, pending: list[Learnt], meter: Meter, stop: StopRequest) -> tuple[float, bool]:
        """Add the pending losses of all ranks to the epoch's sums -> their mean, and whether it is time to save.

        Raises UserError where one is not finite.
        """
        sums = np.zeros(4)  # cross entropy, words, captions, photos
        for loss, words, captions, photos in pending:
            if not np.isfinite(float(loss.objective)):
                ids = [self.train.split.ids[i] for i in photos]
                raise UserError(
                    f"the loss became {float(loss.objective)} in epoch {self.progress.epoch + 1}, at the photos "
                    f"{', '.join(ids[:8])}; lower --learning-rate, now {self.config.learning_rate}, "
                    f"or --resume from {self.config.folder}"
                )
            sums += float(loss.cross_entropy) * words, words, captions, len(photos)
        pending.clear()
        due = self.ranks.first and meter.since_save() > 60 * self.config.save_every
        cross_entropy, words, captions, photos, stops, due = self.ranks.sum([*sums.tolist(), stop.requested, due])
        if stops:
            stop.requested = True
        self.progress.cross_entropy += cross_entropy
        self.progress.words += int(words)
        save = bool(stops or due)
        meter.add(captions, photos, saved=save)
        return cross_entropy / words, save

    def validate(self, stop: StopRequest) -> dict:
        """The figures of the validation photos: see captioning/validation.py."""
        plan = self.ranks.share(plan_batches(self.val.split, VALIDATION_CAPTIONS, range(len(self.val.split))))
        batches = self.bar(self.loader(self.val, plan), total=len(plan), desc="validate", unit="batch", leave=False)
        return self.validation.run(self.whole, self.precision, batches, self.progress.epoch + 1, stop)

    def judge(self, value: float) -> bool:
        """Is this the best score so far?"""
        value = -value if self.config.best == "loss" else value
        better = self.progress.best is None or value > self.progress.best
        self.progress.best = value if better else self.progress.best
        self.progress.epochs_without_better = 0 if better else self.progress.epochs_without_better + 1
        return better

    def batches_of(self, plan: list[Update]) -> Iterator[Batch]:
        """This rank's share of the plan's batches."""
        return iter(self.loader(self.train, [self.ranks.share(batch) for update in plan for batch in update.batches]))

    def loader(self, photos: Dataset, plan: list[np.ndarray]) -> DataLoader:
        workers = self.config.workers
        if workers is None:
            workers = (torch.get_num_threads() if self.encoder else 0) if self.device.type == "cpu" else 2
        return DataLoader(
            photos, sampler=plan, batch_size=None, num_workers=workers, pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # of its own: reading must not move the training's random numbers
            worker_init_fn=quiet_worker,
        )  # fmt: skip

    def bar(self, *items: object, **settings: object) -> tqdm:
        return tqdm(*items, disable=not self.ranks.first, **settings)

    def save_last(self, stop: StopRequest) -> None:
        if self.ranks.first:
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
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": rng_state(self.device),
                "average": self.average.state_dict() if self.average else None,
            }
        return checkpoint

    def restore(self, saved: dict) -> None:
        """Go on where `saved` stands."""
        self.start_from(saved, str(self.config.folder))
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        self.progress = Progress(**saved["progress"])
        restore_rng(saved["rng"], self.device)

    def start_from(self, saved: dict, source: str) -> None:
        """Take over the decoder's weights, where vocabulary, encoder and sizes are the same."""
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
            "train_photos": len(self.train.split), "val_photos": len(self.val.split),
            "vocabulary": len(self.vocabulary), "captions_cut": self.train.split.cut,
            "decoder_parameters": sum(p.numel() for p in self.decoder.parameters()),
        }  # fmt: skip
