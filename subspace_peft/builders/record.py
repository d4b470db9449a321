"""A basis's record of a source, and the source opened again from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..base_names import shown_name
from ..energy import of_known, of_source
from ..errors import SourceError
from ..sources.lora import DEFAULT_ALPHA
from ..sources.open import open_source
from ..sources.source import IN_MEMORY, Source


def source_entry(
    source: Source,
    kept: Mapping[str, float | None],
    group: int,
    left_out: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """Return a source's entry in the basis's list.

    Args:
        source: as it was read.
        kept: module → the share of the source's energy there that the basis keeps; None counts as none.
        group: the number of its shared-seed group.
        left_out: the same of a basis that was built without its group, where that was measured.
    """
    norms = source.norms
    away = of_known(left_out or {}, norms)
    return {
        "name": source.name,
        "location": source.location,
        "revision": source.revision,
        "sha256": source.sha256,
        "base_model": source.base_model,
        **({"base_model_given": shown_name(source.given_base)} if source.said_base else {}),
        "license": source.license,
        "task_type": source.task_type,
        "ranks": source.ranks,
        "modules": len(norms),
        "norm": sum(norm**2 for norm in norms.values()) ** 0.5,
        "seed_group": group,
        "energy_kept": of_source(kept, norms),
        **({} if away is None else {"energy_left_out": away}),
        **_facts(source),
    }


def recorded_source(
    entry: Mapping[str, Any], *, allow_bin: bool, base_model: nn.Module | None, token: str | bool | None
) -> Source:
    """Open the source of an entry in a basis's list, at the commit and with the name on record.

    Args:
        entry: as `source_entry` wrote it; ``location`` and ``sha256`` have to be there.
        allow_bin: take pickled weights too.
        base_model: as in `open_source`, where the source was converted from another method.
        token: as in huggingface_hub.

    Raises:
        SourceError: the source is gone, was never on a disk, or has other bytes than those on record.
    """
    location = str(entry["location"])
    if location.startswith(IN_MEMORY):
        raise SourceError(f"{entry.get('name')}: it was given in memory, and is stored nowhere.")
    reference = reference_of(location, entry.get("revision"))
    converted = entry.get("converted_from")
    source = open_source(reference, token=token, allow_bin=allow_bin, base_model=base_model if converted else None)
    if source.sha256 != entry["sha256"]:
        raise SourceError(
            f"{reference}: its file has sha256 {source.sha256}, and had {entry['sha256']} when the basis was built."
            " Restore that file, or build a new basis."
        )
    source.name = str(entry.get("name") or source.name)
    if "base_model_given" in entry and isinstance(entry.get("base_model"), str):
        source.said_base = entry["base_model"]
    return source


def reference_of(location: str, revision: str | None) -> str:
    """Return the reference of a location at a revision: ``org/name@revision:folder``."""
    name, colon, inside = location.partition(":")
    return f"{name}@{revision}{colon}{inside}" if revision else location


def _facts(source: Source) -> dict[str, Any]:
    """Return where a source's scale comes from, its dtypes and method, and which of its tensors no basis holds."""
    if source.converted is not None:
        scale = "folded in by convert_to_lora"
    elif source.scales:
        values = sorted({float(f"{value:.6g}") for value in source.scales.values()})
        scale = (
            f"{source.scale_from}: {', '.join(f'{value:g}' for value in values[:4])}{' …' if len(values) > 4 else ''}"
            + ("; 1 where it has no alpha" if source.scale_is_guessed else "")
        )
    elif source.config:
        absent = (
            "" if "lora_alpha" in source.config else f", which has no lora_alpha: PEFT's default of {DEFAULT_ALPHA}"
        )
        scale = f"from its config{absent}"
    else:
        scale = "1: it came without its alpha"
    return {
        "scale": scale,
        "dtypes": sorted(source.dtypes),
        "left_out_tensors": list(source.other_keys),
        **source.conversion,
        # of a task, which basis it is on
        **({} if source.task is None else {"task_on": source.task_on}),
    }
