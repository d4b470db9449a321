"""The strength-matched null: updates with the same singular values in random directions, with nothing in common."""

from __future__ import annotations

import hashlib

import torch

from ..sources.factors import Factors, gram


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
