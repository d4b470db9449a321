"""A server on loopback for as long as a `with` lasts."""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

Server = TypeVar("Server", bound="Loopback")


class Loopback(ThreadingHTTPServer):
    """Serves at `url`, with `handler`; `log` is for the requests that it has answered."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.log: list[str] = []

    def __enter__(self: Server) -> Server:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # a client that was killed hangs up in the midst of an answer
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)
