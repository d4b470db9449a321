"""Hold thousands of tasks on one basis as rows of one tensor, which the layers of PEFT's adapters serve as well."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._adapted import active_adapter
from .._io.untrusted import is_whole
from .._shown import Shown, Table, fingerprint
from ..basis.module_names import unwrapped_name
from ..errors import BadFileError, BasisMismatchError, SubspaceError
from ..tuner.config import SubspaceConfig
from ..tuner.layer import SubspaceLayer, require_loaded
from ..tuner.module_names import as_named_in
from ..tuner.own_directions import core_of_own
from ..tuner.renaming import named_as
from ..tuner.row_batch import BASE, Group, TaskNames
from ..tuner.row_names import task_names_passed
from .arguments import check_known
from .bank_file import write_rows
from .bank_load import read_all
from .bank_rows import Pair, RowLayout, TaskRows, filled, padded
from .bank_tasks import instead_of_room, taken, task_of
from .read import SavedTask
from .write import PREFIX, task_tensors, write_task


class TaskBank(Shown, Mapping[str, dict[str, torch.Tensor]]):
    """A mapping of tasks on one basis, stored as the rows of one tensor and served in mixed batches.

    A row holds a task's core of every module, transposed to (k_in, k_out), one after the other, in units of ΔW, and
    then its own directions. As a mapping, the bank gives a task's cores: module → (k_out, k_in) float32; `own` gives
    its own directions. ``len(bank)`` is how many tasks it has, ``name in bank`` asks for one, and iteration gives
    their names.

    The rows of a batch name their tasks, in ``with bank.tasks([...]):`` or in stock `adapter_names=[...]`, where they
    mix freely with the model's own adapters and ``__base__``. Adding, replacing and removing a task moves the bytes of
    that task only, without PEFT's walk over all modules. A bank holds no modules that were trained whole
    (`modules_to_save`).

    Tasks with fewer own directions than the bank has room for, or with a smaller core, one of the basis's leading
    directions, are filled up with zeros.

    Examples:
        >>> model = PeftModel.from_pretrained(base_model, "tasks/first")
        >>> bank = TaskBank(model)
        >>> for folder in folders:
        ...     bank.add(folder.name, folder)
        >>> with bank.tasks(["billing", "spam", "billing"]):
        ...     model(**batch)

    Args:
        model: A PeftModel, or any other model with subspace layers.
        adapter: The adapter whose basis, modules and sizes the tasks of the bank have; the active one by default.
        capacity: Number of tasks that the bank has room for at first; it doubles when it is full.
        extra_rank: How many own directions a task may have per module. None: as many as the adapter has, in each
            module. Every task takes up this room, extra_rank × (out + in) parameters per module.

    Raises:
        SubspaceError: The model has no such adapter, or `extra_rank` is no such number.
        BadFileError: The adapter's basis lies in a task's file, which was not loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: str | None = None,
        *,
        capacity: int = 64,
        extra_rank: int | None = None,
    ) -> None:
        self.model = model
        self.adapter = adapter or active_adapter(model)
        config = getattr(model, "peft_config", {}).get(self.adapter)
        if not isinstance(config, SubspaceConfig):
            raise SubspaceError(
                f"There is no subspace adapter {self.adapter!r} in this model, whose basis a bank could use."
            )
        if extra_rank is not None and not is_whole(extra_rank, least=0):
            raise SubspaceError(f"extra_rank={extra_rank!r}: give a whole number of own directions, 0 for none.")
        self.config = config
        self.layers: dict[str, SubspaceLayer] = {
            unwrapped_name(name).removeprefix(PREFIX): layer
            for name, layer in model.named_modules()
            if isinstance(layer, SubspaceLayer) and self.adapter in layer.subspace_coef
        }
        require_loaded(model, self.adapter)
        own = {module: self._room(layer, extra_rank) for module, layer in self.layers.items()}
        self.layout = RowLayout({module: layer.r[self.adapter] for module, layer in self.layers.items()}, own)
        for module, layer in self.layers.items():
            layer.bank, layer.bank_place = self, module
        first = next(iter(self.layers.values()))
        self._held = TaskRows(self.layout, capacity, first.subspace_U[self.adapter].device)

    def _room(self, layer: SubspaceLayer, extra_rank: int | None) -> tuple[int, int, int]:
        out, size = layer.subspace_U[self.adapter].shape[0], layer.subspace_V[self.adapter].shape[1]
        rank = layer.extra_rank.get(self.adapter, 0) if extra_rank is None else extra_rank
        return min(rank, out, size), out, size

    @property
    def rows(self) -> torch.Tensor:
        """The rows of all slots (slots, parameters), of which the first is zero."""
        return self._held.tensor

    @property
    def slots(self) -> dict[str, int]:
        """Task → its row."""
        return self._held.slots

    # -- tasks --------------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> dict[str, torch.Tensor]:
        return self._cores_in(self._held.copy_of(name))

    def _cores_in(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        return {module: self.layout.core(row, module).T.clone() for module in self.layers}

    def own(self, name: str) -> dict[str, Pair]:
        """Return a task's own directions.

        Returns:
            Module → ``(B, A)``, (out, φ) and (φ, in) float32, in units of ΔW, without the directions that fill up the
            bank's room; only of modules where the task has any.

        Raises:
            SubspaceError: The bank has no task of that name.
        """
        return self._own_in(self._held.copy_of(name))

    def _own_in(self, row: torch.Tensor) -> dict[str, Pair]:
        parts = {module: self.layout.own_part(row, module) for module in self.layout.own}
        found = {module: filled(part) for module, part in parts.items() if part is not None}
        return {module: pair for module, pair in found.items() if len(pair[1])}

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.slots))

    def __len__(self) -> int:
        return len(self.slots)

    def __contains__(self, name: object) -> bool:
        return name in self.slots

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        names = list(self)
        few = ", ".join([*map(repr, names[:3]), *(["…"] if len(names) > 3 else [])])
        yield "tasks", f"{len(names)} ({few})" if names else "0"
        yield "room for", len(self.rows) - 1
        yield "modules", len(self.layers)
        yield "parameters per task", f"{self.rows.shape[1]:,}"
        yield "room for own directions", max((rank for rank, _, _ in self.layout.own.values()), default=0) or None
        yield "basis", fingerprint(self.config.basis_fingerprint)

    def _shown_table(self) -> Table:
        names = list(self)
        return ("task",), ((name,) for name in names), len(names)

    def add(self, name: str, task: Any = None, *, own: Mapping[str, Pair] | None = None, **hub: Any) -> None:
        """Add a task, or replace the one of that name.

        Args:
            name: The name by which rows of a batch ask for the task.
            task: The folder or Hub id of a saved task, or a `SavedTask`; or a task's cores, module → (k_out, k_in) in
                units of ΔW, such as those of another bank. None takes the model's own adapter of this name.
            own: Beside cores, the own directions: module → ``(B, A)``, (out, φ) and (φ, in) in units of ΔW, as the
                method `own` gives them. A saved task and an adapter bring theirs.
            **hub: `revision`, `token`, `cache_dir` and `subfolder` of a task on the Hub; and `basis`, where its basis
                is.

        Raises:
            BadFileError: The task holds NaN or infinite values.
            BasisMismatchError: The task is on another basis, or has other modules, larger sizes or more own directions
                than the bank has room for.
            SubspaceError: The task holds trained modules that a bank cannot serve, or the name means the base model.
        """
        if name == BASE:
            raise SubspaceError(f"{BASE!r} means the base model; give the task another name.")
        if task is None or isinstance(task, Mapping):
            check_known(hub, ())
        if own is not None and not isinstance(task, Mapping):
            raise SubspaceError(
                f"Task {name!r}: own= belongs to cores, module → (k_out, k_in). A saved task and an adapter have their"
                " own directions with them: leave it out."
            )
        if isinstance(task, Mapping):
            cores = task
        else:
            read = taken(self.model, self.config, name, task, hub)
            cores, own = read.cores, read.own
        if strange := sorted({*(own or {})}.difference(cores)):
            raise BasisMismatchError(
                f"Task {name!r} has own directions in module {strange[0]!r}, and no core. Give both by the same names."
            )
        # renamed together: which names are meant is told from all of them
        parts = self._named({module: (core, (own or {}).get(module)) for module, core in cores.items()})
        cores = {module: core for module, (core, _) in parts.items()}
        row = self.layout.row(
            name,
            cores if isinstance(task, Mapping) else padded(cores, self.layout),
            {module: pair for module, (_, pair) in parts.items()},
            instead_of_room(name, task),
        )
        if not torch.isfinite(row).all():
            raise BadFileError(f"Task {name!r} holds NaN or infinite values. Leave it out, or train it again.")
        self._held.put([name], row[None])

    def _named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values by the names that this model has for their modules."""
        return named_as(self.layers, as_named_in(self.model, values))

    def remove(self, name: str) -> None:
        """Remove a task.

        Raises:
            SubspaceError: The bank has no task of that name.
        """
        self._held.remove(name)

    def detach(self) -> None:
        """Take the bank out of the model's layers; the tasks stay in the bank."""
        for layer in self.layers.values():
            if layer.bank is self:
                layer.bank = None

    # -- batches ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def tasks(self, names: Sequence[str], *, copies: int = 1) -> Iterator[None]:
        """Apply the task `names[i]` to row i of every batch while the context is open.

        That is so for this thread, or this coroutine: others have blocks of their own at the same time. Forward passes
        of threads that have none are refused meanwhile, as it is not known which tasks they are for.

        Args:
            names: A name per row: of the bank, of one of the model's adapters, or ``__base__``. The bank's tasks are
                taken as they are now.
            copies: Number of rows that `generate` makes of each row, such as its beams.

        Raises:
            SubspaceError: A name is unknown, or the model is in training mode.
        """
        inner = getattr(self.model, "base_model", self.model)
        inner = getattr(inner, "model", inner)
        given = {"adapter_names": list(names), "num_beams": copies, "block": True}
        with task_names_passed(inner, SubspaceLayer, self.model.training, given):
            yield

    def gather(self, names: Sequence[str]) -> torch.Tensor:
        """Return the rows of these names (n, parameters) as they are now; of names that are not the bank's, zeros."""
        return self._held.of(names)

    def group(self, layer: SubspaceLayer, names: TaskNames, whole: bool) -> Group:
        """Return the rows of a batch whose tasks are in this bank, for `row_batch.prepare`.

        Args:
            layer: The layer that is about to compute; one of the bank's.
            names: The names of the batch's rows, for which the bank's tasks were taken.
            whole: Whether every row of the batch gets a core, that of zeros where its task is not in this bank.

        Raises:
            SubspaceError: The adapter whose basis the bank uses was deleted.
        """
        if self.adapter not in layer.subspace_U:
            raise SubspaceError(
                f"The adapter {self.adapter!r}, whose basis this bank uses, was deleted. Make a new bank on another"
                " adapter."
            )
        key = names.keys[id(layer)]
        _, gathered = names.gathered[key]
        if whole:
            return self._group(layer, None, gathered)
        if key not in names.selected:
            # selected once for all layers of one basis and size
            others = {BASE, *names.present[key][0]}
            places = torch.tensor([i for i, name in enumerate(names) if name not in others], device=gathered.device)
            names.selected[key] = places, gathered[places]
        return self._group(layer, *names.selected[key])

    def _group(self, layer: SubspaceLayer, places: torch.Tensor | None, rows: torch.Tensor) -> Group:
        U, V = layer.subspace_U[self.adapter], layer.subspace_V[self.adapter]
        cores, own = self.layout.core(rows, layer.bank_place), self.layout.own_part(rows, layer.bank_place)
        places = None if places is None else places.to(U.device)
        return Group(places, cores.to(U.device), U, V, None if own is None else own.to(U.device))

    # -- files and adapters -------------------------------------------------------------------------------------------

    def save(self, file: str | Path, dtype: torch.dtype = torch.float32, *, overwrite: bool = False) -> Path:
        """Write all tasks into one safetensors file; its format is described with the other files.

        Args:
            file: The file to write.
            dtype: The dtype of the stored cores and own directions.
            overwrite: Replace another file, or a bank with tasks that this one lacks.

        Returns:
            The file.

        Raises:
            OccupiedError: `file` is something else, or has tasks that this bank lacks, and `overwrite` is off.
            OSError: The disk refuses; an earlier file stays.
        """
        names, rows, wide = self._held.all()
        about = {
            "basis_fingerprint": self.config.basis_fingerprint,
            "modules": {module: list(size) for module, size in self.layout.cores.items()},
            "weight_shapes": self.config.weight_shapes,
            **({"basis_names": self.config.basis_names} if self.config.basis_names else {}),
            "base_model_name_or_path": self.config.base_model_name_or_path,
        }
        return write_rows(file, about, self.layout, names, rows.to("cpu", dtype), wide, overwrite=overwrite)

    def load(self, file: str | Path, *, cores_only: bool = False) -> list[str]:
        """Add every task of a file that `save` or `bundle_tasks` wrote, replacing those of the same names.

        Args:
            file: The file. Of a bundle in a folder it is ``folder/bundle.safetensors``, of a bundle on the Hub
                `open_bundle(…).download()`.
            cores_only: Take what a bank can hold of a task, instead of refusing the file. Trained modules are left
                out. Of a task with more own directions than there is room for, the bank takes the projection on its
                basis, own directions included, as a core.

        Returns:
            The names of the tasks.

        Raises:
            BadFileError: The file is damaged, or it is not a bank's.
            BasisMismatchError: Its tasks are on another basis, or have other modules, larger sizes, or more own
                directions than this bank has room for, and `cores_only` is off.
            SubspaceError: Some of its tasks have trained modules, and `cores_only` is off.
        """
        fingerprint = self.config.basis_fingerprint
        projected = self._projected if cores_only else None
        names, rows = read_all(Path(file), self.layout, fingerprint, self._named, projected=projected)
        self._held.put(names, rows)
        return names

    def _projected(self, module: str, own: Pair) -> torch.Tensor:
        U, V = (getattr(self.layers[module], f"subspace_{side}")[self.adapter].cpu() for side in "UV")
        return core_of_own(U, V, *own)

    def save_task(self, name: str, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write one task as a stock PEFT adapter folder, with `core` coefficients and its own directions.

        Args:
            name: The task.
            folder: The folder to write, made where it does not exist.
            overwrite: See `write_task`.

        Returns:
            The folder.

        Raises:
            SubspaceError: The bank has no such task, or its basis lives in memory only; and see `write_task`.
            OSError: The disk refuses; the folder stays as it was.
        """
        task = self.as_task(name)
        return write_task(folder, task.config, task_tensors(task), overwrite=overwrite)

    def load_adapter(self, name: str) -> None:
        """Make one task an adapter of the model, to train it further or to merge it.

        Raises:
            SubspaceError: The bank has no such task, or the model has an adapter of that name.
        """
        if name in self.model.peft_config:
            raise SubspaceError(f"The model has an adapter {name!r} already: delete it first.")
        task = self.as_task(name)
        tensors = task_tensors(task)
        self.model.add_adapter(name, task.config)
        with torch.no_grad():
            for module, layer in self.layers.items():
                for each, parameter in layer.subspace_coef[name].named_parameters():
                    parameter.copy_(tensors[f"{PREFIX}{module}.subspace_coef.{each}"])

    def as_task(self, name: str) -> SavedTask:
        """Return a task as `read_task` would, with `core` coefficients and without its part of the basis.

        Raises:
            SubspaceError: There is no such task.
        """
        row = self._held.copy_of(name).cpu().double()
        return task_of(self.config, self._cores_in(row), self._own_in(row))
