"""Stages for a GPU machine that need no Hub: training steps, mixed batches and builds, on models of random weights."""

from __future__ import annotations

import shutil
from typing import Any

import build_basis
import mixed_batch
import torch
import train_step
from torch import nn
from transformers import BertConfig, BertModel, MistralConfig, MistralModel

from .gpu_plan import Cell, Plan, Stage, precisions

ENCODER = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
# Mistral-7B's blocks; four of its 32, since a step's cost grows with them and the ratios do not
DECODER = {
    "hidden_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
}
TOY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
KINDS = {"encoder": ENCODER, "decoder": DECODER}
BUILDS = {"adapters": (50, 200), "layers": 2, "shapes": build_basis.SHAPES, "k": 32}
TOY_BUILDS = {"adapters": (6,), "layers": 1, "shapes": {"q_proj": (96, 96), "v_proj": (64, 96)}, "k": 8}


def base_model(plan: Plan, kind: str, dtype: torch.dtype) -> nn.Module:
    """Return an encoder or a decoder of random weights, made on the plan's device in that precision."""
    sizes = shape(plan, kind)
    with torch.device(plan.device):
        torch.manual_seed(0)
        if kind == "encoder":
            return BertModel(BertConfig(vocab_size=1024, **sizes), add_pooling_layer=False).to(dtype)
        return MistralModel(MistralConfig(vocab_size=1024, sliding_window=None, **sizes)).to(dtype)


def shape(plan: Plan, kind: str) -> dict[str, int]:
    """Return the sizes of a model of that kind."""
    few = {"num_key_value_heads": 2} if kind == "decoder" else {}
    return {**TOY, **few} if plan.toy else dict(KINDS[kind])


def step_sizes(plan: Plan, kind: str) -> dict[str, int]:
    """Return the sizes of a training step: its batch, rounds of timing and directions."""
    if plan.toy:
        return {"rounds": 2, "batch": 2, "tokens": 8, "k": 4}
    batch, tokens = (64, 128) if kind == "encoder" else (8, 512)
    return {"rounds": 21, "batch": batch, "tokens": tokens, "k": 32}


def step_cells(plan: Plan, kind: str) -> dict[str, Cell]:
    """Return a measurement per precision and adapted modules, of LoRAs and cores with and without own directions."""

    def cell(targets: Any, dtype: torch.dtype) -> dict[str, Any]:
        sizes = step_sizes(plan, kind)
        rows = train_step.own_contenders(targets, sizes.pop("k"))
        return train_step.measure(kind, rows, **sizes, base=base_model(plan, kind, dtype))

    return {
        f"{title}, {precision}": lambda targets=targets, dtype=dtype: cell(targets, dtype)
        for title, targets in train_step.WHERE[kind].items()
        for precision, dtype in precisions().items()
    }


def batch_sizes(plan: Plan) -> dict[str, Any]:
    """Return the sizes of mixed batches: tasks that are loaded, rows and tokens, rounds, directions."""
    if plan.toy:
        return {"tasks": (3,), "shapes": ((4, 1), (4, 5)), "rounds": 2, "k": 4, "own": (0, 1)}
    return {"tasks": (64, 256), "shapes": mixed_batch.SHAPES, "rounds": 41, "k": 16, "own": (0, 2)}


def batch_cells(plan: Plan) -> dict[str, Cell]:
    """Return a measurement per number of tasks, precision and adapted modules."""

    def cell(tasks: int, targets: Any, dtype: torch.dtype) -> dict[str, Any]:
        sizes = {key: value for key, value in batch_sizes(plan).items() if key != "tasks"}
        return mixed_batch.measure(tasks, targets, **sizes, base=base_model(plan, "decoder", dtype))

    return {
        f"{title}, {tasks} tasks, {precision}": lambda t=targets, n=tasks, d=dtype: cell(n, t, d)
        for title, targets in mixed_batch.TARGETS.items()
        for tasks in batch_sizes(plan)["tasks"]
        for precision, dtype in precisions().items()
    }


def build_cells(plan: Plan) -> dict[str, Cell]:
    """Return a measurement per size of fleet, with one thread and with all: bases are built on the processor."""
    sizes = TOY_BUILDS if plan.toy else BUILDS
    root, most = plan.folder / "fleet", torch.get_num_threads()

    def cell(adapters: int, threads: int) -> dict[str, Any]:
        # what an interrupted call left is no whole fleet
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        folders = build_basis.make_fleet(root, adapters, sizes["layers"], sizes["shapes"])
        try:
            return build_basis.child(
                "build_basis", folders, sizes["k"], "2GB", threads=threads, shapes=sizes["shapes"]
            )
        finally:
            torch.set_num_threads(most)
            shutil.rmtree(root)

    return {
        f"{adapters} adapters, {threads} threads": lambda n=adapters, threads=threads: cell(n, threads)
        for adapters in sizes["adapters"]
        for threads in sorted({1, most})
    }


def speed_stages(plan: Plan) -> list[Stage]:
    """Return the stages that need no Hub."""
    kinds = {"encoder": "an encoder of 12 × 768", "decoder": "a decoder of 4 × 4,096"}
    steps = [
        Stage(
            f"steps-{kind}",
            f"training steps on {about}: LoRA, core, own directions; float32, bfloat16",
            10,
            step_cells(plan, kind),
            {**shape(plan, kind), **step_sizes(plan, kind)},
        )
        for kind, about in kinds.items()
    ]
    batches = Stage(
        "mixed-batches",
        f"batches in which every row is a task of its own, on {kinds['decoder']}: task bank beside LoRA",
        10,
        batch_cells(plan),
        {**shape(plan, "decoder"), **batch_sizes(plan)},
    )
    builds = Stage(
        "builds",
        "build_basis of 50 and 200 adapters at 4,096 wide, on the processor, with one thread and with all",
        8,
        build_cells(plan),
        TOY_BUILDS if plan.toy else BUILDS,
    )
    return [*steps, batches, builds]
