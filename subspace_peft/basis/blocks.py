"""An update beside a basis as a small matrix of four blocks: a core may be anything in the first."""

from __future__ import annotations

from typing import NamedTuple

import torch

STEADY = 1e-4  # of an update's norm: dividing by a shorter one would cost float32's last digits


class Blocks(NamedTuple):
    """An update ``U core V + B A`` in orthonormal bases of ``[U, B]`` and ``[V; A]``.

    Attributes:
        left: (out, m) float64, whose first k_out columns span U's.
        right: (in, n) float64, whose first k_in columns span V's rows.
        R_left: (m, k_out + r) with ``left R_left = [U, B]``.
        R_right: (n, k_in + r) with ``right R_right = [V; A]ᵀ``.
        small: (m, n), the update in these bases.
        k_out: Directions of U.
        k_in: Directions of V.
    """

    left: torch.Tensor
    right: torch.Tensor
    R_left: torch.Tensor
    R_right: torch.Tensor
    small: torch.Tensor
    k_out: int
    k_in: int

    def core(self, first: torch.Tensor) -> torch.Tensor:
        """Return the core C (k_out, k_in) for which ``U C V`` is a first block."""
        half = torch.linalg.solve_triangular(self.R_left[: self.k_out, : self.k_out], first, upper=True)
        return torch.linalg.solve_triangular(self.R_right[: self.k_in, : self.k_in], half.T, upper=True).T

    def own(self, rest: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(B, A)``, (out, r) and (r, in), of the best approximation of a small matrix by this rank."""
        P, S, T = torch.linalg.svd(rest, full_matrices=False)
        return (self.left @ P[:, :rank]) * S[:rank], T[:rank] @ self.right.T

    def completed(self, small: torch.Tensor, rank: int | None = None) -> torch.Tensor:
        """Return a small matrix with the first block that the rest of it asks for (Schur complement).

        Its rank is the least that the three other blocks allow: one for each rank of the last, or two where the last
        lacks it.

        Args:
            small: (m, n).
            rank: Directions of the last block that count at most; None for all.
        """
        k_out, k_in = self.k_out, self.k_in
        P, S, T = torch.linalg.svd(small[k_out:, k_in:], full_matrices=False)
        largest = torch.linalg.matrix_norm(small, 2)
        kept = int((S[:rank] > STEADY * largest).sum())
        found = small.clone()
        found[:k_out, :k_in] = (small[:k_out, k_in:] @ T[:kept].T / S[:kept]) @ (P[:, :kept].T @ small[k_out:, :k_in])
        return found


def blocks_of(
    U: torch.Tensor, V: torch.Tensor, B: torch.Tensor, A: torch.Tensor, core: torch.Tensor | None = None
) -> Blocks:
    """Return ``U core V + B A`` as blocks: thin QR of both stacks. Nothing of size out × in is formed.

    Args:
        U: (out, k_out), orthonormal columns.
        V: (k_in, in), orthonormal rows.
        B: (out, r).
        A: (r, in).
        core: (k_out, k_in); None for zero.
    """
    core = U.new_zeros(U.shape[1], V.shape[0]) if core is None else core
    left, R_left = torch.linalg.qr(torch.cat([U.double(), B.double()], 1))
    right, R_right = torch.linalg.qr(torch.cat([V.double(), A.double()]).T)
    middle = torch.block_diag(core.double(), torch.eye(B.shape[1], dtype=torch.float64, device=B.device))
    return Blocks(left, right, R_left, R_right, R_left @ middle @ R_right.T, U.shape[1], V.shape[0])
