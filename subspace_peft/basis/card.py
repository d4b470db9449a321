"""The facts of a basis for its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..cards import BaseFacts, BasisFacts, Card, Place, SourceFacts, basis_card
from ..cards.facts import AUTO_CLASSES

if TYPE_CHECKING:
    from .basis import SubspaceBasis


def card_of(basis: SubspaceBasis, place: Place) -> Card:
    """The card of `basis`, loaded from `place`."""
    return basis_card(facts_of(basis, place))


def facts_of(basis: SubspaceBasis, place: Place) -> BasisFacts:
    """What a card says of `basis`: from its shapes and its `info`, nothing else."""
    info: Mapping[str, Any] = basis.info
    shapes, sources, measured = basis.shapes(), info.get("sources") or [], info.get("measured") or {}
    types = {source.get("task_type") for source in sources}
    task_type = types.pop() if len(types) == 1 else None
    skipped = [
        SourceFacts(name=entry["name"], location=entry.get("location"), skipped=entry["reason"])
        for entry in info.get("skipped") or []
    ]
    return BasisFacts(
        place=place,
        fingerprint=basis.fingerprint,
        modules=len(shapes),
        k=basis.describe_k(),
        frozen=sum(s["k_out"] * s["out"] + s["k_in"] * s["in"] for s in shapes.values()),
        core=sum(s["k_out"] * s["k_in"] for s in shapes.values()),
        builder=info.get("builder"),
        base=BaseFacts(reference=basis.base_model or None, auto_class=AUTO_CLASSES.get(task_type or "", "AutoModel")),
        task_type=task_type,
        energy_kept=measured.get("energy_kept"),
        energy_random=measured.get("energy_random"),
        energy_left_out=measured.get("energy_left_out"),
        per_module=_per_module(measured),
        precision=basis.precision,
        energy_lost=(info.get("precision") or {}).get("energy_lost"),
        sources=(*map(_source, sources), *skipped),
        version=__version__,
    )


def _per_module(measured: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    kinds = {key: measured.get(f"energy_{key}_per_module") or {} for key in ("kept", "left_out", "random")}
    return {name: {key: each[name] for key, each in kinds.items() if name in each} for name in kinds["kept"]}


def _source(entry: Mapping[str, Any]) -> SourceFacts:
    known = ("location", "revision", "sha256", "norm", "energy_kept", "license")
    return SourceFacts(
        name=str(entry.get("name")), ranks=tuple(entry.get("ranks") or ()), **{key: entry.get(key) for key in known}
    )


def place_of(folder: Path) -> Place:
    """A folder as its card names it: from the working directory where it lies in there, so that the card is no
    machine's own."""
    folder = folder.resolve()
    here = Path.cwd()
    return Place(f"./{folder.relative_to(here).as_posix()}" if folder.is_relative_to(here) else str(folder))
