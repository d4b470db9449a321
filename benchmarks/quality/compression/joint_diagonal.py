"""Joint diagonalisation of a collection of LoRAs (Brüel-Gabrielsson et al., Compress then Serve, arXiv 2407.00066).

Both minimise Σ_i ‖ΔW_i − U Σ_i Vᵀ‖² over updates of norm 1; in JD-Full U and V are orthonormal and Σ_i is any matrix,
in JD-Diag U and V are free and Σ_i is diagonal. All of it is done in coordinates of what the fleet spans, where
nothing is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from subspace_peft.sources.factors import in_common_span

from .members import Fleet
from .storing import Stored, Tensors, Updates, restore, store

FULL_ROUNDS, DIAGONAL_ROUNDS = 10, 100  # as published


@dataclass(frozen=True, eq=False)
class _Stack:
    """A module's updates in orthonormal coordinates of their common span.

    Attributes:
        Q: (out, d) and (in, d'), orthonormal columns.
        updates: (N, d, d') float64, each of norm 1.
        norms: (N,) of the updates.
    """

    Q: tuple[torch.Tensor, torch.Tensor]
    updates: torch.Tensor
    norms: torch.Tensor


def full(fleet: Fleet, k: int, kind: str = "float32") -> Stored:
    """Store JD-Full's U, V and Σ_i, from a random start and in so many rounds as published.

    The basis that `build_basis` makes has the same objective, from another start and until it rises no more.
    """
    shared: Tensors = {}
    tasks: dict[str, Tensors] = {name: {} for name in fleet.names}
    for module in fleet.factors(fleet.names[0]):
        stack = _stack(fleet, module)
        X, generator = stack.updates, torch.Generator().manual_seed(0)
        size = min(k, *X.shape[1:])
        V = torch.linalg.qr(torch.randn(X.shape[2], size, generator=generator, dtype=X.dtype))[0]
        for _ in range(FULL_ROUNDS):
            U = _leading(X @ V, size)
            V = _leading(X.mT @ U, size)
        shared |= store(f"{module}.U", (stack.Q[0] @ U).T, kind) | store(f"{module}.V", (stack.Q[1] @ V).T, kind)
        for name, norm, update in zip(fleet.names, stack.norms, X, strict=True):
            tasks[name] |= store(f"{module}.core", norm * (U.T @ update @ V), kind)
    return Stored(shared, tasks, _product)


def diagonal(fleet: Fleet, k: int, kind: str = "float32") -> Stored:
    """Store JD-Diag's U, V and σ_i, by alternating least squares from the leading directions of both sides."""
    shared: Tensors = {}
    tasks: dict[str, Tensors] = {name: {} for name in fleet.names}
    for module in fleet.factors(fleet.names[0]):
        stack = _stack(fleet, module)
        X = stack.updates
        size = min(k, *X.shape[1:])
        U, V = _leading(X, size), _leading(X.mT, size)
        for _ in range(DIAGONAL_ROUNDS):
            # (N, k), (d, k) and (d', k): each the least-squares optimum for the other two
            sigma = torch.einsum("nij,ik,jk->nk", X, U, V) @ _inverse((U.T @ U) * (V.T @ V))
            U = torch.einsum("nij,nk,jk->ik", X, sigma, V) @ _inverse((sigma.T @ sigma) * (V.T @ V))
            V = torch.einsum("nij,nk,ik->jk", X, sigma, U) @ _inverse((sigma.T @ sigma) * (U.T @ U))
            U, V = (side / side.norm(dim=0).clamp_min(1e-300) for side in (U, V))
        sigma = torch.einsum("nij,ik,jk->nk", X, U, V) @ _inverse((U.T @ U) * (V.T @ V))
        shared |= store(f"{module}.U", (stack.Q[0] @ U).T, kind) | store(f"{module}.V", (stack.Q[1] @ V).T, kind)
        for name, norm, values in zip(fleet.names, stack.norms, sigma, strict=True):
            tasks[name] |= store(f"{module}.diagonal", (norm * values)[None], kind)
    return Stored(shared, tasks, _product)


def _stack(fleet: Fleet, module: str) -> _Stack:
    factors = [fleet.factors(name)[module] for name in fleet.names]
    seen = in_common_span(factors)
    # the coordinates are those of the thin QR that `in_common_span` makes
    Q = (torch.linalg.qr(torch.cat([each.B for each in factors], 1))[0],)
    Q += (torch.linalg.qr(torch.cat([each.A.T for each in factors], 1))[0],)
    updates = torch.stack([each.B @ each.A for each in seen])
    norms = updates.flatten(1).norm(dim=1)
    return _Stack(Q, updates / norms.clamp_min(1e-300)[:, None, None], norms)


def _leading(parts: torch.Tensor, k: int) -> torch.Tensor:
    """Return the k leading left singular vectors (d, k) of the parts (N, d, m) side by side."""
    return torch.linalg.eigh(torch.einsum("nij,nkj->ik", parts, parts))[1].flip(1)[:, :k]


def _inverse(gram: torch.Tensor) -> torch.Tensor:
    return torch.linalg.pinv(gram, hermitian=True, rtol=1e-10)


def _product(shared: Tensors, own: Tensors) -> Updates:
    found = {}
    for key in shared:
        if key.endswith(".U"):
            module = key.removesuffix(".U")
            U, V = restore(shared, key).T, restore(shared, f"{module}.V")
            diagonal = f"{module}.diagonal" in own
            found[module] = (
                (U * restore(own, f"{module}.diagonal")) @ V if diagonal else U @ restore(own, f"{module}.core") @ V
            )
    return found
