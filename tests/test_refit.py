"""A basis fitted again within fewer directions: what tasks lose is said before, and is what they lose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from subspace_peft import SubspaceBasis, SubspaceConfig, build_basis, bundle_tasks, migrate_task
from subspace_peft.basis.controls import random_module
from subspace_peft.builders import plan_refit, rebuild_basis, refit_basis
from subspace_peft.cli import main
from subspace_peft.errors import SubspaceError

from .models import bert, randomise
from .test_migrate import logits, saved

SIZES = {"a": (20, 30), "b": (40, 12)}


@pytest.fixture(scope="module")
def basis() -> SubspaceBasis:
    return SubspaceBasis(
        {name: random_module(name, *size, 10, 8, 0) for name, size in SIZES.items()}, {"builder": "x"}
    )


def cores(seed: int, rank: int = 8, size: tuple[int, int] = (10, 8)) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(size[0], rank, generator=draw) @ torch.randn(rank, size[1], generator=draw) for name in SIZES
    }


@pytest.mark.parametrize("k", [1, 3, (5, 4), (9, 2), (2, 20)])
@pytest.mark.parametrize("count", [1, 4])
def test_the_bound_is_what_projecting_loses(basis, k, count):
    tasks = {f"t{i}": cores(i, rank=1 + 2 * i) for i in range(count)}
    plan = plan_refit(basis, tasks, k)
    new = refit_basis(plan, max_drift=1.0)
    most = (k, k) if isinstance(k, int) else k
    for name, module in new.items():
        assert module.k_out <= most[0] and module.k_in <= most[1]
        assert plan.sizes[name] == (module.k_out, module.k_in)
        for task, given in tasks.items():
            delta = basis[name].reconstruct(given[name].double())
            left = delta - module.reconstruct(module.project(delta))
            true = float(left.norm() / delta.norm())
            assert true == pytest.approx(plan.drift[task][name], abs=2e-6)
    assert plan.worst[2] == max(max(each.values()) for each in plan.drift.values())


def test_what_the_tasks_span_is_kept_whole_and_no_more(basis):
    # cores in a corner that is not the leading one, and of lower rank than asked for
    draw = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(10, 3, generator=draw))[0],
        torch.linalg.qr(torch.randn(8, 2, generator=draw))[0],
    )
    tasks = {f"t{i}": {"a": left @ torch.randn(3, 2, generator=draw) @ right.T} for i in range(4)}
    plan = plan_refit(basis, tasks, 6)
    assert plan.sizes["a"] == (3, 2) and plan.worst[2] < 1e-6
    # a module that no task uses keeps its leading directions
    assert plan.sizes["b"] == (6, 6) and torch.equal(plan.modules["b"].U, basis["b"].U[:, :6])
    assert refit_basis(plan, max_drift=1e-6)["a"].k_out == 3


def test_merging_keeps_more_than_cutting_and_weights_count(basis):
    tasks = {f"t{i}": cores(i, rank=2) for i in range(3)}
    plan = plan_refit(basis, tasks, 4)

    def cut(core: torch.Tensor) -> float:
        return float((core.square().sum() - core[:4, :4].square().sum()).sqrt() / core.norm())

    for name in SIZES:
        merged = sum(plan.drift[task][name] ** 2 for task in tasks)
        assert merged < sum(cut(given[name]) ** 2 for given in tasks.values())
    heavy = plan_refit(basis, tasks, 4, weights={"t1": 100.0})
    assert all(heavy.drift["t1"][name] < plan.drift["t1"][name] for name in SIZES)
    # a task's own size counts for nothing
    again = plan_refit(basis, {**tasks, "t2": {name: 1000 * core for name, core in tasks["t2"].items()}}, 4)
    assert again.drift["t0"] == pytest.approx(plan.drift["t0"], abs=1e-6)


def test_modules_that_are_small_enough_stay_and_leading_tasks_count_as_padded(basis):
    plan = plan_refit(basis, {"t": cores(0)}, 10)
    assert not plan.modules and refit_basis(plan, max_drift=0) is basis
    short = {name: core[:4, :3] for name, core in cores(1).items()}
    padded = {name: torch.nn.functional.pad(core, (0, 5, 0, 6)) for name, core in short.items()}
    one, other = plan_refit(basis, {"t": short}, 2), plan_refit(basis, {"t": padded}, 2)
    assert one.drift == other.drift
    assert all(torch.equal(one.modules[name].U, other.modules[name].U) for name in SIZES)


KINDS = [{}, {"coefficients": "factor", "r": 2}, {"k": 4}, {"mean_gain": "fixed"}, {"extra_rank": 2}]


@pytest.mark.parametrize("sources", [False, True])
def test_tasks_that_are_moved_drift_as_planned(bases, tmp_path, sources):
    old = bases[bert]
    tasks = {}
    for number, config in enumerate(KINDS):
        tasks[f"t{number}"], _ = saved(bert, tmp_path / f"t{number}", old.location, **config)
    plan = plan_refit(old, tasks, 5, sources=sources)
    new = refit_basis(plan, max_drift=1.0)
    new.save_pretrained(tmp_path / "v2")
    assert new.info["version"] == 2 and new.info["lineage"][-1]["fingerprint"] == old.fingerprint
    assert new.info["update"]["arguments"]["k"] == 5 and new.info["update"]["tasks"] == list(tasks)
    assert all(0 < each["energy_kept"] < 1 for each in new.info["sources"])
    for name, folder in tasks.items():
        moved = migrate_task(folder, new, max_drift=1.0)
        for module, drift in moved.drift.items():
            # a task's own directions stay what they are, and count in its norm
            assert drift == pytest.approx(plan.drift[name][module], abs=2e-6)
        moved.save_pretrained(tmp_path / "moved" / name)
        assert PeftModel.from_pretrained(bert(), tmp_path / "moved" / name) is not None
    assert json.loads(json.dumps(plan.to_dict()))["from"] == old.fingerprint
    assert "largest drift" in repr(plan)
    with pytest.raises(SubspaceError, match="fitted to the cores of 5 tasks"):
        rebuild_basis(tmp_path / "v2")


def test_within_what_they_span_tasks_stay_the_same(fleets, tmp_path):
    # built of five adapters, and only one of them is still in use
    basis = build_basis(fleets[bert], k=20, progress=False)
    basis.save_pretrained(tmp_path / "v1")
    from subspace_peft import project_lora

    project_lora(fleets[bert][2], basis).save_pretrained(tmp_path / "task")
    before = logits(PeftModel.from_pretrained(bert(), tmp_path / "task"))
    new = refit_basis(plan_refit(basis, {"task": tmp_path / "task"}, 4), max_drift=1e-5)
    new.save_pretrained(tmp_path / "v2")
    assert new.describe_k() == "k=4"
    migrate_task(tmp_path / "task", new).save_pretrained(tmp_path / "moved")
    now = logits(PeftModel.from_pretrained(bert(), tmp_path / "moved"))
    assert torch.allclose(now, before, atol=1e-6, rtol=1e-5)


def test_what_would_lose_more_is_refused(basis):
    plan = plan_refit(basis, {"good": cores(0, rank=1), "bad": cores(1)}, 2)
    task, module, drift = plan.worst
    with pytest.raises(
        SubspaceError, match=rf"Within k=2 task {task!r} would lose .* module {module!r}.*max_drift=0.01"
    ):
        refit_basis(plan, max_drift=0.01)
    assert refit_basis(plan, max_drift=drift) != basis
    for wrong in (-1, float("nan"), True):
        with pytest.raises(SubspaceError, match="give 0 or more"):
            refit_basis(plan, max_drift=wrong)


@pytest.mark.parametrize(
    ("tasks", "how", "says"),
    [
        ({}, {}, "no task to keep"),
        ({"t": {"c": torch.ones(2, 2)}}, {}, r"task 't': module 'c' has a core .* no such module"),
        ({"t": {"a": torch.ones(11, 2)}}, {}, r"task 't': module 'a' has a core \(11, 2\), the basis \(10, 8\)"),
        ({"t": {"a": torch.full((2, 2), float("nan"))}}, {}, "'t' holds NaN or infinite values in module 'a'"),
        ({"t": {"a": torch.ones(2, 2)}}, {"k": 0}, "k=0: give a number of directions"),
        ({"t": {"a": torch.ones(2, 2)}}, {"k": (1, 2, 3)}, "give a number of directions"),
        ({"t": {"a": torch.ones(2, 2)}}, {"k": 2.5}, "give a number of directions"),
        ({"t": {"a": torch.ones(2, 2)}}, {"weights": {"u": 1.0}}, "there is no task 'u'"),
        ({"t": {"a": torch.ones(2, 2)}}, {"weights": {"t": 0.0}}, "give numbers above 0"),
    ],
)
def test_bad_input_is_named(basis, tasks, how, says):
    with pytest.raises(SubspaceError, match=says):
        plan_refit(basis, tasks, **{"k": 2, **how})


def test_a_task_on_another_basis_is_refused_and_one_of_zeros_is_not(bases, basis, tmp_path):
    folder, _ = saved(bert, tmp_path / "task", bases[bert].location)
    with pytest.raises(SubspaceError, match=r"'t' is on the basis .*Migrate it first"):
        plan_refit(bases[bert].truncate(4), {"t": folder}, 2)
    model = randomise(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location)))
    assert plan_refit(bases[bert], {"live": model}, 2).worst[2] > 0
    nothing = {name: torch.zeros(10, 8) for name in SIZES}
    plan = plan_refit(basis, {"nothing": nothing, "t": cores(0, rank=2)}, 2)
    assert set(plan.drift["nothing"].values()) == {0.0} and plan.worst[2] < 1e-6


def test_on_the_command_line_the_loss_is_said_first(bases, tmp_path, capsys):
    old = bases[bert]
    tasks = [str(saved(bert, tmp_path / f"t{i}", old.location, **config)[0]) for i, config in enumerate(KINDS[:2])]
    bundle_tasks([tasks[0]], tmp_path / "bundle", progress=False)
    command = ["update", str(old.location), "-k", "4", "--out", str(tmp_path / "v2"), "--tasks", *tasks]
    command += [str(tmp_path / "bundle"), "--tasks-out", str(tmp_path / "moved")]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert "4 of 4 modules are fitted again; of 3 tasks' updates is lost:" in out and "bundle/t0: at most" in out
    assert "Within -k 4 task" in err and "--max-drift" in err and not (tmp_path / "v2").exists()
    for _ in range(2):  # the same again replaces its own result
        assert main([*command, "--max-drift", "0.9", "--json"]) == 0, capsys.readouterr().err
        facts = json.loads(capsys.readouterr().out)
    new = SubspaceBasis.from_pretrained(tmp_path / "v2")
    assert new.describe_k() == "k=4" and facts["fingerprint"] == new.fingerprint and facts["version"] == 2
    drifts = {Path(each["out"]).name: max(each["drift_per_module"].values()) for each in facts["tasks"]}
    assert drifts == {
        name: pytest.approx(facts["drift"][key], abs=2e-6)
        for name, key in {"t0": "t0", "t1": "t1", "bundle": "bundle/t0"}.items()
    }
    assert main([*command, "--max-drift", "0.9", "--force"]) == 0
    assert "version 2 of the basis, k=4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "Name the adapters that the basis is to grow by; or give -k and --tasks"),
        (["-k", "4"], "Name the adapters"),
        (["-k", "6", "--tasks", "TASK", "--tasks-out", "OUT"], "-k 6 leaves nothing to merge: every module has 6"),
        (["-k", "4", "--tasks", "TASK", "--tasks-out", "OUT", "--partial"], "--partial has no effect without new"),
        (["-k", "4", "--tasks", "TASK", "--tasks-out", "OUT", "--max-memory", "1GB"], "--max-memory has no effect"),
        (["-k", "4", "--tasks", "TASK", "--tasks-out", "OUT", "--no-pad"], "--no-pad has no effect with -k"),
    ],
)
def test_what_goes_with_no_adapter_is_said(flags, says, bases, tmp_path, capsys):
    folder, _ = saved(bert, tmp_path / "task", bases[bert].location)
    places = {"TASK": str(folder), "OUT": str(tmp_path / "moved")}
    command = ["update", str(bases[bert].location), *[places.get(flag, flag) for flag in flags]]
    assert main([*command, "--out", str(tmp_path / "v2")]) == 1
    assert says in capsys.readouterr().err


def best_of_starts(given: list[torch.Tensor], k: tuple[int, int]) -> float:
    """The least loss that alternating from several starts reaches, each until nothing moves: HOOI, written out."""
    cores = torch.stack([core / core.norm() for core in given])
    least = float("inf")
    for start in range(6):
        draw = torch.Generator().manual_seed(start)
        v = torch.linalg.qr(torch.randn(cores.shape[2], k[1], generator=draw, dtype=torch.float64))[0]
        before = -1.0
        while True:
            u = torch.linalg.eigh(torch.einsum("nij,nkj->ik", cores @ v, cores @ v))[1][:, -k[0] :]
            v = torch.linalg.eigh(torch.einsum("nji,njk->ik", u.T @ cores, u.T @ cores))[1][:, -k[1] :]
            kept = float((u.T @ cores @ v).square().sum())
            if kept - before < 1e-13:
                break
            before = kept
        least = min(least, 1 - kept / len(cores))
    return least


@pytest.mark.parametrize("k", [(5, 1), (1, 5), (6, 2), (4, 4), (3, 5)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_no_other_directions_lose_less(basis, k, count):
    # each task's energy falls off, as that of what is trained does
    draw = torch.Generator().manual_seed(count)
    fall = torch.diag(0.5 ** torch.arange(8.0))
    given = [torch.randn(10, 8, generator=draw) @ fall @ torch.randn(8, 8, generator=draw) for _ in range(count)]
    plan = plan_refit(basis, {f"t{i}": {"a": core} for i, core in enumerate(given)}, k, alternations=100)
    lost = sum(each["a"] ** 2 for each in plan.drift.values()) / count
    assert lost == pytest.approx(best_of_starts([core.double() for core in given], k), abs=1e-6)
    # and more rounds or more directions never lose more
    fewer = plan_refit(basis, {f"t{i}": {"a": core} for i, core in enumerate(given)}, k, alternations=1)
    wider = plan_refit(basis, {f"t{i}": {"a": core} for i, core in enumerate(given)}, (k[0] + 1, k[1] + 1))
    worse, less = (sum(each["a"] ** 2 for each in one.drift.values()) / count for one in (fewer, wider))
    assert less < lost + 1e-9 and lost < worse + 1e-9


def test_the_squares_of_the_drifts_that_it_says_are_least_whatever_own_directions_there_are(bases, tmp_path):
    old, tasks = bases[bert], {}
    for number, extra in enumerate((0, 0, 2)):
        # trained directions of its own are most of the last one's update
        tasks[f"t{number}"], _ = saved(bert, tmp_path / f"t{number}", old.location, extra_rank=extra)

    def squares(**weights: float) -> float:
        plan = plan_refit(old, tasks, 2, weights=weights, alternations=100)
        return sum(drift**2 for each in plan.drift.values() for drift in each.values())

    least = squares()
    assert all(least < squares(t2=weight) - 1e-6 for weight in (0.2, 5.0))
