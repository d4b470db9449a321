"""A basis on its way to the Hub."""

from __future__ import annotations

import tempfile
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
    from huggingface_hub import HfApi

    from .files import write_basis
    from .resolve import note_location

    check_repo_id(repo_id)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fetch_readme(repo_id, folder, branch, token)
        write_basis(basis, folder, Place(repo_id, revision=branch))
        message = commit_message or f"Upload basis {basis.fingerprint[:12]}"
        commit = upload(api, repo_id, folder, branch, message, create_pr=create_pr)
    basis.location, basis.revision = repo_id, commit
    note_location(basis)
    return commit


def check_repo_id(repo_id: str) -> None:
    """Raise `SubspaceError` for what is a path, or names a revision."""
    if looks_like_path(repo_id) or split_revision(repo_id)[1] is not None:
        raise SubspaceError(
            f"{repo_id!r} is no repository id on the Hub. Give it as 'name' or 'org/name', a branch as an argument of its own."
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


def upload(api: object, repo_id: str, folder: Path, branch: str | None, message: str, *, create_pr: bool) -> str:
    """One commit of all files in `folder`, on `branch`, which is made where there is none; returns its sha."""
    if branch is not None and not create_pr:
        api.create_branch(repo_id, branch=branch, exist_ok=True)  # type: ignore[attr-defined]
    done = api.upload_folder(  # type: ignore[attr-defined]
        repo_id=repo_id, folder_path=folder, revision=branch, commit_message=message, create_pr=create_pr
    )
    return str(done.oid)
