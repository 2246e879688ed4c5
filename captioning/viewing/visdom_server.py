"""Run visdom's server, and download the scripts of its page once.

visdom itself downloads them from five hosts at every start, with long timeouts, and serves a blank page without them.
Here they come from one CDN, or, if it does not answer within seconds, from the same packages in the npm registry.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import logging
import os
import secrets
from pathlib import Path

from captioning.errors import UserError
from captioning.runtime.files import atomic_write, write_errors
from captioning.runtime.network import LOOPBACK, start_server
from captioning.runtime.npm import Source, fetch
from captioning.runtime.quiet import quiet

PASSWORD = "VISDOM_PASSWORD"  # the environment variable that holds the password of --user
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
SOURCES = (  # the versions that visdom 0.2.4 uses; paths in its static folder
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
    """Return the folder of visdom's page and scripts. Raises UserError if visdom is not installed."""
    spec = importlib.util.find_spec("visdom")
    if spec is None or spec.origin is None:
        raise UserError(
            "visdom is not installed; run: make dashboard, or: pip install -c constraints.txt '.[dashboard]'"
        )
    return Path(spec.origin).parent / "static"


def fetch_page(static: Path) -> None:
    """Download the page's scripts into `static`, unless they exist. Raises UserError if they cannot be downloaded."""
    fetch(SOURCES, static, "visdom's page")


def password_hash(user: str) -> str:
    """What a client of visdom sends as the password. Raises UserError if the environment variable is not set."""
    password = os.environ.get(PASSWORD)
    if not password:
        raise UserError(f"--user {user}: set the environment variable {PASSWORD} to the user's password")
    return hashlib.sha256(password.encode("utf-8")).hexdigest()


def _credential(user: str, folder: Path) -> dict[str, str]:
    """What visdom compares logins with. The secret that signs its cookies is kept in `folder`, for the next start."""
    from visdom.server import app

    credential = {"username": user, "password": hashlib.sha256(password_hash(user).encode("ascii")).hexdigest()}
    secret = folder / "COOKIE_SECRET"
    if not secret.exists():
        with write_errors(secret, "give another --folder"), atomic_write(secret) as file:
            file.write(secrets.token_hex(32).encode("ascii"))
        secret.chmod(0o600)
    app.DEFAULT_ENV_PATH = f"{folder}{os.sep}"  # where visdom reads the secret from; its home, unless changed
    return credential


def serve(host: str, port: int, folder: Path, user: str | None = None) -> None:
    """Run visdom until Ctrl-C; its environments are stored in `folder`.

    user: who may log in, with the password of the environment variable VISDOM_PASSWORD; None asks for no login.
    Raises UserError if the port is in use, or there is no password.
    """
    static_folder()
    from visdom.server.app import Application

    async def run_server() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        credential = _credential(user, folder) if user else None
        application = Application(port=port, base_url="", env_path=str(folder), user_credential=credential)
        start_server(application, host, port, max_buffer_size=1024**3)
        if host not in LOOPBACK and not user:
            print(f"WARNING: anyone who can reach {host}:{port} can read and change these pages without a password")
        print(f"visdom: http://{host}:{port}, environments in {folder}; press Ctrl-C to stop", flush=True)
        await asyncio.Event().wait()

    with quiet("tornado.general", level=logging.CRITICAL):  # it logs a missing user style sheet at each page
        asyncio.run(run_server())
