"""Say how many directions of its own an adapter needs beside a basis.

What a basis leaves of an update, ``R = ΔW − U C V``, is orthogonal to what it keeps. So φ own directions per module,
the leading singular ones of R, add ``Σ_{i≤φ} σ_i²`` to the energy kept. Fitted together with the core
(`convert/joint.py`) so many add more, so the number said here is an upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..basis import ModuleBasis
from ..convert.residual import residual_of
from ..energy import FAITHFUL
from ..sources.factors import Factors

MOST = 64  # own directions that are looked at


def left_by_direction(module: ModuleBasis, update: Factors, core: torch.Tensor) -> list[float]:
    """Return the shares of an update's energy in the leading directions of what a module's basis leaves of it.

    Args:
        module: the basis of the module.
        update: ΔW (out, in) in factored form.
        core: ``Uᵀ ΔW Vᵀ`` (k_out, k_in).

    Returns:
        ``σ_i² / ‖ΔW‖²``, descending, at most `MOST` of them; none for an update that is zero.
    """
    total = update.norm() ** 2
    if not total > 0:
        return []
    return (residual_of(module, update, core).S[:MOST].square() / total).tolist()


def directions_needed(
    kept: Mapping[str, float | None], left: Mapping[str, Sequence[float]], norms: Mapping[str, float]
) -> int | None:
    """Return how many own directions per module make an adapter faithful; 0 where it is, None where `MOST` do not.

    Fewer may do, where core and directions are fitted together.

    Args:
        kept: module → the share that the basis keeps.
        left: module → of `left_by_direction`.
        norms: module → ‖ΔW‖_F.
    """
    total = sum(norms[name] ** 2 for name in left)
    if not total > 0:
        return None
    reached = sum((kept[name] or 0.0) * norms[name] ** 2 for name in left)
    for count in range(MOST + 1):
        if reached >= FAITHFUL * total:
            return count
        reached += sum(shares[count] * norms[name] ** 2 for name, shares in left.items() if count < len(shares))
    return None


def needed_by_all(counts: Sequence[int | None]) -> int | None:
    """Return how many own directions make each of several adapters faithful; None where that is not known of all."""
    known = [count for count in counts if count is not None]
    return max(known) if known and len(known) == len(counts) else None
