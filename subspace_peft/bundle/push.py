"""Push a bundle to the Hub, its basis pinned to a commit that others can fetch."""

from __future__ import annotations

from pathlib import Path

from ..cards import Place
from ..errors import BadFileError
from ..hub import check_repo_id, upload
from ..tasks.push import place_on_hub
from .bundle import Bundle, open_bundle
from .pack import kept
from .write import write_bundle


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
    """Upload a bundle in one commit, and verify every task on the way.

    The basis is pinned in the uploaded copy, to the commit that this machine fetched it from or pushed it as. A README
    in the repository keeps what its owners wrote.

    Args:
        bundle: The bundle's folder, or the open bundle.
        repo_id: ``org/name``; the repository is made where it does not exist.
        push_basis_to: A repository to push the basis to as well, where it is not on the Hub yet.
        force: Push the bundle even if its basis is in a local folder only, so that others have to be given the basis.
        private: As in huggingface_hub.
        token: As in huggingface_hub.
        revision: The branch, made where it does not exist.
        commit_message: "Upload a bundle of … tasks" by default.
        create_pr: Open a pull request instead of committing.

    Returns:
        The commit's sha.

    Raises:
        SubspaceError: The basis is in a local folder only, and neither `push_basis_to` nor `force` is given; or
            `repo_id` is a path.
        BadFileError: A task is damaged.
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
