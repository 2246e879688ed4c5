"""Every setting of every command: one small dataclass a command, made into a command line by tyro.

A field's comment is its help, with its unit. `__post_init__` checks the values in the flags' own
words, before anything is read or written. Changing a default here changes it everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal, TypeVar

import tyro
from tyro.conf import Positional

DASHBOARD_URL = "http://127.0.0.1:8097"


class UserError(Exception):
    """Something a user caused and can mend. The text is one line: what, where, what to do."""


def check(condition: bool, flag: str, value: object, wanted: str) -> None:
    """Raise UserError in the flag's own words unless `condition` holds."""
    if not condition:
        raise UserError(f"{flag} {value}: must be {wanted}")


def check_share(flag: str, value: float) -> None:
    check(0 <= value <= 1, flag, value, "a share between 0 and 1")


def check_at_least(flag: str, value: float, least: int) -> None:
    check(value >= least, flag, value, f"{least} or more")


@dataclass(frozen=True)
class Preprocess:
    """Stage 1a: annotation files -> data/NAME/captions.jsonl and vocab.json.

    python -m preprocess data/aic --train ANN.json IMAGES --val ANN.json IMAGES
    python -m preprocess data/coco --karpathy dataset_coco.json IMAGES
    python -m preprocess data/scenes --scenes 2000 --language zh
    """

    data: Positional[Path]  # folder to write, for example data/aic
    train: tuple[Path, Path] | None = None  # annotation file (AI Challenger or COCO) and image folder
    val: tuple[Path, Path] | None = None  # the same for the validation split; without it a tenth of train
    test: tuple[Path, Path] | None = None  # the same for the test split
    karpathy: tuple[Path, Path] | None = None  # Karpathy's JSON, which holds the splits, and image folder
    scenes: int | None = None  # draw this many scenes with captions instead of reading annotations
    language: Literal["zh", "en"] | None = None  # of the captions; seen from the text (scenes: zh)
    tokenizer: Literal["jieba", "whitespace", "character"] | None = None  # jieba for Chinese, else whitespace
    min_count: int | None = None  # times a word must occur in train to enter the vocabulary (zh 2, en 5)
    max_words: int = 10_000  # most words in the vocabulary, beside the four special ones
    allow_missing: float = 0.01  # share of photos that may be missing on disk
    workers: int = os.cpu_count() or 1  # processes that cut captions
    seed: int = 0  # of the drawn scenes
    overwrite: bool = False  # replace captions made with other settings

    def __post_init__(self):
        ways = [self.train is not None, self.karpathy is not None, self.scenes is not None]
        if sum(ways) != 1:
            raise UserError("give exactly one of --train ANN.json IMAGES, --karpathy JSON IMAGES, --scenes N")
        if (self.val or self.test) and not self.train:
            raise UserError("--val and --test go with --train ANN.json IMAGES")
        if self.scenes is not None:
            check_at_least("--scenes", self.scenes, 10)
        if self.min_count is not None:
            check_at_least("--min-count", self.min_count, 1)
        check_at_least("--max-words", self.max_words, 1)
        check_share("--allow-missing", self.allow_missing)
        check_at_least("--workers", self.workers, 1)


@dataclass(frozen=True)
class ExtractFeatures:
    """Stage 1b: photos -> data/NAME/features.h5, through a frozen CNN, once. Resumes where it stopped.

    python extract_features.py data/aic
    """

    data: Positional[Path]  # folder made by python -m preprocess
    encoder: str | None = None  # torchvision classifier (resnet101); NAME.LAYER cuts earlier, as in resnet18.layer3
    weights: str = "imagenet"  # imagenet (torchvision's), random, a state-dict file, or a run in checkpoints/
    image_size: int | None = None  # pixels (256); the whole photo is squashed to this square
    grid: Literal["14", "native"] = "14"  # store 14x14 cells, or the CNN's own (smaller, same training)
    dtype: Literal["float16", "float32"] = "float16"  # of the stored features
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # the CNN's arithmetic
    batch_size: int = 32  # photos
    workers: int = os.cpu_count() or 1  # processes that decode photos
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    out: Path | None = None  # file to write; data/NAME/features.h5 unless given
    allow_missing: float = 0.01  # share of photos that may be missing or unreadable
    overwrite: bool = False  # replace features made with other settings

    def __post_init__(self):
        if self.image_size is not None:
            check_at_least("--image-size", self.image_size, 32)
        check_at_least("--batch-size", self.batch_size, 1)
        check_at_least("--workers", self.workers, 0)
        check_share("--allow-missing", self.allow_missing)

    @property
    def file(self) -> Path:
        return self.out or self.data / "features.h5"


@dataclass(frozen=True)
class Train:
    """Stage 2: a decoder on cached features; --fine-tune puts the live encoder back.

    python train.py data/aic --run att
    """

    data: Positional[Path]  # folder made by python -m preprocess
    run: str  # name of the run: it is kept in checkpoints/RUN
    decoder: Literal["lstm", "attention", "adaptive"] = "attention"  # Show and Tell; Show, Attend and Tell; Lu 2017
    features: Path | None = None  # cached features; data/NAME/features.h5 unless given
    epochs: int = 20  # at most
    batch_size: int = 32  # captions, of all processes together; a photo's captions stay together
    accumulate: int = 1  # batches whose gradients add up to one update of the weights: large batches in little memory
    embedding_size: int = 512  # of a word
    attention_size: int = 512  # of a key and a query
    hidden_size: int = 512  # of the recurrent state
    dropout: float = 0.5  # share of the hidden state dropped before the vocabulary layer
    learning_rate: float = 4e-4  # Adam's
    decay: float = 0.8  # the learning rate is multiplied by this ...
    decay_every: int = 3  # ... every so many epochs
    average: float = 0.0  # such as 0.999: validate and keep a moving average of the weights with this decay; 0 is off
    clip: float = 5.0  # each gradient element is clamped to +- this; 0 is off
    alpha_c: float = 1.0  # weight of the doubly stochastic term (attention)
    patience: int = 8  # epochs without a better score before training stops
    best: Literal["cider", "bleu4", "loss"] = "cider"  # score on val that chooses best.pt
    val_photos: int = 5000  # photos of val captioned and scored each epoch; 0 is all
    max_length: int = 52  # words of a caption; longer ones are cut, and counted in the log
    fine_tune: bool = False  # train the encoder too, on the photos themselves
    encoder: str | None = None  # with --fine-tune, without --start-from: as in extract_features.py (resnet101)
    weights: str | None = None  # with --fine-tune, without --start-from: as in extract_features.py (imagenet)
    image_size: int | None = None  # with --fine-tune, without --start-from: pixels (256)
    unfreeze_from: str | None = None  # first layer to train (ResNets: layer2, others: all); its name, or all
    encoder_learning_rate: float = 1e-4  # Adam's, for the encoder
    checkpoint_activations: bool = False  # with --fine-tune: compute the encoder twice, in a fraction of the memory
    flip: bool = False  # with --fine-tune: mirror photos at random, never where a caption tells left from right
    crop: float = 1.0  # with --fine-tune: least share of each side that a random crop keeps; 1 is the whole photo
    start_from: Path | None = None  # run whose weights training starts from
    resume: bool = False  # go on with this run where it stopped
    save_every: float = 10.0  # minutes between checkpoints inside an epoch
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # arithmetic; weights stay float32
    panel: int = 6  # first photos of val whose captions and attention are drawn every epoch; 0 is none
    dashboard: str | None = None  # show the run in the visdom server at this URL (alone: http://127.0.0.1:8097)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    workers: int | None = None  # processes that read batches; 0 from a cache, a core each from photos
    seed: int = 0  # of the weights, the order and the dropout
    allow_missing: float = 0.01  # share of photos that may be without features, or unreadable
    overwrite: bool = False  # start the run anew where one is

    def __post_init__(self):
        if not self.run or Path(self.run).name != self.run or self.run.startswith("."):
            raise UserError(f"--run {self.run!r}: must be a plain name, such as att (kept in checkpoints/att)")
        for flag in ("epochs", "batch_size", "accumulate", "embedding_size", "attention_size",
                     "hidden_size", "decay_every", "patience", "max_length"):  # fmt: skip
            check_at_least("--" + flag.replace("_", "-"), getattr(self, flag), 1)
        check(0 <= self.dropout < 1, "--dropout", self.dropout, "at least 0 and below 1")
        for flag in ("learning_rate", "encoder_learning_rate", "decay"):
            value = getattr(self, flag)
            check(0 < value < float("inf"), "--" + flag.replace("_", "-"), value, "above 0")
        for flag in ("clip", "alpha_c", "save_every", "val_photos", "panel"):
            check(getattr(self, flag) >= 0, "--" + flag.replace("_", "-"), getattr(self, flag), "0 or more")
        check_share("--allow-missing", self.allow_missing)
        if self.workers is not None:
            check_at_least("--workers", self.workers, 0)
        check(0 <= self.average < 1, "--average", self.average, "at least 0 and below 1")
        check(0 < self.crop <= 1, "--crop", self.crop, "above 0 and at most 1")
        for flag in ("encoder", "weights", "image_size", "unfreeze_from", "checkpoint_activations", "flip", "crop"):
            if getattr(self, flag) != getattr(type(self), flag) and not self.fine_tune:
                raise UserError(f"--{flag.replace('_', '-')} goes with --fine-tune; cached features fix the encoder")
        for flag in ("encoder", "weights", "image_size"):
            if getattr(self, flag) is not None and self.start_from:
                raise UserError(
                    f"--{flag.replace('_', '-')}: --start-from {self.start_from} already brings its encoder"
                )
        if self.fine_tune and self.features:
            raise UserError("--features goes without --fine-tune, which reads the photos themselves")
        if self.checkpoint_activations and self.weights == "random":
            raise UserError("--checkpoint-activations goes without --weights random, whose BatchNorm would learn twice")
        if self.resume and self.overwrite:
            raise UserError("--resume goes on with a run and --overwrite starts it anew: give one of them")

    @property
    def folder(self) -> Path:
        return Path("checkpoints") / self.run


@dataclass(frozen=True)
class Generate:
    """Captions for photos, folders and splits; scores; attention pictures.

    python generate.py checkpoints/att photo.jpg folder/
    python generate.py checkpoints/att --data data/aic --split test --scores scores.json
    """

    run: Positional[Path]  # folder of a run, or a checkpoint file in it
    photos: Positional[tuple[Path, ...]] = ()  # photos, and folders of photos
    data: Path | None = None  # folder made by python -m preprocess: caption a split of it
    split: Literal["train", "val", "test"] = "val"  # of --data
    features: Path | None = None  # cached features of --data; data/NAME/features.h5 where it is
    limit: int = 0  # photos of the split, from its first; 0 is all
    beam_size: int = 5  # 1 is greedy
    max_length: int = 30  # words of a caption; what is longer is marked as unfinished
    length_penalty: float = 0.0  # rank by log-probability / length^this: 0 the sum, 1 the mean; more, longer captions
    json: Path | None = None  # write the captions here, in COCO results form
    scores: Path | None = None  # write BLEU, ROUGE-L, CIDEr-D, METEOR here (needs --data)
    pictures: Path | None = None  # draw the attention of each word over each photo into this folder
    batch_size: int = 32  # photos captioned at once
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # arithmetic
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    workers: int = os.cpu_count() or 1  # processes that decode photos
    allow_missing: float = 0.01  # share of photos that may be missing or unreadable

    def __post_init__(self):
        if bool(self.photos) == bool(self.data):
            raise UserError("give photos or folders to caption, or --data data/NAME with --split")
        for flag in ("scores", "features"):
            if getattr(self, flag) and not self.data:
                raise UserError(f"--{flag} goes with --data data/NAME")
        for flag in ("beam_size", "max_length", "batch_size"):
            check_at_least("--" + flag.replace("_", "-"), getattr(self, flag), 1)
        for flag in ("limit", "workers", "length_penalty"):
            check_at_least("--" + flag.replace("_", "-"), getattr(self, flag), 0)
        check_share("--allow-missing", self.allow_missing)


@dataclass(frozen=True)
class Dashboard:
    """Runs in the browser: starts visdom, or shows runs in one that is there.

    python -m captioning.dashboard
    python -m captioning.dashboard --replay checkpoints/att
    python -m captioning.dashboard --compare checkpoints/att checkpoints/show-and-tell
    """

    host: str = "127.0.0.1"  # address to listen on; another than this opens the pages to your network
    port: int = 8097  # to listen on
    folder: Path = Path("checkpoints/visdom")  # where visdom keeps its environments
    replay: Path | None = None  # run to rebuild from its log.jsonl, in the server at --url
    compare: tuple[Path, ...] = ()  # runs to lay over one another, in the server at --url
    url: str = DASHBOARD_URL  # of the server that --replay and --compare show runs in

    def __post_init__(self):
        check(0 < self.port < 65536, "--port", self.port, "between 1 and 65535")
        if self.replay and self.compare:
            raise UserError("--replay shows one run and --compare several: give one of them")
        if len(self.compare) == 1:
            raise UserError(f"--compare {self.compare[0]}: give two runs or more, or --replay for one")


Config = TypeVar("Config")


def parse(command: type[Config], arguments: list[str] | None = None) -> Config:
    """The command line as a `command` dataclass. A usage error is one line on stderr and exit status 2."""
    said = io.StringIO()
    arguments = _with_urls(sys.argv[1:] if arguments is None else arguments)
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(command, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if stop.code:
            print(f"error: {_one_line(said.getvalue())}", file=sys.stderr)
        raise


def _with_urls(arguments: list[str]) -> list[str]:
    """--dashboard may stand alone: it then means the server on this machine."""
    words = []
    for this, after in zip_longest(arguments, arguments[1:]):
        words.append(this)
        if this == "--dashboard" and (after is None or after.startswith("--")):
            words.append(DASHBOARD_URL)
    return words


def _one_line(boxes: str) -> str:
    """tyro draws its errors in boxes: keep the sentences above the first rule."""
    sentences = []
    for line in boxes.splitlines():
        line = line.strip("│ \t")
        if line and set(line) == {"─"}:
            break
        if line and not line.startswith(("╭", "╰")):
            sentences.append(line)
    return " ".join(sentences) + "; see --help"


def run(command: type[Config], work: Callable[[Config], None]) -> None:
    """Parse, work, and end with one line whatever a user did: `error: what, where, what to do`, status 1."""
    rank = int(os.environ.get("RANK", 0))  # torchrun's
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        work(parse(command))
    except UserError as error:
        sys.exit(f"error{f' (process {rank})' if rank else ''}: {error}")
    except KeyboardInterrupt:
        if not rank:
            print("stopped; nothing is lost: the same command (train.py: with --resume) goes on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def as_plain_data(config: object) -> dict:
    """A config as JSON-ready data, for logs and checkpoints."""
    return {name: _plain(value) for name, value in dataclasses.asdict(config).items()}


def _plain(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
