"""Names that moved: the old ones keep working, each with a FutureWarning that names the new one."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]

# Old module → the module that took its place, or several that share its names. Both are relative to this package.
MODULES: dict[str, str | tuple[str, ...]] = {
    "_atomic": "_io.atomic",
    "_digest": "_io.digest",
    "_untrusted": "_io.untrusted",
    "build": ("builders", "sources"),
    "compare": ("modeling", "recipes:common"),
    "demo": "recipes:demo",
    "metrics": "recipes:common.metrics",
    "offline": "recipes:offline",
    "basis.by_name": "basis.module_store",
    "basis.lazy_modules": "basis.module_store",
    "basis.push": "hub",
    "basis.reference": "hub",
    "cards.parts": ("cards.markdown", "cards.front_matter"),
    "basis.entries": "basis.schema",
    "basis.generic": "basis.controls",
    "build.beside": "builders.extend",
    "build.budget": "builders.budget",
    "build.build": ("builders.build", "builders.options", "builders.prepare"),
    "build.clusters": "builders.clusters",
    "build.complete": ("builders.complete", "builders.options"),
    "build.converted": "sources.converted",
    "build.duplicates": "builders.duplicates",
    "build.factors": "sources.factors",
    "build.fleet": "builders.fleet",
    "build.foreign": "sources.diffusers_kohya",
    "build.generic": "builders.controls",
    "build.held_out": "builders.left_out",
    "build.hosvd": "builders.hosvd",
    "build.locate": "sources.locate",
    "build.lora": "sources.lora",
    "build.memory_plan": ("builders.memory", "builders.module_plan", "builders.option_checks"),
    "build.null": "builders.null",
    "build.partition": ("builders.partition", "builders.fleet_sample"),
    "build.plan": "builders.dry_run",
    "build.processes": "builders.distributed",
    "build.reading": ("builders.scan", "builders.reader", "sources.spans", "sources.factors"),
    "build.record": "builders.record",
    "build.references": "sources.references",
    "build.rerun": ("builders.rebuild", "builders.record"),
    "build.resume": "builders.resume",
    "build.scanned": "builders.distributed_scans",
    "build.seed_groups": "builders.seed_groups",
    "build.shares": "builders.distributed_modules",
    "build.sources": ("sources.source", "sources.open"),
    "build.statistics": "builders.statistics",
    "build.streaming": ("builders.streaming", "builders.module_stack", "builders.spectral_bound"),
    "build.update": "builders.update",
    "build.update_module": "builders.update_module",
    "build.update_record": "builders.update_record",
    "build.votes": "builders.weights",
    "bundle.layout": "bundle.format",
    "bundle.residual": "convert.residual",
    "report.draws": "report.sample",
    "report.fleet_energy": "report.measure",
    "tuner.arrivals": "tuner.load_tracker",
    "tuner.bank": "tasks.bank",
    "tuner.bank_file": "tasks.bank_file",
    "tuner.hotswap": "tasks.hotswap",
    "tuner.injected": "tasks.adapter_io",
    "tuner.kinds": "tuner.layer_kinds",
    "tuner.mixed": ("tuner.row_names", "tuner.row_batch"),
    "tuner.push": "tasks.push",
    "tuner.quantised": "tuner.bnb",
    "tuner.registration": ("tuner.peft_type", "_peft_hooks"),
    "tuner.saved": "tasks.read",
    "tuner.task_files": "tuner.task_file",
    "tuner.trainer_card": "tasks.callbacks",
    "tuner.weighted": "tuner.merging",
}
_SHARED = [
    "answers",
    "curves",
    "data",
    "images",
    "measure",
    "methods",
    "recipe",
    "stages",
    "sweep",
    "table",
    "task",
    "training",
]
MODULES |= {f"compare.{name}": f"recipes:common.{name}" for name in _SHARED}
MODULES |= {
    "compare.cells": "recipes:common.run_cache",
    "compare.knobs": "recipes:common.arguments",
    "compare.planned": "recipes:common.dry_run",
    "compare.pooled": "modeling",
}
_OFFLINE = ["archives", "clients", "images", "instructions", "models", "more_texts", "packages", "prepare", "texts"]
MODULES |= {f"offline.{name}": f"recipes:offline.{name}" for name in _OFFLINE}
MODULES |= {f"metrics.{name}": "recipes:common.metrics" for name in ("exact_match", "glue", "load", "rouge")}
# the demo's rows, training, table and check have no successors with the same arguments
MODULES |= {"demo.figures": "recipes:demo", "demo.model": "modeling", "demo.run": "recipes:demo"}

# Old module → names that it had → where they are now: a module, or ``module:new_name`` where the name is another too.
NAMES: dict[str, dict[str, str]] = {
    "basis.basis": {
        "module_shape": "basis.module",
        "names_of": "basis.module_store",
    },
    "basis.by_name": {"ByName": "basis.module_store:ModuleStore"},
    "build.foreign": {
        "Foreign": "sources.diffusers_kohya:ForeignKeys",
        "is_foreign": "sources.diffusers_kohya:has_foreign_keys",
        "read_foreign": "sources.diffusers_kohya:read_foreign_keys",
    },
    "build.locate": {"Place": "sources.locate:SourceFiles"},
    "build.memory_plan": {"Module": "builders.module_plan:ModulePlan", "Plan": "builders.memory:MemoryPlan"},
    "build.partition": {
        "Sampled": "builders.fleet_sample:SampledModule",
        "left_out": "builders.partition:left_out_shares",
    },
    "build.processes": {
        "Team": "builders.distributed:ProcessGroup",
        "together": "builders.distributed:process_group",
    },
    "build.reading": {"layout": "sources.spans:read_spans"},
    "build.scanned": {"skim": "builders.scan"},
    "build.streaming": {"Piece": "builders.module_stack:StackPiece"},
    "build.update_record": {"votes_of": "builders.update_record:source_weights_of"},
    "basis.files": {"LazyModules": "basis.files:FileModules", "check_header": "basis.stored"},
    "basis.precision": {"StoredModules": "basis.precision:RoundedModules"},
    "bundle.format": {"DTYPES": "bundle.dtypes", "NAMES": "bundle.dtypes"},
    "basis.resolve": {"note_location": "basis.basis"},
    "bundle": {"FleetReport": "bundle:CompressionReport"},
    "bundle.compress": {
        "Compressed": "bundle.compression_report:CompressedAdapter",
        "FleetReport": "bundle:CompressionReport",
        "Storage": "bundle.compression_report",
    },
    "bundle.layout": {"Piece": "bundle.format:TensorRange"},
    "cards": {"BasisReference": "cards:BasisReferenceFacts", "BundledTask": "cards:BundledTaskFacts"},
    "convert.export": {
        "VLLM_RANKS": "convert.factored",
        "lora_factors": "convert.factored",
    },
    "convert": {"Task": "tasks:SavedTask", "read_task": "tasks"},
    "tasks": {"Task": "tasks:SavedTask"},
    "tasks.read": {"Task": "tasks.read:SavedTask"},
    "compare": {
        "Cells": "recipes:common:RunCache",
        "SubspaceKnobs": "recipes:common:CommonArguments",
        "knob": "recipes:common:argument",
        "parse_knobs": "recipes:common:parse_arguments",
    },
    "compare.cells": {"Cells": "recipes:common.run_cache:RunCache"},
    "compare.knobs": {
        "SubspaceKnobs": "recipes:common.arguments:CommonArguments",
        "knob": "recipes:common.arguments:argument",
        "parse_knobs": "recipes:common.arguments:parse_arguments",
    },
    "metrics.glue": {"TASKS": "recipes:common.metrics:GLUE_TASKS"},
    "metrics.rouge": {"KINDS": "recipes:common.metrics:ROUGE_KINDS"},
    "offline.instructions": {"InstructionTask": "recipes:offline.instructions:PromptTask"},
    "cards.facts": {
        "BasisReference": "cards.facts:BasisReferenceFacts",
        "BundledTask": "cards.facts:BundledTaskFacts",
    },
    "tuner.row_batch": {"task_names_passed": "tuner.row_names"},
    "tuner.injection": {"Plan": "tuner.plan:InjectionPlan"},
    "tuner.arrivals": {"Arrivals": "tuner.load_tracker:LoadTracker"},
    "tuner": {
        "TaskBank": "tasks",
        "hotswap": "tasks",
        "load_adapter": "tasks",
        "register": "_peft_hooks",
        "save_adapter": "tasks",
    },
}


def install() -> None:
    """Let old module names be imported. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def moved_name(module: str, name: str) -> Any:
    """Return what a module's `__getattr__` is asked for, where it moved.

    Args:
        module: the module's full name.
        name: the name that it does not have.

    Raises:
        AttributeError: it never had that name.
    """
    place = NAMES.get(module.removeprefix(f"{PACKAGE}."), {}).get(name)
    if place is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    recipes = "recipes:" if place.startswith("recipes:") else ""
    where, _, new = place.removeprefix(recipes).partition(":")
    # `from package import name` asks twice: `_handle_fromlist` looks for a submodule first
    if sys._getframe(2).f_code.co_name != "_handle_fromlist":
        said = f"the recipes' {where}" if recipes else f"{PACKAGE}.{where}"
        _warn(f"{module}.{name}", f"{said}.{new or name}", stacklevel=4)
    return getattr(_import(recipes + where), new or name)


def _warn(old: str, new: str, stacklevel: int) -> None:
    warnings.warn(f"{old} has moved to {new}; the old name will go.", FutureWarning, stacklevel=stacklevel)


class _Finder(importlib.abc.MetaPathFinder):
    """Find modules by their old names. It stands last in line, so other imports never ask it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if f"{fullname}.".startswith(f"{PACKAGE}.recipe_modules."):
            # no old name, but it has no file either; here so that a process that unpickles one finds it
            return importlib.import_module(".recipes", PACKAGE).module_spec(fullname)
        places = MODULES.get(fullname.removeprefix(f"{PACKAGE}."))
        if places is None or not fullname.startswith(f"{PACKAGE}."):
            return None
        loader = _Loader((places,) if isinstance(places, str) else places)
        return importlib.util.spec_from_loader(fullname, loader, is_package=True)


class _Loader(importlib.abc.Loader):
    """Make a module that forwards every name to the modules that took its place.

    These are imported when the first name is asked for.
    """

    def __init__(self, places: tuple[str, ...]) -> None:
        self.places = places

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        def forward(name: str) -> Any:
            # tools look for special attributes in every module: that imports nothing
            if not name.startswith("__") and name not in NAMES.get(module.__name__.removeprefix(f"{PACKAGE}."), {}):
                for place in self.places:
                    found = _import(place)
                    if hasattr(found, name):
                        return getattr(found, name)
            return moved_name(module.__name__, name)

        module.__getattr__ = forward  # type: ignore[method-assign]
        new = " and ".join(_said(place) for place in self.places)
        _warn(module.__name__, new, stacklevel=3)


def _said(place: str) -> str:
    where, _, name = place.rpartition(":")
    return f"the recipes' module {name}" if where else f"{PACKAGE}.{name}"


def _import(place: str) -> ModuleType:
    where, _, name = place.rpartition(":")
    if not where:
        return importlib.import_module(f".{name}", PACKAGE)
    return importlib.import_module(".recipes", PACKAGE).load_recipe(name)
