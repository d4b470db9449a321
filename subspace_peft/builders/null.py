"""The strength-matched null: updates with the same singular values in random directions, with nothing in common."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from ..energy import share_of
from ..sources.factors import Factors, gram
from .hosvd import exact, hosvd


def null_update(out: int, inner: int, strengths: torch.Tensor, generator: torch.Generator) -> Factors:
    """Draw ``P diag(S) Tᵀ`` with random orthonormal P (out, r) and T (in, r), in this order.

    Args:
        out: of the update.
        inner: in of the update.
        strengths: S, its singular values (r,) float64.
        generator: where the directions are drawn from.
    """
    P = _directions(out, len(strengths), generator)
    T = _directions(inner, len(strengths), generator)
    return Factors(P * strengths, T.T.contiguous())


def null_of(updates: Sequence[Factors], seed: int = 0) -> list[Factors]:
    """Draw the null of a module's updates, in their order.

    Args:
        updates: (out, in) each.
        seed: of the random directions.
    """
    draw = torch.Generator().manual_seed(seed)
    return [null_update(*update.shape, update.canonical()[1], draw) for update in updates]


def null_energy(
    updates: Sequence[Factors], weights: Sequence[float], size: tuple[int, int], alternations: int, seed: int = 0
) -> list[float]:
    """Return per update the share that a basis of the null keeps of the update's null, in one module.

    Args:
        updates: the sources' updates of the module.
        weights: one w per update, as for `exact`.
        size: k_out and k_in of the basis of the updates.
        alternations: as for that basis.
        seed: of the random directions.
    """
    noise = null_of(updates, seed)
    compressed = exact(noise, weights)
    pair = hosvd(compressed, *size, alternations)
    assert pair is not None  # only a share of energy can ask for more
    shares = [0.0] * len(updates)
    for places, cores in compressed.cores(compressed.scales, pair.u, pair.v):
        for place, square in zip(places, cores.square().sum((1, 2)).tolist(), strict=True):
            shares[place] = share_of(square, noise[place].norm() ** 2)
    return shares


def generator_for(*what: object) -> torch.Generator:
    """Return a generator seeded by these alone, such as a module's name and a source's place.

    So a module's null is the same whichever process draws it, and whatever was drawn before.
    """
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def strengths_of(B: torch.Tensor, A: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the singular values (r,) float64 of ``scale·B A``, descending, from the r × r Gram matrices.

    With ``BᵀB = L Lᵀ`` they are the square roots of the eigenvalues of ``Lᵀ (A Aᵀ) L``. Squaring halves the digits:
    they are good to 1e-8 of the largest, which is enough for a null, at a fraction of the time of QR.

    Args:
        B: (out, r) in any float dtype.
        A: (r, in) in any float dtype.
        scale: of their product.
    """
    values, vectors = torch.linalg.eigh(gram(B.T))
    root = vectors * values.clamp_min(0).sqrt()
    return torch.linalg.eigvalsh(root.T @ gram(A) @ root).clamp_min(0).sqrt().flip(0) * abs(scale)


def _directions(d: int, r: int, generator: torch.Generator) -> torch.Tensor:
    """Draw orthonormal columns (d, r) float64, uniformly distributed up to signs: QR of a Gaussian matrix."""
    return torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64))[0].contiguous()
