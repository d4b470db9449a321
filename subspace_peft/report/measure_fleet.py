"""Measure a fleet against a basis: which adapters and modules, and the findings of each."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .._io.progress import progress_bar
from ..basis import SubspaceBasis
from ..builders.fleet import Fleet
from ..energy import EnergyRecord, SourceRecord, of_known, share_of
from ..errors import SubspaceError
from ..sources.factors import Factors
from .curves import WORK, WORK_IN_ALL
from .facts import LEFT_OUT
from .fleet_curves import MemberCurves, curves_of_fleet
from .measure import ModuleFindings, measure
from .own_directions import directions_needed, left_by_direction
from .sample import draw_folds, draw_sample

MANY_COLUMNS = 256  # ranks in all, from which only MODULES of the modules are measured unless all are asked for
MODULES = 16
SAME = 2e-3  # a share on record is not contradicted by one measured that is as near: directions may be stored in int8


@dataclass(frozen=True)
class FleetMeasurement:
    """The findings of a fleet's sample.

    Attributes:
        drawn: places in the fleet of the adapters measured.
        modules: the findings of every module measured.
        sources: per adapter measured its entry in the report, see `ReportFacts`.
        nulls: per adapter measured what a basis of noise keeps of noise of its strength.
        how: modules and sources of how many, folds, seed.
        curves: per module measured its curves over k, see `curves_of_fleet`.
    """

    drawn: list[int]
    modules: dict[str, ModuleFindings]
    sources: list[dict[str, Any]]
    nulls: list[float | None]
    how: dict[str, Any]
    curves: dict[str, dict[str, Any]]


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
    names = sorted(fleet.modules, key=in_order)
    places = {name: found for name in names if (found := basis.find(name)) is not None}
    if not places:
        raise SubspaceError(
            f"{basis.location or 'The basis'}: its modules ({next(iter(basis))!r}, …) are none of the adapters'"
            f" ({fleet.modules[0]!r}, …). They belong to different base models."
        )
    fleet = _counting_as_built(basis, fleet)
    drawn = draw_sample(fleet.groups, sample, seed)
    folds = draw_folds([fleet.groups[i] for i in drawn], seed)
    chosen = _spread(list(places), _limit(fleet, drawn, list(places)) if modules is None else modules)
    measured: dict[str, ModuleFindings] = {}
    drawn_curves: dict[str, MemberCurves] = {}
    shares = [_Shares() for _ in drawn]
    weights, alternations = _built_by(basis)
    for name in progress_bar(chosen, desc="measuring", unit="module", shown=progress):
        members = [n for n, i in enumerate(drawn) if fleet.sources[i].norms.get(name, 0) > 0]
        if not members:
            continue
        sources = [drawn[n] for n in members]
        updates = [fleet.sources[i].factors(name) for i in sources]
        module = basis[places[name]]
        counts = fleet.source_weights(sources)
        cores = [module.project((update.B, update.A)) for update in updates]
        for n, update, core in zip(members, updates, cores, strict=True):
            shares[n].left[name] = left_by_direction(module, update, core)
        if weights == "norm":
            counts = [count * update.norm() ** 2 for count, update in zip(counts, updates, strict=True)]
        findings, curves = measure(
            updates,
            counts,
            [folds[n] for n in members],
            [_kept(update, core) for update, core in zip(updates, cores, strict=True)],
            (module.k_out, module.k_in),
            seed,
            alternations,
            min(WORK, WORK_IN_ALL / len(chosen)),
        )
        measured[name] = findings
        drawn_curves[name] = MemberCurves(members, counts, curves)
        for place, n in enumerate(members):
            shares[n].kept[name] = findings.kept[place]
            shares[n].left_out[name] = findings.left_out_here[place]
            shares[n].mean_only[name] = findings.mean_only[place]
            shares[n].null[name] = findings.null_here[place]
    how = {
        "modules": [len(measured), len(basis)],
        "sources": [len(drawn), len(fleet.sources)],
        "folds": len(set(folds)),
        "left_out": "one by one" if len(set(folds)) == len({fleet.groups[i] for i in drawn}) else "in folds",
        "seed": seed,
    }
    nulls = [of_known(each.null, fleet.sources[i].norms) for i, each in zip(drawn, shares, strict=True)]
    entries = _entries(basis, fleet, drawn, shares)
    curves_by_module = curves_of_fleet(drawn_curves, [fleet.sources[i].norms for i in drawn])
    return FleetMeasurement(drawn, measured, entries, nulls, how, curves_by_module)


def in_order(name: str) -> list[tuple[int, str]]:
    """Return a key by which modules are sorted as the model has them: layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


@dataclass
class _Shares:
    """The shares kept of one adapter, per module; None where they could not be measured."""

    kept: dict[str, float | None] = field(default_factory=dict)
    left_out: dict[str, float | None] = field(default_factory=dict)
    mean_only: dict[str, float | None] = field(default_factory=dict)
    null: dict[str, float | None] = field(default_factory=dict)
    # what the basis leaves, by direction
    left: dict[str, list[float]] = field(default_factory=dict)


def _kept(update: Factors, core: torch.Tensor) -> float:
    """Return the share of an update's energy that a module's basis keeps, ‖Uᵀ ΔW Vᵀ‖² / ‖ΔW‖²."""
    return share_of(float(core.square().sum()), update.norm() ** 2)


def _counting_as_built(basis: SubspaceBasis, fleet: Fleet) -> Fleet:
    """Return the fleet with the weights that the basis was built with, where it is of the basis's sources alone."""
    recorded = {entry.get("sha256"): entry.get("counts") for entry in basis.info.get("sources") or []}
    own: list[Any] = [recorded.get(source.sha256) for source in fleet.sources]
    if not all(isinstance(weight, (int, float)) for weight in own):
        return fleet
    return replace(fleet, weights=[float(weight or 1.0) for weight in own])


def _built_by(basis: SubspaceBasis) -> tuple[str, int]:
    """Return how the basis weights updates, ``equal`` or ``norm``, and its alternations, as far as they are known."""
    build = basis.info.get("build")
    build = build if isinstance(build, dict) and basis.info.get("builder") == "adapters" else {}
    rounds = build.get("alternations", 0)
    whole = isinstance(rounds, int) and not isinstance(rounds, bool) and 0 <= rounds <= 1000
    return str(build.get("weights", "equal")), rounds if whole else 0


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
    own = sources_on_record(basis)
    # of another fleet, what is left out is left out of that
    alone = all(source.sha256 in own for source in fleet.sources)
    entries = []
    for i, each in zip(drawn, shares, strict=True):
        source = fleet.sources[i]
        norms, known = source.norms, own.get(source.sha256)
        away = None if known is None or not alone else known.left_out
        whole = all(name in each.kept for name, norm in norms.items() if norm > 0)
        entries.append(
            {
                "name": source.name,
                "location": source.location,
                "seed_group": fleet.groups[i],
                "norm": math.sqrt(sum(norm**2 for norm in norms.values())),
                "in_basis": known is not None,
                "kept": _on_record(of_known(each.kept, norms), known, whole),
                LEFT_OUT: of_known(each.left_out, norms) if away is None else away,
                "mean_only": of_known(each.mean_only, norms),
                "extra_rank": directions_needed(each.kept, each.left, norms),
            }
        )
    return entries


def sources_on_record(basis: SubspaceBasis) -> dict[str, SourceRecord]:
    """Return what a basis's config says of its sources' energy, by their sha256."""
    entries = basis.info.get("sources") or []
    return {
        str(entry.get("sha256")): known
        for entry, known in zip(entries, EnergyRecord.of(basis.info).sources, strict=True)
    }


def _on_record(measured: float | None, known: SourceRecord | None, whole: bool) -> float | None:
    """Return the share kept of a source: as the basis has it on record, unless that is found to be wrong.

    Args:
        measured: what was found now, rounded otherwise.
        known: the source's record, where it has one.
        whole: whether all its modules were measured.
    """
    if known is None or known.kept is None or known.at_least:
        return measured
    if measured is None or not whole:
        return known.kept
    return known.kept if abs(measured - known.kept) <= SAME else measured
