"""Show a captioner in the browser, on this machine: python -m captioning.serve site/

site/ is a folder that `python -m captioning.export checkpoints/RUN --format web --out site/` wrote. WebAssembly has
threads only with two headers that `python -m http.server` does not send: they keep other pages out of its memory.
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.start import start_command

    start_command()

import asyncio
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning.errors import UserError
from captioning.runtime.library_errors import reason

if TYPE_CHECKING:
    from tornado.web import Application

    from config import Serve

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # ask each time whether a file has changed: it may have been exported again
}
TYPES = {  # some systems have others for these, with which browsers do not run them
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}


def main(config: Serve) -> None:
    """Serve until Ctrl-C. Raises UserError."""
    check_tornado()
    check_site(config.folder)
    asyncio.run(listen(site_application(config.folder), config.host, config.port, str(config.folder)))


def check_tornado() -> None:
    """Raise UserError, naming what to install, if tornado is not."""
    if importlib.util.find_spec("tornado") is None:
        raise UserError("tornado is not installed; run: pip install -c constraints.txt '.[serve]'")


def check_site(folder: Path) -> None:
    """Raise UserError, with the command that helps, if the folder is not a complete site."""
    if (folder / "best.pt").exists() or folder.suffix == ".pt":
        raise UserError(
            f"{folder}: a run, not a site; write one: python -m captioning.export {folder} --format web --out site/"
        )
    for name in ("index.html", "model/description.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name}: no such file; write a site first: python -m captioning.export checkpoints/RUN "
                f"--format web --out {folder}"
            )


def site_application(folder: Path) -> Application:
    """A tornado application that serves the files of a folder."""
    from tornado.web import Application, StaticFileHandler

    class SiteHandler(StaticFileHandler):
        """A file, with the headers that threads need."""

        def set_extra_headers(self, path: str) -> None:
            for name, value in HEADERS.items():
                self.set_header(name, value)

        def get_content_type(self) -> str:
            return TYPES.get(Path(self.absolute_path or "").suffix, "application/octet-stream")

    settings: dict[str, Any] = {"path": str(folder.resolve()), "default_filename": "index.html"}
    return Application([(r"/(.*)", SiteHandler, settings)], log_function=lambda handler: None)


async def listen(application: Application, host: str, port: int, what: str) -> None:
    """Answer requests until the task is cancelled. what: for the line that says where. Raises UserError."""
    try:
        application.listen(port, address=host)
    except OSError as error:
        raise UserError(f"--port {port}: cannot listen on {host} ({reason(error)}); give another --port") from None
    if host not in LOOPBACK:
        print(
            f"WARNING: anyone who can reach {host}:{port} can open this page; elsewhere than on this machine, threads, "
            "WebGPU and the camera need https"
        )
    print(f"{what}: http://{host}:{port}, press Ctrl-C to stop", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    from captioning.runtime.command_line import run
    from config import Serve

    run(Serve, main)
