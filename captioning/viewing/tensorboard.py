"""A run for TensorBoard: curves, settings, captions and their pictures, written from log.jsonl alone.

The event file lies in RUN/tensorboard. Whenever a run starts, resumes or is written again, a new file gets the whole
log, and older ones are emptied, so that no point is there twice. Curves within an epoch count updates of the weights;
all others, and the captions and pictures, count epochs.
"""

from __future__ import annotations

import html
import io
import json
import os
import platform
import re
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from captioning.errors import UserError
from captioning.runtime.files import locked, write_errors
from captioning.runtime.library_errors import reason
from captioning.runtime.log import STEP_SECONDS, preview_picture, read_log
from captioning.viewing.curves import PLOTS
from captioning.viewing.log_tailer import LogTailer

try:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.record_writer import RecordWriter
except ImportError:
    raise UserError(
        "--tensorboard: tensorboard is not installed; run: pip install -c constraints.txt '.[tensorboard]'"
    ) from None

FOLDER = "tensorboard"  # in the run's folder
FILES = "events.out.tfevents.*"
START_FORMAT = "%Y-%m-%dT%H:%M:%S%z"  # of a start event's time
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~])")


class EventFile:
    """The event file of a run. `write` adds the events of its log that are not in it yet."""

    def __init__(self, run: Path):
        """Start a new file and empty older ones. Raises OSError if that is impossible."""
        self.run = run
        self.folder = run / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(FILES):
            if old.stat().st_size:
                os.truncate(old, 0)  # an open TensorBoard would not go on from a file that no longer exists
            else:
                old.unlink()
        # TensorBoard reads files in the order of their names.
        name = FILES.replace("*", f"{time.time():.6f}.{platform.node()}.{os.getpid()}")
        self.file = open(self.folder / name, "xb")
        self.records = RecordWriter(self.file)  # EventFileWriter's thread would print a traceback on a full disk
        self.num_written = 0
        self.epoch = 0  # the last one that is finished
        self.clock = 0.0  # seconds since 1970 at the last event
        self.epoch_start = 0.0
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # A TensorBoard that has read the older file drops its points: all steps from this one on.
        self._write(Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START)))

    def write(self, events: Sequence[dict]) -> None:
        """Add the new ones of a log's events, which are all given. Raises OSError if that is impossible."""
        new = events[self.num_written :]
        starts = [event for event in new if event["event"] == "start"]
        for event in new:
            self._advance_clock(event)
            self._add_curves(event)
            if event["event"] == "start":
                self._add(text_pb("settings", _settings_table(event)), self.epoch)
                if event is starts[-1] and not self.num_written:  # TensorBoard shows the first ones of a file
                    self._add(_settings_summary(event), 0)
            if event["event"] == "epoch":
                self.epoch = event["epoch"]
                self._add_preview(event.get("preview", []))
        self.file.flush()
        self.num_written = len(events)

    def close(self) -> None:
        """Close the file. Raises OSError if what was written last cannot be."""
        self.file.close()

    def _advance_clock(self, event: dict) -> None:
        """Set the time of an event, which only start events hold: steps are about STEP_SECONDS apart."""
        if event["event"] == "start":
            self.clock = self.epoch_start = _start_time(event)
        elif event["event"] == "step":
            self.clock += STEP_SECONDS
        elif event["event"] == "epoch":
            seconds = event.get("train_seconds", 0.0) + event.get("val_seconds", 0.0)
            self.clock = self.epoch_start = max(self.clock, self.epoch_start + seconds)

    def _add_curves(self, event: dict) -> None:
        for title, sources in PLOTS.items():
            for source in sources:
                self._add_points(f"{title}/{source.name}", source.points([event]))
                if source.event == "step":
                    self._add_points(f"{title}/{source.name}, mean of the epoch", source.of_epochs().points([event]))

    def _add_points(self, tag: str, points: Sequence[tuple[dict, float]]) -> None:
        for event, value in points:
            self._add(Summary(value=[Summary.Value(tag=tag, simple_value=value)]), _step(event))

    def _add_preview(self, preview: Sequence[dict]) -> None:
        for number, entry in enumerate(preview, start=1):
            references = "\n".join(f"- {_as_text(reference)}" for reference in entry["references"])
            caption = f"**{_as_text(entry['caption'])}**\n\n{references}"
            self._add(text_pb(f"captions/photo {number}", caption), self.epoch)
            path = preview_picture(entry, self.run)
            if path and (summary := _picture_summary(f"attention/photo {number}", path)):
                self._add(summary, self.epoch)

    def _add(self, summary: Summary, step: int) -> None:
        self._write(Event(wall_time=self.clock, step=step, summary=summary))

    def _write(self, event: Event) -> None:
        self.records.write(event.SerializeToString())


def _step(event: dict) -> int:
    """The updates of the weights at a step event; the number of an epoch."""
    if event["event"] == "step":
        return int((event["epoch"] - 1) * event["of"] + event["step"])
    return event["epoch"]


def _start_time(event: dict) -> float:
    """Seconds since 1970; 0 if the event has no valid time."""
    try:
        return datetime.strptime(event["time"], START_FORMAT).timestamp()
    except (KeyError, TypeError, ValueError):
        return 0.0


def _settings_summary(start: dict) -> Summary:
    """The settings of a run for TensorBoard's page of hyperparameters."""
    settings = {name: _plain(value) for name, value in start.get("config", {}).items() if value is not None}
    return hparams_pb(settings, start_time_secs=_start_time(start))


def _plain(value: object) -> bool | int | float | str:
    """A value that TensorBoard's hyperparameters can be. Names of files may hold surrogates, which UTF-8 cannot."""
    if isinstance(value, (bool, int, float)):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def _settings_table(start: dict) -> str:
    """The start event as a table in Markdown."""
    described = {key: value for key, value in start.items() if key not in ("event", "config", "versions")}
    rows = described | start.get("versions", {}) | start.get("config", {})
    lines = [f"| {_as_text(name)} | {_as_text(value)} |" for name, value in rows.items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *lines])


def _as_text(value: object) -> str:
    """Escape Markdown and HTML."""
    text = MARKDOWN.sub(r"\\\1", " ".join(str(_plain(value)).split()))
    return html.escape(text, quote=False)


def _picture_summary(tag: str, path: Path) -> Summary | None:
    """A PNG file, as it is; None if it is damaged: its caption is shown without it."""
    content = path.read_bytes()
    try:
        width, height = Image.open(io.BytesIO(content)).size
    except UnidentifiedImageError:
        return None
    picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
    return Summary(value=[Summary.Value(tag=tag, image=picture)])


# ---- runs that train, and runs that have


class TensorBoardTailer(LogTailer):
    """Writes a run's event file while it trains. After a failure the next file holds everything again."""

    def __init__(self, folder: Path, enabled: bool = True):
        """enabled: the option's value."""
        super().__init__(folder, "tensorboard")
        self.events: list[dict] = []
        self.file: EventFile | None = None

    def read(self, events: list[dict]) -> None:
        """Take the log's events."""
        self.events = events

    def show(self) -> None:
        """Write the events that are new."""
        try:
            self.file = self.file or EventFile(self.folder)
            self.file.write(self.events)
        except OSError:
            self.file = None
            raise

    def announcement(self) -> str:
        """The command that shows the run."""
        return _command(self.folder)

    def problem(self, error: Exception) -> str:
        """Why the file cannot be written."""
        return f"{self.folder / FOLDER}: cannot be written ({reason(error)})"

    def recovery(self) -> str:
        """The file is written again."""
        return f"{self.folder / FOLDER} is written again, and holds the whole run"

    def __exit__(self, *exception: object) -> None:
        """Write the last events and close the file."""
        super().__exit__(*exception)
        if self.file and not self.is_alive():
            self.file.close()


def write_runs(folders: Sequence[Path]) -> None:
    """Write the event files of runs from their logs. Raises UserError if one has no log, or is being trained."""
    for folder in folders:
        events = read_log(folder)
        with locked(folder, folder / ".lock"), write_errors(folder / FOLDER):
            _write_run(folder, events)
        print(f"{folder / FOLDER}: {len(events):,} events")
    print(_command(*folders), flush=True)


def _write_run(folder: Path, events: Sequence[dict]) -> None:
    file = EventFile(folder)
    try:
        file.write(events)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        cause = f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"{folder / 'log.jsonl'}: is not the log of a run, or damaged ({cause})") from None
    finally:
        file.close()


def _command(*folders: Path) -> str:
    """The command that shows runs: TensorBoard looks for them in a folder, at any depth."""
    common = Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
    shown = os.path.relpath(common)
    return f"tensorboard --logdir {common if shown.startswith('..') else shown}"
