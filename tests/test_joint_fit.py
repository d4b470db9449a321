"""A core and own directions fitted together: exact where they can be, monotone, never worse than the projection's."""

from __future__ import annotations

import pytest
import torch

from subspace_peft.basis import ModuleBasis
from subspace_peft.convert.joint import GAIN, GROWTH, ROUNDS, JointFit, joint_fit
from subspace_peft.convert.residual import residual_of
from subspace_peft.sources import Factors

R = 6
SHAPES = [(48, 40, 8, 8), (40, 48, 8, 5), (12, 40, 8, 8), (10, 9, 6, 6), (24, 24, 24, 24)]  # out, in, k_out, k_in


def turned(rows: torch.Tensor, frame: torch.Tensor, share: float) -> torch.Tensor:
    """Vectors of length 1, as columns, with that share of their squares in the frame's span."""
    inside = frame @ (frame.T @ rows)
    outside = rows - inside
    rest = outside.norm(dim=0)
    if not bool((rest > 1e-9).all()):
        return inside / inside.norm(dim=0)
    return inside / inside.norm(dim=0) * share**0.5 + outside / rest * (1 - share) ** 0.5


def made(shape, share: float, seed: int = 0) -> tuple[ModuleBasis, Factors]:
    """A basis in float64, and a LoRA of rank 6 of which it keeps about share²."""
    out, inside, k_out, k_in = shape
    draw = torch.Generator().manual_seed(seed)
    rand = lambda *size: torch.randn(*size, generator=draw, dtype=torch.float64)  # noqa: E731
    U, V = torch.linalg.qr(rand(out, k_out)).Q, torch.linalg.qr(rand(inside, k_in)).Q
    B, A = turned(rand(out, R), U, share), turned(rand(inside, R), V, share).T
    return ModuleBasis(U, V.T.contiguous()), Factors(B * torch.linspace(1, 0.2, R, dtype=torch.float64), A)


def error(module: ModuleBasis, update: Factors, fit: JointFit) -> float:
    """‖ΔW − U C V − B A‖², of dense matrices."""
    B, A = fit.own
    dense = update.B @ update.A - module.U.double() @ fit.core @ module.V.double() - B @ A
    return float(dense.square().sum())


def alternated(module: ModuleBasis, update: Factors, rank: int, rounds: int) -> float:
    """The same after so many rounds of the alternation with dense matrices, from the projection on."""
    U, V, delta = module.U.double(), module.V.double(), update.B @ update.A
    core = U.T @ delta @ V.T
    for _ in range(rounds):
        P, S, T = torch.linalg.svd(delta - U @ core @ V, full_matrices=False)
        own = (P[:, :rank] * S[:rank]) @ T[:rank]
        core = U.T @ (delta - own) @ V.T
    return float((delta - U @ core @ V - own).square().sum())


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_of_directions(shape, share):
    module, update = made(shape, share)
    total = update.norm() ** 2
    before = total
    for rank in (1, 2, 4, R, R + 3):
        fit = joint_fit(module, update, rank)
        B, A = fit.own
        assert fit.core.shape == (module.k_out, module.k_in) and B.shape == (shape[0], rank)
        assert A.shape == (rank, shape[1]) and float(fit.core.norm()) <= GROWTH * total**0.5 * (1 + 1e-5)
        # what it says is lost, is; no round loses, and the last ones gain little
        assert fit.lost[-1] == pytest.approx(error(module, update, fit), abs=1e-10 * total)
        assert all(new <= old for old, new in zip(fit.lost, fit.lost[1:], strict=False))
        assert len(fit.lost) <= ROUNDS + 1
        assert all(old - new >= GAIN * total for old, new in zip(fit.lost, fit.lost[1:-1], strict=False))
        # never worse than the leading triples beside the projection, nor than the LoRA cut to that rank
        left = residual_of(module, update, module.project((update.B, update.A))).S
        assert fit.lost[-1] <= float(left[rank:].square().sum()) + 1e-9 * total
        assert fit.lost[-1] <= float(update.canonical()[1][rank:].square().sum()) + 1e-9 * total
        assert fit.lost[-1] <= before + 1e-9 * total
        # nor than the alternation with dense matrices, which gains almost nothing more
        assert fit.lost[-1] <= alternated(module, update, rank, 5) + 2e-3 * total
        assert fit.lost[-1] <= alternated(module, update, rank, 60) + 1e-2 * total
        before = fit.lost[-1]
        if rank >= R:
            assert error(module, update, fit) <= 1e-12 * total


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_it_holds_more_than_the_projection_and_its_residual(share):
    module, update = made((48, 48, 8, 8), share)
    left = residual_of(module, update, module.project((update.B, update.A))).S
    for rank in (1, 2, 4):
        gained = float(left[rank:].square().sum()) - joint_fit(module, update, rank).lost[-1]
        assert gained > 0.01 * update.norm() ** 2


@pytest.mark.parametrize("inside", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_core_and_as_many_directions_are_found_again(rank, inside):
    """An update of rank k + φ that φ directions hold; one side of one of them lies in the basis."""
    module, _ = made((48, 40, 8, 8), 0.5)
    U, V = module.U.double(), module.V.double()
    draw = torch.Generator().manual_seed(1)
    rand = lambda *size: torch.randn(*size, generator=draw, dtype=torch.float64)  # noqa: E731
    B, A = turned(rand(48, rank), U, inside), turned(rand(40, rank), V.T, inside).T
    if rank > 1:
        B[:, 0] = U @ (U.T @ rand(48))
    update = Factors(torch.cat([U @ rand(8, 8), B], 1), torch.cat([V, A]))
    fit = joint_fit(module, update, rank)
    assert error(module, update, fit) <= 1e-12 * update.norm() ** 2
    # fewer lose what they must
    if rank > 1:
        assert joint_fit(module, update, 1).lost[-1] > 1e-4 * update.norm() ** 2


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e20])
def test_any_size_of_an_update(scale):
    module, update = made((24, 20, 6, 6), 0.5)
    one = joint_fit(module, update, 2)
    fit = joint_fit(module, Factors(update.B * scale, update.A), 2)
    assert all(bool(torch.isfinite(each).all()) for each in (fit.core, *fit.own))
    torch.testing.assert_close(fit.core, one.core * scale, rtol=1e-6, atol=1e-8 * scale)
    assert fit.lost[-1] == pytest.approx(one.lost[-1] * scale**2, rel=1e-6)


def test_a_core_that_would_cancel_against_the_own_part_is_not_taken():
    """Where the last block is small beside its neighbours the Schur complement is large."""
    U, V = torch.eye(6, 2, dtype=torch.float64), torch.eye(6, 2, dtype=torch.float64).T.contiguous()
    dense = torch.zeros(6, 6, dtype=torch.float64)
    dense[0, 2] = dense[2, 0] = 1
    dense[2, 2] = 0.01
    update = Factors(dense, torch.eye(6, dtype=torch.float64))
    fit = joint_fit(ModuleBasis(U, V), update, 1)
    assert float(fit.core.norm()) <= GROWTH * update.norm() * (1 + 1e-9)
    # two are enough without
    assert joint_fit(ModuleBasis(U, V), update, 2).lost[-1] <= 1e-20


@pytest.mark.parametrize("seed", range(3))
def test_of_equal_fits_the_core_is_the_projection(seed):
    draw = torch.Generator().manual_seed(seed)
    rand = lambda *size: torch.randn(*size, generator=draw, dtype=torch.float64)  # noqa: E731
    left, right = torch.linalg.qr(rand(48, 11)).Q, torch.linalg.qr(rand(40, 11)).Q.T
    module = ModuleBasis(left[:, :8].contiguous(), right[:8].contiguous())
    # one direction inside and three outside: four own ones hold all of it, and three with the projection
    inside, outside = rand(8, 1), rand(3, 3)
    update = Factors(torch.cat([left[:, :8] @ inside, left[:, 8:] @ outside], 1), right[7:])
    fit = joint_fit(module, update, 4)
    assert error(module, update, fit) < 1e-20
    assert torch.allclose(fit.core, module.U.T @ update.B @ update.A @ module.V.T, atol=1e-10)
    assert float(fit.core.norm()) == pytest.approx(float(inside.norm()))
    assert float(fit.own[0].norm()) == pytest.approx(float(outside.norm()))
