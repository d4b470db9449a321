"""What a basis does not keep of a LoRA, in directions of the task's own: exact, optimal, within a budget."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from subspace_peft import SubspaceConfig, build_basis, export_lora, project_lora
from subspace_peft.cli import main
from subspace_peft.convert.residual import spread
from subspace_peft.errors import SubspaceError
from subspace_peft.sources import open_source
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
def test_the_task_is_at_least_what_directions_beside_the_projection_give(make, rank, fleet, tmp_path):
    basis, folder = fleet[make]
    projection, alone = project_lora(folder, basis, extra_rank=rank), project_lora(folder, basis)
    projection.save_pretrained(tmp_path / "task")
    task, dense = read_task(tmp_path / "task"), deltas(make, folder)
    lost = total = beside = 0.0
    assert task.cores.keys() == dense.keys()
    for name, delta in dense.items():
        place = str(basis.find(name))
        projected = basis[place].reconstruct(alone.cores[place])
        S, energy = torch.linalg.svdvals(delta - projected), float(delta.square().sum())
        B, A = task.own[name]
        assert B.shape[1] == len(A) == min(rank, *delta.shape)
        # each is the best for the other: nothing that the core could hold is left
        rest = delta - task.modules[name].reconstruct(task.cores[name]) - B @ A
        left = float(rest.square().sum())
        assert left <= float(S[rank:].square().sum()) + 1e-6 * energy
        assert projection.energy_own[place] == pytest.approx(1 - left / energy - alone.energy[place], abs=1e-5)
        assert projection.energy[place] == alone.energy[place]
        assert float(basis[place].project(rest).square().sum()) <= 2e-3 * energy
        lost, total, beside = lost + left, total + energy, beside + float(S[rank:].square().sum())
    assert projection.energy_with_own == pytest.approx(1 - lost / total, abs=1e-5)
    assert lost < beside
    assert projection.energy_kept == alone.energy_kept == alone.energy_with_own < projection.energy_with_own
    assert projection.relative_error == pytest.approx((lost / total) ** 0.5, abs=2e-3)
    assert alone.own_directions == dict.fromkeys(basis, 0) and alone.own_parameters == 0
    assert set(alone.energy_own.values()) == {0.0}
    facts = projection.to_dict()
    assert facts["energy_kept"] == alone.energy_kept and facts["modules"] == alone.energy
    assert facts["energy_with_own"] == projection.energy_with_own


@pytest.mark.parametrize("more", [0, 9])
@pytest.mark.parametrize("make", MAKERS)
def test_with_as_many_directions_as_its_rank_the_task_is_the_lora(make, more, fleet, tmp_path):
    basis, folder = fleet[make]
    rank = max(open_source(folder).factors(name).rank for name in open_source(folder).keys)
    projection = project_lora(folder, basis, extra_rank=rank + more)
    assert projection.energy_with_own == pytest.approx(1, abs=1e-9) and projection.verdict == "faithful"
    assert project_lora(folder, basis, extra_rank=rank - 1).energy_with_own < 1 - 1e-5
    projection.save_pretrained(tmp_path / "task")
    task = read_task(tmp_path / "task")
    for name, delta in deltas(make, folder).items():
        B, A = task.own[name]
        now = task.modules[name].reconstruct(task.cores[name]) + B @ A
        assert float((delta - now).norm()) <= 1e-6 * float(delta.norm())
    expected = run(make, PeftModel.from_pretrained(make(), folder))
    loaded = PeftModel.from_pretrained(make(), tmp_path / "task")
    torch.testing.assert_close(run(make, loaded), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(run(make, make()), expected, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_task_on_its_own_basis_with_as_many_is_itself(rank, fleet, tmp_path):
    basis, _ = fleet[bert]
    config = SubspaceConfig(basis=str(basis.location), extra_rank=rank, task_type="SEQ_CLS")
    model = get_peft_model(bert(), config)
    draw = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".subspace_coef." in name and parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * (1 if ".weight" in name else 0.3))
    model.save_pretrained(tmp_path / "task")
    export_lora(tmp_path / "task", tmp_path / "lora")
    found = project_lora(tmp_path / "lora", basis, extra_rank=rank)
    assert found.energy_kept < 0.999 and found.energy_with_own >= 1 - 1e-6
    assert project_lora(tmp_path / "lora", basis, extra_rank=rank - 1).energy_with_own < 0.999


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
    from .pipeline_files import FILES, SD, write

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
