"""What is stored of a module beside its bases: the fleet's mean core, its spread, cores and principal directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..basis import ModuleBasis
from .hosvd import Compressed, Pair


def module_basis(
    pair: Pair,
    compressed: Compressed,
    norms: Sequence[float],
    votes: Sequence[float],
    members: Sequence[int],
    *,
    directions: int,
    fleet_size: int,
    keep_cores: bool,
) -> tuple[ModuleBasis, list[float]]:
    """The module's basis with mean core, RMS, cores and directions, and per member the share of its energy kept.

    Args:
        pair, compressed: the bases and the updates they were found from.
        norms, votes: ‖ΔW‖_F and the vote of every member.
        members: their places among the fleet's sources, of which there are `fleet_size`.
        directions: how many principal axes of the cores to keep.
        keep_cores: whether the cores themselves are stored.
    """
    shape = pair.U.shape[1], pair.V.shape[0]
    weight = torch.tensor(votes, dtype=torch.float64) / sum(votes)
    mean, square = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    kept = [0.0] * len(members)
    every = torch.zeros(len(members), *shape, dtype=torch.float64) if directions or keep_cores else None
    for places, cores in compressed.cores(compressed.scales, pair.u, pair.v):
        mean += torch.einsum("n,noi->oi", weight[places], cores)
        square += torch.einsum("n,noi->oi", weight[places], cores.square())
        for place, energy in zip(places, cores.square().sum((1, 2)).tolist(), strict=True):
            # rounding can bring the share of a source that lies wholly inside a hair above one
            kept[place] = min(1.0, energy / norms[place] ** 2)
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
    """How much of the module's weighted energy is kept, beside the most that bases of these sizes could keep.

    Args:
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
    """The m leading principal axes (uncentred, each source of norm 1) of the cores (N, k_out, k_in), at most N."""
    flat = cores.flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-300) * weight.sqrt()[:, None]
    _, S, axes = torch.linalg.svd(flat, full_matrices=False)
    axes = axes[: max(1, int((1e-6 * S[0] < S).sum()))][:m]
    top = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * torch.where(top < 0, -1.0, 1.0).to(axes.dtype)
    return axes.reshape(-1, *cores.shape[1:]).float().contiguous()
