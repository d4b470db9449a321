"""A basis on its way to the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from ..cards import Place
from ..errors import SubspaceError
from .basis import SubspaceBasis
from .reference import looks_like_path, split_revision


def push_basis(
    basis: SubspaceBasis,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload in one commit; see `SubspaceBasis.push_to_hub`."""
    from .files import write_basis
    from .resolve import note_location

    check_repo_id(repo_id)
    repo_id, commit = upload(
        repo_id,
        lambda folder, place: write_basis(basis, folder, place),
        commit_message or f"Upload basis {basis.fingerprint[:12]}",
        private=private,
        token=token,
        branch=branch,
        create_pr=create_pr,
    )
    basis.location, basis.revision = repo_id, commit
    note_location(basis)
    return commit


def check_repo_id(repo_id: str) -> None:
    """Raise `SubspaceError` for what is a path, or names a revision."""
    if looks_like_path(repo_id) or split_revision(repo_id)[1] is not None:
        raise SubspaceError(
            f"{repo_id!r} is no repository id on the Hub. Give it as 'name' or 'org/name', a branch as an argument of"
            " its own."
        )


def fetch_readme(repo_id: str, folder: Path, branch: str | None, token: str | bool | None) -> None:
    """Put the README that the repository has into `folder`, so that what somebody wrote there stays."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        file = hf_hub_download(repo_id, "README.md", revision=branch, token=token)
    except (HfHubHTTPError, LocalEntryNotFoundError):
        return
    (folder / "README.md").write_bytes(Path(file).read_bytes())


def upload(
    repo_id: str,
    write: Callable[[Path, Place], object],
    message: str,
    *,
    private: bool | None,
    token: str | bool | None,
    branch: str | None,
    create_pr: bool,
) -> tuple[str, str]:
    """One commit of what `write` puts into a folder, where the repository's README lies already, so that what somebody
    wrote in it stays.

    Args:
        repo_id: made where it is not there, as is `branch`.
        write: gets the folder, and the place on the Hub that its cards name.

    Returns:
        The repository's whole id and the commit's sha.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fetch_readme(repo_id, folder, branch, token)
        write(folder, Place(repo_id, revision=branch))
        if branch is not None and not create_pr:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=branch, commit_message=message, create_pr=create_pr
        )
    return repo_id, str(done.oid)
