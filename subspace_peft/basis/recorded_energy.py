"""The energies on record of a basis, carried over to one made from it by cutting or rounding its directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import energy
from .module import ModuleBasis


def moved_sources(
    info: Mapping[str, Any],
    old: Mapping[str, ModuleBasis],
    new: Mapping[str, ModuleBasis],
    *,
    lost: float | None = None,
) -> list[dict[str, Any]]:
    """Return the list of sources with what a basis within the old one's span, or near it, keeps of them.

    The share kept falls as the norm of the stored cores does, ``Σ_m ‖C'_m‖² / Σ_m ‖C_m‖²``.

    Args:
        info: of the old basis.
        old: its modules.
        new: the modules made of them.
        lost: the share that is lost of sources whose cores are not stored; None: it is not known.
    """
    entries = energy.sources_of(info)
    before, after = _squares(old, len(entries)), _squares(new, len(entries))
    for i, entry in enumerate(entries):
        if lost is None:
            # of another size nothing is known of it
            entry.pop("energy_left_out", None)
        kept = entry.get("energy_kept")
        if not isinstance(kept, (int, float)):
            continue
        if before is not None and after is not None and float(before[i]) > 0:
            entry["energy_kept"] = kept * energy.share_of(float(after[i]), float(before[i]))
        else:
            entry["energy_kept"] = None if lost is None else kept * (1 - lost)
    return entries


def rounded_info(
    info: Mapping[str, Any], old: Mapping[str, ModuleBasis], new: Mapping[str, ModuleBasis], precision: dict[str, Any]
) -> dict[str, Any]:
    """Return the ``info`` of a basis that was stored in fewer bits, its energies being those that are left.

    Args:
        info: of the float32 basis.
        old: its modules.
        new: the rounded ones.
        precision: of `precision.summary`.
    """
    lost = precision["energy_lost"]
    found = {**info, "precision": {**precision, "in_energies": True}}
    if "sources" in info:
        found["sources"] = moved_sources(info, old, new, lost=lost)
    measured = info.get("measured")
    if isinstance(measured, Mapping) and "energy_kept" in measured:
        before, after = (
            energy.mean(entry.get("energy_kept") for entry in each.get("sources") or []) for each in (info, found)
        )
        ratio = after / before if before and after is not None else 1 - lost
        changed = {"energy_kept": measured["energy_kept"] * ratio}
        if isinstance(shares := measured.get("energy_kept_per_module"), Mapping):
            left = _per_module(old, new)
            changed["energy_kept_per_module"] = {
                name: share * left.get(name, 1 - lost) for name, share in shares.items()
            }
        found["measured"] = {**measured, **changed}
    return found


def _squares(modules: Mapping[str, ModuleBasis], count: int) -> torch.Tensor | None:
    """Return the sources' squared core norms over all modules (count,) float64; None where cores are not stored."""
    total = torch.zeros(count, dtype=torch.float64)
    for name in modules:
        cores = modules[name].cores
        if cores is None or len(cores) != count:
            return None
        total += cores.double().square().sum((1, 2))
    return total


def _per_module(old: Mapping[str, ModuleBasis], new: Mapping[str, ModuleBasis]) -> dict[str, float]:
    """Return per module with stored cores the mean over its sources of the share of the core's energy that is left."""
    found = {}
    for name in old:
        was, now = old[name].cores, new[name].cores
        if was is None or now is None:
            continue
        before, after = (cores.double().square().sum((1, 2)) for cores in (was, now))
        alive = before > 0
        if alive.any():
            found[name] = min(1.0, float((after[alive] / before[alive]).mean()))
    return found
