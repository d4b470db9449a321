"""What a report says: means of what was measured, sizes in bytes, and what a basis's config has on record."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..basis import SubspaceBasis
from ..basis.base_weights import recorded_weights
from ..basis.layout import k_range
from ..builders.fleet import Fleet
from ..energy import EnergyRecord, mean, of_known
from .choices import FLOAT32, stored
from .facts import LEFT_OUT
from .measure import ModuleFindings
from .measure_fleet import FleetMeasurement, sources_on_record
from .own_directions import needed_by_all
from .pays import break_even
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
    "extra_rank",
    "extra_rank_of_new",
    "bytes_per_direction",
    "break_even",
    "sources",
    "built_from",
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
        "base_weights": recorded_weights(basis.info),
        "builder": basis.info.get("builder"),
        "modules": len(basis),
        "k": basis.describe_k(),
        "k_range": k_range(basis.shapes()),
        "bytes": 4 * frozen if basis.file is None else basis.file.stat().st_size,
        "bytes_per_task": 4 * sum(s["k_out"] * s["k_in"] for s in shapes),
    }


def measured_numbers(
    basis: SubspaceBasis, fleet: Fleet, measured: FleetMeasurement, choices: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a report's figures from what was measured, see `ReportFacts`."""
    modules, entries = list(measured.modules.values()), measured.sources
    own, new = ([entry for entry in entries if entry["in_basis"] is known] for known in (True, False))
    above = tuple(round(statistics.median(getattr(m, f"above_{side}") for m in modules)) for side in ("out", "in"))
    facts = basis_facts(basis)
    per_lora = choices["bytes_of_loras"] / choices["adapters"]
    alone, per_task = stored(choices, {name: tuple(each["size"]) for name, each in choices["modules"].items()})
    return {
        **_energies(basis, fleet, measured),
        "mean_only": mean(e["mean_only"] for e in entries),
        "k_for_share": max(m.k_for_share for m in modules),
        "above": above,
        "k_for_new_tasks": useful_k(*_curves(modules)),
        "bytes_per_lora": round(per_lora),
        "bytes_per_task": facts["bytes_per_task"],
        "bytes_of_basis": facts["bytes"],
        "extra_rank": needed_by_all([e["extra_rank"] for e in own or new]),
        "extra_rank_of_new": needed_by_all([e["extra_rank"] for e in new]),
        "bytes_per_direction": FLOAT32 * sum(sum(each["shape"]) for each in choices["modules"].values()),
        "break_even": break_even(alone, per_lora, per_task),
        "sources": len(fleet.sources),
        "built_from": len(basis.info.get("sources") or []),
        "in_seed_groups": _in_groups(Counter(fleet.groups)),
    }


def _energies(basis: SubspaceBasis, fleet: Fleet, measured: FleetMeasurement) -> dict[str, float | None]:
    """Return the energies kept: of the basis's own sources those on record, unless these are contradicted."""
    record, entries, own = EnergyRecord.of(basis.info), measured.sources, sources_on_record(basis)
    alone = all(source.sha256 in own for source in fleet.sources)
    known = {
        key: getattr(record, key) if alone and key not in record.over_modules else None
        for key in ("left_out", "null", "random")
    }
    found = {
        "kept": mean(e["kept"] for e in entries if e["in_basis"]),
        "kept_of_new": mean(e["kept"] for e in entries if not e["in_basis"]),
        "null_kept": mean(measured.nulls),
        LEFT_OUT: mean(e[LEFT_OUT] for e in entries),
        "random": mean(_random(basis, fleet, i) for i in measured.drawn),
    }
    of_all = sum(e["in_basis"] for e in entries) == len(record.sources)
    if record.kept is not None and not record.at_least and "kept" not in record.over_modules and not of_all:
        # a part of its sources was measured
        found["kept"] = record.kept
    for key, value in (("null_kept", known["null"]), (LEFT_OUT, known["left_out"]), ("random", known["random"])):
        found[key] = found[key] if value is None else value
    return found


def _random(basis: SubspaceBasis, fleet: Fleet, i: int) -> float | None:
    """Return what random directions, as many as the basis has, keep of a source in expectation."""
    shapes, norms, shares = basis.shapes(), fleet.sources[i].norms, {}
    for name in norms:
        if (key := basis.find(name)) is not None:
            shape = shapes[key]
            shares[name] = shape["k_out"] * shape["k_in"] / (shape["out"] * shape["in"])
    return of_known(shares, norms)


def recorded_numbers(basis: SubspaceBasis) -> dict[str, Any]:
    """Return a report's figures as far as the basis's config has them on record; the others are None."""
    found = EnergyRecord.of(basis.info)
    groups = Counter(entry.get("seed_group") for entry in basis.info.get("sources") or [])
    facts = basis_facts(basis)
    return {
        **dict.fromkeys(NUMBERS),
        "kept": found.kept,
        "at_least": found.at_least,
        "null_kept": found.null,
        LEFT_OUT: found.left_out,
        "random": found.random,
        "bytes_per_task": facts["bytes_per_task"],
        "bytes_of_basis": facts["bytes"],
        "sources": sum(groups.values()),
        "built_from": sum(groups.values()),
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
