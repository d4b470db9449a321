"""Modules' bases without a fleet: the controls beside which a fleet's basis has to show its worth."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from .module import ModuleBasis, fix_signs


def random_module(name: str, out_features: int, in_features: int, k_out: int, k_in: int, seed: int) -> ModuleBasis:
    """Return a basis of Gaussian directions, orthonormalised: uniform among all subspaces.

    U and V are float32, and a function of the arguments alone.

    Args:
        name: the module's name; modules of one shape get different directions.
        out_features: rows of the module's weight.
        in_features: columns of the module's weight.
        k_out: output directions, at most `out_features`.
        k_in: input directions, at most `in_features`.
        seed: another seed gives other directions.
    """
    U = gaussian(f"{seed}/{name}/U", out_features, min(k_out, out_features))
    V = gaussian(f"{seed}/{name}/V", in_features, min(k_in, in_features))
    return ModuleBasis(U=U, V=V.T.contiguous())


def with_random_directions(name: str, module: ModuleBasis, m: int, seed: int) -> ModuleBasis:
    """Return `module` with m random orthonormal directions G (m, k_out, k_in) for the `directions` coefficients.

    NOLA (arXiv 2310.02556) and TinyLoRA train the coordinates of random directions, here within a basis. There are at
    most k_out · k_in of them.
    """
    size = module.k_out * module.k_in
    G = gaussian(f"{seed}/{name}/G", size, min(m, size)).T.reshape(-1, module.k_out, module.k_in).contiguous()
    return replace(module, G=G)


def gaussian(key: str, d: int, k: int) -> torch.Tensor:
    """Return (d, k) float32 with random orthonormal columns, a function of `key` and the sizes."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
    # QR of a Gaussian matrix: its columns span a subspace that is uniform among those of dimension k
    directions = torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]
    return fix_signs(directions).float().contiguous()


def base_weight_module(weight: torch.Tensor, k: int) -> ModuleBasis:
    """Return the basis of the top k singular vectors of a base weight (out, in), float32.

    LoRA-XS (arXiv 2405.17604) freezes these, with the singular values multiplied into the output side; here both sides
    are orthonormal.
    """
    P, _, Th = torch.linalg.svd(weight.detach().double().cpu(), full_matrices=False)
    k = min(k, P.shape[1])
    return ModuleBasis(U=fix_signs(P[:, :k]).float().contiguous(), V=fix_signs(Th[:k].T).T.float().contiguous())
