"""Bases of one module from its sources' updates, in factored form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..basis.module import fix_signs
from .factors import Factors

RISE = 1e-6  # alternations stop when the share of energy kept rises by less
NULL = 1e-12  # eigenvalues below this share of the largest are rounding, not directions


@dataclass(frozen=True, eq=False)
class Pair:
    """An output and an input basis with the spectra they were cut from.

    Attributes:
        U: (out, k_out) float64, orthonormal columns.
        V: (k_in, in) float64, orthonormal rows.
        spectrum_out, spectrum_in: (n,) float64, descending shares of the second moments' energy.
    """

    U: torch.Tensor
    V: torch.Tensor
    spectrum_out: torch.Tensor
    spectrum_in: torch.Tensor


def hosvd(
    updates: Sequence[Factors], weights: Sequence[float], k: int | float, k_in: int | None, alternations: int
) -> Pair:
    """Truncated HOSVD of the stack of updates, then alternations (JD-Full, arXiv 2407.00066).

    U: top eigenvectors of ``Σ w² ΔW ΔWᵀ``; V: of ``Σ w² ΔWᵀ ΔW``; then ``U ← Σ w² ΔW VᵀV ΔWᵀ`` and back until the kept
    energy stops rising. Nothing of size out × in is formed: with ``ΔW = P S Tᵀ``, everything is a product with (out, r)
    or (in, r) matrices. Directions beyond the fleet's own rank are never made up: k is cut to it.

    Args:
        updates: the sources' updates of one module.
        weights: one w per update.
        k: number of directions on each side, or a share of energy in (0, 1) to keep.
        k_in: number of directions on the input side where it differs.
        alternations: at most this many rounds.
    """
    parts = [update.canonical() for update in updates]
    lefts = [w * P * S for (P, S, _), w in zip(parts, weights, strict=True)]
    rights = [w * T * S for (_, S, T), w in zip(parts, weights, strict=True)]
    U, spectrum_out = _directions(torch.cat(lefts, 1))
    V, spectrum_in = _directions(torch.cat(rights, 1))
    # thin factors L, T with w ΔW = L Tᵀ
    thin = [(left, T) for left, (_, _, T) in zip(lefts, parts, strict=True)]
    if isinstance(k, float):
        a = b = _smallest_k(U, V, thin, k)
    else:
        a, b = min(k, U.shape[1]), min(k_in or k, V.shape[1])
    U, V = U[:, :a], V[:, :b]
    total = sum(float((left * left).sum()) for left, _ in thin)
    kept = _kept(U, V, thin) / total
    for _ in range(alternations):
        better = _directions(torch.cat([left @ (T.T @ V) for left, T in thin], 1))[0][:, :a]
        # seen through the other side's few directions, the fleet may span fewer than asked for: then keep what there is
        U = better if better.shape[1] == a else U
        better = _directions(torch.cat([T @ (left.T @ U) for left, T in thin], 1))[0][:, :b]
        V = better if better.shape[1] == b else V
        before, kept = kept, _kept(U, V, thin) / total
        if kept - before < RISE:
            break
    return Pair(fix_signs(U), fix_signs(V).T, spectrum_out, spectrum_in)


def factor_pca(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], k: int, k_in: int | None) -> Pair:
    """EigenLoRAx's basis (arXiv 2502.04700): PCA, centred over columns, of the stacked raw B's and of the stacked Aᵀ's.

    Kept for comparison. It depends on each source's gauge and takes no notice of its scale. Where the stack has fewer
    than k directions the released code returns arbitrary ones from the null space; here k is cut instead.

    Args:
        pairs: per source the stored ``lora_B`` (out, r) and ``lora_A`` (r, in), without scale.
    """
    stacks = torch.cat([B for B, _ in pairs], 1), torch.cat([A.T for _, A in pairs], 1)
    (U, spectrum_out), (V, spectrum_in) = (_directions(stack - stack.mean(1, keepdim=True)) for stack in stacks)
    U, V = U[:, :k], V[:, : k_in or k]
    return Pair(fix_signs(U), fix_signs(V).T, spectrum_out, spectrum_in)


def _directions(stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors (d, n) of (d, columns) that carry any energy, and their shares of it."""
    if stack.shape[1] > stack.shape[0]:
        # same left singular vectors, fewer columns
        stack = torch.linalg.qr(stack.T, mode="r")[1].T
    P, S, _ = torch.linalg.svd(stack, full_matrices=False)
    energy = S * S
    alive = int((energy > NULL * energy[0]).sum()) if energy.numel() else 0
    return P[:, :alive], energy[:alive] / energy.sum().clamp_min(1e-300)


def _kept(U: torch.Tensor, V: torch.Tensor, thin: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return sum(float(((U.T @ left) @ (T.T @ V)).square().sum()) for left, T in thin)


def _smallest_k(
    U: torch.Tensor, V: torch.Tensor, thin: Sequence[tuple[torch.Tensor, torch.Tensor]], share: float
) -> int:
    """The smallest k whose leading k × k block of all cores holds `share` of the energy."""
    n = min(U.shape[1], V.shape[1])
    block = torch.zeros(n, n, dtype=U.dtype)
    for left, T in thin:
        block += ((U[:, :n].T @ left) @ (T.T @ V[:, :n])).square()
    held = block.cumsum(0).cumsum(1).diagonal()
    total = sum(float((left * left).sum()) for left, _ in thin)
    enough = (held >= share * total * (1 - 1e-9)).nonzero()
    return int(enough[0, 0]) + 1 if len(enough) else n
