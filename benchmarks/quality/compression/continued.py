"""A large fleet out of few tasks: each task's LoRA trained on from where it ended, on other draws of its examples.

It is no fleet of so many tasks. It is what an owner has who keeps checkpoints, or adapts one adapter to many customers
whose data are alike: members of one task share start, head's start and most of their way. What is measured on it says
nothing about fleets of unrelated adapters.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from offline.models import put
from peft import PeftModel

from .. import tasks
from ..fleet import SOURCE_RATE, source
from ..training import Budget, make_model, score, train

VARIANTS = 16
BUDGET = Budget(examples=300, steps=60, checks=())  # of what comes on top


def member_name(task: str, variant: int) -> str:
    return f"{task}-{variant:02d}"


def continued(task: str, variant: int, folder: Path) -> Path:
    """Return the LoRA of `task` trained on with the examples that `variant` draws, now if it is not there."""
    home = folder / "continued" / f"{BUDGET.examples}-{BUDGET.steps}" / member_name(task, variant)
    if home.is_dir():
        return home
    data = tasks.load(task, folder)
    model = make_model(tasks.top_layers(tasks.kind_of(task), folder), data.outputs, 0)
    wrapped = PeftModel.from_pretrained(model, str(source(task, folder)), is_trainable=True)
    train(wrapped, data, BUDGET, SOURCE_RATE, 1000 + variant, curve=False)
    print(f"continued {home.name}: validation {score(wrapped, data, 'validation'):.3f}", flush=True)
    aside = home.with_name(f".{home.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    wrapped.save_pretrained(aside)
    put(aside, home)
    return home
