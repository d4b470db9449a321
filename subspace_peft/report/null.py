"""Build the basis that a fleet would have if it had nothing in common."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch

from ..basis import SubspaceBasis
from ..builders import build_basis
from ..builders.null import null_update
from ..sources import expand_or_raise, open_source


def null_basis(sources: Iterable[Any], *, seed: int = 0, **build: Any) -> SubspaceBasis:
    """Build the basis of noise: for each source, an update of equal singular values in random directions.

    It is built by the same code with the same arguments, so spectra and energies compare like with like (a
    strength-matched null). Sources of one shared-seed group become independent here.

    Args:
        sources: the fleet, as `build_basis` takes it.
        seed: of the random directions.
        build: arguments for `build_basis`.
    """
    generator = torch.Generator().manual_seed(seed)
    fleet = []
    reading = {name: build[name] for name in ("token", "allow_bin", "base_model") if name in build}
    for reference in expand_or_raise(sources, token=build.get("token")):
        source = open_source(reference, **reading)
        state: dict[str, torch.Tensor] = {}
        for name in source.keys:
            update = source.factors(name)
            _, S, _ = update.canonical()
            out, inner = update.shape
            null = null_update(out, inner, S, generator)
            state[f"{name}.lora_B.weight"] = null.B
            state[f"{name}.lora_A.weight"] = null.A
        fleet.append(state)
    with warnings.catch_warnings():
        # the factors are the updates, as they are meant to be
        warnings.filterwarnings("ignore", message="(?s).*no configuration and no alpha came")
        return build_basis(fleet, **build)
