"""A module's bases from stacks too large for an exact SVD: block power iteration over pieces of the stack, and a bound
on what it missed.

With the updates ``ΔW_i = s_i B_i A_i`` and their weights w_i, the second moments ``M_out = Σ w_i² ΔW_i ΔW_iᵀ`` and
``M_in = Σ w_i² ΔW_iᵀ ΔW_i`` are applied to blocks of vectors as ``Σ B_i G_i (B_iᵀ Q)``, with ``G_i = w_i² s_i² A_i
A_iᵀ`` of r × r: nothing of size out × in, d × d or d × N·r is formed. Products with B and A are in float32, everything
of size r × r or of the subspaces' width in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .hosvd import Compressed, Side
from .scan import gram

PIECE = (
    1 << 22
)  # numbers in a piece of the stack: the same whatever the memory, so that sums are added up in one order
NULL = 1e-10  # eigenvalues below this share of the largest are float32's rounding, not directions
NULL_BESIDE = (
    1e-8  # beside given directions, of all energy: those are rounded to float32, and leave 1e-14 of what they span
)
OVERSAMPLED = (2, 8)  # subspaces are at least and at most so many times as wide as the directions asked for
SETTLED = 2e-4  # power iteration stops when the energy of the leading directions rises by a smaller share of itself
MOST_PASSES = 8
PROBES = 32
PROBE_PASSES = 2
DOUBT = 1e-9  # chance over the probes' draw that a bound does not hold


@dataclass(frozen=True, eq=False)
class Piece:
    """A few sources' factors of one module, all of one rank.

    Attributes:
        members: their places in the module's list of sources.
        B: (out, n·r) float32, the sources' B side by side.
        A: (n·r, in) float32, their A one below the other.
        over_B, over_A: (n, r, r) float64, what ``Bᵀ Q`` and ``A Q`` are multiplied by on the way back: w² s² A Aᵀ and
            w² s² BᵀB.
    """

    members: list[int]
    B: torch.Tensor
    A: torch.Tensor
    over_B: torch.Tensor
    over_A: torch.Tensor


class ModuleStack:
    """All sources' factors of one module, a piece at a time.

    Args:
        load: place of a source → its B (out, r) and A (r, in), in any float dtype.
        ranks: r of every source.
        shape: out, in.
        scales: s of every source.
        weights: w of every source.
        energy: Σ ‖w ΔW‖² over them.
        raw: of the factors themselves, centred over their columns (as EigenLoRAx does), instead of the updates.
        keep: at most so many bytes of pieces are kept from pass to pass.
    """

    def __init__(
        self,
        load: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
        ranks: Sequence[int],
        shape: tuple[int, int],
        scales: Sequence[float],
        weights: Sequence[float],
        energy: float,
        *,
        raw: bool = False,
        keep: int = 0,
    ) -> None:
        self.load, self.ranks, self.shape, self.raw = load, list(ranks), shape, raw
        self.scales, self.energy = list(scales), energy
        self.weights = [w * s for w, s in zip(weights, scales, strict=True)]
        most = max(1, PIECE // sum(shape))
        # sources of one rank together, so that r × r matrices make one batch
        order = sorted(range(len(ranks)), key=lambda i: (ranks[i], i))
        self.plan: list[list[int]] = []
        for i in order:
            last = self.plan[-1] if self.plan else []
            if last and ranks[last[0]] == ranks[i] and (len(last) + 1) * ranks[i] <= most:
                last.append(i)
            else:
                self.plan.append([i])
        self._keeps = 4 * sum(self.ranks) * sum(shape) <= keep
        self._kept: list[Piece] = []

    @property
    def rows(self) -> int:
        return sum(self.ranks)

    def pieces(self) -> Iterator[Piece]:
        """The stack, piece by piece, always the same pieces in the same order."""
        if self._kept:
            yield from self._kept
            return
        for members in self.plan:
            piece = self._piece(members)
            if self._keeps:
                self._kept.append(piece)
            yield piece

    def forget(self) -> None:
        """Let go of kept pieces."""
        self._kept = []

    def _piece(self, members: list[int]) -> Piece:
        out, inner = self.shape
        n, r = len(members), self.ranks[members[0]]
        B, A = torch.empty(out, n, r), torch.empty(n, r, inner)
        over_B, over_A = torch.empty(n, r, r, dtype=torch.float64), torch.empty(n, r, r, dtype=torch.float64)
        for at, i in enumerate(members):
            ours = self.load(i)
            B[:, at], A[at] = ours
            if not self.raw:
                over_B[at] = gram(ours[1]) * self.weights[i] ** 2
                over_A[at] = gram(ours[0].T) * self.weights[i] ** 2
        if self.raw:
            over_B[:] = over_A[:] = torch.eye(r)
        return Piece(members, B.view(out, n * r), A.view(n * r, inner), over_B, over_A)


def compress(
    stack: ModuleStack,
    width: int,
    leading: int,
    bound: bool = True,
    fixed: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Compressed:
    """Subspaces of both sides by block power iteration with Rayleigh–Ritz, and bounds on what they missed.

    Randomised subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) on both second moments at once,
    from one fixed Gaussian block, until the energy of the leading directions has settled.

    Args:
        stack: the module's factors.
        width: of the subspaces; cut to what the sides and the stack have.
        leading: how many directions have to have settled.
        bound: whether to probe for what was missed, in two more passes.
        fixed: orthonormal columns (out, a) and (in, b) float64 that the subspaces begin with; what is sought lies
            beside them.
    """
    out, inner = stack.shape
    draw = torch.Generator().manual_seed(0)
    given = fixed or (torch.empty(out, 0, dtype=torch.float64), torch.empty(inner, 0, dtype=torch.float64))
    Q = [
        torch.randn(len(f), min(width, len(f) - f.shape[1], stack.rows), generator=draw, dtype=torch.float32).double()
        for f in given
    ]
    Q = [_beside(f, q) for f, q in zip(given, Q, strict=True)]
    means = _means(stack) if stack.raw else None
    traces = (stack.energy, stack.energy) if means is None else _centred_energies(stack, means)
    before, held, passes = 0.0, 0.0, 0
    for number in range(MOST_PASSES + 1):
        # the first block is no orthonormal one, but what is asked of it is its image alone
        parts: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []
        Z = _apply(stack, Q, means, parts)
        passes += 1
        if number:
            H = [_symmetric(q.T @ z) for q, z in zip(Q, Z, strict=True)]
            before = held
            held = min(float(torch.linalg.eigvalsh(h)[-leading:].sum()) / t for h, t in zip(H, traces, strict=True))
            if held - before < SETTLED * held or number == MOST_PASSES:
                break
        Q = [_beside(f, z[:, f.shape[1] :], orthonormal=True) for f, z in zip(given, Z, strict=True)]
    sides, turns = [], []
    probes = _probe(stack, Q, means) if bound else (None, None)
    for f, q, z, h, trace, probe in zip(given, Q, Z, H, traces, probes, strict=True):
        values, turn, alive = _ritz(h, f.shape[1])
        sides.append(Side(q @ turn[:, :alive], values[:alive] / trace, _reach(q, z, h, trace, probe)))
        turns.append(turn[:, :alive].float())
    parts = [(members, turns[0].T @ left, right @ turns[1]) for members, left, right in parts]
    whole = all(width >= min(len(f) - f.shape[1], stack.rows) for f in given)
    return Compressed(sides[0], sides[1], parts, stack.scales, stack.weights, stack.energy, whole, passes)


def _beside(fixed: torch.Tensor, columns: torch.Tensor, orthonormal: bool = False) -> torch.Tensor:
    """`fixed` and, behind it, the columns less their part in its span."""
    if not fixed.shape[1]:
        return _orthonormal(columns) if orthonormal else columns
    for _ in range(2):
        columns = columns - fixed @ (fixed.T @ columns)
    return torch.cat([fixed, _orthonormal(columns) if orthonormal else columns], 1)


def _ritz(H: torch.Tensor, fixed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What the columns hold, the turn that makes them Ritz vectors behind the `fixed` ones, and how many of them hold
    anything."""
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
    parts: list[tuple[list[int], torch.Tensor, torch.Tensor]] | None = None,
) -> list[torch.Tensor]:
    """``M_out Q[0]`` and ``M_in Q[1]``, float64, in one pass; appends ``Q[0]ᵀ B`` and ``A Q[1]`` of every piece to
    `parts`."""
    QU, QV = (q.float() for q in Q)
    Z = [torch.zeros_like(q) for q in Q]
    for piece in stack.pieces():
        n, r = piece.over_B.shape[:2]
        # the thin factor in front: the products with Bᵀ and Aᵀ would take near twice as long
        left, right = (QU.T @ piece.B).T.reshape(n, r, -1), (piece.A @ QV).view(n, r, -1)
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


def _means(stack: ModuleStack) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the factors' columns, the mean of B's (out,) and of Aᵀ's (in,), float64."""
    out, inner = (torch.zeros(d, dtype=torch.float64) for d in stack.shape)
    for piece in stack.pieces():
        out += piece.B.sum(1)
        inner += piece.A.sum(0)
    return out / stack.rows, inner / stack.rows


def _centred_energies(stack: ModuleStack, means: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """Σ ‖B − mean‖² over the columns, and the same of Aᵀ."""
    out = inner = 0.0
    for piece in stack.pieces():
        out += float((piece.B - means[0][:, None].float()).square().sum(dtype=torch.float64))
        inner += float((piece.A - means[1].float()).square().sum(dtype=torch.float64))
    return max(out, 1e-300), max(inner, 1e-300)


def _probe(
    stack: ModuleStack, Q: Sequence[torch.Tensor], means: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[float, float]:
    """Per side an upper bound on the largest eigenvalue of ``E = (I − QQᵀ) M (I − QQᵀ)``, sure but for a chance of
    `DOUBT`.

    For a Gaussian block X of s columns, drawn without regard to Q, ``‖Eᵖ X‖₂ ≥ λᵖ ‖xᵀX‖₂`` with x E's first
    eigenvector, and ``‖xᵀX‖₂²`` is χ² distributed with s degrees of freedom, so ``λ ≤ (‖Eᵖ X‖₂ / √q)^(1/p)`` with q
    its quantile (after Dixon 1983). ``P(χ²_s ≤ q) ≤ (q/2)^(s/2) / (s/2)!`` gives q.
    """
    draw = torch.Generator().manual_seed(1)
    X = [torch.randn(len(q), PROBES, generator=draw, dtype=torch.float32).double() for q in Q]
    # the basis that is deflated is rounded as in the products; what rounding leaves of it is removed in float64
    X = [x - q @ (q.T @ x) for q, x in zip(Q, X, strict=True)]
    grown = [1.0, 1.0]
    for _ in range(PROBE_PASSES):
        X = [z - q @ (q.T @ z) for q, z in zip(Q, _apply(stack, X, means), strict=True)]
        for side, x in enumerate(X):
            norm = float(torch.linalg.matrix_norm(x, 2))
            grown[side] *= norm
            X[side] = x / max(norm, 1e-300)
    half = PROBES // 2
    quantile = 2 * math.exp((math.log(DOUBT) + math.lgamma(half + 1)) / half)
    out, inner = ((norm / math.sqrt(quantile)) ** (1 / PROBE_PASSES) for norm in grown)
    return out, inner


def _reach(
    Q: torch.Tensor, Z: torch.Tensor, H: torch.Tensor, trace: float, missed: float | None
) -> Callable[[int], float]:
    """k → an upper bound on the share of the trace that M's k leading eigenvectors hold.

    In the basis of Q and its complement ``M = [[H, Rᵀ], [R, E]]`` with ``E ⪯ missed``. For every ε > 0 that is
    ``⪯ (H + RᵀR/ε) ⊕ (E + ε)``, so the k leading eigenvalues of M add up to at most ``Σ max(λ_i(H + RᵀR/ε), missed +
    ε)`` (Ky Fan's maximum principle); the best ε of a few is taken. Never more than the whole trace.
    """
    R = Z - Q @ H
    square = _symmetric(R.T @ R)
    scale = float(torch.linalg.eigvalsh(H)[-1])

    def reach(k: int) -> float:
        if missed is None:
            return 1.0
        best = trace
        for exponent in range(15):
            epsilon = max(scale, 1e-300) * 10 ** (-exponent / 2)
            values = torch.linalg.eigvalsh(H + square / epsilon).flip(0)[:k]
            rest = missed + epsilon
            best = min(best, float(values.clamp_min(rest).sum()) + rest * max(0, k - len(values)))
        return best / trace

    return reach


def width_of(k: int, rows: int) -> int:
    """How wide subspaces should be for k directions: wide ones lose less in alternations, and on small stacks they
    cost little."""
    low, high = OVERSAMPLED
    return k * min(high, max(low, round(2**13 / rows)))


def working_memory(shape: tuple[int, int], ranks: Sequence[int], width: int) -> int:
    """Bytes that `compress` takes at most beside what pieces are kept in: three pieces, blocks of vectors, compressed
    factors."""
    rows = sum(ranks)
    piece = min(rows * sum(shape), max(PIECE, max(ranks) * sum(shape)))
    return 3 * 4 * piece + 10 * 8 * width * sum(shape) + 4 * 4 * width * rows


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(columns)[0]


def _symmetric(matrix: torch.Tensor) -> torch.Tensor:
    return (matrix + matrix.T) / 2
