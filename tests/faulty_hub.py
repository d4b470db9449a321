"""A Hub that does not answer at times: `PushHub` with faults that are due, each in the place of one answer."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http

from subspace_peft import hub_requests

from .push_hub import Handler, PushHub

# what takes the place of an answer: a status, or what happens to the connection
FAULTS: tuple[int | str, ...] = (429, 500, 503, "reset", "cut off")


class FaultyHub(PushHub):
    """``hub.due(503, times=2)``: the next two requests are answered so; `asked` counts all requests.

    Attributes:
        fault: what is due.
        left: how many times.
        only: of which requests, as a pattern of ``METHOD path``.
        headers: of answers with a status.
        collections: slug → models.
    """

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = FaultyHandler
        self.collections: dict[str, list[str]] = {}
        self.due(None)

    def due(self, fault: int | str | None, times: float = 1, only: str = "", **headers: str) -> None:
        self.fault, self.left, self.only, self.headers, self.asked = fault, times, only, headers, 0


class FaultyHandler(Handler):
    server: FaultyHub

    def do_faulty(self) -> None:
        hub = self.server
        hub.asked += 1
        line = f"{self.command} {self.path}"
        head_is_whole = hub.fault == "cut off" and self.command == "HEAD"
        if hub.fault is None or hub.left <= 0 or not re.search(hub.only, line) or head_is_whole:
            return self._answer()
        hub.left -= 1
        if hub.fault == "lost":
            # carried out, and the answer does not arrive
            self.wfile = SimpleNamespace(write=lambda data: len(data), flush=lambda: None, close=lambda: None)
            self._answer()
            return self._hang_up()
        self._body()
        if hub.fault == "reset":
            return self._hang_up()
        if hub.fault == "cut off":
            ranged = self.headers.get("Range")
            self.send_response(206 if ranged else 200)
            if ranged:
                self.send_header("Content-Range", "bytes 0-99998/99999")
            for name, value in {"Content-Length": "99999", "ETag": '"x"', "X-Repo-Commit": "a" * 40}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"{")
            return self._hang_up()
        return self._send(int(hub.fault), b"", **hub.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_faulty

    def _answer(self) -> None:
        models = self.server.collections.get(self.path.removeprefix("/api/collections/"))
        if models is None:
            return self.do_any()
        items = [{"_id": str(n), "id": name, "type": "model", "position": n} for n, name in enumerate(models)]
        facts: dict[str, Any] = {"slug": "org/c-1", "title": "", "owner": {"name": "org"}, "items": items}
        facts |= {"lastUpdated": "2026-01-01T00:00:00.000Z", "private": False, "theme": "blue", "upvotes": 0}
        return self._send(200, {**facts, "position": 0})

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def point_here(monkeypatch: pytest.MonkeyPatch, url: str, cache: str) -> None:
    """Have this process's huggingface_hub ask `url`, with an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)


def without_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let waiting take no time, and return the pauses that this package would have made, as they come."""
    paused: list[float] = []
    clock = SimpleNamespace(sleep=lambda seconds: None, monotonic=lambda: 0.0, time=hub_requests.time.time)
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr(file_download, "time", clock)
    own = SimpleNamespace(sleep=paused.append, monotonic=lambda: sum(paused), time=hub_requests.time.time)
    monkeypatch.setattr(hub_requests, "time", own)
    return paused


Call = Callable[[], Any]
