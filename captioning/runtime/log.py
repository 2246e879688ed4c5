"""log.jsonl: a line when a run starts, one every ten seconds, one an epoch. It is the truth about a run; everything
else shows it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision

from captioning.errors import UserError
from captioning.runtime.files import atomic_text

STEP_SECONDS = 10.0
PLACES = {"start": (), "step": ("epoch", "step", "of"), "epoch": ("epoch",)}  # the numbers that say where an event is


def read_log(folder: Path) -> list[dict]:
    """The events of a run; a line that is still being written is left for later. Raises UserError where none is."""
    path = folder / "log.jsonl"
    try:
        with open(path, "rb") as file:  # not text: a line may break off within a character
            events = [json.loads(line) for line in file if line.endswith(b"\n")]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a run, such as checkpoints/att") from None
    except ValueError:
        events = [None]
    if not all(map(_is_event, events)):
        raise UserError(f"{path}: is not the log of a run, or damaged; move it away, or give another run")
    return events


def _is_event(line: object) -> bool:
    return (
        isinstance(line, dict)
        and line.get("event") in PLACES
        and all(isinstance(line.get(place), (int, float)) for place in PLACES[line["event"]])
    )


class Log:
    """Appends to RUN/log.jsonl, a whole line at a time, and says the same in words."""

    def __init__(self, folder: Path, settings: dict, resumes: tuple[int, int] | None, first: bool):
        """folder: of the run; settings: of the run, as plain data.

        resumes: the epochs finished, and the updates of the next one, that a resumed run has behind it.

        first: another than rank 0 writes nothing.
        """
        self.folder, self.settings, self.path = folder, settings, folder / "log.jsonl"
        self.stepped, self.losses = time.monotonic(), []  # when the last point was written; the losses since then
        if not first:
            self.path = Path(os.devnull)
        elif resumes and self.path.exists():
            self._forget_after(*resumes)
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a" if resumes else "w", encoding="utf-8", errors="backslashreplace")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # every line is written already, or it was said that one was not
            self.file.close()

    def start(self, described: dict) -> None:
        """commit, versions, device, config: a run explains itself."""
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        }
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._write(
            {
                "event": "start",
                "time": now,
                "commit": _commit(),
                "versions": versions,
                **described,
                "config": self.settings,
            }
        )
        together = f", {described['processes']} processes" if described["processes"] > 1 else ""
        millions = described["decoder_parameters"] / 1e6
        print(
            f"{self.folder}: {self.settings['decoder']}, {millions:.1f} million parameters, "
            f"{described['train_photos']:,} photos to train on, {described['val_photos']:,} to validate, "
            f"{described['vocabulary']:,} words; {described['device']}, {described['precision']}{together}",
            flush=True,
        )

    def step(self, figures: dict, measures: str, value: float) -> None:
        """A point of the live curves, once every STEP_SECONDS; its loss, or reward, is the mean since the last."""
        self.losses.append(value)
        if time.monotonic() - self.stepped >= STEP_SECONDS:
            self._write({"event": "step", **figures, measures: sum(self.losses) / len(self.losses)})
            self.stepped, self.losses = time.monotonic(), []

    def epoch(self, figures: dict, better: bool) -> None:
        self._write({"event": "epoch", **figures, "best": better})
        measured = next(name for name in ("train_loss", "train_reward") if name in figures)
        print(
            f"epoch {figures['epoch']:>2}: {measured.removeprefix('train_')} {figures[measured]:.3f}, "
            f"val {figures['val_loss']:.3f}, "
            f"top-5 {100 * figures['top5']:.1f} %, BLEU-4 {figures['BLEU-4']:.1f}, CIDEr-D {figures['CIDEr-D']:.1f}"
            f"{' (best)' if better else ''}; {figures['train_seconds'] + figures['val_seconds']:.0f} s, "
            f"{figures['captions_per_second']:.0f} captions/s, {figures['photos_per_second']:.0f} photos/s, "
            f"waiting {figures['waiting']:.1%}, at most {figures['peak_memory_gb']:.1f} GB; "
            f"{figures['panel'][0]['caption'] if figures['panel'] else ''}",
            flush=True,
        )

    def end(self, best: float | None, name: str) -> None:
        print(f"done: {self.folder}/best.pt has {name} {abs(best or 0):.2f} on val (greedy)", flush=True)

    def _forget_after(self, epochs: int, step: int) -> None:
        """Drop what the checkpoint does not know: it is about to happen again."""
        events = read_log(self.folder)
        with atomic_text(self.path) as file:
            for event in events:
                epoch, at = event.get("epoch", 0), event.get("step", 0)
                if epoch <= epochs or (event["event"] == "step" and epoch == epochs + 1 and at <= step):
                    file.write(_line(event))

    def _write(self, event: dict) -> None:
        with self._writing():
            self.file.write(_line(event))
            self.file.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); mend that, and go on with --resume"
            ) from None


def _line(event: dict) -> str:
    return json.dumps(event, ensure_ascii=False) + "\n"


def _commit() -> str | None:
    """The commit of this code, where it is a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
