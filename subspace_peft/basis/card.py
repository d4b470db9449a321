"""Gather the facts of a basis, and put its card into a README."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._io.places import shown_place
from .._version import __version__
from ..cards import BaseFacts, BasisFacts, Place, SourceFacts, basis_card, put_card
from ..cards.facts import AUTO_CLASSES
from ..energy import EnergyRecord, lower_bound, sources_of
from .base_weights import recorded_weights
from .files import BasisRecord
from .layout import describe_k


def write_card(record: BasisRecord, folder: Path, place: Place) -> None:
    """Put or replace the card of a basis in `folder`'s README.md, which loads the basis from `place`.

    A README without a card of ours stays as it is.

    Raises:
        OSError: the disk refuses.
    """
    put_card(folder, basis_card(facts_of(record, place)), only_ours=True)


def facts_of(record: BasisRecord, place: Place) -> BasisFacts:
    """Gather the facts of a basis's card, from its shapes and its `info` alone."""
    info, energies = record.info, EnergyRecord.of(record.info)
    shapes, sources = record.modules.shapes(), sources_of(info)
    types = {source.get("task_type") for source in sources}
    task_type = types.pop() if len(types) == 1 else None
    skipped = [
        SourceFacts(name=entry["name"], location=entry.get("location"), skipped=entry["reason"])
        for entry in info.get("skipped") or []
    ]
    return BasisFacts(
        place=place,
        fingerprint=record.fingerprint,
        modules=len(shapes),
        k=describe_k(shapes),
        frozen=sum(s["k_out"] * s["out"] + s["k_in"] * s["in"] for s in shapes.values()),
        core=sum(s["k_out"] * s["k_in"] for s in shapes.values()),
        builder=info.get("builder"),
        base=BaseFacts(
            reference=shown_place(info.get("base_model_name_or_path")),
            auto_class=AUTO_CLASSES.get(task_type or "", "AutoModel"),
        ),
        task_type=task_type,
        energy_kept=energies.kept,
        energy_kept_at_least=energies.at_least,
        energy_random=energies.random,
        energy_left_out=energies.left_out,
        energy_over_modules=energies.over_modules,
        per_module=energies.per_module,
        base_weights=recorded_weights(info),
        precision=record.modules.precision,
        energy_lost=(info.get("precision") or {}).get("energy_lost"),
        sources=(*(_source(entry, lower_bound(entry, info)) for entry in sources), *skipped),
        version=__version__,
    )


def _source(entry: Mapping[str, Any], at_least: bool) -> SourceFacts:
    known = ("location", "revision", "sha256", "norm", "energy_kept", "license")
    return SourceFacts(
        name=str(entry.get("name")),
        ranks=tuple(entry.get("ranks") or ()),
        energy_kept_at_least=at_least,
        **{key: entry.get(key) for key in known},
    )
