"""Several processes, and offloaded weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import Trainer, TrainingArguments

from subspace_peft import SubspaceConfig

from . import distributed_worker as worker
from . import fresh
from .models import bert, inputs, randomise

WORKER = Path(worker.__file__)


@pytest.fixture(scope="module")
def results(bases: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("distributed")
    for each in fresh.start_group(str(WORKER), str(bases[bert].location), str(out)):
        errors = each.communicate()[1]
        assert each.returncode == 0, errors[-3000:]
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fully_shard"])
def test_two_processes_have_the_losses_of_one_with_the_combined_batch(kind, results):
    one, two = results["one process"], results[kind]
    assert one["losses"][0] != one["losses"][-1]
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fully_shard"])
def test_what_they_would_save_is_the_same_task(kind, results):
    one, two = results["one process"]["saved"], results[kind]["saved"]
    assert two.keys() == one.keys() and any("subspace_coef" in name for name in one)
    for name, value in one.items():
        assert two[name] == pytest.approx(value, abs=1e-5), name


def test_the_basis_is_not_broadcast_at_every_step(results):
    for kind in ("ddp", "trainer"):
        names = results[kind]["broadcast"]
        assert any(name.endswith("position_ids") for name in names)
        assert not [name for name in names if "subspace" in name]


def test_the_stock_trainer_in_two_processes_trains_as_in_one(results, bases, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=worker.ROWS,
        num_train_epochs=1,
        learning_rate=0.5,
        optim="sgd",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(worker.make(str(bases[bert].location)), arguments, train_dataset=worker.data())
    trainer.train()
    assert results["trainer"]["wrapped"] == "DistributedDataParallel"
    assert results["trainer"]["steps"] == trainer.state.global_step == worker.STEPS
    for name, value in get_peft_model_state_dict(trainer.model).items():
        assert results["trainer"]["saved"][name] == pytest.approx(value.flatten().tolist(), abs=1e-5), name


@pytest.mark.parametrize("buffers", [False, True])
def test_offloaded_weights_give_the_same_outputs(buffers, bases):
    model = randomise(get_peft_model(bert(), SubspaceConfig(basis=bases[bert], task_type="SEQ_CLS"))).eval()
    with torch.no_grad():
        wanted = model(input_ids=inputs()).logits
        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers)
        assert next(model.parameters()).device.type == "meta"
        assert torch.equal(model(input_ids=inputs()).logits, wanted)
        with model.disable_adapter():
            assert not torch.equal(model(input_ids=inputs()).logits, wanted)


def test_a_task_loads_into_a_model_with_weights_on_disk(bases, tmp_path):
    model = randomise(get_peft_model(bert(), SubspaceConfig(basis=bases[bert], task_type="SEQ_CLS"))).eval()
    model.save_pretrained(tmp_path / "task")
    with torch.no_grad():
        wanted = model(input_ids=inputs()).logits
        base = dispatch_model(
            bert(),
            {"bert": "disk", "dropout": "cpu", "classifier": "cpu"},
            main_device="cpu",
            offload_dir=str(tmp_path / "disk"),
        )
        loaded = PeftModel.from_pretrained(base, tmp_path / "task")
        assert torch.equal(loaded(input_ids=inputs()).logits, wanted)
