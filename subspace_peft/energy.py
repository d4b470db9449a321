"""Energy kept: the one definition of the share, how it is printed, and the words for it.

An update's energy is ‖ΔW‖², its squared Frobenius norm. What a basis keeps of it in one module is ‖UᵀΔWVᵀ‖² / ‖ΔW‖².
Of a source (an adapter) that is the sum over its modules of what is kept, over the sum of ‖ΔW‖²; of a module the mean
over the sources that adapt it; of a basis the mean over its sources. Every source counts once there, whatever its
weight in the build. The same holds of what is kept of sources left out, of noise, and by random directions.

Files of earlier versions (without `DEFINITION`) have means over modules of basis, noise and random directions on
record; of sources they have the same as now. `EnergyRecord` takes from a record what it says by this definition, and
names the rest as what it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

DEFINITION = 2  # `measured` in a basis's config; without the key its means are over modules
WHOLE = 1 - 1e-6  # what float32's rounding leaves of an update that lies wholly inside
# said where the word first comes up
EXPLAINED = "the squared Frobenius norm of an adapter's update"
OVER_MODULES = "mean over modules, as an earlier version recorded it"

# Measured on 128 projections of LoRAs, see docs/evidence.md, "What a share of energy means": from FAITHFUL on 99 % of
# the answers are the LoRA's and no accuracy is lost; from PARTIAL on 93 %, and two thirds of what the LoRA adds are
# left; below that about a quarter
FAITHFUL, PARTIAL = 0.95, 0.8
# Shares of an adapter that was left out. Of the twelve text tasks of docs/evidence.md, the five of which less than
# LITTLE was kept ended 3.2 points behind LoRA r=8, the seven others 0.7 ahead
LITTLE, MUCH = 0.06, 0.5
RARE = 3.0  # times what random directions keep; below that a fleet's directions are not told from them
NOISY = 0.9  # of what is kept of the fleet, from which noise of its strength is kept as well as it


def word(kept: float) -> str:
    """Return the class of a share kept of an adapter: ``faithful``, ``partial`` or ``poor``."""
    return "faithful" if kept >= FAITHFUL else "partial" if kept >= PARTIAL else "poor"


def outlook(left_out: float, random: float | None) -> str:
    """Return the class of a share kept of adapters left out: ``unrelated``, ``little``, ``part`` or ``mostly``.

    Args:
        left_out: what a basis of the others keeps of them.
        random: what random directions keep, where that is known.
    """
    if random is not None and left_out < RARE * random:
        return "unrelated"
    return "little" if left_out < LITTLE else "part" if left_out < MUCH else "mostly"


def like_noise(kept: float, null: float | None) -> bool:
    """Return whether noise of the fleet's strength is kept about as well as the fleet itself."""
    return null is not None and null >= NOISY * kept


def percent(share: float | None) -> str:
    """Return a share as it is printed everywhere: percent with one decimal; a dash where it is not known."""
    if share is None or math.isnan(share):
        return "–"
    if 0 < share < 5e-4:
        return "< 0.1 %"
    return f"{100 * share:.1f} %"


def share_of(kept: float, total: float) -> float:
    """Return ``kept / total``, at most 1 whatever the rounding; of an update that is zero all is kept."""
    return min(1.0, kept / total) if total > 0 else 1.0


def of_source(shares: Mapping[str, float | None], norms: Mapping[str, float]) -> float:
    """Return the share of a source's energy, over all its modules.

    Args:
        shares: module → share; None or absent: nothing of it is kept.
        norms: module → ‖ΔW‖_F.
    """
    total = sum(norm**2 for norm in norms.values())
    return share_of(sum((shares.get(name) or 0.0) * norm**2 for name, norm in norms.items()), total)


def of_known(shares: Mapping[str, float | None], norms: Mapping[str, float]) -> float | None:
    """Return the same over those modules whose share is known; None where none is."""
    known = {name: share for name, share in shares.items() if share is not None and not math.isnan(share)}
    return of_source(known, {name: norms[name] for name in known}) if known else None


def mean(shares: Iterable[float | None]) -> float | None:
    """Return the mean of the shares that are known, of a module or a basis; None where none is."""
    known = [share for share in shares if share is not None and not math.isnan(share)]
    return sum(known) / len(known) if known else None


def weights_of_modules(norms: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return per module the mean over sources of the share of their energy that lies there; they add up to one.

    With it what random directions keep of the sources follows from the modules' sizes alone.

    Args:
        norms: per source, module → ‖ΔW‖_F.
    """
    found: dict[str, float] = {}
    count = 0
    for each in norms:
        count += 1
        total = sum(norm**2 for norm in each.values())
        for name, norm in each.items():
            found[name] = found.get(name, 0.0) + (norm**2 / total if total else 0.0)
    return {name: value / count for name, value in found.items()}


def of_random(random: Mapping[str, float], weights: Mapping[str, float] | None) -> float:
    """Return what random directions keep of a fleet's sources, in expectation.

    Args:
        random: module → k_out·k_in / (out·in).
        weights: of `weights_of_modules`; None: every module counts alike.
    """
    if weights is None:
        return sum(random.values()) / len(random)
    return sum(weights.get(name, 0.0) * share for name, share in random.items())


@dataclass(frozen=True)
class SourceRecord:
    """The energy on record of a source.

    Attributes:
        name: of the source.
        kept: share that the basis keeps, or None.
        at_least: whether that is a lower bound: directions were added since it was measured.
        left_out: share that a basis without the source's seed group keeps, or None.
    """

    name: str
    kept: float | None
    at_least: bool
    left_out: float | None


@dataclass(frozen=True)
class EnergyRecord:
    """The energies that a basis's config has on record, by one definition.

    Attributes:
        sources: of every source.
        kept: of the basis, or None.
        at_least: whether `kept` is a lower bound.
        random: what random directions keep in expectation, or None.
        left_out: what a basis of the others keeps of a source left out, or None.
        null: what a basis of noise of equal strength keeps of that noise, or None.
        per_module: module → those of ``kept``, ``left_out``, ``null`` and ``random`` that are known of it.
        over_modules: names of those numbers that an earlier version recorded as means over modules.
    """

    sources: list[SourceRecord] = field(default_factory=list)
    kept: float | None = None
    at_least: bool = False
    random: float | None = None
    left_out: float | None = None
    null: float | None = None
    per_module: dict[str, dict[str, float]] = field(default_factory=dict)
    over_modules: tuple[str, ...] = ()

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> EnergyRecord:
        """Read the record in a basis's ``info``; what is no number there counts as unknown."""
        measured = info.get("measured") if isinstance(info.get("measured"), Mapping) else {}
        assert isinstance(measured, Mapping)
        now = measured.get("definition") == DEFINITION
        entries = sources_of(info)
        sources = [
            SourceRecord(
                str(entry.get("name")),
                _number(entry.get("energy_kept")),
                lower_bound(entry, info),
                _number(entry.get("energy_left_out")),
            )
            for entry in entries
        ]
        all_known = bool(sources) and all(each.kept is not None for each in sources)
        kept = mean(each.kept for each in sources) if all_known else _number(measured.get("energy_kept"))
        found = {key: _number(measured.get(f"energy_{key}")) for key in ("random", "left_out", "null")}
        old = [key for key, value in found.items() if value is not None and not now]
        if kept is not None and not all_known and not now:
            old.insert(0, "kept")
        return cls(
            sources,
            kept,
            all_known and any(each.at_least for each in sources),
            **found,
            per_module=_per_module(measured),
            over_modules=tuple(old),
        )


def sources_of(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the list of sources in a basis's ``info``, their ``energy_kept`` being what the basis as stored keeps.

    Earlier versions recorded of a basis in fewer bits what the float32 one keeps, and apart from it what rounding
    loses.
    """
    entries = [dict(entry) for entry in info.get("sources") or []]
    precision = info.get("precision")
    lost = _number(precision.get("energy_lost")) if isinstance(precision, Mapping) else None
    if lost and isinstance(precision, Mapping) and not precision.get("in_energies"):
        for entry in entries:
            if (kept := _number(entry.get("energy_kept"))) is not None:
                entry["energy_kept"] = kept * (1 - lost)
    return entries


def lower_bound(entry: Mapping[str, Any], info: Mapping[str, Any]) -> bool:
    """Return whether a source's ``energy_kept`` is of an earlier version of the basis, which had fewer directions."""
    version, kept = info.get("version") or 1, _number(entry.get("energy_kept"))
    since = entry.get("version") or 1
    known = isinstance(version, int) and isinstance(since, int) and kept is not None
    return known and since < version and kept < WHOLE


def _per_module(measured: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for key in ("kept", "left_out", "null", "random"):
        shares = measured.get(f"energy_{key}_per_module")
        for name, value in shares.items() if isinstance(shares, Mapping) else ():
            if _number(value) is not None:
                found.setdefault(str(name), {})[key] = float(value)
    return {name: each for name, each in found.items() if "kept" in each}


def _number(value: Any) -> float | None:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fine else None
