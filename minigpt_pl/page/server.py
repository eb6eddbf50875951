"""Serves the page of runs that still train: on this machine only, and nothing but the page and its data."""

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LOOPBACK = "127.0.0.1"


class PageServer(ThreadingHTTPServer):
    """Answers `/` with the page and `/data.json` with the runs, both read anew each time.

    Args:
        port: The port, or 0 for a free one.
        page: Makes the page.
        runs: Reads the runs.
    """

    daemon_threads = True

    def __init__(self, port: int, page: Callable[[], str], runs: Callable[[], list[dict[str, Any]]]):
        self.contents = {
            "/": ("text/html; charset=utf-8", lambda: page().encode()),
            "/data.json": ("application/json", lambda: json.dumps({"runs": runs()}, allow_nan=False).encode()),
        }
        super().__init__((LOOPBACK, port), Handler)

    @property
    def hosts(self) -> set[str]:
        """What a browser on this machine sends as Host. Another name may be a page elsewhere that points here."""
        return {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: PageServer

    def do_GET(self) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            return self.send_error(403, "this server answers its own machine only")
        if self.path not in self.server.contents:
            return self.send_error(404)
        kind, make = self.server.contents[self.path]
        body = make()
        self.send_response(200)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
        headers |= {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        return None

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal shows the address only."""
