"""Bases that the package does not build."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality.bases import (
    centred,
    completed,
    from_activation_metric,
    hybrid,
    input_roots,
    one_sided,
    preconditioned,
    scaled_inputs,
    shared_inputs,
)
from benchmarks.quality.fleet import require_left_out
from benchmarks.quality.training import make_model
from subspace_peft import build_basis

from .conftest import D, orthonormal, top_of, toy


def test_a_hybrid_keeps_the_fleets_leading_half_and_is_orthonormal(bench):
    fleet, base = bench.basis("one", k=8), bench.control("base-weights", "one", 8)
    for name, module in hybrid(fleet, base, 8).items():
        assert torch.equal(module.U[:, :4], fleet[name].U[:, :4]) and torch.equal(module.V[:4], fleet[name].V[:4])
        assert orthonormal(module.U) and orthonormal(module.V.T) and module.U.shape[1] == 8
        both = torch.cat([fleet[name].U[:, :4], base[name].U], 1)
        assert torch.linalg.matrix_rank(torch.cat([both, module.U], 1)) == torch.linalg.matrix_rank(both)


def test_completing_needs_enough_directions():
    first = torch.linalg.qr(torch.randn(6, 2))[0]
    with pytest.raises(ValueError, match="2 directions, 3 wanted"):
        completed(first, first.flip(1), 3)


def test_sides_are_taken_from_where_they_are_said_to_be(bench):
    fleet, random = bench.basis("one", k=4), bench.control("random", "one", 4)
    mixed = one_sided(random, fleet)
    for name in fleet:
        assert torch.equal(mixed[name].U, random[name].U) and torch.equal(mixed[name].V, fleet[name].V)
    assert require_left_out(mixed, bench.source("one")) is mixed


def test_preconditioning_moves_entries_in_proportion_to_the_fleets_use(bench):
    fleet = bench.basis("one", k=4)
    entries, sides = preconditioned(fleet, "rms"), preconditioned(fleet, "sides")
    for name, module in fleet.items():
        total = entries[name].G.sum(0)
        assert total.square().mean() == pytest.approx(1.0, abs=1e-4)
        assert torch.allclose(total / total.norm(), module.core_rms / module.core_rms.norm(), atol=1e-5)
        assert torch.allclose(sides[name].U / sides[name].U.norm(dim=0), module.U, atol=1e-5)
        assert sides[name].U.norm(dim=0).square().mean() == pytest.approx(1.0, abs=1e-4)


def test_the_activation_metric_of_white_inputs_changes_nothing(bench):
    fleet = bench.basis("one", k=4)
    roots = {name: torch.eye(D, dtype=torch.float64) for name in fleet}
    for back in ("as-is", "inverse", "forward"):
        for name, module in from_activation_metric(fleet, roots, back).items():
            assert torch.allclose((module.V @ fleet[name].V.T).abs(), torch.eye(4), atol=1e-5)


def test_roots_are_those_of_the_inputs_second_moment(bench):
    task = toy("one")
    model = make_model(top_of(), 2, 0)
    split = task.splits["train"]
    known = input_roots(model, [(split.hidden, split.lengths)], ridge=0.0)
    real = split.hidden[torch.arange(6) < split.lengths[:, None]].double()
    moment = real.T @ real
    root = known["layer.0.query"]["root"]
    assert torch.allclose(root @ root, moment / moment.diagonal().mean(), atol=1e-6)
    state = {"base_model.model.layer.0.query.lora_A.weight": torch.randn(2, D)}
    scaled = scaled_inputs(state, {"layer.0.query": root})
    assert torch.allclose(next(iter(scaled.values())), (next(iter(state.values())).double() @ root).float())


def dense_fleet(n=5, out=8, inner=6):
    draw = torch.Generator().manual_seed(0)
    names = [f"layers.0.attention.{side}" for side in ("query", "value")]
    return {name: [torch.randn(out, inner, generator=draw, dtype=torch.float64) for _ in range(n)] for name in names}


def basis_of(updates, k=3):
    count = len(next(iter(updates.values())))
    states: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for name, each in updates.items():
        for state, update in zip(states, each, strict=True):
            state[f"{name}.lora_B.weight"] = update
            state[f"{name}.lora_A.weight"] = torch.eye(update.shape[1], dtype=torch.float64)
    # identical A's are one shared-seed group, which changes nothing where all are in it
    return build_basis(states, k=k, alternations=0, progress=False)


def same_span(a, b):
    cosines = torch.linalg.svdvals(a.double() @ b.double().T)
    torch.testing.assert_close(cosines, torch.ones(len(a), dtype=torch.float64), atol=1e-5, rtol=0)


def test_one_v_per_layer_is_that_of_both_modules_together():
    updates = dense_fleet()
    basis = basis_of(updates)
    found = shared_inputs(basis, updates)
    query, value = found.values()
    assert torch.equal(query.V, value.V)
    for name in basis:
        assert torch.equal(found[name].U, basis[name].U)
    rows = torch.cat([d / d.norm() for each in updates.values() for d in each])
    same_span(query.V, torch.linalg.svd(rows)[2][:3])


def test_centring_of_updates_without_a_mean_changes_nothing():
    updates = dense_fleet()
    # each beside its negative: the mean is zero
    updates = {name: [*each, *(-d for d in each)] for name, each in updates.items()}
    basis = basis_of({name: each[:5] for name, each in updates.items()})
    found = centred(basis, updates)
    for name in basis:
        same_span(found[name].V, basis[name].V)
        same_span(found[name].U.T, basis[name].U.T)
    # a mean that outweighs all else is gone
    common = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shifted = {name: [d + 5 * common for d in each] for name, each in updates.items()}
    first = centred(basis, shifted)["layers.0.attention.query"]
    lead = torch.linalg.svd(common)
    assert float((first.V.double() @ lead[2][0]).norm()) < 1
    assert (
        float(
            (
                basis_of({n: e[:5] for n, e in shifted.items()})["layers.0.attention.query"].V.double() @ lead[2][0]
            ).norm()
        )
        > 0.99
    )
