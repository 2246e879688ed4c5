"""The curves of several runs in one figure, as a picture or in a page that opens offline.

matplotlib draws without a display. In the page, the figure is an SVG whose text is text.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D

from captioning.errors import UserError
from captioning.runtime.files import atomic_text, atomic_write, write_errors
from captioning.viewing.curves import PLOTS, Curve
from captioning.viewing.fonts import find_font
from captioning.viewing.run_summaries import COLUMNS, Column, RunSummary, notes

FORMATS = (".png", ".svg", ".pdf")
COLUMNS_OF_PLOTS = 3
PLOT_SIZE = (5.0, 3.2)  # inches
LEGEND_LINE = 0.22  # inches
MARKED_POINTS = 50  # a curve of fewer points has a marker on each
STYLE = {
    "text.parse_math": False,  # a run's name may hold $
    "svg.fonttype": "none",
    "svg.hashsalt": "runs",  # the same runs make the same file
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Runs</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; background: #f4f1eb; color: #282522; margin: min(2em, 4vw) }
.scroll { overflow-x: auto; background: #fff; border-radius: 12px; padding: 12px 0; margin: 16px 0 }
table { border-collapse: collapse }
th, td { text-align: left; padding: 4px 10px 4px 4px }
th:not(:last-child), td:first-child, td:last-child span { white-space: nowrap }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; padding-left: 12px; min-width: 6em }
td:last-child { min-width: 15em; font-size: 13px; color: #77706a }
th button { font: inherit; font-weight: 600; text-align: left; border: 0; background: none; padding: 0;
  cursor: pointer; color: inherit }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
tbody tr:hover, tbody tr:hover td { background: #fff3dc }
svg { width: 100%; min-width: 45em; height: auto }
svg.one g[id^=curve-] { opacity: .12 }
svg.one g.shown { opacity: 1 }
p { color: #77706a }
</style>
<h1>Runs</h1>
<p>A heading sorts the table. Point at a row to see its curves alone.</p>
"""
SCRIPT = """<script>
const body = document.querySelector("tbody"), plots = document.querySelector("svg");
document.querySelectorAll("th").forEach((heading, column) => {
  heading.firstChild.addEventListener("click", () => {
    const now = heading.getAttribute("aria-sort");
    const value = row => row.cells[column].dataset.value;
    const rows = [...body.rows], known = rows.filter(row => value(row) !== "");
    const numbers = known.every(row => !isNaN(value(row)));
    const sign = (now ? now === "descending" : !numbers) ? 1 : -1;
    known.sort((a, b) => sign * (numbers ? value(a) - value(b) : value(a).localeCompare(value(b))));
    document.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    body.append(...known, ...rows.filter(row => value(row) === ""));
  });
});
function show(row) {
  if (!plots) return;
  plots.classList.toggle("one", row !== null);
  plots.querySelectorAll("g[id^=curve-]").forEach(curve =>
    curve.classList.toggle("shown", row !== null && curve.id.startsWith(row.dataset.curves)));
}
for (const row of body.rows) {
  row.addEventListener("mouseenter", () => show(row));
  row.addEventListener("mouseleave", () => show(null));
}
</script>
"""


def write_plot(runs: Sequence[RunSummary], path: Path) -> None:
    """Draw the curves of all runs that have some. Raises UserError if there are none, or the file cannot be written."""
    if path.suffix not in FORMATS:
        raise UserError(f"--plot {path}: must end in one of {', '.join(FORMATS)}")
    picture = _picture(runs, path.suffix[1:])
    if picture is None:
        raise UserError(f"--plot {path}: none of these runs has a curve yet; nothing is written")
    with write_errors(path), atomic_write(path) as file:
        file.write(picture)


def write_page(runs: Sequence[RunSummary], path: Path) -> None:
    """Write a page: a table that its headings sort, and below it the curves; pointing at a row shows its curves alone.

    Raises UserError if it cannot be written.
    """
    picture = _picture(runs, "svg")
    with atomic_text(path) as file:
        file.write(HEAD)
        file.write('<div class="scroll"><table><thead><tr>')
        file.writelines(
            f'<th scope="col"><button>{html.escape(column.title)}</button></th>' for column in COLUMNS.values()
        )
        file.write("</tr></thead><tbody>\n")
        for number, run in enumerate(runs):
            file.write(f'<tr data-curves="{_prefix(number)}">{"".join(_cells(run))}</tr>\n')
        file.write("</tbody></table></div>\n")
        file.writelines(f"<p>{html.escape(note)}</p>\n" for note in notes(runs))
        if picture:
            svg = picture.decode("utf-8")
            file.write(f'<div class="scroll">{svg[svg.index("<svg") :]}</div>\n')
        file.write(SCRIPT)


def _cells(run: RunSummary) -> Iterator[str]:
    for column in COLUMNS.values():
        # lines do not break within a flag and its value
        flags = (f"<span>{html.escape(part)}</span>" for part in re.split(" (?=--)", column.cell(run)))
        yield f'<td data-value="{html.escape(_sort_value(column, run))}">{" ".join(flags)}</td>'


def _sort_value(column: Column, run: RunSummary) -> str:
    value = column.value(run)
    return "" if value is None else str(value)


def _prefix(number: int) -> str:
    """What the SVG's ids of a run's curves begin with."""
    return f"curve-{number}-"


# ---- the figure


def _picture(runs: Sequence[RunSummary], form: str) -> bytes | None:
    """The figure in a format of FORMATS, without its dot; None if no run has a curve."""
    titles = [title for title in PLOTS if any(title in run.curves for run in runs)]
    if not titles:
        return None
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        metadata = {} if form == "png" else {"Date": None} if form == "svg" else {"CreationDate": None}
        _draw(runs, titles).savefig(buffer, format=form, dpi=120, metadata=metadata)
    return buffer.getvalue()


def _draw(runs: Sequence[RunSummary], titles: Sequence[str]) -> Figure:
    """One plot per title, with the curves of all runs, and below them the runs' colours."""
    columns = min(COLUMNS_OF_PLOTS, len(titles))
    rows = math.ceil(len(titles) / columns)
    shown = [(number, run) for number, run in enumerate(runs) if run.curves]
    legend_lines = math.ceil(len(shown) / columns)
    width, height = columns * PLOT_SIZE[0], rows * PLOT_SIZE[1] + legend_lines * LEGEND_LINE + 0.3
    figure = Figure(figsize=(width, height), layout="constrained")
    colours = matplotlib.colormaps["tab10" if len(shown) <= 10 else "tab20"].colors
    handles = [
        Line2D([], [], color=colours[position % len(colours)], label=f" {run.name}")  # a first _ would hide the name
        for position, (_, run) in enumerate(shown)
    ]
    for index, title in enumerate(titles):
        *dashed, solid = _names(title, runs)
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_title(f"{title}: {', '.join(dashed)} (dashed), {solid}" if dashed else title, fontsize=10)
        axes.set_xlabel("epoch", fontsize=9)
        for (number, run), handle in zip(shown, handles, strict=True):
            _draw_curves(axes, run.curves.get(title, []), solid, handle.get_color(), _prefix(number))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, prop=_legend_font(shown))
    return figure


def _names(title: str, runs: Sequence[RunSummary]) -> list[str]:
    """The names of the curves that runs have in a plot, in the plot's order."""
    found = {curve.name for run in runs for curve in run.curves.get(title, [])}
    return [source.name for source in PLOTS[title] if source.name in found]


def _draw_curves(axes: Axes, curves: Sequence[Curve], solid: str, colour: object, prefix: str) -> None:
    """A run's curves of a plot: the one named `solid`, and the others dashed."""
    for curve in curves:
        axes.plot(
            curve.x,
            curve.y,
            color=colour,
            linestyle="-" if curve.name == solid else "--",
            linewidth=1.5 if curve.name == solid else 1,
            marker="." if len(curve.x) < MARKED_POINTS else "",
            gid=f"{prefix}{axes.get_title()}-{curve.name}".replace(" ", "-"),
        )


def _legend_font(shown: Sequence[tuple[int, RunSummary]]) -> FontProperties:
    """A font with the letters of the names."""
    names = "".join(run.name for _, run in shown)
    if names.isascii():
        return FontProperties(size=9)
    return FontProperties(fname=find_font(names).path, size=9)
