"""Decide and check, before a model is touched, which modules are adapted in which basis: `make_plan`.

Four steps, none of which changes the configuration or the model: resolve the basis, match its modules with the
targets, check that everything fits, and decide whether the task's own file carries the basis.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from .._moved import moved_name
from ..basis import SubspaceBasis
from ..basis.module_store import names_of
from ..basis.pipeline_parts import parts_in
from ..errors import BasisMismatchError, SubspaceError
from .config import SubspaceConfig
from .coverage import Unadapted, check_coverage, in_words, unadapted
from .generated import made_basis
from .given_names import check_given_names
from .ignored_fields import warn_of_ignored_fields
from .injection_check import Layers, Shapes, check_fit, start_problem
from .load_tracker import LoadTracker
from .module_names import names_in_basis, other_names, rename_saved
from .part_choice import choose_part
from .plan import InjectionPlan, carried_entry
from .renaming import follow_model
from .targets import is_conv1d, is_never_called, kind_of, outer_modules, supported, weight_shape


def make_plan(
    model: nn.Module,
    config: SubspaceConfig,
    targets: Sequence[str],
    basis: SubspaceBasis | None = None,
    *,
    narrowed: bool = False,
) -> InjectionPlan:
    """Check that an adapter can be injected into the modules named `targets`, and say how.

    Args:
        model: the base model.
        config: the adapter's configuration, which stays as it is.
        targets: names of modules, in the model's order.
        basis: the configuration's, where it is resolved already.
        narrowed: whether a state dict says which modules are adapted, instead of the configuration.

    Raises:
        SubspaceError: a target of an unsupported kind; coefficients or a start that the basis cannot serve.
        BasisNotFoundError: see `SubspaceConfig.resolve`.
        BasisMismatchError: targets absent from the basis, clashing shapes, a wrong base model; lists them.
    """
    layers = _target_layers(model, targets, config.loaded)
    basis = _resolve(config, layers) if basis is None else basis
    basis = _unnamed(config, basis)
    part = None if basis is None else choose_part(config, model, basis)
    names, shapes = _match(model, config, basis, targets, part)
    checked = check_fit(model, config, layers, basis, names, shapes, narrowed)
    unstarted = start_problem(config, basis, next(iter(names.values())))
    if not config.loaded:
        if basis is not None:
            warn_of_ignored_fields(config, basis, names)
        if basis is not None and not config.generated and not narrowed:
            asked = None if config.fills_targets else config.target_modules
            check_coverage(model, config, basis, set(names.values()), asked)
    carried = _carry(config, basis, names)
    filled_in: dict[str, Any] = {
        "fan_in_fan_out": any(map(is_conv1d, layers.values())),
        "weight_shapes": {n: shape for n, layer in layers.items() if (shape := weight_shape(layer)) is not None}
        or None,
        # of a loaded task they say what its file has, and a stored basis that is asked for later is not in there
        "basis_modules": config.basis_modules if config.loaded and basis is not None and basis.location else carried,
    }
    if basis is not None:
        if other := other_names(basis, names):
            basis = basis.named(other)
        filled_in["basis_names"] = other
        filled_in["basis_fingerprint"] = basis.fingerprint
        if basis.revision is not None:
            filled_in["basis_revision"] = basis.revision
        # the records that a loaded task brings are of what it was trained on, and stay
        if not config.loaded or config.base_probe is None:
            of_others = config.basis_fingerprint not in (None, basis.fingerprint)
            probed = checked.probe
            filled_in["base_probe"] = None if of_others and probed is None else probed or config.base_probe
    if not config.loaded:
        filled_in["base_weights"] = None if checked.sample is None else checked.sample.record()
    # with PeftModel the file was checked already; loaders that bypass the config class leave it to the layers
    unchecked = config.loaded and (config.loaded_from is None or config.loaded_from.modules is None)
    tracker = LoadTracker(unstarted) if basis is None or unchecked or unstarted else None
    return InjectionPlan(config, basis, names, shapes, carried, tracker, filled_in, checked.first, not unstarted)


def fill_target_modules(config: SubspaceConfig, model: nn.Module) -> SubspaceBasis | None:
    """Name the basis's own modules in `config` where it names no targets, as PEFT does with a method's defaults.

    A generated basis has none, and leaves them to PEFT.

    Returns:
        The basis, where it had to be resolved.

    Raises:
        BasisNotFoundError: see `SubspaceConfig.resolve`.
        BasisMismatchError: see `modules_of_basis`.
        SubspaceError: see `modules_of_basis` and `check_given_names`.
    """
    if config.loaded:
        rename_saved(config, model)
        follow_model(config, model)
    else:
        if config.fills_targets:
            # filled in for another model, or for this one earlier
            config.target_modules = None
        check_given_names(model, config)
    config.filled_targets = None
    if config.target_modules is not None:
        return None
    basis = _unnamed(config, config.resolve())
    if basis is not None:
        config.target_modules = modules_of_basis(model, basis, config)
    elif config.basis_modules is not None and (config.loaded or not config.generated):
        config.target_modules = set(config.basis_modules)
    if not config.loaded:
        config.filled_targets = config.target_modules
    return basis


def modules_of_basis(model: nn.Module, basis: SubspaceBasis, config: SubspaceConfig) -> set[str]:
    """Return the model's supported modules that the basis knows, in the layers that `layers_to_transform` names.

    Raises:
        BasisMismatchError: none.
        SubspaceError: none in those layers.
    """
    part = choose_part(config, model, basis)
    candidates = [name for name, module in outer_modules(model) if supported(module)]
    found = {name for name, key in names_in_basis(model, basis, candidates, part).items() if key is not None}
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
        there = unadapted(model, config, basis, (), None).unsupported
        why = f": {in_words(Unadapted(unsupported=there))}" if there else ""
        raise BasisMismatchError(
            f"None of the basis's {len(basis)} modules ({names_of(basis, 3)}) {'can be adapted' if there else 'is'} in"
            f" {type(model).__name__}{why}. The basis was built for {basis.base_model or 'another base model'}: load"
            " that one, or build a basis for this."
        )
    return found


def _in_layers(config: SubspaceConfig, name: str) -> bool:
    # PEFT's own rule, which it applies to ends of names only, never to names given in full
    ending = LoraConfig(
        target_modules=[name.rsplit(".", 1)[-1]],
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    return bool(check_target_module_exists(ending, name))


def _target_layers(model: nn.Module, targets: Sequence[str], loaded: bool) -> dict[str, nn.Module]:
    """Return the layers of the targets. Raise `SubspaceError` where one, or the whole model, cannot be adapted."""
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise SubspaceError(
            f"This {type(model).__name__} is split by tensor parallelism (tp_plan, size {model._tp_size}), whose parts"
            " of a weight a shared basis does not fit. Load it without tp_plan; device_map, DDP and FSDP work."
        )
    modules = dict(outer_modules(model))
    for name in targets:
        # an earlier version's task may have one, which did nothing
        if is_never_called(modules[name]) and not loaded:
            raise SubspaceError(
                f"Target module {name!r} is the out_proj of a MultiheadAttention, which takes its weight and never"
                " calls it: an adapter there would have no effect. Leave it out with exclude_modules."
            )
        if kind_of(modules[name]) is None:
            raise SubspaceError(
                f"Target module {name!r} is a {type(modules[name]).__name__}; supported are nn.Linear and quantised"
                " kinds of it, transformers' Conv1D, nn.Conv2d without groups, and nn.Embedding. Narrow"
                " target_modules, or leave it out with exclude_modules."
            )
    return {name: modules[name] for name in targets}


# -- resolve ----------------------------------------------------------------------------------------------------------


def _resolve(config: SubspaceConfig, layers: Layers) -> SubspaceBasis | None:
    """Find, or generate, the basis; None where the task's own file will bring it."""
    if not config.generated or config.loaded:
        return config.resolve()
    return made_basis(config, layers)


def _unnamed(config: SubspaceConfig, basis: SubspaceBasis | None) -> SubspaceBasis | None:
    """Return a new adapter's basis without the names that were filled in for an earlier one, of another part."""
    return basis if basis is None or config.loaded or len(parts_in(basis)) < 2 else basis.named({})


# -- match ------------------------------------------------------------------------------------------------------------


def _match(
    model: nn.Module, config: SubspaceConfig, basis: SubspaceBasis | None, targets: Sequence[str], part: str | None
) -> tuple[dict[str, str], Shapes]:
    """Return target → module of the basis, and module of the basis → shape."""
    if basis is None:
        shapes: Shapes = {name: entry["shape"] for name, entry in (config.basis_modules or {}).items()}
        matches = {name: name if name in shapes else None for name in targets}
    else:
        shapes = basis.shapes()
        matches = names_in_basis(model, basis, targets, part)
    absent = [name for name, key in matches.items() if key is None]
    if absent:
        raise BasisMismatchError(
            f"{len(absent)} of {len(targets)} target modules are not in the basis, such as {names_of(absent, 3)}; it"
            f" has {names_of(shapes, 3)}. Narrow target_modules (None takes the basis's own), or build a basis from"
            " sources that adapt these modules."
        )
    uses = Counter(matches.values())
    twice = sorted(name for name, key in matches.items() if uses[key] > 1)
    if twice:
        raise BasisMismatchError(
            f"Target modules {names_of(twice, 3)} are one module of the basis ({matches[twice[0]]}), leading parts of"
            " their names aside. It was built for one of them: narrow target_modules, or leave the others out with"
            " exclude_modules."
        )
    return {name: str(key) for name, key in matches.items()}, shapes


# -- carry ------------------------------------------------------------------------------------------------------------


def _carry(config: SubspaceConfig, basis: SubspaceBasis | None, names: Mapping[str, str]) -> dict[str, Any] | None:
    """Return shapes and hashes of the basis that the task's own file carries, by module; None where it carries none.

    Warns where that was not asked for, and where a saved task could not be loaded again.
    """
    if basis is None or (config.loaded and config.basis_modules is not None):
        return config.basis_modules
    if config.save_basis is False and basis.location is None:
        warnings.warn(
            "save_basis=False, and the basis lives in memory only: a saved task could not be loaded again. Save the"
            " basis with `basis.save_pretrained(folder)` before `get_peft_model`, or leave save_basis out.",
            stacklevel=2,
        )
    again = config.basis_modules is not None and not config.generated
    if not again and not (basis.location is None if config.save_basis is None else config.save_basis):
        return None
    parts = {name: config.sizes.part(name, basis[key]) for name, key in names.items()}
    if config.save_basis is None and not config.generated and not again:
        size = sum(value.numel() * value.element_size() for part in parts.values() for value in (part.U, part.V))
        warnings.warn(
            f"This basis lives in memory only, so the task's own file will carry a copy of it ({size:,} bytes)."
            " Save it with `basis.save_pretrained(folder)` before `get_peft_model` for a task of kilobytes, or"
            " pass save_basis=True if this is meant.",
            stacklevel=2,
        )
    return {name: carried_entry(config, part) for name, part in parts.items()}


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
