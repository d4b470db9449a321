"""What one module's updates have in common: spectra beside a strength-matched null, and the energy a basis keeps of
updates it has seen and has not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..builders.hosvd import Compressed, Side, exact, smallest_k
from ..builders.null import null_update
from ..sources.factors import Factors

KEPT = 128  # leading eigenvalues that are reported
SHARE = 0.9  # of the energy, for `k_for_share`


@dataclass(frozen=True)
class ModuleFindings:
    """One module of a fleet.

    Attributes:
        shape: out, in.
        size: k_out, k_in of the reported basis.
        spectrum_out, spectrum_in: leading eigenvalues of both sides' second moments, as shares of the fleet's energy.
        null_out, null_in: the same of updates of equal singular values in random directions.
        above_out, above_in: how many eigenvalues are larger than the null's largest.
        k_for_share: directions per side that keep 0.9 of the fleet's energy.
        ks: sizes of the curves.
        seen, unseen, null: energy that the truncated HOSVD with k directions per side keeps: of the updates it was
            made of, of those of folds it was not made of (nan where there is one fold), and of the null's own; means
            over the updates.
        random: what random directions keep of anything, in expectation: k² / (out·in).
        unseen_here: per update, as `unseen` at the reported basis's size; None where there is one fold.
        mean_only: per update the squared cosine with the mean of the other folds' updates, each scaled to norm 1.
        kept: per update what the reported basis keeps of it.
    """

    shape: tuple[int, int]
    size: tuple[int, int]
    spectrum_out: list[float]
    spectrum_in: list[float]
    null_out: list[float]
    null_in: list[float]
    above_out: int
    above_in: int
    k_for_share: int
    ks: list[int]
    seen: list[float]
    unseen: list[float]
    null: list[float]
    random: list[float]
    unseen_here: list[float | None]
    mean_only: list[float | None]
    kept: list[float]


def measure_module(
    updates: Sequence[Factors],
    votes: Sequence[float],
    folds: Sequence[int],
    kept: Sequence[float],
    size: tuple[int, int],
    seed: int,
) -> ModuleFindings:
    """Everything about one module, from its updates (out, in) in factored form; nothing of size out × in is formed.

    Args:
        updates: at least one, none of them zero.
        votes: each one's vote within its shared-seed group.
        folds: each one's fold: it is judged by what is made of the other folds.
        kept: what the reported basis keeps of each, as a share.
        size: its k_out and k_in.
        seed: of the null's random directions.
    """
    out, inner = updates[0].shape
    norms = [update.norm() for update in updates]
    weights = [vote**0.5 / norm for vote, norm in zip(votes, norms, strict=True)]
    draw = torch.Generator().manual_seed(seed)
    noise = [null_update(*update.shape, update.canonical()[1], draw) for update in updates]
    # all that matters lies in what the fleet spans: there the same numbers come out of matrices no larger than its
    # ranks
    Qb = torch.linalg.qr(torch.cat([update.B for update in updates], 1))[0]
    Qa = torch.linalg.qr(torch.cat([update.A.T for update in updates], 1))[0]
    inside = [Factors(Qb.T @ update.B, update.A @ Qa) for update in updates]
    whole, null = exact(inside, weights), exact(noise, weights)
    most = min(len(whole.out.values), len(whole.inner.values))
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < most] + [most]
    seen = [_blocks(whole, update, ks, norm) for update, norm in zip(inside, norms, strict=True)]
    of_null = [_blocks(null, update, ks, norm) for update, norm in zip(noise, norms, strict=True)]
    unseen: list[list[float]] = [[] for _ in updates]
    here: list[float | None] = [None] * len(updates)
    for fold in dict.fromkeys(folds) if len(set(folds)) > 1 else ():
        rest = [i for i, other in enumerate(folds) if other != fold]
        basis = exact([inside[i] for i in rest], [weights[i] for i in rest])
        for i, other in enumerate(folds):
            if other == fold:
                unseen[i] = _blocks(basis, inside[i], ks, norms[i])
                here[i] = _block(_held(basis, inside[i]), *size) / norms[i] ** 2
    sides = [(side.out.values.tolist()[:KEPT], side.inner.values.tolist()[:KEPT]) for side in (whole, null)]
    judged = [curve for curve in unseen if curve]
    return ModuleFindings(
        shape=(out, inner),
        size=size,
        spectrum_out=sides[0][0],
        spectrum_in=sides[0][1],
        null_out=sides[1][0],
        null_in=sides[1][1],
        above_out=_above(whole.out, null.out),
        above_in=_above(whole.inner, null.inner),
        k_for_share=smallest_k(whole, SHARE),
        ks=ks,
        seen=_means(seen),
        unseen=_means(judged) if judged else [float("nan")] * len(ks),
        null=_means(of_null),
        random=[min(k, out) * min(k, inner) / (out * inner) for k in ks],
        unseen_here=here,
        mean_only=_mean_only(inside, norms, folds),
        kept=list(kept),
    )


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else None


def _above(side: Side, null: Side) -> int:
    """How many of a side's eigenvalues are larger than the null's largest, rounding aside."""
    return int((side.values > null.values[0] * (1 + 1e-9)).sum())


def _held(basis: Compressed, update: Factors) -> torch.Tensor:
    """Energy (w_out, w_in) in each leading block of the update's core in a basis's directions."""
    core = (basis.out.Q.T @ update.B) @ (update.A @ basis.inner.Q)
    return core.square().cumsum(0).cumsum(1)


def _block(held: torch.Tensor, k_out: int, k_in: int) -> float:
    return float(held[min(k_out, held.shape[0]) - 1, min(k_in, held.shape[1]) - 1])


def _blocks(basis: Compressed, update: Factors, ks: Sequence[int], norm: float) -> list[float]:
    held = _held(basis, update)
    return [min(1.0, _block(held, k, k) / norm**2) for k in ks]


def _means(curves: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*curves, strict=True)]


def _mean_only(updates: Sequence[Factors], norms: Sequence[float], folds: Sequence[int]) -> list[float | None]:
    B, A = torch.cat([update.B for update in updates], 1), torch.cat([update.A for update in updates], 0)
    ranks = [update.rank for update in updates]
    rows = []
    for update, norm in zip(updates, norms, strict=True):
        products = ((update.B.T @ B) * (update.A @ A.T)).sum(0)
        rows.append(torch.stack([part.sum() for part in products.split(ranks)]) / norm)
    cosines = torch.stack(rows) / torch.tensor(norms, dtype=torch.float64)
    found: list[float | None] = []
    for i, fold in enumerate(folds):
        others = torch.tensor([other != fold for other in folds])
        square = float(cosines[others][:, others].sum()) if others.any() else 0.0
        found.append(min(1.0, float(cosines[i, others].sum()) ** 2 / square) if square > 1e-12 else None)
    return found
