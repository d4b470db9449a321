"""The numbers of a report: means of what was measured, sizes in bytes, and what a basis's config has on record."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..basis import SubspaceBasis
from ..builders.fleet import Fleet
from .facts import LEFT_OUT
from .measure import ModuleFindings, mean
from .measure_fleet import FleetMeasurement
from .verdict import useful_k

NUMBERS = (
    "kept",
    "kept_of_new",
    "null_kept",
    LEFT_OUT,
    "random",
    "mean_only",
    "k_for_share",
    "above",
    "k_for_new_tasks",
    "bytes_per_lora",
    "bytes_per_task",
    "bytes_of_basis",
    "break_even",
    "sources",
    "in_seed_groups",
)


def basis_facts(basis: SubspaceBasis) -> dict[str, Any]:
    """Return what a report says of the basis itself; sizes in bytes, of a float32 file where it is in memory."""
    shapes = list(basis.shapes().values())
    frozen = sum(s["k_out"] * s["out"] + s["k_in"] * s["in"] for s in shapes)
    return {
        "location": basis.location,
        "revision": basis.revision,
        "fingerprint": basis.fingerprint,
        "base_model": basis.base_model,
        "builder": basis.info.get("builder"),
        "modules": len(basis),
        "k": basis.describe_k(),
        "bytes": 4 * frozen if basis.file is None else basis.file.stat().st_size,
        "bytes_per_task": 4 * sum(s["k_out"] * s["k_in"] for s in shapes),
    }


def measured_numbers(basis: SubspaceBasis, fleet: Fleet, measured: FleetMeasurement) -> dict[str, Any]:
    """Return a report's numbers from what was measured, see `ReportFacts`."""
    modules, entries = list(measured.modules.values()), measured.sources
    above = tuple(round(statistics.median(getattr(m, f"above_{side}") for m in modules)) for side in ("out", "in"))
    facts = basis_facts(basis)
    per_lora = statistics.mean(_bytes_of(fleet, i, basis) for i in measured.drawn)
    saved = per_lora - facts["bytes_per_task"]
    return {
        "kept": mean([e["kept"] for e in entries if e["in_basis"]]),
        "kept_of_new": mean([e["kept"] for e in entries if not e["in_basis"]]),
        "null_kept": mean([_at(m.ks, m.null, min(m.size)) for m in modules]),
        LEFT_OUT: mean([e[LEFT_OUT] for e in entries]),
        "random": mean([m.size[0] * m.size[1] / (m.shape[0] * m.shape[1]) for m in modules]),
        "mean_only": mean([e["mean_only"] for e in entries]),
        "k_for_share": max(m.k_for_share for m in modules),
        "above": above,
        "k_for_new_tasks": useful_k(*_curves(modules)),
        "bytes_per_lora": round(per_lora),
        "bytes_per_task": facts["bytes_per_task"],
        "bytes_of_basis": facts["bytes"],
        # N adapters as LoRAs take N·per_lora bytes, in the basis its bytes and N·per_task
        "break_even": None if saved <= 0 else math.ceil(facts["bytes"] / saved),
        "sources": len(fleet.sources),
        "in_seed_groups": _in_groups(Counter(fleet.groups)),
    }


def recorded_numbers(basis: SubspaceBasis) -> dict[str, Any]:
    """Return a report's numbers as far as the basis's config has them on record; the others are None."""
    found = basis.info.get("measured") or {}
    groups = Counter(entry.get("seed_group") for entry in basis.info.get("sources") or [])
    facts = basis_facts(basis)
    return {
        **dict.fromkeys(NUMBERS),
        "kept": found.get("energy_kept"),
        LEFT_OUT: found.get("energy_left_out"),
        "random": found.get("energy_random"),
        "bytes_per_task": facts["bytes_per_task"],
        "bytes_of_basis": facts["bytes"],
        "sources": sum(groups.values()),
        "in_seed_groups": _in_groups(groups),
    }


def _in_groups(groups: Counter[Any]) -> int:
    """Return how many adapters share their group with another one."""
    return sum(size for size in groups.values() if size > 1)


def _curves(modules: Sequence[ModuleFindings]) -> tuple[list[int], list[float], list[float]]:
    """Return the sizes k that all modules have, and per k two means over modules.

    These are of the energy kept of adapters left out, and of what random directions keep.
    """
    ks = [k for k in modules[0].ks if all(k in module.ks for module in modules)]
    means = [
        [statistics.mean(getattr(module, key)[module.ks.index(k)] for module in modules) for k in ks]
        for key in ("left_out", "random")
    ]
    return ks, *means


def _bytes_of(fleet: Fleet, i: int, basis: SubspaceBasis) -> int:
    """Return the bytes of a source's factors, as they are stored, of modules that the basis has."""
    source = fleet.sources[i]
    width = 4 if "float32" in source.dtypes else 8 if "float64" in source.dtypes else 2
    shapes = [source.shape(name) for name in source.keys if basis.find(name) is not None]
    return width * sum(rank * (out + inner) for out, inner, rank in shapes)


def _at(ks: Sequence[int], values: Sequence[float], k: int) -> float:
    """Return a curve's value at k, between its points on a straight line."""
    if k <= ks[0] or k >= ks[-1]:
        return values[0] if k <= ks[0] else values[-1]
    place = next(i for i, other in enumerate(ks) if other >= k)
    low, high = ks[place - 1], ks[place]
    return values[place - 1] + (values[place] - values[place - 1]) * (k - low) / (high - low)
