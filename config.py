"""The settings of every command: one dataclass per command, from which captioning/runtime/command_line.py makes flags.

The comment of a field is its help text and gives its unit. `__post_init__` checks the values before anything is read or
written; its messages name the flags. A default is defined here and nowhere else.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from captioning.encoders.views import WHOLE, View, first_views
from captioning.errors import UserError
from captioning.runtime.command_line import DASHBOARD_URL
from captioning.runtime.settings import check, check_fractions, check_min, flag, non_default
from captioning.search.options import SearchOptions
from captioning.training.options import TrainingOptions
from captioning.viewing.run_summaries import COLUMNS
from preprocess import TOKENIZERS
from preprocess.languages import LANGUAGES

if TYPE_CHECKING:
    TokenizerName = LanguageName = ColumnName = str
else:  # the command line offers what is registered
    TokenizerName = Literal[tuple(TOKENIZERS)]
    LanguageName = Literal[tuple(LANGUAGES)]
    ColumnName = Literal[tuple(COLUMNS)]


@dataclass(frozen=True)
class Preprocess:
    """Stage 1a: annotation files -> data/NAME/captions.jsonl and vocab.json.

    python -m preprocess data/aic --train ANN.json IMAGES --val ANN.json IMAGES
    python -m preprocess data/coco --karpathy dataset_coco.json IMAGES
    python -m preprocess data/flickr8k --source flickr8k
    python -m preprocess data/scenes --scenes 2000 --language zh
    python -m preprocess data/aic --check --features features.h5
    """

    data: Positional[Path]  # folder to write, such as data/aic
    train: tuple[Path, Path] | None = None  # annotation file in any form of docs/data.md, and image folder
    val: tuple[Path, Path] | None = None  # the same for the validation split; --val-share of train unless given
    test: tuple[Path, Path] | None = None  # the same for the test split
    karpathy: tuple[Path, Path] | None = None  # annotation file with the Karpathy splits, and image folder
    # folder of a data set, annotation file, tar or Parquet in any form of docs/data.md, with the splits that it names
    source: Path | None = None
    images: Path | None = None  # with --source: image folder; looked for beside the annotations unless given
    image_column: str | None = None  # of tables and JSON rows; found by its name unless given
    caption_column: str | None = None  # of tables and JSON rows; found by its name unless given
    val_share: float = 0.1  # fraction of the photos without a split that become val, by a hash of their ids
    test_share: float = 0.0  # fraction of the photos without a split that become test, by a hash of their ids
    scenes: int | None = None  # draw this many scenes with captions instead of reading annotations
    # with --scenes: one or two shapes; or one to four, with relations, counts and held-out combinations (docs/truth.md)
    scene_set: Literal["simple", "relations"] = "simple"
    # of the captions; seen from their script unless given (with --scenes: zh)
    language: LanguageName | None = None
    # splits captions into words; unless given jieba (zh), fugashi (ja), pythainlp (th) or whitespace, which also keeps
    # the words of a Chinese, Japanese or Thai file that is cut by spaces
    tokenizer: TokenizerName | None = None
    user_dict: Path | None = None  # words that jieba must know: a word a line, and its frequency if that is known
    min_count: int | None = None  # occurrences in train that a word of the vocabulary needs (zh: 2, others: 5)
    max_words: int = 10_000  # size of the vocabulary at most, without the four special words
    allow_missing: float = 0.01  # fraction of photos that may be missing on disk, and of captions that may be unusable
    workers: int = os.cpu_count() or 1  # processes that tokenize captions
    seed: int = 0  # of the drawn scenes
    overwrite: bool = False  # replace captions made with other settings
    check: bool = False  # look for what is wrong in the captions and photos of a folder made before: DATA/check.html
    features: Path | None = None  # with --check: a feature file, or the name of one in the folder, to check photos too

    def __post_init__(self) -> None:
        sources = [self.source, self.train, self.karpathy, self.scenes]
        if self.features and not self.check:
            raise UserError("--features requires --check")
        if self.check:
            excluded = non_default(self, *(vars(self).keys() - {"data", "check", "features", "allow_missing"}))
            if excluded:
                raise UserError(f"--check reads a folder made before: leave out {excluded[0]}")
        if not self.check and sum(source is not None for source in sources) != 1:
            raise UserError(
                "give exactly one of --source PATH, --train FILE IMAGES, --karpathy JSON IMAGES, --scenes N"
            )
        if (self.val or self.test) and not self.train:
            raise UserError("--val and --test require --train FILE IMAGES")
        if self.images and not self.source:
            raise UserError("--images requires --source PATH; the other flags take the image folder after the file")
        if non_default(self, "scene_set") and not self.scenes:
            raise UserError("--scene-set requires --scenes")
        if self.scenes and self.language not in (None, "zh", "en"):
            raise UserError(f"--language {self.language}: scenes are captioned in zh and en; give one of them")
        if (self.test and self.test_share) or self.val_share + self.test_share >= 1:
            raise UserError("--test-share cannot be combined with --test, and with --val-share must stay below 1")
        check_min(self, 10, "scenes")
        check_min(self, 1, "min_count", "max_words", "workers")
        check_fractions(self, "allow_missing", "val_share", "test_share")


@dataclass(frozen=True)
class ExtractFeatures:
    """Stage 1b: photos -> data/NAME/features.h5, by a frozen CNN. Resumes an interrupted extraction.

    python extract_features.py data/aic

    Settings that are not given are those of the feature file, if there is one.
    """

    data: Positional[Path]  # folder made by python -m preprocess
    # torchvision classifier (resnet101), NAME.LAYER to end earlier, such as resnet18.layer3; or timm/NAME
    encoder: str | None = None
    # a state-dict file, random, or a run in checkpoints/; else those of the library (imagenet; timm: pretrained)
    weights: str | None = None
    image_size: int | None = None  # pixels (256, timm: of the weights); photos are resized to this square
    # (14) store 14x14 cells, or the CNN's own grid (smaller; training is the same)
    grid: Literal["14", "native"] | None = None
    # what --decoder lstm reads: the mean of the cells (unless given), or the class token or attention pooling
    pooled: Literal["mean", "class"] | None = None
    # (float16) of the stored features; uint8: half the size of float16, with a relative error of 0.2 to 1 %
    dtype: Literal["float16", "float32", "uint8"] | None = None
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the CNN's arithmetic
    batch_size: int = 32  # photos
    workers: int = os.cpu_count() or 1  # processes that decode photos
    scaled_decoding: bool = False  # decode large JPEGs at a reduced size: faster; features differ slightly
    nvjpeg: bool = False  # decode JPEGs on the GPU: faster with few CPU cores; features differ slightly
    compile: bool = False  # compile the CNN with torch.compile: takes minutes, worthwhile for many photos
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    # of the photos, in a file of its own: whole, flip (mirrored), crop:N or flip+crop:N; crops keep 0.8 to 1 of a side
    view: str = "whole"
    # write this many views at once: whole, flip, crop:1, flip+crop:2, crop:3, ...; a photo is decoded once for all
    views: int = 1
    # such as 1/4: the first quarter of the photos, in features.part1of4.h5 unless --out is given
    part: str | None = None
    missing_only: bool = False  # with --out: extract the photos that no other file beside features.h5 or --out holds
    out: Path | None = None  # file to write; data/NAME/features.h5, for a view features.flip.h5, unless given
    photo_hash: bool = False  # tell a changed photo by a hash, not by its time: reads all files once more
    allow_missing: float = 0.01  # fraction of photos that may be missing or unreadable
    overwrite: bool = False  # replace features made with other settings
    info: bool = False  # extract nothing: describe the feature file
    verify: bool = False  # extract nothing: search the file for damaged rows, and recompute some rows to compare

    def __post_init__(self) -> None:
        if self.info and self.verify:
            raise UserError("--info describes the file and --verify checks it: give one of them")
        if self.nvjpeg and self.scaled_decoding:
            raise UserError("--scaled-decoding cannot be combined with --nvjpeg, which decodes JPEGs at full size")
        if self.overwrite and (self.info or self.verify):
            raise UserError("--overwrite cannot be combined with --info or --verify, which extract nothing")
        check_min(self, 32, "image_size")
        check_min(self, 1, "batch_size", "views")
        check_min(self, 0, "workers")
        check_fractions(self, "allow_missing")
        if View.parse(self.view) != WHOLE and self.views > 1:
            raise UserError(f"--views {self.views} names the views itself: leave out --view {self.view}")
        if self.part:
            number, parts = self.part_of_parts
            check(1 <= number <= parts, "--part", self.part, "a number and how many parts there are, such as 1/4")
        if self.missing_only and (not self.out or self.views > 1):
            raise UserError("--missing-only needs --out FILE, the file of these photos, and no --views")
        if self.nvjpeg and (self.views > 1 or self.view != "whole"):
            raise UserError("--nvjpeg decodes whole photos only: leave it out with --view and --views")

    @property
    def part_of_parts(self) -> tuple[int, int]:
        """The number of the part, from 1, and how many there are: (1, 1) without --part; (0, 0) if it is nonsense."""
        numbers = (self.part or "1/1").split("/")
        valid = len(numbers) == 2 and all(number.isascii() and number.isdigit() for number in numbers)
        return (int(numbers[0]), int(numbers[1])) if valid else (0, 0)

    @property
    def files(self) -> dict[View, Path]:
        """The feature file of each view."""
        number, parts = self.part_of_parts
        whole = self.data / ("features.h5" if parts == 1 else f"features.part{number}of{parts}.h5")
        if self.views > 1:
            return {view: view.file(self.out or whole) for view in first_views(self.views)}
        view = View.parse(self.view)
        return {view: self.out or view.file(whole)}

    @property
    def file(self) -> Path:
        """The feature file, of the first view if there are several."""
        return next(iter(self.files.values()))


@dataclass(frozen=True)
class Train(TrainingOptions):
    """Stage 2: train a decoder on cached features, or with --fine-tune decoder and encoder on the photos.

    python train.py data/aic --run att
    """

    data: Positional[Path]  # folder made by python -m preprocess


@dataclass(frozen=True)
class Generate:
    """Caption photos, folders and splits; score captions; draw attention.

    python generate.py checkpoints/att photo.jpg folder/
    python generate.py checkpoints/att --data data/aic --split test --scores scores.json
    python generate.py --score captions.json --references data/aic
    """

    run: Positional[Path | None] = None  # folder of a run, or a checkpoint file in it
    photos: Positional[tuple[Path, ...]] = ()  # photos, and folders of photos
    # with photos: take their ids from this file: COCO's image_info_test2017.json, or an annotation file in its form
    image_info: Path | None = None
    data: Path | None = None  # folder made by python -m preprocess: caption a split of it
    split: Literal["train", "val", "test"] = "val"  # of --data, and of --references data/NAME
    features: tuple[Path, ...] = ()  # with --data: cached features; data/NAME/features.h5, if it exists, unless given
    limit: int = 0  # with --data: caption only this many photos, the first of the split; 0 is all
    search: OmitArgPrefixes[SearchOptions] = SearchOptions()  # how captions are searched for or sampled
    ensemble: tuple[Path, ...] = ()  # further runs, same vocabulary and encoder: average the word probabilities of all
    # average the log-probabilities of words over this many views of a photo: whole, flip, crop:1, flip+crop:2, ...
    views: int = 1
    seed: int = 0  # of sampled captions
    # with a run calibrated by python -m captioning.calibrate: compute the probability of captions and the evidence of
    # their words, which takes twice as long as the search itself
    trust: bool = True
    sort: Literal["none", "least-certain"] = "none"  # least-certain: captions of low probability first
    min_probability: float = 0.0  # leave out captions of a lower probability
    # with a run of --decoder hard-attention: the context is the mean of the cells, weighted by attention, or one cell
    hard: Literal["expectation", "argmax"] = "expectation"
    json: Path | None = None  # write the captions to this file, in the COCO results format
    submission: Path | None = None  # write the captions to this file, in the AI Challenger format (Chinese)
    csv: Path | None = None  # write a table to this file: captions, log-probabilities and, with references, scores
    html: Path | None = None  # write a page that opens offline: photos, captions, references and attention
    pictures: Path | None = None  # draw the attention of each word over each photo, one file per photo in this folder
    view: Literal["smooth", "grid"] = "smooth"  # with --pictures: interpolate the attention, or show its cells
    animate: bool = False  # with --pictures: GIFs that show one word after the other, instead of PNGs
    score: tuple[Path, ...] = ()  # caption nothing: score this file of captions from any source; compare two files
    references: Path | None = None  # with --score: data/NAME, or an annotation file
    # with --score: splits the captions and those of an annotation file into words; see python -m preprocess --help
    tokenizer: TokenizerName | None = None
    user_dict: Path | None = None  # with --score and an annotation file: words that jieba must know; see there, too
    scores: Path | None = None  # write BLEU, ROUGE-L, CIDEr-D, METEOR and SPICE to this file (needs references)
    extremes: Path | None = None  # write a page of the 50 worst and 50 best captions by CIDEr-D (needs references)
    batch_size: int = 32  # photos captioned at once
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the arithmetic
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    cuda_graphs: bool = True  # on a GPU: run the steps of a search as CUDA graphs
    workers: int = os.cpu_count() or 1  # processes that decode photos
    allow_missing: float = 0.01  # fraction of photos that may be missing or unreadable

    def __post_init__(self) -> None:
        if self.score:
            self._check_score()
        elif not self.run or bool(self.photos) == bool(self.data):
            raise UserError("give a run, and photos or folders to caption, or --data data/NAME; or --score FILE")
        required = {
            "references": "score",
            "tokenizer": "score",
            "user_dict": "score",
            "features": "data",
            "view": "pictures",
            "animate": "pictures",
        }
        for name, other in required.items():
            if non_default(self, name) and not getattr(self, other):
                raise UserError(f"{flag(name)} requires {flag(other)}")
        if self.image_info and not self.photos:
            raise UserError("--image-info gives ids to photos and folders: data sets and results files have their own")
        if (self.scores or self.extremes) and not (self.data or self.score):
            raise UserError("--scores and --extremes require --data data/NAME, or --score FILE --references FILE")
        check_min(self, 1, "batch_size", "views")
        check_min(self, 0, "limit", "workers")
        check(0 <= self.seed < 2**63, "--seed", self.seed, "between 0 and 2^63 - 1")
        check_fractions(self, "allow_missing", "min_probability")

    def _check_score(self) -> None:
        """The settings that --score excludes, and those that it needs."""
        if not self.references or len(self.score) > 2:
            raise UserError("--score needs one file of captions, or two to compare, and --references FILE or data/NAME")
        if self.run:
            raise UserError("--score captions nothing: leave out the run")
        captioning = non_default(self, "data", "json", "submission", "html", "pictures", "ensemble", "views")
        captioning += non_default(self, "trust", "sort", "min_probability")
        captioning += non_default(self.search, *vars(self.search))
        if captioning:
            raise UserError(f"--score captions nothing: leave out {captioning[0]}")
        if len(self.score) == 2 and (self.csv or self.extremes):
            raise UserError("--csv and --extremes describe one file: give one file to --score")


@dataclass(frozen=True)
class Calibrate:
    """Fit how probable it is that a run's captions are good, on val: python -m captioning.calibrate checkpoints/att

    The calibration becomes part of the checkpoint; generate.py uses it.
    """

    run: Positional[Path]  # folder of a run, or a checkpoint file in it
    data: Path | None = None  # folder made by python -m preprocess; that of the run unless given
    features: tuple[Path, ...] = ()  # cached features; those that the run was trained on unless given
    # people: a caption is good if its CIDEr-D reaches the median of people's captions with the other captions of their
    # photo; or a number: if it reaches this CIDEr-D, times 100
    good: str = "people"
    search: OmitArgPrefixes[SearchOptions] = SearchOptions()  # how captions are searched for; generate.py must agree
    views: int = 1  # of each photo; generate.py must agree
    photos: int = 5000  # validation photos at most; 0 is all
    seed: int = 0  # of sampled captions
    batch_size: int = 32  # photos captioned at once
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the arithmetic
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    workers: int = os.cpu_count() or 1  # processes that decode photos, if there are no cached features
    allow_missing: float = 0.01  # fraction of photos that may be missing or unreadable

    def __post_init__(self) -> None:
        check_min(self, 1, "batch_size", "views")
        check_min(self, 0, "workers", "photos")
        check(0 <= self.seed < 2**63, "--seed", self.seed, "between 0 and 2^63 - 1")
        check_fractions(self, "allow_missing")
        if self.good != "people":
            check(self.good.replace(".", "", 1).isdecimal(), "--good", self.good, "people, or a CIDEr-D times 100")
        fixed = non_default(self.search, "temperature", "num_captions", "choose")
        if fixed:
            raise UserError(f"{fixed[0]}: not allowed here: captions of a beam search are calibrated, for every choice")


@dataclass(frozen=True)
class Truth:
    """How much of what a run says of drawn scenes is true.

    python -m captioning.truth checkpoints/scenes-zh
    python -m captioning.truth checkpoints/ANY --data data/scenes-zh --json truth.json
    """

    run: Positional[Path]  # folder of a run, or a checkpoint file in it
    data: Path | None = None  # folder of drawn scenes; that which the run was trained on unless given
    split: Literal["train", "val", "test"] = "test"  # of its scenes
    search: OmitArgPrefixes[SearchOptions] = SearchOptions()  # how captions are searched for or sampled
    json: Path | None = None  # write the figures to this file
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the arithmetic
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


@dataclass(frozen=True)
class Dashboard:
    """Show runs in the browser: start a visdom server, or send runs to a running one; or write them for TensorBoard.

    python -m captioning.dashboard
    python -m captioning.dashboard --replay checkpoints/att
    python -m captioning.dashboard --compare checkpoints/att checkpoints/show-and-tell
    python -m captioning.dashboard --tensorboard checkpoints/att checkpoints/show-and-tell
    """

    host: str = "127.0.0.1"  # address to listen on; any other makes the pages visible to your network
    port: int = 8097  # to listen on
    folder: Path = Path("checkpoints/visdom")  # where visdom stores its environments
    replay: Path | None = None  # show this run, from its log.jsonl, in the server at --url
    compare: tuple[Path, ...] = ()  # plot these runs together, in the server at --url
    tensorboard: tuple[Path, ...] = ()  # write these runs, from their log.jsonl, as event files in RUN/tensorboard
    url: str = DASHBOARD_URL  # of the server for --replay and --compare
    # of a server with a login, with the password in the environment variable VISDOM_PASSWORD: starts one, or logs in
    user: str | None = None

    def __post_init__(self) -> None:
        check(0 < self.port < 65536, "--port", self.port, "between 1 and 65535")
        if sum(bool(runs) for runs in (self.replay, self.compare, self.tensorboard)) > 1:
            raise UserError(
                "--replay shows one run, --compare several, and --tensorboard writes event files: give one of them"
            )
        if len(self.compare) == 1:
            raise UserError(f"--compare {self.compare[0]}: give two runs or more, or --replay for one")


@dataclass(frozen=True)
class Runs:
    """A table of runs: what each is, its scores, and what differs from the defaults.

    python -m captioning.runs
    python -m captioning.runs --sort seconds --html runs.html
    """

    folders: Positional[tuple[Path, ...]] = (Path("checkpoints"),)  # folders of runs, and runs
    sort: ColumnName = "cider"  # column to sort by: text from a to z, numbers from the largest
    csv: Path | None = None  # write the table to this file, with every number in a column of its own
    html: Path | None = None  # write a page that opens offline: a table that sorts, and the curves of all runs
    plot: Path | None = None  # draw the curves of all runs in this file: .png, .svg or .pdf


@dataclass(frozen=True)
class Export:
    """Export a run for programs that do not have Kantu, or as a folder of web pages.

    python -m captioning.export checkpoints/att
    python -m captioning.export checkpoints/att --format web --out site/
    """

    run: Positional[Path]  # folder of a run, or a checkpoint file in it
    out: Path | None = None  # folder to write; export/ (web: site/) next to the checkpoint unless given
    format: Literal["onnx", "torch", "web"] = "onnx"  # for onnxruntime and others, for torch.export.load, or web pages
    overwrite: bool = False  # replace an existing export
    data: Path | None = None  # web: data folder whose validation photos choose the precision; else that of the run
    max_changed: float = 0.005  # web: fraction of the captions that models of a smaller precision may change

    def __post_init__(self) -> None:
        check_fractions(self, "max_changed")


@dataclass(frozen=True)
class Serve:
    """Show a captioner in the browser, or answer POST /caption.

    python -m captioning.serve site/
    python -m captioning.serve checkpoints/att
    """

    # written by python -m captioning.export checkpoints/RUN --format web; or the folder of a run, or a checkpoint file
    # in it, whose model then runs here. The other options but --host and --port apply to a run
    folder: Positional[Path]
    host: str = "127.0.0.1"  # address to listen on; any other makes the page visible to your network
    port: int = 8000  # to listen on
    search: OmitArgPrefixes[SearchOptions] = SearchOptions(num_captions=5)  # how captions are searched for or sampled
    batch_size: int = 32  # photos captioned at once
    queue: int = 128  # requests accepted at once; further ones are told to try again (503)
    max_megabytes: int = 20  # of a request
    max_megapixels: int = 50  # of a photo
    trust: bool = True  # with a calibrated run: the probability of captions, and the evidence of their words
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the arithmetic
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps

    def __post_init__(self) -> None:
        check(0 < self.port < 65536, "--port", self.port, "between 1 and 65535")
        check_min(self, 1, "batch_size", "queue", "max_megabytes", "max_megapixels")

    def options_of_run(self) -> list[str]:
        """The options given that apply to a run alone."""
        usual = vars(type(self).search)
        search = [flag(name) for name, value in vars(self.search).items() if value != usual[name]]
        limits = non_default(self, "batch_size", "queue", "max_megabytes", "max_megapixels")
        return search + limits + non_default(self, "trust", "precision", "device")


@dataclass(frozen=True)
class Share:
    """Hand a run on: as a folder without pickles, and through a model hub (extra: hub).

    python -m captioning.share pack checkpoints/att att-packed
    python -m captioning.share push att-packed USER/att
    python -m captioning.share pull USER/att att-packed
    """

    # pack: a run becomes a folder of safetensors, JSON and a model card; push, pull: such a folder to and from the hub
    action: Positional[Literal["pack", "push", "pull"]]
    # pack: folder of a run, or a checkpoint file in it; push: packed folder; pull: USER/MODEL
    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    target: Annotated[Positional[str], arg(metavar="TARGET")]  # pack, pull: folder to write; push: USER/MODEL
    photo: Path | None = None  # pack: of the example picture; without it the run's own picture of a validation photo
    # pack: for the model card, a file of generate.py --scores; RUN/scores.json unless given
    scores: Path | None = None
    overwrite: bool = False  # pack: replace a packed run
    private: bool = False  # push: make a model that only you can see

    def __post_init__(self) -> None:
        flags = non_default(self, "photo", "scores", "overwrite") if self.action != "pack" else []
        flags += non_default(self, "private") if self.action != "push" else []
        if flags:
            raise UserError(f"{flags[0]}: not of {self.action}; leave it out")
