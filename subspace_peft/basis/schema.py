"""Checks of a basis's config, before anything is read or allocated by what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._io.untrusted import MOST_DIRECTIONS, is_finite, is_name, is_whole
from ..base_names import names_problem
from .base_weights import KEY, weights_problem
from .layout import STORED_AS

# far above the tokens of an embedding, and above the channels × pixels of a kernel
MOST_FEATURES = 1 << 32


def shape_problem(name: Any, shape: Any) -> str | None:
    """Return what is wrong with a module's name and its ``{"out", "in", "k_out", "k_in", "directions"}``, or None."""
    if not is_name(name):
        return f"{str(name)[:80]!r} is not a module's name"
    if not isinstance(shape, Mapping):
        return f"module {name!r} has no shape"
    for key in ("out", "in"):
        if not is_whole(shape.get(key), most=MOST_FEATURES):
            return f"module {name!r} has {key}={_short(shape.get(key))}, which is not a layer's size"
    for key, limit in (("k_out", "out"), ("k_in", "in")):
        # orthonormal directions: there are never more of them than dimensions
        if not is_whole(shape.get(key), most=min(MOST_DIRECTIONS, shape[limit])):
            return (
                f"module {name!r} has {key}={_short(shape.get(key))} directions in {limit}={shape[limit]} dimensions"
            )
    most = shape["k_out"] * shape["k_in"]
    if not is_whole(shape.get("directions", 0), least=0, most=most):
        return f"module {name!r} has directions={_short(shape.get('directions'))}, and its core {most} parameters"
    return None


def info_problem(info: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the part of a basis's config beside its modules, or None."""
    kinds = {
        "builder": str,
        "build": dict,
        "measured": dict,
        "sources": list,
        "skipped": list,
        "precision": dict,
        "version": int,
        "lineage": list,
        "update": dict,
        "columns": dict,
    }
    for key, kind in kinds.items():
        if info.get(key) is not None and not isinstance(info[key], kind):
            return f"{key} is a {type(info[key]).__name__}, not a {kind.__name__}"
    for key in ("sources", "skipped", "lineage"):
        if not all(isinstance(entry, dict) for entry in info.get(key) or []):
            return f"{key} lists something that is not an object"
    if info.get("precision") is not None:
        stored, numbers = info["precision"].get("stored"), ("energy_lost", "energy_lost_at_most", "orthonormality")
        if not isinstance(stored, str) or stored not in STORED_AS or stored == "float32":
            return f"precision is stored={_short(stored)}, which is not a lower precision than float32"
        for key in numbers:
            if not is_finite(info["precision"].get(key)):
                return f"precision has {key}={_short(info['precision'].get(key))}, which is not a number"
    if info.get("base_model_names") is not None and (problem := names_problem(info["base_model_names"])):
        return problem
    if info.get(KEY) is not None and (problem := weights_problem(info[KEY])):
        return problem
    base = info.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        return f"base_model_name_or_path is a {type(base).__name__}, not a name"
    return None


def _short(value: Any) -> str:
    # repr of a whole number of thousands of digits is refused by Python itself
    big = isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30
    return "a number of more than 30 digits" if big else repr(value)[:60]
