"""Versions of a basis: which basis one was made from, and where its directions come from."""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping
from typing import Any

from .._io.untrusted import is_whole
from ..energy import sources_of
from .basis import SubspaceBasis
from .module import ModuleBasis

Sides = dict[str, list[list[Any]]]


def version_of(basis: SubspaceBasis) -> int:
    """Return a basis's version: 1 as it was built, one more for every update and completion."""
    return int(basis.info.get("version") or 1)


def earlier_versions(basis: SubspaceBasis) -> list[str]:
    """Return the fingerprints of the versions that a basis came from, the first one first."""
    return [str(each.get("fingerprint")) for each in basis.info.get("lineage") or [] if isinstance(each, dict)]


def origins(basis: SubspaceBasis) -> dict[str, Sides]:
    """Return where the directions come from, in their order: module → ``{"out": [[origin, count], …], "in": …}``."""
    known, builder = basis.info.get("columns"), str(basis.info.get("builder") or "version 1")
    found = {}
    for name, shape in basis.shapes().items():
        sides = known.get(name) if isinstance(known, Mapping) else None
        found[name] = {
            side: (
                recorded
                # a file may say anything; a record that does not add up is ignored
                if (recorded := sides.get(side) if isinstance(sides, Mapping) else None) is not None
                and _adds_up(recorded, shape[size])
                else [[builder, shape[size]]]
            )
            for side, size in (("out", "k_out"), ("in", "k_in"))
        }
    return found


def warn_float32(old: SubspaceBasis) -> None:
    """Warn where a version made from `old` is stored in more bits than `old` is.

    Rounding again would move the old directions, and with them every task.
    """
    if old.precision is not None:
        warnings.warn(
            f"{old.location or 'The basis'} is stored as {old.precision}; its next version is stored as float32, so"
            " that its directions and tasks stay what they are. `to_precision` rounds it again, and tasks then have to"
            " be migrated with max_drift= (--max-drift).",
            stacklevel=3,
        )


def _adds_up(recorded: Any, size: int) -> bool:
    if not isinstance(recorded, list) or not all(isinstance(part, list) and len(part) == 2 for part in recorded):
        return False
    if not all(isinstance(origin, str) and is_whole(count, most=size) for origin, count in recorded):
        return False
    return sum(count for _, count in recorded) == size


def next_version(
    old: SubspaceBasis, modules: Mapping[str, ModuleBasis], *, refitted: Container[str] = (), origin: str | None = None
) -> dict[str, Any]:
    """Return the `info` that a basis made from `old` begins with.

    It holds the version, the lineage and the origins of the directions, and nothing that was measured with `old`.

    Args:
        old: the basis that the new one is made from.
        modules: the new basis's modules.
        refitted: names of the modules whose directions are all new; the others begin with the old ones.
        origin: name of the new directions' origin; by default ``version n``.
    """
    version = version_of(old) + 1
    origin = origin or f"version {version}"
    parent = {
        "fingerprint": old.fingerprint,
        "version": version - 1,
        "location": old.location,
        "revision": old.revision,
    }
    columns, before = {}, origins(old)
    shapes = old.shapes()
    for name, module in modules.items():
        sides: Sides = {}
        for side, size, was in (("out", module.k_out, "k_out"), ("in", module.k_in, "k_in")):
            more = size - shapes[name][was]
            added = [[origin, more]] if more else []
            sides[side] = [[origin, size]] if name in refitted else [*before[name][side], *added]
        columns[name] = sides
    # the new version is given and stored as float32, whatever the old one is stored as
    gone = ("measured", "update", "completed", "columns", "precision")
    kept = {key: value for key, value in old.info.items() if key not in gone}
    return {
        **kept,
        **({"sources": sources_of(old.info)} if "sources" in kept else {}),
        "version": version,
        "lineage": [*(old.info.get("lineage") or []), parent],
        "columns": columns,
    }
