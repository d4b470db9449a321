"""A bundle on its way to the Hub: its basis pinned to a commit that others can fetch."""

from __future__ import annotations

from pathlib import Path

from ..cards import Place
from ..errors import BadFileError
from ..hub import check_repo_id, upload
from ..tasks.push import place_on_hub
from .bundle import Bundle, open_bundle
from .write import kept, write_bundle


def push_bundle(
    bundle: str | Path | Bundle,
    repo_id: str,
    *,
    push_basis_to: str | None = None,
    force: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a bundle in one commit. Its basis is pinned first, in what is uploaded: to the commit it was fetched from
    or pushed as, on this machine. A README that somebody wrote in the repository stays. Every task is verified on the
    way.

    Args:
        bundle: its folder.
        repo_id: ``org/name``; the repository is made where there is none.
        push_basis_to: push the basis into this repository as well, where it is not on the Hub yet.
        force: push although the basis is in a local folder only; others have to be told where it is.
        private, token, commit_message, create_pr: as in huggingface_hub.
        revision: branch; made where there is none.

    Returns:
        The commit's sha.

    Raises:
        SubspaceError: the basis is in a local folder only, and nothing was said about it; or `repo_id` is a path.
        BadFileError: a task is damaged.
    """
    check_repo_id(repo_id)
    found = open_bundle(bundle)
    basis = found.config(next(iter(found))).resolve()
    if basis is None:
        raise BadFileError(f"{found.location}: its index does not say which basis it is on. Make it again.")
    place = place_on_hub(
        basis,
        f"the bundle {found.location}",
        "keep the bundle in a folder",
        push_basis_to=push_basis_to,
        force=force,
        private=private,
        token=token,
    )

    def write(folder: Path, repo: str) -> None:
        there = Place(repo, revision=revision)
        write_bundle([kept(found, name) for name in found], folder, found.dtype, found, place, there)

    return upload(
        repo_id,
        write,
        commit_message or f"Upload a bundle of {len(found)} tasks",
        private=private,
        token=token,
        branch=revision,
        create_pr=create_pr,
    )[1]
