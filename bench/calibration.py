"""Draw how well runs are calibrated: a reliability curve and a risk-coverage curve, with 95 % intervals.

    python bench/calibration.py checkpoints/zh checkpoints/en --names Chinese English --out docs/calibration.png

Both come from photos that the models have not seen: see captioning/evaluation/calibration.py. It needs matplotlib,
which is installed with mplfonts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from captioning.errors import UserError  # noqa: E402
from captioning.evaluation.calibration import Calibration, HeldOut, reliability, risk_coverage  # noqa: E402
from captioning.runtime.checkpoint import load_checkpoint  # noqa: E402

CHOICE = "log-probability"
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1")
COVERAGES = np.linspace(0.05, 1, 20)


def main() -> None:
    """Draw the curves of the given runs into one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of calibrated runs")
    parser.add_argument("--names", nargs="+", help="of the runs, in the legend; their folders' names unless given")
    parser.add_argument("--out", type=Path, default=Path("calibration.png"), help="picture to write")
    settings = parser.parse_args()
    names = settings.names or [run.name for run in settings.runs]
    draw({name: held_out_of(run) for name, run in zip(names, settings.runs, strict=True)}, settings.out)
    print(settings.out)


def held_out_of(run: Path) -> HeldOut:
    """The held-out captions of a run. Raises UserError if it is not calibrated."""
    checkpoint = load_checkpoint(run)
    if "calibration" not in checkpoint:
        raise UserError(f"{run}: is not calibrated; run: python -m captioning.calibrate {run}")
    return Calibration.from_dict(checkpoint["calibration"]).held_out[CHOICE]


def draw(held_out_of_runs: dict[str, HeldOut], path: Path) -> None:
    """Draw both curves of all runs."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), dpi=110)
    for colour, (name, held_out) in zip(COLOURS, held_out_of_runs.items(), strict=False):
        draw_reliability(left, held_out, name, colour)
        draw_risk_coverage(right, held_out, name, colour)
    left.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
    left.set(xlabel="predicted probability", ylabel="fraction of good captions", xlim=(0, 1), ylim=(0, 1))
    right.set(xlabel="fraction of captions kept, the most probable first", ylabel="CIDEr-D", xlim=(0, 1.02))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def draw_reliability(axes: Axes, held_out: HeldOut, name: str, colour: str) -> None:
    """Tenths of the captions: their mean probability, and the fraction that is good."""
    groups = reliability(held_out)
    errors = np.abs(groups.interval - groups.observed)
    style = {"fmt": "o-", "capsize": 3, "linewidth": 1.2, "markersize": 5}
    axes.errorbar(groups.predicted, groups.observed, errors, label=name, color=colour, **style)


def draw_risk_coverage(axes: Axes, held_out: HeldOut, name: str, colour: str) -> None:
    """The mean CIDEr-D of the most probable captions."""
    values, interval = risk_coverage(held_out, COVERAGES)
    axes.plot(COVERAGES, 100 * values, color=colour, label=name)
    axes.fill_between(COVERAGES, *(100 * interval), color=colour, alpha=0.15, linewidth=0)


if __name__ == "__main__":
    main()
