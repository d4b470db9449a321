"""Read how much each source of a fleet counts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._io.untrusted import read_json
from ..errors import SubspaceError
from ..sources.source import Source
from .fleet import Fleet

KINDS = ("equal", "norm")


def read_weights(weights: str | Path | Mapping[str, float]) -> tuple[str, dict[str, float]]:
    """Return ``equal`` or ``norm``, and the weights by source where these are given.

    Args:
        weights: one of the words; a mapping from source to weight; or a file of one JSON object, ``{"source": 2.0}``.

    Raises:
        SubspaceError: neither a known word nor a file; a file that holds something else; a weight that is no number
            above 0.
    """
    if isinstance(weights, str) and weights in KINDS:
        return weights, {}
    given: Any = weights
    where = "weights"
    if not isinstance(weights, Mapping):
        file = Path(weights).expanduser()
        if not file.is_file():
            raise SubspaceError(
                f"There is no weighting {str(weights)!r}, and no such file; choose one of {', '.join(KINDS)}, or give"
                ' a JSON file of numbers by source: {"org/lora": 2.0}.'
            )
        where = str(file)
        try:
            given = read_json(file)
        except (ValueError, OSError) as error:
            raise SubspaceError(
                f'{file}: {error}. Give a JSON object of numbers by source, {{"org/lora": 2.0}}.'
            ) from error
    if not isinstance(given, Mapping) or not given:
        raise SubspaceError(f'{where}: give an object of numbers by source, {{"org/lora": 2.0}}.')
    for name, value in given.items():
        fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if not fine:
            raise SubspaceError(f"{where}: {name!r} has {json.dumps(value, default=str)}; give a number above 0.")
    return "equal", {str(name): float(value) for name, value in given.items()}


def of_usable(fleet: Fleet, weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights without those of sources that were left out.

    Args:
        fleet: the sources.
        weights: as in `weighted`.
    """
    used = {name for source in fleet.sources for name in _names(source)}
    left_out = {name for entry in fleet.skipped for name in _names_of_skipped(entry)}
    return {name: weight for name, weight in weights.items() if name in used or name not in left_out}


def weighted(fleet: Fleet, weights: Mapping[str, float]) -> Fleet:
    """Return the fleet with these weights; sources without one count 1.

    Args:
        fleet: the sources.
        weights: by a source's name, its location, or its location with ``@revision``.

    Raises:
        SubspaceError: names that are no source's, which it lists; several names of one source.
    """
    found, used = [], set()
    for source in fleet.sources:
        hits = [name for name in dict.fromkeys(_names(source)) if name in weights]
        if len(hits) > 1:
            raise SubspaceError(
                f"weights: {' and '.join(map(repr, hits))} are one source, {source.name!r}. Leave one of them out."
            )
        used.update(hits)
        found.append(weights[hits[0]] if hits else 1.0)
    if unknown := [name for name in weights if name not in used]:
        raise SubspaceError(
            f"weights: {', '.join(map(repr, unknown[:5]))} {'is' if len(unknown) == 1 else 'are'} no source's name"
            " or place. The fleet has "
            f"{', '.join(repr(source.name) for source in fleet.sources[:5])}{', …' if len(fleet.sources) > 5 else ''}."
        )
    return replace(fleet, weights=found)


def _names(source: Source) -> list[str]:
    return [source.name, source.location, f"{source.location}@{source.revision}"]


def _names_of_skipped(entry: Mapping[str, str]) -> list[str]:
    """Return what a source that may never have been opened goes by: its place, also without revision, and name."""
    location = entry["location"]
    repo, colon, inside = location.partition(":")
    return [entry["name"], location, f"{repo.partition('@')[0]}{colon}{inside}", Path(location).name]
