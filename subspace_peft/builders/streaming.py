"""A module's directions from a stack too large for an exact SVD, by block power iteration over pieces of the stack.

With the updates ``ΔW_i = s_i B_i A_i`` and their weights w_i, the second moments ``M_out = Σ w_i² ΔW_i ΔW_iᵀ`` and
``M_in = Σ w_i² ΔW_iᵀ ΔW_i`` are applied to blocks of vectors as ``Σ B_i G_i (B_iᵀ Q)``, with ``G_i = w_i² s_i² A_i
A_iᵀ`` of r × r: nothing of size out × in, d × d or d × N·r is formed. Products with B and A are in float32, everything
of size r × r or of the subspaces' width in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .hosvd import Compressed, Side
from .module_stack import PIECE, ModuleStack
from .spectral_bound import largest_missed, most_held

NULL = 1e-10  # eigenvalues below this share of the largest are float32's rounding, not directions
# beside given directions, eigenvalues below this share of all energy: what is given was stored in float32, and leaves
# 1e-14 of what it spans
NULL_BESIDE = 1e-8
OVERSAMPLED = (2, 8)  # subspaces are at least and at most so many times as wide as the directions asked for
SETTLED = 2e-4  # power iteration stops when the energy of the leading directions rises by a smaller share of itself
MOST_PASSES = 8

Parts = list[tuple[list[int], torch.Tensor, torch.Tensor]]


def compress(
    stack: ModuleStack,
    width: int,
    leading: int,
    bound: bool = True,
    fixed: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Compressed:
    """Find subspaces of both sides by block power iteration with Rayleigh–Ritz, and bound what they missed.

    Randomised subspace iteration (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4) on both second
    moments at once, from one fixed Gaussian block, until the energy of the leading directions has settled. Both sides
    take one pass over the stack together, which is what a pass costs: reading.

    Args:
        stack: the module's factors.
        width: of the subspaces; cut to what the sides and the stack have.
        leading: how many directions have to have settled.
        bound: whether to probe for what was missed, in two more passes.
        fixed: orthonormal columns (out, a) and (in, b) float64 that the subspaces begin with; what is sought lies
            beside them.

    Returns:
        The updates as the subspaces see them; its ``parts`` are float32, since they come from float32 products.
    """
    out, inner = stack.shape
    draw = torch.Generator().manual_seed(0)
    given = fixed or (torch.empty(out, 0, dtype=torch.float64), torch.empty(inner, 0, dtype=torch.float64))
    # algorithm 4.4, step 1: a Gaussian block Ω
    Q = [
        torch.randn(len(f), min(width, len(f) - f.shape[1], stack.rows), generator=draw, dtype=torch.float32).double()
        for f in given
    ]
    Q = [_beside(f, q) for f, q in zip(given, Q, strict=True)]
    means = stack.means() if stack.raw else None
    traces = (stack.energy, stack.energy) if means is None else stack.centred_energies(means)
    before, held, passes = 0.0, 0.0, 0
    for number in range(MOST_PASSES + 1):
        # steps 2 to 5: Z = M Q, orthonormalised after every product so that small directions are not lost to rounding.
        # The first block is no orthonormal one, but only its image is used
        parts: Parts = []
        Z = _apply(stack, Q, means, parts)
        passes += 1
        if number:
            # Rayleigh quotients H = QᵀMQ (w, w), which the product just made gives for free
            H = [_symmetric(q.T @ z) for q, z in zip(Q, Z, strict=True)]
            before = held
            # of the side that is worse off
            held = min(float(torch.linalg.eigvalsh(h)[-leading:].sum()) / t for h, t in zip(H, traces, strict=True))
            if held - before < SETTLED * held or number == MOST_PASSES:
                break
        Q = [_beside(f, z[:, f.shape[1] :], orthonormal=True) for f, z in zip(given, Z, strict=True)]
    probes = largest_missed(lambda X: _apply(stack, X, means), Q) if bound else (None, None)
    sides, turns = [], []
    for f, q, z, h, trace, probe in zip(given, Q, Z, H, traces, probes, strict=True):
        values, turn, alive = _ritz(h, f.shape[1])
        # Cauchy's interlacing: every Ritz value is at most the eigenvalue of M of the same number
        sides.append(Side(q @ turn[:, :alive], values[:alive] / trace, most_held(q, z, h, trace, probe)))
        turns.append(turn[:, :alive].float())
    # Qᵀ B and A Q of the last pass, turned into the Ritz vectors' coordinates: no pass of their own
    parts = [(members, turns[0].T @ left, right @ turns[1]) for members, left, right in parts]
    whole = all(width >= min(len(f) - f.shape[1], stack.rows) for f in given)
    return Compressed(sides[0], sides[1], parts, stack.scales, stack.weights, stack.energy, whole, passes)


def _beside(fixed: torch.Tensor, columns: torch.Tensor, orthonormal: bool = False) -> torch.Tensor:
    """Return `fixed` (d, a) and, behind it, `columns` (d, n) less their part in its span."""
    if not fixed.shape[1]:
        return _orthonormal(columns) if orthonormal else columns
    # twice is enough (Kahan and Parlett): the second removes the rounding that the first leaves
    for _ in range(2):
        columns = columns - fixed @ (fixed.T @ columns)
    return torch.cat([fixed, _orthonormal(columns) if orthonormal else columns], 1)


def _ritz(H: torch.Tensor, fixed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Turn the columns of Q behind the `fixed` ones into Ritz vectors.

    Args:
        H: QᵀMQ (w, w) float64.
        fixed: how many leading columns stay as they are.

    Returns:
        The energy in each column (w,), descending behind the fixed ones; the turn (w, w) that Q is multiplied by; and
        the number of columns that hold more than rounding.
    """
    values, turn = torch.linalg.eigh(H[fixed:, fixed:])
    values, turn = values.flip(0), turn.flip(1)
    if not fixed:
        return values, turn, int((values > NULL * values[0]).sum())
    alive = int((values > NULL_BESIDE * H.trace()).sum())
    eye = torch.eye(fixed, dtype=torch.float64)
    return torch.cat([H.diagonal()[:fixed], values]), torch.block_diag(eye, turn), fixed + alive


def _apply(
    stack: ModuleStack,
    Q: Sequence[torch.Tensor],
    means: tuple[torch.Tensor, torch.Tensor] | None,
    parts: Parts | None = None,
) -> list[torch.Tensor]:
    """Return ``M_out Q[0]`` (out, w) and ``M_in Q[1]`` (in, w), float64, from one pass over the stack.

    Args:
        stack: the factors.
        Q: blocks (out, w) and (in, w) float64.
        means: of the factors' columns, where these are centred: the moments of Σ b bᵀ − n·mean·meanᵀ.
        parts: gets ``Q[0]ᵀ B`` (n, w, r) and ``A Q[1]`` (n, r, w), float32, of every piece.
    """
    QU, QV = (q.float() for q in Q)
    Z = [torch.zeros_like(q) for q in Q]
    for piece in stack.pieces():
        n, r = piece.over_B.shape[:2]
        # the thin factor in front: the products with Bᵀ and Aᵀ would take near twice as long
        left, right = (QU.T @ piece.B).T.reshape(n, r, -1), (piece.A @ QV).view(n, r, -1)
        # float32 products of one piece, added up in float64 over the pieces: the error does not grow with the fleet
        back = (piece.over_B @ left.double()).view(n * r, -1).float()
        Z[0] += piece.B @ back
        back = (piece.over_A @ right.double()).view(n * r, -1).float()
        Z[1] += (back.T @ piece.A).T
        if parts is not None:
            parts.append((piece.members, left.mT.contiguous(), right))
    if means is not None:
        for z, q, mean in zip(Z, Q, means, strict=True):
            z -= stack.rows * mean[:, None] * (mean @ q)
    return Z


def width_of(k: int, rows: int) -> int:
    """Return how wide subspaces should be for k directions of a stack with so many rows.

    Wide ones lose less in the alternations, and on small stacks they cost little.
    """
    low, high = OVERSAMPLED
    return k * min(high, max(low, round(2**13 / rows)))


def working_memory(shape: tuple[int, int], ranks: Sequence[int], width: int) -> int:
    """Return the most bytes that `compress` takes beside the pieces that are kept.

    These are three pieces and the compressed factors in float32, and ten blocks of vectors in float64.
    """
    rows = sum(ranks)
    piece = min(rows * sum(shape), max(PIECE, max(ranks) * sum(shape)))
    return 3 * 4 * piece + 10 * 8 * width * sum(shape) + 4 * 4 * width * rows


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(columns)[0]


def _symmetric(matrix: torch.Tensor) -> torch.Tensor:
    return (matrix + matrix.T) / 2
