"""The tables and pictures of docs/results.md, from the JSON of bench/results/, and that JSON from a work folder.

Each group of bench/results_plan.py has a JSON file, a picture, and a region of the page between two comments. What is
in the region is made of the JSON alone.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results_plan import (
    BEAMS,
    COMPARED_BEAM,
    GROUPS,
    LANGUAGES,
    Row,
    comparison_name,
    feature_file,
    feature_step_name,
    score_name,
)
from results_steps import Workshop

from captioning.evaluation.metrics import METRICS
from captioning.runtime.files import atomic_text, atomic_write, write_errors
from captioning.runtime.log import best_epoch, read_log
from captioning.viewing.run_plots import STYLE

PROTOCOL = "word"
PAGE = Path("docs") / "results.md"
JSON_FOLDER = Path("bench") / "results"
REGION = re.compile(r"(<!-- made by make results: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NOTHING = "*Not made yet.*\n"
PLOT_SIZE = (5.5, 4.0)  # inches
HEADINGS = (
    "",
    "run",
    "BLEU-4",
    "ROUGE-L",
    "CIDEr-D (95 %)",
    "BLEU-4, CIDEr-D with beam size 1",
    "with 5",
    "CIDEr-D gained (95 %), over",
    "epochs, the best",
    "minutes",
    "memory, GB",
    "features, GB",
)


# ---- from a work folder


def collect(group: str, workshop: Workshop) -> dict[str, Any]:
    """What is made of a group, as JSON-ready data: its rows, and the names of the rows that are not made yet."""
    title, rows = GROUPS[group]
    made = [row for row in rows if all(map(workshop.is_made, scored_steps(row)))]
    return {
        "title": title,
        "rows": [_collect_row(row, workshop) for row in made],
        "features": {name: _extraction(name, workshop) for row in made for name in row.run.features},
        "not made": [row.name for row in rows if row not in made],
    }


def scored_steps(row: Row) -> list[str]:
    """The steps without which a row has no figures."""
    return [row.run.name, *(score_name(row.name, beam) for beam in row.beams)]


def _collect_row(row: Row, workshop: Workshop) -> dict[str, Any]:
    record = workshop.record(score_name(row.name, COMPARED_BEAM))
    collected = {
        "label": row.label,
        "name": row.name,
        "language": row.language,
        "seeds of": row.seeds_of,
        "commands": [workshop.steps[name].command for name in scored_steps(row)],
        "commit": record["commit"],
        "machine": record["machine"],
        "made": record["made"],
        "scores": {str(beam): _scores(workshop.folder, score_name(row.name, beam)) for beam in row.beams},
    }
    if row.against and workshop.is_made(name := comparison_name(row)):
        compared = read_json(workshop.folder / "scores" / f"{name}.json")["difference"][PROTOCOL]
        collected["gain"] = {
            metric: [_rounded(found["difference"]), *map(_rounded, found["interval"])]
            for metric, found in compared.items()
        }
        collected["over"] = row.against
    if row.name == row.run.name:  # else nothing was trained for this row
        collected["training"] = _training(row, workshop)
    return collected


def _scores(work: Path, name: str) -> dict[str, list[float]]:
    """Metric -> score, and its 95 % interval."""
    found = read_json(work / "scores" / f"{name}.json")
    intervals = found["intervals"][PROTOCOL]
    return {metric: [_rounded(found[PROTOCOL][metric]), *map(_rounded, intervals[metric])] for metric in METRICS}


def _training(row: Row, workshop: Workshop) -> dict[str, Any]:
    """What the training of a run cost, and its scores after every epoch."""
    events = read_log(workshop.folder / "checkpoints" / row.run.name)
    start = next(event for event in reversed(events) if event["event"] == "start")
    epochs = [event for event in events if event["event"] == "epoch"]
    times = [_seconds(event, start["device"]) for event in epochs]
    files = [workshop.folder / feature_file(name) for name in row.run.features]
    return {
        "starts from": row.run.starts_from.name if row.run.starts_from else None,
        "device": start["device"],
        "precision": start["precision"],
        "torch": start["versions"]["torch"],
        "parameters": start["decoder_parameters"],
        "epochs": len(epochs),
        "best epoch": (best_epoch(events) or epochs[-1])["epoch"],
        "seconds": _rounded(sum(times)),
        "memory": _rounded(max(event["peak_memory_gb"] for event in epochs)),
        "features": _rounded(sum(file.stat().st_size for file in files) / 1e9),
        "curve": {
            "seconds": [_rounded(sum(times[: number + 1])) for number in range(len(epochs))],
            **{name: [_rounded(event[name]) for event in epochs] for name in ("CIDEr-D", "BLEU-4", "val_loss")},
        },
    }


def _extraction(name: str, workshop: Workshop) -> dict[str, float]:
    """What a feature file cost: CPU seconds, and gigabytes."""
    attempts = workshop.record(feature_step_name(name))["attempts"]
    size = (workshop.folder / feature_file(name)).stat().st_size
    return {"cpu seconds": _rounded(sum(cost["cpu_seconds"] for cost in attempts)), "size": _rounded(size / 1e9)}


def _seconds(epoch: Mapping[str, Any], device: str) -> float:
    """What an epoch and its validation took: CPU seconds on a CPU, which other work on the machine does not change."""
    return epoch["cpu_seconds"] if device == "cpu" else epoch["train_seconds"] + epoch["val_seconds"]


def _rounded(number: float) -> float:
    return round(number, 3)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    return json.loads(path.read_text("utf-8"))


# ---- files


def write_page(collected: Mapping[str, dict[str, Any]], folder: Path) -> Path:
    """Write the tables, pictures and JSON of all groups into a folder -> the page."""
    page = folder / "results.md"
    with atomic_text(page) as file:
        for group, found in collected.items():
            file.write(f"## {found['title']}\n\n{render(group, found, Path())}\n")
    for group, found in collected.items():
        write_json(found, folder / f"{group}.json")
        draw(found, folder / picture_name(group))
    return page


def publish(collected: Mapping[str, dict[str, Any]], root: Path) -> list[str]:
    """Write the JSON and pictures of the groups that have rows into the repository, and the regions of the page.

    Returns the paths of what was written. A group without rows stays as it is.
    """
    written = []
    for group, found in collected.items():
        if found["rows"]:
            write_json(found, path := root / JSON_FOLDER / f"{group}.json")
            draw(found, picture := root / PAGE.parent / picture_name(group))
            written += [path, picture]
    page = root / PAGE
    text = fill_regions(page.read_text("utf-8"), root / JSON_FOLDER)
    with atomic_text(page) as file:
        file.write(text)
    return [str(path) for path in (*written, page)]


def write_json(found: dict[str, Any], path: Path) -> None:
    """Write the JSON of a group: a line for each row, so that a difference shows which row has changed."""
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in found["rows"])
    rest = json.dumps({key: value for key, value in found.items() if key != "rows"}, ensure_ascii=False)
    with atomic_text(path) as file:
        file.write(f'{rest[:-1]}, "rows": [\n{rows}\n]}}\n')


def fill_regions(page: str, folder: Path) -> str:
    """The page with its regions made anew from the JSON in a folder."""

    def fill(match: re.Match[str]) -> str:
        path = folder / f"{match[2]}.json"
        text = render(match[2], read_json(path)) if path.exists() else NOTHING
        return f"{match[1]}\n{text}\n{match[4]}"

    return REGION.sub(fill, page)


def picture_name(group: str) -> str:
    """The picture of a group, beside the page."""
    return f"results-{group}.png"


# ---- tables


def render(group: str, found: Mapping[str, Any], folder: Path = JSON_FOLDER) -> str:
    """A group's table and what it is made with, as Markdown. folder: of its JSON, for the reader."""
    if not found["rows"]:
        return NOTHING
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    for language, name in LANGUAGES.items():
        rows = [row for row in found["rows"] if row["language"] == language]
        if rows:
            lines.append(_line([f"**{name}, by word**"]))
            lines += map(_line, _table_rows(rows))
    return "\n\n".join(["\n".join(lines), *_notes(group, found, folder)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join([*cells, *[''] * (len(HEADINGS) - len(cells))])} |"


def _table_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """The cells of each row, and of the mean of rows that differ in their seeds, after the last of them."""
    for number, row in enumerate(rows):
        yield _cells(row)
        family = row["seeds of"]
        if family and all(other["seeds of"] != family for other in rows[number + 1 :]):
            of_family = [other for other in rows if other["seeds of"] == family]
            if len(of_family) > 1:
                yield _mean_cells(family, of_family)


def _cells(row: Mapping[str, Any]) -> list[str]:
    scores = row["scores"]
    shown = scores[str(COMPARED_BEAM)]
    gain = ""
    if "gain" in row:
        gain = "{:+.1f} ({:+.1f} to {:+.1f}), `{}`".format(*row["gain"]["CIDEr-D"], row["over"])
    cells = [row["label"], f"`{row['name']}`", f"{shown['BLEU-4'][0]:.1f}", f"{shown['ROUGE-L'][0]:.1f}"]
    cells.append("{:.1f} ({:.1f} to {:.1f})".format(*shown["CIDEr-D"]))
    cells += [_two_scores(scores.get(str(beam))) for beam in BEAMS if beam != COMPARED_BEAM]
    return [*cells, gain, *_cost_cells(row.get("training"))]


def _two_scores(scores: Mapping[str, Sequence[float]] | None) -> str:
    return f"{scores['BLEU-4'][0]:.1f}, {scores['CIDEr-D'][0]:.1f}" if scores else ""


def _cost_cells(training: Mapping[str, Any] | None) -> list[str]:
    if training is None:
        return []
    return [
        f"{training['epochs']}, {training['best epoch']}",
        f"{training['seconds'] / 60:.0f}",
        f"{training['memory']:.1f}",
        f"{training['features']:.1f}",
    ]


def _mean_cells(family: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Means over seeds, and in brackets the standard deviation of a seed."""

    def mean(beam: int, metric: str) -> str:
        values = [row["scores"][str(beam)][metric][0] for row in rows]
        return f"{statistics.mean(values):.1f} ({statistics.stdev(values):.1f})"

    cells = [f"{family}, mean of {len(rows)} seeds (standard deviation)", ""]
    cells += [mean(COMPARED_BEAM, metric) for metric in ("BLEU-4", "ROUGE-L", "CIDEr-D")]
    others = [beam for beam in BEAMS if beam != COMPARED_BEAM]
    return cells + [f"{mean(beam, 'BLEU-4')}, {mean(beam, 'CIDEr-D')}" for beam in others]


def _notes(group: str, found: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Paragraphs: what the figures are, how they were made, and what is missing."""
    trainings = [row["training"] for row in found["rows"] if "training" in row]
    on_cpu = all(run["device"] == "cpu" for run in trainings)
    yield (
        f"Validation photos, which also chose the epoch (by greedy CIDEr-D); beam size {COMPARED_BEAM} where none is "
        "named; times 100, BLEU without smoothing. Intervals: 1,000 bootstrap resamples of the photos, paired where "
        f"two runs are compared. Minutes: {'CPU time' if on_cpu else 'time'} of the run's own epochs with their "
        "validation, without the run that it starts from."
    )
    yield f"{_made_with(group, found['rows'], trainings)} The commands and all scores are in `{folder / group}.json`."
    if found["features"]:
        costs = [
            f"`{name}` {cost['cpu seconds'] / 60:.0f} CPU minutes, {cost['size']:.1f} GB"
            for name, cost in found["features"].items()
        ]
        yield f"Extraction of the features, once for both languages: {'; '.join(costs)}."
    if found["not made"]:
        yield f"Not made yet: {', '.join(f'`{name}`' for name in found['not made'])}."
    if trainings:
        yield f"![CIDEr-D against training time]({picture_name(group)})"


def _made_with(group: str, rows: Sequence[Mapping[str, Any]], trainings: Sequence[Mapping[str, Any]]) -> str:
    """With which command, when and on what the rows were made."""
    dates = sorted(row["made"][:10] for row in rows)
    setting = [_listed(run[key] for run in trainings) for key in ("device", "precision", "torch")]
    return (
        f"Made by `make results RESULTS_ARGS='--only {group}'` from {dates[0]} to {dates[-1]} on "
        f"{_listed(row['machine'] for row in rows)} ({setting[0]}, {setting[1]}, torch {setting[2]}), commits "
        f"{_listed(row['commit'] for row in rows)}."
    )


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


# ---- the picture


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw greedy CIDEr-D after each epoch against the training time, one plot per language. No file without rows.

    The curve of a run that starts from another one begins where that one's time ends. Raises UserError if the file
    cannot be written.
    """
    rows = {row["name"]: row for row in found["rows"] if "training" in row}
    languages = [language for language in LANGUAGES if any(row["language"] == language for row in rows.values())]
    if not languages:
        return
    with matplotlib.rc_context(STYLE):
        width, height = PLOT_SIZE
        figure = Figure(figsize=(width * len(languages), height), layout="constrained")
        for number, language in enumerate(languages, start=1):
            axes = figure.add_subplot(1, len(languages), number)
            axes.set_title(f"{found['title']}, {LANGUAGES[language]}", fontsize=10)
            axes.set_ylabel("CIDEr-D on val, greedy", fontsize=9)
            _draw_curves(axes, rows, language)
        with write_errors(path), atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=110)


def _draw_curves(axes: Axes, rows: Mapping[str, Any], language: str) -> None:
    colours = matplotlib.colormaps["tab20"].colors
    shown = [row for row in rows.values() if row["language"] == language]
    for number, row in enumerate(shown):
        training = row["training"]
        before = _seconds_before(row, rows)
        minutes = [(before + seconds) / 60 for seconds in training["curve"]["seconds"]]
        axes.plot(
            minutes,
            training["curve"]["CIDEr-D"],
            color=colours[number % len(colours)],
            linestyle="--" if training["starts from"] else "-",
            marker=".",
            linewidth=1.2,
            label=row["name"],
        )
    on_cpu = all(row["training"]["device"] == "cpu" for row in shown)
    axes.set_xlabel("CPU minutes of training and validation" if on_cpu else "minutes of training", fontsize=9)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.legend(fontsize=6, frameon=False, loc="lower right")


def _seconds_before(row: Mapping[str, Any], rows: Mapping[str, Any]) -> float:
    """The training time of the run that a run starts from, and of those before it, as far as they have rows."""
    parent = rows.get(row["training"]["starts from"])
    return parent["training"]["seconds"] + _seconds_before(parent, rows) if parent else 0.0
