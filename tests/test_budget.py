"""A total of trained parameters, spread to where the fleet holds more than chance."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import subspace_peft.builders.budget as budget_module
import subspace_peft.builders.module_plan as module_plan
from subspace_peft import SubspaceBasis, SubspaceConfig, build_basis
from subspace_peft.builders import plan_build, rebuild_basis
from subspace_peft.builders.budget import even, held, largest, spread
from subspace_peft.builders.hosvd import exact
from subspace_peft.builders.null import generator_for, null_update, strengths_of
from subspace_peft.cli import main
from subspace_peft.errors import SubspaceError
from subspace_peft.sources.factors import Factors

from .models import bert
from .test_build import deltas, fleet, kept
from .test_update import orthonormal

OUT, IN, N, R = 60, 50, 12, 3


def shared(common: dict[str, tuple[int, int]], n=N, seed=0):
    """A fleet whose updates lie, in every module, in `common` directions of output and input, and in noise of 1 % of
    the energy."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    sides = {name: (normal(OUT, a), normal(b, IN)) for name, (a, b) in common.items()}
    states = []
    for _ in range(n):
        state = {}
        for name, (left, right) in sides.items():
            state[f"{name}.lora_B.weight"] = left @ normal(left.shape[1], R) + 0.1 * normal(OUT, R)
            state[f"{name}.lora_A.weight"] = normal(R, len(right)) @ right + 0.1 * normal(R, IN)
        states.append(state)
    return states


@pytest.fixture(params=["exact", "streamed"])
def numerics(request, monkeypatch):
    if request.param == "streamed":
        monkeypatch.setattr(module_plan, "EXACT_COLUMNS", 2)
    return request.param


def spent(basis) -> int:
    return sum(m.k_out * m.k_in for m in basis.values())


# -- spreading
# ------------------------------------------------------------------------------------------------------------


def best_by_trying(tables, budget):
    choices = [[(a + 1, b + 1) for a in range(t.shape[0]) for b in range(t.shape[1])] for t in tables.values()]
    fits = (sizes for sizes in itertools.product(*choices) if sum(a * b for a, b in sizes) <= budget)
    return max(sum(float(t[a - 1, b - 1]) for t, (a, b) in zip(tables.values(), s, strict=True)) for s in fits)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [3, 8, 20, 40])
def test_greedy_is_near_the_best_and_never_above_the_budget(seed, budget):
    draw = torch.Generator().manual_seed(seed)
    tables = {}
    for name in "abc":
        falling = (
            torch.rand(4, 4, generator=draw, dtype=torch.float64)
            * torch.logspace(0, -2, 4)[:, None]
            * torch.logspace(0, -2, 4)
        )
        tables[name] = falling.cumsum(0).cumsum(1)
    sizes = spread(tables, budget)
    assert sum(a * b for a, b in sizes.values()) <= budget
    gained = sum(float(tables[name][a - 1, b - 1]) for name, (a, b) in sizes.items())
    assert gained >= 0.8 * best_by_trying(tables, budget)
    assert spread(tables, budget) == sizes


def test_what_gains_nothing_is_not_bought_and_pairs_are_bought_together():
    flat = torch.full((5, 5), 0.1, dtype=torch.float64)
    diagonal = torch.eye(5, dtype=torch.float64).cumsum(0).cumsum(1)
    assert spread({"flat": flat, "diagonal": diagonal}, 1000) == {"flat": (1, 1), "diagonal": (5, 5)}
    assert spread({"flat": flat, "diagonal": diagonal}, 5) == {"flat": (1, 1), "diagonal": (2, 2)}
    assert spread({"one": flat, "other": flat}, 2) == {"one": (1, 1), "other": (1, 1)}
    with pytest.raises(SubspaceError, match="2 modules take at least"):
        spread({"one": flat, "other": flat}, 1)


def test_the_null_has_the_strengths_and_nothing_else():
    draw = torch.Generator().manual_seed(0)
    B, A = torch.randn(OUT, R, generator=draw), torch.randn(R, IN, generator=draw)
    S = strengths_of(B, A, -2.0)
    assert torch.allclose(S, torch.linalg.svdvals(-2.0 * B.double() @ A.double())[:R])
    null, again = (null_update(OUT, IN, S, generator_for("a", 1)) for _ in range(2))
    assert torch.equal(null.B, again.B) and torch.allclose(null.canonical()[1], S)
    assert not torch.allclose(null.B, null_update(OUT, IN, S, generator_for("a", 2)).B)
    assert strengths_of(torch.zeros(OUT, R), A, 1.0).tolist() == [0.0] * R


def test_held_is_the_energy_of_leading_blocks():
    draw = torch.Generator().manual_seed(0)
    updates = [
        Factors(*(torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((20, 2), (2, 16)))) for _ in range(3)
    ]
    compressed = exact(updates, [1.0, 0.5, 2.0])
    table = held(compressed, 8, 9)
    assert table.shape == (8, 9) and float(table[7, 8]) == pytest.approx(compressed.total)
    U, V = compressed.out.Q[:, :3], compressed.inner.Q[:, :2]
    direct = sum((w * U.T @ f.B @ f.A @ V).square().sum() for f, w in zip(updates, [1.0, 0.5, 2.0], strict=True))
    assert float(table[2, 1]) == pytest.approx(float(direct))


# -- building
# -------------------------------------------------------------------------------------------------------------


def test_numbers_go_where_the_fleet_has_something_in_common(numerics):
    fleets = shared({"narrow": (2, 2), "wide": (8, 8), "flat": (2, 9)})
    basis = build_basis(fleets, budget=90, progress=False)
    sizes = {name: (m.k_out, m.k_in) for name, m in basis.items()}
    assert spent(basis) <= 90
    assert sizes["narrow"] == (2, 2)
    assert sizes["flat"][0] == 2 and 6 <= sizes["flat"][1] <= 9
    assert all(6 <= side <= 8 for side in sizes["wide"])
    assert all(orthonormal(module) < 1e-6 for module in basis.values())
    evenly = build_basis(fleets, k=even(90, 3), progress=False)
    assert spent(evenly) <= 90
    assert basis.info["measured"]["energy_kept"] > evenly.info["measured"]["energy_kept"] + 0.05
    for name in sizes:
        assert basis.info["measured"]["energy_kept_per_module"][name] == pytest.approx(
            kept(basis, deltas(fleets, name), name), abs=1e-5
        )
    assert basis.info["measured"]["budget"]["spent"] == spent(basis)
    assert basis.info["build"]["budget"] == 90 and basis.info["build"]["k"] is None


def test_the_rest_of_a_large_budget_is_not_spent_on_noise(numerics):
    basis = build_basis(shared({"a": (3, 3), "b": (5, 5)}), budget=5000, progress=False)
    assert [(m.k_out, m.k_in) for m in basis.values()] == [(3, 3), (5, 5)]


def test_a_fleet_of_noise_gets_about_nothing_above_its_null(numerics):
    """Independent updates and their null are alike: what is found above it is a draw's difference."""
    basis = build_basis(fleet(8, out=60, inner=50), budget=200, progress=False)
    above = basis.info["measured"]["budget"]["energy_above_null_per_module"]
    real = build_basis(shared({"a.q": (6, 6), "a.v": (6, 6)}, n=8), budget=200, progress=False)
    assert max(above.values()) < 0.1 * min(real.info["measured"]["budget"]["energy_above_null_per_module"].values())


def test_the_same_bytes_again_and_whatever_the_memory(numerics):
    made = [
        build_basis(shared({"a": (3, 3), "b": (5, 4)}), budget=40, max_memory=size, progress=False)
        for size in ("2GB", "2GB", "4MB")
    ]
    assert len({basis.fingerprint for basis in made}) == 1


def test_a_task_trains_no_more_than_the_budget(fleets):
    from peft import get_peft_model

    basis = build_basis(fleets[bert], budget=100, progress=False)
    model = get_peft_model(bert(), SubspaceConfig(basis=basis, save_basis=True))
    assert model.get_nb_trainable_parameters()[0] == spent(basis) <= 100


def test_an_interrupted_build_goes_on_from_its_tables_and_modules(tmp_path, monkeypatch):
    sources, arguments = shared({"a": (3, 3), "b": (5, 4), "c": (2, 2)}), {"budget": 50, "progress": False}
    whole = build_basis(sources, **arguments)
    original, calls = budget_module.above_null, []

    def measured(plan, reader, name, most):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(plan, reader, name, most)

    monkeypatch.setattr(budget_module, "above_null", measured)
    with pytest.raises(KeyboardInterrupt):
        build_basis(sources, **arguments, work_folder=tmp_path)
    assert build_basis(sources, **arguments, work_folder=tmp_path).fingerprint == whole.fingerprint
    assert calls == ["a", "b", "c", "c"]
    damaged = next(tmp_path.glob("*/*.table"))
    damaged.write_bytes(damaged.read_bytes()[:-8] + b"\x00" * 8)
    assert build_basis(sources, **arguments, work_folder=tmp_path).fingerprint == whole.fingerprint
    assert len(calls) == 5


def test_cli_dry_run_and_rebuilding(fleets, tmp_path, capsys):
    command = ["build", *fleets[bert], "--budget", "100", "--quiet"]
    assert main([*command, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {size["k_out"] for size in said["modules"].values()} == {5} and said["seconds"] > 0
    assert main([*command, "--out", str(tmp_path / "basis"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    basis = SubspaceBasis.from_pretrained(tmp_path / "basis")
    assert said["core_numbers_per_task"] == said["budget"]["spent"] == spent(basis) <= 100
    assert not (tmp_path / "basis.partial").exists()
    assert rebuild_basis(tmp_path / "basis", progress=False).fingerprint == basis.fingerprint
    assert main([*command, "-k", "4", "--out", str(tmp_path / "no")]) == 1
    assert "leave k, k_in and complete out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 0}, "budget=0"),
        ({"budget": True}, "budget=True"),
        ({"budget": 2.5}, "budget=2.5"),
        ({"budget": 1}, "2 modules take at least a parameter each"),
        ({"budget": 100, "k": 4}, "leave k"),
        ({"budget": 100, "k_in": 4}, "leave k"),
        ({"budget": 100, "complete": "random"}, "leave k"),
        ({"budget": 100, "builder": "eigenlora"}, "not 'eigenlora'"),
        ({"budget": 100, "builder": "random"}, "not 'random'"),
        ({"budget": 100, "max_memory": "1KB"}, "too little"),
    ],
)
def test_wrong_arguments(given, message):
    with pytest.raises(SubspaceError, match=message):
        build_basis(fleet(), progress=False, **given)


def test_plans_refuse_what_builds_refuse():
    for given in ({"budget": 1}, {"budget": 100, "k": 4}):
        with pytest.raises(SubspaceError):
            plan_build(fleet(), progress=False, **given)
    assert largest(100, 4) == 20
