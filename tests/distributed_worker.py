"""Run by tests/test_distributed.py in two processes: `torchrun --nproc_per_node 2 distributed_worker.py BASIS OUT`.

Trains the same tiny task on the same batches in every manner, and writes what came out of it to OUT/results.json.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.models.bert.modeling_bert import BertLayer

from subspace_peft import SubspaceConfig

STEPS, ROWS = 4, 8


def make(basis: str) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=100,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    return get_peft_model(
        BertForSequenceClassification(config), SubspaceConfig(basis=basis, task_type="SEQ_CLS", extra_rank=1)
    )


def data() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 100, (7,), generator=draw), "labels": i % 2} for i in range(STEPS * ROWS)]


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp":
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={BertLayer})
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
    if kind == "fully_shard":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in model.modules():
            if isinstance(module, BertLayer):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def state(kind: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """The task's tensors, whole, as they would be saved."""
    if kind == "fsdp":
        # its own full state dict crashes on the CPU, whatever is inside
        with FullyShardedDataParallel.summon_full_params(model):
            named = get_peft_model_state_dict(model.module, state_dict=dict(model.module.named_parameters()))
            return {name.replace("_fsdp_wrapped_module.", ""): value.detach().clone() for name, value in named.items()}
    if kind == "fully_shard":
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        # only the first process is given it
        return get_peft_model_state_dict(model, state_dict=whole) if whole else {}
    return get_peft_model_state_dict(model.module if kind == "ddp" else model)


def run(kind: str, basis: str) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = wrapped(kind, make(basis))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses, rows = [], data()
    for step in range(STEPS):
        batch = rows[step * ROWS : (step + 1) * ROWS]
        mine = batch if kind == "one process" else batch[rank * ROWS // world : (rank + 1) * ROWS // world]
        ids, labels = torch.stack([row["input_ids"] for row in mine]), torch.tensor([row["labels"] for row in mine])
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    saved = {name: value.flatten().tolist() for name, value in state(kind, model).items()}
    found: dict[str, Any] = {"losses": losses, "saved": saved}
    if kind == "ddp":
        found["broadcast"] = sorted(model.named_module_buffers)
    return found


def by_trainer(basis: str, out: str) -> dict[str, Any]:
    arguments = TrainingArguments(
        out,
        per_device_train_batch_size=ROWS // 2,
        num_train_epochs=1,
        learning_rate=0.5,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo",
        average_tokens_across_devices=False,
        disable_tqdm=True,
        seed=0,
    )
    # without average_tokens_across_devices=False the Trainer multiplies a classifier's mean loss by the number of
    # processes
    trainer = Trainer(make(basis), arguments, train_dataset=data())
    trainer.train()
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "broadcast": sorted(getattr(trainer.model_wrapped, "named_module_buffers", {})),
        "steps": trainer.state.global_step,
        "saved": {k: v.flatten().tolist() for k, v in get_peft_model_state_dict(trainer.model).items()},
    }


def main(basis: str, out: str) -> None:
    dist.init_process_group("gloo")
    results = {kind: run(kind, basis) for kind in ("one process", "ddp", "fsdp", "fully_shard")}
    results["trainer"] = by_trainer(basis, out)
    if dist.get_rank() == 0:
        Path(out, "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
