"""The plan of `make results`: which data, features, runs and scores the tables of docs/results.md are made of.

A group is a table; a row of it is a run, or a way to caption with runs. From the rows follow the steps: commands of
Kantu, as a user types them in the work folder. To try something else, add a row to a group.

Not in the plan, since no flag does it: tanh on the first states of a decoder, dropout on the words that are read,
gradients clipped by their norm, and one decoder of both languages with a language token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from captioning.decoders import DECODERS

BEAMS = (1, 3, 5)
COMPARED_BEAM = 3  # rows are compared by these captions
LANGUAGES = {"zh": "Chinese", "en": "English"}
TRAIN = "--preview-photos 0"  # flags of every run: pictures cost time

DATA = {  # data/f8k-NAME -> flags of python -m preprocess, in which flickr8k is the folder of Flickr8k
    "zh": "--train flickr8k/caption_train_annotations_zh.json flickr8k/images "
    "--val flickr8k/caption_val_annotations_zh.json flickr8k/images",
    "en": "--karpathy flickr8k/dataset_flickr8k.json flickr8k/images",
}
for language, (fewer, more) in {"zh": (5, 1), "en": (10, 2)}.items():  # occurrences of a word; the defaults are 2 and 5
    for count in (fewer, more):
        DATA[f"{language}-min{count}"] = f"{DATA[language]} --min-count {count}"


class Features(NamedTuple):
    """A feature file, data/NAME.h5, of the photos of both languages."""

    encoder: str
    weights: str  # file in the folder of weights; without that folder, the published ones
    image_size: int  # pixels
    view: str = "whole"


MOBILENET = "mobilenet_v2", "mobilenet_v2_imagenet.pth"
LITE2 = "timm/tf_efficientnet_lite2", "tf_efficientnet_lite2_imagenet.pth"
FEATURES = {
    "mobilenet-256": Features(*MOBILENET, 256),
    "lite2-256": Features(*LITE2, 256),
    "lite2-384": Features(*LITE2, 384),
    "lite2-256.flip": Features(*LITE2, 256, "flip"),
    "lite2-256.crop1": Features(*LITE2, 256, "crop:1"),
    "lite2-256.flip+crop2": Features(*LITE2, 256, "flip+crop:2"),
}
BEST_FEATURES = ("lite2-384",)
VIEWS = {  # heading -> feature files
    "1 view": ("lite2-256",),
    "2 views: mirrored": ("lite2-256", "lite2-256.flip"),
    "4 views": tuple(name for name in FEATURES if name.startswith("lite2-256")),
}

BEST = "--recipe best"
BEST_CIDER = "--recipe best-cider"
# Flags of the runs with views are not those of the recipe, which may change, and fewer pixels cost less time
VIEWS_CIDER = "--objective cider --batch-size 100 --learning-rate 1e-4 --schedule cosine --ema-decay 0.995 --epochs 3"
LIVE = "--fine-tune --unfreeze-from blocks.5 --flip --crop 0.8 --ema-decay 0.999"
LIVE += " --learning-rate 2e-4 --lr-decay 0.5 --lr-decay-every 1 --epochs 3"
LIVE_CIDER = f"{VIEWS_CIDER} --fine-tune --unfreeze-from blocks.6 --flip --crop 0.8 --encoder-learning-rate 2e-5"
LARGE_BATCH = "--batch-size 512 --learning-rate 3.2e-3 --warmup-epochs 1"


class Run(NamedTuple):
    """A training: checkpoints/NAME."""

    name: str
    data: str  # a name in DATA
    flags: str  # of train.py
    features: tuple[str, ...] = BEST_FEATURES  # names in FEATURES; none with --fine-tune
    starts_from: Run | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table: the captions of a run."""

    label: str
    run: Run
    search: str = ""  # flags of generate.py, but --beam-size; a row with some needs a name
    name: str = ""  # that of the run unless given
    ensemble: tuple[Run, ...] = ()  # further runs
    beams: tuple[int, ...] = BEAMS
    against: str = ""  # name of the row that this one is compared to
    seeds_of: str = ""  # what rows of different seeds are runs of: their mean is a row, too

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.run.name)

    @property
    def language(self) -> str:
        """A name in LANGUAGES."""
        return self.run.data[:2]

    @property
    def calibrated(self) -> bool:
        """Whether its captions are chosen by the calibration of its run."""
        return "--choose" in self.search


class Step(NamedTuple):
    """A command that makes files."""

    name: str
    command: str  # as a user types it in the work folder
    outputs: tuple[str, ...]  # files and folders in the work folder
    needs: tuple[str, ...] = ()  # names of steps
    resume: str = ""  # what continues an interrupted command, if not the command itself


# ---- the groups


def best_run(language: str, seed: int = 0) -> Run:
    """A run of the best recipe."""
    return Run(f"{language}-best" + f"-{seed}" * bool(seed), language, BEST + f" --seed {seed}" * bool(seed))


def cider_run(run: Run, flags: str = BEST_CIDER) -> Run:
    """CIDEr optimisation of a run, with its data and features."""
    return run._replace(name=f"{run.name}-cider", flags=flags, starts_from=run)


def encoders() -> Iterator[Row]:
    """The same decoder on the cells of different encoders."""
    for language in LANGUAGES:
        first = ""
        for features in ("mobilenet-256", "lite2-256", "lite2-384"):
            encoder = FEATURES[features]
            run = Run(f"{language}-{features}", language, f"{LARGE_BATCH} --epochs 6", (features,))
            yield Row(f"`{encoder.encoder}`, {encoder.image_size} px", run, against=first)
            first = first or run.name


def views() -> Iterator[Row]:
    """Mirrored and cropped views of the photos, cached or through the live CNN, and CIDEr optimisation on them."""
    for language in LANGUAGES:
        base = Run(f"{language}-view1", language, f"{LARGE_BATCH} --epochs 10", VIEWS["1 view"])
        base_cider = cider_run(base, VIEWS_CIDER)
        for label, features in VIEWS.items():
            run = base._replace(name=f"{language}-view{len(features)}", features=features)
            yield Row(label, run, against="" if run == base else base.name)
            cider = cider_run(run, VIEWS_CIDER)
            yield Row(f"{label}, CIDEr-optimised", cider, against=run.name if run == base else base_cider.name)
        live = Run(f"{base.name}-live", language, LIVE, (), starts_from=base)
        yield Row("1 view, fine-tuned with the live CNN", live, against=base.name)
        yield Row("that run, CIDEr-optimised with it", cider_run(live, LIVE_CIDER), against=base_cider.name)


def decoders() -> Iterator[Row]:
    """Every decoder, trained as its authors say."""
    for language in LANGUAGES:
        for decoder in ("attention", *(name for name in DECODERS if name != "attention")):
            run = Run(f"{language}-{decoder}", language, f"--decoder {decoder} --epochs 10")
            against = "" if decoder == "attention" else f"{language}-attention"
            yield Row(decoder, run, against=against)
            # after the batches and rates that CIDEr optimisation has for every decoder
            cider = cider_run(run, f"{BEST_CIDER} --decoder {decoder}")
            yield Row(f"{decoder}, CIDEr-optimised", cider, against=run.name)


def best() -> Iterator[Row]:
    """The recipe, its seeds, and ensembles of them."""
    for language in LANGUAGES:
        runs = [best_run(language, seed) for seed in (0, 1, 2)]
        ciders = [cider_run(run) for run in runs]
        for what, members in (("`--recipe best`", runs), ("then `--recipe best-cider`", ciders)):
            for seed, run in enumerate(members):
                yield Row(f"{what}, seed {seed}", run, seeds_of=what)
            yield Row(
                f"{what}, ensemble of {len(members)}",
                members[0],
                name=f"{members[0].name}-ensemble",
                ensemble=tuple(members[1:]),
                against=members[0].name,
            )


EFFECTS = {  # name -> flags that change one thing in the recipe
    "embedding-256": "--embedding-size 256",
    "constant-rate": "--lr-decay 1",
    "cosine": "--schedule cosine",
    "batch-100": "--batch-size 100 --learning-rate 4e-4 --warmup-epochs 0",
    "no-warmup": "--warmup-epochs 0",
    "dropout-0.3": "--dropout 0.3",
    "dropout-0.7": "--dropout 0.7",
    "feature-dropout": "--feature-dropout 0.2",
    "no-clipping": "--grad-clip 0",
    "no-coverage": "--alpha-c 0",
    "ema": "--ema-decay 0.99",
    "label-smoothing": "--label-smoothing 0.1",
    "weight-decay": "--weight-decay 0.01",
    "tied": "--tie-embeddings",
    "scheduled-sampling": "--scheduled-sampling 0.25",
    "positions": "--positions learnt",
    # a plain prototype, as far as flags make it, for as many epochs as it had
    "prototype": "--embedding-size 256 --lr-decay 1 --batch-size 100 --learning-rate 4e-4 --warmup-epochs 0 --epochs 6",
}
SEARCHES = {  # name -> flags of generate.py, and beam sizes
    "mean-log-probability": ("--length-penalty 1", (3, 5)),
    "consensus": ("--choose consensus", (3, 5)),
}


def effects() -> Iterator[Row]:
    """The recipe with one change at a time; the encoder and the views are in groups of their own."""
    for language in LANGUAGES:
        base = best_run(language)
        yield Row("`--recipe best`", base)
        for name, flags in EFFECTS.items():
            run = Run(f"{base.name}-{name}", language, f"{BEST} {flags}")
            yield Row(f"`{flags}`", run, against=base.name)
        for data in (data for data in DATA if data.startswith(f"{language}-")):
            count = data.rpartition("min")[2]
            yield Row(f"`--min-count {count}`", Run(f"{base.name}-min{count}", data, BEST), against=base.name)
        for name, (search, beams) in SEARCHES.items():
            yield Row(f"`{search}`", base, search, f"{base.name}-{name}", beams=beams, against=base.name)
        prototype = Run(f"{base.name}-prototype", language, f"{BEST} {EFFECTS['prototype']}")
        search, beams = SEARCHES["mean-log-probability"]
        label = "the row of a plain prototype, `--length-penalty 1`"
        yield Row(label, prototype, search, f"{prototype.name}-mean", beams=beams, against=prototype.name)


GROUPS = {  # name -> title of the table, its rows
    "encoders": ("Encoders", list(encoders())),
    "views": ("Views, and the live CNN", list(views())),
    "decoders": ("Decoders", list(decoders())),
    "best": ("The best recipe", list(best())),
    "effects": ("One change at a time", list(effects())),
}


# ---- the steps


def plan_steps(has_weights: bool) -> dict[str, Step]:
    """All steps by their names, each after those that it needs.

    has_weights: the work folder has a folder `weights`; else the encoders' published weights are used.
    """
    steps: dict[str, Step] = {}
    for row in (row for _, group in GROUPS.values() for row in group):
        for step in (*_training_steps(row, has_weights), *_scoring_steps(row)):
            _add(steps, step)
        if row.against:
            _add(steps, _comparison_step(row))
    return steps


def steps_of(row: Row) -> list[str]:
    """The names of the steps that give a row its figures."""
    compared = [comparison_name(row)] if row.against else []
    return [row.run.name, *(score_name(row.name, beam) for beam in row.beams), *compared]


def comparison_name(row: Row) -> str:
    """The name of the step that compares a row with another one."""
    return f"{row.name}-against-{row.against}"


def score_name(row: str, beam: int) -> str:
    """The name of the step that captions and scores a row with a beam size."""
    return f"{row}-beam{beam}"


def _add(steps: dict[str, Step], step: Step) -> None:
    assert all(need in steps for need in step.needs), f"{step.name} comes before what it needs"
    assert steps.setdefault(step.name, step) == step, f"two steps are called {step.name}"


def _training_steps(row: Row, has_weights: bool) -> Iterator[Step]:
    """The steps of the runs that a row needs, and of what they need."""
    runs = [row.run, *row.ensemble]
    for run in runs:
        yield from _run_steps(run, has_weights)
    if row.calibrated:
        yield _calibration_step(row.run)


def _run_steps(run: Run, has_weights: bool) -> Iterator[Step]:
    if run.starts_from:
        yield from _run_steps(run.starts_from, has_weights)
    yield Step(
        data := f"data-{run.data}", f"python -m preprocess data/f8k-{run.data} {DATA[run.data]}", _data(run.data)
    )
    yield Step("data-zh", f"python -m preprocess data/f8k-zh {DATA['zh']}", _data("zh"))  # whose photos are extracted
    for name in run.features:
        yield _feature_step(name, has_weights)
    words = ["python train.py", f"data/f8k-{run.data}", "--run", run.name]
    words += ["--start-from", f"checkpoints/{run.starts_from.name}"] if run.starts_from else []
    words += [run.flags, TRAIN, *_features_flag(run)]
    needs = [data, *map(feature_step_name, run.features), *([run.starts_from.name] if run.starts_from else [])]
    folder = f"checkpoints/{run.name}"
    yield Step(run.name, " ".join(words), (f"{folder}/best.pt", folder), tuple(needs), resume="--resume")


def _data(name: str) -> tuple[str, ...]:
    folder = f"data/f8k-{name}"
    return f"{folder}/vocab.json", folder


def feature_step_name(name: str) -> str:
    """The name of the step that extracts a name in FEATURES."""
    return f"features-{name}"


def _feature_step(name: str, has_weights: bool) -> Step:
    features = FEATURES[name]
    words = ["python extract_features.py data/f8k-zh --encoder", features.encoder]
    words += ["--weights", f"weights/{features.weights}"] if has_weights else []
    words += ["--image-size", str(features.image_size), "--grid native"]
    words += ["--view", features.view] if features.view != "whole" else []
    words += ["--out", file := feature_file(name)]
    encoder = file.removesuffix(".h5") + ".encoder.pt"
    return Step(feature_step_name(name), " ".join(words), (file, encoder), ("data-zh",))


def feature_file(name: str) -> str:
    """The file of a name in FEATURES."""
    return f"data/{name}.h5"


def _features_flag(run: Run) -> list[str]:
    return ["--features", *map(feature_file, run.features)] if run.features else []


def _calibration_step(run: Run) -> Step:
    command = f"python -m captioning.calibrate checkpoints/{run.name} --data data/f8k-{run.data}"
    words = [command, "--beam-size 3", *_features_flag(run)]
    return Step(f"{run.name}-calibration", " ".join(words), (), (run.name,))  # best.pt is an output of the run


def _scoring_steps(row: Row) -> Iterable[Step]:
    for beam in row.beams:
        name = score_name(row.name, beam)
        words = [f"python generate.py checkpoints/{row.run.name} --data data/f8k-{row.run.data} --split val"]
        words += _features_flag(row.run._replace(features=row.run.features[:1]))  # the whole photos
        words += ["--ensemble", *(f"checkpoints/{run.name}" for run in row.ensemble)] if row.ensemble else []
        words += [f"--beam-size {beam}", *filter(None, [row.search])]
        captions, scores = f"captions/{name}.json", f"scores/{name}.json"
        words += ["--json", captions, "--scores", scores]
        needs = [row.run.name, *(run.name for run in row.ensemble)]
        needs += [f"{row.run.name}-calibration"] if row.calibrated else []
        yield Step(name, " ".join(words), (captions, scores), tuple(needs))


def _comparison_step(row: Row) -> Step:
    """The captions of a row compared with those of the row that it is against, photo by photo."""
    name = comparison_name(row)
    needs = tuple(score_name(found, COMPARED_BEAM) for found in (row.against, row.name))
    files = " ".join(f"captions/{need}.json" for need in needs)
    out = f"scores/{name}.json"
    command = f"python generate.py --score {files} --references data/f8k-{row.language} --scores {out}"
    return Step(name, command, (out,), needs)
