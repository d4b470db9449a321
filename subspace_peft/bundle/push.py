"""A bundle on its way to the Hub: its basis pinned to a commit that others can fetch."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..basis.push import check_repo_id, fetch_readme, upload
from ..cards import Place
from ..errors import BadFileError
from ..tuner.push import place_on_hub
from .bundle import Bundle, open_bundle
from .layout import NAMES
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
    """Upload a bundle in one commit. Its basis is pinned first, in what is uploaded: to the commit it was fetched from or pushed as, on
    this machine. A README that somebody wrote in the repository stays. Every task is verified on the way.

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
    from huggingface_hub import HfApi

    check_repo_id(repo_id)
    found = open_bundle(bundle)
    basis = found.config(next(iter(found))).resolve()
    if basis is None:
        raise BadFileError(f"{found.location}: its index does not say which basis it is on. Make it again.")
    place = place_on_hub(
        basis, f"the bundle {found.location}", "keep the bundle in a folder", push_basis_to=push_basis_to,
        force=force, private=private, token=token,
    )  # fmt: skip
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fetch_readme(repo_id, folder, revision, token)
        dtype = next(dtype for dtype, name in NAMES.items() if name == found.pieces["cores"].dtype)
        write_bundle(
            [kept(found, name) for name in found], folder, dtype, found, place, Place(repo_id, revision=revision)
        )
        message = commit_message or f"Upload a bundle of {len(found)} tasks"
        return upload(api, repo_id, folder, revision, message, create_pr=create_pr)
