"""What bases of every k keep of one module: of the updates they are made of, of updates left out, and of noise.

A truncated HOSVD's shares at all k are in the leading blocks of one core. The builder's alternations raise them a
little: they are run at some k, all of a small module, and what they add is taken to be linear in between.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..builders.hosvd import Compressed, alternate
from ..sources.factors import Factors
from .stacked import by_rank, stacked

MOST = 128  # directions that curves go up to
# cubes of the subspaces' widths that alternations may cost in the bases of a module, and of all modules: 0.3 and 10 s
WORK, WORK_IN_ALL = 1e7, 3e8

Shares = torch.Tensor  # (updates, K) float64: column k − 1 is what k directions per side keep of each


@dataclass(frozen=True, eq=False)
class UpdateCurves:
    """The shares kept of a module's updates, per k from 1 on.

    Attributes:
        spans: output and input directions that the updates span together.
        plain: what a basis of all updates keeps of each without alternations.
        seen: what a basis of all updates keeps of each.
        left_out: what a basis of the other folds keeps of each; None where there is one fold.
        null: what a basis of noise of the same strength keeps of each one's noise.
        alternated: the k at which alternations were run in all these bases; empty where the builder runs none.
    """

    spans: tuple[int, int]
    plain: Shares
    seen: Shares
    left_out: Shares | None
    null: Shares
    alternated: list[int]


def largest(basis: Compressed) -> int:
    """Return the k that curves go up to: all that is spanned, at most `MOST`."""
    return min(MOST, max(basis.out.Q.shape[1], basis.inner.Q.shape[1]))


def truncated(basis: Compressed, updates: Sequence[Factors], norms: Sequence[float], most: int) -> Shares:
    """Return what truncated HOSVDs of every k keep of updates."""
    ks = torch.arange(most)
    rows = []
    for update, norm in zip(updates, norms, strict=True):
        found = _held(basis, update)
        rows.append(found[ks.clamp(max=found.shape[0] - 1), ks.clamp(max=found.shape[1] - 1)] / norm**2)
    return torch.stack(rows).clamp(max=1.0)


def alternated(
    basis: Compressed,
    updates: Sequence[Factors],
    norms: Sequence[float],
    curve: Shares,
    own: int,
    rounds: int,
    count: int,
) -> tuple[Shares, list[int]]:
    """Return a curve with what alternations add to it, and the k at which they were run.

    Args:
        basis: made of the updates, or of others.
        updates: what the curve is of.
        norms: their norms.
        curve: of `truncated`.
        own: the reported basis's k, where they are run first.
        rounds: of them at most, as when the basis is built.
        count: at how many k they are run.
    """
    if not rounds:
        return curve, []
    widths = basis.out.Q.shape[1], basis.inner.Q.shape[1]
    basis = stacked(basis)
    seen = by_rank([(basis.out.Q.T @ update.B, update.A @ basis.inner.Q) for update in updates])
    squares = torch.tensor(norms, dtype=torch.float64).square()
    # all that is spanned cannot be turned
    gains = {max(widths): torch.zeros(len(updates), dtype=torch.float64)}

    def run(k: int) -> None:
        u, v = (torch.eye(width, min(k, width), dtype=torch.float64) for width in widths)
        u, v = alternate(basis, u, v, rounds)
        held = torch.zeros(len(updates), dtype=torch.float64)
        for places, left, right in seen:
            held[places] = ((u.T @ left) @ (right @ v)).square().sum((1, 2))
        gains[k] = held / squares - curve[:, k - 1]

    ran: list[int] = []
    k: int | None = min(own, max(widths), curve.shape[1])
    while k is not None and len(ran) < count:
        if k not in gains:
            run(k)
            ran.append(k)
        k = 1 if 1 not in gains else _widest(gains, curve.shape[1])
    return (curve + _between(gains, curve.shape[1])).clamp(0.0, 1.0), sorted(ran)


def runs(widths: Sequence[tuple[int, int]], work: float) -> int:
    """Return at how many k alternations are run in each of some bases, from 2 on.

    Args:
        widths: of the subspaces of each basis.
        work: cubes of widths that they may cost together.
    """
    return max(2, int(work / sum(a**3 + b**3 for a, b in widths)))


def _widest(gains: Mapping[int, torch.Tensor], most: int) -> int | None:
    """Return the middle of the gap between known gains over which most may happen; None where all k are known."""
    ks = sorted(gains)
    gaps = [
        (abs(float((gains[low] - gains[high]).mean())) * (high - low), low, high)
        for low, high in pairwise(ks)
        if high - low > 1 and low < most
    ]
    if not gaps:
        return None
    _, low, high = max(gaps)
    return (low + min(high, most + 1)) // 2


def _held(basis: Compressed, update: Factors) -> torch.Tensor:
    """Return the energy (w_out, w_in) in each leading block of the update's core in a basis's directions."""
    core = (basis.out.Q.T @ update.B) @ (update.A @ basis.inner.Q)
    return core.square().cumsum(0).cumsum(1)


def _between(gains: Mapping[int, torch.Tensor], most: int) -> Shares:
    """Return the gains (updates, most) at every k, linear between those known and level beyond them."""
    ks = sorted(gains)
    columns = []
    for k in range(1, most + 1):
        place = bisect_left(ks, k)
        if place == len(ks):
            columns.append(gains[ks[-1]])
        elif place == 0 or ks[place] == k:
            columns.append(gains[ks[place]])
        else:
            low, high = ks[place - 1], ks[place]
            share = (k - low) / (high - low)
            columns.append(gains[low] * (1 - share) + gains[high] * share)
    return torch.stack(columns, 1)
