"""What a basis's record says of the one it was made from, and of where its directions come from."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from .._io.untrusted import is_whole
from .basis import SubspaceBasis
from .module import ModuleBasis

Sides = dict[str, list[list[Any]]]


def version_of(basis: SubspaceBasis) -> int:
    """1 for a basis as it was built, one more for every update and completion."""
    return int(basis.info.get("version") or 1)


def origins(basis: SubspaceBasis) -> dict[str, Sides]:
    """Module → ``{"out": [[origin, count], …], "in": …}``: where the directions come from, in their order."""
    known, builder = basis.info.get("columns"), str(basis.info.get("builder") or "version 1")
    found = {}
    for name, shape in basis.shapes().items():
        sides = known.get(name) if isinstance(known, Mapping) else None
        found[name] = {
            side: (
                recorded
                # a file may say anything; what does not add up counts for nothing
                if (recorded := sides.get(side) if isinstance(sides, Mapping) else None) is not None
                and _adds_up(recorded, shape[size])
                else [[builder, shape[size]]]
            )
            for side, size in (("out", "k_out"), ("in", "k_in"))
        }
    return found


def _adds_up(recorded: Any, size: int) -> bool:
    if not isinstance(recorded, list) or not all(isinstance(part, list) and len(part) == 2 for part in recorded):
        return False
    if not all(isinstance(origin, str) and is_whole(count, most=size) for origin, count in recorded):
        return False
    return sum(count for _, count in recorded) == size


def next_version(
    old: SubspaceBasis, modules: Mapping[str, ModuleBasis], *, refitted: Container[str] = (), origin: str | None = None
) -> dict[str, Any]:
    """The record that a basis made from `old` begins with: version, lineage and origins of its directions; nothing
    that was measured.

    Args:
        modules: the new basis's.
        refitted: names of those whose directions are all new; the others begin with the old ones.
        origin: what the new directions are called; default ``version n``.
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
    gone = ("measured", "update", "completed", "columns")
    kept = {key: value for key, value in old.info.items() if key not in gone}
    return {
        **kept,
        "version": version,
        "lineage": [*(old.info.get("lineage") or []), parent],
        "columns": columns,
    }
