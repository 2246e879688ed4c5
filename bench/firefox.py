"""Firefox without a network, driven by WebDriver BiDi, which it speaks itself: for bench/web.py and tests/test_web.py.

    https://www.w3.org/TR/webdriver-bidi/

Debian has no geckodriver, which selenium would need.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from queue import Queue
from typing import Any

SECONDS = 60.0  # for Firefox to start, and to answer a command
PREFERENCES = {
    "ui.prefersReducedMotion": 1,
    # No network: every other host is asked of a proxy that is not there
    "network.proxy.type": 1,
    "network.proxy.http": "127.0.0.1",
    "network.proxy.http_port": 1,
    "network.proxy.ssl": "127.0.0.1",
    "network.proxy.ssl_port": 1,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "app.update.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.page": 0,
    "datareporting.policy.dataSubmissionEnabled": False,
    "extensions.update.enabled": False,
    "intl.accept_languages": "en-US",
    "toolkit.telemetry.enabled": False,
}


class Firefox:
    """A tab of Firefox. What selenium's drivers have too has the same name here."""

    def __init__(self, socket: Any, process: int):
        """socket: a connection of websocket-client to Firefox, which has this process id."""
        self.socket = socket
        self.process = process
        self.sent = 0
        self.events: dict[str, list[dict]] = defaultdict(list)  # by method
        self.command("session.new", capabilities={})
        self.command("session.subscribe", events=["log.entryAdded", "network.beforeRequestSent"])
        self.context = self.command("browsingContext.getTree")["contexts"][0]["context"]

    def command(self, method: str, **params: Any) -> Any:
        """Send a command -> its result. Raises RuntimeError with the message of Firefox."""
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message["type"] == "event":
                self.events[message["method"]].append(message["params"])
            elif message["id"] == self.sent:
                if message["type"] == "error":
                    raise RuntimeError(f"{method}: {message['message']}")
                return message["result"]

    def get(self, url: str) -> None:
        """Open an address, and wait until the page is loaded."""
        self.command("browsingContext.navigate", context=self.context, url=url, wait="complete")

    def execute_script(self, script: str, *arguments: Any) -> Any:
        """The value, as JSON, that the body of a function returns."""
        code = f"(...values) => JSON.stringify((function () {{ {script} }}).apply(null, JSON.parse(values[0])) ?? null)"
        result = self.command(
            "script.callFunction",
            functionDeclaration=code,
            arguments=[{"type": "string", "value": json.dumps(arguments)}],
            awaitPromise=True,
            target={"context": self.context},
        )
        if result["type"] == "exception":
            raise RuntimeError(result["exceptionDetails"]["text"])
        return json.loads(result["result"]["value"])

    def choose_files(self, name: str, paths: Sequence[str]) -> None:
        """Choose files in the <input> with this id."""
        found = self.command(
            "browsingContext.locateNodes", context=self.context, locator={"type": "css", "value": f"#{name}"}
        )
        element = {"sharedId": found["nodes"][0]["sharedId"]}
        self.command("input.setFiles", context=self.context, element=element, files=list(paths))

    def point_at(self, x: int, y: int) -> None:
        """Move the mouse to this place, in pixels."""
        move = {"type": "pointerMove", "x": x, "y": y}
        actions = [{"type": "pointer", "id": "mouse", "actions": [move]}]
        self.command("input.performActions", context=self.context, actions=actions)

    def set_size(self, size: tuple[int, int]) -> None:
        """Give the page this width and height, in pixels."""
        viewport = {"width": size[0], "height": size[1]}
        self.command("browsingContext.setViewport", context=self.context, viewport=viewport, devicePixelRatio=1)

    def save_screenshot(self, path: str) -> None:
        """Write what the window shows as a PNG file."""
        data = self.command("browsingContext.captureScreenshot", context=self.context)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def log(self) -> list[str]:
        """Errors and warnings of the page so far."""
        self.command("browsingContext.getTree")  # events that happened before have arrived after it
        return [entry["text"] for entry in self.events["log.entryAdded"] if entry["level"] in ("error", "warn")]

    def requests(self) -> list[tuple[str, str]]:
        """Method and URL of every request so far."""
        self.command("browsingContext.getTree")
        sent = [event["request"] for event in self.events["network.beforeRequestSent"]]
        return [(request["method"], request["url"]) for request in sent]


@contextlib.contextmanager
def firefox(size: tuple[int, int] = (1280, 800)) -> Iterator[Firefox]:
    """Firefox, while the block runs, with a profile of its own."""
    from websocket import create_connection  # websocket-client, which selenium brings

    with tempfile.TemporaryDirectory(prefix="kantu-firefox-", ignore_cleanup_errors=True) as profile:
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in PREFERENCES.items()]
        Path(profile, "user.js").write_text("".join(lines), "utf-8")
        command = [str(binary()), "--headless", "--no-remote", "--profile", profile, "--remote-debugging-port", "0"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            address: Queue[str] = Queue()
            reader = threading.Thread(target=_read, args=(process.stderr or [], address))
            reader.start()
            try:
                url = f"{address.get(timeout=SECONDS)}/session"
                driver = Firefox(create_connection(url, timeout=SECONDS, suppress_origin=True), process.pid)
                driver.set_size(size)
                yield driver
            finally:
                process.terminate()
                reader.join()


def binary() -> str | None:
    """The program; None if it is not installed."""
    return shutil.which("firefox") or shutil.which("firefox-esr")


def _read(lines: Iterable[str], address: Queue[str]) -> None:
    """Find where Firefox listens, and read on: a full pipe would stop it."""
    for line in lines:
        match = re.search(r"ws://[\w.:]+", line)
        if match:
            address.put(match[0])
