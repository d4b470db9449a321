"""Extend a basis by directions that it lacks for further updates: the HOSVD of what it leaves of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..basis import ModuleBasis
from ..basis.module import fix_signs
from ..sources.factors import Factors
from .hosvd import NULL, Compressed, Pair, Side, alternate, pair_of
from .streaming import NULL_BESIDE


def frame(module: ModuleBasis) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the basis's U (out, k_out) and Vᵀ (in, k_in) in float64, orthonormal beyond the stored ones' rounding.

    QR with a positive diagonal keeps each direction where it is, up to that rounding.
    """
    found = []
    for columns in (module.U.double(), module.V.double().T):
        Q, R = torch.linalg.qr(columns)
        found.append(Q * torch.where(R.diagonal() < 0, -1.0, 1.0).double())
    return found[0], found[1]


def exact_beside(
    updates: Sequence[Factors], weights: Sequence[float], fixed: tuple[torch.Tensor, torch.Tensor]
) -> Compressed:
    """Return the updates as `hosvd.exact` does, in the given directions first.

    Behind them come those of an exact SVD of what they leave of the stack, ``X − F Fᵀ X``.

    Args:
        updates: the sources' updates of one module.
        weights: one w per update.
        fixed: orthonormal columns (out, a) and (in, b) float64.
    """
    parts = [update.canonical() for update in updates]
    out = _side(torch.cat([w * P * S for (P, S, _), w in zip(parts, weights, strict=True)], 1), fixed[0])
    inner = _side(torch.cat([w * T * S for (_, S, T), w in zip(parts, weights, strict=True)], 1), fixed[1])
    seen = [([i], (out.Q.T @ (P * S))[None], (T.T @ inner.Q)[None]) for i, (P, S, T) in enumerate(parts)]
    total = sum(w * w * float((S * S).sum()) for (_, S, _), w in zip(parts, weights, strict=True))
    return Compressed(out, inner, seen, [1.0] * len(parts), list(weights), total)


def nothing_beside(fixed: tuple[torch.Tensor, torch.Tensor]) -> Compressed:
    """Return no updates, seen in the given directions alone.

    Args:
        fixed: orthonormal columns (out, a) and (in, b) float64.
    """
    sides = [Side(each, torch.zeros(each.shape[1], dtype=torch.float64), lambda k: 1.0) for each in fixed]
    return Compressed(sides[0], sides[1], [], [], [], 0.0)


def grow(
    compressed: Compressed, module: ModuleBasis, add: int | float, add_in: int | None, alternations: int
) -> Pair | None:
    """Return U and V of a module with further columns and rows behind those it has, which stay bit for bit.

    The new ones begin as the leading singular vectors of what the old ones leave of the stack, and alternate as
    JD-Full does, the old ones held.

    Args:
        compressed: the new updates, in the old directions first.
        module: the old basis.
        add: how many at most on each side, or the share of the updates' energy that all together have to keep.
        add_in: how many at most on the input side where they differ.
        alternations: at most this many rounds.

    Returns:
        The grown bases; None where a share takes more than half of subspaces which do not hold all there is: wider
        ones are needed.
    """
    a, b = module.k_out, module.k_in
    room = compressed.out.Q.shape[1] - a, compressed.inner.Q.shape[1] - b
    if isinstance(add, float):
        count = _fewest(compressed, (a, b), room, add)
        if not compressed.whole and 2 * count > min(room):
            return None
        more = min(count, room[0]), min(count, room[1])
    else:
        more = min(add, room[0]), min(add if add_in is None else add_in, room[1])
    u, v = (
        torch.eye(side.Q.shape[1], k + n, dtype=torch.float64)
        for side, k, n in zip((compressed.out, compressed.inner), (a, b), more, strict=True)
    )
    u, v = alternate(compressed, u, v, alternations, fixed=(a, b))
    U = _extended(module.U, compressed.out.Q[:, a:] @ u[a:, a:])
    V = _extended(module.V.T, compressed.inner.Q[:, b:] @ v[b:, b:])
    return pair_of(compressed, U, V)


def refit(compressed: Compressed, k: tuple[int, int], alternations: int) -> Pair:
    """Fit U and V of at most k columns and rows to all updates alike, by HOSVD and alternations.

    Where the updates span fewer directions, there are fewer: none are made up.

    Args:
        compressed: the updates, the old basis's cores among them.
        k: directions of the output and the input side.
        alternations: at most this many rounds.
    """
    u, v = (_leading(compressed, size, output=output) for size, output in zip(k, (True, False), strict=True))
    u, v = alternate(compressed, u, v, alternations)
    U, V = (
        fix_signs(torch.linalg.qr(side.Q @ turn)[0]).float()
        for side, turn in ((compressed.out, u), (compressed.inner, v))
    )
    return pair_of(compressed, U, V)


def _leading(compressed: Compressed, k: int, *, output: bool) -> torch.Tensor:
    """Return the leading eigenvectors of one side's second moment (w, ≤ k) float64, those that hold any energy."""
    values, vectors = compressed.moment(None, None, output=output)
    alive = int((values > NULL * values[-1]).sum())
    return vectors.flip(1)[:, : max(1, min(k, alive))]


def orthogonal_to(columns: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis (d, n) float64 of the columns' part outside the span of `old`.

    Twice is enough: the second time removes the rounding that the first leaves.

    Args:
        columns: (d, n) float64.
        old: (d, k) float64, orthonormal.
    """
    for _ in range(2):
        columns = columns - old @ (old.T @ columns)
        columns = torch.linalg.qr(columns)[0]
    return columns


def _extended(old: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return `old` (d, k) with the columns (d, n) behind it, in its dtype."""
    if not columns.shape[1]:
        return old
    new = fix_signs(orthogonal_to(columns, torch.linalg.qr(old.double())[0]))
    return torch.cat([old, new.to(old.dtype)], 1)


def _side(stack: torch.Tensor, fixed: torch.Tensor) -> Side:
    """Return the given directions and, behind them, the left singular vectors of what they leave of a stack."""
    total = stack.square().sum().clamp_min(1e-300)
    held = (fixed.T @ stack).square().sum(1)
    rest = stack - fixed @ (fixed.T @ stack)
    if rest.shape[1] > rest.shape[0]:
        rest = torch.linalg.qr(rest.T, mode="r")[1].T
    P, S, _ = torch.linalg.svd(rest, full_matrices=False)
    room = len(fixed) - fixed.shape[1]
    alive = min(int((NULL_BESIDE * total < S * S).sum()), room)
    Q = orthogonal_to(P[:, :alive], fixed) if alive else P[:, :0]
    values = torch.cat([held, S[:alive] ** 2]) / total
    return Side(torch.cat([fixed, Q], 1), values, lambda k: 1.0)


def _fewest(compressed: Compressed, old: tuple[int, int], room: tuple[int, int], share: float) -> int:
    """Return the fewest new directions per side with which the leading block of all cores holds a share of the energy.

    Args:
        compressed: the updates.
        old: directions that there are, per side.
        room: how many more there can be, per side.
        share: of the energy.
    """
    n = max(room)
    block = torch.zeros(old[0] + room[0], old[1] + room[1], dtype=torch.float64)
    for _, cores in compressed.cores(compressed.weights):
        block += cores.square().sum(0)
    held = block.cumsum(0).cumsum(1)
    for count in range(n + 1):
        a, b = old[0] + min(count, room[0]), old[1] + min(count, room[1])
        if float(held[a - 1, b - 1]) >= share * compressed.total * (1 - 1e-9):
            return count
    return n
