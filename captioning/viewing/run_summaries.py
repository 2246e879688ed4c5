"""A run in one row: what it is, its scores, and what differs from the defaults; and tables of such rows.

A run is read from its log.jsonl. Its checkpoint is read only if there is no log.
"""

from __future__ import annotations

import csv
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from captioning.errors import UserError
from captioning.runtime.files import atomic_text, lock_holder
from captioning.runtime.library_errors import reason
from captioning.runtime.log import best_epoch, read_log
from captioning.runtime.packed_run import has_checkpoint
from captioning.runtime.settings import OLD_DEFAULTS, as_flag, as_plain_data
from captioning.training.options import TrainingOptions
from captioning.viewing import NOT_LEARNT
from captioning.viewing.curves import PLOTS, Curve, curves

NOT_COMPARED = NOT_LEARNT | {"decoder", "epochs"}  # these have a column of their own


@dataclass
class RunSummary:
    """A run in one row. None is unknown. Scores are of the best epoch: greedy captions of validation photos."""

    name: str
    decoder: str
    encoder: str  # and the size of its photos in pixels
    views: int  # of the cached photos
    epochs: int  # finished
    of_epochs: int  # --epochs
    best_epoch: int | None = None
    cider: float | None = None
    interval: tuple[float, float] | None = None  # central 95 % of CIDEr-D
    bleu4: float | None = None
    seconds: float | None = None  # per epoch, with validation
    running: bool = False
    settings: str = ""  # data folder, and the flags that differ from the defaults of a CPU
    curves: dict[str, list[Curve]] = field(default_factory=dict)  # plot -> its curves, see captioning.viewing.curves


class Column(NamedTuple):
    """A column of the tables."""

    title: str
    cell: Callable[[RunSummary], str]
    value: Callable[[RunSummary], str | float | None]  # to sort by


COLUMNS = {  # name, as in --sort -> column
    "run": Column("run", lambda run: run.name, lambda run: run.name),
    "decoder": Column("decoder", lambda run: run.decoder, lambda run: run.decoder),
    "encoder": Column("encoder", lambda run: run.encoder, lambda run: run.encoder),
    "views": Column("views", lambda run: str(run.views), lambda run: run.views),
    "epochs": Column("epochs", lambda run: _epochs_cell(run), lambda run: run.epochs),
    "best-epoch": Column("best", lambda run: _number_cell(run.best_epoch, ".0f"), lambda run: run.best_epoch),
    "cider": Column("CIDEr-D (95 %)", lambda run: _score_cell(run), lambda run: run.cider),
    "bleu4": Column("BLEU-4", lambda run: _number_cell(run.bleu4, ".1f"), lambda run: run.bleu4),
    "seconds": Column("s/epoch", lambda run: _number_cell(run.seconds, ".0f"), lambda run: run.seconds),
    "settings": Column("data, and what differs from the defaults", lambda run: run.settings, lambda run: run.settings),
}
CSV_COLUMNS: dict[str, Callable[[RunSummary], object]] = {  # heading -> value; empty if unknown
    "run": lambda run: run.name,
    "decoder": lambda run: run.decoder,
    "encoder": lambda run: run.encoder,
    "views": lambda run: run.views,
    "epochs": lambda run: run.epochs,
    "of epochs": lambda run: run.of_epochs,
    "running": lambda run: run.running,
    "best epoch": lambda run: run.best_epoch,
    "CIDEr-D": lambda run: run.cider,
    "CIDEr-D low": lambda run: run.interval and run.interval[0],
    "CIDEr-D high": lambda run: run.interval and run.interval[1],
    "BLEU-4": lambda run: run.bleu4,
    "seconds per epoch": lambda run: run.seconds,
    "settings": lambda run: run.settings,
}


# ---- reading


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The runs among these folders, and the folders in those that are no run. Raises UserError if one has nothing."""
    found: dict[Path, Path] = {}  # real path -> path
    for path in paths:
        try:
            inside = sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))
        except OSError as error:
            raise UserError(f"{path}: {reason(error)}; give a run, or a folder of runs such as checkpoints") from None
        for folder in [path] if _has_run(path) else inside:
            found.setdefault(folder.resolve(), folder)
    if not found:
        raise UserError(f"{paths[0]}: no runs in it; train one with: python train.py DATA --run NAME")
    return list(found.values())


def _has_run(folder: Path) -> bool:
    return (folder / "log.jsonl").exists() or has_checkpoint(folder)


def read_run(folder: Path, name: str) -> RunSummary:
    """Summarise a run. Raises UserError, in one line, if the folder is no run, or its files are damaged."""
    if not _has_run(folder):
        raise UserError(f"{folder}: not a run: it has no log.jsonl, best.pt or last.pt")
    try:
        if (folder / "log.jsonl").exists():
            return _from_log(folder, name)
        return _from_checkpoint(folder, name)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        cause = f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"{folder}: damaged, or of another version of Kantu ({cause}); left out") from None


def _from_log(folder: Path, name: str) -> RunSummary:
    events = read_log(folder)
    starts = [event for event in events if event["event"] == "start"]
    if not starts:
        raise UserError(f"{folder / 'log.jsonl'}: has no start event yet; left out")
    epochs = [event for event in events if event["event"] == "epoch"]
    summary = _describe(name, starts[-1], len(epochs))
    summary.running = lock_holder(folder / ".lock") is not None
    summary.curves = {title: found for title in PLOTS if (found := curves(events, title))}
    if epochs:
        times = [_number(event.get(key)) for event in epochs for key in ("train_seconds", "val_seconds")]
        summary.seconds = sum(time or 0 for time in times) / len(epochs) or None
        _add_scores(summary, best_epoch(epochs) or epochs[-1])
    return summary


def _add_scores(summary: RunSummary, best: dict) -> None:
    summary.best_epoch = best["epoch"]
    summary.cider = _number(best.get("CIDEr-D"))
    summary.bleu4 = _number(best.get("BLEU-4"))
    low, high = best.get("intervals", {}).get("CIDEr-D", (None, None))  # absent in older logs
    if _number(low) is not None and _number(high) is not None:
        summary.interval = (low, high)


def _from_checkpoint(folder: Path, name: str) -> RunSummary:
    from captioning.runtime.checkpoint import load_checkpoint  # not above: imports torch

    checkpoint = load_checkpoint(folder)
    progress = checkpoint["progress"]
    summary = _describe(name, checkpoint, progress["epoch"])
    if (folder / "best.pt").exists():
        summary.best_epoch = progress["epoch"]  # best.pt is written at the end of its epoch
    best = _number(progress["best"])
    if checkpoint["config"]["best_metric"] == "cider":
        summary.cider = best
    elif checkpoint["config"]["best_metric"] == "bleu4":
        summary.bleu4 = best
    return summary


def _describe(name: str, start: dict, epochs: int) -> RunSummary:
    """What a start event, and a checkpoint, say of a run."""
    config, encoder = start["config"], start["encoder"]
    return RunSummary(
        name=name,
        decoder=str(config["decoder"]),
        encoder=f"{encoder['name']} {encoder['transform']['image_size']}",
        views=len(start.get("views", ["whole"])) or 1,  # absent in older runs; with --fine-tune there are none
        epochs=epochs,
        of_epochs=int(config["epochs"]),
        settings=" ".join(_differences(config)),
    )


def _differences(config: dict) -> Iterator[str]:
    """The data folder, and the flags that make these settings of the defaults of a CPU.

    Defaults that depend on the decoder and the method are resolved as train.py does. A setting of None is a default.
    """
    method = {name: config[name] for name in ("decoder", "objective", "fine_tune", "start_from")}
    defaults = as_plain_data(TrainingOptions(data=Path(), run="run", **method).for_device("cpu"))
    defaults |= {name: getattr(TrainingOptions, name) for name in method}
    yield str(config["data"])
    for name, default in defaults.items():
        value = config.get(name)
        was_default = default is None and value == OLD_DEFAULTS.get(name)
        if name not in NOT_COMPARED and value not in (None, default) and not was_default:
            yield from as_flag(name, value)


def _number(value: object) -> float | None:
    """A finite number, or None."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


# ---- tables


def sort_runs(runs: Sequence[RunSummary], column: str) -> list[RunSummary]:
    """Sort text from a to z, and numbers from the largest; runs without a value come last."""
    value = COLUMNS[column].value
    known = [run for run in runs if value(run) is not None]
    descending = bool(known) and not isinstance(value(known[0]), str)
    known.sort(key=value, reverse=descending)  # type: ignore[arg-type]
    return known + [run for run in runs if value(run) is None]


def format_table(runs: Sequence[RunSummary]) -> list[str]:
    """The lines of a table for a terminal."""
    rows = [[column.title for column in COLUMNS.values()]]
    rows += [[column.cell(run) for column in COLUMNS.values()] for run in runs]
    widths = [max(map(_width, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def write_csv(runs: Sequence[RunSummary], path: Path) -> None:
    """Write a table for a spreadsheet. Raises UserError if it cannot be written."""
    with atomic_text(path) as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        writer.writerows([value(run) for value in CSV_COLUMNS.values()] for run in runs)


def notes(runs: Sequence[RunSummary]) -> list[str]:
    """What the scores of these runs are, and how to get the intervals that they lack."""
    lines = ["scores: greedy captions of the validation photos, after the best epoch; numbers times 100"]
    without = [run.name for run in runs if run.cider is not None and run.interval is None]
    if without:
        names = ", ".join(without[:3]) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
        lines.append(
            f"no interval in the log of {names}; of the captions of beam search, "
            "python generate.py RUN --data DATA --scores scores.json computes one"
        )
    return lines


def _epochs_cell(run: RunSummary) -> str:
    return f"{run.epochs}/{run.of_epochs}" + (" running" if run.running else "")


def _score_cell(run: RunSummary) -> str:
    if run.cider is None or run.interval is None:
        return _number_cell(run.cider, ".1f")
    return "{:.1f} ({:.1f}-{:.1f})".format(run.cider, *run.interval)


def _number_cell(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def _width(text: str) -> int:
    """Columns of a terminal; Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
