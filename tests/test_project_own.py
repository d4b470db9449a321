"""What a basis does not keep of a LoRA, in directions of the task's own: exact, optimal, within a budget."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from subspace_peft import build_basis, project_lora
from subspace_peft.cli import main
from subspace_peft.convert.residual import spread
from subspace_peft.errors import SubspaceError
from subspace_peft.tasks.read import read_task
from subspace_peft.tuner.own_directions import own_fields
from subspace_peft.tuner.task_sizes import TaskSizes

from .bundle.conftest import logits
from .models import bert, gpt2
from .test_compress import deltas
from .test_layer_kinds import Small, lora, outputs

MAKERS = [Small, bert, gpt2]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory, fleets):
    """Per kind of layers: a basis of two LoRAs, and a third that is only partly in it."""
    root = tmp_path_factory.mktemp("own")
    small = [str(lora(root / f"s{i}", i)) for i in range(3)]
    made = {}
    for make, folders in ((Small, small), (bert, fleets[bert]), (gpt2, fleets[gpt2])):
        basis = build_basis(folders[:2], k=4, progress=False)
        basis.save_pretrained(root / f"{make.__name__}-basis")
        made[make] = basis, folders[2]
    return made


def run(make, model) -> torch.Tensor:
    return outputs(model) if make is Small else logits(model)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("make", MAKERS)
def test_the_task_is_the_best_approximation_that_so_many_directions_give(make, rank, fleet, tmp_path):
    basis, folder = fleet[make]
    projection, alone = project_lora(folder, basis, extra_rank=rank), project_lora(folder, basis)
    projection.save_pretrained(tmp_path / "task")
    task, dense = read_task(tmp_path / "task"), deltas(make, folder)
    lost = total = 0.0
    assert task.cores.keys() == dense.keys()
    for name, delta in dense.items():
        place = str(basis.find(name))
        projected = basis[place].reconstruct(alone.cores[place])
        S = torch.linalg.svdvals(delta - projected)
        B, A = task.own[name]
        assert B.shape[1] == len(A) == min(rank, *delta.shape)
        now = task.modules[name].reconstruct(task.cores[name]) + B @ A
        assert float((delta - now).square().sum()) == pytest.approx(
            float(S[rank:].square().sum()), abs=1e-5 * float(delta.square().sum())
        )
        assert projection.energy_own[place] == pytest.approx(
            float(S[:rank].square().sum() / delta.square().sum()), abs=1e-5
        )
        lost, total = lost + float((delta - now).square().sum()), total + float(delta.square().sum())
    assert projection.energy_with_own == pytest.approx(1 - lost / total, abs=1e-5)
    assert projection.energy_kept == alone.energy_kept == alone.energy_with_own < projection.energy_with_own
    assert projection.relative_error < alone.relative_error
    assert alone.own_directions == dict.fromkeys(basis, 0) and alone.own_parameters == 0


@pytest.mark.parametrize("make", MAKERS)
def test_with_enough_directions_the_task_is_the_lora(make, fleet, tmp_path):
    basis, folder = fleet[make]
    # 6 at most: twice the LoRA's rank in a basis that it shares nothing with
    projection = project_lora(folder, basis, extra_rank=12)
    assert projection.energy_with_own == pytest.approx(1, abs=1e-6) and projection.verdict == "faithful"
    projection.save_pretrained(tmp_path / "task")
    expected = run(make, PeftModel.from_pretrained(make(), folder))
    loaded = PeftModel.from_pretrained(make(), tmp_path / "task")
    torch.testing.assert_close(run(make, loaded), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(run(make, make()), expected, atol=1e-4)


def test_it_is_trained_further(fleet, tmp_path):
    basis, folder = fleet[bert]
    project_lora(folder, basis, extra_rank=2).save_pretrained(tmp_path / "task")
    model = PeftModel.from_pretrained(bert(), tmp_path / "task", is_trainable=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    rows = [{"input_ids": torch.arange(1, 9), "labels": torch.tensor(i % 2)} for i in range(8)]
    how = TrainingArguments(
        str(tmp_path / "out"), max_steps=3, learning_rate=3e-3, report_to=[], use_cpu=True, disable_tqdm=True
    )
    Trainer(model, how, train_dataset=rows).train()
    after = dict(model.named_parameters())
    for part in ("weight", "extra_U", "extra_V"):
        moved = [name for name in before if f".{part}" in name and not torch.equal(before[name], after[name])]
        assert len(moved) == 4, part


def test_a_budget_goes_where_a_parameter_keeps_most(fleet, tmp_path):
    basis, folder = fleet[Small]
    shapes = basis.shapes()
    most = project_lora(folder, basis, extra_rank=64)
    before = 0.0
    for budget in (60, 200, 600, 5000):
        projection = project_lora(folder, basis, extra_budget=budget)
        got = projection.own_directions
        assert projection.own_parameters == sum((shapes[n]["out"] + shapes[n]["in"]) * got[n] for n in got) <= budget
        assert before < projection.energy_with_own
        before = projection.energy_with_own
        projection.save_pretrained(tmp_path / f"task{budget}")
        task = read_task(tmp_path / f"task{budget}")
        assert {name: len(A) for name, (_, A) in task.own.items()} == {n: r for n, r in got.items() if r}
    # what is rounding is not bought
    assert before == pytest.approx(1, abs=1e-6) and projection.own_parameters < most.own_parameters
    capped = project_lora(folder, basis, extra_budget=5000, extra_rank=1)
    assert set(capped.own_directions.values()) <= {0, 1} and capped.own_parameters < projection.own_parameters


def test_the_spread_is_the_best_of_all_for_equal_modules():
    draw = torch.Generator().manual_seed(0)
    spectra = {name: torch.rand(3, generator=draw).sort(descending=True).values for name in "abc"}
    for count in range(1, 10):
        found = spread(spectra, dict.fromkeys("abc", (5, 5)), 10 * count + 9)
        energy = sum(float(spectra[name][:rank].square().sum()) for name, rank in found.items())
        every = (ranks for ranks in itertools.product(range(4), repeat=3) if sum(ranks) <= count)
        best = max(sum(float(spectra[n][:r].square().sum()) for n, r in zip("abc", rs, strict=True)) for rs in every)
        assert energy == pytest.approx(best) and sum(found.values()) == count


def test_the_spread_weighs_energy_by_what_a_direction_costs():
    spectra = {"wide": torch.tensor([3.0, 2.0]), "narrow": torch.tensor([2.0, 0.0])}
    sizes = {"wide": (30, 30), "narrow": (5, 5)}
    assert spread(spectra, sizes, 10) == {"wide": 0, "narrow": 1}
    assert spread(spectra, sizes, 69) == {"wide": 0, "narrow": 1}
    assert spread(spectra, sizes, 70) == {"wide": 1, "narrow": 1}
    assert spread(spectra, sizes, 10_000) == {"wide": 2, "narrow": 1}
    # the first of equals
    assert spread({"b": torch.ones(1), "a": torch.ones(1)}, {"b": (2, 2), "a": (2, 2)}, 4) == {"b": 1, "a": 0}


@pytest.mark.parametrize(
    "ranks",
    [
        {"a.x": 1, "b.x": 1},
        {"a.x": 0, "b.x": 0, "c.x": 3},
        # one name is the end of another, or fits it as a regular expression
        {"proj": 2, "block.proj": 1, "other.block.proj": 1, "x": 1},
        {"l.1": 2, "l.11": 0, "lx1": 3, "m.l.1": 0},
        {"a+b": 2, "aab": 1, "c": 1},
        {},
    ],
)
def test_every_module_gets_its_number_by_the_fields(ranks):
    fields = own_fields(ranks)
    sizes = TaskSizes("core", None, {}, 8, 256.0, "none", **fields)
    assert {name: sizes.extra_asked(name) for name in ranks} == ranks
    assert len(set(ranks.values())) > 1 or not fields["extra_rank_pattern"]


def test_several_parts_each_get_their_own(tmp_path):
    from .test_pipelines import FILES, SD, write

    files = [write(FILES["diffusers"](SD, number), tmp_path / f"style{number}.safetensors") for number in (1, 2)]
    basis = build_basis(files[:1], k=2, progress=False)
    basis.save_pretrained(tmp_path / "basis")
    projection = project_lora(files[1], basis, extra_rank=1)
    assert len(projection.parts) > 1
    projection.save_pretrained(tmp_path / "task")
    for part, each in projection.parts.items():
        assert each.own and each.energy_with_own > each.energy_kept
        assert len(read_task(tmp_path / "task" / part).own) == len(each.places) == len(each.own)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"extra_rank": -1}, r"extra_rank=-1 \(--extra-rank -1\): give a whole number"),
        ({"extra_rank": 1.5}, "extra_rank=1.5"),
        ({"extra_rank": True}, "extra_rank=True"),
        ({"extra_budget": 0}, "extra_budget=0"),
        ({"extra_budget": 100, "extra_rank": 0}, r"buys nothing with extra_rank=0 \(--extra-rank 0\)"),
        ({"extra_budget": 63}, r"one direction takes 64 parameters at least.*Give 64 or more; 256 are one in every"),
    ],
)
def test_what_is_out_of_range_is_refused(given, says, fleet):
    basis, folder = fleet[bert]
    with pytest.raises(SubspaceError, match=says):
        project_lora(folder, basis, **given)


def test_where_the_basis_keeps_all_a_budget_is_not_spent(fleet, fleets, tmp_path):
    whole = build_basis(fleets[bert][:1], k=4, progress=False)
    with pytest.warns(UserWarning, match=r"extra_budget=5000 \(--extra-budget 5000\) buys nothing: .* keeps all"):
        projection = project_lora(fleets[bert][0], whole, extra_budget=5000)
    assert projection.own == {} and projection.energy_with_own == projection.energy_kept


def test_more_directions_than_there_are_is_said(fleet):
    basis, folder = fleet[bert]
    with pytest.warns(UserWarning, match=r"extra_rank=100 \(--extra-rank 100\) is more .* get 32 at most"):
        assert set(project_lora(folder, basis, extra_rank=100).own_directions.values()) == {32}


def test_the_command_line(fleet, tmp_path, capsys):
    basis, folder = fleet[bert]
    line = ["project", str(folder), "--basis", str(basis.location), "--out", str(tmp_path / "task")]
    assert main([*line, "--extra-rank", "2", "-v"]) == 0
    said = capsys.readouterr().out
    projection = project_lora(folder, basis, extra_rank=2)
    assert "with own directions (2 per module, 512 parameters)" in said and "in 2 of its own" in said
    assert set(load_file(tmp_path / "task" / "adapter_model.safetensors")) == {
        f"base_model.model.{name}.subspace_coef.{part}"
        for name in projection.places
        for part in ("weight", "extra_U", "extra_V")
    }
    assert main([*line, "--extra-budget", "100", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["own_parameters"] == 64 and sum(facts["own_directions"].values()) == 1
    assert facts["energy_kept"] < facts["energy_with_own"] < projection.energy_with_own
    assert main([*line, "--extra-budget", "1"]) == 1
    said = capsys.readouterr().err
    assert "--extra-budget 1: one direction takes 64" in said and "extra_budget" not in said
