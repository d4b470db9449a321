"""A task's own directions beside the basis, ``s'·u v``: their scale, their start, and the way from and to factors.

One learning rate trains them and the core, whose scale makes an Adam step of rate η move ΔW by at most alpha·η in
Frobenius norm, whatever the sizes. So it is here: a step of u moves ``u v`` by a fixed multiple of η in that norm, and
a step of v turns v by a fixed one. The two multiples are set so that the rates that are good for a core are good for u
and v. At another alpha users change the rate by 256 / alpha, and both go along.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from .coefficients import OWN, USUAL_ALPHA, Coefficients
from .patterns import exact_pattern

# s' and the norm of v's rows at the start for a square layer of this width, at the usual alpha: the middle of a broad
# plateau of both, docs/evidence.md, "Own directions"
USUAL_WIDTH = 384
OWN_SCALE = 4.0
OWN_NORM = 0.5


class OwnUnits(NamedTuple):
    """The units in which one module's own directions are stored.

    Attributes:
        scale: s', the factor of ``u v`` in ΔW.
        norm: of the side that starts at random, by direction.
        by_rows: whether that is v, as everywhere but in embeddings.
    """

    scale: float
    norm: float
    by_rows: bool


def own_units(alpha: float, out: int, inner: int, *, embedding: bool = False) -> OwnUnits:
    """Return the units of a module's own directions.

    As in LoRA the random side is the input's, but in an embedding the output's: there each token has parameters for
    itself on the input's side, of which a step reaches few.

    Args:
        alpha: the task's.
        out: rows of ΔW.
        inner: columns of ΔW.
        embedding: whether the module is one, whose columns are tokens.
    """
    ratio, width = alpha / USUAL_ALPHA, out if embedding else inner
    scale = OWN_SCALE * ratio**2 * USUAL_WIDTH / math.sqrt(out * width)
    return OwnUnits(scale, OWN_NORM / ratio * math.sqrt(width / USUAL_WIDTH), not embedding)


def start_own(coefficients: Coefficients, basis: torch.Tensor, units: OwnUnits) -> None:
    """Set one side to random directions orthogonal to the basis and to one another, and the other side to zero.

    The update is zero then, and both sides get gradients after one step.

    Args:
        coefficients: with own directions.
        basis: the random side's: V (k_in, in); or Uᵀ (k_out, out).
        units: the module's.
    """
    zero, drawn = coefficients.extra_U, coefficients.extra_V
    if not units.by_rows:
        zero, drawn = drawn, zero
    assert zero is not None and drawn is not None
    if drawn.device.type == "meta":
        return
    with torch.no_grad():
        zero.zero_()
        rank, size = coefficients.extra_rank, basis.shape[1]
        rows = torch.randn(rank, size)
        # where the basis spans all but a few directions, the rest of them may have any
        if size - basis.shape[0] >= rank:
            fixed = basis.detach().float().cpu()
            for _ in range(2):  # once leaves float32's rounding of it
                rows = rows - (rows @ fixed.T) @ fixed
        rows = torch.linalg.qr(rows.T).Q.T * units.norm
        drawn.copy_(rows if units.by_rows else rows.T)


def own_update(extra_U: torch.Tensor, extra_V: torch.Tensor, units: OwnUnits) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a task's own part of ΔW as factors ``(B, A)``, (out, φ) and (φ, in) float64, from its trained tensors."""
    return extra_U.detach().double() * units.scale, extra_V.detach().double()


def core_of_own(U: torch.Tensor, V: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Return the core that is nearest to ``B A`` in a basis, ``Uᵀ B A Vᵀ`` (k_out, k_in) float64.

    Args:
        U: (out, k_out), orthonormal columns.
        V: (k_in, in), orthonormal rows.
        B: (out, φ).
        A: (φ, in).
    """
    return (U.double().T @ B.double()) @ (A.double() @ V.double().T)


def own_tensors(B: torch.Tensor, A: torch.Tensor, rank: int, units: OwnUnits) -> dict[str, torch.Tensor]:
    """Return trained tensors whose own part of ΔW is ``B A``, or its best approximation of rank `rank`.

    The side that starts at random has orthogonal directions of the norm that they start with, so that training goes on
    as from a start; where ``B A`` has a smaller rank, the last ones are fillers, beside which the other side is zero.

    Args:
        B: (out, r).
        A: (r, in).
        rank: how many directions the module has, φ.
        units: the module's.

    Returns:
        ``extra_U`` (out, φ) and ``extra_V`` (φ, in), float32.
    """
    if not units.by_rows:
        turned = own_tensors(A.T, B.T, rank, units._replace(by_rows=True))
        return {"extra_U": turned["extra_V"].T.contiguous(), "extra_V": turned["extra_U"].T.contiguous()}
    out, size = B.shape[0], A.shape[1]
    Q, R = torch.linalg.qr(B.double())
    P, L = torch.linalg.qr(A.double().T)
    left, S, right = torch.linalg.svd(R @ L.T, full_matrices=False)
    kept = min(rank, len(S))
    U, V = torch.zeros(out, rank, dtype=torch.float64), torch.zeros(rank, size, dtype=torch.float64)
    U[:, :kept] = (Q @ left[:, :kept]) * (S[:kept] / (units.scale * units.norm))
    V[:kept] = (P @ right[:kept].T).T
    if kept < rank:
        # of a seed, so that one task always gives one file
        more = torch.randn(size, rank - kept, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        V[kept:] = torch.linalg.qr(torch.cat([V[:kept].T, more], 1)).Q[:, kept:].T
    return {"extra_U": U.float(), "extra_V": (V * units.norm).float()}


def own_fields(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the fields of a configuration that give every module its number of own directions.

    Args:
        ranks: module → directions, of all modules of the task.

    Returns:
        `extra_rank`, what most modules have, and `extra_rank_pattern` for the others.
    """
    counts = Counter(ranks.values())
    usual = max(counts, key=lambda rank: (counts[rank], rank), default=0)
    return {"extra_rank": usual, "extra_rank_pattern": exact_pattern(ranks, usual)}


def split_own(parts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a module's trained tensors by name, those of its core, and those of its own directions."""
    return (
        {name: value for name, value in parts.items() if name not in OWN},
        {name: value for name, value in parts.items() if name in OWN},
    )
