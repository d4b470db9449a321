"""The report's alternations go through a module's updates in pieces of equal rank, and find what the builder's do."""

from __future__ import annotations

import pytest
import torch

from subspace_peft.builders.hosvd import alternate, exact
from subspace_peft.report.stacked import by_rank, stacked
from subspace_peft.sources.factors import Factors

RANKS = (2, 3, 2, 5, 3, 2)


def updates() -> list[Factors]:
    numbers = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=numbers, dtype=torch.float64)

    return [Factors(normal(30, rank), normal(rank, 25)) for rank in RANKS]


def test_updates_of_equal_rank_are_one_piece():
    basis = exact(updates(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    pieces = stacked(basis).parts
    assert [places for places, _, _ in pieces] == [[0, 2, 5], [1, 4], [3]]
    for places, left, right in pieces:
        for i, L, T in zip(places, left, right, strict=True):
            assert torch.equal(L, basis.parts[i][1][0]) and torch.equal(T, basis.parts[i][2][0])
    assert by_rank([]) == []


@pytest.mark.parametrize("k", [1, 4, 12])  # of fewer directions than the updates' ranks, and of more
def test_alternations_are_the_builders(k):
    basis = exact(updates(), [1.0, 0.5, 2.0, 1.0, 1.0, 3.0])
    start = [torch.eye(side.Q.shape[1], k, dtype=torch.float64) for side in (basis.out, basis.inner)]
    pieces = stacked(basis)
    for one, other in zip(alternate(basis, *start, 10), alternate(pieces, *start, 10), strict=True):
        assert torch.allclose(one @ one.T, other @ other.T, atol=1e-8)


def test_nothing_wider_than_the_updates_ranks_is_formed():
    basis = stacked(exact(updates(), [1.0] * len(RANKS)))
    u, v = (torch.eye(side.Q.shape[1], 15, dtype=torch.float64) for side in (basis.out, basis.inner))
    assert [cores.shape[2] for _, cores in basis.cores(basis.weights, None, v)] == [2, 3, 5]
    assert [cores.shape[1] for _, cores in basis.cores(basis.weights, u, None)] == [2, 3, 5]
    # of one direction an eigenproblem as wide as the subspace is not solved
    values, _ = basis.moment(u, v[:, :1], output=True)
    assert len(values) == len(RANKS)
