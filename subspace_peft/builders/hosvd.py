"""The truncated HOSVD of one module's updates, and the alternations that follow it, in factored form.

The stack of updates, a tensor of N × out × in, is seen through orthonormal Q_out (out, w_out) and Q_in (in, w_in) that
hold all of it, or about its leading directions. What remains are the small cores ``C_i = Q_outᵀ ΔW_i Q_in``, and all
that follows is linear algebra on them, in float64: the stack's rounding is that of float32 files, 1e-7, and the small
matrices' eigenvalues are squares of singular values, of which float32 would keep half the digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..basis.module import fix_signs
from ..sources.factors import Factors

RISE = 1e-6  # alternations stop when the share of energy kept rises by less
# eigenvalues below this share of the largest are rounding, not directions: these are singular values of 1e-6 of the
# largest, and files in float32 have theirs to 1e-7
NULL = 1e-12
BATCH = 1 << 23  # entries of the cores that are formed at a time, 64 MB in float64


@dataclass(frozen=True, eq=False)
class Side:
    """One side's second moment M (d × d), as far as it is known.

    Attributes:
        Q: (d, w) float64, orthonormal: its leading directions, or a subspace that holds about those.
        values: (w,) float64, descending: the eigenvalues of QᵀMQ as shares of M's trace. Each is at most M's own.
        reach: k → the most that any k directions can hold, as a share of M's trace.
    """

    Q: torch.Tensor
    values: torch.Tensor
    reach: Callable[[int], float]


@dataclass(frozen=True, eq=False)
class Compressed:
    """A module's updates seen through both sides' Q, from which bases and statistics are computed.

    Attributes:
        out: the output side.
        inner: the input side.
        parts: per piece of the fleet its sources' places, Q_outᵀ B (n, w_out, r) and A Q_in (n, r, w_in).
        scales: per source what B A is multiplied by to be its update ΔW.
        weights: the same for its weighted update w ΔW.
        total: Σ ‖w ΔW‖².
        whole: whether the Q's hold all there is, so that nothing is missing from the parts.
        passes: how often the stack was gone through to find the Q's; 0 where they are exact.
    """

    out: Side
    inner: Side
    parts: list[tuple[list[int], torch.Tensor, torch.Tensor]]
    scales: Sequence[float]
    weights: Sequence[float]
    total: float
    whole: bool = True
    passes: int = 0

    def cores(
        self, factors: Sequence[float], u: torch.Tensor | None = None, v: torch.Tensor | None = None
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield places of a few sources and their cores ``uᵀ Q_outᵀ (f ΔW) Q_in v`` (n, a, b), float64.

        Args:
            factors: f per source, `scales` or `weights`.
            u: (w_out, a) float64; all of Q_out without it.
            v: (w_in, b) float64; all of Q_in without it.
        """
        for places, left, right in self.parts:
            a, b = left.shape[1] if u is None else u.shape[1], right.shape[2] if v is None else v.shape[1]
            step = max(1, BATCH // (a * b))
            for start in range(0, len(places), step):
                some = places[start : start + step]
                L, T = left[start : start + step].double(), right[start : start + step].double()
                L = L if u is None else u.T @ L
                T = T if v is None else T @ v
                factor = torch.tensor([factors[i] for i in some], dtype=torch.float64)
                yield some, (L * factor[:, None, None]) @ T

    def moment(
        self, u: torch.Tensor | None, v: torch.Tensor | None, *, output: bool, fixed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the eigenvalues, ascending, and vectors of ``Σ w² (C_i v)(C_i v)ᵀ``, of u's side or likewise of v's.

        Args:
            u: (w_out, a) float64; not used where `output`.
            v: (w_in, b) float64; not used elsewhere.
            output: whether it is u's side.
            fixed: how many leading coordinates are left out.
        """
        side = self.out if output else self.inner
        moment = torch.zeros(side.Q.shape[1], side.Q.shape[1], dtype=torch.float64)
        for _, cores in self.cores(self.weights, *((None, v) if output else (u, None))):
            flat = cores.transpose(0, 1).flatten(1) if output else cores.flatten(0, 1).T
            moment += flat @ flat.T
        moment = moment[fixed:, fixed:]
        values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
        return values, vectors


@dataclass(frozen=True, eq=False)
class Pair:
    """An output and an input basis, with their coordinates in the subspaces that they were found in.

    Attributes:
        U: (out, k_out) float32, orthonormal columns.
        V: (k_in, in) float32, orthonormal rows.
        u: Q_outᵀ U (w_out, k_out) float64.
        v: Q_inᵀ Vᵀ (w_in, k_in) float64.
        kept: share of the weighted energy that both keep together.
    """

    U: torch.Tensor
    V: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    kept: float


def size_of(pair: Pair) -> tuple[int, int]:
    """Return k_out and k_in."""
    return pair.U.shape[1], pair.V.shape[0]


def hosvd(compressed: Compressed, k: int | float, k_in: int | None, alternations: int) -> Pair | None:
    """Compute the truncated HOSVD of the stack of updates, then alternate (JD-Full, arXiv 2407.00066).

    U: top eigenvectors of ``Σ w² ΔW ΔWᵀ``; V: of ``Σ w² ΔWᵀ ΔW``; then ``U ← Σ w² ΔW VᵀV ΔWᵀ`` and back until the kept
    energy stops rising, within the subspaces Q. Nothing of size out × in is formed. Directions beyond the fleet's own
    rank are never made up: k is cut to it.

    Args:
        compressed: the module's updates.
        k: number of directions on each side, or a share of energy in (0, 1) to keep.
        k_in: number of directions on the input side where it differs.
        alternations: at most this many rounds.

    Returns:
        The bases; None where k is a share that takes more than half the directions of subspaces which do not hold all
        there is: wider ones are needed.
    """
    out, inner = compressed.out, compressed.inner
    widths = out.Q.shape[1], inner.Q.shape[1]
    if isinstance(k, float):
        a = b = smallest_k(compressed, k)
        # of a subspace that does not hold all there is, the latter half of the directions is not settled
        if not compressed.whole and 2 * a > min(widths):
            return None
    else:
        a, b = min(k, widths[0]), min(k_in or k, widths[1])
    # the columns of Q are the eigenvectors of the second moments, largest first: the HOSVD is the leading ones
    u, v = torch.eye(widths[0], a, dtype=torch.float64), torch.eye(widths[1], b, dtype=torch.float64)
    u, v = alternate(compressed, u, v, alternations)
    # QR once more in float64: where Q is not exact, it comes out of products in float32. What is stored is float32
    U, V = (fix_signs(torch.linalg.qr(side.Q @ turn)[0]).float() for side, turn in ((out, u), (inner, v)))
    return pair_of(compressed, U, V)


def alternate(
    compressed: Compressed, u: torch.Tensor, v: torch.Tensor, most: int, fixed: tuple[int, int] = (0, 0)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run JD-Full's alternations (arXiv 2407.00066) from u and v on.

    Each half round raises ``Σ w² ‖uᵀ C_i v‖²``, the energy kept, or leaves it as it is.

    Args:
        compressed: the updates.
        u: (w_out, a) float64, orthonormal.
        v: (w_in, b) float64, orthonormal.
        most: rounds at most; fewer where a round raises the share kept by less than `RISE`.
        fixed: how many leading columns of u and of v stay as they are.
    """
    kept = _kept(compressed, u, v)
    for _ in range(most):
        u = turned(compressed, u, v, output=True, fixed=fixed[0])
        v = turned(compressed, u, v, output=False, fixed=fixed[1])
        before, kept = kept, _kept(compressed, u, v)
        if kept - before < RISE:
            break
    return u, v


def pair_of(compressed: Compressed, U: torch.Tensor, V: torch.Tensor) -> Pair:
    """Return the pair of U (out, k_out) and Vᵀ (in, k_in) with their coordinates in the subspaces."""
    u, v = compressed.out.Q.T @ U.double(), compressed.inner.Q.T @ V.double()
    return Pair(U.contiguous(), V.T.contiguous(), u, v, _kept(compressed, u, v))


def exact(updates: Sequence[Factors], weights: Sequence[float]) -> Compressed:
    """Return the updates in the directions of an exact SVD of their stack.

    With ``ΔW_i = P_i S_i T_iᵀ`` the output side's second moment is ``X Xᵀ``, ``X = [w_1 P_1 S_1 … w_N P_N S_N]`` (out,
    Σ r): its eigenvectors are X's left singular vectors, without squaring the condition. The input side has T for P.

    Args:
        updates: the sources' updates of one module.
        weights: one w per update.
    """
    parts = [update.canonical() for update in updates]
    out = _side(torch.cat([w * P * S for (P, S, _), w in zip(parts, weights, strict=True)], 1))
    inner = _side(torch.cat([w * T * S for (_, S, T), w in zip(parts, weights, strict=True)], 1))
    seen = [([i], (out.Q.T @ (P * S))[None], (T.T @ inner.Q)[None]) for i, (P, S, T) in enumerate(parts)]
    total = sum(w * w * float((S * S).sum()) for (_, S, _), w in zip(parts, weights, strict=True))
    return Compressed(out, inner, seen, [1.0] * len(parts), list(weights), total)


def factor_pca(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], scales: Sequence[float], weights: Sequence[float], total: float
) -> Compressed:
    """Return EigenLoRAx's directions (arXiv 2502.04700): PCA of the stacked raw B's and of the stacked Aᵀ's.

    Both are centred over their columns. This is kept for comparison: it depends on each source's gauge, and ignores
    its scale. Where the stack has fewer than k directions the released code returns arbitrary ones of the null space;
    here k is cut instead.

    Args:
        pairs: per source the stored ``lora_B`` (out, r) and ``lora_A`` (r, in), float64, without scale.
        scales: s of every source.
        weights: w·s of every source.
        total: Σ ‖w ΔW‖².
    """
    stacks = torch.cat([B for B, _ in pairs], 1), torch.cat([A.T for _, A in pairs], 1)
    out, inner = (_side(stack - stack.mean(1, keepdim=True)) for stack in stacks)
    seen = [([i], (out.Q.T @ B)[None], (A @ inner.Q)[None]) for i, (B, A) in enumerate(pairs)]
    return Compressed(out, inner, seen, list(scales), list(weights), total)


def smallest_k(compressed: Compressed, share: float) -> int:
    """Return the smallest k whose leading k × k block of all cores holds a share of the energy.

    Args:
        compressed: the updates.
        share: of the energy; where no block holds it, all directions are taken.
    """
    n = min(compressed.out.Q.shape[1], compressed.inner.Q.shape[1])
    eye = [torch.eye(side.Q.shape[1], n, dtype=torch.float64) for side in (compressed.out, compressed.inner)]
    block = torch.zeros(n, n, dtype=torch.float64)
    for _, cores in compressed.cores(compressed.weights, *eye):
        block += cores.square().sum(0)
    # [a − 1, b − 1] of the double cumulative sum is the energy in the leading a × b block
    held = block.cumsum(0).cumsum(1).diagonal()
    enough = (held >= share * compressed.total * (1 - 1e-9)).nonzero()
    return int(enough[0, 0]) + 1 if len(enough) else n


def _side(stack: torch.Tensor) -> Side:
    """Return the left singular vectors of a stack (d, columns) that carry any energy, and their shares of it."""
    if stack.shape[1] > stack.shape[0]:
        # X = Rᵀ Qᵀ has the left singular vectors of Rᵀ (d, d): fewer columns for the SVD
        stack = torch.linalg.qr(stack.T, mode="r")[1].T
    P, S, _ = torch.linalg.svd(stack, full_matrices=False)
    energy = S * S
    alive = int((energy > NULL * energy[0]).sum()) if energy.numel() else 0
    values = energy[:alive] / energy.sum().clamp_min(1e-300)
    return Side(P[:, :alive], values, lambda k: min(1.0, float(values[:k].sum())))


def turned(
    compressed: Compressed, u: torch.Tensor | None, v: torch.Tensor | None, *, output: bool, fixed: int = 0
) -> torch.Tensor:
    """Return the best u for this v, or the best v for this u.

    For given v, u's columns are the leading eigenvectors of ``Σ w² (C_i v)(C_i v)ᵀ``; likewise v's. Where the updates
    span fewer directions, seen through v, those beside them in which the whole updates have most energy fill up.

    Args:
        compressed: the updates.
        u: (w_out, a) float64; may be None where `output`.
        v: (w_in, b) float64; may be None elsewhere.
        output: whether u is turned, else v.
        fixed: how many leading columns stay; these are the leading unit vectors.

    Returns:
        As many columns as the old one has.
    """
    old = u if output else v
    assert old is not None
    free = old.shape[1] - fixed
    if not free:
        return old
    values, vectors = compressed.moment(u, v, output=output, fixed=fixed)
    best = vectors.flip(1)[:, : min(free, int((values > NULL * values[-1]).sum()))]
    if best.shape[1] < free:
        squares, vectors = compressed.moment(None, None, output=output, fixed=fixed)
        rest = vectors * squares.clamp_min(0).sqrt()
        rest = torch.linalg.svd(rest - best @ (best.T @ rest))[0]
        best = torch.linalg.qr(torch.cat([best, rest[:, : free - best.shape[1]]], 1))[0]
    return torch.block_diag(old[:fixed, :fixed], best) if fixed else best


def _kept(compressed: Compressed, u: torch.Tensor, v: torch.Tensor) -> float:
    """Return ``Σ ‖w uᵀ C v‖² / Σ ‖w ΔW‖²``; rounding can bring it a hair above one."""
    held = sum(float(cores.square().sum()) for _, cores in compressed.cores(compressed.weights, u, v))
    return min(1.0, held / compressed.total)
