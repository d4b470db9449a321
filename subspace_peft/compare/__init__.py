"""What the recipes and the quality benchmark share: which methods are compared, each with a learning-rate sweep of its own, the
cells (finished runs) that an interrupted comparison resumes from, the table, the curves, and the recipes' small furniture.

No training loop is in here: that stays in the recipe, where a user reads and edits it.
"""

from __future__ import annotations

from .cells import Cells, digest
from .curves import draw_curves
from .data import check_rows, draw, local_splits, local_tasks, refuse_own_adapter
from .knobs import SubspaceKnobs, knob, parse_knobs, quiet
from .measure import measure
from .methods import Method, method_named, methods
from .planned import planned_numbers, print_plan, runs_of, steps_of
from .pooled import MeanPooledClassifier
from .stages import (
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
)
from .sweep import RUN_KEYS, compare
from .table import markdown_table, write_results
from .task import LabelledTask

__all__ = [
    "RUN_KEYS",
    "Cells",
    "LabelledTask",
    "MeanPooledClassifier",
    "Method",
    "SubspaceKnobs",
    "check_rows",
    "choose_sources",
    "compare",
    "compared_methods",
    "digest",
    "draw",
    "draw_curves",
    "finish",
    "finished",
    "knob",
    "last_checkpoint",
    "local_splits",
    "local_tasks",
    "markdown_table",
    "measure",
    "method_named",
    "methods",
    "offline_folder",
    "open_bases",
    "parse_knobs",
    "planned_numbers",
    "print_plan",
    "publish",
    "quiet",
    "refuse_own_adapter",
    "runs_of",
    "save_control",
    "save_finished",
    "source_folders",
    "steps_of",
    "write_results",
]
