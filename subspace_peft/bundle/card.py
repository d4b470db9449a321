"""Gather the facts of a bundle, and put its card into the bundle's README."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .._io.places import shown_place
from ..cards import (
    BaseFacts,
    BasisReferenceFacts,
    BundledTaskFacts,
    BundleFacts,
    Place,
    arguments,
    bundle_card,
    put_card,
)
from ..cards.facts import AUTO_CLASSES

if TYPE_CHECKING:
    from .bundle import Bundle


def write_card(folder: Path, bundle: Bundle, place: Place | None = None) -> None:
    """Put the card of `bundle` into `folder`'s README.md, in the place of an earlier one.

    Args:
        folder: The bundle's folder.
        bundle: The bundle, opened.
        place: Where the card says to load the bundle from; the folder by default.
    """
    put_card(folder, bundle_card(facts_of(folder, bundle, place)))


def facts_of(folder: Path, bundle: Bundle, place: Place | None = None) -> BundleFacts:
    """Gather the facts that a bundle's card states, from its index."""
    config = bundle.index["config"]
    task_type = None if config.get("task_type") is None else str(config["task_type"])
    place = place or Place.of_folder(folder)
    tasks = []
    for name in bundle:
        own = {**config, **bundle.entry(name).get("config", {})}
        numbers = sum(a * b for a, b in bundle.sizes(name).values())
        metrics = {key: value for key, value in bundle[name].metrics.items() if isinstance(value, (int, float))}
        tasks.append(
            BundledTaskFacts(
                name=name,
                coefficients=own.get("coefficients"),
                numbers=numbers,
                directions=bundle.own_directions(name),
                energy_kept=bundle[name].energy_kept,
                metrics=metrics,
            )
        )
    # a head has to be made for its number of classes, which tasks of a bundle may have each their own
    headed = next((bundle[name] for name in bundle if bundle[name].id2label), None)
    first = headed.name if headed is not None else tasks[0].name
    base = BaseFacts(
        reference=shown_place(bundle.base_model),
        revision=config.get("revision"),
        auto_class=AUTO_CLASSES.get(task_type or ""),
        num_labels=None if headed is None or headed.id2label is None else len(headed.id2label),
    )
    return BundleFacts(
        place=place,
        basis=BasisReferenceFacts(
            fingerprint=bundle.fingerprint, reference=config.get("basis") or "", revision=config.get("basis_revision")
        ),
        tasks=tuple(tasks),
        loading=(
            f"model = load_task(base_model, {arguments(place.reference, first, revision=place.revision or None)})",
        ),
        imports=("from subspace_peft import load_task",),
        base=base,
        task_type=task_type,
        bytes=bundle.store.size,
        version=bundle.index.get("subspace_peft_version"),
    )
