"""Swapping tasks in place: same outputs as loading anew, nothing compiled twice, nothing half-swapped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

from subspace_peft import SubspaceConfig, hotswap
from subspace_peft.errors import BadFileError, BasisMismatchError, SubspaceError

from .models import bert, inputs, randomise


def logits(model):
    with torch.no_grad():
        return model.eval()(inputs()).logits


def save(folder: Path, basis: str, seed: int, **config: object) -> Path:
    model = randomise(get_peft_model(bert(), SubspaceConfig(basis=basis, **config)), seed=seed)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.add_(seed)
    model.save_pretrained(folder)
    return folder


KINDS = [
    {},
    {"coefficients": "factor", "r": 4},
    {"coefficients": "diagonal", "mean_gain": "trainable"},
    {"coefficients": "directions", "mean_gain": "fixed"},
    {"coefficients": "none", "mean_gain": "trainable"},
    {"modules_to_save": ["classifier"]},
    {"save_basis": True, "k": 4, "rank_pattern": {"query": 2}},
    {"extra_rank": 2},
    {"coefficients": "factor", "r": 3, "alpha": 100.0, "extra_rank": 1, "extra_rank_pattern": {"query": 0}},
    {"coefficients": "none", "mean_gain": "trainable", "extra_rank_pattern": {"query": 3}},
]


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_a_swapped_task_is_the_loaded_one(basis_folder, tmp_path, config):
    one, two = (save(tmp_path / str(seed), str(basis_folder), seed, **config) for seed in (1, 2))
    expected = [logits(PeftModel.from_pretrained(bert(), folder)) for folder in (one, two)]
    model = PeftModel.from_pretrained(bert(), one)
    tensors = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for folder, wanted in ((two, expected[1]), (one, expected[0]), (two, expected[1])):
        hotswap(model, folder)
        assert torch.equal(logits(model), wanted)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == tensors
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path / "again")), expected[1])


@pytest.mark.parametrize("config", [*KINDS[:4], *KINDS[-3:]], ids=str)
def test_pefts_own_hotswap_agrees(basis_folder, tmp_path, config):
    one, two = (save(tmp_path / str(seed), str(basis_folder), seed, **config) for seed in (1, 2))
    model = PeftModel.from_pretrained(bert(), one)
    hotswap_adapter(model, str(two), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(model), logits(PeftModel.from_pretrained(bert(), two)), atol=1e-6, rtol=1e-5)
    other = save(tmp_path / "other", str(basis_folder), 3, **{**config, "alpha": 5.0})
    with pytest.raises(ValueError, match="alpha"):
        hotswap_adapter(model, str(other), adapter_name="default", torch_device="cpu")
    before = logits(model)
    for field in ({"extra_rank": 3}, {"extra_rank_pattern": {"value": 5}}):
        other = save(tmp_path / "other", str(basis_folder), 3, **{**config, **field})
        with pytest.raises(ValueError, match=f"for {next(iter(field))}"):
            hotswap_adapter(model, str(other), adapter_name="default", torch_device="cpu")
    assert torch.equal(logits(model), before)


def test_what_cannot_be_swapped_is_refused_and_changes_nothing(basis_folder, bases, tmp_path):
    one = save(tmp_path / "one", str(basis_folder), 1)
    model = PeftModel.from_pretrained(bert(), one)
    before = logits(model)

    def damaged(name: str, change) -> Path:
        folder = save(tmp_path / name, str(basis_folder), 2)
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    first = "base_model.model.bert.encoder.layer.0.attention.self.query.subspace_coef.weight"
    cases = [
        (save(tmp_path / "kind", str(basis_folder), 2, coefficients="diagonal"), BasisMismatchError, "coefficients"),
        (save(tmp_path / "k", str(basis_folder), 2, k=3), BasisMismatchError, "its k is 3"),
        (save(tmp_path / "own", str(basis_folder), 2, extra_rank=2), BasisMismatchError, "its extra_rank is 2"),
        (
            save(tmp_path / "more", str(basis_folder), 2, extra_rank_pattern={"query": 1}),
            BasisMismatchError,
            "its extra_rank_pattern is",
        ),
        (
            save(tmp_path / "head", str(basis_folder), 2, modules_to_save=["classifier"]),
            BasisMismatchError,
            "also has classifier",
        ),
        (save(tmp_path / "part", str(basis_folder), 2, target_modules=["query"]), BasisMismatchError, "lacks"),
        (damaged("nan", lambda t: t[first].fill_(float("nan"))), BadFileError, "NaN"),
        (damaged("gone", lambda t: t.pop(first)), BasisMismatchError, "lacks"),
    ]
    for folder, error, message in cases:
        with pytest.raises(error, match=message):
            hotswap(model, folder)
        assert torch.equal(logits(model), before)
    with pytest.raises(SubspaceError, match="no subspace adapter 'other'"):
        hotswap(model, one, "other")
    model.merge_adapter()
    with pytest.raises(SubspaceError, match="unmerge"):
        hotswap(model, one)


def test_fields_that_say_the_same_sizes_in_other_words_are_no_obstacle(basis_folder, tmp_path):
    every = {"query": 2, "value": 2}
    words = [{"extra_rank": 2}, {"extra_rank_pattern": every}, {"extra_rank": 2, "k": 6, "rank_pattern": {"query": 6}}]
    folders = [save(tmp_path / str(seed), str(basis_folder), seed, **each) for seed, each in enumerate(words)]
    model = PeftModel.from_pretrained(bert(), folders[0])
    for folder in (*folders[1:], folders[0]):
        hotswap(model, folder)
        assert torch.equal(logits(model), logits(PeftModel.from_pretrained(bert(), folder)))
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path / "again")), logits(model))


def test_in_a_model_of_other_names_sizes_are_told_module_by_module(basis_folder, tmp_path):
    name = "bert.encoder.layer.0.attention.self.query"
    config = {"extra_rank": 2, "extra_rank_pattern": {name: 1}, "rank_pattern": {name: 3}}
    one, two = (save(tmp_path / str(seed), str(basis_folder), seed, **config) for seed in (1, 2))
    model = PeftModel.from_pretrained(bert().bert, one).eval()  # where the head is left out, so is the prefix
    hotswap(model, two)
    with torch.no_grad():
        now = model(inputs()).last_hidden_state
        wanted = PeftModel.from_pretrained(bert(), two).base_model.model.bert(inputs()).last_hidden_state
    torch.testing.assert_close(now, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_compiled_model_is_not_compiled_again(basis_folder, tmp_path):
    one, two = (save(tmp_path / str(seed), str(basis_folder), seed) for seed in (1, 2))
    model = PeftModel.from_pretrained(bert(), one).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs()).logits, logits(model))
        counter = torch._dynamo.utils.counters
        graphs = counter["stats"]["unique_graphs"]
        for folder in (two, one, two):
            hotswap(compiled, folder)
            expected = logits(PeftModel.from_pretrained(bert(), folder))
            torch.testing.assert_close(compiled(inputs()).logits, expected, atol=1e-5, rtol=1e-4)
    assert counter["stats"]["unique_graphs"] == graphs
    assert not counter["graph_break"]


@pytest.mark.parametrize("swap", [hotswap, lambda model, task: hotswap_adapter(model, str(task), "default")])
def test_a_swapped_task_is_saved_with_the_basis_that_its_configuration_asks_for(basis_folder, tmp_path, swap):
    plain = save(tmp_path / "plain", str(basis_folder), seed=1)
    other = save(tmp_path / "other", str(basis_folder), seed=2)
    model = PeftModel.from_pretrained(bert(), plain)
    swap(model, other)
    model.peft_config["default"].save_basis = True
    model.save_pretrained(tmp_path / "saved")
    assert any("subspace_U" in key for key in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path / "saved")), logits(model))


def test_a_task_that_carries_its_basis_takes_the_place_of_one_that_does_not(basis_folder, tmp_path):
    plain = save(tmp_path / "plain", str(basis_folder), seed=1)
    carrying = save(tmp_path / "carrying", str(basis_folder), seed=2, save_basis=True)
    for first, second in ((plain, carrying), (carrying, plain)):
        model = PeftModel.from_pretrained(bert(), first)
        hotswap(model, second)
        model.save_pretrained(tmp_path / "saved")
        loaded = PeftModel.from_pretrained(bert(), tmp_path / "saved")
        assert torch.equal(logits(loaded), logits(PeftModel.from_pretrained(bert(), second)))
