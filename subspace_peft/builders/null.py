"""What updates would look like if they had nothing in common: the same singular values in random directions (a
strength-matched null)."""

from __future__ import annotations

import hashlib

import torch

from ..sources.factors import Factors, gram


def null_update(out: int, inner: int, strengths: torch.Tensor, generator: torch.Generator) -> Factors:
    """``P diag(S) Tᵀ`` with random orthonormal P (out, r) and T (in, r), drawn in this order.

    Args:
        out, inner: of the update.
        strengths: its singular values (r,) float64.
        generator: where the directions are drawn from.
    """
    P = _directions(out, len(strengths), generator)
    T = _directions(inner, len(strengths), generator)
    return Factors(P * strengths, T.T.contiguous())


def generator_for(*what: object) -> torch.Generator:
    """A generator that depends on these alone, such as a module's name and a source's place."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def strengths_of(B: torch.Tensor, A: torch.Tensor, scale: float) -> torch.Tensor:
    """The singular values (r,) float64 of ``scale·B A``, from the r × r Gram matrices: good to 1e-8 of the largest.

    Args:
        B: (out, r) in any float dtype.
        A: (r, in) in any float dtype.
        scale: of their product.
    """
    values, vectors = torch.linalg.eigh(gram(B.T))
    root = vectors * values.clamp_min(0).sqrt()
    return torch.linalg.eigvalsh(root.T @ gram(A) @ root).clamp_min(0).sqrt().flip(0) * abs(scale)


def _directions(d: int, r: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64))[0].contiguous()
