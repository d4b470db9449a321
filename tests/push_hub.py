"""A Hub that takes uploads, on loopback and in memory: repositories, branches, commits, large files, tokens,
ranges."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .loopback import Loopback

LARGE = re.compile(r"\.(safetensors|bin)$")
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<verb>branch|preupload|commit|revision|tree|paths-info)/(?P<revision>[^/]+).*"
)
BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        text = json.dumps(
            [len(self.commits), *((path, hashlib.sha1(data).hexdigest()) for path, data in files.items())]
        )
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.names[branch] = files, sha
        return sha

    def sha(self, revision: str) -> str | None:
        return self.names.get(revision) or (revision if revision in self.commits else None)


class PushHub(Loopback):
    """``with PushHub() as hub:`` serves at `hub.url`. `hub.log` lists requests, each ``METHOD path``; where `token` is
    given, writing and reading what is private needs it."""

    def __init__(self, token: str | None = None) -> None:
        super().__init__(Handler)
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.sent = 0

    def put(self, repo_id: str, folder: Path, branch: str = "main", private: bool = False) -> str:
        """Commit the files of a folder."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        return self.repos.setdefault(repo_id, Repo(private)).commit(branch, files)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.sha(revision)]

    def gets(self) -> list[str]:
        """Paths of files that were fetched, heads aside."""
        return [line[4:] for line in self.log if line.startswith("GET ") and "/resolve/" in line]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: PushHub

    def log_message(self, *_: object) -> None:
        self.server.log.append(f"{self.command} {self.path}")

    def do_any(self) -> None:
        body, path = self._body(), unquote(urlsplit(self.path).path)
        known = self.server.token is None or self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if found := RESOLVE.fullmatch(path):
            return self._resolve(known, **found.groupdict())
        if path.startswith("/large/"):
            return self._large(path.split("/")[2], body)
        if not known:
            return self._send(401, {"error": "no such token"})
        given = json.loads(body) if body[:1] == b"{" and "\n" not in body.decode("utf-8", "replace").strip() else {}
        if path == "/api/repos/create":
            repo_id = f"{given.get('organization') or 'me'}/{given['name']}"
            private = bool(given.get("private")) or given.get("visibility") == "private"
            status = 409 if repo_id in self.server.repos else 200
            repo = self.server.repos.setdefault(repo_id, Repo(private))
            if not repo.commits:
                repo.commit("main", {})
            return self._send(status, {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id})
        if path in ("/api/validate-yaml", "/api/whoami-v2"):
            return self._send(200, {"errors": [], "warnings": [], "name": "me", "type": "user", "orgs": []})
        if BATCH.fullmatch(path):
            return self._send(200, {"transfer": "basic", "objects": [self._wanted(each) for each in given["objects"]]})
        if (found := API.fullmatch(path)) and found["repo"] in self.server.repos:
            repo, verb, revision = (
                self.server.repos[found["repo"]],
                found["verb"] or "revision",
                found["revision"] or "main",
            )
            given = given or parse_qs(body.decode("utf-8", "replace"))
            return self._api(verb, repo, found["repo"], revision, given, body)
        return self._send(404, {"error": f"{self.command} {path}"}, X_Error_Code="RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = do_any

    def _api(self, verb: str, repo: Repo, repo_id: str, revision: str, given: dict[str, Any], body: bytes) -> None:
        sha = repo.sha(revision)
        if verb == "branch":
            status = 409 if sha else 200
            repo.names.setdefault(revision, repo.names["main"])
            return self._send(status, {})
        if verb == "preupload":
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if LARGE.search(each["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for each in given["files"]
            ]
            return self._send(200, {"files": modes, "commitOid": sha})
        if sha is None:
            return self._send(404, {"error": "no revision"}, X_Error_Code="RevisionNotFound")
        if verb == "commit":
            files = dict(repo.commits[sha])
            for line in body.splitlines()[1:]:
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
            new = repo.commit(revision, files)
            return self._send(200, {"commitOid": new, "commitUrl": f"{self.server.url}/{repo_id}/commit/{new}"})
        names = sorted(repo.commits[sha])
        if verb in ("tree", "paths-info"):
            wanted = [name for name in names if verb == "tree" or name in given["paths"]]
            sizes = [(name, len(repo.commits[sha][name])) for name in wanted]
            return self._send(200, [{"type": "file", "path": name, "size": size, "oid": sha} for name, size in sizes])
        return self._send(200, {"id": repo_id, "sha": sha, "siblings": [{"rfilename": name} for name in names]})

    def _wanted(self, entry: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.server.url}/large/{entry['oid']}"
        return entry if entry["oid"] in self.server.large else {**entry, "actions": {"upload": {"href": href}}}

    def _large(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "sha256"})
        self.server.large[oid] = body
        return self._send(200, {})

    def _resolve(self, known: bool, repo: str, revision: str, path: str) -> None:
        found = self.server.repos.get(repo)
        if found is None or (found.private and not known):
            return self._send(404 if known else 401, {"error": "repository"}, X_Error_Code="RepoNotFound")
        sha = found.sha(revision)
        if sha is None:
            return self._send(404, {"error": "revision"}, X_Error_Code="RevisionNotFound")
        if path not in found.commits[sha]:
            return self._send(404, {"error": "entry"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        data = found.commits[sha][path]
        headers = {"X_Repo_Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept_Ranges": "bytes"}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
            where = f"bytes {start}-{end}/{len(data)}"
            return self._send(206, data[start : end + 1], Content_Range=where, **headers)
        return self._send(200, data, **headers)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content_Type": "application/json", **headers, "Content_Length": str(len(data))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.server.sent += len(data)
            self.wfile.write(data)
