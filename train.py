"""Stage 2: a decoder on cached features; --fine-tune puts the live encoder back.

    python train.py data/aic --run att
    python train.py data/aic --run show-and-tell --decoder lstm
    python train.py data/scenes --run small --hidden-size 256 --epochs 5 --device cpu        (on a laptop)

Stopped or killed, it goes on with --resume, to the very same weights.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from captioning.batches import Batch, CachedPhotos, LivePhotos, plan_batches, shuffled
from captioning.beam_search import beam_search
from captioning.checkpoint import load_checkpoint, save_checkpoint, to_resume
from captioning.decoders import DECODERS, build_decoder, load_decoder
from captioning.device import autocast, pick_device, pick_precision, restore_rng, rng_state
from captioning.encoder import Encoder, calibrate_on, encoder_from_checkpoint, load_encoder
from captioning.feature_cache import FeatureReader, saved_encoder
from captioning.grid import Grid
from captioning.images import PhotoError, Unreadable, quiet_worker
from captioning.log import Log
from captioning.metrics import score
from captioning.objectives import CrossEntropy, Loss
from captioning.splits import Split, photos_of
from config import Generate, StopRequest, Train, UserError, as_plain_data, run
from preprocess.captions import Photo, read_captions
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary

VALIDATION_CAPTIONS = 160  # a batch: validation keeps no gradients, so it may be larger
LOOK_EVERY = 20  # batches: each look at a GPU's loss waits for the GPU
BEST = {"cider": "CIDEr-D", "bleu4": "BLEU-4", "loss": "val_loss"}


@dataclass
class Progress:
    """Where a run is, as plain data: what --resume needs beside the weights."""

    epoch: int = 0  # epochs finished, validation and all
    step: int = 0  # batches of the current epoch that are trained on
    words: int = 0  # of the current epoch so far
    cross_entropy: float = 0.0  # summed over those words
    best: float | None = None  # the score of best.pt; of the loss, its negative
    epochs_without_better: int = 0


def main(config: Train) -> None:
    device = pick_device(config.device)
    saved = to_resume(config.folder, as_plain_data(config))
    vocabulary = Vocabulary.load(config.data / VOCABULARY_FILE)
    photos = list(read_captions(config.data))
    train = photos_of(photos, "train", config.data)
    val = photos_of(photos, "val", config.data, config.val_photos)
    if config.fine_tune:
        encoder = live_encoder(config, train, saved)
        described, channels = None, encoder.output_shape()[2]
        views = [LivePhotos(Split(part, vocabulary, config.max_length), encoder.transform) for part in (train, val)]
    else:
        reader = FeatureReader(config.features or config.data / "features.h5")
        encoder, described, channels = None, saved_encoder(reader), reader.channels
        there = [reader.present(part, config.allow_missing, config.data) for part in (train, val)]
        sees_cells = DECODERS[config.decoder].sees_cells
        views = [CachedPhotos(Split(part, vocabulary, config.max_length), reader, sees_cells) for part in there]
    references = {photo.id: photo.captions for photo in val}
    del photos, train, val  # from here on captions are flat arrays
    trainer = Trainer(config, vocabulary, *views, references, encoder, described, channels, device)
    with Log(config.folder, config, resume=saved is not None) as log:
        if saved is not None:
            trainer.restore(saved)
            log.forget_after(trainer.progress.epoch)
        elif config.start_from:
            trainer.start_from(load_checkpoint(config.start_from), str(config.start_from))
        log.start(trainer.describe())
        with StopRequest() as stop:
            trainer.fit(log, stop)


def live_encoder(config: Train, train: list[Photo], saved: dict | None) -> Encoder:
    """The encoder to fine-tune: of the run itself, of the run it starts from, or as the flags say."""
    if saved:
        return encoder_from_checkpoint(saved)
    if config.start_from:
        encoder = encoder_from_checkpoint(load_checkpoint(config.start_from))
    else:
        encoder = load_encoder(config.encoder, config.weights, config.image_size, config.seed)
    if encoder.weights == "random":
        calibrate_on(encoder, [photo.image for photo in train], 32, config.workers or 0)
    encoder.weights = f"{encoder.weights}, fine-tuned in {config.folder}"
    return encoder


class Trainer:
    """A decoder (and, fine-tuning, its live encoder) on the way from its first batch to its best checkpoint."""

    def __init__(self, config: Train, vocabulary: Vocabulary, train: Dataset, val: Dataset, references: dict,
                 encoder: Encoder | None, described: dict | None, channels: int, device: torch.device):  # fmt: skip
        """train and val: CachedPhotos or LivePhotos; references: of val, in words; described: the cache's encoder."""
        torch.manual_seed(config.seed)
        self.config, self.vocabulary, self.device = config, vocabulary, device
        self.train, self.val, self.references = train, val, references
        self.precision = pick_precision(config.precision, device)
        self.sizes = {
            "vocabulary_size": len(vocabulary), "channels": channels, "embedding_size": config.embedding_size,
            "attention_size": config.attention_size, "hidden_size": config.hidden_size, "dropout": config.dropout,
        }  # fmt: skip
        self.decoder = build_decoder(config.decoder, self.sizes).to(device)
        self.encoder = encoder.to(device) if encoder else None
        self.described = described
        self.from_scratch = config.weights == "random"  # such an encoder has its BatchNorm still to learn
        self.objective = CrossEntropy(config.alpha_c)
        groups = [{"params": list(self.decoder.parameters()), "lr": config.learning_rate}]
        if encoder:
            tuned = encoder.unfreeze(config.unfreeze_from or ("all" if self.from_scratch else None))
            groups.append({"params": tuned, "lr": config.encoder_learning_rate})
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.Adam(groups)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, config.decay_every, config.decay)
        self.progress = Progress()
        self.unreadable = Unreadable(len(train.split) + len(val.split), config.allow_missing)

    def fit(self, log: Log, stop: StopRequest) -> None:
        """Epoch by epoch: train, validate, log, save; until --epochs, or --patience without a better score."""
        progress, config = self.progress, self.config
        while progress.epoch < config.epochs and progress.epochs_without_better < config.patience:
            figures = {"epoch": progress.epoch + 1, "learning_rate": self.optimizer.param_groups[0]["lr"]}
            figures |= self.train_epoch(stop)
            figures |= self.validate(stop)
            self.scheduler.step()
            better = self.judge(figures[BEST[config.best]])
            progress.epoch, progress.step, progress.words, progress.cross_entropy = progress.epoch + 1, 0, 0, 0.0
            if better:
                save_checkpoint(config.folder / "best.pt", self.checkpoint(for_resume=False))
            log.epoch(figures, better)
            self.save_last(stop)
        log.end(progress.best, BEST[config.best])

    def train_epoch(self, stop: StopRequest) -> dict:
        """One epoch from where it stands -> its figures."""
        split, progress, config = self.train.split, self.progress, self.config
        plan = plan_batches(split, config.batch_size, shuffled(len(split), config.seed, progress.epoch))
        self.decoder.train()
        if self.encoder:
            self.encoder.tune(batch_norm=self.from_scratch)
        began = saved = time.monotonic()
        waited, captions = 0.0, 0
        pending: list[tuple[Loss, Batch]] = []  # not yet looked at
        bar = tqdm(total=len(plan), initial=progress.step, desc=f"epoch {progress.epoch + 1}", unit="batch")
        batches = iter(self.loader(self.train, plan[progress.step :]))
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            waited += time.monotonic() - asked
            if batch is not None:
                pending.append((self.train_step(batch), batch))
                captions += batch.captions
                progress.step += 1
            saving = stop.requested or time.monotonic() - saved > 60 * config.save_every
            if pending and (batch is None or saving or len(pending) >= LOOK_EVERY or self.device.type == "cpu"):
                loss = self.settle(pending)
                seconds = time.monotonic() - began
                bar.set_postfix_str(
                    f"loss {loss:.3f}, {captions / seconds:.0f} captions/s, waiting {waited / seconds:.0%}"
                )
            bar.update(batch is not None)
            if batch is None:
                break
            if saving:
                self.save_last(stop)
                saved = time.monotonic()
        bar.close()
        seconds = time.monotonic() - began
        return {
            "train_loss": progress.cross_entropy / max(1, progress.words),
            "captions_per_second": captions / seconds,
            "waiting": waited / seconds,
            "train_seconds": seconds,
        }

    def train_step(self, batch: Batch) -> Loss:
        self.unreadable.add(batch.failures)
        batch = batch.to(self.device, self.precision)
        with autocast(self.device, self.precision):
            loss = self.objective.loss(self.decoder, self.see(batch), batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.objective.backward()
        if self.config.clip:
            nn.utils.clip_grad_value_(self.parameters, self.config.clip)
        self.optimizer.step()
        return Loss(*(value.detach() for value in loss))

    def see(self, batch: Batch) -> Grid:
        """The Grid of a batch, cached or live: the decoder cannot tell which."""
        return self.encoder(batch.view) if self.encoder else batch.view

    def settle(self, pending: list[tuple[Loss, Batch]]) -> float:
        """Add the pending losses to the epoch's sums -> the last one. Stops where one is not finite."""
        for loss, batch in pending:
            value = float(loss.objective)
            if not np.isfinite(value):
                ids = [self.train.split.ids[i] for i in batch.indices]
                raise UserError(
                    f"the loss became {value} in epoch {self.progress.epoch + 1}, at the photos {', '.join(ids[:8])}; "
                    f"lower --learning-rate, now {self.config.learning_rate}, or --resume from {self.config.folder}"
                )
            self.progress.cross_entropy += float(loss.cross_entropy) * len(batch.targets)
            self.progress.words += len(batch.targets)
        pending.clear()
        return value

    @torch.inference_mode()
    def validate(self, stop: StopRequest) -> dict:
        """Teacher-forced loss and top-5 accuracy; BLEU-4 and CIDEr-D of captions generated freely (greedily)."""
        began, split, vocabulary = time.monotonic(), self.val.split, self.vocabulary
        self.decoder.eval()
        if self.encoder:
            self.encoder.eval()
        plan = plan_batches(split, VALIDATION_CAPTIONS, range(len(split)))
        sums, words, candidates = torch.zeros(2), 0, {}
        for batch in tqdm(self.loader(self.val, plan), total=len(plan), desc="validate", unit="batch", leave=False):
            if stop.requested:
                self.save_last(stop)
            self.unreadable.add(batch.failures)
            batch = batch.to(self.device, self.precision)
            with autocast(self.device, self.precision):
                grid = self.see(batch)
                loss = self.objective.loss(self.decoder, grid, batch)
                captions = beam_search(self.decoder, grid, 1, Generate.max_length)
            sums += torch.stack([loss.cross_entropy, loss.top5]).float().cpu() * len(batch.targets)
            words += len(batch.targets)
            for index, caption in zip(batch.indices, captions, strict=True):
                candidates[split.ids[index]] = vocabulary.decode(caption.words)
        references = {photo: self.references[photo] for photo in candidates}
        scores = score(candidates, references, vocabulary.language, only=("BLEU-4", "CIDEr-D"))
        cross_entropy, top5 = (sums / words).tolist()
        examples = {photo: vocabulary.joined(candidates[photo]) for photo in list(candidates)[:3]}
        return {
            "val_loss": cross_entropy, "top5": top5, **scores,
            "val_seconds": time.monotonic() - began, "examples": examples,
        }  # fmt: skip

    def judge(self, value: float) -> bool:
        """Is this the best score so far?"""
        value = -value if self.config.best == "loss" else value
        better = self.progress.best is None or value > self.progress.best
        self.progress.best = value if better else self.progress.best
        self.progress.epochs_without_better = 0 if better else self.progress.epochs_without_better + 1
        return better

    def loader(self, photos: Dataset, plan: list[np.ndarray]) -> DataLoader:
        workers = self.config.workers
        if workers is None:
            workers = (torch.get_num_threads() if self.encoder else 0) if self.device.type == "cpu" else 2
        return DataLoader(
            photos, sampler=plan, batch_size=None, num_workers=workers, pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # of its own: reading must not move the training's random numbers
            worker_init_fn=quiet_worker,
        )  # fmt: skip

    def save_last(self, stop: StopRequest) -> None:
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
                "rng": rng_state(self.device),
            }
        return checkpoint

    def restore(self, saved: dict) -> None:
        """Go on where `saved` stands."""
        self.start_from(saved, str(self.config.folder))
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
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
            "precision": str(self.precision).removeprefix("torch."),
            "train_photos": len(self.train.split), "val_photos": len(self.val.split),
            "vocabulary": len(self.vocabulary), "captions_cut": self.train.split.cut,
            "decoder_parameters": sum(p.numel() for p in self.decoder.parameters()),
        }  # fmt: skip


def work(config: Train) -> None:
    try:
        main(config)
    except PhotoError as error:
        raise UserError(str(error)) from None
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory on the GPU: lower --batch-size, now {config.batch_size}") from None


if __name__ == "__main__":
    run(Train, work)
