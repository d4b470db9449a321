"""Find what a fleet of adapters has in common, before or after a basis is built from it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._shown import Shown, Table
from ..base_names import check_said
from ..basis import SubspaceBasis
from ..builders.fleet import gather
from ..convert import project_lora
from ..energy import percent
from ..errors import SubspaceError
from ..sources.source import Source

NEAR = 0.95  # cosine from which two adapters are called near-duplicates
LOUD = 3.5  # robust z-score of log ‖ΔW‖ from which an adapter is an outlier, as is usual with median and MAD
LOUD_AT_LEAST = 2.0  # a norm within this factor of the median is none, however close together the others are


@dataclass(frozen=True, repr=False)
class FleetAnalysis(Shown):
    """The result of `analyze_fleet`.

    Attributes:
        sources: per adapter name, location, base_model, ranks, modules, norm (‖ΔW‖_F), seed_group, ``nearest`` (the
            most similar other's name) and ``nearest_cosine``; with a basis also ``energy_kept``, ``energy_random``
            (what a random basis of equal size keeps, in expectation), or ``not_covered``, the reason why it cannot be
            projected.
        cosines: N × N, cosine between the updates ΔW, modules that only one of two has counting as zero in the other.
        near_duplicates: ``[name, name, cosine]`` of pairs from 0.95 on.
        outliers: ``{"name", "reason"}``.
        skipped: adapters that cannot be read, or do not belong to the others, each with its reason.
    """

    sources: list[dict[str, Any]]
    cosines: list[list[float]]
    near_duplicates: list[list[Any]]
    outliers: list[dict[str, str]]
    skipped: list[dict[str, str]]

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "adapters", len(self.sources)
        yield "near duplicates", len(self.near_duplicates) or None
        yield "outliers", len(self.outliers) or None
        yield "left out", len(self.skipped) or None
        kept = [entry["energy_kept"] for entry in self.sources if "energy_kept" in entry]
        yield "energy kept by the basis", f"{percent(sum(kept) / len(kept))} on average" if kept else None

    def _shown_table(self) -> Table:
        rows = (
            (
                entry["name"],
                f"{entry['norm']:.4g}",
                entry.get("nearest", ""),
                f"{entry['nearest_cosine']:.2f}" if "nearest_cosine" in entry else "",
                percent(entry["energy_kept"]) if "energy_kept" in entry else "",
            )
            for entry in self.sources
        )
        return ("adapter", "norm of ΔW", "nearest", "cosine", "energy kept"), rows, len(self.sources)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


def analyze_fleet(
    sources: Iterable[Any],
    *,
    basis: SubspaceBasis | str | Path | None = None,
    allow_bin: bool = False,
    base_model: nn.Module | None = None,
    base_model_name: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> FleetAnalysis:
    """Compare the adapters of a fleet with one another, and with a basis.

    Everything is computed from the updates ΔW in factored form, so ranks may differ and the factors' gauge does not
    matter.

    Args:
        sources: as `build_basis` takes them.
        basis: measure how much of each adapter it keeps.
        allow_bin: as in `build_basis`.
        base_model: as in `build_basis`.
        base_model_name: as in `build_basis`.
        token: as in `build_basis`.
        progress: as in `build_basis`.

    Raises:
        SourceError: no adapter can be used.
        BasisNotFoundError: there is no such basis.
    """
    if basis is not None and not isinstance(basis, SubspaceBasis):
        basis = SubspaceBasis.from_pretrained(basis, token=token)
    fleet = gather(
        sources,
        skip_bad=True,
        partial=True,
        token=token,
        progress=progress,
        allow_bin=allow_bin,
        base_model=base_model,
        base_model_name=check_said(base_model_name),
        keep_duplicates=True,
    )
    cosines = cosine_matrix(fleet.sources)
    norms = [sum(norm**2 for norm in source.norms.values()) ** 0.5 for source in fleet.sources]
    entries, pairs = [], []
    for i, source in enumerate(fleet.sources):
        entry: dict[str, Any] = {
            "name": source.name,
            "location": source.location,
            "base_model": source.base_model,
            "ranks": source.ranks,
            "modules": len(source.keys),
            "norm": norms[i],
            "seed_group": fleet.groups[i],
        }
        others = [(float(cosines[i, j]), j) for j in range(len(fleet.sources)) if j != i]
        if others:
            value, j = max(others)
            entry |= {"nearest": fleet.sources[j].name, "nearest_cosine": value}
        pairs += [[fleet.sources[j].name, source.name, value] for value, j in others if j < i and value >= NEAR]
        if basis is not None:
            try:
                projection = project_lora(source, basis, base_model_name=base_model_name)
                entry |= {"energy_kept": projection.energy_kept, "energy_random": projection.energy_random}
            except SubspaceError as error:
                entry["not_covered"] = str(error)
        entries.append(entry)
    return FleetAnalysis(entries, cosines.tolist(), pairs, _outliers(fleet.sources, norms), fleet.skipped)


def cosine_matrix(sources: list[Source]) -> torch.Tensor:
    """Return the cosines (N, N) float64 between the updates of N sources, in factored form."""
    n = len(sources)
    inner = torch.zeros(n, n, dtype=torch.float64)
    for name in dict.fromkeys(name for source in sources for name in source.keys):
        members = [i for i, source in enumerate(sources) if name in source.keys]
        updates = [sources[i].factors(name) for i in members]
        B, A = torch.cat([update.B for update in updates], 1), torch.cat([update.A for update in updates], 0)
        ranks = [update.rank for update in updates]
        for i, (b, a) in zip(members, zip(B.split(ranks, 1), A.split(ranks, 0), strict=True), strict=True):
            products = (b.T @ B * (a @ A.T)).sum(0)
            inner[i, members] += torch.stack([part.sum() for part in products.split(ranks)])
    norms = inner.diagonal().sqrt().clamp_min(1e-300)
    return (inner / norms / norms[:, None]).clamp(-1, 1)


def _outliers(sources: list[Source], norms: list[float]) -> list[dict[str, str]]:
    logs = torch.tensor(norms, dtype=torch.float64).log().tolist()
    middle = statistics.median(logs)
    # 1.4826 makes the median absolute deviation a standard deviation where values are normal
    spread = 1.4826 * statistics.median(abs(value - middle) for value in logs)
    limit = max(LOUD * spread, float(torch.tensor(LOUD_AT_LEAST).log()))
    usual = torch.tensor(middle).exp().item()
    return [
        {"name": source.name, "reason": f"‖ΔW‖ = {norm:.4g}, where the fleet's median is {usual:.4g}"}
        for source, norm, value in zip(sources, norms, logs, strict=True)
        if len(sources) > 2 and abs(value - middle) > limit
    ]
