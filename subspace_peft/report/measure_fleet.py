"""Measure a fleet against a basis: which adapters and modules, and the findings of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from ..basis import ModuleBasis, SubspaceBasis
from ..builders.fleet import Fleet
from ..errors import SubspaceError
from ..sources.factors import Factors
from .facts import LEFT_OUT
from .measure import ModuleFindings, mean, measure_module
from .sample import draw_folds, draw_sample

MANY_COLUMNS = 256  # ranks in all, from which only MODULES of the modules are measured unless all are asked for
MODULES = 16


@dataclass(frozen=True)
class FleetMeasurement:
    """The findings of a fleet's sample.

    Attributes:
        drawn: places in the fleet of the adapters measured.
        modules: the findings of every module measured.
        sources: per adapter measured its entry in the report, see `ReportFacts`.
        how: modules and sources of how many, folds, seed.
    """

    drawn: list[int]
    modules: dict[str, ModuleFindings]
    sources: list[dict[str, Any]]
    how: dict[str, Any]


def measure_fleet(
    basis: SubspaceBasis, fleet: Fleet, *, sample: int, modules: int | None, seed: int, progress: bool
) -> FleetMeasurement:
    """Measure a sample of a fleet, module by module.

    Args:
        basis: held against the fleet.
        fleet: the adapters.
        sample: the most adapters measured.
        modules: the most modules measured; None: as many as is quick.
        seed: of the sample, the folds and the null.
        progress: show a bar where it takes longer than two seconds.

    Raises:
        SubspaceError: the adapters and the basis have no module in common.
    """
    places = {name: found for name in fleet.modules if (found := basis.find(name)) is not None}
    if not places:
        raise SubspaceError(
            f"{basis.location or 'The basis'}: its modules ({next(iter(basis))!r}, …) are none of the adapters'"
            f" ({fleet.modules[0]!r}, …). They belong to different base models."
        )
    drawn = draw_sample(fleet.groups, sample, seed)
    folds = draw_folds([fleet.groups[i] for i in drawn], seed)
    chosen = _spread(list(places), _limit(fleet, drawn, list(places)) if modules is None else modules)
    measured: dict[str, ModuleFindings] = {}
    shares = [_Shares() for _ in drawn]
    for name in tqdm(chosen, desc="measuring", unit="module", delay=2, disable=not progress):
        members = [n for n, i in enumerate(drawn) if fleet.sources[i].norms.get(name, 0) > 0]
        if not members:
            continue
        sources = [drawn[n] for n in members]
        updates = [fleet.sources[i].factors(name) for i in sources]
        module = basis[places[name]]
        measured[name] = findings = measure_module(
            updates,
            fleet.source_weights(sources),
            [folds[n] for n in members],
            [_kept(module, update) for update in updates],
            (module.k_out, module.k_in),
            seed,
        )
        for place, n in enumerate(members):
            shares[n].kept.append(findings.kept[place])
            shares[n].left_out.append(findings.left_out_here[place])
            shares[n].mean_only.append(findings.mean_only[place])
    how = {
        "modules": [len(measured), len(basis)],
        "sources": [len(drawn), len(fleet.sources)],
        "folds": len(set(folds)),
        "left_out": "one by one" if len(set(folds)) == len({fleet.groups[i] for i in drawn}) else "in folds",
        "seed": seed,
    }
    return FleetMeasurement(drawn, measured, _entries(basis, fleet, drawn, shares), how)


@dataclass
class _Shares:
    """The shares kept of one adapter, per module; None where they could not be measured."""

    kept: list[float | None] = field(default_factory=list)
    left_out: list[float | None] = field(default_factory=list)
    mean_only: list[float | None] = field(default_factory=list)


def _kept(module: ModuleBasis, update: Factors) -> float:
    """Return the share of an update's energy that a module's basis keeps, ‖Uᵀ ΔW Vᵀ‖² / ‖ΔW‖²."""
    core = module.project((update.B, update.A))
    return min(1.0, float(core.square().sum()) / update.norm() ** 2)


def _limit(fleet: Fleet, drawn: Sequence[int], names: Sequence[str]) -> int:
    """Return how many modules to measure by default: all of a small fleet."""
    columns = max(
        sum(fleet.sources[i].shape(name)[2] for i in drawn if name in fleet.sources[i].keys) for name in names
    )
    return MODULES if columns > MANY_COLUMNS else len(names)


def _spread(names: list[str], limit: int) -> list[str]:
    """Return at most `limit` of the names, evenly spread, the first and the last among them."""
    if len(names) <= limit:
        return names
    return [names[round(i * (len(names) - 1) / max(1, limit - 1))] for i in range(limit)]


def _entries(
    basis: SubspaceBasis, fleet: Fleet, drawn: Sequence[int], shares: Sequence[_Shares]
) -> list[dict[str, Any]]:
    own = {entry.get("sha256") for entry in basis.info.get("sources") or []}
    return [
        {
            "name": source.name,
            "location": source.location,
            "seed_group": fleet.groups[i],
            "norm": math.sqrt(sum(norm**2 for norm in source.norms.values())),
            "in_basis": source.sha256 in own,
            "kept": mean(each.kept),
            LEFT_OUT: mean(each.left_out),
            "mean_only": mean(each.mean_only),
        }
        for i, each in zip(drawn, shares, strict=True)
        for source in [fleet.sources[i]]
    ]
