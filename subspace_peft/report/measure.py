"""Measure one module of a fleet: spectra beside a strength-matched null, and the energy that bases keep.

Bases are truncated HOSVDs, whose k × k blocks for every k are leading blocks of one core: with U, V of all directions
and ``C = Uᵀ ΔW Vᵀ``, a basis of a × b directions keeps ``Σ_{i≤a, j≤b} C_ij²`` of ‖ΔW‖². All is float64, on matrices no
larger than the sum of the ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..builders.hosvd import Compressed, Side, exact, smallest_k
from ..builders.left_out import left_out_energy
from ..builders.null import null_energy, null_of
from ..energy import FAITHFUL
from ..sources.factors import Factors, in_common_span
from .curves import WORK, Shares, UpdateCurves, alternated, largest, runs, truncated

KEPT = 128  # leading eigenvalues that are reported


@dataclass(frozen=True)
class ModuleFindings:
    """The findings of one module of a fleet.

    Attributes:
        shape: out, in.
        size: k_out, k_in of the reported basis.
        spectrum_out: leading eigenvalues of Σ w² ΔW ΔWᵀ, as shares of the fleet's energy.
        spectrum_in: the same of Σ w² ΔWᵀ ΔW.
        null_out: as `spectrum_out`, of updates of equal singular values in random directions.
        null_in: as `spectrum_in`, of those.
        above_out: how many eigenvalues of the output side are larger than the null's largest.
        above_in: the same of the input side.
        k_for_share: directions per side that keep `energy.FAITHFUL` of the fleet's energy.
        ks: sizes of the curves.
        seen: per k the energy that the truncated HOSVD keeps of the updates it was made of; mean over the updates.
        left_out: the same, of the updates of folds it was not made of; nan where there is one fold.
        null: the same, of the null's own updates.
        random: what random directions keep of any update, in expectation: k² / (out·in).
        left_out_here: per update, what a basis of the other folds keeps of it that has the reported basis's size and
            was refined by as many alternations; None where there is one fold.
        mean_only: per update the squared cosine with the mean of the other folds' updates, each scaled to norm 1.
        kept: per update what the reported basis keeps of it.
        null_here: per update, what a basis of the null keeps of its null, at that size and refined alike.
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
    left_out: list[float]
    null: list[float]
    random: list[float]
    left_out_here: list[float | None]
    mean_only: list[float | None]
    kept: list[float]
    null_here: list[float] = field(default_factory=list)

    @property
    def unseen(self) -> list[float]:
        """The old name of `left_out`."""
        _warn_renamed("unseen", "left_out")
        return self.left_out

    @property
    def unseen_here(self) -> list[float | None]:
        """The old name of `left_out_here`."""
        _warn_renamed("unseen_here", "left_out_here")
        return self.left_out_here


def measure(
    updates: Sequence[Factors],
    source_weights: Sequence[float],
    folds: Sequence[int],
    kept: Sequence[float],
    size: tuple[int, int],
    seed: int,
    alternations: int = 0,
    work: float = WORK,
) -> tuple[ModuleFindings, UpdateCurves]:
    """Measure one module from its updates (out, in) in factored form; nothing of size out × in is formed.

    Args:
        updates: at least one, none of them zero.
        source_weights: how much each counts within its shared-seed group.
        folds: each one's fold: it is judged by what is made of the other folds.
        kept: the share of each that the reported basis keeps.
        size: that basis's k_out and k_in.
        seed: of the null's random directions.
        alternations: of the reported basis.
        work: what running them at several k may cost, see `curves.WORK`.

    Returns:
        The findings, whose curves are of truncated HOSVDs; and curves of every k, with alternations.
    """
    out, inner = updates[0].shape
    norms = [update.norm() for update in updates]
    # every update counts as of norm 1, as in a basis of equal weights
    weights = [count**0.5 / norm for count, norm in zip(source_weights, norms, strict=True)]
    noise = null_of(updates, seed)
    # the null is not moved into a span: its directions are the point of it
    inside = in_common_span(updates)
    whole, null = exact(inside, weights), exact(noise, weights)
    most, own = largest(whole), max(size)
    ks = _sizes(min(len(whole.out.values), len(whole.inner.values)))
    longest = max(most, *ks)
    seen = truncated(whole, inside, norms, longest)
    noisy = truncated(null, noise, norms, longest)
    left_out, here, known = _of_left_out(inside, norms, weights, folds, longest, own, alternations, work)
    count = runs([_widths(whole), _widths(null)], work)
    turned, ran = alternated(whole, inside, norms, seen[:, :most], own, alternations, count)
    # of as many directions on both sides the curves have what a basis of this size keeps
    null_here, ran_null = alternated(null, noise, norms, noisy[:, :most], own, alternations, count)
    known += [(ran, _widths(whole)), (ran_null, _widths(null))]
    square = size[0] == size[1] <= most
    curves = UpdateCurves(
        _widths(whole),
        seen[:, :most],
        turned,
        None if here is None else here[:, :most],
        null_here,
        # all that a basis spans cannot be turned
        [k for k in range(1, max(_widths(whole))) if all(k in at or k >= max(widths) for at, widths in known)],
    )
    findings = ModuleFindings(
        shape=(out, inner),
        size=size,
        spectrum_out=whole.out.values.tolist()[:KEPT],
        spectrum_in=whole.inner.values.tolist()[:KEPT],
        null_out=null.out.values.tolist()[:KEPT],
        null_in=null.inner.values.tolist()[:KEPT],
        above_out=_above(whole.out, null.out),
        above_in=_above(whole.inner, null.inner),
        k_for_share=smallest_k(whole, FAITHFUL),
        ks=ks,
        seen=_at(seen, ks),
        left_out=[float("nan")] * len(ks) if left_out is None else _at(left_out, ks),
        null=_at(noisy, ks),
        random=[min(k, out) * min(k, inner) / (out * inner) for k in ks],
        left_out_here=_column(here, own)
        if square and here is not None
        else left_out_energy(updates, weights, folds, size, alternations),
        mean_only=_mean_only(inside, norms, folds),
        kept=list(kept),
        null_here=_column(null_here, own) if square else null_energy(updates, weights, size, alternations, seed),
    )
    return findings, curves


def _sizes(most: int) -> list[int]:
    """Return the sizes of the curves: powers of two, and all directions there are."""
    return [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < most] + [most]


def _of_left_out(
    updates: Sequence[Factors],
    norms: Sequence[float],
    weights: Sequence[float],
    folds: Sequence[int],
    most: int,
    own: int,
    rounds: int,
    work: float,
) -> tuple[Shares | None, Shares | None, list[tuple[list[int], tuple[int, int]]]]:
    """Return what bases of the other folds keep of each fold's updates, without alternations and with them.

    And per basis at which k these were run, and its widths. None, None and no basis where there is one fold only.
    """
    if len(set(folds)) < 2:
        return None, None, []
    known = []
    plain, turned = (torch.zeros(len(updates), most, dtype=torch.float64) for _ in range(2))
    bases = {}
    for fold in dict.fromkeys(folds):
        rest = [i for i, other in enumerate(folds) if other != fold]
        bases[fold] = exact([updates[i] for i in rest], [weights[i] for i in rest])
    count = runs([_widths(basis) for basis in bases.values()], work)
    for fold, basis in bases.items():
        own_places = [i for i, other in enumerate(folds) if other == fold]
        some, lengths = [updates[i] for i in own_places], [norms[i] for i in own_places]
        plain[own_places] = curve = truncated(basis, some, lengths, most)
        turned[own_places], ran = alternated(basis, some, lengths, curve, own, rounds, count)
        known.append((ran, _widths(basis)))
    return plain, turned, known


def _widths(basis: Compressed) -> tuple[int, int]:
    return basis.out.Q.shape[1], basis.inner.Q.shape[1]


def _column(curve: Shares, k: int) -> list[float]:
    return curve[:, k - 1].tolist()


def _at(curve: Shares, ks: Sequence[int]) -> list[float]:
    """Return the means over updates at a few k."""
    return curve[:, [k - 1 for k in ks]].mean(0).tolist()


def _above(side: Side, null: Side) -> int:
    """Return how many of a side's eigenvalues are larger than the null's largest, rounding aside."""
    return int((side.values > null.values[0] * (1 + 1e-9)).sum())


def _mean_only(updates: Sequence[Factors], norms: Sequence[float], folds: Sequence[int]) -> list[float | None]:
    """Return per update its squared cosine with the mean of the other folds' updates, each of norm 1.

    With c_ij the cosines between the updates and O the others of update i, that is ``(Σ_{j∈O} c_ij)² / Σ_{j,l∈O}
    c_jl``: the best multiple of their mean keeps so much of its energy. None where there are no others, or their mean
    vanishes.
    """
    B, A = torch.cat([update.B for update in updates], 1), torch.cat([update.A for update in updates], 0)
    ranks = [update.rank for update in updates]
    rows = []
    for update, norm in zip(updates, norms, strict=True):
        # ⟨ΔW_i, ΔW_j⟩ = Σ B_iᵀB_j ∘ A_i A_jᵀ, for all j at once
        products = ((update.B.T @ B) * (update.A @ A.T)).sum(0)
        rows.append(torch.stack([part.sum() for part in products.split(ranks)]) / norm)
    cosines = torch.stack(rows) / torch.tensor(norms, dtype=torch.float64)
    found: list[float | None] = []
    for i, fold in enumerate(folds):
        others = torch.tensor([other != fold for other in folds])
        square = float(cosines[others][:, others].sum()) if others.any() else 0.0
        found.append(min(1.0, float(cosines[i, others].sum()) ** 2 / square) if square > 1e-12 else None)
    return found


def _warn_renamed(old: str, new: str) -> None:
    message = f"ModuleFindings.{old} is now called {new}; the old name will go."
    warnings.warn(message, FutureWarning, stacklevel=3)
