"""Stages for a GPU machine that need the Hub: the recipes on roberta-base, ViT-base and Mistral-7B."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .gpu_plan import Plan, Stage

# cut down so that a comparison and a choice should take about ten minutes on a large GPU
GLUE = {
    "sources": ("cola", "sst2", "mrpc", "stsb", "qnli", "rte"),
    "source_examples": 2000,
    "source_epochs": 3,
    "train_examples": 500,
    "epochs": 5,
    "batch": 32,
    "sweep": 2,
    "test_examples": 1000,
}
IMAGES = {
    "source_examples": 1000,
    "source_epochs": 3,
    "train_examples": 500,
    "epochs": 4,
    "batch": 32,
    "sweep": 2,
}
INSTRUCTIONS = {
    "train_examples": 300,
    "epochs": 2,
    "batch": 8,
    "sweep": 1,
    "tokens": 512,
    "test_examples": 100,
}
OF = {"glue": GLUE, "image_classification": IMAGES, "mistral": INSTRUCTIONS}
TOY = {
    "source_examples": 32,
    "source_epochs": 1,
    "source_r": 2,
    "train_examples": 32,
    "validation_examples": 16,
    "epochs": 1,
    "batch": 16,
    "basis_k": 4,
    "r": 2,
    "sweep": 1,
    "own": (1,),
    "seeds": (1,),
}
TOY_INSTRUCTIONS = {"train_examples": 16, "validation_examples": 8, "test_examples": 8, "batch": 8, "tokens": 128}


def settings(plan: Plan, recipe: str) -> dict[str, Any]:
    """Return the recipe's arguments that decide its budget."""
    if not plan.toy:
        return dict(OF[recipe])
    return {**TOY, **(TOY_INSTRUCTIONS if recipe == "mistral" else {}), "sources": ()}


def run_recipe(plan: Plan, recipe: str, task: str, stages: Sequence[str], **more: Any) -> dict[str, Any]:
    """Run stages of a recipe on a held-out task, and return what it measured.

    Its own files, in the plan's folder, let it go on where it was interrupted.

    Args:
        plan: how.
        recipe: ``glue``, ``image_classification`` or ``mistral``.
        task: held-out task.
        stages: the recipe's, in order.
        more: further arguments of the recipe.

    Returns:
        ``compare``: the rows of the comparison, without their curves; ``choose``: what `--stage choose` chose.
    """
    module = importlib.import_module(recipe)
    out = plan.folder / recipe
    given = {"task": task, "out": out, **settings(plan, recipe), **more}
    sources = [name for name in given.pop("sources", ()) if name != task]
    given |= {"sources": sources} if sources else {}
    typed = []
    for name, value in given.items():
        typed += [f"--{name}", *(map(str, value) if isinstance(value, (tuple, list)) else [str(value)])]
    typed += ["--bf16"] if plan.bf16 and not plan.toy else []
    for stage in stages:
        module.main([*typed, "--stage", stage])
    found = {}
    name = Path(task).name
    if "compare" in stages:
        rows = json.loads((out / "compare" / name / "results.json").read_text(encoding="utf-8"))["results"]
        found["compare"] = [{key: value for key, value in row.items() if key != "curves"} for row in rows]
    if "choose" in stages:
        found["choose"] = json.loads((out / "choose" / name / "choice.json").read_text(encoding="utf-8"))
    return found


def recipe_stages(plan: Plan) -> list[Stage]:
    """Return a stage per held-out task and recipe: its comparison, and its choice among basis and LoRA.

    Both make their basis first: that of another held-out task lies in its place. The choice comes first, since a
    comparison takes over the runs that both have, but not the other way round.
    """
    of = {
        "glue": ("glue", plan.roberta, plan.glue, "roberta-base, held-out GLUE task"),
        "images": ("image_classification", plan.vit, plan.images, "ViT-base, held-out group of CIFAR-100's classes"),
        "instructions": (
            "mistral",
            plan.mistral,
            plan.instructions,
            "Mistral-7B in the basis of published adapters, held-out task",
        ),
    }
    stages = []
    for name, (recipe, model, tasks, about) in of.items():
        more: dict[str, Any] = {"model": model}
        more |= {"data_dir": Path(model).parent} if plan.toy else {}
        more |= {"sources": plan.adapters} if recipe == "mistral" else {}
        decisive = settings(plan, recipe) | ({} if plan.toy else {k: v for k, v in more.items() if k != "data_dir"})
        for task in tasks:
            cells = {
                last: lambda task=task, recipe=recipe, more=more, last=last: run_recipe(
                    plan, recipe, task, ("sources", "basis", last), **more
                )
                for last in ("choose", "compare")
            }
            short = Path(task).name.split("_")[0]
            stages.append(Stage(f"{name}-{short}", f"{about} {task}", 10, cells, {**decisive, "task": task}, hub=True))
    return stages
