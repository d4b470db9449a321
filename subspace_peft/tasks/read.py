"""Read a task from its folder, or take it from a live model, without building another model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors.torch import load_file

from .._adapted import active_adapter, unwrapped
from .._io.hints import hint
from .._moved import moved_name
from .._shown import Shown, Table, core_table, fingerprint, said_of_directions, short
from ..basis import ModuleBasis, SubspaceBasis
from ..basis.module import module_shape
from ..errors import BasisMismatchError, SubspaceError
from ..tuner.coefficients import OWN, make_coefficients
from ..tuner.config import SubspaceConfig
from ..tuner.layer import basis_in
from ..tuner.own_directions import core_of_own, own_update, split_own
from ..tuner.renaming import without_wrappers
from ..tuner.task_file import BASIS_KEY, COEFFICIENT_KEY, weights_of
from .arguments import check_hub
from .pipeline_task import check_one_task


@dataclass(frozen=True, eq=False, repr=False)
class SavedTask(Shown):
    """A task in a shared basis, in the form that every conversion starts from.

    Attributes:
        config: Its configuration, basis resolved.
        cores: Module → ``s·C(θ) + g·M`` (k_out, k_in) float64, the core in units of ΔW.
        modules: Module → the part of the basis that it uses.
        extras: Further saved tensors by key, such as those of a classifier (`modules_to_save`).
        own: Module → ``(B, A)``, (out, φ) and (φ, in), whose product is added to ``U core V``: the task's own
            directions beside the basis, trained with `extra_rank` or kept by `project_lora` and `compress_fleet`.
    """

    config: SubspaceConfig
    cores: dict[str, torch.Tensor]
    modules: Mapping[str, ModuleBasis]
    extras: dict[str, torch.Tensor]
    own: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def residual(self) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        """The earlier name of `own`."""
        warnings.warn("SavedTask.residual is now called SavedTask.own.", FutureWarning, stacklevel=2)
        return self.own

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "coefficients", self.config.coefficients
        yield "modules", len(self.cores)
        yield "base model", short(self.config.base_model_name_or_path)
        yield "further tensors", len(self.extras) or None
        own = {name: self.own[name][0].shape[1] if name in self.own else 0 for name in self.cores}
        yield "own directions", said_of_directions(own) if self.own else None
        yield "basis", fingerprint(self.config.basis_fingerprint)

    def _shown_table(self) -> Table:
        return core_table(self.cores)

    def out_in(self, module: str) -> tuple[int, int]:
        """Return a module's (out, in); of a stored basis no tensor is read for it."""
        if isinstance(self.modules, Parts):
            shape = self.modules.basis.shapes()[self.modules.names[module]]
            return shape["out"], shape["in"]
        found = self.modules[module]
        return found.out_features, found.in_features

    def without_own(self) -> SavedTask:
        """Return the task without directions of its own: the whole projected on its basis, which is nearest to it.

        The core by itself may be far from that: core and own directions were fitted or trained together.
        """
        cores = dict(self.cores)
        for name, (B, A) in self.own.items():
            module = self.modules[name]
            cores[name] = cores[name] + core_of_own(module.U, module.V, B, A)
        config = replace(self.config, extra_rank=0, extra_rank_pattern={})
        return SavedTask(config, cores, self.modules, self.extras)

    def renamed(self, names: Mapping[str, str]) -> SavedTask:
        """Return the task with other names of its modules.

        Args:
            names: Module → its new name; all others stay.
        """

        def now(values: Mapping[str, Any]) -> dict[str, Any]:
            return {names.get(name, name): values[name] for name in values}

        shapes, keys = self.config.weight_shapes, self.config.basis_names
        config = replace(
            self.config,
            target_modules=set(now(self.cores)),
            weight_shapes=None if shapes is None else now(shapes),
            basis_names=None if keys is None else now(keys),
        )
        return SavedTask(config, now(self.cores), now(self.modules), self.extras, now(self.own))


def read_task(
    task: Any, *, adapter_name: str | None = None, basis: SubspaceBasis | str | None = None, **hub: Any
) -> SavedTask:
    """Read a task.

    Args:
        task: The folder or Hub id of a saved task, a live PeftModel, or a `SavedTask`, which is returned as it is.
        adapter_name: The adapter of a live model; the active one by default.
        basis: The basis, its folder or its Hub id; by default the place that the task's config names.
        **hub: `revision`, `token`, `cache_dir` and `subfolder` of a task on the Hub.

    Raises:
        SubspaceError: It is not a subspace task; also the errors of `SubspaceConfig.from_pretrained`.
    """
    if isinstance(task, SavedTask):
        _check_in_memory(task, adapter_name=adapter_name, basis=basis)
        check_hub(task, hub)
        return task
    return assemble(*read_tensors(task, adapter_name=adapter_name, basis=basis, **hub))


def read_tensors(
    task: Any, *, adapter_name: str | None = None, basis: SubspaceBasis | str | None = None, **hub: Any
) -> tuple[SubspaceConfig, dict[str, torch.Tensor], SubspaceBasis | None]:
    """Read a task's parts. Arguments and errors as in `read_task`.

    Returns:
        Its configuration; its tensors as they are saved, by their keys in its file; and its basis, None where the
        tensors have it.
    """
    task = unwrapped(task)
    check_hub(task, hub)
    if hasattr(task, "peft_config"):
        from peft import get_peft_model_state_dict

        _check_in_memory(task, basis=basis)

        name = adapter_name or active_adapter(task)
        if name not in task.peft_config:
            raise SubspaceError(f"The model has no adapter {name!r}; it has {', '.join(sorted(task.peft_config))}.")
        config = task.peft_config[name]
        if not isinstance(config, SubspaceConfig):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise SubspaceError(f"adapter {name!r}: its peft_type is {kind}, not SUBSPACE.")
        config = without_wrappers(config)
        return config, get_peft_model_state_dict(task, adapter_name=name), basis_in(task, name) or config.resolve()
    if adapter_name is not None:
        raise SubspaceError(
            f"adapter_name={adapter_name!r} is of a live model, and {task} is a saved task: leave it out."
        )
    given = {} if basis is None else {"basis": basis}
    if not hub.get("subfolder"):
        check_one_task(task)
    try:
        config = SubspaceConfig.from_pretrained(str(task), **given, **hub)
    except SubspaceError:
        raise
    except ValueError as error:
        # PEFT raises this for a folder or repository without an adapter_config.json
        raise SubspaceError(f"{task}: {error}. Pass the folder or Hub id of a saved task.") from error
    if not isinstance(config, SubspaceConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise SubspaceError(f"{task}: its peft_type is {kind}, not SUBSPACE.{hint(task)}")
    return config, load_file(weights_of(task, config.loaded_from.folder)), config.resolve()


def assemble(config: SubspaceConfig, tensors: Mapping[str, torch.Tensor], basis: SubspaceBasis | None) -> SavedTask:
    """Return the task that a configuration, its tensors and its basis, as `read_tensors` gives them, are."""
    coefficients: dict[str, dict[str, torch.Tensor]] = {}
    own: dict[str, dict[str, torch.Tensor]] = {}
    extras = {}
    for key, value in tensors.items():
        if found := COEFFICIENT_KEY.match(key):
            coefficients.setdefault(found["module"], {})[found["name"]] = value.detach().cpu()
        elif found := BASIS_KEY.match(key):
            own.setdefault(found["module"], {})[found["name"]] = value.detach().cpu()
        else:
            extras[key] = value.detach().cpu()
    if basis is None:
        carried = {
            name: ModuleBasis(**{key: part.float() for key, part in own[name].items()}) for name in coefficients
        }
        for name, module in carried.items():
            module.check(name)
        parts_of: Mapping[str, ModuleBasis] = carried
        known = {name: module_shape(module) for name, module in carried.items()}
    else:
        basis = basis.named(config.basis_names) if config.basis_names else basis
        keys = {name: str(basis.find(name)) for name in coefficients}
        shapes = basis.shapes()
        known = {name: shapes[key] for name, key in keys.items()}
        sizes = {name: config.sizes.used(name, shape["k_out"], shape["k_in"]) for name, shape in known.items()}
        parts_of = Parts(sizes, basis, keys)
    cores, own_parts = {}, {}
    for name, parts in coefficients.items():
        core, extra = split_own(parts)
        cores[name] = _core(config, name, known[name], parts_of, core)
        if extra:
            u, v = (extra[key] for key in OWN)
            own_parts[name] = own_update(u, v, config.sizes.own_units(name, u.shape[0], v.shape[1]))
    return SavedTask(config, cores, parts_of, extras, own_parts)


def _check_in_memory(task: Any, **given: Any) -> None:
    """Raise `SubspaceError` where an argument is given that only a saved task takes."""
    names = [f"{name}=" for name, value in given.items() if value is not None]
    if names:
        raise SubspaceError(
            f"{', '.join(names)} has no effect on a {type(task).__name__}, which has its basis: leave it out."
        )


class Parts(Mapping[str, ModuleBasis]):
    """The parts of a basis that the modules of a task use, read when one is asked for: often the cores suffice.

    Args:
        sizes: Module → the (k_out, k_in) that it uses.
        basis: The basis.
        names: Module → its name in the basis.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, ...]], basis: SubspaceBasis, names: Mapping[str, str]) -> None:
        self.sizes, self.basis, self.names = sizes, basis, names

    def __getitem__(self, name: str) -> ModuleBasis:
        module, size = self.basis[self.names[name]], self.sizes[name]
        return module if size == (module.k_out, module.k_in) else module.truncate(*size)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _core(
    config: SubspaceConfig,
    name: str,
    shape: Mapping[str, int],
    parts_of: Mapping[str, ModuleBasis],
    parts: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    scale = config.sizes.scale(name, shape)
    if config.coefficients == "core" and config.mean_gain == "none":
        return parts["weight"].double() * scale
    needs_module = config.coefficients == "directions" or config.mean_gain != "none"
    module = parts_of[name] if needs_module else None
    if config.mean_gain != "none" and module is not None and module.M is None:
        raise BasisMismatchError(
            f"mean_gain={config.mean_gain!r}, but the basis has no mean core in module {name!r}. Pass the basis that"
            " the task was trained on."
        )
    mean, directions = (None, None) if module is None else (module.M, module.G)
    made = make_coefficients(
        config.coefficients,
        *config.sizes.used(name, shape["k_out"], shape["k_in"]),
        r=config.r,
        directions=0 if directions is None else directions.shape[0],
        mean_gain=config.mean_gain,
    ).double()
    made.load_state_dict({key: value.double() for key, value in parts.items()})
    mean = None if config.mean_gain == "none" or mean is None else mean.double() / scale
    with torch.no_grad():
        return made.core(mean, None if directions is None else directions.double()) * scale


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
