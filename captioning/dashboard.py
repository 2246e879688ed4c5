"""Show runs in the browser, in visdom or TensorBoard: while they train, again, or compared.

python -m captioning.dashboard                                  # start visdom on this machine
python train.py data/aic --run att --dashboard                  # show a run while it trains
python -m captioning.dashboard --replay checkpoints/att         # show a run again
python -m captioning.dashboard --compare checkpoints/att checkpoints/show-and-tell

python train.py data/aic --run att --tensorboard                # the same in TensorBoard
python -m captioning.dashboard --tensorboard checkpoints/att    # write a run's event file again
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.start import start_command

    start_command()

from typing import TYPE_CHECKING

from captioning.viewing.dashboard import compare, replay
from captioning.viewing.visdom_server import fetch_page, serve, static_folder

if TYPE_CHECKING:
    from config import Dashboard


def main(config: Dashboard) -> None:
    """Replay a run, compare several, write event files, or start the server."""
    if config.replay:
        replay(config.replay, config.url, config.user)
    elif config.compare:
        compare(config.compare, config.url, config.user)
    elif config.tensorboard:
        from captioning.viewing.tensorboard import write_runs  # not above: tensorboard is an extra

        write_runs(config.tensorboard)
    else:
        fetch_page(static_folder())
        serve(config.host, config.port, config.folder, config.user)


if __name__ == "__main__":
    from captioning.runtime.command_line import run
    from config import Dashboard

    run(Dashboard, main)
