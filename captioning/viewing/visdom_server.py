"""visdom's server, and the scripts of its page: they are fetched once, and never again.

visdom itself fetches them from five hosts at every start, waits long for each, and serves a blank page without them.
Here they come from one CDN, or, where that does not answer within seconds, from the same packages of npm.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from captioning.errors import UserError
from captioning.runtime.files import atomic_write

CDN = "https://unpkg.com/{package}@{version}/{path}"
PATIENCE = 4.0  # seconds for one file; the first that does not come sends us to npm
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Source(NamedTuple):
    package: str  # of npm
    version: str  # as in visdom 0.2.4's own list
    paths: dict[str, str]  # in the package -> in visdom's static folder


GLYPHS = "fonts/glyphicons-halflings-regular."
MATHJAX = (
    "MathJax.js",
    "config/Safe.js",
    "config/TeX-AMS-MML_HTMLorMML.js",
    "extensions/Safe.js",
    "jax/output/SVG/config.js",
    "jax/output/SVG/jax.js",
    "jax/output/SVG/fonts/TeX/fontdata.js",
    "jax/output/SVG/fonts/TeX/Size1/Regular/Main.js",
)
SOURCES = (
    Source("jquery", "3.1.1", {"dist/jquery.min.js": "js/jquery.min.js"}),
    Source(
        "bootstrap",
        "3.3.7",
        {
            "dist/js/bootstrap.min.js": "js/bootstrap.min.js",
            "dist/css/bootstrap.min.css": "css/bootstrap.min.css",
            **{f"dist/{GLYPHS}{kind}": GLYPHS + kind for kind in ("eot", "svg", "ttf", "woff", "woff2")},
        },
    ),
    Source("react", "16.2.0", {"umd/react.production.min.js": "js/react-react.min.js"}),
    Source("react-dom", "16.2.0", {"umd/react-dom.production.min.js": "js/react-dom.min.js"}),
    Source("react-modal", "3.1.10", {"dist/react-modal.min.js": "js/react-modal.min.js"}),
    Source("plotly.js-dist-min", "2.11.1", {"plotly.min.js": "js/plotly-plotly.min.js"}),
    Source("sjcl", "1.0.7", {"sjcl.js": "js/sjcl.js"}),
    Source("layout-bin-packer", "1.4.0", {"dist/layout-bin-packer.js": "js/layout_bin_packer.js"}),
    Source("d3", "3.5.17", {"d3.min.js": "js/d3.v3.min.js"}),
    Source("d3-selection-multi", "1.0.1", {"build/d3-selection-multi.js": "js/d3-selection-multi.v1.js"}),
    Source("save-svg-as-png", "1.4.17", {"lib/saveSvgAsPng.js": "js/saveSvgAsPng.js"}),
    Source("react-resizable", "1.4.6", {"css/styles.css": "css/react-resizable-styles.css"}),
    Source("react-grid-layout", "0.16.3", {"css/styles.css": "css/react-grid-layout-styles.css"}),
    Source("mathjax", "2.7.5", {path: f"js/mathjax/2.7.5/{path}" for path in MATHJAX}),
)


def static_folder() -> Path:
    """Where the installed visdom serves its page from. Raises UserError where visdom is not installed."""
    found = importlib.util.find_spec("visdom")
    if found is None:
        raise UserError(
            "visdom is not installed; run: make dashboard, or: pip install -c constraints.txt '.[dashboard]'"
        )
    return Path(found.origin).parent / "static"


def fetch_page(static: Path) -> None:
    """Put what the page needs into `static`, where it is not there yet. Raises UserError where it cannot be had."""
    wanted = [source for source in SOURCES if any(not (static / to).exists() for to in source.paths.values())]
    if not wanted:
        return
    print("fetching the scripts of visdom's page, once")
    ways, reasons = [_from_cdn, _from_npm], []
    for source in wanted:
        files = _fetch(source, ways, reasons)
        for path, to in source.paths.items():
            _write(static / to, files[path])


def _fetch(source: Source, ways: list[Callable[[Source], dict[str, bytes]]], reasons: list[str]) -> dict[str, bytes]:
    """The files of a package, by the first way that works; one that has failed is not tried again."""
    while ways:
        try:
            return ways[0](source)
        except OSError as error:
            reasons.append(str(error))
            ways.pop(0)
    raise UserError(
        f"visdom's page needs scripts that could not be fetched ({'; '.join(reasons)}); connect this machine to the "
        "internet once, or install npm (apt install npm) where a registry can be reached, and start again"
    )


def _from_cdn(source: Source) -> dict[str, bytes]:
    files = {}
    for path in source.paths:
        url = CDN.format(package=source.package, version=source.version, path=path)
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            files[path] = answer.read()
    return files


def _from_npm(source: Source) -> dict[str, bytes]:
    """The files of one package, as `npm pack` brings it. Raises OSError where it does not."""
    npm, name = shutil.which("npm"), f"{source.package}@{source.version}"
    if npm is None:
        raise OSError("npm is not installed")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([npm, "pack", "--silent", name], cwd=folder, capture_output=True, text=True)
        packed = list(Path(folder).glob("*.tgz"))
        if done.returncode or not packed:
            raise OSError(f"npm pack {name} failed")
        with tarfile.open(packed[0]) as archive:  # read, never unpacked: nothing in it chooses where it goes
            found = json.loads(archive.extractfile("package/package.json").read())["version"]
            if found != source.version:
                raise OSError(f"npm pack {name} brought {found}")
            return {path: archive.extractfile(f"package/{path}").read() for path in source.paths}


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: a file that is there is complete."""
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); install Kantu where you may write") from None


def serve(host: str, port: int, folder: Path) -> None:
    """Run visdom until Ctrl-C; environments are kept in `folder`. Raises UserError where the port is taken."""
    static_folder()
    logging.getLogger("tornado.general").setLevel(logging.CRITICAL)  # it complains of a user's style sheet at each page
    from visdom.server.app import Application

    async def forever() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        application = Application(port=port, base_url="", env_path=str(folder))
        try:
            application.listen(port, address=host, max_buffer_size=1024**3)
        except OSError as error:
            raise UserError(f"--port {port}: cannot listen on {host} ({error.strerror}); give another --port") from None
        if host not in LOOPBACK:
            print(f"WARNING: anyone who can reach {host}:{port} can read and change these pages; no password is asked")
        print(f"visdom: http://{host}:{port}, environments in {folder}; Ctrl-C ends it", flush=True)
        await asyncio.Event().wait()

    asyncio.run(forever())
