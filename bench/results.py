"""The tables of docs/results.md from annotation files, in one command of many hours.

    python bench/results.py --flickr8k flickr8k --weights weights        everything
    python bench/results.py --only encoders views                        some groups; --list names them
    python bench/results.py --only 'zh-best*' --threads 1                some rows and steps, on one core
    python bench/results.py --dry-run                                    what is left to do
    python bench/results.py --publish                                    the tables and their JSON in the repository

The folder of Flickr8k has dataset_flickr8k.json (English), caption_train_annotations_zh.json and
caption_val_annotations_zh.json (Chinese), and images/. That of the weights has the files that bench/results_plan.py
names; without it, the encoders' published weights are downloaded. Both are linked in the work folder, and need not be
given again.

Every step is a command of Kantu, run in the work folder. A step that is made is skipped; one whose command, recipe or
input has changed is made anew; an interrupted training is resumed. Several such commands may share a work folder: what
one of them is making, the others leave to it. Beside data/, checkpoints/, captions/ and scores/, the work folder has
logs/ (what the steps print), steps/ (how each was made) and page/: the tables of what is made so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import results_page
from results_plan import GROUPS, Step, plan_steps, steps_of
from results_steps import ROOT, Workshop, link

from captioning.errors import UserError
from captioning.runtime.command_line import run
from captioning.runtime.settings import check_min


@dataclass(frozen=True)
class Results:
    """Make the tables of docs/results.md from annotation files."""

    flickr8k: Path | None = None  # folder of Flickr8k; the one linked in the work folder unless given
    weights: Path | None = None  # folder of encoder weights; linked in the work folder, or else the published ones
    work: Path = ROOT / "data" / "results"  # folder of everything that is made
    only: tuple[str, ...] = ()  # groups, rows or steps, or patterns such as 'zh-*' and 'best/en-*'; with what they need
    threads: int | None = None  # of each step; all cores unless given
    list: bool = False  # name the groups and their rows, and make nothing
    dry_run: bool = False  # print the commands that are left, and make nothing
    page: bool = False  # write the tables of what is made, and make nothing
    publish: bool = False  # the same, in docs/results.md and bench/results/

    def __post_init__(self) -> None:
        check_min(self, 1, "threads")


def main(config: Results) -> None:
    """Make what is left, and write the tables. Raises UserError if a step fails."""
    if config.list:
        print("\n".join(describe_groups()))
        return
    work = config.work.absolute()
    if config.flickr8k:
        link(config.flickr8k, work / "flickr8k")
    if config.weights:
        link(config.weights, work / "weights")
    steps = plan_steps(has_weights=(work / "weights").exists())
    chosen = choose(steps, config.only)
    workshop = Workshop(work, steps, config.threads)
    if config.dry_run:
        print("\n".join(describe_left(workshop, chosen)))
        return
    failed = [] if config.page or config.publish else make(workshop, chosen)
    write_tables(workshop, config.publish)
    if failed:
        raise UserError(f"{len(failed)} steps are not made: {', '.join(failed)}; the same command makes them")


def make(workshop: Workshop, chosen: Sequence[str]) -> list[str]:
    """Make the steps that are left -> the names of those that failed. Raises UserError if there are no annotations."""
    if not (workshop.folder / "flickr8k").exists():
        raise UserError("give the folder of Flickr8k: --flickr8k FOLDER, or make results FLICKR8K=FOLDER")
    return workshop.make(chosen)


def write_tables(workshop: Workshop, publishes: bool) -> None:
    """Write the tables and pictures of what is made into the work folder, or into the repository."""
    collected = {group: results_page.collect(group, workshop) for group in GROUPS}
    if publishes:
        print(*results_page.publish(collected, ROOT), sep="\n")
    else:
        print(f"{results_page.write_page(collected, workshop.folder / 'page')}: the tables of what is made")


# ---- what to do


def describe_groups() -> Iterator[str]:
    """The groups of the plan and their rows."""
    for group, (title, rows) in GROUPS.items():
        yield f"{group}: {title}"
        yield from (f"    {row.name}: {row.label}" for row in rows)


def describe_left(workshop: Workshop, chosen: Sequence[str]) -> Iterator[str]:
    """The steps that are left, with why, and their commands."""
    left = workshop.left(chosen)
    for name, why in left.items():
        yield f"{name} ({why}): {workshop.steps[name].command}"
    yield f"{len(left)} of {len(chosen)} steps are left"


def choose(steps: Mapping[str, Step], patterns: Sequence[str]) -> Sequence[str]:
    """The names of the steps that the patterns select and of those that they need, in the order of the plan.

    Raises UserError for a pattern that selects nothing.
    """
    names = {name: {name} for name in steps}  # step -> what selects it
    for group, (_, rows) in GROUPS.items():
        for row in rows:
            for step in steps_of(row):
                names[step] |= {group, row.name, f"{group}/{row.name}"}
    wanted = {*steps} if not patterns else set()
    for pattern in patterns:
        found = {step for step, known in names.items() if any(fnmatchcase(name, pattern) for name in known)}
        if not found:
            raise UserError(f"--only {pattern}: no such group, row or step; --list names the groups and rows")
        wanted |= found
    for name in reversed(steps.keys()):  # a step comes after those that it needs
        if name in wanted:
            wanted.update(steps[name].needs)
    return [name for name in steps if name in wanted]


if __name__ == "__main__":
    run(Results, main)
