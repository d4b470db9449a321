"""Members of the fleets of encoders: tasks of this benchmark, judged on the top layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from subspace_peft.sources import open_source

from .. import tasks
from ..encoder import Top
from ..fleet import SOURCE_BUDGET
from ..tasks import EncodedTask, Split
from ..training import draw_examples, make_loss, make_model, measure, outputs_of
from .members import Judged, Member
from .storing import Updates

JUDGED = ("validation", "test")
Load = Callable[[str, Path], EncodedTask]


class Judge:
    """A task's examples and the top layers, whose head and updates are exchanged.

    Args:
        task: the task.
        top: of the encoder, as `tasks.top_layers` returns it.
    """

    def __init__(self, task: EncodedTask, top: Mapping[str, Any]) -> None:
        # as their file holds them: half the memory, without loss
        self.splits = {
            name: Split(split.hidden.half(), split.lengths, split.labels)
            for name, split in task.splits.items()
            if name in JUDGED
        }
        self.model: Top = make_model(dict(top), task.outputs, 0).eval()
        self.weights: dict[str, torch.Tensor] = {}
        known = task.splits["train"].labels[draw_examples(task, SOURCE_BUDGET, 0)[0]]
        self.loss = make_loss(task, known)

    @torch.no_grad()
    def judge(self, head: Mapping[str, torch.Tensor], updates: Updates) -> Judged:
        """Judge the base weights with `updates` added to them, under a `head`."""
        for name, weight in self.weights.items():
            self.model.get_submodule(name).weight.copy_(weight)
        for name, update in updates.items():
            weight = self.model.get_submodule(name).weight
            self.weights.setdefault(name, weight.clone())
            weight += update
        self.model.classifier.load_state_dict(head)
        outputs, scores = {}, []
        for name, split in self.splits.items():
            outputs[name] = outputs_of(self.model, Split(split.hidden.float(), split.lengths, split.labels))
            scores.append(measure(outputs[name], split.labels))
        loss = self.loss(outputs["test"], self.splits["test"].labels)
        return Judged(*scores, float(loss), outputs["test"])


@cache
def judge_of(task: str, folder: Path, load: Load, kind: str) -> Judge:
    """Return a task's judge, one for all of its adapters: it takes tens of megabytes."""
    return Judge(load(task, folder), tasks.top_layers(kind, folder))


def encoder_member(
    name: str, lora: Path, folder: Path, *, task: str | None = None, load: Load = tasks.load, kind: str | None = None
) -> Member:
    """Return a member that is judged on its task.

    Args:
        name: of the member.
        lora: its LoRA, or an export of the adapter that it is.
        folder: the benchmark's cache.
        task: of which it is; `name` without it.
        load: returns a task by its name, from the cache.
        kind: of the task, ``text`` or ``image``; `tasks.kind_of` without it.
    """
    at = task or name
    judge = judge_of(at, folder, load, kind or tasks.kind_of(at))
    source = open_source(str(lora))
    head = {key.rpartition(".")[2]: source.read(key) for key in source.other_keys if "classifier" in key}
    return Member(name, lora, lambda updates: judge.judge(head, updates))
