"""A task's own directions beside the basis, ``s'·u v``: their scale, their start, and the way from and to factors.

One learning rate trains them and the core. The core's scale makes an Adam step of rate η move ΔW by at most alpha·η.
For the own part two sizes count: ``s'·‖v‖``, by which a step of u moves ΔW, and ``1/‖v‖``, by which a step of v turns
v. Both are set so that the rates that are good for a core are good for u and v: a LoRA of rank 1, of s = 2
and ‖A‖ = 1/√3, learns best at rates a little above those. At another alpha users change the rate by 256 / alpha, and
both sizes go along.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from .coefficients import OWN, USUAL_ALPHA, Coefficients

# of u v in ΔW, and of v's rows at the start, at the usual alpha: the middle of a broad plateau, docs/evidence.md
OWN_SCALE = 4.0
OWN_NORM = 0.5


def own_scale(alpha: float) -> float:
    """Return s', the factor of ``u v`` in ΔW."""
    return OWN_SCALE * (alpha / USUAL_ALPHA) ** 2


def own_norm(alpha: float) -> float:
    """Return the norm of the rows of v, or of u's columns in an embedding, at the start."""
    return OWN_NORM * USUAL_ALPHA / alpha


def start_own(coefficients: Coefficients, basis: torch.Tensor, alpha: float, *, by_rows: bool) -> None:
    """Set one side to random directions orthogonal to the basis and to one another, and the other side to zero.

    The update is zero then, and both sides get gradients after one step. As in LoRA the random side is the input's,
    but in an embedding the output's: of the input's one, each token would have a parameter for itself.

    Args:
        coefficients: with own directions.
        basis: the random side's: V (k_in, in); or Uᵀ (k_out, out).
        alpha: the task's.
        by_rows: whether the random side is v.
    """
    zero, drawn = coefficients.extra_U, coefficients.extra_V
    if not by_rows:
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
        rows = torch.linalg.qr(rows.T).Q.T * own_norm(alpha)
        drawn.copy_(rows if by_rows else rows.T)


def own_update(extra_U: torch.Tensor, extra_V: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a task's own part of ΔW as factors ``(B, A)``, (out, φ) and (φ, in) float64, from its trained tensors."""
    return extra_U.detach().double() * own_scale(alpha), extra_V.detach().double()


def own_tensors(B: torch.Tensor, A: torch.Tensor, rank: int, alpha: float) -> dict[str, torch.Tensor]:
    """Return trained tensors whose own part of ΔW is ``B A``, or its best approximation of rank `rank`.

    The rows of ``extra_V`` are orthogonal and have the norm that they start with, so that training goes on as from a
    start; where ``B A`` has a smaller rank, the last ones are orthonormal fillers whose side of U is zero.

    Args:
        B: (out, r).
        A: (r, in).
        rank: how many directions the module has, φ.
        alpha: the task's.

    Returns:
        ``extra_U`` (out, φ) and ``extra_V`` (φ, in), float32.
    """
    out, size = B.shape[0], A.shape[1]
    Q, R = torch.linalg.qr(B.double())
    P, L = torch.linalg.qr(A.double().T)
    left, S, right = torch.linalg.svd(R @ L.T, full_matrices=False)
    kept = min(rank, len(S))
    norm = own_norm(alpha)
    U, V = torch.zeros(out, rank, dtype=torch.float64), torch.zeros(rank, size, dtype=torch.float64)
    U[:, :kept] = (Q @ left[:, :kept]) * (S[:kept] / (own_scale(alpha) * norm))
    V[:kept] = (P @ right[:kept].T).T
    if kept < rank:
        # of a seed, so that one task always gives one file
        more = torch.randn(size, rank - kept, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        V[kept:] = torch.linalg.qr(torch.cat([V[:kept].T, more], 1)).Q[:, kept:].T
    return {"extra_U": U.float(), "extra_V": (V * norm).float()}


def own_fields(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the fields of a configuration that give every module its number of own directions.

    Args:
        ranks: module → directions, of all modules of the task.

    Returns:
        `extra_rank`, what most modules have, and `extra_rank_pattern` for the others.
    """
    counts = Counter(ranks.values())
    usual = max(counts, key=lambda rank: (counts[rank], rank), default=0)
    others = {name for name, rank in ranks.items() if rank != usual}
    # a pattern is the end of a name, or a regular expression: one module's name may fit another module
    fits = re.compile("|".join(rf"(?:.*\.)?(?:{_pattern(name)})" for name in others)) if others else None
    named = [name for name in ranks if fits is not None and fits.fullmatch(name)]
    # of several that fit the first one counts: no name fits a longer one, nor one of its length with fewer dots
    named.sort(key=lambda name: (-len(name), name.count(".")))
    pattern = {_pattern(name): ranks[name] for name in named}
    return {"extra_rank": usual, "extra_rank_pattern": pattern}


def _pattern(name: str) -> str:
    return name if re.fullmatch(r"[\w.]+", name) else re.escape(name)


def split_own(parts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a module's trained tensors by name, those of its core, and those of its own directions."""
    return (
        {name: value for name, value in parts.items() if name not in OWN},
        {name: value for name, value in parts.items() if name in OWN},
    )
