"""log.jsonl: one event when a run starts, one every ten seconds and one per epoch.

Everything that shows a run, such as the dashboard, reads this file.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from captioning.errors import UserError
from captioning.runtime.files import atomic_text, write_errors
from captioning.runtime.library_errors import reason
from captioning.runtime.settings import OLDER_VERSION, has_old_settings

STEP_SECONDS = 10.0
WRITE_REMEDY = "correct that, and continue with --resume"
POSITION = {
    "start": (),
    "self-check": ("epoch", "step"),
    "step": ("epoch", "step", "of"),
    "epoch": ("epoch",),
}  # event -> its required numbers


def read_log(folder: Path) -> list[dict]:
    """The events of a run, without a last line that is still being written.

    Raises UserError if the log cannot be read, is damaged, or was written by an older version.
    """
    path = folder / "log.jsonl"
    try:
        with open(path, "rb") as file:  # not as text: the last line may end within a character
            events = [json.loads(line) for line in file if line.endswith(b"\n")]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); give a run, such as checkpoints/att") from None
    except ValueError:
        raise _damaged(path) from None
    if not all(_is_event(event) for event in events):
        raise _damaged(path)
    if any("panel" in event or has_old_settings(event.get("config")) for event in events):
        raise UserError(f"{path}: {OLDER_VERSION}")
    return events


def best_epoch(events: Sequence[dict]) -> dict | None:
    """The epoch event of the best epoch, whose weights best.pt has; None if there is none."""
    return next((event for event in reversed(events) if event["event"] == "epoch" and event.get("best")), None)


def preview_picture(entry: dict, folder: Path) -> Path | None:
    """The picture of an entry of an epoch event's preview, if it is there. folder: of the run."""
    path = folder / "pictures" / Path(entry.get("picture") or "").name  # a foreign log cannot name any other file
    return path if path.is_file() else None


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: is not the log of a run, or damaged; move it away, or give another run")


def _is_event(event: object) -> bool:
    if not isinstance(event, dict) or event.get("event") not in POSITION:
        return False
    return all(isinstance(event.get(key), (int, float)) for key in POSITION[event["event"]])


class Log:
    """Appends events to RUN/log.jsonl, one complete line at a time, and prints them in words."""

    def __init__(self, folder: Path, settings: dict, resumes_from: tuple[int, int] | None, is_main: bool):
        """folder: the run's. settings: the run's, as plain data.

        resumes_from: (finished epochs, updates of the next epoch) of a resumed run; later events are removed from the
        log. None starts a new log.

        is_main: False writes no file.
        """
        self.folder = folder
        self.settings = settings
        self.path = folder / "log.jsonl" if is_main else Path(os.devnull)
        self._last_step_at = time.monotonic()
        self._values: list[float] = []  # since the last step event
        self._notes: set[str] = set()
        if is_main and resumes_from and self.path.exists():
            self._remove_after(*resumes_from)
        with write_errors(self.path, WRITE_REMEDY):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            mode = "a" if resumes_from else "w"
            self._file = open(self.path, mode, encoding="utf-8", errors="backslashreplace")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # every line was flushed, or its error was raised
            self._file.close()

    def start(self, description: dict) -> None:
        """Write the start event: time, commit, versions, the run's description (Trainer.describe) and settings."""
        event = {
            "event": "start",
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "commit": commit(),
            "versions": _versions(),
            **description,
            "config": self.settings,
        }
        self._write(event)
        print(self._start_line(description), flush=True)

    def self_check(self, metrics: dict, lines: Sequence[str]) -> None:
        """Write a self-check event, the result of a proof of the fast path, and print it."""
        self._write({"event": "self-check", **metrics})
        print(*lines, sep="\n  ", flush=True)

    def step(self, metrics: dict, quantity: str, value: float) -> None:
        """Write a step event if the last one is STEP_SECONDS old.

        quantity: "loss" or "reward", the key under which the mean of the values since then is written.
        """
        self._values.append(value)
        if time.monotonic() - self._last_step_at >= STEP_SECONDS:
            self._write({"event": "step", **metrics, quantity: sum(self._values) / len(self._values)})
            self._last_step_at = time.monotonic()
            self._values = []

    def epoch(self, metrics: dict, is_best: bool) -> None:
        """Write an epoch event."""
        self._write({"event": "epoch", **metrics, "best": is_best})
        print(_epoch_line(metrics, is_best), flush=True)

    def note(self, text: str) -> None:
        """Print a line, once."""
        if text not in self._notes:
            self._notes.add(text)
            print(text, flush=True)

    def end(self, best: float | None, loss: float, metric: str) -> None:
        """Print the best score, and the val loss that chose among equal scores of 0."""
        loss_too = "" if best else f" and val_loss {loss:.2f}"
        print(f"done: {self.folder}/best.pt has {metric} {abs(best or 0):.2f}{loss_too} on val (greedy)", flush=True)

    def _start_line(self, description: dict) -> str:
        millions = description["decoder_parameters"] / 1e6
        obstacles = {} if description["device"] == "cpu" else description["fast_path"]
        notes = [f", {description['processes']} processes"] if description["processes"] > 1 else []
        notes += [f"; without {name} ({why})" for name, why in obstacles.items() if why]
        return (
            f"{self.folder}: {self.settings['decoder']}, {millions:.1f} million parameters, "
            f"{description['train_photos']:,} photos to train on, {description['val_photos']:,} to validate, "
            f"{description['vocabulary']:,} words; {description['device']}, {description['precision']}{''.join(notes)}"
        )

    def _remove_after(self, epochs: int, step: int) -> None:
        """Remove the events after the checkpoint: the resumed run writes them again."""
        events = read_log(self.folder)
        with atomic_text(self.path) as file:
            for event in events:
                if _is_before(event, epochs, step):
                    file.write(_to_line(event))

    def _write(self, event: dict) -> None:
        with write_errors(self.path, WRITE_REMEDY):
            self._file.write(_to_line(event))
            self._file.flush()


def _is_before(event: dict, epochs: int, step: int) -> bool:
    """Whether an event belongs to the finished epochs, or to the first updates of the next one."""
    epoch = event.get("epoch", 0)
    if epoch <= epochs:
        return True
    return event["event"] != "epoch" and epoch == epochs + 1 and event["step"] <= step


def _epoch_line(metrics: dict, is_best: bool) -> str:
    quantity = "loss" if "train_loss" in metrics else "reward"
    seconds = metrics["train_seconds"] + metrics["val_seconds"]
    caption = metrics["preview"][0]["caption"] if metrics["preview"] else ""
    return (
        f"epoch {metrics['epoch']:>2}: {quantity} {metrics[f'train_{quantity}']:.3f}, "
        f"val {metrics['val_loss']:.3f}, top-5 {100 * metrics['top5']:.1f} %, "
        f"BLEU-4 {metrics['BLEU-4']:.1f}, CIDEr-D {metrics['CIDEr-D']:.1f}{' (best)' if is_best else ''}; "
        f"{seconds:.0f} s, {metrics['captions_per_second']:.0f} captions/s, "
        f"{metrics['photos_per_second']:.0f} photos/s, waiting {metrics['waiting']:.1%}, "
        f"at most {metrics['peak_memory_gb']:.1f} GB; {caption}"
    )


def _to_line(event: dict) -> str:
    return json.dumps(event, ensure_ascii=False) + "\n"


def _versions() -> dict[str, str]:
    import torch  # not above: a command that only reads logs does not wait for it
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def commit(marks_changes: bool = False) -> str | None:
    """The commit of this code, if it is a git checkout. marks_changes: with a + if files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*"]
    command += ["--dirty=+"] if marks_changes else []
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
