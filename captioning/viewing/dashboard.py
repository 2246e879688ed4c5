"""A run in the browser. log.jsonl is the truth, and these windows are a function of it: live, replayed or compared.

    python -m captioning.viewing.dashboard                              starts visdom on this machine
    python train.py data/aic --run att --dashboard              shows a run while it trains
    python -m captioning.viewing.dashboard --replay checkpoints/att     shows it again

Windows are sent whole, and only those that have changed. So nothing is lost where a server dies: when it is back, the
next round brings all of them.
"""

from __future__ import annotations

import base64
import collections
import html
import http.client
import json
import threading
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from captioning.errors import UserError
from captioning.runtime.log import read_log
from captioning.viewing.visdom_server import LOOPBACK, fetch_page, serve, static_folder

if TYPE_CHECKING:
    from config import Dashboard

POINTS = 600  # of a curve, at most: a day's run must not grow the page
EVERY = 2.0  # seconds between two looks at the log
PATIENCE = 5.0  # seconds for one answer
CURVES = {  # window -> its curves: (name, event, key, factor)
    "loss": [("train", "step", "loss", 1), ("validation", "epoch", "val_loss", 1)],
    "reward: CIDEr-D of captions drawn": [("train", "step", "reward", 1)],
    "scores of captions generated freely": [("BLEU-4", "epoch", "BLEU-4", 1), ("CIDEr-D", "epoch", "CIDEr-D", 1)],
    "top-5 accuracy, %": [("validation", "epoch", "top5", 100)],
    "captions a second": [("train", "step", "captions_per_second", 1)],
    "waiting for data, %": [("train", "step", "waiting", 100)],
    "learning rate": [("decoder", "epoch", "learning_rate", 1), ("encoder", "epoch", "encoder_learning_rate", 1)],
}


# ---- a run as windows ----


def windows(events: list[dict], folder: Path) -> dict[str, dict]:
    """The windows of a run, by name, as visdom's server wants them."""
    shown = {title: _plot(title, _curves(events, title)) for title in CURVES}
    starts = [event for event in events if event["event"] == "start"]
    if starts:
        shown["settings"] = _text("settings", _settings(starts[-1]))
    epochs = [event for event in events if event["event"] == "epoch"]
    if epochs:
        for place, entry in enumerate(epochs[-1].get("panel", [])):
            shown[f"photo {place + 1}"] = _text(f"photo {place + 1}", _card(entry, folder), width=900, height=330)
    return shown


def compared(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """The same curves of several runs (name -> events), laid over one another."""
    return {
        title: _plot(
            title,
            [(f"{name}: {curve}", x, y) for name, events in runs.items() for curve, x, y in _curves(events, title)],
        )
        for title in CURVES
    }


def _curves(events: list[dict], title: str) -> list[tuple[str, list, list]]:
    curves = [(name, *_points(events, kind, key, factor)) for name, kind, key, factor in CURVES[title]]
    return [curve for curve in curves if curve[1]] or curves[:1]  # visdom wants one, if only an empty one


def _points(events: list[dict], kind: str, key: str, factor: float) -> tuple[list[float], list[float]]:
    """x: epochs, and parts of them; y. Of too many points every second, third, ... is shown, and always the last."""
    count = collections.Counter(event["event"] for event in events)
    if kind == "step" and count["step"] < count["epoch"]:  # epochs of a few seconds
        kind, key = "epoch", {"loss": "train_loss"}.get(key, key)
    points = [
        (event["epoch"] - 1 + event["step"] / event["of"] if kind == "step" else event["epoch"], factor * event[key])
        for event in events
        if event["event"] == kind and key in event
    ]
    points = points[:: -max(1, -(-len(points) // POINTS))][::-1]
    return [x for x, _ in points], [y for _, y in points]


def _plot(title: str, curves: list[tuple[str, list, list]]) -> dict:
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(x) < 50 else "lines",
            "name": html.escape(name),
            "x": x,
            "y": y,
        }
        for name, x, y in curves
    ]
    layout = {
        "xaxis": {"title": "epoch"},
        "yaxis": {"exponentformat": "e"},
        "showlegend": True,
        "margin": {"l": 60, "r": 20, "t": 30, "b": 50},
    }
    return {"data": data, "layout": layout, "opts": {"title": title, "width": 440, "height": 320}}


def _text(title: str, content: str, width: int = 440, height: int = 320) -> dict:
    return {
        "data": [{"type": "text", "content": content}],
        "layout": {},
        "opts": {"title": title, "width": width, "height": height},
    }


def _settings(start: dict) -> str:
    told = start.get("config", {}) | start.get("versions", {})  # what was asked for, then what it became
    told |= {
        key: start[key]
        for key in (
            "time",
            "commit",
            "device",
            "processes",
            "precision",
            "train_photos",
            "val_photos",
            "vocabulary",
            "decoder_parameters",
        )
        if key in start
    }
    rows = "".join(f"<tr><td>{_safe(key)}&nbsp;</td><td>{_safe(value)}</td></tr>" for key, value in told.items())
    return f"<table>{rows}</table>"


def _card(entry: dict, folder: Path) -> str:
    """The photo with the attention's strip, the caption, and the references. All text is escaped."""
    picture = ""
    path = folder / "pictures" / Path(entry.get("picture") or "").name  # a log that was sent to us names no other file
    if path.is_file():
        encoded = base64.b64encode(path.read_bytes()).decode("ascii")
        picture = f'<img style="max-width:100%" src="data:image/png;base64,{encoded}">'
    references = "".join(f"<li>{_safe(text)}</li>" for text in entry["references"])
    return f"{picture}<p><b>{_safe(entry['caption'])}</b></p><p>References:</p><ul>{references}</ul>"


def _safe(value: object) -> str:
    return html.escape(str(value))


# ---- sending them ----


class Sender:
    """Sends windows to an environment of a visdom server: those that changed since the last time, or all."""

    def __init__(self, url: str, environment: str):
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise UserError(f"{url}: is no URL; give one such as http://127.0.0.1:8097")
        self.url, self.environment = url.rstrip("/"), environment
        self.sent: dict[str, dict] = {}
        here = urllib.parse.urlsplit(url).hostname in LOOPBACK  # where a proxy would only be in the way
        self.opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if here else []))

    def send(self, shown: dict[str, dict]) -> None:
        """Raises OSError where the server does not answer; the next time then sends everything."""
        try:
            if self.sent and not self._is_there(next(iter(self.sent))):
                self.sent = {}  # a server that was started anew, and has forgotten
            changed = {name: window for name, window in shown.items() if self.sent.get(name) != window}
            for name, window in changed.items():
                self._post("events", {"win": name, "eid": self.environment, **window})
            if changed:
                self._post("save", {"data": [self.environment]})
            self.sent |= changed
        except (OSError, http.client.HTTPException) as error:
            self.sent = {}
            raise OSError(str(error) or type(error).__name__) from None

    def _is_there(self, window: str) -> bool:
        return self._post("win_exists", {"win": window, "eid": self.environment}) == "true"

    def _post(self, path: str, message: dict) -> str:
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(message).encode("utf-8"))
        with self.opener.open(request, timeout=PATIENCE) as answer:
            return answer.read().decode("utf-8")


class LogTailer(threading.Thread):
    """Shows a run while it trains: a thread that reads the log and sends what changed, in its own time.

    However slow or dead the server is, training does not wait for it; one line says so, and one when it is back.
    """

    def __init__(self, folder: Path, url: str):
        super().__init__(daemon=True, name="dashboard")
        self.folder, self.sender = folder, Sender(url, folder.name)
        self.ended, self.answers = threading.Event(), True
        self.log_size, self.shown = -1, {}

    def run(self) -> None:
        while not self.ended.is_set():
            self._round()
            self.ended.wait(EVERY)
        self._round()

    def _round(self) -> None:
        try:
            size = (self.folder / "log.jsonl").stat().st_size
            if size != self.log_size:
                self.shown, self.log_size = windows(read_log(self.folder), self.folder), size
            self.sender.send(self.shown)
        except (OSError, UserError) as error:
            if self.answers:
                tqdm.write(
                    f"dashboard: {self.sender.url} does not answer ({error}); training goes on; start it with: "
                    "make dashboard"
                )
            self.answers = False
        else:
            if not self.answers:
                tqdm.write(f"dashboard: {self.sender.url} answers again, and shows everything")
            self.answers = True

    def __enter__(self) -> LogTailer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """One last round, for which nobody waits longer than a few seconds."""
        self.ended.set()
        self.join(2 * PATIENCE)


def show(url: str, environment: str, shown: dict[str, dict]) -> None:
    """Send windows once. Raises UserError where no server answers."""
    try:
        Sender(url, environment).send(shown)
    except OSError as error:
        raise UserError(f"--url {url}: no visdom answers ({error}); start it with: make dashboard") from None
    print(f"{url}/env/{environment}")


def main(config: Dashboard) -> None:
    if config.replay:
        show(config.url, config.replay.name, windows(read_log(config.replay), config.replay))
    elif config.compare:
        runs = {folder.name: read_log(folder) for folder in config.compare}
        show(config.url, " and ".join(runs), compared(runs))
    else:
        fetch_page(static_folder())
        serve(config.host, config.port, config.folder)


if __name__ == "__main__":
    from captioning.runtime.command_line import run
    from config import Dashboard

    run(Dashboard, main)
