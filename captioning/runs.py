"""All runs at a glance: a table of their scores and of what differs from the defaults.

    python -m captioning.runs                                          # the runs in checkpoints/
    python -m captioning.runs --sort seconds --csv runs.csv
    python -m captioning.runs --html runs.html --plot runs.png         # with their curves
    python -m captioning.runs checkpoints/att checkpoints/adaptive     # these alone

A folder that is no run, or a damaged one, is one line below the table.
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.start import start_command

    start_command()

from typing import TYPE_CHECKING

from captioning.errors import UserError
from captioning.runtime.command_line import one_line
from captioning.viewing.dashboard import run_names
from captioning.viewing.run_summaries import find_runs, format_table, notes, read_run, sort_runs, write_csv

if TYPE_CHECKING:
    from config import Runs


def main(config: Runs) -> None:
    """Print the table, and write the files that are asked for. Raises UserError."""
    folders = find_runs(config.folders)
    runs, problems = [], []
    for folder, name in zip(folders, run_names(folders), strict=True):
        try:
            runs.append(read_run(folder, name))
        except UserError as error:
            problems.append(str(error))
    runs = sort_runs(runs, config.sort)
    lines = [*format_table(runs), "", *notes(runs), *problems] if runs else problems
    print("\n".join(map(one_line, lines)), flush=True)
    if config.csv:
        write_csv(runs, config.csv)
    if config.plot:
        from captioning.viewing.run_plots import write_plot  # not above: matplotlib takes a while

        write_plot(runs, config.plot)
    if config.html:
        from captioning.viewing.run_plots import write_page

        write_page(runs, config.html)


if __name__ == "__main__":
    from captioning.runtime.command_line import run
    from config import Runs

    run(Runs, main)
