"""Stage 2: a decoder on cached features; --fine-tune puts the live encoder back.

    python train.py data/aic --run att
    python train.py data/aic --run show-and-tell --decoder lstm
    python train.py data/aic --run tuned --fine-tune --start-from checkpoints/att
    python train.py data/scenes --run small --hidden-size 256 --epochs 5 --device cpu        (on a laptop)
    torchrun --nproc-per-node 4 -- train.py data/aic --run att --batch-size 512                 (on four GPUs)

Stopped or killed, it goes on with --resume, to the very same weights.
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.signals import install_exit_handlers  # before torch, which takes seconds to load

    install_exit_handlers()

import contextlib
from collections.abc import Sequence

import numpy as np
import torch

from captioning.dataset.batches import CachedPhotos, LivePhotos
from captioning.dataset.caption_dataset import CaptionDataset, check_none_lost, check_words_known
from captioning.decoders import DECODERS
from captioning.decoders.word_vectors import load_word_vectors
from captioning.encoders.encoder import Encoder, calibrate_on, encoder_from_checkpoint, load_encoder, saved_encoder
from captioning.encoders.images import Augment
from captioning.errors import UserError
from captioning.features.feature_cache import FeatureReader
from captioning.features.feature_placement import PLACES, reading
from captioning.runtime.checkpoint import load_checkpoint, load_for_resume
from captioning.runtime.command_line import run
from captioning.runtime.device import oom_as_user_error, pick_device
from captioning.runtime.distributed import SINGLE, DistributedContext, init_distributed
from captioning.runtime.files import locked
from captioning.runtime.log import Log
from captioning.runtime.settings import as_plain_data
from captioning.runtime.signals import StopRequest
from captioning.training import OBJECTIVES
from captioning.training.trainer import Trainer
from captioning.viewing.dashboard import LogTailer
from config import Train
from preprocess.captions import read_captions
from preprocess.vocabulary import SPECIAL, VOCABULARY_FILE, Vocabulary


def main(config: Train, ranks: DistributedContext = SINGLE) -> None:
    saved = load_for_resume(config.folder, as_plain_data(config))
    if len(set(ranks.all_gather(saved is None))) > 1:
        raise UserError(f"{config.folder}: is not seen by all processes; put it on a disk that all machines share")
    trainer = make_trainer(config, saved, ranks)
    behind = (trainer.progress.epoch, trainer.progress.step) if saved else None
    with Log(config.folder, as_plain_data(config), behind, ranks.is_main) as log, StopRequest() as stop:
        log.start(trainer.describe())
        shown = config.dashboard and ranks.is_main
        with LogTailer(config.folder, config.dashboard) if shown else contextlib.nullcontext():
            trainer.fit(log, stop)


def make_trainer(config: Train, saved: dict | None = None, ranks: DistributedContext = SINGLE) -> Trainer:
    """All that a run needs, read and checked. saved: the checkpoint to go on from."""
    device = pick_device(config.device)
    vocabulary = Vocabulary.load(config.data / VOCABULARY_FILE)
    photos = CaptionDataset(read_captions(config.data), vocabulary, config.max_length)
    train, val = photos.indices_of("train", config.data), photos.indices_of("val", config.data, config.val_photos)
    start = load_checkpoint(config.start_from) if config.start_from and not saved else None
    if config.fine_tune:
        train, val = photos.subset(train), photos.subset(val)
        encoder = live_encoder(config, train.paths, saved, start)
        described, channels = None, encoder.output_shape()[2]
        augment = Augment(config.flip, config.crop, config.seed) if config.flip or config.crop < 1 else None
        views = LivePhotos(train, encoder.transform, augment, train.mentions_side()), LivePhotos(val, encoder.transform)
    else:
        reader = FeatureReader(config.features or config.data / "features.h5", pin=device.type == "cuda")
        rows = reader.rows_of(photos.ids)
        if not config.features:
            check_none_lost(rows, reader.path, len(reader.ids), config.allow_missing)
        encoder, channels = None, reader.channels
        described = saved_encoder(reader.path, reader.attributes["weights_sha256"])["encoder"]
        parts = [part[reader.present(rows[part], config.allow_missing, config.data)] for part in (train, val)]
        views = cached_views(config, photos, rows, parts, reader, device)
    check_words_known(views[0].split, config.data)
    del photos  # train and val are copies of what is needed of them
    objective = OBJECTIVES[config.objective](config, views[0].split)
    trainer = Trainer(config, vocabulary, *views, objective, encoder, described, channels, device, ranks)
    if saved is not None:
        trainer.restore(saved)
    elif start is not None:
        trainer.start_from(start, str(config.start_from))
    elif config.word_vectors:
        found = load_word_vectors(trainer.decoder.embedding.weight.data, config.word_vectors, vocabulary)
        words = len(vocabulary) - len(SPECIAL)
        print(f"{config.word_vectors}: {found:,} of the vocabulary's {words:,} words are in it ({found / words:.1%})")
    return trainer


def live_encoder(config: Train, paths: Sequence[str], saved: dict | None, start: dict | None) -> Encoder:
    """The encoder to fine-tune: of the run itself, of the run it starts from, or as the flags say."""
    if saved:
        return encoder_from_checkpoint(saved)
    if start:
        encoder = encoder_from_checkpoint(start)
    else:
        encoder = load_encoder(config.encoder, config.weights, config.image_size, config.seed)
    if encoder.weights == "random":
        calibrate_on(encoder, paths, 32, config.workers or 0)
    encoder.weights = f"{encoder.weights}, fine-tuned in {config.folder}"
    return encoder


def cached_views(
    config: Train,
    photos: CaptionDataset,
    rows: np.ndarray,
    parts: list[np.ndarray],
    reader: FeatureReader,
    device: torch.device,
) -> list[CachedPhotos]:
    """The features of train and val (parts of the photos), wherever they lie; rows (N,) int64 of all photos."""
    pooled = not DECODERS[config.decoder].uses_attention
    read, residence = reading(reader, rows[np.concatenate(parts)], pooled, config.features_on, device)
    print(f"{reader.path}: read from {PLACES[residence.where]} ({residence.why})")
    return [CachedPhotos(photos.subset(part), rows[part], read) for part in parts]


def work(config: Train) -> None:
    remedy = (
        f"lower --batch-size, now {config.batch_size}, and raise --grad-accumulation, now {config.grad_accumulation}; "
        "fine-tuning, give --checkpoint-activations"
    )
    with init_distributed("go on with --resume") as ranks, oom_as_user_error(remedy):
        with locked(config.folder, config.folder / ".lock", ranks.is_main):
            main(config, ranks)


if __name__ == "__main__":
    run(Train, work)
