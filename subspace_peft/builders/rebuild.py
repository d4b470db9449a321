"""Build a basis again from what its own folder says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .._io.untrusted import is_sha256
from ..basis import SubspaceBasis, resolve_basis
from ..errors import SourceError, SubspaceError
from ..sources.open import open_source
from ..sources.source import IN_MEMORY, Source
from .build import build_basis
from .distributed import process_group
from .update import update_basis

UPDATE_ARGUMENTS = ("add", "add_in", "k", "k_in", "max_drift", "weights", "alternations", "partial")
ARGUMENTS = (
    "k",
    "k_in",
    "weights",
    "alternations",
    "directions",
    "seed",
    "keep_cores",
    "partial",
    "complete",
    "budget",
)


def rebuild_basis(
    basis: SubspaceBasis | str | Path,
    *,
    base_model: nn.Module | None = None,
    max_memory: int | str = "2GB",
    work_folder: str | Path | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> SubspaceBasis:
    """Repeat a build: the same sources, held against their hashes on record, with the same arguments.

    Of an updated basis the last update is repeated, on the version before it. On the platform and with the versions of
    the first build, the fingerprint is the same; compare the two. Sources that are paths are looked for as they were
    given, relative ones from the working directory. Those that were left out stay out.

    Args:
        basis: the basis, its folder or its Hub id. Only its config is read, and of a random basis the shapes.
        base_model: the base model, for `base-weights`, and where sources were converted from another method.
        max_memory, work_folder: as in `build_basis`.

    Raises:
        SourceError: sources that are gone, that are others than they were, or that only ever were in memory; lists all
            of them.
        SubspaceError: the config does not say how the basis was built.
    """
    # what one process cannot find has to reach the others before they wait for it
    with process_group():
        return _rebuild(basis, base_model, max_memory, work_folder, token, progress)


def _rebuild(
    basis: SubspaceBasis | str | Path,
    base_model: nn.Module | None,
    max_memory: int | str,
    work_folder: str | Path | None,
    token: str | bool | None,
    progress: bool,
) -> SubspaceBasis:
    old = basis if isinstance(basis, SubspaceBasis) else SubspaceBasis.from_pretrained(basis, token=token)
    build, builder = old.info.get("build"), old.info.get("builder")
    if not isinstance(build, dict) or not builder:
        raise SubspaceError(f"{old.location}: its basis_config.json has no record of how it was built.")
    if builder in ("random", "base-weights"):
        if builder == "base-weights" and base_model is None:
            raise SubspaceError(
                f"{old.location}: a basis from the base model's weights. Pass {old.base_model or 'that model'} as"
                " base_model= (--base-model)."
            )
        new = build_basis(
            builder=builder,
            like=old,
            base_model=base_model,
            target_modules=list(old) if base_model is not None else None,
            directions=build.get("directions", 0),
            seed=build.get("seed", 0),
            progress=progress,
        )
        new.info["build"] = build
        return new.to_precision(old.precision or "float32")
    update = old.info.get("update")
    if update is None and (old.info.get("version") or 1) != 1:
        raise SubspaceError(
            f"{old.location}: version {old.info['version']} was not made from sources alone. Build the version before"
            " it again (its lineage has the fingerprint), and do to it what was done."
        )
    if update is not None:
        lineage = old.info.get("lineage") or [{}]
        if not isinstance(update.get("arguments"), dict) or not is_sha256(lineage[-1].get("fingerprint")):
            raise SubspaceError(f"{old.location}: its basis_config.json has no record of how it was updated.")
        build = {**build, "allow_bin": update["arguments"].get("allow_bin")}
    found, problems = sources_on_record(
        old,
        base_model=base_model,
        token=token,
        version=None if update is None else old.info["version"],
        allow_bin=bool(build.get("allow_bin")),
    )
    if problems or not found:
        lines = "\n  ".join(problems) or "no source is on record"
        raise SourceError(f"{old.location}: {len(problems)} of its sources are not what they were:\n  {lines}")
    if update is not None:
        new = _update_again(
            old,
            found,
            base_model=base_model,
            max_memory=max_memory,
            work_folder=work_folder,
            token=token,
            progress=progress,
        )
        new.info["skipped"] = old.info.get("skipped", [])
        return new
    given = {key: build[key] for key in ARGUMENTS if key in build}
    new = build_basis(
        found,
        builder=builder,
        base_model=base_model,
        max_memory=max_memory,
        work_folder=work_folder,
        token=token,
        progress=progress,
        **given,
    )
    new.info["skipped"] = old.info.get("skipped", [])
    new.info["build"] = build
    return new.to_precision(old.precision or "float32")


def sources_on_record(
    basis: SubspaceBasis,
    *,
    base_model: nn.Module | None = None,
    token: str | bool | None = None,
    version: int | None = None,
    allow_bin: bool | None = None,
) -> tuple[list[Source], list[str]]:
    """The sources that a basis's config names (of one version alone, where it has several) and that are still what
    they were, and for each of the others the reason. `allow_bin` by default as when it was built.
    """
    found, problems = [], []
    pickled = bool((basis.info.get("build") or {}).get("allow_bin")) if allow_bin is None else allow_bin
    for entry in basis.info.get("sources") or []:
        if version is not None and entry.get("version") != version:
            continue
        try:
            found.append(_same_source(entry, {"allow_bin": pickled}, base_model, token))
        except SourceError as error:
            problems.append(str(error))
    return found, problems


def _update_again(old: SubspaceBasis, sources: list[Source], **how: Any) -> SubspaceBasis:
    arguments, parent = old.info["update"]["arguments"], old.info["lineage"][-1]
    if arguments.get("tasks"):
        raise SubspaceError(
            f"{old.location}: it was fitted to the cores of {arguments['tasks']} tasks as well, which it does not"
            " record. Call `update_basis` with them again."
        )
    before = resolve_basis(
        parent.get("location"), revision=parent.get("revision"), fingerprint=parent["fingerprint"], token=how["token"]
    )
    return update_basis(
        before, sources, **{key: arguments[key] for key in UPDATE_ARGUMENTS if key in arguments}, **how
    )


def _same_source(
    entry: dict[str, Any], build: dict[str, Any], base_model: nn.Module | None, token: str | bool | None
) -> Source:
    location, revision = str(entry["location"]), entry.get("revision")
    if location.startswith(IN_MEMORY):
        raise SourceError(f"{entry['name']}: it was given in memory, and is stored nowhere.")
    name, colon, inside = location.partition(":")
    reference = f"{name}@{revision}{colon}{inside}" if revision else location
    source = open_source(
        reference,
        token=token,
        allow_bin=bool(build.get("allow_bin")),
        base_model=base_model if entry.get("converted_from") else None,
    )
    if source.sha256 != entry["sha256"]:
        raise SourceError(
            f"{reference}: its file has sha256 {source.sha256}, and had {entry['sha256']} when the basis was built."
            " Restore that file, or build a new basis."
        )
    source.name = entry["name"]
    return source
