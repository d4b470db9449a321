"""Push a task to the Hub, its basis pinned to a commit that others can fetch."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..basis import SubspaceBasis
from ..basis.locations import read_notes
from ..cards import Place, add_tags
from ..errors import SubspaceError
from ..hub import check_repo_id, upload
from ..tuner.card import published
from ..tuner.config import SubspaceConfig
from ..tuner.layer import basis_in
from ..tuner.task_file import WEIGHTS_FILE
from .arguments import check_known, keywords_of


def push_task(
    model: PeftModel,
    repo_id: str,
    *,
    push_basis_to: str | None = None,
    force: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    **saving: Any,
) -> str:
    """Save a model's tasks and upload them in one commit.

    `model.push_to_hub` does this where one of the adapters is a subspace task. The basis of each task is pinned first,
    to the commit that this machine fetched it from or pushed it as. A README in the repository keeps what its owners
    wrote.

    Args:
        model: The model.
        repo_id: ``org/name``; the repository is made where it does not exist.
        push_basis_to: A repository to push the basis to as well, where it is not on the Hub yet.
        force: Push a task even if its basis is in a local folder only, so that others have to be given the basis.
        private: As in huggingface_hub.
        token: As in huggingface_hub.
        revision: The branch, made where it does not exist.
        commit_message: "Upload task" by default.
        create_pr: Open a pull request instead of committing.
        tags: Tags to add to the card.
        **saving: Arguments for `save_pretrained`.

    Returns:
        The commit's sha.

    Raises:
        SubspaceError: A basis is in a local folder or in memory only, and neither `push_basis_to` nor `force` is
            given; or `repo_id` is a path.
    """
    check_known(saving, keywords_of(PeftModel.save_pretrained))
    check_repo_id(repo_id)
    for name in saving.get("selected_adapters") or list(model.peft_config):
        config = model.peft_config[name]
        if isinstance(config, SubspaceConfig):
            pin(
                config,
                name,
                basis_in(model, name),
                push_basis_to=push_basis_to,
                force=force,
                private=private,
                token=token,
            )

    def write(folder: Path, repo: str) -> None:
        with published(_places(model, folder, Place(repo, revision=revision))):
            model.save_pretrained(str(folder), **saving)
        if tags and (folder / "README.md").is_file():
            add_tags(folder / "README.md", tags)

    return upload(
        repo_id,
        write,
        commit_message or "Upload task",
        private=private,
        token=token,
        branch=revision,
        create_pr=create_pr,
    )[1]


def push_saved_task(
    folder: str | Path,
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
    """Upload the folder of a saved task in one commit, without loading a model.

    The basis is pinned in the uploaded copy; `folder` stays as it is.

    Args:
        folder: The folder that `save_pretrained` wrote.
        repo_id: See `push_task`, as for the other arguments.
        push_basis_to: See `push_task`.
        force: See `push_task`.
        private: See `push_task`.
        token: See `push_task`.
        revision: See `push_task`.
        commit_message: See `push_task`.
        create_pr: See `push_task`.

    Returns:
        The commit's sha.

    Raises:
        SubspaceError: `folder` holds no subspace task; and see `push_task`.
        BadFileError: The folder's files are damaged.
    """
    check_repo_id(repo_id)
    folder = Path(folder).expanduser()
    config = SubspaceConfig.from_pretrained(str(folder))
    if not isinstance(config, SubspaceConfig) or not (folder / WEIGHTS_FILE).is_file():
        raise SubspaceError(
            f"{folder}: it holds no saved subspace task. Give the folder that `save_pretrained` wrote."
        )
    how = {"push_basis_to": push_basis_to, "force": force, "private": private, "token": token}
    pin(config, folder.name, config.resolve(), live=False, **how)

    def write(copy: Path, repo: str) -> None:
        shutil.copyfile(folder / WEIGHTS_FILE, copy / WEIGHTS_FILE)
        if (folder / "README.md").is_file() and not (copy / "README.md").is_file():
            shutil.copyfile(folder / "README.md", copy / "README.md")
        with published({copy: Place(repo, revision=revision)}):
            config.save_pretrained(str(copy))

    return upload(
        repo_id,
        write,
        commit_message or "Upload task",
        private=private,
        token=token,
        branch=revision,
        create_pr=create_pr,
    )[1]


def _places(model: PeftModel, folder: Path, place: Place) -> dict[Path, Place]:
    """Return where the tasks that PEFT saves in `folder` will be loaded from, by their folders."""
    names = [
        name for name, each in model.peft_config.items() if isinstance(each, SubspaceConfig) and name != "default"
    ]
    return {folder: place, **{folder / name: replace(place, subfolder=name) for name in names}}


def pin(
    config: SubspaceConfig,
    name: str,
    basis: SubspaceBasis | None,
    *,
    push_basis_to: str | None = None,
    force: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
    live: bool = True,
) -> None:
    """Have `config` refer to its basis on the Hub, at a commit.

    Args:
        config: The configuration of a task.
        name: The task's name, for messages.
        basis: Its basis; None where only the task's own file has it.
        push_basis_to: As in `push_task`, as are the rest and the errors.
        force: See above.
        private: See above.
        token: See above.
        live: Whether the task is a model's adapter, or else a folder.
    """
    if basis is None or config.basis_modules is not None or config.save_basis:
        return
    how = f"model.peft_config[{name!r}].save_basis = True" if live else "save it with save_basis=True in its config"
    remedy = f"make the task self-contained ({how})"
    place = place_on_hub(
        basis, f"task {name!r}", remedy, push_basis_to=push_basis_to, force=force, private=private, token=token
    )
    if place is not None:
        config.basis, config.basis_revision = place


def place_on_hub(
    basis: SubspaceBasis,
    what: str,
    remedy: str,
    *,
    push_basis_to: str | None = None,
    force: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
) -> tuple[str, str | None] | None:
    """Find the place of a basis on the Hub, pushing it there where that is asked for.

    Args:
        basis: The basis.
        what: Names the thing that needs it, for messages.
        remedy: Another way than pushing the basis, for messages.
        push_basis_to: See `push_task`.
        force: See `push_task`.
        private: See `push_task`.
        token: See `push_task`.

    Returns:
        Repository and commit; None where there is no such place and `force` is given.

    Raises:
        SubspaceError: The basis is in a local folder or in memory only.
    """
    if basis.revision:
        return str(basis.location), basis.revision
    notes = [(str(note["location"]), note["revision"]) for note in read_notes(basis.fingerprint) if note["revision"]]
    if notes:
        return notes[0]
    if push_basis_to is not None:
        return push_basis_to, basis.push_to_hub(push_basis_to, private=private, token=token)
    where = "in memory only" if basis.location is None else f"only in {basis.location}"
    if force:
        warnings.warn(
            f"The basis of {what} is {where}: others who load it have to pass the basis, with basis=….",
            stacklevel=3,
        )
        return None
    raise SubspaceError(
        f"The basis of {what} (fingerprint {basis.fingerprint}) is {where}, where others who load it from the Hub"
        " would not find it. Push the basis too (push_basis_to='org/basis', or basis.push_to_hub('org/basis') before),"
        f" {remedy}, or push anyway with force=True."
    )
