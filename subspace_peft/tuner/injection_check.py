"""What `make_plan` checks before a model is touched: that basis, task and model belong together."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from ..basis import SubspaceBasis
from ..basis.module_store import names_of
from ..errors import BasisMismatchError, SubspaceError
from .base_check import CheckedBase, check_base
from .config import SubspaceConfig
from .start import check_start
from .targets import kind_of, outer_modules, sizes, weight_shape

Layers = Mapping[str, nn.Module]
Shapes = Mapping[str, Mapping[str, int]]


def check_fit(
    model: nn.Module,
    config: SubspaceConfig,
    layers: Layers,
    basis: SubspaceBasis | None,
    names: Mapping[str, str],
    shapes: Shapes,
    narrowed: bool,
) -> CheckedBase:
    """Raise where basis, task and model do not belong together; return what is kept of the base weights."""
    _check_shapes(layers, basis, names, shapes)
    _check_file(model, config, layers, basis, narrowed)
    _check_embeddings(config, layers)
    _check_coefficients(config, basis, names, shapes)
    return check_base(model, config, layers, basis, names)


def _check_shapes(layers: Layers, basis: SubspaceBasis | None, names: Mapping[str, str], shapes: Shapes) -> None:
    clashes = [
        f"{name}: the basis has (out={shapes[key]['out']}, in={shapes[key]['in']}), the model {sizes(layers[name])}"
        for name, key in names.items()
        if (shapes[key]["out"], shapes[key]["in"]) != sizes(layers[name])
    ]
    if clashes:
        raise BasisMismatchError(
            f"{len(clashes)} modules have other shapes than the basis: {'; '.join(clashes[:3])}. The basis was built"
            f" for {(basis.base_model if basis else None) or 'another base model'}: load that one."
        )


def _check_file(
    model: nn.Module, config: SubspaceConfig, layers: Layers, basis: SubspaceBasis | None, narrowed: bool
) -> None:
    """Hold the targets against the modules that the task's file has coefficients for."""
    if not config.loaded or narrowed:
        return
    if config.loaded_from is None or config.loaded_from.modules is None:
        _check_listed(model, config, basis)
        return
    saved, targets = set(config.loaded_from.modules), set(layers)
    if saved == targets:
        return
    absent, extra = saved - targets, targets - saved
    what = f"has no module {names_of(absent, 3)}" if absent else f"also targets {names_of(extra, 3)}"
    raise BasisMismatchError(
        f"The saved task adapts {len(saved)} modules, but this {type(model).__name__} {what}. Load the base model that"
        f" it was trained on ({config.base_model_name_or_path})."
    )


def _check_listed(model: nn.Module, config: SubspaceConfig, basis: SubspaceBasis | None) -> None:
    """Hold the model against a saved task's list of modules, where a loader has not let its file be checked."""
    known: Collection[str] = basis if basis is not None else config.basis_modules or {}
    if config.target_modules is None or isinstance(config.target_modules, str):
        return
    there = {name for name, _ in outer_modules(model)}
    ends = tuple(there)
    absent = [
        name
        for name in config.target_modules
        # an entry that is no module of the basis had no effect when the task was trained
        if name not in there and name in known and not any(each.endswith(f".{name}") for each in ends)
    ]
    if absent:
        raise BasisMismatchError(
            f"The saved task adapts {len(config.target_modules)} modules, but this {type(model).__name__} has no"
            f" module {names_of(absent, 3)}. Load the base model that it was trained on"
            f" ({config.base_model_name_or_path})."
        )


def _check_embeddings(config: SubspaceConfig, layers: Layers) -> None:
    """Hold what a saved task says of embeddings, by which own directions there are scaled, against the model's."""
    if not config.loaded:
        return  # it is filled in
    there = {name for name, layer in layers.items() if kind_of(layer) == "embedding"}
    said = config.sizes.embeddings
    for name in sorted(name for name in (there ^ said) & set(layers) if config.sizes.extra_asked(name)):
        wrong, right = f"calls {name!r} an embedding, which it is not", f"leave {name!r} out"
        if name in there:
            wrong, right = f"lacks the embedding {name!r}", f"add {name!r}: {weight_shape(layers[name])}"
        raise BasisMismatchError(
            f"weight_shapes of the saved task's config {wrong}: an embedding's own directions are in units of their"
            f" own. Fetch or save the task again; or {right}, where its own directions are in these units."
        )


def _check_coefficients(
    config: SubspaceConfig, basis: SubspaceBasis | None, names: Mapping[str, str], shapes: Shapes
) -> None:
    first = next(iter(names.values()))
    if config.coefficients == "directions" and not shapes[first].get("directions"):
        raise SubspaceError(
            f"coefficients='directions' needs a basis with direction tensors, and module {first!r} has none. Build"
            " it with `build_basis(..., directions=m)` (`subspace-peft build --directions m`), or choose other"
            " coefficients."
        )
    if basis is None:
        return
    if config.mean_gain != "none" and basis[first].M is None:
        raise SubspaceError(
            f"mean_gain={config.mean_gain!r}: the basis has no mean core (builder {basis.info.get('builder')!r}). Use"
            " a basis built from adapters, or mean_gain='none'."
        )


def start_problem(config: SubspaceConfig, basis: SubspaceBasis | None, first: str) -> str | None:
    """Return why a task of a saved configuration cannot start where that says: only a new one has to.

    Raises:
        SubspaceError: see `check_start`; the configuration is not a saved one.
    """
    try:
        check_start(config, basis, first)
    except SubspaceError as error:
        if not config.loaded:
            raise
        return str(error)
    return None
