"""Hold thousands of tasks on one basis as rows of one tensor, which the layers of PEFT's adapters serve as well."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._adapted import active_adapter
from .._shown import Shown, Table, fingerprint
from ..basis.module_names import unwrapped_name
from ..errors import BadFileError, BasisMismatchError, SubspaceError
from ..tuner.base_check import require_same_base
from ..tuner.config import SubspaceConfig
from ..tuner.layer import SubspaceLayer
from ..tuner.module_names import as_named_in
from ..tuner.renaming import named_as, without_wrappers
from ..tuner.row_batch import BASE, Group, TaskNames
from ..tuner.row_names import task_names_passed
from .arguments import check_known
from .bank_file import read_all, write_rows
from .bank_rows import RowLayout, TaskRows
from .read import SavedTask, read_task
from .write import PREFIX, core_tensors, write_task


class TaskBank(Shown, Mapping[str, dict[str, torch.Tensor]]):
    """A mapping of tasks on one basis, stored as the rows of one tensor and served in mixed batches.

    A row holds a task's core of every module, transposed to (k_in, k_out), one after the other, in units of ΔW. As a
    mapping, the bank gives a task's cores: module → (k_out, k_in) float32; ``len(bank)`` is how many tasks it has,
    ``name in bank`` asks for one, and iteration gives their names.

    The rows of a batch name their tasks, in ``with bank.tasks([...]):`` or in stock `adapter_names=[...]`, where they
    mix freely with the model's own adapters and ``__base__``. Adding, replacing and removing a task moves the bytes of
    that task only, without PEFT's walk over all modules. A bank holds no modules that were trained whole
    (`modules_to_save`).

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

    Raises:
        SubspaceError: The model has no such adapter.
    """

    def __init__(self, model: nn.Module, adapter: str | None = None, *, capacity: int = 64) -> None:
        self.model = model
        self.adapter = adapter or active_adapter(model)
        config = getattr(model, "peft_config", {}).get(self.adapter)
        if not isinstance(config, SubspaceConfig):
            raise SubspaceError(
                f"There is no subspace adapter {self.adapter!r} in this model, whose basis a bank could use."
            )
        self.config = config
        self.layers: dict[str, SubspaceLayer] = {
            unwrapped_name(name).removeprefix(PREFIX): layer
            for name, layer in model.named_modules()
            if isinstance(layer, SubspaceLayer) and self.adapter in layer.subspace_coef
        }
        self.layout = RowLayout({module: layer.r[self.adapter] for module, layer in self.layers.items()})
        for module, place in self.layout.places():
            self.layers[module].bank, self.layers[module].bank_place = self, place
        first = next(iter(self.layers.values()))
        self._held = TaskRows(self.layout.width, capacity, first.subspace_U[self.adapter].device)

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
        row = self._held.copy_of(name)
        return {module: self._part(row, layer).T.clone() for module, layer in self.layers.items()}

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
        yield "basis", fingerprint(self.config.basis_fingerprint)

    def _shown_table(self) -> Table:
        names = list(self)
        return ("task",), ((name,) for name in names), len(names)

    def add(self, name: str, task: Any = None, **hub: Any) -> None:
        """Add a task, or replace the one of that name.

        Args:
            name: The name by which rows of a batch ask for the task.
            task: The folder or Hub id of a saved task; or its cores, module → (k_out, k_in) in units of ΔW, such as
                those of another bank. None takes the model's own adapter of this name.
            **hub: `revision`, `token`, `cache_dir` and `subfolder` of a task on the Hub; and `basis`, where its basis
                is.

        Raises:
            BadFileError: The task holds NaN or infinite values.
            BasisMismatchError: The task is on another basis, or has other modules or sizes.
            SubspaceError: The task holds trained modules that a bank cannot serve, or the name means the base model.
        """
        if name == BASE:
            raise SubspaceError(f"{BASE!r} means the base model; give the task another name.")
        if task is None or isinstance(task, Mapping):
            check_known(hub, ())
        cores = task if isinstance(task, Mapping) else self._read(name, task, hub)
        cores = named_as(self.layers, as_named_in(self.model, cores))
        self._fits(name, cores)
        row = torch.cat([cores[module].to(self.rows).T.reshape(-1) for module in self.layers])
        if not torch.isfinite(row).all():
            raise BadFileError(f"Task {name!r} holds NaN or infinite values. Leave it out, or train it again.")
        self._held.put([name], row[None])

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

    def _read(self, name: str, task: Any, hub: dict[str, Any]) -> dict[str, torch.Tensor]:
        read = read_task(self.model, adapter_name=name) if task is None else read_task(task, **hub)
        if read.config.basis_fingerprint != self.config.basis_fingerprint:
            raise BasisMismatchError(
                f"Task {name!r} is on the basis {read.config.basis_fingerprint}, this bank's tasks on "
                f"{self.config.basis_fingerprint}. Make a bank of its own for it."
            )
        require_same_base(read.config, self.config, f"Task {name!r}")
        if read.extras:
            whole = sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in read.extras})
            how = f"Load it as an adapter, `model.load_adapter({str(task)!r}, {name!r})`"
            raise SubspaceError(
                f"Task {name!r} has trained {', '.join(whole[:3])} whole as well, which a bank does not hold."
                f" {'It is an adapter of this model already' if task is None else how}: rows of the same batches name"
                " it as they name the bank's tasks, and get its own modules."
            )
        return read.cores

    def _fits(self, name: str, cores: Mapping[str, torch.Tensor]) -> None:
        wanted = {module: layer.r[self.adapter] for module, layer in self.layers.items()}
        given = {module: tuple(core.shape) for module, core in cores.items()}
        if given != wanted:
            wrong = sorted(module for module in {*given, *wanted} if given.get(module) != wanted.get(module))
            raise BasisMismatchError(
                f"Task {name!r} has {given.get(wrong[0], 'nothing')} in module {wrong[0]!r}, this bank"
                f" {wanted.get(wrong[0], 'nothing')}. All tasks of a bank have the modules and sizes of the adapter"
                " that it was made for."
            )

    def _part(self, rows: torch.Tensor, layer: SubspaceLayer) -> torch.Tensor:
        start, k_in, k_out = layer.bank_place
        return rows[..., start : start + k_in * k_out].unflatten(-1, (k_in, k_out))

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
        U, V = layer.subspace_U[self.adapter], layer.subspace_V[self.adapter]
        key = names.keys[id(layer)]
        _, gathered = names.gathered[key]
        if whole:
            return Group(None, self._part(gathered, layer).to(U.device), U, V)
        if key not in names.selected:
            # selected once for all layers of one basis and size
            others = {BASE, *names.present[key][0]}
            places = torch.tensor([i for i, name in enumerate(names) if name not in others], device=gathered.device)
            names.selected[key] = places, gathered[places]
        places, selected = names.selected[key]
        return Group(places.to(U.device), self._part(selected, layer).to(U.device), U, V)

    # -- files and adapters -------------------------------------------------------------------------------------------

    def save(self, file: str | Path, dtype: torch.dtype = torch.float32, *, overwrite: bool = False) -> Path:
        """Write all tasks into one safetensors file: ``cores`` (tasks, parameters), and an index in its metadata.

        Args:
            file: The file to write.
            dtype: The dtype of the stored cores.
            overwrite: Replace another file, or a bank with tasks that this one lacks.

        Returns:
            The file.

        Raises:
            OccupiedError: `file` is something else, or has tasks that this bank lacks, and `overwrite` is off.
            OSError: The disk refuses; an earlier file stays.
        """
        names, rows = self._held.all()
        about = {
            "basis_fingerprint": self.config.basis_fingerprint,
            "modules": {module: list(size) for module, size in self.layout.cores.items()},
            "weight_shapes": self.config.weight_shapes,
            **({"basis_names": self.config.basis_names} if self.config.basis_names else {}),
            "base_model_name_or_path": self.config.base_model_name_or_path,
        }
        return write_rows(file, about, names, rows.to("cpu", dtype), overwrite=overwrite)

    def load(self, file: str | Path, *, cores_only: bool = False) -> list[str]:
        """Add every task of a file that `save` or `bundle_tasks` wrote, replacing those of the same names.

        Args:
            file: The file. Of a bundle in a folder it is ``folder/bundle.safetensors``, of a bundle on the Hub
                `open_bundle(…).download()`.
            cores_only: Take only the cores of tasks whose trained modules or residuals a bank cannot hold, instead of
                refusing the file.

        Returns:
            The names of the tasks.

        Raises:
            BadFileError: The file is damaged, or it is not a bank's.
            BasisMismatchError: Its tasks are on another basis, or have other modules or sizes.
            SubspaceError: Some of its tasks have trained modules or a residual, and `cores_only` is off.
        """
        names, rows = read_all(
            Path(file),
            self.layout.cores,
            self.config.basis_fingerprint,
            lambda modules: named_as(self.layers, as_named_in(self.model, modules)),
            cores_only=cores_only,
        )
        self._held.put(names, rows)
        return names

    def save_task(self, name: str, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write one task as a stock PEFT adapter folder, with `core` coefficients.

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
        return write_task(folder, task.config, core_tensors(task.config, task.cores), overwrite=overwrite)

    def load_adapter(self, name: str) -> None:
        """Make one task an adapter of the model, to train it further or to merge it.

        Raises:
            SubspaceError: The bank has no such task, or the model has an adapter of that name.
        """
        if name in self.model.peft_config:
            raise SubspaceError(f"The model has an adapter {name!r} already: delete it first.")
        task = self.as_task(name)
        tensors = core_tensors(task.config, task.cores)
        self.model.add_adapter(name, task.config)
        with torch.no_grad():
            for layer, tensor in zip(self.layers.values(), tensors.values(), strict=True):
                layer.subspace_coef[name].weight.copy_(tensor)

    def as_task(self, name: str) -> SavedTask:
        """Return a task as `read_task` would, with `core` coefficients and without its part of the basis.

        Raises:
            SubspaceError: There is no such task.
        """
        cores = {module: core.cpu().double() for module, core in self[name].items()}
        config = dataclasses.replace(
            without_wrappers(self.config),
            coefficients="core",
            # the rank of factors, which a dense core has none of
            r=SubspaceConfig.r if self.config.coefficients == "factor" else self.config.r,
            mean_gain="none",
            start="zero",
            subspace_version=None,
            basis_modules=None,
            card=None,
            target_modules=set(self.layers),
            modules_to_save=None,
        )
        return SavedTask(config, cores, {}, {})
