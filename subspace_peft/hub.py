"""The Hugging Face Hub: what a reference to it means, and downloads and uploads that are one commit.

A reference is a folder of this machine or a Hub id, ``org/name@revision:folder/inside``.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._io.disk import fetching
from .base_names import same_model as same_model  # its place in earlier versions
from .errors import SubspaceError
from .hub_requests import Fault, ask, refusal
from .logging import get_logger

logger = get_logger(__name__)
_uploads: ContextVar[list[Upload] | None] = ContextVar("uploads", default=None)
FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".txt", ".json", ".yaml", ".yml")


def looks_like_path(text: str) -> bool:
    """Return whether `text` can only mean a folder of this machine, never a Hub id such as ``org/name``."""
    # revisions such as refs/pr/3, and folders inside a repository, have slashes of their own
    name = re.split("[@:]", text, maxsplit=1)[0]
    by_look = os.path.isabs(text) or text.startswith((".", "~")) or name.count("/") > 1 or "\\" in text
    return by_look or name.endswith(FILES)


def only_local(text: str, revision: str | None = None, *folders: Path) -> bool:
    """Return whether the Hub is not to be asked for `text`, which is no folder or file of this machine.

    It is a path by its look; a single name, as no adapter or basis on the Hub has; or its first part is a folder or
    file here, so that it rather names something in there. A reference with a revision is of the Hub.

    Args:
        text: a reference.
        revision: branch, tag or commit sha that goes with it.
        folders: further folders, beside the working directory, in which the first part is looked for.
    """
    name, at, _ = split_inside(text)
    if looks_like_path(text):
        return True
    if revision or at:
        return False
    first, slash, _ = name.partition("/")
    return not slash or any((folder / first).exists() for folder in (Path(), *folders))


def is_hub_id(reference: str) -> bool:
    """Return whether `reference` may be the id of a repository on the Hub, and is not a file or folder here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(reference)
    except HFValidationError:
        return False
    # an id is short enough for any disk to be asked for it
    return not Path(reference).exists()


def check_repo_id(repo_id: str) -> None:
    """Refuse a path, and an id that names a revision.

    Raises:
        SubspaceError: `repo_id` is either of these.
    """
    if looks_like_path(repo_id) or split_revision(repo_id)[1] is not None:
        raise SubspaceError(
            f"{repo_id!r} is not a repository id on the Hub. Give it as 'name' or 'org/name', and a branch as an"
            " argument of its own."
        )


def split_revision(text: str) -> tuple[str, str | None]:
    """Split ``org/name@revision`` into ``("org/name", "revision")``; the revision is None without an ``@``."""
    name, _, revision = text.partition("@")
    return name, revision or None


def split_inside(text: str) -> tuple[str, str | None, str | None]:
    """Split ``org/name@revision:folder/inside`` into its three parts; those that are not given are None."""
    # neither repository names nor git revisions may hold a colon
    outside, _, inside = text.partition(":")
    return *split_revision(outside), inside.strip("/") or None


def download(
    repo_id: str,
    files: Sequence[str],
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None = None,
) -> tuple[Path, str | None]:
    """Fetch files of a repository's top folder into huggingface_hub's cache, all at the commit of the first.

    Args:
        repo_id: ``org/name``.
        files: their names, at least one.
        revision: branch, tag or commit sha; None for main.
        token: as in huggingface_hub.
        cache_dir: as in huggingface_hub.

    Returns:
        Their folder, and the commit's sha where the cache tells it.

    Raises:
        OSError: a file is not there, or the Hub gives it to no one who asks like this; `refusal` says why.
        DiskError: the cache cannot be written.
        ValueError: `repo_id` or a name is malformed (huggingface_hub's `HFValidationError`).
        HubUnavailableError: the Hub does not answer.
    """
    sha: str | None = None
    for name in files:
        file = fetch(repo_id, name, revision=sha or revision, token=token, cache_dir=cache_dir)
        # the snapshot's folder is the commit: asking for the others at that sha cannot mix two revisions
        if sha is None and file.parent.parent.name == "snapshots":
            sha = file.parent.name
    return file.parent, sha


def fetch(repo_id: str, file: str, **where: Any) -> Path:
    """Fetch a file into huggingface_hub's cache.

    Args:
        repo_id: ``org/name``.
        file: its path in the repository.
        **where: further arguments of `hf_hub_download`, such as `revision` and `token`.

    Raises:
        HubUnavailableError: the Hub does not answer.
        DiskError: the cache cannot be written.

    Otherwise as `hf_hub_download` raises.
    """
    from huggingface_hub import hf_hub_download

    with fetching():
        return Path(ask(repo_id, lambda: hf_hub_download(repo_id, file, **where)))


def upload(
    repo_id: str,
    write: Callable[[Path, str], object],
    message: str,
    *,
    private: bool | None,
    token: str | bool | None,
    branch: str | None,
    create_pr: bool,
) -> tuple[str, str]:
    """Upload what `write` puts into a folder, in one commit.

    The repository's README lies in that folder already, so that `write` can keep what others wrote in it.

    Args:
        repo_id: repository; it is created where it is missing, as is `branch`.
        write: is called with the folder and the repository's whole id.
        message: of the commit.
        private: whether a new repository is private; None for the owner's default.
        token: as in huggingface_hub.
        branch: branch to commit to; None for main.
        create_pr: open a pull request instead of committing to the branch.

    Returns:
        The repository's whole id and the commit's sha.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses; the message says what to do.
        HubUnavailableError: the Hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    # all of these give the same when they are done twice: what is there already is neither made nor sent again
    try:
        whole = ask(repo_id, lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            folder = Path(scratch)
            _fetch_readme(whole, folder, branch, token)
            write(folder, whole)
            if branch is not None and not create_pr:
                ask(whole, lambda: api.create_branch(whole, branch=branch, exist_ok=True))
            done = ask(
                f"{whole}, to which a pull request may have been opened already" if create_pr else whole,
                lambda: api.upload_folder(
                    repo_id=whole, folder_path=folder, revision=branch, commit_message=message, create_pr=create_pr
                ),
                # a pull request, though, would be opened twice
                repeat=lambda fault: not (create_pr and _may_be_committed(fault)),
            )
    except HfHubHTTPError as error:
        error.append_to_message(f"\n{refusal(error, repo_id, branch)}")
        raise
    page = getattr(done, "pr_url", None) or done.commit_url
    logger.info("Uploaded to %s", page)
    if (noted := _uploads.get()) is not None:
        noted.append(Upload(whole, str(done.oid), str(page)))
    return whole, str(done.oid)


@dataclass(frozen=True)
class Upload:
    """An upload that was made.

    Attributes:
        repo_id: the repository's whole id.
        revision: the commit's sha.
        url: the commit's page, or that of the pull request.
    """

    repo_id: str
    revision: str
    url: str


@contextmanager
def noted_uploads() -> Iterator[list[Upload]]:
    """Give a list to which every upload within is added, that of a basis that goes along too."""
    noted: list[Upload] = []
    token = _uploads.set(noted)
    try:
        yield noted
    finally:
        _uploads.reset(token)


def _may_be_committed(fault: Fault) -> bool:
    return fault.reached and ("/commit/" in fault.url or not fault.url)


def _fetch_readme(repo_id: str, folder: Path, branch: str | None, token: str | bool | None) -> None:
    """Copy the repository's README, where it has one, into `folder`."""
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    try:
        file = fetch(repo_id, "README.md", revision=branch, token=token)
    except (EntryNotFoundError, RevisionNotFoundError):
        return
    (folder / "README.md").write_bytes(file.read_bytes())
