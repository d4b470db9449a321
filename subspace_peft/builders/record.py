"""What a basis records of a source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..sources.source import Source


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
        **_facts(source),
    }


def _facts(source: Source) -> dict[str, Any]:
    """Return where a source's scale comes from, its dtypes and method, and which of its tensors no basis holds."""
    kind = source.method
    if kind != "LORA":
        scale = "folded in by convert_to_lora"
    elif source.scales:
        values = sorted({float(f"{value:.6g}") for value in source.scales.values()})
        scale = (
            "alpha / rank of its file:"
            f" {', '.join(f'{value:g}' for value in values[:4])}{' …' if len(values) > 4 else ''}"
        )
    else:
        scale = "from its config" if source.config else "1: it came without its alpha"
    converted = {} if kind == "LORA" else {"converted_from": kind, "energy_lost_in_conversion": source.lost}
    return {"scale": scale, "dtypes": sorted(source.dtypes), "left_out_tensors": list(source.other_keys), **converted}
