"""Show captions and runs: plots, HTML, the dashboard."""

from __future__ import annotations

from captioning.runtime.registry import Registry

# A training option -> a context manager class, called with (run folder: Path, the option's value), that follows a run
# while it trains. train.py enters one for every option that is set, on the main process only.
LOGGERS = Registry(
    "logger",
    {
        "dashboard": "captioning.viewing.dashboard:VisdomTailer",
        "tensorboard": "captioning.viewing.tensorboard:TensorBoardTailer",
    },
)
# Settings of train.py that say where and how a run is computed, or watched, and not what it learns
NOT_LEARNT = {
    "data",
    "run",
    "recipe",  # its flags are settings of their own
    "resume",
    "overwrite",
    "device",
    "workers",
    "save_every",
    "preview_photos",
    *LOGGERS,
}
