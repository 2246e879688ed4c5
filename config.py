"""Every setting of every command: one small dataclass a command, which command_line.py makes into flags.

A field's comment is its help, with its unit. `__post_init__` checks the values in the flags' own
words, before anything is read or written. Changing a default here changes it everywhere.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional

from captioning.errors import UserError
from captioning.runtime.command_line import DASHBOARD_URL
from captioning.runtime.settings import check, check_fractions, check_min, flag, non_default
from captioning.search.options import SearchOptions
from captioning.training.options import TrainingOptions


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
        check_min(self, 10, "scenes")
        check_min(self, 1, "min_count", "max_words", "workers")
        check_fractions(self, "allow_missing")


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
    scaled_decoding: bool = False  # decode large JPEGs at a fraction of their size: faster, slightly other features
    nvjpeg: bool = False  # decode JPEGs on the GPU: for many photos and few cores, slightly other features
    compile: bool = False  # torch.compile the CNN first: minutes that many photos win back
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    out: Path | None = None  # file to write; data/NAME/features.h5 unless given
    allow_missing: float = 0.01  # share of photos that may be missing or unreadable
    overwrite: bool = False  # replace features made with other settings
    info: bool = False  # extract nothing: tell what the file holds
    verify: bool = False  # extract nothing: look for damaged rows, and make some anew to compare

    def __post_init__(self):
        if self.info and self.verify:
            raise UserError("--info tells what the file holds and --verify checks it: give one of them")
        if self.nvjpeg and self.scaled_decoding:
            raise UserError("--scaled-decoding goes without --nvjpeg, which decodes JPEGs at their full size")
        if self.overwrite and (self.info or self.verify):
            raise UserError("--overwrite goes without --info and --verify, which extract nothing")
        check_min(self, 32, "image_size")
        check_min(self, 1, "batch_size")
        check_min(self, 0, "workers")
        check_fractions(self, "allow_missing")

    @property
    def file(self) -> Path:
        return self.out or self.data / "features.h5"


@dataclass(frozen=True)
class Train(TrainingOptions):
    """Stage 2: a decoder on cached features; --fine-tune puts the live encoder back.

    python train.py data/aic --run att
    """

    data: Positional[Path]  # folder made by python -m preprocess


@dataclass(frozen=True)
class Generate:
    """Captions for photos, folders and splits; scores; attention pictures.

    python generate.py checkpoints/att photo.jpg folder/
    python generate.py checkpoints/att --data data/aic --split test --scores scores.json
    python generate.py --score captions.json --references data/aic
    """

    run: Positional[Path | None] = None  # folder of a run, or a checkpoint file in it
    photos: Positional[tuple[Path, ...]] = ()  # photos, and folders of photos
    data: Path | None = None  # folder made by python -m preprocess: caption a split of it
    split: Literal["train", "val", "test"] = "val"  # of --data, and of --references data/NAME
    features: Path | None = None  # cached features of --data; data/NAME/features.h5 where it is
    limit: int = 0  # photos of the split, from its first; 0 is all
    search: OmitArgPrefixes[SearchOptions] = SearchOptions()  # how captions are looked for
    ensemble: tuple[Path, ...] = ()  # further runs, of the same vocabulary and encoder, that write each word together
    seed: int = 0  # of captions that are drawn
    hard: Literal["expectation", "argmax"] = "expectation"  # hard attention sees: all cells by their share, or one
    json: Path | None = None  # write the captions here, in COCO results form
    submission: Path | None = None  # write the captions here, in AI Challenger's form (Chinese)
    csv: Path | None = None  # write a table here: captions, log-probabilities and, with references, scores of each
    html: Path | None = None  # write a page here: photos, captions, references and attention; it opens offline
    pictures: Path | None = None  # draw the attention of each word over each photo into this folder
    view: Literal["smooth", "grid"] = "smooth"  # of --pictures: attention spread smoothly, or cell by cell
    animate: bool = False  # with --pictures: GIFs that move from word to word, instead of PNGs
    score: tuple[Path, ...] = ()  # caption nothing: score this file of captions, of anyone; two are also compared
    references: Path | None = None  # with --score: data/NAME, or an annotation file
    # with --score: cuts captions, and those of an annotation file (jieba for Chinese, else whitespace)
    tokenizer: Literal["jieba", "whitespace", "character"] | None = None
    scores: Path | None = None  # write BLEU, ROUGE-L, CIDEr-D, METEOR and SPICE here (needs references)
    extremes: Path | None = None  # write a page of the 50 worst and 50 best captions by CIDEr-D (needs references)
    batch_size: int = 32  # photos captioned at once
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # arithmetic
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    workers: int = os.cpu_count() or 1  # processes that decode photos
    allow_missing: float = 0.01  # share of photos that may be missing or unreadable

    def __post_init__(self):
        if self.score:
            self._check_score()
        elif not self.run or bool(self.photos) == bool(self.data):
            raise UserError("give a run, and photos or folders to caption, or --data data/NAME; or --score FILE")
        for name, other in (
            ("references", "score"),
            ("tokenizer", "score"),
            ("features", "data"),
            ("view", "pictures"),
            ("animate", "pictures"),
        ):
            if non_default(self, name) and not getattr(self, other):
                raise UserError(f"{flag(name)} goes with {flag(other)}")
        if (self.scores or self.extremes) and not (self.data or self.score):
            raise UserError("--scores and --extremes go with --data data/NAME, or with --score FILE --references FILE")
        check_min(self, 1, "batch_size")
        check_min(self, 0, "limit", "workers")
        check(0 <= self.seed < 2**63, "--seed", self.seed, "between 0 and 2^63 - 1")
        check_fractions(self, "allow_missing")

    def _check_score(self) -> None:
        if not self.references or len(self.score) > 2:
            raise UserError("--score takes one file of captions, or two to compare, and --references FILE or data/NAME")
        if self.run:
            raise UserError("--score captions nothing: leave out the run")
        captioning = non_default(self, "data", "json", "submission", "html", "pictures", "ensemble")
        if captioning := captioning + non_default(self.search, *vars(self.search)):
            raise UserError(f"--score captions nothing: leave out {captioning[0]}")
        if len(self.score) == 2 and (self.csv or self.extremes):
            raise UserError("--csv and --extremes are of one file: give --score one")


@dataclass(frozen=True)
class Dashboard:
    """Runs in the browser: starts visdom, or shows runs in one that is there.

    python -m captioning.viewing.dashboard
    python -m captioning.viewing.dashboard --replay checkpoints/att
    python -m captioning.viewing.dashboard --compare checkpoints/att checkpoints/show-and-tell
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


@dataclass(frozen=True)
class Export:
    """A run as files for programs without Kantu: python -m captioning.export checkpoints/att"""

    run: Positional[Path]  # folder of a run, or a checkpoint file in it
    out: Path | None = None  # folder to write; export/ beside the checkpoint unless given
    format: Literal["onnx", "torch"] = "onnx"  # for onnxruntime and others, or for torch.export.load
    overwrite: bool = False  # replace an export that is there
