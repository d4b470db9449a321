"""subspace-peft: many LoRA adapters, one frozen basis, kilobyte tasks, in stock PEFT.

Importing this package registers the `SUBSPACE` method with PEFT: at once where PEFT is imported already, else at the
moment it is. Everything else loads when it is first used, so that the import itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._moved import install
from ._on_import import when_imported
from ._version import __version__

if TYPE_CHECKING:
    from .basis import ModuleBasis, SubspaceBasis
    from .builders import build_basis, build_clusters, complete_basis, update_basis
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
    from .convert import export_lora, migrate_task, project_lora
    from .tasks import TaskBank, hotswap, load_adapter, save_adapter
    from .tasks.callbacks import SubspaceCardCallback, write_card
    from .tuner import SubspaceConfig, SubspaceModel
    from .tuner.base_record import record_base_model

_PLACES = {
    "ModuleBasis": "basis",
    "SubspaceBasis": "basis",
    "build_basis": "builders",
    "complete_basis": "builders",
    "update_basis": "builders",
    "build_clusters": "builders",
    "Bundle": "bundle",
    "add_tasks": "bundle",
    "bundle_tasks": "bundle",
    "compress_fleet": "bundle",
    "extract_task": "bundle",
    "extract_tasks": "bundle",
    "load_task": "bundle",
    "migrate_bundle": "bundle",
    "open_bundle": "bundle",
    "push_bundle": "bundle",
    "export_lora": "convert",
    "migrate_task": "convert",
    "project_lora": "convert",
    "SubspaceCardCallback": "tasks.callbacks",
    "SubspaceConfig": "tuner",
    "hotswap": "tasks",
    "load_adapter": "tasks",
    "save_adapter": "tasks",
    "SubspaceModel": "tuner",
    "record_base_model": "tuner.base_record",
    "TaskBank": "tasks",
    "write_card": "tasks.callbacks",
}

__all__ = [
    "Bundle",
    "ModuleBasis",
    "SubspaceBasis",
    "SubspaceCardCallback",
    "SubspaceConfig",
    "SubspaceModel",
    "TaskBank",
    "__version__",
    "add_tasks",
    "build_basis",
    "build_clusters",
    "bundle_tasks",
    "complete_basis",
    "compress_fleet",
    "export_lora",
    "extract_task",
    "extract_tasks",
    "hotswap",
    "load_adapter",
    "load_task",
    "migrate_bundle",
    "migrate_task",
    "open_bundle",
    "project_lora",
    "push_bundle",
    "record_base_model",
    "save_adapter",
    "update_basis",
    "write_card",
]


def _register() -> None:
    # which registers as it is imported
    from . import _peft_hooks  # noqa: F401


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


install()
when_imported("peft", _register)
