"""The commands that a report shows: the one that makes it again, and the one that builds with another k."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._io.places import last_part
from ..basis import SubspaceBasis
from ..basis.files import CONFIG_FILE
from ..builders.fleet import Fleet
from .places import seen_from_here, typed

SETTLED = ("budget", "complete", "k_pattern")  # options on record beside which another k is not given


def making_command(basis: Any, sources: Iterable[Any] | None, settings: Mapping[str, Any]) -> str:
    """Return the command that makes a report; the call of Python where something lies in memory alone.

    Args:
        basis: as `report_basis` takes it.
        sources: as well.
        settings: other arguments of it that are not at their defaults.
    """
    place = basis.location if isinstance(basis, SubspaceBasis) else basis
    listed = None if sources is None else [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not place or any(not isinstance(each, (str, Path)) for each in listed or ()) or "base_model" in settings:
        given = "".join(
            f", {name}={'model' if name == 'base_model' else repr(value)}" for name, value in settings.items()
        )
        said = repr(seen_from_here(place)) if place else "basis"
        return f"report_basis({said}{'' if listed is None else ', sources'}{given})"
    words = ["subspace-peft report", typed(place)]
    if listed is not None:
        words += ["--fleet", *_shortened([str(each) for each in listed])]
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        words.append(flag if value is True else f"{flag} {shlex.quote(str(value))}")
    return " ".join(words)


def built_alike(basis: SubspaceBasis, fleet: Fleet) -> bool:
    """Return whether a basis was built of a fleet, and of no more, as another k of it would be."""
    recorded = Counter(str(entry.get("sha256")) for entry in basis.info.get("sources") or [])
    own = recorded == Counter(str(source.sha256) for source in fleet.sources)
    return own and basis.info.get("builder") == "adapters" and basis.info.get("version") in (None, 1)


def building_command(basis: SubspaceBasis, fleet: Fleet) -> dict[str, str]:
    """Return ``begin`` and ``out`` of the command that builds a basis of the same fleet with another k.

    Where the basis's own record has all that a build takes, it is named, and the k beside it wins; else the adapters
    are listed. ``begin`` is empty where one of them lies in memory alone.
    """
    options = basis.info.get("build")
    options = options if isinstance(options, Mapping) else {}
    local = basis.location is not None and (Path(basis.location) / CONFIG_FILE).is_file()
    out = typed(last_part(basis.location)) if basis.location else "my-basis"
    if local and basis.location is not None:
        out = typed(basis.location)
    plain = built_alike(basis, fleet) and not any(options.get(key) is not None for key in SETTLED)
    more = ["--precision", basis.precision] if basis.precision not in (None, "float32") else []
    if local and plain:
        return {"begin": " ".join(["subspace-peft build --config", out, *more]), "out": out}
    locations = [source.location for source in fleet.sources]
    if any(not each or each.startswith("in memory") for each in locations):
        return {"begin": "", "out": out}
    if any(set(source.keys) != set(fleet.modules) for source in fleet.sources):
        more = ["--partial", *more]
    return {"begin": " ".join(["subspace-peft build", *_shortened(locations), *more]), "out": out}


def _shortened(places: Sequence[str]) -> list[str]:
    """Return places as they are typed: all folders of one parent as one pattern."""
    parents = {str(Path(place).parent) for place in places}
    if len(places) > 2 and len(parents) == 1 and all(Path(place).is_dir() for place in places):
        (parent,) = parents
        if sum(1 for each in Path(parent).iterdir() if not each.name.startswith(".")) == len(set(places)):
            return [f"{typed(parent)}/*"]
    return [typed(place) for place in places]
