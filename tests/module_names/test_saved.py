"""Bases and tasks that earlier versions saved with names of wrappers, and live models in wrappers."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from subspace_peft import SubspaceBasis, SubspaceConfig, TaskBank, export_lora, hotswap, project_lora

from ..models import bert, randomise
from .names import KINDS, P, logits


@pytest.mark.parametrize("kind", ["compiled", "compiled inside", "compiled layers", "ddp", "peft twice"])
def test_bases_and_tasks_that_were_saved_with_such_names_are_found(fleet, tmp_path, kind):
    clean = SubspaceBasis.from_pretrained(fleet.basis)
    wrapped = {KINDS[kind](P + name).removeprefix(P): module for name, module in clean.items()}
    old = SubspaceBasis(wrapped, clean.info)
    old.save_pretrained(tmp_path / "old")
    project_lora(fleet.clean, old).save_pretrained(tmp_path / "task")
    assert (logits(PeftModel.from_pretrained(bert(), tmp_path / "task")) - fleet.want).abs().max() < 1e-5
    # the task's own names
    config = json.loads((tmp_path / "task" / "adapter_config.json").read_text())
    config["target_modules"] = [KINDS[kind](P + name).removeprefix(P) for name in config["target_modules"]]
    (tmp_path / "task" / "adapter_config.json").write_text(json.dumps(config))
    file = tmp_path / "task" / "adapter_model.safetensors"
    save_file({KINDS[kind](key) if "subspace" in key else key: value for key, value in load_file(file).items()}, file)
    model = PeftModel.from_pretrained(bert(), tmp_path / "task")
    assert (logits(model) - fleet.want).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert (logits(PeftModel.from_pretrained(bert(), tmp_path / "again")) - fleet.want).abs().max() < 1e-5


@pytest.mark.parametrize("save_basis", [False, True])
def test_a_task_of_a_compiled_model_loads_with_and_without_it(fleet, tmp_path, save_basis):
    def compiled() -> nn.Module:
        return torch.compile(bert(), backend="eager")

    model = get_peft_model(compiled(), SubspaceConfig(basis=str(fleet.basis), save_basis=save_basis))
    want = logits(randomise(model))
    model.save_pretrained(tmp_path / "task")
    names = [*load_file(tmp_path / "task" / "adapter_model.safetensors")]
    names += json.loads((tmp_path / "task" / "adapter_config.json").read_text())["target_modules"]
    assert not any("_orig_mod" in name for name in names)
    for base in (bert(), compiled()):
        torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "task")), want)
    # of an adapter in a wrapper, as a task, in a bank, and swapped in
    export_lora(nn.DataParallel(model), tmp_path / "lora")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(bert(), tmp_path / "lora")), want, atol=1e-5, rtol=1e-4
    )
    if not save_basis:
        bank = TaskBank(model)
        bank.add("again", tmp_path / "task")
        hotswap(get_peft_model(compiled(), SubspaceConfig(basis=str(fleet.basis))), tmp_path / "task")
