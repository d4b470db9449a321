"""The experiment harness of the recipes, the demo and the quality benchmark.

The compared methods, a learning-rate sweep for each, the finished runs from which an interrupted comparison resumes,
the table, the curves, and the stages around them.

Data, model and Trainer stay in the recipe, where a user reads and edits them.
"""

from __future__ import annotations

import warnings
from typing import Any

from subspace_peft.modeling import ImageClassifier, MeanPooledClassifier
from subspace_peft.tuner.bnb import keep_unpacked

from .answers import (
    AnswersOnly,
    encode_answer,
    exact_and_rouge,
    generate_answers,
    instruction_task,
    one_answer,
    prompt_ids,
)
from .arguments import CommonArguments, argument, parse_arguments, quiet
from .curves import draw_curves, draw_panels
from .data import check_rows, draw, local_splits, local_tasks, refuse_own_adapter
from .dry_run import dry_run, planned_numbers, planned_steps, print_plan, runs_of, steps_of
from .extras import require
from .figures import pyplot, save_figure
from .fresh_process import keep_logits, logits_elsewhere
from .images import check_image, check_images, class_group, local_images, rgb
from .measure import measure
from .methods import Method, adapted, head_only, in_basis, lora, method_named, methods, vera
from .recipe import Recipe
from .run_cache import RunCache, digest
from .stages import (
    OFFLINE,
    basis_stage,
    choose_sources,
    compared_methods,
    finish,
    finished,
    last_checkpoint,
    open_bases,
    publish,
    save_control,
    save_finished,
    source_folders,
    take_offline,
    task_folder,
)
from .sweep import RUN_KEYS, compare
from .table import markdown_table, write_results, write_texts
from .task import InstructionTask, LabelledTask, Task
from .training import fit, parameter_groups, trained_parameters

__all__ = [
    "OFFLINE",
    "RUN_KEYS",
    "AnswersOnly",
    "CommonArguments",
    "ImageClassifier",
    "InstructionTask",
    "LabelledTask",
    "MeanPooledClassifier",
    "Method",
    "Recipe",
    "RunCache",
    "Task",
    "adapted",
    "argument",
    "basis_stage",
    "check_image",
    "check_images",
    "check_rows",
    "choose_sources",
    "class_group",
    "compare",
    "compared_methods",
    "digest",
    "draw",
    "draw_curves",
    "draw_panels",
    "dry_run",
    "encode_answer",
    "exact_and_rouge",
    "finish",
    "finished",
    "fit",
    "generate_answers",
    "head_only",
    "in_basis",
    "instruction_task",
    "keep_logits",
    "keep_unpacked",
    "last_checkpoint",
    "local_images",
    "local_splits",
    "local_tasks",
    "logits_elsewhere",
    "lora",
    "markdown_table",
    "measure",
    "method_named",
    "methods",
    "one_answer",
    "open_bases",
    "parameter_groups",
    "parse_arguments",
    "planned_numbers",
    "planned_steps",
    "print_plan",
    "prompt_ids",
    "publish",
    "pyplot",
    "quiet",
    "refuse_own_adapter",
    "require",
    "rgb",
    "runs_of",
    "save_control",
    "save_figure",
    "save_finished",
    "source_folders",
    "steps_of",
    "take_offline",
    "task_folder",
    "trained_parameters",
    "vera",
    "write_results",
    "write_texts",
]

# Recipes that were copied out by an earlier version use these names.
_RENAMED = {
    "Cells": "RunCache",
    "SubspaceKnobs": "CommonArguments",
    "knob": "argument",
    "parse_knobs": "parse_arguments",
}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(f"common.{name} is called {new} now; the old name will go.", FutureWarning, stacklevel=2)
    # kept, since `from common import …` asks twice
    globals()[name] = globals()[new]
    return globals()[new]
