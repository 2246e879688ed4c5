"""Every setting of every command: one small dataclass a command, which command_line.py makes into flags.

A field's comment is its help, with its unit. `__post_init__` checks the values in the flags' own
words, before anything is read or written. Changing a default here changes it everywhere.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional

DASHBOARD_URL = "http://127.0.0.1:8097"


class UserError(Exception):
    """Something a user caused and can mend. The text is one line: what, where, what to do."""


def flag(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def check(condition: bool, flag: str, value: object, wanted: str) -> None:
    """Raise UserError in the flag's own words unless `condition` holds."""
    if not condition:
        raise UserError(f"{flag} {value}: must be {wanted}")


def at_least(settings: object, least: int, *names: str) -> None:
    """Settings that are None stay unchecked."""
    for name in names:
        value = getattr(settings, name)
        check(value is None or value >= least, flag(name), value, f"{least} or more")


def shares(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        check(0 <= value <= 1, flag(name), value, "a share between 0 and 1")


def given(settings: object, *names: str) -> list[str]:
    """The flags of those settings that are not at their default."""
    return [flag(name) for name in names if getattr(settings, name) != getattr(type(settings), name)]


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
        at_least(self, 10, "scenes")
        at_least(self, 1, "min_count", "max_words", "workers")
        shares(self, "allow_missing")


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
        at_least(self, 32, "image_size")
        at_least(self, 1, "batch_size")
        at_least(self, 0, "workers")
        shares(self, "allow_missing")

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
    # lstm: Show and Tell; attention, hard-attention: Show, Attend and Tell; adaptive: Knowing When to Look
    decoder: Literal["lstm", "attention", "hard-attention", "adaptive"] = "attention"
    objective: Literal["cross-entropy", "cider"] = "cross-entropy"  # cider: improve a run, with --start-from RUN
    features: Path | None = None  # cached features; data/NAME/features.h5 unless given
    resident: Literal["auto", "gpu", "ram", "disk"] = "auto"  # where cached features are while training
    epochs: int = 20  # at most
    batch_size: int = 32  # captions, of all processes together; a photo's captions stay together
    accumulate: int = 1  # batches whose gradients add up to one update of the weights: large batches in little memory
    embedding_size: int = 512  # of a word
    attention_size: int = 512  # of a key and a query
    hidden_size: int = 512  # of the recurrent state
    cell: Literal["lstm", "gru", "rnn"] = "lstm"  # of --decoder lstm
    layers: int = 1  # of --decoder lstm
    photo_norm: Literal["batch", "none"] = "batch"  # of --decoder lstm: BatchNorm of the photo before it is read
    tie_words: bool = False  # the words it reads and the words it says share one matrix
    word_vectors: Path | None = None  # text file of word2vec, GloVe or fastText that the words begin with
    freeze_words: bool = False  # with --word-vectors: they are not trained
    dropout: float = 0.5  # share of the hidden state dropped before the vocabulary layer
    feature_dropout: float = 0.0  # share of the features' channels dropped, others for each photo and each time
    label_smoothing: float = 0.0  # share of each target spread over the vocabulary
    scheduled_sampling: float = 0.0  # most of the words read in training that are the decoder's own, not the true ones
    sampling_rise: float = 0.05  # --scheduled-sampling starts at 0 and rises by this every epoch
    reinforce: float = 1.0  # weight of the REINFORCE term (hard-attention)
    entropy: float = 0.002  # weight of the entropy of the attention (hard-attention)
    samples: int = 5  # captions drawn of a photo (--objective cider)
    # what a reward is compared with (--objective cider): the others of its photo, or its greedy caption
    baseline: Literal["leave-one-out", "greedy"] = "leave-one-out"
    learning_rate: float = 4e-4  # Adam's
    weight_decay: float = 0.0  # AdamW's, of matrices; 0 is Adam
    schedule: Literal["step", "cosine"] = "step"  # of the learning rate; cosine: to 0 at --epochs
    warm_up: float = 0.0  # epochs over which the learning rate rises to its value
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
    cuda_graphs: bool = True  # on a GPU: start all the work of a batch at once, where cached features are learnt from
    panel: int = 6  # first photos of val whose captions and attention are drawn every epoch; 0 is none
    dashboard: str | None = None  # show the run in the visdom server at this URL (alone: http://127.0.0.1:8097)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    workers: int | None = None  # with --fine-tune: processes that decode photos; a core each unless given
    seed: int = 0  # of the weights, the order and the dropout
    allow_missing: float = 0.01  # share of photos that may be without features, or unreadable
    overwrite: bool = False  # start the run anew where one is

    def __post_init__(self):
        if not self.run or Path(self.run).name != self.run or self.run.startswith("."):
            raise UserError(f"--run {self.run!r}: must be a plain name, such as att (kept in checkpoints/att)")
        at_least(self, 1, "epochs", "batch_size", "accumulate", "embedding_size", "attention_size", "hidden_size",
                 "layers", "samples", "decay_every", "patience", "max_length")  # fmt: skip
        at_least(self, 0, "clip", "alpha_c", "save_every", "val_photos", "panel", "weight_decay", "warm_up",
                 "reinforce", "entropy", "sampling_rise", "workers")  # fmt: skip
        check(0 <= self.seed < 2**63, "--seed", self.seed, "between 0 and 2^63 - 1")
        shares(self, "allow_missing", "label_smoothing", "scheduled_sampling")
        for name in ("learning_rate", "encoder_learning_rate", "decay"):
            check(0 < getattr(self, name) < float("inf"), flag(name), getattr(self, name), "above 0")
        for name in ("dropout", "feature_dropout", "average"):
            check(0 <= getattr(self, name) < 1, flag(name), getattr(self, name), "at least 0 and below 1")
        check(0 < self.crop <= 1, "--crop", self.crop, "above 0 and at most 1")
        self._check_together()

    def _check_together(self) -> None:
        """Settings that do not go with one another."""
        live = given(
            self, "encoder", "weights", "image_size", "unfreeze_from", "checkpoint_activations", "flip", "crop"
        )
        if live and not self.fine_tune:
            raise UserError(f"{live[0]} goes with --fine-tune; cached features fix the encoder")
        if self.start_from and (brought := given(self, "encoder", "weights", "image_size")):
            raise UserError(f"{brought[0]}: --start-from {self.start_from} already brings its encoder")
        if self.fine_tune and (cached := given(self, "resident", "features")):
            raise UserError(f"{cached[0]} goes without --fine-tune, which reads the photos themselves")
        if self.checkpoint_activations and self.weights == "random":
            raise UserError("--checkpoint-activations goes without --weights random, whose BatchNorm would learn twice")
        if self.resume and self.overwrite:
            raise UserError("--resume goes on with a run and --overwrite starts it anew: give one of them")
        if self.objective == "cider" and not (self.start_from or self.resume):
            raise UserError("--objective cider improves a trained run: give --start-from checkpoints/RUN")
        if self.objective == "cider" and self.baseline == "leave-one-out" and self.samples == 1:
            raise UserError("--samples 1: leaving one out leaves none; draw 2 or more, or give --baseline greedy")
        if self.tie_words and self.embedding_size != self.hidden_size:
            raise UserError(
                f"--tie-words: --embedding-size {self.embedding_size} must equal --hidden-size {self.hidden_size}"
            )
        if self.word_vectors and self.start_from:
            raise UserError(f"--word-vectors: --start-from {self.start_from} already brings its words")
        if self.freeze_words and not self.word_vectors:
            raise UserError("--freeze-words goes with --word-vectors FILE")
        if self.freeze_words and self.tie_words:
            raise UserError("--freeze-words would freeze the words it says too: leave out --tie-words")
        if self.decoder != "lstm" and (of_lstm := given(self, "cell", "layers", "photo_norm")):
            raise UserError(f"{of_lstm[0]} goes with --decoder lstm")

    @property
    def folder(self) -> Path:
        return Path("checkpoints") / self.run


@dataclass(frozen=True)
class Search:
    """How captions are looked for: see captioning/beam_search.py. Raises UserError for values out of range."""

    beam_size: int = 5  # hypotheses of a photo; 1 is greedy
    max_length: int = 30  # words of a caption; what is longer is marked as unfinished
    min_length: int = 0  # words of a caption
    length_penalty: float = 0.0  # rank by log-probability / length^this: 0 the sum, 1 the mean; more, longer captions
    no_repeat: int = 0  # no so many words one after the other come twice in a caption; 0: they may
    allow_unknown: bool = False  # captions may have <unk> for words that are not in the vocabulary
    captions: int = 1  # of each photo, all different
    groups: int = 1  # parts of the beam that keep away from one another's words; each gives its share of the captions
    diversity: float = 0.5  # with groups: log-probability that a word loses for each hypothesis that just wrote it
    temperature: float = 0.0  # draw captions instead of searching: 1 as the decoder says, less keeps to likely words
    top_p: float = 1.0  # draw from the likeliest words that have this share of the probability

    def __post_init__(self):
        at_least(self, 1, "beam_size", "max_length", "captions", "groups")
        at_least(self, 0, "min_length", "length_penalty", "no_repeat", "diversity", "temperature")
        check(0 < self.top_p <= 1, "--top-p", self.top_p, "above 0 and at most 1")
        if self.min_length > self.max_length:
            raise UserError(f"--min-length {self.min_length}: must be at most --max-length, now {self.max_length}")
        if self.beam_size % self.groups or self.captions % self.groups:
            raise UserError(
                f"--groups {self.groups}: must divide --beam-size, now {self.beam_size}, and --captions, "
                f"now {self.captions}"
            )
        if self.temperature:
            if searching := given(self, "min_length", "length_penalty", "no_repeat", "groups"):
                raise UserError(f"{searching[0]} goes with beam search, without --temperature")
        elif self.top_p < 1:
            raise UserError("--top-p goes with --temperature: beam search draws nothing")
        elif self.captions > self.beam_size:
            raise UserError(f"--captions {self.captions}: must be at most --beam-size, now {self.beam_size}")


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
    search: OmitArgPrefixes[Search] = Search()  # how captions are looked for
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
        for name, other in (("references", "score"), ("tokenizer", "score"), ("features", "data"),
                            ("view", "pictures"), ("animate", "pictures")):  # fmt: skip
            if given(self, name) and not getattr(self, other):
                raise UserError(f"{flag(name)} goes with {flag(other)}")
        if (self.scores or self.extremes) and not (self.data or self.score):
            raise UserError("--scores and --extremes go with --data data/NAME, or with --score FILE --references FILE")
        at_least(self, 1, "batch_size")
        at_least(self, 0, "limit", "workers")
        check(0 <= self.seed < 2**63, "--seed", self.seed, "between 0 and 2^63 - 1")
        shares(self, "allow_missing")

    def _check_score(self) -> None:
        if not self.references or len(self.score) > 2:
            raise UserError("--score takes one file of captions, or two to compare, and --references FILE or data/NAME")
        if self.run:
            raise UserError("--score captions nothing: leave out the run")
        captioning = given(self, "data", "json", "submission", "html", "pictures", "ensemble")
        if captioning := captioning + given(self.search, *vars(self.search)):
            raise UserError(f"--score captions nothing: leave out {captioning[0]}")
        if len(self.score) == 2 and (self.csv or self.extremes):
            raise UserError("--csv and --extremes are of one file: give --score one")


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


@dataclass(frozen=True)
class Export:
    """A run as files for programs without Kantu: python -m captioning.export checkpoints/att"""

    run: Positional[Path]  # folder of a run, or a checkpoint file in it
    out: Path | None = None  # folder to write; export/ beside the checkpoint unless given
    format: Literal["onnx", "torch"] = "onnx"  # for onnxruntime and others, or for torch.export.load
    overwrite: bool = False  # replace an export that is there


def as_plain_data(config: object) -> dict:
    """A config as JSON-ready data, for logs and checkpoints."""
    return {name: _plain(value) for name, value in dataclasses.asdict(config).items()}


def _plain(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
