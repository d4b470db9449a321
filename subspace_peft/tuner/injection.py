"""What is decided and checked before a model is touched: which modules, which basis, whether they fit."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..basis import ModuleBasis, SubspaceBasis
from ..basis.controls import base_weight_module, random_module, with_random_directions
from ..basis.module import module_shape, tensor_sha256
from ..basis.module_store import names_of
from ..errors import BasisMismatchError, SubspaceError
from .base_check import check_base_name, check_probe, same_weights
from .config import SubspaceConfig
from .load_tracker import Arrivals
from .targets import base_of, base_weight, is_conv1d, outer_modules, readable, sizes, supported, weight_shape
from .task_file import k_of, used_part, used_size

GENERATED_K = 16


@dataclass(frozen=True, eq=False)
class Plan:
    """For one adapter: the basis's name of each target module, and where the tensors come from.

    Attributes:
        config: the adapter's.
        basis: where the tensors come from; None where the task's own file will bring them.
        names: target module → its name in the basis.
        shapes: the basis's name of a module → its shape, as `SubspaceBasis.shapes` has it.
        arrivals: what has come from the task's own file, where something is yet to come.
    """

    config: SubspaceConfig
    basis: SubspaceBasis | None
    names: dict[str, str]
    shapes: Mapping[str, Mapping[str, int]]
    arrivals: Arrivals | None

    def module(self, key: str) -> ModuleBasis:
        """The part of the basis that the layer at `key` uses."""
        if self.basis is None:
            return placeholder(self.config, self.names[key])
        return used_part(self.config, key, self.basis[self.names[key]])

    def basis_key(self, key: str) -> tuple[Any, ...] | None:
        """What two adapters have to agree in to share the basis's tensors at `key`; None where they are yet to
        come."""
        shape = self.shapes[self.names[key]]
        used = used_size(self.config, key, shape["k_out"], shape["k_in"])
        return None if self.basis is None else (self.config.basis_fingerprint, self.names[key], *used)

    def describe(self) -> dict[str, Any]:
        """Per target module the shapes and hashes of the tensors that the task's own file will carry."""
        return {name: _description(self.config, self.module(name)) for name in self.names}


def modules_of_basis(model: nn.Module, basis: SubspaceBasis, config: SubspaceConfig) -> set[str]:
    """The model's supported modules that the basis knows, in the layers that the config's `layers_to_transform` names.

    Raises:
        BasisMismatchError: none.
        SubspaceError: none in those layers.
    """
    found = {name for name, module in outer_modules(model) if supported(module) and basis.find(name)}
    if found and config.layers_to_transform is not None:
        inside = {name for name in found if _in_layers(config, name)}
        if not inside:
            raise SubspaceError(
                f"layers_to_transform={config.layers_to_transform!r} (layers_pattern={config.layers_pattern!r}) leaves"
                f" none of the basis's modules, such as {names_of(found, 3)}. Name layers that it has, and their"
                " list's name."
            )
        return inside
    if not found:
        raise BasisMismatchError(
            f"None of the basis's {len(basis)} modules ({names_of(basis, 3)}) is in {type(model).__name__}. The basis "
            f"was built for {basis.base_model or 'another base model'}: load that one, or build a basis for this."
        )
    return found


def fill_target_modules(config: SubspaceConfig, model: nn.Module) -> None:
    """Where the config names no targets: those that its basis has. A generated basis has none, and leaves them to
    PEFT.

    Raises:
        BasisNotFoundError, BasisMismatchError, SubspaceError: see `SubspaceConfig.resolve` and `modules_of_basis`.
    """
    if config.target_modules is None:
        basis = config.resolve()
        if basis is not None:
            config.target_modules = modules_of_basis(model, basis, config)
        elif config.basis_modules is not None:
            config.target_modules = set(config.basis_modules)


def _in_layers(config: SubspaceConfig, name: str) -> bool:
    # PEFT's own rule, which it applies to ends of names only, never to names given in full
    ending = LoraConfig(
        target_modules=[name.rsplit(".", 1)[-1]],
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    return bool(check_target_module_exists(ending, name))


def make_plan(model: nn.Module, config: SubspaceConfig, targets: list[str]) -> Plan:
    """Check that the adapter can be injected into the modules named `targets`, and say how.

    Raises:
        SubspaceError: a target of an unsupported kind; coefficients or a start that the basis cannot serve.
        BasisMismatchError: targets absent from the basis, clashing shapes, a wrong base model; lists them.
    """
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise SubspaceError(
            f"This {type(model).__name__} is split by tensor parallelism (tp_plan, size {model._tp_size}), whose parts"
            " of a weight a shared basis does not fit. Load it without tp_plan; device_map, DDP and FSDP work."
        )
    modules = dict(outer_modules(model))
    for name in targets:
        if not supported(modules[name]):
            raise SubspaceError(
                f"Target module {name!r} is a {type(modules[name]).__name__}; supported are nn.Linear and quantised"
                " kinds of it, transformers' Conv1D, nn.Conv2d without groups, and nn.Embedding. Narrow"
                " target_modules, or leave it out with exclude_modules."
            )
    basis = config.resolve()
    again = basis is not None and config.generated and not config.loaded
    if again and basis is not None and not _made_for(basis, modules, targets):
        config.start_over()
        basis = None
    if basis is None and config.basis_modules is None:
        basis = generate(config, {name: modules[name] for name in targets})
    if basis is not None:
        check_base_name(model, config, basis)
        config.adopt(basis)
    names = _match(config, basis, targets)
    known = basis.shapes() if basis is not None else {n: e["shape"] for n, e in (config.basis_modules or {}).items()}
    clashes = [
        f"{name}: the basis has (out={known[key]['out']}, in={known[key]['in']}), the model {sizes(modules[name])}"
        for name, key in names.items()
        if (known[key]["out"], known[key]["in"]) != sizes(modules[name])
    ]
    if clashes:
        raise BasisMismatchError(
            f"{len(clashes)} modules have other shapes than the basis: {'; '.join(clashes[:3])}. The basis was built"
            f" for {(basis.base_model if basis else None) or 'another base model'}: load that one."
        )
    if config._file_modules is not None and config._file_modules != set(targets):
        absent, extra = config._file_modules - set(targets), set(targets) - config._file_modules
        what = f"has no module {names_of(absent, 3)}" if absent else f"also targets {names_of(extra, 3)}"
        raise BasisMismatchError(
            f"The saved task adapts {len(config._file_modules)} modules, but this {type(model).__name__} {what}. Load"
            f" the base model that it was trained on ({config.base_model_name_or_path})."
        )
    config.fan_in_fan_out = any(is_conv1d(modules[name]) for name in targets)
    config.weight_shapes = {
        name: shape for name in targets if (shape := weight_shape(modules[name])) is not None
    } or None
    # with PeftModel the file was checked already; loaders that bypass the config class leave it to the layers
    arrivals = Arrivals() if basis is None or (config.loaded and config._file_modules is None) else None
    plan = Plan(config, basis, names, known, arrivals)
    if again and config.basis == "base-weights" and not same_weights(modules, plan):
        config.start_over()
        return make_plan(model, config, targets)
    _check_coefficients(config, basis, names, known)
    check_probe(model, modules, plan)
    if basis is not None and config.save_basis is False and basis.location is None:
        warnings.warn(
            "save_basis=False, and the basis lives in memory only: a saved task could not be loaded again. Save the"
            " basis with `basis.save_pretrained(folder)` before `get_peft_model`, or leave save_basis out.",
            stacklevel=2,
        )
    if basis is not None and config.basis_modules is None and _carries_basis(config, basis):
        config.basis_modules = plan.describe()
        if config.save_basis is None and not config.generated:
            size = sum(
                value.numel() * value.element_size() for n in targets for value in (plan.module(n).U, plan.module(n).V)
            )
            warnings.warn(
                f"This basis lives in memory only, so the task's own file will carry a copy of it ({size:,} bytes)."
                " Save it with `basis.save_pretrained(folder)` before `get_peft_model` for a task of kilobytes, or"
                " pass save_basis=True if this is meant.",
                stacklevel=2,
            )
    return plan


def generate(config: SubspaceConfig, targets: Mapping[str, nn.Module]) -> SubspaceBasis:
    """A basis of the config's generated kind for the given layers."""
    made: dict[str, ModuleBasis] = {}
    for name, layer in targets.items():
        k = k_of(config, name) or GENERATED_K
        out, inner = sizes(layer)
        if config.basis == "random":
            module = random_module(name, out, inner, k, k, config.seed)
        elif not readable(layer):
            raise SubspaceError(
                f"basis='base-weights': the weight of {name!r} ({type(base_of(layer)).__name__}) cannot be read back"
                " from its quantised form. Build the basis from the unquantised model by"
                " `build_basis(builder='base-weights', …)`, and pass that."
            )
        else:
            module = base_weight_module(base_weight(layer), k)
        if config.coefficients == "directions":
            module = with_random_directions(name, module, k, config.seed)
        made[name] = module
    return SubspaceBasis(made, {"builder": config.basis, "base_model_name_or_path": config.base_model_name_or_path})


def _made_for(basis: SubspaceBasis, modules: Mapping[str, nn.Module], targets: list[str]) -> bool:
    # one configuration may be used again, for other modules or for another model, as one of LoRA's may
    shapes = basis.shapes()
    return all(n in shapes and (shapes[n]["out"], shapes[n]["in"]) == sizes(modules[n]) for n in targets)


def placeholder(config: SubspaceConfig, name: str) -> ModuleBasis:
    """Zeros in the shape of a basis that the task's own file will fill in."""
    entry = (config.basis_modules or {})[name]
    shape, hashes = entry["shape"], entry["sha256"]
    a, b = shape["k_out"], shape["k_in"]
    return ModuleBasis(
        U=torch.zeros(shape["out"], a),
        V=torch.zeros(b, shape["in"]),
        M=torch.zeros(a, b) if "M" in hashes else None,
        G=torch.zeros(shape["directions"], a, b) if "G" in hashes else None,
    )


def _description(config: SubspaceConfig, module: ModuleBasis) -> dict[str, Any]:
    tensors = {"U": module.U, "V": module.V}
    if config.mean_gain != "none" and module.M is not None:
        tensors["M"] = module.M
    if config.coefficients == "directions" and module.G is not None:
        tensors["G"] = module.G
    return {
        "shape": module_shape(module),
        "sha256": {key: tensor_sha256(value.float()) for key, value in tensors.items()},
    }


def _carries_basis(config: SubspaceConfig, basis: SubspaceBasis) -> bool:
    if config.save_basis is not None:
        return config.save_basis
    return basis.location is None


def _match(config: SubspaceConfig, basis: SubspaceBasis | None, targets: list[str]) -> dict[str, str]:
    known = config.basis_modules or {}
    matches = {name: basis.find(name) if basis is not None else (name if name in known else None) for name in targets}
    absent = [name for name, key in matches.items() if key is None]
    if absent:
        raise BasisMismatchError(
            f"{len(absent)} of {len(targets)} target modules are not in the basis, such as {names_of(absent, 3)}; it"
            f" has {names_of(basis if basis is not None else known, 3)}. Narrow target_modules (None takes the basis's"
            " own), or build a basis from sources that adapt these modules."
        )
    uses = Counter(matches.values())
    twice = sorted(name for name, key in matches.items() if uses[key] > 1)
    if twice:
        raise BasisMismatchError(
            f"Target modules {names_of(twice, 3)} are one module of the basis ({matches[twice[0]]}), leading parts of"
            " their names aside. It was built for one of them: narrow target_modules, or leave the others out with"
            " exclude_modules."
        )
    return {name: str(key) for name, key in matches.items()}


def _check_coefficients(
    config: SubspaceConfig, basis: SubspaceBasis | None, names: Mapping[str, str], known: Mapping[str, Any]
) -> None:
    first = next(iter(names.values()))
    if config.coefficients == "directions" and not known[first].get("directions"):
        raise SubspaceError(
            f"coefficients='directions' needs a basis with direction tensors, and module {first!r} has none. Build it "
            "with `build_basis(..., directions=m)` (--directions m), or choose other coefficients."
        )
    if basis is None:
        return
    mean = config.mean_gain != "none" or (config.start == "mean" and not config.loaded)
    if mean and basis[first].M is None:
        raise SubspaceError(
            f"mean_gain={config.mean_gain!r}, start={config.start!r}: the basis has no mean core (builder "
            f"{basis.info.get('builder')!r}). Use a basis built from adapters, or mean_gain='none' and start='zero'."
        )
    if config.start not in ("zero", "mean") and not config.loaded:
        source_index(config, basis)
        if basis[first].cores is None:
            raise SubspaceError(
                f"start={config.start!r}: this basis does not keep its sources' cores. Build it with keep_cores=True,"
                " or start at 'zero' or 'mean'."
            )


def source_index(config: SubspaceConfig, basis: SubspaceBasis) -> int:
    """Place of the source that `config.start` names in the basis's list of sources."""
    names = [source.get("name") for source in basis.info.get("sources", [])]
    if config.start not in names:
        raise SubspaceError(
            f"start={config.start!r}: no such source in the basis; choose 'zero', 'mean' or one of "
            f"{', '.join(map(str, names)) or '(it has none)'}."
        )
    return names.index(config.start)
