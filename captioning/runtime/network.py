"""Servers: where they listen, and who can reach them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from captioning.errors import UserError
from captioning.runtime.library_errors import reason

if TYPE_CHECKING:
    from tornado.httpserver import HTTPServer
    from tornado.web import Application

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # what listens here is reached from this machine alone


def start_server(application: Application, host: str, port: int, **settings: Any) -> HTTPServer:
    """Serve a tornado application. settings: of tornado's HTTPServer. Raises UserError if it cannot listen there."""
    try:
        return application.listen(port, address=host, **settings)
    except OSError as error:
        raise UserError(f"--port {port}: cannot listen on {host} ({reason(error)}); give another --port") from None
