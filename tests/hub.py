"""The download half of a Hub, on loopback: folders served as revisions of repositories."""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from .loopback import Loopback

COLLECTION = re.compile(r"^/api/collections/(?P<slug>[^/]+/[^/]+)$")
RESOLVE = re.compile(r"^/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)$")


class Hub(Loopback):
    """``with Hub({"org/name": {"main": folder, "v1": folder}}) as hub:`` serves at ``hub.url``; `hub.log` lists
    requests.

    `collections`: slug → the (type, id) of its items.
    """

    def __init__(
        self, repos: dict[str, dict[str, Path]], collections: dict[str, list[tuple[str, str]]] | None = None
    ) -> None:
        super().__init__(Handler)
        self.collections = collections or {}
        self.repos = repos


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        self.server.log.append(f"{self.command} {self.path}")

    def do_GET(self) -> None:
        if (wanted := COLLECTION.match(self.path)) and (
            items := self.server.collections.get(wanted["slug"])
        ) is not None:
            entries = [
                {"_id": str(n), "id": name, "type": kind, "position": n} for n, (kind, name) in enumerate(items)
            ]
            facts = {"slug": wanted["slug"], "title": "", "owner": {"name": "org"}, "items": entries, "position": 0}
            facts |= {"lastUpdated": "2026-01-01T00:00:00.000Z", "private": False, "theme": "blue", "upvotes": 0}
            return self.answer(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})
        found = RESOLVE.match(self.path)
        revisions = self.server.repos.get(found["repo"]) if found else None
        if revisions is None:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        commits = {commit_of(folder): folder for folder in revisions.values()}
        folder = revisions.get(found["revision"]) or commits.get(found["revision"])
        if folder is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        file = folder / found["path"]
        commit = {"X-Repo-Commit": commit_of(folder)}
        if not file.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", **commit})
        data = file.read_bytes()
        return self.answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', **commit})

    do_HEAD = do_GET

    def answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def commit_of(folder: Path) -> str:
    """A commit sha that depends on the folder's contents."""
    contents = {
        str(p.relative_to(folder)): hashlib.sha1(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }
    return hashlib.sha1(json.dumps(contents, sort_keys=True).encode()).hexdigest()
