"""subspace-peft: many LoRA adapters, one frozen basis, kilobyte tasks, in stock PEFT.

Importing this package registers the `SUBSPACE` method with PEFT: at once where PEFT is imported already, else at the
moment it is. Everything else loads when it is first used, so that the import itself costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import attach
from ._moved import install
from ._on_import import when_imported
from ._version import __version__

if TYPE_CHECKING:
    # as `X as X`, which is how a type checker knows that they are meant to be used from here
    from . import basis as basis
    from . import builders as builders
    from . import bundle as bundle
    from . import cards as cards
    from . import continual as continual
    from . import convert as convert
    from . import energy as energy
    from . import errors as errors
    from . import hub as hub
    from . import logging as logging
    from . import modeling as modeling
    from . import recipes as recipes
    from . import report as report
    from . import serve as serve
    from . import sources as sources
    from . import tasks as tasks
    from . import tuner as tuner
    from .basis import ModuleBasis, SubspaceBasis
    from .builders import (
        BuildOptions,
        build_basis,
        build_clusters,
        complete_basis,
        plan_build,
        rebuild_basis,
        update_basis,
    )
    from .bundle import (
        Bundle,
        add_tasks,
        bundle_tasks,
        compress_fleet,
        extract_task,
        extract_tasks,
        load_task,
        migrate_bundle,
        open_bundle,
        push_bundle,
    )
    from .continual import ContinualLearner, ContinualOptions
    from .convert import export_gguf, export_lora, migrate_task, project_lora
    from .errors import SubspaceError
    from .recipes import copy_recipe, list_recipes, load_recipe
    from .report import analyze_fleet, inspect_path, null_basis, report_basis, validate_basis
    from .serve import TaskExports
    from .tasks import TaskBank, hotswap, load_adapter, read_task, save_adapter
    from .tasks.callbacks import SubspaceCardCallback, write_card
    from .tuner import SubspaceConfig, SubspaceLayer, SubspaceModel
    from .tuner.base_record import record_base_model

# where each public name is defined
_PLACES = {
    "BuildOptions": "builders",
    "Bundle": "bundle",
    "ContinualLearner": "continual",
    "ContinualOptions": "continual",
    "ModuleBasis": "basis",
    "SubspaceBasis": "basis",
    "SubspaceCardCallback": "tasks.callbacks",
    "SubspaceConfig": "tuner",
    "SubspaceError": "errors",
    "SubspaceLayer": "tuner",
    "SubspaceModel": "tuner",
    "TaskBank": "tasks",
    "TaskExports": "serve",
    "add_tasks": "bundle",
    "analyze_fleet": "report",
    "build_basis": "builders",
    "build_clusters": "builders",
    "bundle_tasks": "bundle",
    "complete_basis": "builders",
    "compress_fleet": "bundle",
    "copy_recipe": "recipes",
    "export_gguf": "convert",
    "export_lora": "convert",
    "extract_task": "bundle",
    "extract_tasks": "bundle",
    "hotswap": "tasks",
    "inspect_path": "report",
    "list_recipes": "recipes",
    "load_adapter": "tasks",
    "load_recipe": "recipes",
    "load_task": "bundle",
    "migrate_bundle": "bundle",
    "migrate_task": "convert",
    "null_basis": "report",
    "open_bundle": "bundle",
    "plan_build": "builders",
    "project_lora": "convert",
    "push_bundle": "bundle",
    "read_task": "tasks",
    "rebuild_basis": "builders",
    "record_base_model": "tuner.base_record",
    "report_basis": "report",
    "save_adapter": "tasks",
    "update_basis": "builders",
    "validate_basis": "report",
    "write_card": "tasks.callbacks",
}

__all__ = [
    "BuildOptions",
    "Bundle",
    "ContinualLearner",
    "ContinualOptions",
    "ModuleBasis",
    "SubspaceBasis",
    "SubspaceCardCallback",
    "SubspaceConfig",
    "SubspaceError",
    "SubspaceLayer",
    "SubspaceModel",
    "TaskBank",
    "TaskExports",
    "__version__",
    "add_tasks",
    "analyze_fleet",
    "build_basis",
    "build_clusters",
    "bundle_tasks",
    "complete_basis",
    "compress_fleet",
    "copy_recipe",
    "export_gguf",
    "export_lora",
    "extract_task",
    "extract_tasks",
    "hotswap",
    "inspect_path",
    "list_recipes",
    "load_adapter",
    "load_recipe",
    "load_task",
    "migrate_bundle",
    "migrate_task",
    "null_basis",
    "open_bundle",
    "plan_build",
    "project_lora",
    "push_bundle",
    "read_task",
    "rebuild_basis",
    "record_base_model",
    "report_basis",
    "save_adapter",
    "update_basis",
    "validate_basis",
    "write_card",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = attach(
        __name__,
        _PLACES,
        modules=(
            "basis",
            "builders",
            "bundle",
            "cards",
            "continual",
            "convert",
            "energy",
            "errors",
            "hub",
            "logging",
            "modeling",
            "recipes",
            "report",
            "serve",
            "sources",
            "tasks",
            "tuner",
        ),
    )


def _register() -> None:
    # which registers as it is imported
    from . import _peft_hooks  # noqa: F401


install()
when_imported("peft", _register)
