"""Make the record of an updated basis: its sources, old and new, energies, and the version it came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from .. import energy
from .._io.untrusted import is_finite, is_whole
from ..base_names import merged_names
from ..basis import ModuleBasis, SubspaceBasis
from ..basis.lineage import next_version
from .fleet import Fleet
from .record import source_entry


def record(
    old: SubspaceBasis,
    fleet: Fleet,
    names: Mapping[str, str],
    arguments: dict[str, Any],
    modules: Mapping[str, ModuleBasis],
    facts: dict[str, dict[str, Any]],
    drifts: dict[str, float],
) -> dict[str, Any]:
    """Return the ``info`` of an updated basis.

    Args:
        old: the basis before.
        fleet: the new sources.
        names: module in the basis → its name in the fleet.
        arguments: of the update.
        modules: all modules of the new basis.
        facts: changed module → the facts of `update_module`; ``shares`` is taken out.
        drifts: changed module → its drift, where it was fitted again.
    """
    by_name = {name: key for key, name in names.items()}
    info = next_version(old, modules, refitted=() if arguments["k"] is None else facts)
    known = energy.sources_of(old.info)
    first = 1 + max((_group(entry, -1) for entry in known), default=-1)
    entries = []
    for i, source in enumerate(fleet.sources):
        kept = {name: facts[by_name[name]]["shares"][i] if by_name[name] in facts else None for name in source.norms}
        entry = source_entry(source, kept, first + fleet.groups[i])
        entries.append({**entry, "version": info["version"]})
    names = merged_names(old.info.get("base_model_names"), fleet.base_names())
    shares = {key: [share for share in each.pop("shares") if share is not None] for key, each in facts.items()}
    return {
        **info,
        "sources": [*known, *entries],
        **({"base_model_names": names} if names else {}),
        "skipped": [*(old.info.get("skipped") or []), *fleet.skipped],
        "update": {"arguments": arguments, "modules": facts, **({"drift": drifts} if drifts else {})},
        # where all was fitted again, what is kept of old sources is known as far as their stored cores go, not per
        # module
        **({} if arguments["k"] is not None else {"measured": _measured(old, fleet, entries, shares, modules)}),
    }


def _measured(
    old: SubspaceBasis,
    fleet: Fleet,
    entries: list[dict[str, Any]],
    shares: Mapping[str, list[float]],
    modules: Mapping[str, ModuleBasis],
) -> dict[str, Any]:
    """Return the energy kept of old and new sources together.

    Of the old ones it is what the old basis kept, which is the same or less.
    """
    measured = old.info.get("measured")
    measured = measured if isinstance(measured, Mapping) else {}
    known = energy.sources_of(old.info)
    before = measured.get("energy_kept_per_module")
    per_module = {}
    for name in modules:
        was = before.get(name) if isinstance(before, Mapping) else None
        old_sum, old_count = (float(was) * len(known), len(known)) if is_finite(was) else (0.0, 0)
        new = shares.get(name, [])
        if old_count + len(new):
            per_module[name] = (old_sum + sum(new)) / (old_count + len(new))
    random = {name: m.k_out * m.k_in / (m.out_features * m.in_features) for name, m in modules.items()}
    weights = _joined_weights(measured, len(known), fleet)
    kept = energy.mean(_number(entry) for entry in [*known, *entries])
    return {
        # without the old modules' weights, what random directions keep is a mean over modules, as it was before
        **({} if weights is None else {"definition": energy.DEFINITION, "energy_per_module": weights}),
        "energy_kept": energy.mean(per_module.values()) if kept is None else kept,
        "energy_random": energy.of_random(random, weights),
        "energy_kept_per_module": per_module,
        "energy_random_per_module": random,
    }


def _joined_weights(measured: Mapping[str, Any], count: int, fleet: Fleet) -> dict[str, float] | None:
    """Return where the energy of old and new sources together lies, see `energy.weights_of_modules`.

    None where it is not known of the old ones.
    """
    old = measured.get("energy_per_module") if count else {}
    if not isinstance(old, Mapping) or not all(is_finite(value) for value in old.values()):
        return None
    more = len(fleet.sources)
    new = energy.weights_of_modules(source.norms for source in fleet.sources)
    names = dict.fromkeys([*old, *new])
    return {name: (count * old.get(name, 0.0) + more * new.get(name, 0.0)) / (count + more) for name in names}


def _number(entry: Mapping[str, Any]) -> float | None:
    return float(entry["energy_kept"]) if is_finite(entry.get("energy_kept")) else None


def after_refit(entry: dict[str, Any], number: int, squares: list[list[tuple[float, float]]]) -> dict[str, Any]:
    """Return an old source's entry after its directions were fitted again.

    Args:
        entry: before.
        number: the source's place.
        squares: per module the sources' squared norms before and after; empty where no cores are stored.

    Returns:
        The entry with ``energy_kept`` times what is kept of its stored cores; None where there are none.
    """
    pairs = [each[number] for each in squares if each]
    before = sum(was for was, _ in pairs)
    share = sum(now for _, now in pairs) / before if before else None
    kept = entry.get("energy_kept")
    return {**entry, "energy_kept": None if share is None or kept is None else kept * min(1.0, share)}


def source_weights_of(entries: list[dict[str, Any]]) -> list[float]:
    """Return how much each source on record counts: one over the size of its shared-seed group."""
    groups = [_group(entry, -1 - number) for number, entry in enumerate(entries)]
    sizes = Counter(groups)
    return [1.0 / sizes[group] for group in groups]


def _group(entry: dict[str, Any], otherwise: int) -> int:
    group = entry.get("seed_group")
    return group if is_whole(group, least=0) else otherwise
