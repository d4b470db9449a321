"""Say which of a basis's modules a model does not have, or has in a kind that cannot be adapted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from torch import nn

from .._adapted import unwrapped
from .._io.warn import warn_caller
from ..basis import SubspaceBasis
from ..basis.module_names import plain_name
from ..basis.module_store import names_of, same_module
from ..basis.pipeline_parts import parts_in, split_part
from ..basis.renames import converted, table_of
from ..errors import BasisMismatchError
from .config import SubspaceConfig
from .targets import base_of, is_never_called, outer_modules, supported


@dataclass
class Unadapted:
    """The basis's modules that an adapter leaves out though the configuration asks for them.

    Attributes:
        absent: those that are not in the model.
        unsupported: those that are there, but of a kind that cannot be adapted: name → what it is.
    """

    absent: list[str] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.absent or self.unsupported)


def check_coverage(
    model: nn.Module, config: SubspaceConfig, basis: SubspaceBasis, used: Collection[str], asked: object
) -> None:
    """Warn, or raise with `strict`, where the model does not have all of the basis's modules that are asked for.

    Args:
        model: the base model.
        config: the adapter's configuration.
        basis: its basis.
        used: the basis's modules that are adapted.
        asked: `target_modules` as the user gave them; None: all of the basis's.

    Raises:
        BasisMismatchError: some are left out, and the configuration is strict.
    """
    found = unadapted(model, config, basis, used, asked)
    if not found:
        return
    wanted = len(used) + len(found.absent) + len(found.unsupported)
    text = (
        f"{len(used)} of the basis's {wanted} modules are adapted in this {type(model).__name__}:"
        f" {in_words(found)}. The basis was built for {basis.base_model or 'another model'}: load that one, or say"
        " what is meant with target_modules or exclude_modules."
    )
    if config.strict:
        raise BasisMismatchError(f"strict=True: only {text}")
    warn_caller(f"Only {text} strict=True makes this an error.")


def unadapted(
    model: nn.Module, config: SubspaceConfig, basis: SubspaceBasis, used: Collection[str], asked: object
) -> Unadapted:
    """Return the basis's modules that are left out though they are asked for. Arguments as in `check_coverage`."""
    left = _of_these_parts([name for name in basis if name not in used], used)
    found = Unadapted()
    if not left:
        return found
    modules = {plain_name(name): module for name, module in outer_modules(model)}
    parameters = {plain_name(name) for name, _ in model.named_parameters()}
    renamed, fused = converted(left, table_of(unwrapped(model)))
    for name in left:
        now = renamed.get(name, fused.get(name, name))
        if not _is_asked_for(config, asked, {name, now}):
            continue
        hits = same_module(now, modules)
        if name in fused and (same_module(now, parameters) or hits):
            found.unsupported[name] = f"part of the fused weights {now.rsplit('.', 1)[-1]}"
        elif same_module(now, parameters):
            found.unsupported[name] = "a parameter that is no layer's weight"
        elif not hits:
            found.absent.append(name)
        elif not any(supported(modules[hit]) for hit in hits):
            found.unsupported[name] = kind_in_words(base_of(modules[hits[0]]))
        # what is there and could be adapted was left out on purpose
    return found


def kind_in_words(layer: nn.Module) -> str:
    """Return what a layer that cannot be adapted is."""
    if is_never_called(layer):
        return "the out_proj of a MultiheadAttention"
    groups = getattr(layer, "groups", 1)
    return type(layer).__name__ + (f" of {groups} groups" if groups != 1 else "")


def _of_these_parts(left: Iterable[str], used: Collection[str]) -> list[str]:
    """Leave out modules of a pipeline's other parts: a basis may have a UNet's and a text encoder's side by side."""
    parts = set(parts_in(used))
    return [name for name in left if not parts or split_part(name)[0] in {"", *parts}]


def _is_asked_for(config: SubspaceConfig, asked: object, names: Iterable[str]) -> bool:
    """Tell whether the configuration, as the user gave it, takes a module of one of these names."""
    taken = False
    for name in names:
        # PEFT's own rule; it looks at layers only where targets are given by the ends of their names
        targets = asked if isinstance(asked, str) and asked != "all-linear" else _ends(asked, name)
        rule = LoraConfig(
            target_modules=targets,
            exclude_modules=config.exclude_modules,
            layers_to_transform=None if isinstance(targets, str) else config.layers_to_transform,
            layers_pattern=None if isinstance(targets, str) else config.layers_pattern,
        )
        # a module that is trained whole is not adapted as well
        rule.modules_to_save = config.modules_to_save
        result = check_target_module_exists(rule, name)
        if isinstance(result, _ExcludedModule):
            return False
        taken = taken or bool(result)
    return taken


def _ends(asked: object, name: str) -> list[str]:
    last = name.rsplit(".", 1)[-1]
    if asked is None or isinstance(asked, str):
        return [last]
    if isinstance(asked, Mapping) or not isinstance(asked, Iterable):
        return []
    return [last] if any(name == each or name.endswith(f".{each}") for each in asked) else []


def in_words(found: Unadapted) -> str:
    """Return what an `Unadapted` has, with counts and names."""
    said = []
    if found.absent:
        said.append(f"{_are(len(found.absent))} not in the model ({names_of(found.absent, 4)})")
    if found.unsupported:
        kinds: dict[str, list[str]] = {}
        for name, kind in found.unsupported.items():
            kinds.setdefault(kind, []).append(name)
        named = "; ".join(f"{kind}: {names_of(names, 3)}" for kind, names in sorted(kinds.items()))
        said.append(f"{_are(len(found.unsupported))} there, but of a kind that cannot be adapted ({named})")
    return "; ".join(said)


def _are(count: int) -> str:
    return f"{count} {'is' if count == 1 else 'are'}"
