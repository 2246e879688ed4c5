"""Runs in visdom: live, replayed or compared. The windows are built from log.jsonl alone.

A run has an environment of its own, a page in visdom, named after its folder; a comparison has another.
Windows are sent complete, and only if they have changed. A server that has died and restarted gets all of them with the
next update.
"""

from __future__ import annotations

import base64
import hashlib
import html
import http.client
import json
import os
import platform
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from captioning.errors import UserError
from captioning.runtime.log import preview_picture, read_log
from captioning.runtime.network import LOOPBACK
from captioning.viewing.curves import PLOTS, Curve, curves
from captioning.viewing.log_tailer import LogTailer
from captioning.viewing.visdom_server import PASSWORD, password_hash

Windows = dict[str, dict]  # name -> window, as visdom's server expects it

TIMEOUT = 5.0  # seconds for one response of the server
MAX_NAME = 150  # bytes of an environment's name, which is also that of a file
START_COMMAND = "python -m captioning.dashboard"
SHOWN_SETTINGS = (  # keys of the start event that are shown, in addition to config and versions; and the run's folder
    "folder",
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


# ---- building windows


def run_windows(events: list[dict], folder: Path) -> Windows:
    """Build the windows of a run: its plots, its settings, and the preview photos of the last epoch.

    events: of log.jsonl; folder: of the run, with the pictures that the events name.
    """
    windows = {title: _plot(title, _curves(events, title)) for title in PLOTS}
    starts = [event for event in events if event["event"] == "start"]
    if starts:
        start = {"folder": os.path.realpath(folder), **starts[-1]}
        windows["settings"] = _text_window("settings", _settings_html(start))
    epochs = [event for event in events if event["event"] == "epoch"]
    if epochs:
        for number, entry in enumerate(epochs[-1].get("preview", []), start=1):
            title = f"photo {number}"
            windows[title] = _text_window(title, _photo_html(entry, folder), width=900, height=330)
    return windows


def comparison_windows(runs: dict[str, list[dict]]) -> Windows:
    """Build plots with the curves of several runs. runs: name -> events."""
    windows = {}
    for title in PLOTS:
        of_all = [
            curve._replace(name=f"{run}: {curve.name}")
            for run, events in runs.items()
            for curve in _curves(events, title)
        ]
        windows[title] = _plot(title, of_all)
    return windows


def _curves(events: list[dict], title: str) -> list[Curve]:
    """The curves of a plot that have points; if none has, an empty one, since visdom needs at least one."""
    return curves(events, title) or [Curve(PLOTS[title][0].name, [], [])]


def _plot(title: str, curves: list[Curve]) -> dict:
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(curve.x) < 50 else "lines",
            "name": html.escape(curve.name),
            "x": curve.x,
            "y": curve.y,
        }
        for curve in curves
    ]
    layout = {
        "xaxis": {"title": "epoch"},
        "yaxis": {"exponentformat": "e"},
        "showlegend": True,
        "margin": {"l": 60, "r": 20, "t": 30, "b": 50},
    }
    return {"data": data, "layout": layout, "opts": {"title": title, "width": 440, "height": 320}}


def _text_window(title: str, content: str, width: int = 440, height: int = 320) -> dict:
    return {
        "data": [{"type": "text", "content": content}],
        "layout": {},
        "opts": {"title": title, "width": width, "height": height},
    }


def _settings_html(start: dict) -> str:
    """A table of the requested settings, the versions, and what the run resolved them to."""
    settings = start.get("config", {}) | start.get("versions", {})
    settings |= {key: start[key] for key in SHOWN_SETTINGS if key in start}
    rows = [f"<tr><td>{_escape(key)}&nbsp;</td><td>{_escape(value)}</td></tr>" for key, value in settings.items()]
    return f"<table>{''.join(rows)}</table>"


def _photo_html(entry: dict, folder: Path) -> str:
    """The preview picture, the caption and the references. All text is escaped."""
    image = ""
    path = preview_picture(entry, folder)
    if path:
        encoded = base64.b64encode(path.read_bytes()).decode("ascii")
        image = f'<img style="max-width:100%" src="data:image/png;base64,{encoded}">'
    references = "".join(f"<li>{_escape(text)}</li>" for text in entry["references"])
    return f"{image}<p><b>{_escape(entry['caption'])}</b></p><p>References:</p><ul>{references}</ul>"


def _escape(value: object) -> str:
    return html.escape(str(value))


# ---- sending windows


def environment_of(*folders: Path) -> str:
    """The environment of a run, or of several that are compared: the same for these folders alone, on this machine."""
    paths = [os.path.realpath(folder) for folder in folders]
    name = " and ".join(os.path.basename(path) for path in paths)
    name = name.encode("utf-8", "replace")[:MAX_NAME].decode("utf-8", "ignore")
    digest = hashlib.sha256(os.fsencode("\0".join([platform.node(), *paths]))).hexdigest()
    return f"{name}-{digest[:8]}"


def page_url(url: str, environment: str) -> str:
    """The address of an environment."""
    return f"{url}/env/{urllib.parse.quote(environment, safe='')}"


class LoginError(OSError):
    """A server that answers, but not without a login, or not with this one."""


class VisdomClient:
    """Sends windows to an environment of a visdom server, and only those that have changed since the last time."""

    def __init__(self, url: str, environment: str, user: str | None = None):
        """user: of a server with a login; may also be in the URL: http://user@host:8097.

        Raises UserError if `url` is not an HTTP URL, or the user's password is not in the environment variable.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise UserError(f"{url}: is no URL; give one such as http://127.0.0.1:8097")
        self.url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
        self.environment = environment
        user = user or urllib.parse.unquote(parts.username or "")
        self.login = {"username": user, "password": password_hash(user)} if user else None
        self.sent: Windows = {}
        handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPCookieProcessor()]  # keeps the login
        if parts.hostname in LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))  # no proxy for this machine
        self.opener = urllib.request.build_opener(*handlers)

    def send(self, windows: Windows) -> None:
        """Send the windows that have changed.

        Raises OSError if the server does not answer, LoginError if it refuses; the next call then sends all windows.
        """
        try:
            if self.login and not self.sent:
                self._log_in(self.login)
            self._send_changed(windows)
        except LoginError:
            self.sent = {}
            raise
        except (OSError, http.client.HTTPException) as error:
            self.sent = {}
            raise OSError(str(error) or type(error).__name__) from None

    def _send_changed(self, windows: Windows) -> None:
        if self.sent and not self._exists(next(iter(self.sent))):
            self.sent = {}  # the server has restarted and lost its windows
        changed = {name: window for name, window in windows.items() if self.sent.get(name) != window}
        for name, window in changed.items():
            self._post("events", {"win": name, "eid": self.environment, **window})
        if changed:
            self._post("save", {"data": [self.environment]})
        self.sent |= changed

    def _log_in(self, login: dict[str, str]) -> None:
        """Get the cookie of a user. visdom answers a wrong login with 400, and fails with 500 if it has no login."""
        try:
            self._post("", login)
        except LoginError:
            raise LoginError(f"refuses the user {login['username']} with the password in {PASSWORD}") from None
        except urllib.error.HTTPError as error:
            raise LoginError(f"cannot log in a user ({error}); leave the user out if the server has no login") from None

    def _exists(self, window: str) -> bool:
        return self._post("win_exists", {"win": window, "eid": self.environment}) == "true"

    def _post(self, path: str, message: dict) -> str:
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(message).encode("utf-8"))
        try:
            with self.opener.open(request, timeout=TIMEOUT) as response:
                return response.read().decode("utf-8")
        except urllib.error.HTTPError as error:
            if error.code == 400:  # visdom's answer to a client without a login
                raise LoginError(f"asks for a login; give its user, and the password in {PASSWORD}") from None
            raise


class VisdomTailer(LogTailer):
    """Shows a run in visdom while it trains."""

    def __init__(self, folder: Path, url: str):
        super().__init__(folder, "dashboard")
        self.client = VisdomClient(url, environment_of(folder))
        self.windows: Windows = {}

    def read(self, events: list[dict]) -> None:
        """Rebuild the windows."""
        self.windows = run_windows(events, self.folder)

    def show(self) -> None:
        """Send the windows that have changed, or all of them to a server that has restarted."""
        self.client.send(self.windows)

    def announcement(self) -> str:
        """The address of the run's page."""
        return page_url(self.client.url, self.client.environment)

    def problem(self, error: Exception) -> str:
        """What is wrong with the server, and what to do."""
        return f"{self.client.url} {_problem(error)}"

    def recovery(self) -> str:
        """The server is back."""
        return f"{self.client.url} answers again and shows all windows"


def _problem(error: Exception) -> str:
    """What is wrong with the server, after its URL, and what to do."""
    if isinstance(error, (LoginError, UserError)):
        return str(error)
    return f"does not answer ({error}); start it with: {START_COMMAND}"


def send_once(url: str, environment: str, windows: Windows, user: str | None) -> None:
    """Send windows and print the URL of their page. Raises UserError if the server does not answer."""
    client = VisdomClient(url, environment, user)
    try:
        client.send(windows)
    except OSError as error:
        raise UserError(f"--url {client.url}: {_problem(error)}") from None
    print(page_url(client.url, environment))


def replay(folder: Path, url: str, user: str | None = None) -> None:
    """Show a run, rebuilt from its log."""
    send_once(url, environment_of(folder), run_windows(read_log(folder), folder), user)


def compare(folders: Sequence[Path], url: str, user: str | None = None) -> None:
    """Show the curves of several runs in the same plots."""
    runs = {name: read_log(folder) for name, folder in zip(run_names(folders), folders, strict=True)}
    send_once(url, environment_of(*folders), comparison_windows(runs), user)


def run_names(folders: Sequence[Path]) -> list[str]:
    """The names of the runs, with as many folders above them as tell all of them apart.

    Raises UserError if a folder occurs twice.
    """
    parts = [Path(os.path.realpath(folder)).parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise UserError(f"--compare {' '.join(map(str, folders))}: has a run twice; give each run once")
    length = 1
    while len({path[-length:] for path in parts}) < len(parts):
        length += 1
    return [str(Path(*path[-length:])) for path in parts]
