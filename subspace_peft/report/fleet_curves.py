"""Put the modules' curves together: what bases of every k keep in each module, and of whole adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .curves import Shares, UpdateCurves

DIGITS = 6  # of shares in files: a share of energy as k is compared with them


@dataclass(frozen=True, eq=False)
class MemberCurves:
    """A module's curves, and which adapters they are of.

    Attributes:
        members: places of the adapters among those measured.
        counts: how much each counts in the build.
        curves: of their updates.
    """

    members: list[int]
    counts: Sequence[float]
    curves: UpdateCurves


def curves_of_fleet(
    found: Mapping[str, MemberCurves], norms: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """Return per module, JSON-ready: ``spans``, ``alternated`` and ``weight``, and lists that have an entry per k.

    ``seen``, ``left_out`` and ``null`` are means over the adapters that adapt the module; ``left_out`` is None where
    there is one fold. ``in_all`` holds the same three weighted so that their sums over modules, each at a k of its
    own, are the means over adapters of what is kept of a whole one. ``held`` is the share by which a share of energy
    as k is decided when a basis is built: without alternations, each adapter counting as in the build. ``weight`` is
    the part of an adapter's energy that lies in the module, mean over adapters.

    Args:
        found: by module.
        norms: per adapter, module → ‖ΔW‖_F.
    """
    everywhere = _weights({name: each.members for name, each in found.items()}, norms)
    with_rest = {name: each.members for name, each in found.items() if each.curves.left_out is not None}
    elsewhere = _weights(with_rest, norms)
    curves = {}
    for name, each in found.items():
        one, weights = each.curves, everywhere[name]
        counts = torch.tensor(each.counts, dtype=torch.float64)
        curves[name] = {
            "spans": list(one.spans),
            "alternated": one.alternated,
            "weight": round(float(weights.sum()), DIGITS),
            "held": _rounded((counts / counts.sum()) @ one.plain),
            **{
                key: None if shares is None else _rounded(shares.mean(0))
                for key, shares in (("seen", one.seen), ("left_out", one.left_out), ("null", one.null))
            },
            "in_all": {
                "seen": _rounded(weights @ one.seen),
                "left_out": None if one.left_out is None else _rounded(elsewhere[name] @ one.left_out),
                "null": _rounded(weights @ one.null),
            },
        }
    return curves


def _weights(members: Mapping[str, Sequence[int]], norms: Sequence[Mapping[str, float]]) -> dict[str, Shares]:
    """Return per module and member the part of the adapter's energy that lies there, over the number of adapters."""
    energy = [0.0] * len(norms)
    for name, places in members.items():
        for i in places:
            energy[i] += norms[i][name] ** 2
    count = sum(value > 0 for value in energy)
    return {
        name: torch.tensor([norms[i][name] ** 2 / energy[i] / count for i in places], dtype=torch.float64)
        for name, places in members.items()
    }


def _rounded(curve: Shares) -> list[float]:
    return [round(value, DIGITS) for value in curve.tolist()]
