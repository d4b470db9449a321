"""Bases of one module from its sources' updates, in factored form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..basis.module import fix_signs
from ..sources.factors import Factors

RISE = 1e-6  # alternations stop when the share of energy kept rises by less
NULL = 1e-12  # eigenvalues below this share of the largest are rounding, not directions
BATCH = 1 << 23  # numbers in the cores that are formed at a time


@dataclass(frozen=True, eq=False)
class Side:
    """What is known of one side's second moment M (d × d).

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
    """A module's updates seen through both sides' Q: what bases and statistics are computed from.

    Attributes:
        out, inner: the sides.
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
        """Places of a few sources and their cores (n, a, b) in Q_out u and Q_in v, float64, each times its own of
        `factors`.

        Args:
            factors: `scales` or `weights`.
            u, v: (w_out, a) and (w_in, b) float64; all of Q_out and Q_in without them.
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


@dataclass(frozen=True, eq=False)
class Pair:
    """An output and an input basis, and what they are within the subspaces they were found in.

    Attributes:
        U: (out, k_out) float32, orthonormal columns.
        V: (k_in, in) float32, orthonormal rows.
        u, v: (w_out, k_out) and (w_in, k_in) float64: Q_outᵀ U and Q_inᵀ Vᵀ.
        kept: share of the weighted energy that both keep together.
    """

    U: torch.Tensor
    V: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    kept: float


def hosvd(compressed: Compressed, k: int | float, k_in: int | None, alternations: int) -> Pair | None:
    """Truncated HOSVD of the stack of updates, then alternations (JD-Full, arXiv 2407.00066).

    U: top eigenvectors of ``Σ w² ΔW ΔWᵀ``; V: of ``Σ w² ΔWᵀ ΔW``; then ``U ← Σ w² ΔW VᵀV ΔWᵀ`` and back until the kept
    energy stops rising, within the subspaces Q. Nothing of size out × in is formed. Directions beyond the fleet's own
    rank are never made up: k is cut to it.

    Args:
        compressed: the module's updates.
        k: number of directions on each side, or a share of energy in (0, 1) to keep.
        k_in: number of directions on the input side where it differs.
        alternations: at most this many rounds.

    Returns:
        None where k is a share that takes more than half the directions of subspaces which do not hold all there is:
        wider ones are needed.
    """
    out, inner = compressed.out, compressed.inner
    widths = out.Q.shape[1], inner.Q.shape[1]
    if isinstance(k, float):
        a = b = smallest_k(compressed, k)
        if not compressed.whole and 2 * a > min(widths):
            return None
    else:
        a, b = min(k, widths[0]), min(k_in or k, widths[1])
    u, v = torch.eye(widths[0], a, dtype=torch.float64), torch.eye(widths[1], b, dtype=torch.float64)
    u, v = alternate(compressed, u, v, alternations)
    # Q comes out of products in float32 where it is not exact
    U, V = (fix_signs(torch.linalg.qr(side.Q @ turn)[0]).float() for side, turn in ((out, u), (inner, v)))
    return pair_of(compressed, U, V)


def alternate(
    compressed: Compressed, u: torch.Tensor, v: torch.Tensor, most: int, fixed: tuple[int, int] = (0, 0)
) -> tuple[torch.Tensor, torch.Tensor]:
    """At most `most` rounds of JD-Full's alternations from u and v on, whose leading `fixed` columns stay as they
    are."""
    kept = _kept(compressed, u, v)
    for _ in range(most):
        u = turned(compressed, u, v, output=True, fixed=fixed[0])
        v = turned(compressed, u, v, output=False, fixed=fixed[1])
        before, kept = kept, _kept(compressed, u, v)
        if kept - before < RISE:
            break
    return u, v


def pair_of(compressed: Compressed, U: torch.Tensor, V: torch.Tensor) -> Pair:
    """The pair of U (out, k_out) and Vᵀ (in, k_in), seen within the subspaces."""
    u, v = compressed.out.Q.T @ U.double(), compressed.inner.Q.T @ V.double()
    return Pair(U.contiguous(), V.T.contiguous(), u, v, _kept(compressed, u, v))


def exact(updates: Sequence[Factors], weights: Sequence[float]) -> Compressed:
    """The updates in the directions of an exact SVD of their stack: ``[w_1 P_1 S_1 … w_N P_N S_N]``, with ``ΔW = P S
    Tᵀ``.

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
    """EigenLoRAx's directions (arXiv 2502.04700): PCA, centred over columns, of the stacked raw B's and of the stacked
    Aᵀ's.

    Kept for comparison. It depends on each source's gauge and takes no notice of its scale. Where the stack has fewer
    than k directions the released code returns arbitrary ones from the null space; here k is cut instead.

    Args:
        pairs: per source the stored ``lora_B`` (out, r) and ``lora_A`` (r, in), float64, without scale.
        scales, weights, total: as in `Compressed`.
    """
    stacks = torch.cat([B for B, _ in pairs], 1), torch.cat([A.T for _, A in pairs], 1)
    out, inner = (_side(stack - stack.mean(1, keepdim=True)) for stack in stacks)
    seen = [([i], (out.Q.T @ B)[None], (A @ inner.Q)[None]) for i, (B, A) in enumerate(pairs)]
    return Compressed(out, inner, seen, list(scales), list(weights), total)


def smallest_k(compressed: Compressed, share: float) -> int:
    """The smallest k whose leading k × k block of all cores holds `share` of the energy; all there are where none
    does."""
    n = min(compressed.out.Q.shape[1], compressed.inner.Q.shape[1])
    eye = [torch.eye(side.Q.shape[1], n, dtype=torch.float64) for side in (compressed.out, compressed.inner)]
    block = torch.zeros(n, n, dtype=torch.float64)
    for _, cores in compressed.cores(compressed.weights, *eye):
        block += cores.square().sum(0)
    held = block.cumsum(0).cumsum(1).diagonal()
    enough = (held >= share * compressed.total * (1 - 1e-9)).nonzero()
    return int(enough[0, 0]) + 1 if len(enough) else n


def _side(stack: torch.Tensor) -> Side:
    """Left singular vectors of a stack (d, columns) that carry any energy, and their shares of it."""
    if stack.shape[1] > stack.shape[0]:
        # same left singular vectors, fewer columns
        stack = torch.linalg.qr(stack.T, mode="r")[1].T
    P, S, _ = torch.linalg.svd(stack, full_matrices=False)
    energy = S * S
    alive = int((energy > NULL * energy[0]).sum()) if energy.numel() else 0
    values = energy[:alive] / energy.sum().clamp_min(1e-300)
    return Side(P[:, :alive], values, lambda k: min(1.0, float(values[:k].sum())))


def turned(
    compressed: Compressed, u: torch.Tensor | None, v: torch.Tensor | None, *, output: bool, fixed: int = 0
) -> torch.Tensor:
    """The best u for this v, or the best v for this u, of as many columns; the leading `fixed` ones stay."""
    old = u if output else v
    assert old is not None
    moment = torch.zeros(len(old), len(old), dtype=torch.float64)
    for _, cores in compressed.cores(compressed.weights, *((None, v) if output else (u, None))):
        flat = cores.transpose(0, 1).flatten(1) if output else cores.flatten(0, 1).T
        moment += flat @ flat.T
    free = old.shape[1] - fixed
    if not free:
        return old
    moment = moment[fixed:, fixed:]
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    # seen through the other side's few directions, the fleet may span fewer than asked for: then keep what there is
    if int((values > NULL * values[-1]).sum()) < free:
        return old
    best = vectors.flip(1)[:, :free]
    return torch.block_diag(old[:fixed, :fixed], best) if fixed else best


def _kept(compressed: Compressed, u: torch.Tensor, v: torch.Tensor) -> float:
    held = sum(float(cores.square().sum()) for _, cores in compressed.cores(compressed.weights, u, v))
    return min(1.0, held / compressed.total)
