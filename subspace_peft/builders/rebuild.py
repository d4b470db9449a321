"""Build a basis again from the record in its own folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .._io.untrusted import is_sha256
from ..basis import SubspaceBasis, resolve_basis
from ..errors import SourceError, SubspaceError
from ..hub_requests import patient
from ..sources.source import Source
from .build import built
from .distributed import process_group
from .keywords import takes_options
from .options import CONTROLS, BuildOptions, Resources, UpdateOptions
from .record import recorded_source
from .update import update_basis


@dataclass(frozen=True, eq=False)
class BuildRecord:
    """How a basis was made, as its config says.

    Attributes:
        basis: the basis.
        options: of its build, or of its last update.
        sources: those of the build or of the update, opened; empty for a control.
        before: the version before the update; None for a build.
    """

    basis: SubspaceBasis
    options: BuildOptions | UpdateOptions
    sources: list[Source]
    before: SubspaceBasis | None = None

    def inputs(self, resources: Resources, base_model: nn.Module | None) -> dict[str, Any]:
        """Return the other arguments of the same call."""
        common: dict[str, Any] = {"resources": resources, "base_model": base_model}
        if isinstance(self.options, UpdateOptions):
            return {"basis": self.before, "sources": self.sources, **common}
        like = self.basis if self.options.controls else None
        return {"sources": None if like is not None else self.sources, "like": like, **common}


@process_group()  # an error that only one process finds has to reach the others before they wait for it
@takes_options(resources=Resources)
def rebuild_basis(
    basis: SubspaceBasis | str | Path, *, resources: Resources, base_model: nn.Module | None = None
) -> SubspaceBasis:
    """Repeat a build: the same sources, held against their hashes on record, with the same options.

    Of an updated basis the last update is repeated, on the version before it. On the platform and with the versions of
    the first build, the fingerprint is the same; compare the two. Sources that are paths are looked for as they were
    given, relative ones from the working directory. Those that were left out stay out.

    Args:
        basis: the basis, its folder or its Hub id. Only its config is read, and of a control the shapes.
        resources: as in `build_basis`; its fields are keywords of their own, too.
        base_model: the base model, for `base-weights`, and where sources were converted from another method.

    Raises:
        SourceError: sources that are gone, that are others than they were, or that only ever were in memory; lists all
            of them.
        SubspaceError: the config does not say how the basis was built.
    """
    record = read_record(basis, base_model=base_model, resources=resources)
    old = record.basis
    if isinstance(record.options, UpdateOptions):
        new = update_basis(**record.inputs(resources, base_model), options=record.options)
        new.info["skipped"] = old.info.get("skipped", [])
        return new
    new = built(**record.inputs(resources, base_model), options=record.options)
    new.info["skipped"] = old.info.get("skipped", [])
    new.info["build"] = old.info["build"]
    return new.to_precision(old.precision or "float32")


def read_record(
    basis: SubspaceBasis | str | Path, *, base_model: nn.Module | None, resources: Resources
) -> BuildRecord:
    """Read how a basis was made, and open its sources.

    Args:
        basis: the basis, its folder or its Hub id.
        base_model: as in `rebuild_basis`.
        resources: of which the token is used.

    Raises:
        SourceError: sources that are not what they were; lists all of them.
        SubspaceError: the config does not say how the basis was built, or it needs the base model.
    """
    old = basis if isinstance(basis, SubspaceBasis) else SubspaceBasis.from_pretrained(basis, token=resources.token)
    build, builder, update = old.info.get("build"), old.info.get("builder"), old.info.get("update")
    if not isinstance(build, dict) or not builder:
        raise SubspaceError(f"{old.location}: its basis_config.json has no record of how it was built.")
    if builder in CONTROLS:
        return BuildRecord(old, _control_options(old, build, base_model), [])
    if update is None:
        if (old.info.get("version") or 1) != 1:
            raise SubspaceError(
                f"{old.location}: version {old.info['version']} was not made from sources alone. Build the version"
                " before it again (its lineage has the fingerprint), and do to it what was done."
            )
        options = _options(BuildOptions, build, builder=builder)
        return BuildRecord(old, options, _sources(old, options, base_model, resources))
    lineage = old.info.get("lineage") or [{}]
    arguments = update.get("arguments")
    if not isinstance(arguments, dict) or not is_sha256(lineage[-1].get("fingerprint")):
        raise SubspaceError(f"{old.location}: its basis_config.json has no record of how it was updated.")
    given = _options(UpdateOptions, arguments)
    if arguments.get("tasks"):
        raise SubspaceError(
            f"{old.location}: it was fitted to the cores of {arguments['tasks']} tasks as well, which it does not"
            " record. Call `update_basis`, or `plan_refit`, with them again."
        )
    sources = _sources(old, given, base_model, resources, version=old.info["version"])
    parent = lineage[-1]
    before = resolve_basis(
        parent.get("location"),
        revision=parent.get("revision"),
        fingerprint=parent["fingerprint"],
        near=None if old.revision or old.location is None else Path(old.location),
        token=resources.token,
    )
    return BuildRecord(old, given, sources, before)


@patient()
def sources_on_record(
    basis: SubspaceBasis,
    *,
    base_model: nn.Module | None = None,
    token: str | bool | None = None,
    version: int | None = None,
    allow_bin: bool | None = None,
) -> tuple[list[Source], list[str]]:
    """Open the sources that a basis's config names and that are still what they were.

    Args:
        basis: the basis.
        base_model: the base model, where sources were converted from another method.
        token: as in huggingface_hub.
        version: only the sources that joined with this version.
        allow_bin: take pickled sources too; by default as when the basis was built.

    Returns:
        The sources, and for each of the others the reason why it is not among them.
    """
    found, problems = [], []
    pickled = bool((basis.info.get("build") or {}).get("allow_bin")) if allow_bin is None else allow_bin
    for entry in basis.info.get("sources") or []:
        if version is not None and entry.get("version") != version:
            continue
        try:
            found.append(recorded_source(entry, allow_bin=pickled, base_model=base_model, token=token))
        except SourceError as error:
            problems.append(str(error))
    return found, problems


def _options(kind: Any, record: Mapping[str, Any], **more: Any) -> Any:
    """Make options of a record, which may be older than some of them."""
    return kind(**{**{key: record[key] for key in kind.names() if key in record}, **more})


def _control_options(old: SubspaceBasis, build: Mapping[str, Any], base_model: nn.Module | None) -> BuildOptions:
    builder = str(old.info["builder"])
    if builder == "base-weights" and base_model is None:
        raise SubspaceError(
            f"{old.location}: a basis from the base model's weights. Pass {old.base_model or 'that model'} as"
            " base_model= (--base-model)."
        )
    # the sizes are those of the basis itself
    named = {key: build[key] for key in ("directions", "seed") if key in build}
    return BuildOptions(builder=builder, target_modules=None if base_model is None else list(old), **named)


def _sources(
    old: SubspaceBasis,
    options: BuildOptions | UpdateOptions,
    base_model: nn.Module | None,
    resources: Resources,
    version: int | None = None,
) -> list[Source]:
    found, problems = sources_on_record(
        old, base_model=base_model, token=resources.token, version=version, allow_bin=bool(options.allow_bin)
    )
    if problems or not found:
        lines = "\n  ".join(problems) or "no source is on record"
        raise SourceError(f"{old.location}: {len(problems)} of its sources are not what they were:\n  {lines}")
    return found
