"""Show a captioner in the browser, on this machine: python -m captioning.serve site/, or checkpoints/RUN

site/ is a folder that `python -m captioning.export checkpoints/RUN --format web --out site/` wrote. WebAssembly has
threads only with two headers that `python -m http.server` does not send: they keep other pages out of its memory.

Of a run, the same page has the model here, and programs have POST /caption: see captioning/web/service.py.
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
from captioning.runtime.network import LOOPBACK, start_server
from captioning.runtime.signals import StopRequest

if TYPE_CHECKING:
    from tornado.web import Application, StaticFileHandler

    from captioning.captioner import Captioner
    from captioning.web.service import Service
    from config import Serve

POLL_SECONDS = 0.1  # between two looks for a stop signal
FINISH_SECONDS = 60.0  # after a stop, for the requests in work
BODY_SECONDS = 60.0  # for a request to arrive
DISCARDED = 10  # times the limit: of a larger request so much is read, for the client to see why it is refused
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
    """Serve until Ctrl-C or SIGTERM. Raises UserError."""
    check_tornado()
    if is_run(config.folder):
        serve_run(config)
    else:
        check_site(config.folder, config.options_of_run())
        asyncio.run(listen(site_application(config.folder), config.host, config.port, str(config.folder)))


def is_run(folder: Path) -> bool:
    """Whether this is a run, in any form that `Captioner.load` reads, rather than a site."""
    from captioning.runtime.packed_run import has_checkpoint, is_packed

    return folder.suffix == ".pt" or has_checkpoint(folder) or is_packed(folder)


def serve_run(config: Serve) -> None:
    """Load a run and serve it. Raises UserError."""
    from captioning.captioner import Captioner
    from captioning.web.service import Limits, Service

    captioner = Captioner.load(config.folder, config.device, config.precision, trust=config.trust)
    limits = Limits(config.batch_size, config.queue, config.max_megabytes * 10**6, config.max_megapixels * 10**6)
    service = Service.of(captioner, config.search, limits)
    service.warm_up()
    application = run_application(service, captioner, config.folder)
    what = f"{config.folder} on {captioner.device}"
    asyncio.run(listen(application, config.host, config.port, what, service))


def check_tornado() -> None:
    """Raise UserError, naming what to install, if tornado is not."""
    if importlib.util.find_spec("tornado") is None:
        raise UserError("tornado is not installed; run: pip install -c constraints.txt '.[serve]'")


def check_site(folder: Path, options_of_run: list[str]) -> None:
    """Raise UserError, with the command that helps, if the folder is not a complete site.

    options_of_run: those given that only a run has.
    """
    for name in ("index.html", "model/description.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name}: no such file; give a run, such as checkpoints/RUN, or write a site first: python -m "
                f"captioning.export checkpoints/RUN --format web --out {folder}"
            )
    if options_of_run:
        raise UserError(f"{options_of_run[0]}: applies to a run, but {folder} is a site, whose model is in the browser")


def site_application(folder: Path) -> Application:
    """A tornado application that serves the files of a folder."""
    from tornado.web import Application

    settings: dict[str, Any] = {"path": str(folder.resolve()), "default_filename": "index.html"}
    return Application([(r"/(.*)", site_handler(), settings)], log_function=lambda handler: None)


def run_application(service: Service, captioner: Captioner, run: Path) -> Application:
    """A tornado application that answers POST /caption and serves the page."""
    from tornado.web import Application, RequestHandler

    from captioning.web.service import caption_handler
    from captioning.web.site import PAGE, service_description

    description = service_description(captioner, run)

    class DescriptionHandler(RequestHandler):
        """What the page needs to know of the model."""

        def get(self) -> None:
            for name, value in HEADERS.items():
                self.set_header(name, value)
            self.finish(description)

    settings: dict[str, Any] = {"path": str(PAGE), "default_filename": "index.html"}
    handlers: list[Any] = [
        ("/caption", caption_handler(service)),
        ("/model/description.json", DescriptionHandler),
        (r"/(.*)", site_handler(), settings),
    ]
    return Application(handlers, log_function=lambda handler: None)


def site_handler() -> type[StaticFileHandler]:
    """The tornado handler of the files of a page."""
    from tornado.web import StaticFileHandler

    class SiteHandler(StaticFileHandler):
        """A file, with the headers that threads need."""

        def set_extra_headers(self, path: str) -> None:
            for name, value in HEADERS.items():
                self.set_header(name, value)

        def get_content_type(self) -> str:
            return TYPES.get(Path(self.absolute_path or "").suffix, "application/octet-stream")

    return SiteHandler


async def listen(application: Application, host: str, port: int, what: str, service: Service | None = None) -> None:
    """Answer requests until Ctrl-C, SIGTERM, or the task is cancelled; then finish those in work.

    what: for the line that says where. service: of the application, if it has one. Raises UserError.
    """
    limits: dict[str, Any] = {}
    if service:
        limits = {"max_body_size": DISCARDED * service.limits.bytes, "body_timeout": BODY_SECONDS}
    server = start_server(application, host, port, **limits)
    if host not in LOOPBACK:
        print(
            f"WARNING: anyone who can reach {host}:{port} can open this page; elsewhere than on this machine, threads, "
            "WebGPU and the camera need https"
        )
    print(f"{what}: http://{host}:{port}, press Ctrl-C to stop", flush=True)
    with StopRequest() as stop:  # a second Ctrl-C ends at once
        while not stop.requested:
            await asyncio.sleep(POLL_SECONDS)
        server.stop()
        if service:
            await finish(service)
        await server.close_all_connections()
    print("stopped")


async def finish(service: Service) -> None:
    """Let a service answer the requests in work, for some time."""
    try:
        await asyncio.wait_for(service.finish(), FINISH_SECONDS)
    except asyncio.TimeoutError:
        print(f"WARNING: {service.open} requests were not answered within {FINISH_SECONDS:.0f} s")


if __name__ == "__main__":
    from captioning.runtime.command_line import run
    from config import Serve

    run(Serve, main)
