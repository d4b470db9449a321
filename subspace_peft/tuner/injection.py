"""What is decided and checked before a model is touched: which modules, which basis, whether they fit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..basis import ModuleBasis, SubspaceBasis
from ..basis.basis import names_of
from ..basis.generic import base_weight_module, random_module, with_random_directions
from ..basis.module import tensor_sha256
from ..errors import BasisMismatchError, SubspaceError
from .config import SubspaceConfig
from .task_files import used_part

PROBED_MODULES, PROBED_SIDE = 4, 3
SAME_WEIGHTS = 0.9  # cosine of probes: 4-bit quantisation of one model keeps 0.99, two models have about 0
GENERATED_K = 16


@dataclass(frozen=True, eq=False)
class Plan:
    """For one adapter: the basis's name of each target module, and where the tensors come from."""

    config: SubspaceConfig
    basis: SubspaceBasis | None
    names: dict[str, str]

    def module(self, key: str) -> ModuleBasis:
        """The part of the basis that the layer at `key` uses."""
        if self.basis is None:
            return placeholder(self.config, self.names[key])
        return used_part(self.config, self.basis[self.names[key]])

    @property
    def fingerprint(self) -> str:
        return str(self.config.basis_fingerprint)


def supported(module: nn.Module) -> bool:
    """Whether a layer can be adapted: `nn.Linear` (also quantised kinds of it) and transformers' `Conv1D`."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(base, (nn.Linear, Conv1D))


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer, or the one inside an adapter layer, is transformers' `Conv1D`, whose weight is (in, out)."""
    return isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, Conv1D)


def sizes(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a supported layer."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    inner, out = _get_in_out_features(base)
    return int(out), int(inner)


def modules_of_basis(model: nn.Module, basis: SubspaceBasis) -> set[str]:
    """The model's supported modules that the basis knows.

    Raises:
        BasisMismatchError: none.
    """
    found = {name for name, module in _outer_modules(model) if supported(module) and basis.find(name)}
    if not found:
        raise BasisMismatchError(
            f"None of the basis's {len(basis)} modules ({names_of(basis, 3)}) is in {type(model).__name__}. The basis "
            f"was built for {basis.base_model or 'another base model'}: load that one, or build a basis for this."
        )
    return found


def make_plan(model: nn.Module, config: SubspaceConfig, targets: list[str]) -> Plan:
    """Check that the adapter can be injected into the modules named `targets`, and say how.

    Raises:
        SubspaceError: a target of an unsupported kind; coefficients or a start that the basis cannot serve.
        BasisMismatchError: targets absent from the basis, clashing shapes, a wrong base model; lists them.
    """
    modules = dict(_outer_modules(model))
    for name in targets:
        if not supported(modules[name]):
            raise SubspaceError(
                f"Target module {name!r} is a {type(modules[name]).__name__}; supported are nn.Linear and transformers' "
                "Conv1D. Narrow target_modules, or leave it out with exclude_modules."
            )
    basis = config.resolve()
    if basis is None and config.basis_modules is None:
        basis = generate(config, {name: modules[name] for name in targets})
    if basis is not None:
        _check_base_name(model, config, basis)
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
            f"{len(clashes)} modules have other shapes than the basis: {'; '.join(clashes[:3])}. The basis was built for "
            f"{(basis.base_model if basis else None) or 'another base model'}: load that one."
        )
    if config._file_modules is not None and config._file_modules != set(targets):
        absent, extra = config._file_modules - set(targets), set(targets) - config._file_modules
        what = f"has no module {names_of(absent, 3)}" if absent else f"also targets {names_of(extra, 3)}"
        raise BasisMismatchError(
            f"The saved task adapts {len(config._file_modules)} modules, but this {type(model).__name__} {what}. Load the "
            f"base model that it was trained on ({config.base_model_name_or_path})."
        )
    config.fan_in_fan_out = any(is_conv1d(modules[name]) for name in targets)
    plan = Plan(config, basis, names)
    _check_coefficients(config, basis, names, known)
    _check_probe(model, modules, plan)
    if basis is not None and config.basis_modules is None and _carries_basis(config, basis):
        config.basis_modules = describe(plan, targets)
        if config.save_basis is None and not config.generated:
            size = sum(
                value.numel() * value.element_size() for n in targets for value in (plan.module(n).U, plan.module(n).V)
            )
            warnings.warn(
                f"This basis lives in memory only, so the task's own file will carry a copy of it ({size:,} bytes). Save it "
                "with `basis.save_pretrained(folder)` before `get_peft_model` for a task of kilobytes, or pass "
                "save_basis=True if this is meant.",
                stacklevel=2,
            )
    return plan


def generate(config: SubspaceConfig, targets: Mapping[str, nn.Module]) -> SubspaceBasis:
    """A basis of the config's generated kind for the given layers."""
    k = config.k or GENERATED_K
    made: dict[str, ModuleBasis] = {}
    for name, layer in targets.items():
        out, inner = sizes(layer)
        if config.basis == "random":
            module = random_module(name, out, inner, k, k, config.seed)
        else:
            module = base_weight_module(base_weight(layer), k)
        if config.coefficients == "directions":
            module = with_random_directions(name, module, k, config.seed)
        made[name] = module
    return SubspaceBasis(made, {"builder": config.basis, "base_model_name_or_path": config.base_model_name_or_path})


def base_weight(layer: nn.Module) -> torch.Tensor:
    """The layer's weight as (out, in) float32, dequantised where needed."""
    from peft.utils import resolve_quantization_backend

    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    backend = resolve_quantization_backend(base)
    weight = base.weight.detach() if backend is None else backend.get_base_weight(base).detach()
    return (weight.T if isinstance(base, Conv1D) else weight).float()


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


def describe(plan: Plan, targets: list[str]) -> dict[str, Any]:
    """Per target module the shapes and hashes of the tensors that the task's own file will carry."""
    described = {}
    for name in targets:
        module = plan.module(name)
        tensors = {"U": module.U, "V": module.V}
        if plan.config.mean_gain != "none" and module.M is not None:
            tensors["M"] = module.M
        if plan.config.coefficients == "directions" and module.G is not None:
            tensors["G"] = module.G
        shape = {"out": module.out_features, "in": module.in_features, "k_out": module.k_out, "k_in": module.k_in}
        shape["directions"] = 0 if module.G is None else module.G.shape[0]
        described[name] = {
            "shape": shape,
            "sha256": {key: tensor_sha256(value.float()) for key, value in tensors.items()},
        }
    return described


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
            f"{len(absent)} of {len(targets)} target modules are not in the basis, such as {names_of(absent, 3)}; it has "
            f"{names_of(basis if basis is not None else known, 3)}. Narrow target_modules (None takes the basis's own), or "
            "build a basis from sources that adapt these modules."
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
                f"start={config.start!r}: this basis does not keep its sources' cores. Build it with keep_cores=True, or "
                "start at 'zero' or 'mean'."
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


def _check_base_name(model: nn.Module, config: SubspaceConfig, basis: SubspaceBasis) -> None:
    """Two different Hub ids cannot be one model; folders may hold any copy, which only the probe can tell."""
    own = getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    other = basis.base_model or ""
    both_ids = all(text.count("/") == 1 and text[0] not in "./~" for text in (own, other) if text) and own and other
    if config.check_base_model and both_ids and own != other:
        raise BasisMismatchError(
            f"The basis was built for {other!r}, but the model is {own!r}. Load that one, build a basis for this one, or "
            "pass check_base_model=False if you know that they share their weights."
        )


def _check_probe(model: nn.Module, modules: Mapping[str, nn.Module], plan: Plan) -> None:
    """Record a few numbers ``UᵀW₀Vᵀ`` of the base weights in the config, or hold them against those recorded."""
    config = plan.config
    names = list(plan.names)
    if any(getattr(modules[name], "merged_adapters", None) for name in names):
        # merged weights are not the base's: neither to be recorded nor to be held against a record
        return
    if plan.basis is None or any(parameter.is_meta for name in names[:1] for parameter in modules[name].parameters()):
        return
    # evenly spread over the depth, and the same for the same targets
    chosen = sorted({names[i * (len(names) - 1) // max(PROBED_MODULES - 1, 1)] for i in range(PROBED_MODULES)})
    values = []
    for name in chosen:
        part = plan.module(name)
        weight = base_weight(modules[name]).cpu()
        values.append((part.U[:, :PROBED_SIDE].float().T @ weight @ part.V[:PROBED_SIDE].float().T).flatten())
    probe = torch.cat(values)
    if config.base_probe is None:
        config.base_probe = [float(f"{value:.4g}") for value in probe.tolist()]
        return
    recorded = torch.tensor(config.base_probe, dtype=torch.float32)
    same = recorded.shape == probe.shape and torch.cosine_similarity(recorded, probe, dim=0) > SAME_WEIGHTS
    if config.check_base_model and not same:
        raise BasisMismatchError(
            f"The base model's weights are not those that the task was trained on ({config.base_model_name_or_path}): this "
            f"{type(model).__name__} ({getattr(getattr(model, 'config', None), '_name_or_path', '')}) has other numbers in "
            f"{names_of(chosen, 2)}. Load that base model, or pass check_base_model=False in the config to try anyway."
        )


def _outer_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Named modules without what lies inside adapter layers."""
    inside: list[str] = []
    outer = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        outer.append((name, module))
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
    return outer
