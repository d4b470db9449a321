"""A task on disk: what is wrong is said before the model is touched; its basis is found or the remedy named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from subspace_peft import SubspaceConfig, build_basis
from subspace_peft.errors import BadFileError, BasisMismatchError, BasisNotFoundError, SubspaceError
from subspace_peft.tuner import SubspaceLayer

from . import fresh
from .models import bert, gpt2, inputs, randomise

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def logits(model):
    with torch.no_grad():
        return model.eval()(inputs()).logits


@pytest.fixture
def task_folder(basis_folder, tmp_path) -> Path:
    model = randomise(get_peft_model(bert(), SubspaceConfig(basis=str(basis_folder), modules_to_save=["classifier"])))
    model.save_pretrained(tmp_path / "task")
    return tmp_path / "task"


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# -- task -----------------------------------------------------------------------------------------------------------


def test_a_task_holds_coefficients_and_modules_to_save_only(task_folder, bases):
    keys = load_file(task_folder / WEIGHTS)
    assert {key.split(".")[-2] for key in keys} == {"subspace_coef", "classifier"}
    config = json.loads((task_folder / CONFIG).read_text())
    assert config["peft_type"] == "SUBSPACE"
    assert config["basis_fingerprint"] == bases[bert].fingerprint
    assert config["basis"].endswith("basis")
    assert not set(config) & {"_basis", "_plan", "_near"}


def test_the_readme_of_a_task_says_how_to_load_it_and_keeps_other_words(task_folder, bases):
    readme = task_folder / "README.md"
    text = readme.read_text()
    assert "KeyError: 'SUBSPACE'" in text
    assert bases[bert].fingerprint in text
    head, front, body = text.split("---\n", 2)
    assert head == "" and "library_name: peft" in front
    readme.write_text(f"---\n{front}---\nmine, before\n{body}\nmine, after\n")
    SubspaceConfig.from_pretrained(str(task_folder)).save_pretrained(str(task_folder))
    again = readme.read_text()
    assert again.startswith(f"---\n{front}---\nmine, before")
    assert again.rstrip().endswith("mine, after")
    assert again.count("## Loading") == 1


def damage_task(folder: Path, how: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    first = next(key for key in sorted(tensors) if "subspace_coef" in key)
    if how == "truncated":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])
        return
    if how == "not safetensors":
        (folder / WEIGHTS).write_bytes(b"hello, world, this is no tensor file")
        return
    if how == "nan":
        tensors[first][0, 0] = float("nan")
    elif how == "infinite classifier":
        tensors[next(key for key in tensors if "classifier.weight" in key)][0, 0] = float("inf")
    elif how == "integers":
        tensors[first] = tensors[first].to(torch.int32)
    elif how == "shape":
        tensors[first] = tensors[first][:3].contiguous()
    elif how == "unknown module":
        tensors[first.replace(".0.attention", ".7.attention")] = tensors.pop(first)
    elif how == "unknown tensor":
        tensors[first.rpartition(".")[0] + ".extra_W"] = torch.zeros(2, 3)
    elif how == "missing module":
        tensors.pop(first)
    elif how == "empty":
        tensors = {key: value for key, value in tensors.items() if "subspace_coef" not in key}
    elif how == "another kind":
        edit(folder / CONFIG, coefficients="diagonal")
    elif how == "another fingerprint":
        edit(folder / CONFIG, basis_fingerprint="e" * 64)
    elif how == "basis gone":
        edit(folder / CONFIG, basis="/no/such/basis", basis_fingerprint="d" * 64)
    elif how == "unknown coefficients":
        edit(folder / CONFIG, coefficients="magic")
    save_file(tensors, folder / WEIGHTS)


BAD_TASKS = {
    "truncated": (BadFileError, "truncated"),
    "not safetensors": (BadFileError, "no safetensors file"),
    "nan": (BadFileError, "NaN or infinite"),
    "infinite classifier": (BadFileError, "NaN or infinite"),
    "integers": (BadFileError, "dtype I32"),
    "shape": (BasisMismatchError, r"\(3, 6\)"),
    "unknown module": (BasisMismatchError, "layer.7"),
    "unknown tensor": (BasisMismatchError, "extra_W"),
    "missing module": (BasisMismatchError, "also targets"),
    "empty": (BadFileError, "no coefficients"),
    "another kind": (BasisMismatchError, "diagonal"),
    "another fingerprint": (BasisMismatchError, "e" * 64),
    "basis gone": (BasisNotFoundError, "was not found"),
    "unknown coefficients": (SubspaceError, "choose one of"),
}


@pytest.mark.parametrize("how", BAD_TASKS)
def test_bad_tasks_are_refused_before_the_model_is_touched(task_folder, how):
    damage_task(task_folder, how)
    model = bert()
    before = {name: type(module) for name, module in model.named_modules()}
    error, message = BAD_TASKS[how]
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(model, task_folder)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(logits(model), logits(bert()))


@pytest.mark.parametrize("how", BAD_TASKS)
def test_a_bad_second_task_leaves_the_first_as_it_was(task_folder, tmp_path, how):
    good = shutil.copytree(task_folder, tmp_path / "good")
    damage_task(task_folder, how)
    model = PeftModel.from_pretrained(bert(), good)
    expected = logits(model)
    with pytest.raises(BAD_TASKS[how][0]):
        model.load_adapter(task_folder, "second")
    assert list(model.peft_config) == ["default"]
    for layer in model.modules():
        if isinstance(layer, SubspaceLayer):
            assert list(layer.subspace_coef) == ["default"]
    assert torch.equal(logits(model), expected)


def test_wrong_base_models_are_refused(task_folder, basis_folder):
    with pytest.raises(BasisMismatchError, match="weights are not those"):
        PeftModel.from_pretrained(bert(seed=5), task_folder)
    with pytest.raises(BasisMismatchError, match=r"has no module|not in the basis|None of the basis"):
        PeftModel.from_pretrained(bert(layers=1), task_folder)
    with pytest.raises(BasisMismatchError, match="None of the basis"):
        get_peft_model(gpt2(), SubspaceConfig(basis=str(basis_folder)))
    wide = bert()
    wide.bert.encoder.layer[0].attention.self.query = torch.nn.Linear(32, 40)
    with pytest.raises(BasisMismatchError, match="out=32"):
        get_peft_model(wide, SubspaceConfig(basis=str(basis_folder)))
    config = SubspaceConfig.from_pretrained(str(task_folder))
    config.check_base_model = False
    PeftModel.from_pretrained(bert(seed=5), task_folder, config=config)


def test_merged_weights_are_not_taken_for_another_base_model(task_folder):
    model = PeftModel.from_pretrained(bert(), task_folder)
    model.merge_adapter()
    model.load_adapter(task_folder, "second")
    model.unmerge_adapter()
    assert list(model.peft_config) == ["default", "second"]


def test_different_hub_ids_are_different_base_models(bases, tmp_path):
    # of a size that no other test has: where weights are on record, names do not matter
    basis = bases[bert].truncate((5, 3))
    basis.info["base_model_name_or_path"] = "org/one"
    model = bert()
    model.config._name_or_path = "org/two"
    with pytest.raises(BasisMismatchError, match=r"org/one.*org/two"):
        get_peft_model(model, SubspaceConfig(basis=basis))
    get_peft_model(model, SubspaceConfig(basis=basis, check_base_model=False, save_basis=True))


def test_the_same_weights_in_half_precision_are_the_same_base_model(task_folder):
    PeftModel.from_pretrained(bert().to(torch.bfloat16), task_folder)


def test_a_config_alone_does_not_need_its_basis(tmp_path):
    assert SubspaceConfig().basis is None
    assert SubspaceConfig(target_modules=["q"]).target_modules == {"q"}
    SubspaceConfig(basis="somebody/elses-basis").save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, SubspaceConfig)
    assert loaded.basis == "somebody/elses-basis"
    with pytest.raises(BasisNotFoundError, match="basis='random'"):
        get_peft_model(bert(), SubspaceConfig(target_modules=["query"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coefficients": "none"}, "mean_gain='trainable'"),
        ({"mean_gain": "some"}, "choose one of"),
        ({"k": 0}, "at least 1"),
        ({"r": 2.5}, "whole number"),
        ({"alpha": 0}, "above 0"),
        ({"dropout": 1.0}, "below 1"),
        ({"dropout": "much"}, "below 1"),
        ({"basis": 3}, "give a SubspaceBasis"),
    ],
)
def test_wrong_config_values_are_refused(arguments, message):
    with pytest.raises(SubspaceError, match=message):
        SubspaceConfig(**arguments)


def test_targets_outside_the_basis_are_listed(basis_folder):
    with pytest.raises(BasisMismatchError, match=r"2 of 4 target modules.*key"):
        get_peft_model(bert(), SubspaceConfig(basis=str(basis_folder), target_modules=["query", "key"]))
    with pytest.raises(SubspaceError, match="LayerNorm"):
        get_peft_model(bert(), SubspaceConfig(basis=str(basis_folder), target_modules=["query", "LayerNorm"]))


def test_needs_that_the_basis_cannot_serve(fleets, tmp_path):
    plain = build_basis(fleets[bert], k=3, keep_cores=False, progress=False)
    random = build_basis(like=plain, builder="random", progress=False)
    for basis, config, message in (
        (plain, {"coefficients": "directions"}, "directions=m"),
        (plain, {"start": "lora1"}, "keep_cores=True"),
        (plain, {"start": "nobody"}, "no such source"),
        (random, {"mean_gain": "fixed"}, "no mean core"),
    ):
        with pytest.raises(SubspaceError, match=message):
            get_peft_model(bert(), SubspaceConfig(basis=basis, **config))


# -- where a basis is looked for --------------------------------------------------------------------------------------


def elsewhere(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process that has loaded nothing yet."""
    return fresh.run("-c", script, env={**os.environ, **env})


LOAD = """
    import sys
    from tests.models import bert, inputs
    from peft import PeftModel
    import subspace_peft, torch
    model = PeftModel.from_pretrained(bert(), {task!r}{more}).eval()
    print(model(inputs()).logits.double().sum().item())
"""


def test_a_moved_basis_is_found_beside_the_task_by_argument_or_not_at_all(task_folder, basis_folder, tmp_path):
    expected = logits(PeftModel.from_pretrained(bert(), task_folder)).double().sum().item()
    moved = Path(shutil.move(basis_folder, tmp_path / "elsewhere"))
    cache = str(tmp_path / "empty-cache")
    lost = elsewhere(LOAD.format(task=str(task_folder), more=""), SUBSPACE_PEFT_CACHE=cache)
    assert lost.returncode == 1
    assert "BasisNotFoundError" in lost.stderr
    assert "from_pretrained" in lost.stderr
    told = elsewhere(LOAD.format(task=str(task_folder), more=f", basis={str(moved)!r}"), SUBSPACE_PEFT_CACHE=cache)
    assert float(told.stdout) == pytest.approx(expected, abs=1e-9), told.stderr
    # the cache now knows where this fingerprint was seen
    known = elsewhere(LOAD.format(task=str(task_folder), more=""), SUBSPACE_PEFT_CACHE=cache)
    assert float(known.stdout) == pytest.approx(expected, abs=1e-9), known.stderr
    shutil.move(moved, task_folder / "basis")
    edit(task_folder / CONFIG, basis="basis")
    beside = elsewhere(LOAD.format(task=str(task_folder), more=""), SUBSPACE_PEFT_CACHE=str(tmp_path / "empty-too"))
    assert float(beside.stdout) == pytest.approx(expected, abs=1e-9), beside.stderr


def test_another_basis_passed_by_hand_is_refused(task_folder, fleets):
    other = build_basis(fleets[bert][:3], k=6, progress=False)
    with pytest.raises(BasisMismatchError) as caught:
        PeftModel.from_pretrained(bert(), task_folder, basis=other)
    config = json.loads((task_folder / CONFIG).read_text())
    assert other.fingerprint in str(caught.value)
    assert config["basis_fingerprint"] in str(caught.value)


def test_a_basis_said_by_hand_is_looked_for_there_and_nowhere_else(task_folder, fleets, tmp_path):
    build_basis(fleets[bert][:3], k=6, progress=False).save_pretrained(tmp_path / "other")
    PeftModel.from_pretrained(bert(), task_folder)  # the right basis is alive, and its place is noted
    with pytest.raises(BasisMismatchError, match="other"):
        PeftModel.from_pretrained(bert(), task_folder, basis=str(tmp_path / "other"))
    with pytest.raises(BasisNotFoundError, match="/no/such"):
        PeftModel.from_pretrained(bert(), task_folder, basis="/no/such")


def test_a_self_contained_task_needs_no_basis_and_notices_a_changed_one(basis_folder, tmp_path):
    config = SubspaceConfig(basis=str(basis_folder), save_basis=True, mean_gain="fixed", coefficients="directions")
    model = randomise(get_peft_model(bert(), config))
    model.save_pretrained(tmp_path / "task")
    expected = logits(model).double().sum().item()
    shutil.rmtree(basis_folder)
    cache = str(tmp_path / "empty-cache")
    alone = elsewhere(LOAD.format(task=str(tmp_path / "task"), more=""), SUBSPACE_PEFT_CACHE=cache)
    assert float(alone.stdout) == pytest.approx(expected, abs=1e-9), alone.stderr
    tensors = load_file(tmp_path / "task" / WEIGHTS)
    key = next(key for key in tensors if key.endswith("subspace_U"))
    tensors[key][0, 0] += 1
    save_file(tensors, tmp_path / "task" / WEIGHTS)
    changed = elsewhere(LOAD.format(task=str(tmp_path / "task"), more=""), SUBSPACE_PEFT_CACHE=cache)
    assert changed.returncode == 1
    assert "sha256" in changed.stderr
    tensors.pop(key)
    save_file(tensors, tmp_path / "task" / WEIGHTS)
    missing = elsewhere(LOAD.format(task=str(tmp_path / "task"), more=""), SUBSPACE_PEFT_CACHE=cache)
    assert missing.returncode == 1
    assert "subspace_U" in missing.stderr


def test_a_basis_in_memory_is_carried_along_but_never_silently(fleets, tmp_path):
    basis = build_basis(fleets[bert], k=3, progress=False)
    with pytest.warns(UserWarning, match="lives in memory only"):
        model = randomise(get_peft_model(bert(), SubspaceConfig(basis=basis)))
    model.save_pretrained(tmp_path / "task")
    assert any(key.endswith("subspace_U") for key in load_file(tmp_path / "task" / WEIGHTS))
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path / "task")), logits(model))


NATIVE = """
    import subspace_peft, torch
    from transformers import AutoModelForSequenceClassification
    from tests.models import inputs
    {load}
    print(model.eval()(inputs()).logits.double().sum().item())
"""


@pytest.mark.parametrize("self_contained", [False, True])
def test_transformers_own_loading_finds_the_basis(basis_folder, tmp_path, self_contained):
    base = bert()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = randomise(get_peft_model(base, SubspaceConfig(basis=str(basis_folder), save_basis=self_contained)))
    model.save_pretrained(tmp_path / "task")
    expected = logits(model).double().sum().item()
    if self_contained:
        shutil.rmtree(basis_folder)
    for load in (
        (
            f"model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / 'base')!r})\n"
            f"    model.load_adapter({str(tmp_path / 'task')!r})"
        ),
        f"model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / 'task')!r})",
    ):
        done = elsewhere(NATIVE.format(load=load), SUBSPACE_PEFT_CACHE=str(tmp_path / "empty-cache"))
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == pytest.approx(expected, abs=1e-9)


def test_json_that_is_no_peft_configuration_is_refused_in_pefts_own_words(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"foo": "bar"}')
    with pytest.raises(TypeError, match=r"missing required keys: \{'peft_type'\}"):
        SubspaceConfig.from_pretrained(tmp_path)
    with pytest.raises(BadFileError):
        SubspaceConfig.from_pretrained(tmp_path)
