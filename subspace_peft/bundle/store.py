"""Read bytes of a bundle's file, on this machine or on the Hub, where only the bytes asked for are fetched."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..errors import BadFileError, HubOfflineError, HubUnavailableError, SubspaceError
from ..hub import fetch
from ..hub_requests import ask, refusal
from .format import BUNDLE_FILE

# bytes that the first request fetches: the header of some hundred tasks, and all of a small bundle
FIRST = 128 * 1024
SHA = re.compile(r"[0-9a-f]{40}")
SPAN = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class FileBytes:
    """A bundle's file on this machine.

    Attributes:
        size: Its size in bytes.
        revision: Commit sha, if it is a file of the Hub's cache.
        state: Inode, size and time of change, by which a later read notices that the file was replaced.

    Raises:
        SubspaceError: There is no such file.
    """

    def __init__(self, file: Path, where: str | None = None, revision: str | None = None) -> None:
        self.file, self.where, self.revision = file, where or str(file), revision
        try:
            self.state = state_of(file)
        except OSError as error:
            raise SubspaceError(
                f"{self.where}: there is no bundle ({error.strerror or error}). Make one with `bundle_tasks`"
                " (`subspace-peft bundle create`), or pass its folder or Hub id."
            ) from error
        self.size = self.state[1]

    def read(self, start: int, end: int) -> bytes:
        """Read the bytes from `start` up to `end`.

        Raises:
            BadFileError: The file is shorter, cannot be read, or was replaced since it was opened.
        """
        try:
            with open(self.file, "rb") as stream:
                if state_of(stream.fileno()) != self.state:
                    raise BadFileError(f"{self.where}: it was replaced since it was opened. Open it again.")
                stream.seek(start)
                data = stream.read(end - start)
        except OSError as error:
            raise BadFileError(f"{self.where}: cannot be read ({error}).") from error
        if len(data) != end - start:
            raise BadFileError(f"{self.where}: it ends before byte {end:,}. It is truncated: fetch or make it again.")
        return data

    def local(self) -> Path:
        """Return the file."""
        return self.file


class HubBytes:
    """A bundle's file on the Hub, read by HTTP range requests, all at the commit that the first answer names.

    huggingface_hub's `HfFileSystem` makes four requests to open a bundle and read a task, where this makes two: it
    asks for the repository and the file's size first. It also takes any range of any size that a server sends.

    Attributes:
        size: Its size in bytes.
        revision: Commit sha.

    Raises:
        SubspaceError: It cannot be fetched.
        BadFileError: The Hub sends other bytes than it was asked for.
    """

    def __init__(self, repo_id: str, revision: str | None, token: str | bool | None, cache_dir: Any) -> None:
        self.where, self.token, self.cache_dir = repo_id, token, cache_dir
        self.repo_id, self.asked = repo_id, revision
        self.revision = revision or "main"
        self.size, self.start = 0, b""
        self.whole: FileBytes | None = None
        self.start = self._get(0, FIRST, first=True)

    def read(self, start: int, end: int) -> bytes:
        """Read the bytes from `start` up to `end`, in one request if they were not fetched before.

        Raises:
            SubspaceError: They cannot be fetched.
            BadFileError: The Hub sends other bytes than it was asked for.
        """
        if end <= len(self.start):
            return self.start[start:end]
        if self.whole is None:
            self.whole = cached(self.repo_id, self.revision, self.cache_dir)
        if self.whole is not None:
            return self.whole.read(start, end)
        return self._get(start, end)

    def local(self) -> Path:
        """Fetch the whole file into huggingface_hub's cache, and return it.

        Raises:
            SubspaceError: It cannot be fetched.
        """
        where = {"token": self.token, "cache_dir": self.cache_dir}
        try:
            # by its branch, so that this machine finds it under that name when it is offline
            file = fetch(self.repo_id, BUNDLE_FILE, revision=self.asked, **where)
            if file.parent.name == self.revision:
                return file
            # the branch has moved on since this bundle was opened
            return fetch(self.repo_id, BUNDLE_FILE, revision=self.revision, **where)
        except HubUnavailableError:
            raise
        except (OSError, ValueError) as error:
            said = refusal(error, self.repo_id, self.revision)
            raise SubspaceError(f"{self.where}: the bundle cannot be fetched at {self.revision}: {said}") from error

    def _get(self, start: int, end: int, first: bool = False) -> bytes:
        try:
            status, span, data, commit = ask(
                self.repo_id, lambda: _request(self.repo_id, self.revision, self.token, start, end)
            )
        except HubUnavailableError:
            raise
        except (OSError, ValueError) as error:
            raise SubspaceError(
                f"{self.where}: there is no such folder, and no {BUNDLE_FILE} could be read from the Hub under that id"
                f" (revision {self.revision}): {refusal(error, self.repo_id, self.revision)}"
            ) from error
        if first:
            self.revision = commit or self.revision
        if status == 206:
            return self._checked(span, data, start, end, first)
        # a server without ranges would send the whole file every time: fetch it once, into the cache
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


def cached(repo_id: str, revision: str | None, cache_dir: Any) -> FileBytes | None:
    """Return the whole file in huggingface_hub's cache, if it was fetched there at this revision; else None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, BUNDLE_FILE, cache_dir=cache_dir, revision=revision)
    if not isinstance(found, str):
        return None
    return FileBytes(Path(found).resolve(), repo_id, Path(found).parent.name)


def on_hub(
    repo_id: str, revision: str | None, token: str | bool | None, cache_dir: Any = None
) -> FileBytes | HubBytes:
    """Open the file of a bundle on the Hub.

    If the cache has the whole file at that very commit, or at that revision while the machine is offline, it is read
    from there.

    Args:
        repo_id: ``org/name``.
        revision: Branch, tag or commit sha; None for main.
        token: As in huggingface_hub.
        cache_dir: As in huggingface_hub.

    Raises:
        SubspaceError: It does not exist.
        HubOfflineError: The machine is offline and the cache does not have it.
        HubUnavailableError: The Hub does not answer.
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
            raise HubOfflineError(
                f"{repo_id}: there is no such folder, this machine is offline (HF_HUB_OFFLINE), and the bundle is not"
                f" in the cache at revision {revision or 'main'}. Fetch it whole while online:"
                f" `open_bundle({repo_id!r}).download()`."
            )
        return HubBytes(repo_id, revision, token, cache_dir)
    except HFValidationError as error:
        raise SubspaceError(f"{repo_id!r} is neither a folder nor a repository id on the Hub: {error}") from error


def state_of(file: Path | int) -> tuple[int, int, int]:
    """Return inode, size and time of change of a file."""
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _request(
    repo_id: str, revision: str, token: str | bool | None, start: int, end: int
) -> tuple[int, str, bytes, str | None]:
    """Ask the Hub for a range of a bundle's file.

    Returns:
        The status, the range that was sent, its bytes (none where the answer is not a range), and the commit.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    headers = {**build_hf_headers(token=token), "Range": f"bytes={start}-{end - 1}"}
    # compressed on the way, a range would not be one of the file's bytes
    headers["Accept-Encoding"] = "identity"
    url = hf_hub_url(repo_id, BUNDLE_FILE, revision=revision)
    # `ask` repeats what fails
    with http_stream_backoff("GET", url, headers=headers, max_retries=0) as response:
        if not response.is_success:
            response.read()
        hf_raise_for_status(response)
        data = _at_most(response, end - start) if response.status_code == 206 else b""
        return response.status_code, response.headers.get("Content-Range", ""), data, _commit(response)


def _at_most(response: Any, limit: int) -> bytes:
    # stop reading a server that sends more than it was asked for, before it takes up memory
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
