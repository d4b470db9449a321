"""Bases that need no fleet: the two controls that every claim about a fleet's basis needs."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from .module import ModuleBasis, fix_signs


def random_module(name: str, out_features: int, in_features: int, k_out: int, k_in: int, seed: int) -> ModuleBasis:
    """Zero-mean Gaussian directions, orthonormalised; a function of `seed`, the module's name and the shapes only."""
    U = gaussian(f"{seed}/{name}/U", out_features, min(k_out, out_features))
    V = gaussian(f"{seed}/{name}/V", in_features, min(k_in, in_features))
    return ModuleBasis(U=U, V=V.T.contiguous())


def with_random_directions(name: str, module: ModuleBasis, m: int, seed: int) -> ModuleBasis:
    """The same basis with m random orthonormal directions G: NOLA's and TinyLoRA's idea, in this basis."""
    size = module.k_out * module.k_in
    G = gaussian(f"{seed}/{name}/G", size, min(m, size)).T.reshape(-1, module.k_out, module.k_in).contiguous()
    return replace(module, G=G)


def gaussian(key: str, d: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
    return (
        fix_signs(torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]).float().contiguous()
    )


def base_weight_module(weight: torch.Tensor, k: int) -> ModuleBasis:
    """Top singular vectors of a base weight (out, in), as in LoRA-XS (arXiv 2405.17604) without its singular
    values."""
    P, _, Th = torch.linalg.svd(weight.detach().double().cpu(), full_matrices=False)
    k = min(k, P.shape[1])
    return ModuleBasis(U=fix_signs(P[:, :k]).float().contiguous(), V=fix_signs(Th[:k].T).T.float().contiguous())
