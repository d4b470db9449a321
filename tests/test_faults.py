"""Ways of use that once gave a wrong or an unusable result without a word."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from subspace_peft import ModuleBasis, SubspaceBasis, SubspaceConfig, build_basis, export_lora, project_lora
from subspace_peft.cli import main
from subspace_peft.errors import BadFileError, BasisMismatchError, SourceError, SubspaceError
from subspace_peft.report import null_basis
from subspace_peft.sources import open_source
from subspace_peft.tuner import SubspaceLayer

from .models import basis_storage, bert, inputs, needs_transformers_adapters, randomise, train_lora


def logits(model):
    with torch.no_grad():
        return model.eval()(inputs()).logits


def adapted_names(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SubspaceLayer)]


# -- which layers -----------------------------------------------------------------------------------------------------


def test_layers_to_transform_narrows_the_bases_own_modules(basis_folder, tmp_path):
    model = randomise(get_peft_model(bert(), SubspaceConfig(basis=str(basis_folder), layers_to_transform=[1])))
    names = adapted_names(model)
    assert len(names) == 2
    assert all(".layer.1." in name for name in names)
    model.save_pretrained(tmp_path / "task")
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path / "task")), logits(model))
    with pytest.raises(SubspaceError, match="no targets in layer 7"):
        get_peft_model(
            bert(), SubspaceConfig(basis=str(basis_folder), layers_to_transform=[7], layers_pattern="layer")
        )


def test_two_towers_do_not_share_one_basis_silently(basis_folder):
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = bert(), bert()

    with pytest.raises(BasisMismatchError, match="exclude_modules"):
        get_peft_model(Towers(), SubspaceConfig(basis=str(basis_folder)))
    one = get_peft_model(Towers(), SubspaceConfig(basis=str(basis_folder), exclude_modules=r"right\..*"))
    assert len(adapted_names(one)) == 4


# -- projecting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["folder", "live", "state dict"])
def test_a_projected_task_loads_with_its_modules_to_save(bases, tmp_path, how):
    folder = train_lora(bert, tmp_path / "lora", 3, modules_to_save=["classifier"])
    live = PeftModel.from_pretrained(bert(), folder)
    lora = {"folder": folder, "live": live}.get(how)
    if how == "state dict":
        lora = (load_file(folder / "adapter_model.safetensors"), live.peft_config["default"])
    project_lora(lora, bases[next(iter(bases))]).save_pretrained(tmp_path / "task")
    task = PeftModel.from_pretrained(bert(), tmp_path / "task")
    saved = load_file(folder / "adapter_model.safetensors")
    weight = task.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(weight, saved["base_model.model.classifier.weight"])
    assert "import subspace_peft" in (tmp_path / "task" / "README.md").read_text()


def test_what_a_projection_would_lose_is_refused(bases, tmp_path):
    basis = bases[bert]
    tokens = train_lora(bert, tmp_path / "tokens", 3, trainable_token_indices={"word_embeddings": [1, 2]})
    biased = train_lora(bert, tmp_path / "biased", 3, bias="all")
    for folder, what in ((tokens, "token_adapter|trainable_tokens"), (biased, "bias")):
        with pytest.raises(SubspaceError, match=what):
            project_lora(folder, basis).save_pretrained(tmp_path / "task")
    assert not (tmp_path / "task" / "adapter_config.json").exists()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_sources_whose_start_changed_the_base_weights_are_refused(tmp_path, start):
    folder = train_lora(bert, tmp_path / "lora", 3, init_lora_weights=start)
    with pytest.raises(SourceError, match=r"init_lora_weights.*path_initial_model_for_weight_conversion"):
        open_source(folder)


# -- sources ----------------------------------------------------------------------------------------------------------


def test_one_source_alone_counts_as_a_list_of_one(fleets):
    folder = fleets[bert][0]
    expected = build_basis([folder], k=3, progress=False).fingerprint
    live = PeftModel.from_pretrained(bert(), folder)
    state = load_file(Path(folder) / "adapter_model.safetensors")
    for source in (folder, Path(folder), open_source(folder)):
        assert build_basis(source, k=3, progress=False).fingerprint == expected
    for source in (live, state, (state, live.peft_config["default"])):
        assert len(build_basis(source, k=3, progress=False).info["sources"]) == 1
    assert len(null_basis(folder, k=3, progress=False).info["sources"]) == 1


def test_source_names_are_unique_and_never_mean_or_zero(tmp_path):
    names = ["x/a", "x/a-2", "y/a", "x/mean", "x/zero"]
    folders = [train_lora(bert, tmp_path / name, seed) for seed, name in enumerate(names)]
    basis = build_basis(folders, k=3, progress=False)
    assert [s["name"] for s in basis.info["sources"]] == ["a", "a-2", "a-3", "mean-2", "zero-2"]


@needs_transformers_adapters
def test_models_adapted_by_transformers_itself_are_sources_and_tasks(bases, tmp_path):
    model = bert()
    model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"]), "mine")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    source = open_source(model)
    assert source.name == "mine"
    assert len(source.keys) == 4
    task = bert()
    task.add_adapter(SubspaceConfig(basis=bases[bert]), "task")
    randomise(task)
    export_lora(task, tmp_path / "lora")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bert(), tmp_path / "lora")), logits(task))


def test_a_basis_opened_once_is_found_by_calls_that_cannot_name_it(basis_folder, tmp_path):
    base = bert()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = randomise(get_peft_model(base, SubspaceConfig(basis=str(basis_folder), task_type="SEQ_CLS")))
    model.save_pretrained(tmp_path / "task")
    expected = logits(model)
    moved = shutil.move(basis_folder, tmp_path / "elsewhere")
    del model, base
    SubspaceBasis.from_pretrained(moved)
    found = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "task")
    assert torch.equal(logits(found), expected)


# -- the basis
# ---------------------------------------------------------------------------------------------------------


def test_truncated_directions_keep_their_number(bases):
    basis = bases[bert]
    module = next(iter(basis.values()))
    G = torch.zeros(2, module.k_out, module.k_in)
    G[0, 0, 0] = G[1, -1, -1] = 1
    made = ModuleBasis(U=module.U, V=module.V, G=G)
    cut = made.truncate(2, 2).G
    assert cut.shape == (2, 2, 2)
    assert torch.equal(cut[0], torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert not cut[1].any()


def test_a_task_of_few_directions_loads_again(bases, tmp_path):
    modules = {}
    for name, module in bases[bert].items():
        G = torch.zeros(3, module.k_out, module.k_in)
        G[0, 0, 0] = G[1, 1, 1] = G[2, -1, -1] = 1
        modules[name] = ModuleBasis(U=module.U, V=module.V, G=G)
    basis = SubspaceBasis(modules, bases[bert].info)
    basis.save_pretrained(tmp_path / "basis")
    model = randomise(get_peft_model(bert(), SubspaceConfig(basis=basis, coefficients="directions", k=3)))
    model.save_pretrained(tmp_path / "task")
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path / "task")), logits(model))


def test_a_basis_whose_second_file_cannot_be_written_leaves_the_first_too(bases, basis_folder, fleets, monkeypatch):
    before = {file.name: file.read_bytes() for file in basis_folder.iterdir()}
    other = build_basis(fleets[bert][:2], k=2, progress=False)

    def full(self: Path, text: str, encoding: str | None = None) -> None:
        self.write_bytes(text.encode()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        other.save_pretrained(basis_folder, overwrite=True)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in basis_folder.iterdir()} == before
    assert SubspaceBasis.from_pretrained(basis_folder).fingerprint == bases[bert].fingerprint


def test_the_basis_is_stored_once_whatever_else_adapters_differ_in(kind, bases):
    basis = bases[kind]
    model = get_peft_model(kind(), SubspaceConfig(basis=basis, mean_gain="trainable", coefficients="directions"))
    size = basis_storage(model)
    for i, config in enumerate([{}, {"mean_gain": "fixed"}, {"k": 6}, {"coefficients": "directions"}, {"k": 100}]):
        model.add_adapter(f"t{i}", SubspaceConfig(basis=basis, **config))
    assert basis_storage(model) == size
    model.add_adapter("smaller", SubspaceConfig(basis=basis, k=2))
    assert basis_storage(model) > size


def test_a_home_folder_is_expanded(basis_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(basis_folder.parent))
    assert len(SubspaceBasis.from_pretrained("~/basis")) == 4
    get_peft_model(bert(), SubspaceConfig(basis="~/basis"))


@pytest.mark.parametrize("name", ["expected", "verify", "put", "get"])
def test_adapters_may_be_named_like_our_own_methods(bases, name):
    model = get_peft_model(bert(), SubspaceConfig(basis=bases[bert]), adapter_name=name)
    assert name in model.peft_config
    logits(model)


def test_no_share_of_energy_exceeds_one(fleets):
    basis = build_basis(fleets[bert], k=30, progress=False)
    assert all(source["energy_kept"] <= 1 for source in basis.info["sources"])
    projection = project_lora(fleets[bert][0], basis)
    assert max(projection.energy.values()) <= 1
    assert projection.energy_kept <= 1


# -- configurations
# ----------------------------------------------------------------------------------------------------


def test_a_configuration_made_from_a_dict_keeps_its_start(bases, tmp_path):
    config = SubspaceConfig(basis=bases[bert].location, start="mean")
    for again in (SubspaceConfig(**config.to_dict()),):
        assert not again.loaded
        assert not torch.equal(logits(get_peft_model(bert(), again)), logits(bert()))
    config.save_pretrained(tmp_path / "wish")
    assert not SubspaceConfig.from_pretrained(tmp_path / "wish").loaded
    get_peft_model(bert(), config).save_pretrained(tmp_path / "task")
    assert SubspaceConfig.from_pretrained(tmp_path / "task").loaded
    with pytest.raises(SubspaceError, match="coefficients='none'"):
        SubspaceConfig(coefficients="none", mean_gain="trainable", start="lora1")


def test_the_base_check_can_be_left_out_in_the_loading_call(basis_folder, tmp_path):
    get_peft_model(bert(), SubspaceConfig(basis=str(basis_folder))).save_pretrained(tmp_path / "task")
    with pytest.raises(BasisMismatchError):
        PeftModel.from_pretrained(bert(seed=5), tmp_path / "task")
    PeftModel.from_pretrained(bert(seed=5), tmp_path / "task", check_base_model=False)


def test_a_task_that_could_not_be_loaded_again_is_announced(fleets):
    basis = build_basis(fleets[bert], k=3, progress=False)
    with pytest.warns(UserWarning, match="could not be loaded again"):
        get_peft_model(bert(), SubspaceConfig(basis=basis, save_basis=False))
    with pytest.warns(UserWarning, match="could not be loaded again"):
        get_peft_model(bert(), SubspaceConfig(basis="random", k=3, target_modules=["query"], save_basis=False))


def test_a_loaded_task_can_be_made_self_contained(basis_folder, tmp_path):
    config = SubspaceConfig(basis=str(basis_folder), coefficients="directions", mean_gain="fixed")
    model = randomise(get_peft_model(bert(), config))
    model.save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "task")
    loaded.peft_config["default"].save_basis = True
    loaded.save_pretrained(tmp_path / "whole")
    shutil.rmtree(basis_folder)
    keys = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert {key.rsplit("_", 1)[-1] for key in keys if "coef" not in key} == {"U", "V", "M", "G"}
    assert json.loads((tmp_path / "whole" / "adapter_config.json").read_text())["basis_modules"]
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path / "whole")), logits(model))


# -- transformers' own loading
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["nan", "missing coefficients", "missing basis"])
def test_transformers_own_loading_refuses_damaged_tasks(basis_folder, tmp_path, how):
    config = SubspaceConfig(basis=str(basis_folder), save_basis=how == "missing basis")
    randomise(get_peft_model(bert(), config)).save_pretrained(tmp_path / "task")
    file = tmp_path / "task" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in sorted(tensors) if k.endswith("subspace_U" if how == "missing basis" else "weight"))
    if how == "nan":
        tensors[key][0, 0] = float("nan")
    else:
        tensors.pop(key)
    save_file(tensors, file)
    model = bert()
    with pytest.raises((BadFileError, RuntimeError), match=r"NaN|did not bring|subspace_coef"):
        model.load_adapter(str(tmp_path / "task"))
        logits(model)


def test_a_new_task_from_a_saved_configuration_is_no_damaged_one(basis_folder, tmp_path):
    from peft import PeftConfig

    randomise(get_peft_model(bert(), SubspaceConfig(basis=str(basis_folder)))).save_pretrained(tmp_path / "task")
    new = get_peft_model(bert(), PeftConfig.from_pretrained(tmp_path / "task"))
    assert torch.equal(logits(new), logits(bert()))


# -- command line
# ------------------------------------------------------------------------------------------------------


def test_numbers_on_the_command_line_are_not_bent(basis_folder, tmp_path, capsys):
    get_peft_model(bert(), SubspaceConfig(basis=str(basis_folder))).save_pretrained(tmp_path / "task")
    for value in ("8.9", "nan", "eight"):
        assert main(["export-lora", str(tmp_path / "task"), "--out", str(tmp_path / "out"), "--pad-to", value]) == 1
        assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_random_twin_of_a_basis_from_the_command_line(basis_folder, tmp_path, capsys):
    assert (
        main(["build", "--builder", "random", "--like", str(basis_folder), "--out", str(tmp_path / "r"), "--quiet"])
        == 0
    )
    given, made = (
        SubspaceBasis.from_pretrained(basis_folder).shapes(),
        SubspaceBasis.from_pretrained(tmp_path / "r").shapes(),
    )
    assert {n: (s["k_out"], s["k_in"]) for n, s in made.items()} == {
        n: (s["k_out"], s["k_in"]) for n, s in given.items()
    }
    assert main(["build", "--builder", "random", "--out", str(tmp_path / "none"), "--quiet"]) == 1
    assert "--like" in capsys.readouterr().err


def test_nothing_of_this_warns(basis_folder, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(bert(), SubspaceConfig(basis=str(basis_folder), layers_to_transform=1))
        model.save_pretrained(tmp_path / "task")
        PeftModel.from_pretrained(bert(), tmp_path / "task")


def test_loading_a_task_warns_of_nothing(basis_folder, tmp_path):
    get_peft_model(bert(), SubspaceConfig(basis=str(basis_folder), rank_pattern={"query": 2})).save_pretrained(
        tmp_path / "task"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        PeftModel.from_pretrained(bert(), tmp_path / "task")


def test_what_is_not_supported_is_refused_before_the_model_is_touched(bases):
    with pytest.raises(SubspaceError, match=r"target_parameters=.* is not supported"):
        SubspaceConfig(basis=bases[bert], target_parameters=["experts.gate_up_proj"])
    model = bert()
    model._tp_size = 2
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(SubspaceError, match="tensor parallelism"):
        get_peft_model(model, SubspaceConfig(basis=bases[bert]))
    assert [name for name, _ in model.named_modules()] == before
