"""The bytes of a bundle's file: on this machine, or on the Hub, where only what is asked for is fetched."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..errors import BadFileError, SubspaceError
from .format import BUNDLE_FILE

# what the first request fetches: the header of some hundred tasks, and all of a small bundle
FIRST = 128 * 1024
SHA = re.compile(r"[0-9a-f]{40}")
SPAN = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class FileBytes:
    """A file on this machine.

    Attributes:
        size: in bytes.
        revision: commit sha, where it is a file of the Hub's cache.
        state: what changes where somebody replaces or writes the file.
    """

    def __init__(self, file: Path, where: str | None = None, revision: str | None = None) -> None:
        self.file, self.where, self.revision = file, where or str(file), revision
        try:
            self.state = state_of(file)
        except OSError as error:
            raise SubspaceError(
                f"{self.where}: there is no bundle ({error}). Make one with `bundle_tasks`, or pass its folder or"
                " Hub id."
            ) from error
        self.size = self.state[1]

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`. Raises `BadFileError` where they are not there, or no longer those that were
        opened."""
        try:
            with open(self.file, "rb") as stream:
                if state_of(stream.fileno()) != self.state:
                    raise BadFileError(f"{self.where}: somebody replaced it meanwhile. Open it again.")
                stream.seek(start)
                data = stream.read(end - start)
        except OSError as error:
            raise BadFileError(f"{self.where}: cannot be read ({error}).") from error
        if len(data) != end - start:
            raise BadFileError(f"{self.where}: it ends before byte {end:,}. It is truncated: fetch or make it again.")
        return data

    def local(self) -> Path:
        """The file itself."""
        return self.file


class HubBytes:
    """A file on the Hub, read by HTTP range requests at one commit; the first names that commit.

    Attributes:
        size: in bytes.
        revision: commit sha.
    """

    def __init__(self, repo_id: str, revision: str | None, token: str | bool | None, cache_dir: Any) -> None:
        self.where, self.token, self.cache_dir = repo_id, token, cache_dir
        self.repo_id, self.asked = repo_id, revision
        self.revision = revision or "main"
        self.size, self.start = 0, b""
        self.whole: FileBytes | None = None
        self.start = self._get(0, FIRST, first=True)

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`, in one request where they were not fetched before."""
        if end <= len(self.start):
            return self.start[start:end]
        if self.whole is None:
            self.whole = cached(self.repo_id, self.revision, self.cache_dir)
        if self.whole is not None:
            return self.whole.read(start, end)
        return self._get(start, end)

    def local(self) -> Path:
        """The whole file, fetched into huggingface_hub's cache."""
        from huggingface_hub import hf_hub_download

        where = {"token": self.token, "cache_dir": self.cache_dir}
        try:
            # by its branch, so that this machine finds it under that name when it is offline
            file = Path(hf_hub_download(self.repo_id, BUNDLE_FILE, revision=self.asked, **where))
            if file.parent.name == self.revision:
                return file
            # the branch has moved on since this bundle was opened
            return Path(hf_hub_download(self.repo_id, BUNDLE_FILE, revision=self.revision, **where))
        except (OSError, ValueError) as error:
            raise SubspaceError(f"{self.where}: the bundle cannot be fetched at {self.revision}: {error}") from error

    def _get(self, start: int, end: int, first: bool = False) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        headers = {**build_hf_headers(token=self.token), "Range": f"bytes={start}-{end - 1}"}
        # a range of what was compressed on the way is none of the file's
        headers["Accept-Encoding"] = "identity"
        try:
            url = hf_hub_url(self.repo_id, BUNDLE_FILE, revision=self.revision)
            with http_stream_backoff("GET", url, headers=headers, max_retries=3) as response:
                if not response.is_success:
                    response.read()
                hf_raise_for_status(response)
                if first:
                    self.revision = _commit(response) or self.revision
                if response.status_code == 206:
                    data = _at_most(response, end - start)
                    return self._checked(response.headers.get("Content-Range", ""), data, start, end, first)
        except BadFileError:
            raise
        except (OSError, ValueError) as error:
            raise self._failed(error) from error
        except Exception as error:
            # httpx's own errors are no OSErrors; their class's name differs between versions of huggingface_hub
            if not type(error).__module__.startswith("httpx"):
                raise
            raise self._failed(error) from error
        # a server that knows no ranges sends everything: then rather once, into the cache
        self.whole = FileBytes(self.local(), self.where, self.revision)
        self.size = self.whole.size
        return self.whole.read(start, min(end, self.size))

    def _checked(self, span: str, data: bytes, start: int, end: int, first: bool) -> bytes:
        found = SPAN.fullmatch(span)
        begin, last, total = map(int, found.groups()) if found else (-1, -1, -1)
        if first:
            self.size, end = total, min(end, total)
        if (begin, last + 1, total) != (start, end, self.size) or len(data) != end - start:
            raise BadFileError(
                f"{self.where}: asked for bytes {start} to {end} of {self.size}, the Hub sent {len(data)} as {span!r}."
                " Try again, or fetch the whole bundle first with `open_bundle(…).download()`."
            )
        return data

    def _failed(self, error: Exception) -> SubspaceError:
        return SubspaceError(
            f"{self.where}: there is no such folder, and no {BUNDLE_FILE} could be read from the Hub under that id"
            f" (revision {self.revision}): {error}"
        )


def cached(repo_id: str, revision: str | None, cache_dir: Any) -> FileBytes | None:
    """The whole file in huggingface_hub's cache, where somebody fetched it at this revision; else None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, BUNDLE_FILE, cache_dir=cache_dir, revision=revision)
    if not isinstance(found, str):
        return None
    return FileBytes(Path(found).resolve(), repo_id, Path(found).parent.name)


def on_hub(
    repo_id: str, revision: str | None, token: str | bool | None, cache_dir: Any = None
) -> FileBytes | HubBytes:
    """A bundle on the Hub; out of the cache where it is whole in there at that very commit, or where the machine is
    offline.

    Raises:
        SubspaceError: it is not there; or offline and not in the cache.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    try:
        pinned = revision is not None and SHA.fullmatch(revision)
        if pinned or constants.is_offline_mode():
            found = cached(repo_id, revision, cache_dir)
            if found is not None:
                return found
        if constants.is_offline_mode():
            raise SubspaceError(
                f"{repo_id}: there is no such folder, this machine is offline (HF_HUB_OFFLINE), and the bundle is not"
                f" in the cache at revision {revision or 'main'}. Fetch it whole while online:"
                f" `open_bundle({repo_id!r}).download()`."
            )
        return HubBytes(repo_id, revision, token, cache_dir)
    except HFValidationError as error:
        raise SubspaceError(f"{repo_id!r} is neither a folder nor a repository id on the Hub: {error}") from error


def state_of(file: Path | int) -> tuple[int, int, int]:
    """Inode, size and time of change of a file."""
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _at_most(response: Any, limit: int) -> bytes:
    # a server that sends more than was asked for is not believed, nor given memory
    data = bytearray()
    for chunk in response.iter_bytes():
        data += chunk
        if len(data) > limit:
            break
    return bytes(data)


def _commit(response: Any) -> str | None:
    # large files are redirected to where they are stored; the Hub's own answer names the commit
    for each in (*response.history, response):
        if sha := each.headers.get("X-Repo-Commit"):
            return str(sha)
    return None
