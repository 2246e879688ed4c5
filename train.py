"""Stage 2: train a decoder on cached features; with --fine-tune, the encoder too.

    python train.py data/aic --run att
    python train.py data/aic --run show-and-tell --decoder lstm
    python train.py data/aic --run tuned --fine-tune --start-from checkpoints/att
    python train.py data/scenes --run small --hidden-size 256 --epochs 5 --device cpu        (on a laptop)
    torchrun --nproc-per-node 4 -- train.py data/aic --run att --batch-size 512                 (on four GPUs)

A run that is stopped or killed continues with --resume, to exactly the same weights.
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.start import start_command  # before torch, which takes seconds to import

    start_command()

import contextlib

from captioning import calibrate
from captioning.dataset.caption_dataset import CaptionDataset, check_vocabulary
from captioning.decoders.word_vectors import load_word_vectors
from captioning.errors import UserError
from captioning.runtime.checkpoint import load_checkpoint, load_for_resume
from captioning.runtime.command_line import run
from captioning.runtime.device import lost_gpu_as_user_error, oom_as_user_error, pick_device
from captioning.runtime.distributed import SINGLE, DistributedContext, init_distributed, lost_process_is_stop
from captioning.runtime.files import locked
from captioning.runtime.loader import lost_worker_as_user_error
from captioning.runtime.log import Log
from captioning.runtime.settings import as_plain_data
from captioning.runtime.signals import StopRequest
from captioning.training import OBJECTIVES
from captioning.training.data import cached_data, live_data
from captioning.training.trainer import Trainer
from captioning.viewing import LOGGERS
from config import Calibrate, Train
from preprocess.captions import read_captions
from preprocess.vocabulary import SPECIAL, VOCABULARY_FILE, Vocabulary


def main(config: Train, distributed: DistributedContext = SINGLE) -> None:
    """Train a new run, or resume one. Raises UserError."""
    config = config.for_device(pick_device(config.device).type)
    loggers = chosen_loggers(config)
    saved = load_for_resume(config.folder, as_plain_data(config))
    if len(set(distributed.all_gather(saved is None))) > 1:
        raise UserError(f"{config.folder}: not visible to all processes; put it on a disk that all machines share")
    trainer = make_trainer(config, saved, distributed)
    progress = trainer.state.progress
    resumed_at = (progress.epoch, progress.step) if saved else None
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(Log(config.folder, as_plain_data(config), resumed_at, distributed.is_main))
        stop = stack.enter_context(StopRequest())
        log.start(trainer.describe())
        for logger, value in loggers if distributed.is_main else []:
            stack.enter_context(logger(config.folder, value))
        stack.enter_context(lost_process_is_stop(stop))
        trainer.fit(log, stop)


def chosen_loggers(config: Train) -> list[tuple[type, object]]:
    """The loggers whose option is set, each with the option's value.

    They are imported here, before anything is written. Raises UserError if a package is missing.
    """
    options = {name: getattr(config, name) for name in LOGGERS}  # not .items(), which imports all of them
    return [(LOGGERS[name], value) for name, value in options.items() if value]


def make_trainer(config: Train, saved: dict | None = None, distributed: DistributedContext = SINGLE) -> Trainer:
    """Read and check everything a run needs. saved: the checkpoint to resume from."""
    device = pick_device(config.device)
    config = config.for_device(device.type)
    vocabulary = Vocabulary.load(config.data / VOCABULARY_FILE)
    captions = CaptionDataset(read_captions(config.data), vocabulary, config.max_length)
    train = captions.indices_of("train", config.data)
    val = captions.indices_of("val", config.data, config.val_photos)
    start = load_checkpoint(config.start_from) if config.start_from and not saved else None
    if config.fine_tune:
        data = live_data(config, captions.subset(train), captions.subset(val), saved, start)
    else:
        data = cached_data(config, captions, train, val, device, saved)
    check_vocabulary(data.train.split, config.data)
    del captions  # the subsets are copies: do not hold all captions while the decoder is built
    objective = OBJECTIVES[config.objective](config, data.train.split)
    trainer = Trainer(config, vocabulary, data, objective, device, distributed)
    load_weights(trainer, config, saved, start)
    return trainer


def load_weights(trainer: Trainer, config: Train, saved: dict | None, start: dict | None) -> None:
    """Load what the run resumes from, else what it starts from, else word vectors, if any of them is given."""
    if saved is not None:
        trainer.state.restore(saved)
    elif start is not None:
        trainer.state.start_from(start, str(config.start_from))
    elif config.word_vectors:
        vocabulary = trainer.state.vocabulary
        embedding = trainer.decoder.embedding.weight.data
        loaded = load_word_vectors(embedding, config.word_vectors, vocabulary, config.word_vectors_limit)
        print(f"{config.word_vectors}: {loaded.report(len(vocabulary) - len(SPECIAL))}")


def work(config: Train) -> None:
    """`main` on all processes of the job, with the run locked."""
    config = config.for_device(pick_device(config.device).type)
    remedy = (
        f"lower --batch-size, now {config.batch_size}, and raise --grad-accumulation, now {config.grad_accumulation}; "
        + ("give --checkpoint-activations" if config.fine_tune else "or give --features-on ram or disk")
    )
    resume = "continue with --resume"
    lost_gpu = f"{resume}; if it happens again, add --no-fast-path"
    with init_distributed(resume) as distributed, lost_gpu_as_user_error(lost_gpu), oom_as_user_error(remedy):
        with lost_worker_as_user_error(), locked(config.folder, config.folder / ".lock", distributed.is_main):
            main(config, distributed)
    if config.calibrate and distributed.is_main:
        calibrate.work(Calibrate(config.folder, precision=config.precision, device=config.device))


if __name__ == "__main__":
    run(Train, work)
