"""What the recipes and the quality benchmark share: which methods are compared, each with a learning-rate sweep of its own, the
cells (finished runs) that an interrupted comparison resumes from, the table, the curves, and the recipes' small furniture.

No training loop is in here: that stays in the recipe, where a user reads and edits it.
"""

from __future__ import annotations

from .answers import AnswersOnly, encode_answer, exact_and_rouge, generate_answers, one_answer, prompt_ids
from .cells import Cells, digest
from .curves import draw_curves
from .data import check_image, check_rows, draw, local_images, local_splits, local_tasks, refuse_own_adapter
from .knobs import SubspaceKnobs, knob, parse_knobs, quiet
from .measure import measure
from .methods import Method, method_named, methods
from .planned import planned_numbers, print_plan, runs_of, steps_of
from .pooled import ImageClassifier, MeanPooledClassifier
from .stages import (
    basis_stage,
    choose_sources,
    compared_methods,
    finish,
    finished,
    last_checkpoint,
    offline_folder,
    open_bases,
    publish,
    save_control,
    save_finished,
    source_folders,
    task_folder,
)
from .sweep import RUN_KEYS, compare
from .table import markdown_table, write_results
from .task import LabelledTask
from .training import TrainingKnobs, fit, parameter_groups, planned_fetches, planned_steps

__all__ = [
    "RUN_KEYS",
    "AnswersOnly",
    "Cells",
    "ImageClassifier",
    "LabelledTask",
    "MeanPooledClassifier",
    "Method",
    "SubspaceKnobs",
    "TrainingKnobs",
    "basis_stage",
    "check_image",
    "check_rows",
    "choose_sources",
    "compare",
    "compared_methods",
    "digest",
    "draw",
    "draw_curves",
    "encode_answer",
    "exact_and_rouge",
    "finish",
    "finished",
    "fit",
    "generate_answers",
    "knob",
    "last_checkpoint",
    "local_images",
    "local_splits",
    "local_tasks",
    "markdown_table",
    "measure",
    "method_named",
    "methods",
    "offline_folder",
    "one_answer",
    "open_bases",
    "parameter_groups",
    "parse_knobs",
    "planned_fetches",
    "planned_numbers",
    "planned_steps",
    "print_plan",
    "prompt_ids",
    "publish",
    "quiet",
    "refuse_own_adapter",
    "runs_of",
    "save_control",
    "save_finished",
    "source_folders",
    "steps_of",
    "task_folder",
    "write_results",
]
