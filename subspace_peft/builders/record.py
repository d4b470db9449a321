"""What a basis records of a source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..sources.source import Source
from .fleet import facts


def source_entry(source: Source, kept: Mapping[str, float | None], group: int) -> dict[str, Any]:
    """A source's entry in the basis's list.

    Args:
        kept: module → the share of the source's energy there that the basis keeps; None counts as none.
        group: the number of its shared-seed group.
    """
    norms = source.norms
    total = sum(norm**2 for norm in norms.values())
    held = sum((kept.get(name) or 0.0) * norms[name] ** 2 for name in norms)
    return {
        "name": source.name,
        "location": source.location,
        "revision": source.revision,
        "sha256": source.sha256,
        "base_model": source.base_model,
        "license": source.license,
        "task_type": source.task_type,
        "ranks": source.ranks,
        "modules": len(norms),
        "norm": total**0.5,
        "seed_group": group,
        "energy_kept": held / total,
        **facts(source),
    }
