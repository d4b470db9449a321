"""Sources of every kind, and every way a fleet can be bad."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from subspace_peft import build_basis
from subspace_peft.builders.fleet import gather
from subspace_peft.builders.hosvd import exact, hosvd
from subspace_peft.errors import SourceError, SubspaceError
from subspace_peft.sources import Factors, open_source
from subspace_peft.sources.lora import scaling

from .models import bert, gpt2, train_lora
from .test_build import fleet

# -- sources --------------------------------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_basis(kind, fleets):
    folders = fleets[kind][:3]
    live = [PeftModel.from_pretrained(kind(), folder) for folder in folders]
    pairs = [(get_peft_model_state_dict(model), model.peft_config["default"]) for model in live]
    reference = build_basis(folders, k=4, progress=False)
    for sources in (live, pairs):
        other = build_basis(sources, k=4, progress=False)
        assert other.digests.keys() == reference.digests.keys()
        for name in reference:
            torch.testing.assert_close(other[name].U, reference[name].U, atol=1e-5, rtol=0)
            torch.testing.assert_close(other[name].M, reference[name].M, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 16},
        {"r": 2, "lora_alpha": 3, "use_rslora": True},
        {"r": 4, "rank_pattern": {"value": 2}, "alpha_pattern": {"0.attention.self.query": 32}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_scales_and_ranks_are_folded_in_as_peft_applies_them(config, tmp_path):
    folder = train_lora(bert, tmp_path / "lora", seed=1, **config)
    source = open_source(str(folder))
    model = PeftModel.from_pretrained(bert(), folder)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            update = source.factors(name.removeprefix("base_model.model."))
            torch.testing.assert_close(
                (update.B @ update.A).float(), module.get_delta_weight("default"), atol=1e-6, rtol=1e-5
            )
    mixed = build_basis([str(folder), str(train_lora(bert, tmp_path / "b", 2, r=8))], k=4, progress=False)
    assert [entry["ranks"] for entry in mixed.info["sources"]][1] == [8]


def test_scaling_formulas():
    assert scaling({"r": 4, "lora_alpha": 8}, "m", 4) == 2
    assert scaling({"r": 4, "lora_alpha": 8, "use_rslora": True}, "m", 4) == 4
    assert scaling({"r": 4, "lora_alpha": 8, "rank_pattern": {"m": 2}, "alpha_pattern": {r".*\.m": 6}}, "x.m", 2) == 3
    with pytest.raises(ValueError, match="rank 3"):
        scaling({"r": 4, "lora_alpha": 8}, "m", 3)


def test_a_task_heads_prefix_does_not_split_the_modules(tmp_path):
    with_head = train_lora(bert, tmp_path / "with-head", 1)
    bare = train_lora_bare(tmp_path / "bare", 2)
    basis = build_basis([str(with_head), str(bare)], k=4, progress=False)
    assert len(basis) == 4
    assert all(name.startswith("encoder.layer") for name in basis)
    assert basis.find("bert.encoder.layer.0.attention.self.query") == "encoder.layer.0.attention.self.query"


def train_lora_bare(folder: Path, seed: int) -> Path:
    model = bert().bert
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


def test_shared_seed_sources_are_found_and_share_one_vote():
    torch.manual_seed(0)
    start = torch.randn(3, 16, dtype=torch.float64)
    states = fleet(5, modules=("q",))
    for state in states[:3]:
        state["q.lora_A.weight"] = start + 0.1 * torch.randn(3, 16, dtype=torch.float64)
    basis = build_basis(states, k=4, progress=False)
    assert [entry["seed_group"] for entry in basis.info["sources"]] == [0, 0, 0, 1, 2]
    # three of one group weigh as much as one: with these for weights, the fleet's span is that of a fleet with one of
    # them
    fleet_ = gather(states, skip_bad=False, partial=False, token=None, progress=False)
    assert fleet_.source_weights([0, 1, 2, 3, 4]) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1, 1])
    assert fleet_.source_weights([2, 3]) == [1, 1]
    updates = [Factors(state["q.lora_B.weight"], state["q.lora_A.weight"]) for state in states]
    one = hosvd(exact([updates[0], *updates[3:]], [1.0, 1.0, 1.0]), 3, None, 0)
    weights = [count**0.5 for count in fleet_.source_weights(range(5))]
    three = hosvd(exact([*updates[:1] * 3, *updates[3:]], weights), 3, None, 0)
    torch.testing.assert_close(one.U @ one.U.T, three.U @ three.U.T, atol=1e-6, rtol=0)


# -- generated bases ------------------------------------------------------------------------------------------------


def test_base_weights_are_top_singular_vectors():
    for make, target in ((bert, ["query"]), (gpt2, ["c_attn"])):
        model = make()
        basis = build_basis(builder="base-weights", base_model=model, target_modules=target, k=4, progress=False)
        for name, module in basis.items():
            weight = model.get_submodule(name).weight.detach()
            weight = weight.T if make is gpt2 else weight
            captured = module.project(weight)
            torch.testing.assert_close(
                captured.diagonal().abs(), torch.linalg.svdvals(weight)[:4], atol=1e-5, rtol=1e-4
            )


def test_random_takes_sizes_from_a_basis_from_sources_or_from_a_model(fleets, bases):
    like = build_basis(like=bases[bert], builder="random", seed=1, progress=False)
    again = build_basis(like=bases[bert], builder="random", seed=1, progress=False)
    other = build_basis(like=bases[bert], builder="random", seed=2, progress=False)
    assert like.fingerprint == again.fingerprint != other.fingerprint
    names = bases[bert].shapes()
    assert {n: (s["k_out"], s["out"]) for n, s in like.shapes().items()} == {
        n: (s["k_out"], s["out"]) for n, s in names.items()
    }
    assert build_basis(fleets[bert], k=6, builder="random", seed=1, progress=False).fingerprint == like.fingerprint
    with pytest.raises(SubspaceError, match="which modules"):
        build_basis(builder="random", progress=False)


# -- bad fleets -----------------------------------------------------------------------------------------------------


def broken(folder: str, tmp_path: Path, how: str) -> Path:
    copy = tmp_path / how
    shutil.copytree(folder, copy)
    weights, config = copy / "adapter_model.safetensors", copy / "adapter_config.json"
    tensors, settings_ = load_file(weights), json.loads(config.read_text())
    first = sorted(tensors)[0]
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif how == "nan":
        tensors[first][0, 0] = float("nan")
        save_file(tensors, weights)
    elif how == "integers":
        save_file({key: value.int() for key, value in tensors.items()}, weights)
    elif how == "zero":
        save_file({key: value * ("lora_A" in key) for key, value in tensors.items()}, weights)
    elif how == "half-missing":
        tensors.pop(first)
        save_file(tensors, weights)
    elif how == "fewer-modules":
        module = first.split(".lora_")[0]
        save_file({key: value for key, value in tensors.items() if not key.startswith(module)}, weights)
    elif how == "other-base":
        settings_["base_model_name_or_path"] = "somebody/else"
    elif how == "dora":
        settings_["use_dora"] = True
    elif how == "vera":
        settings_["peft_type"] = "VERA"
    elif how == "wrong-rank":
        settings_["r"] = 5
    elif how == "no-config":
        config.unlink()
    elif how == "no-json":
        config.write_text("{")
    elif how == "pickle-only":
        weights.rename(copy / "adapter_model.bin")
    if config.exists() and how not in ("no-json",):
        config.write_text(json.dumps(settings_))
    return copy


BAD = {
    "truncated": "truncated or damaged",
    "nan": "NaN or infinite",
    "integers": "no float",
    "zero": "every lora_B is zero",
    "half-missing": "incomplete",
    "fewer-modules": "lacks 1 modules",
    "other-base": "somebody/else",
    "dora": "use_dora",
    "vera": "VERA",
    "wrong-rank": "rank 4",
    "no-config": "adapter_config.json",
    "no-json": "adapter_config.json",
    "pickle-only": "unpickled",
}


@pytest.fixture
def named_fleet(fleets, tmp_path):
    """The fleet with a base model's name, as real adapters have."""
    folders = []
    for folder in fleets[bert]:
        copy = tmp_path / "fleet" / Path(folder).name
        shutil.copytree(folder, copy)
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
        folders.append(str(copy))
    return folders


@pytest.mark.parametrize("how", BAD)
def test_bad_sources_are_named_with_the_reason_and_can_be_left_out(named_fleet, tmp_path, how):
    bad = broken(named_fleet[0], tmp_path, how)
    with pytest.raises(SourceError, match=BAD[how]) as caught:
        build_basis([*named_fleet, str(bad)], k=4, progress=False)
    assert str(bad) in str(caught.value)
    basis = build_basis([*named_fleet, str(bad)], k=4, skip_bad=True, progress=False)
    assert basis.fingerprint == build_basis(named_fleet, k=4, progress=False).fingerprint
    assert [str(bad) in entry["reason"] for entry in basis.info["skipped"]] == [True]


def test_all_bad_sources_are_listed_at_once(named_fleet, tmp_path):
    bad = [broken(named_fleet[0], tmp_path, how) for how in ("nan", "truncated", "zero")]
    with pytest.raises(SourceError, match="3 of 5") as caught:
        build_basis([*named_fleet[:2], *map(str, bad)], k=4, progress=False)
    assert all(str(folder) in str(caught.value) for folder in bad)


def test_partial_fleets_need_to_be_asked_for(named_fleet, tmp_path):
    part = broken(named_fleet[0], tmp_path, "fewer-modules")
    basis = build_basis([*named_fleet, str(part)], k=4, partial=True, progress=False)
    assert len(basis) == 4
    assert [entry["modules"] for entry in basis.info["sources"]].count(3) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "number of directions"),
        ({"k": 1.5}, "number of directions"),
        ({"k": True}, "number of directions"),
        ({"k_in": 0}, "at least 1"),
        ({"builder": "magic"}, "no such choice"),
        ({"weights": "loud"}, "no weighting"),
        ({"k": 0.5, "builder": "eigenlora"}, "share of energy"),
        ({"directions": -1}, "at least 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(SubspaceError, match=message):
        build_basis(fleet(), progress=False, **arguments)


@pytest.mark.parametrize("sources", [["/no/such/folder"], [3], [], [{"x": torch.zeros(2)}]], ids=str)
def test_no_usable_source(sources):
    with pytest.raises(SourceError):
        build_basis(sources, progress=False)
