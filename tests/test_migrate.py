"""Tasks carried over to a basis's next version: they lose nothing, whatever their coefficients, or say how much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from subspace_peft import SubspaceBasis, SubspaceConfig, build_basis, migrate_task, update_basis
from subspace_peft.errors import BasisMismatchError, SubspaceError

from .models import bert, gpt2, inputs, randomise, train_lora

KINDS = [
    {"coefficients": coefficients, "mean_gain": gain, **more}
    for coefficients, more in (("core", {}), ("factor", {"r": 3}), ("diagonal", {}), ("directions", {}), ("none", {}))
    for gain in ("none", "fixed", "trainable")
    # with nothing but a mean core that is not used there is nothing to train
    if (coefficients, gain) not in (("none", "none"), ("none", "fixed"))
] + [{"k": 4}, {"rank_pattern": {"value": 2}, "mean_gain": "fixed"}, {"coefficients": "factor", "r": 8}]


def ids(config) -> str:
    return "-".join(map(str, config.values()))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(inputs()).logits


def saved(make, folder: Path, basis, **config: object) -> tuple[Path, torch.Tensor]:
    # the mean update of random adapters is small: a gain that shows
    std = 100.0 if config.get("coefficients") == "none" else 0.3
    model = randomise(get_peft_model(make(), SubspaceConfig(basis=basis, **config)), std=std)
    model.save_pretrained(folder)
    return folder, logits(model)


@pytest.fixture(scope="module")
def grown(bases, tmp_path_factory):
    made = {}
    for make in (bert, gpt2):
        root = tmp_path_factory.mktemp(make.__name__)
        new = [str(train_lora(make, root / f"new{i}", seed=50 + i)) for i in range(2)]
        made[make] = update_basis(bases[make], new, add=5, add_in=3, progress=False)
        made[make].save_pretrained(root / "v2")
    return made


@pytest.mark.parametrize("config", KINDS, ids=ids)
def test_a_migrated_task_gives_the_old_outputs(kind, config, bases, grown, tmp_path):
    folder, before = saved(kind, tmp_path / "old", bases[kind].location, **config)
    found = migrate_task(folder, grown[kind])
    assert found.converted is None and found.total_drift < 1e-6
    found.save_pretrained(tmp_path / "new")
    stored = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert stored["basis_fingerprint"] == grown[kind].fingerprint
    assert stored["coefficients"] == config.get("coefficients", "core")
    model = PeftModel.from_pretrained(kind(), tmp_path / "new")
    assert torch.allclose(logits(model), before, atol=2e-5 * float(before.abs().max()))
    assert not torch.allclose(logits(kind()), before, atol=1e-3)
    assert model.peft_config["default"].base_probe is not None


def test_told_k_stays_and_so_do_the_numbers(bases, grown, tmp_path):
    folder, _ = saved(bert, tmp_path / "old", bases[bert].location, k=4)
    found = migrate_task(folder, grown[bert])
    assert found.config.k == 4
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(value, found.tensors[key])


def test_a_migrated_task_trains_on_in_the_new_directions(bases, grown, tmp_path):
    folder, _ = saved(bert, tmp_path / "old", bases[bert].location)
    migrate_task(folder, grown[bert]).save_pretrained(tmp_path / "new")
    model = PeftModel.from_pretrained(bert(), tmp_path / "new", is_trainable=True)
    model(inputs()).logits.sum().backward()
    weight = next(p for name, p in model.named_parameters() if "subspace_coef" in name)
    assert weight.shape == (11, 9) and weight.grad[6:].abs().max() > 0 and not weight[6:].any()


def test_live_models_and_tasks_that_carry_their_basis(bases, grown, tmp_path):
    model = randomise(
        get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location, save_basis=True, mean_gain="fixed"))
    )
    model.save_pretrained(tmp_path / "own")
    for task in (model, tmp_path / "own"):
        found = migrate_task(task, grown[bert].location)
        found.save_pretrained(tmp_path / "new")
        assert not any("subspace_U" in key for key in found.tensors)
        assert torch.allclose(logits(PeftModel.from_pretrained(bert(), tmp_path / "new")), logits(model), atol=1e-5)


def test_trained_modules_and_scores_come_along(bases, grown, tmp_path):
    from subspace_peft import write_card

    folder, before = saved(bert, tmp_path / "old", bases[bert].location, modules_to_save=["classifier"])
    write_card(folder, datasets=["org/data"])
    migrate_task(folder, grown[bert]).save_pretrained(tmp_path / "new")
    assert torch.allclose(logits(PeftModel.from_pretrained(bert(), tmp_path / "new")), before, atol=1e-5)
    model = PeftModel.from_pretrained(bert(), tmp_path / "new")
    model.save_pretrained(tmp_path / "again")
    assert "org/data" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("config", KINDS[:13], ids=ids)
def test_onto_a_refitted_basis_the_drift_is_what_is_measured_and_is_bounded(config, bases, fleets, tmp_path):
    old = bases[bert]
    new = update_basis(old, [str(train_lora(bert, tmp_path / "new0", seed=50))], k=7, progress=False)
    new.save_pretrained(tmp_path / "v2")
    folder, _ = saved(bert, tmp_path / "old", old.location, **config)
    with pytest.raises(SubspaceError, match=r"would change by .* max_drift=1e-05"):
        migrate_task(folder, new)
    found = migrate_task(folder, new, max_drift=1.0)
    assert found.converted == ("diagonal" if config["coefficients"] == "diagonal" else None)
    found.save_pretrained(tmp_path / "task")
    was, now = PeftModel.from_pretrained(bert(), folder), PeftModel.from_pretrained(bert(), tmp_path / "task")
    layers = {name: layer for name, layer in now.named_modules() if hasattr(layer, "subspace_coef")}
    for name, layer in layers.items():
        key = name.removeprefix("base_model.model.")
        before, after = was.get_submodule(name).get_delta_weight("default"), layer.get_delta_weight("default")
        module = new[str(new.find(key))]
        assert torch.allclose(after, module.reconstruct(module.project(before)), atol=1e-5 * float(before.norm()))
        assert found.drift[key] == pytest.approx(float((before - after).norm() / before.norm()), abs=1e-5)


def test_a_mean_that_is_another_becomes_part_of_the_core(bases, tmp_path):
    old = bases[bert]
    from dataclasses import replace

    other = SubspaceBasis({name: replace(module, M=-module.M) for name, module in old.items()}, old.info)
    other.save_pretrained(tmp_path / "other")
    folder, before = saved(bert, tmp_path / "old", old.location, mean_gain="trainable", coefficients="factor")
    found = migrate_task(folder, other)
    assert found.converted == "factor" and found.config.mean_gain == "none"
    found.save_pretrained(tmp_path / "new")
    assert torch.allclose(logits(PeftModel.from_pretrained(bert(), tmp_path / "new")), before, atol=1e-5)


def test_tasks_that_cannot_be_carried_are_refused(bases, grown, tmp_path):
    folder, _ = saved(bert, tmp_path / "old", bases[bert].location)
    with pytest.raises(BasisMismatchError, match="modules are not in the new basis"):
        migrate_task(folder, grown[gpt2])
    with pytest.raises(SubspaceError, match="max_drift=-1"):
        migrate_task(folder, grown[bert], max_drift=-1)
    memory = update_basis(bases[bert], [str(train_lora(bert, tmp_path / "new", 77))], progress=False)
    with pytest.raises(SubspaceError, match="has to be stored"):
        migrate_task(folder, memory).save_pretrained(tmp_path / "new-task")
    assert not (tmp_path / "new-task").exists()


def test_embeddings_and_their_tasks_grow_too(tmp_path):
    from peft import LoraConfig

    def lora(name: str, seed: int) -> str:
        model = get_peft_model(bert(), LoraConfig(r=4, target_modules=["word_embeddings", "query"]))
        draw = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    old = build_basis([lora("one", 1), lora("two", 2)], k=5, progress=False)
    old.save_pretrained(tmp_path / "v1")
    new = update_basis(old, [lora("three", 3)], progress=False)
    new.save_pretrained(tmp_path / "v2")
    folder, before = saved(bert, tmp_path / "old", old.location)
    migrate_task(folder, new).save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert list(config["weight_shapes"].values()) == [[100, 32]]
    assert torch.allclose(logits(PeftModel.from_pretrained(bert(), tmp_path / "new")), before, atol=1e-5)
