"""The statistics stored of a module beside its bases: mean core, spread, sources' cores, principal directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..basis import ModuleBasis
from ..energy import share_of
from .hosvd import Compressed, Pair


def module_basis(
    pair: Pair,
    compressed: Compressed,
    norms: Sequence[float],
    source_weights: Sequence[float],
    members: Sequence[int],
    *,
    directions: int,
    fleet_size: int,
    keep_cores: bool,
) -> tuple[ModuleBasis, list[float]]:
    """Return the module's basis with mean core, RMS, cores and directions, and per member the share of energy kept.

    With ``C_i = Uᵀ ΔW_i Vᵀ``, in units of ΔW, and p_i the members' weights, which add up to one, the mean core is
    ``M = Σ p_i C_i`` and ``core_rms² = Σ p_i C_i²`` entry by entry. Sums are float64, what is stored float32.

    Args:
        pair: the bases.
        compressed: the updates that they were found from.
        norms: ‖ΔW‖_F of every member.
        source_weights: how much each counts within its shared-seed group.
        members: their places among the fleet's sources.
        directions: how many principal axes of the cores to keep.
        fleet_size: how many sources the fleet has; of those that do not adapt the module the stored cores are zero.
        keep_cores: whether the cores themselves are stored.
    """
    shape = pair.U.shape[1], pair.V.shape[0]
    weight = torch.tensor(source_weights, dtype=torch.float64) / sum(source_weights)
    mean, square = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    kept = [0.0] * len(members)
    every = torch.zeros(len(members), *shape, dtype=torch.float64) if directions or keep_cores else None
    for places, cores in compressed.cores(compressed.scales, pair.u, pair.v):
        mean += torch.einsum("n,noi->oi", weight[places], cores)
        square += torch.einsum("n,noi->oi", weight[places], cores.square())
        for place, energy in zip(places, cores.square().sum((1, 2)).tolist(), strict=True):
            kept[place] = share_of(energy, norms[place] ** 2)
        if every is not None:
            every[places] = cores
    stored = None
    if keep_cores and every is not None:
        stored = torch.zeros(fleet_size, *shape)
        stored[list(members)] = every.float()
    module = ModuleBasis(
        U=pair.U,
        V=pair.V,
        M=mean.float(),
        G=_principal_cores(every, weight, directions) if directions and every is not None else None,
        core_rms=square.sqrt().float(),
        cores=stored,
        spectrum_out=compressed.out.values.float(),
        spectrum_in=compressed.inner.values.float(),
    )
    return module, kept


def certificate(pair: Pair, compressed: Compressed, both: bool) -> dict[str, object]:
    """Return how much of the module's weighted energy is kept, beside the most that bases of these sizes could keep.

    U and V together keep no more than either side's leading directions hold alone, so the smaller of both sides'
    bounds is one for the pair.

    Args:
        pair: the bases.
        compressed: the updates that they were found from.
        both: whether what each side holds bounds what both hold together, as it does where both see the updates.

    Returns:
        ``numerics``: exact or streamed; ``passes`` over the stack; ``kept`` by U and V together, and ``at_most``: no U
        and V of these sizes keep more; ``out`` and ``in``: per side ``[held, at_most]`` of the leading directions
        alone.
    """
    sides, sizes = (compressed.out, compressed.inner), (pair.U.shape[1], pair.V.shape[0])
    held = [min(1.0, float(side.values[:k].sum())) for side, k in zip(sides, sizes, strict=True)]
    # rounding can put a bound a hair below what is held
    most = [max(h, side.reach(k)) for h, side, k in zip(held, sides, sizes, strict=True)]
    return {
        "numerics": "streamed" if compressed.passes else "exact",
        "passes": compressed.passes,
        "kept": pair.kept,
        **({"at_most": min(most)} if both else {}),
        "out": [held[0], most[0]],
        "in": [held[1], most[1]],
    }


def _principal_cores(cores: torch.Tensor, weight: torch.Tensor, m: int) -> torch.Tensor:
    """Return the m leading principal axes of the cores, at most N: the direction tensors G (m, k_out, k_in) float32.

    They are the right singular vectors of the flattened cores, uncentred, each of norm 1 times the root of its weight.
    Axes whose singular value is 1e-6 of the largest or less are float32's rounding.

    Args:
        cores: (N, k_out, k_in) float64.
        weight: (N,) float64.
        m: how many.
    """
    flat = cores.flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-300) * weight.sqrt()[:, None]
    _, S, axes = torch.linalg.svd(flat, full_matrices=False)
    axes = axes[: max(1, int((1e-6 * S[0] < S).sum()))][:m]
    # the sign of a singular vector is arbitrary: the largest entry is made positive, so that bytes repeat
    top = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * torch.where(top < 0, -1.0, 1.0).to(axes.dtype)
    return axes.reshape(-1, *cores.shape[1:]).float().contiguous()
