"""Names of modules without the names of wrappers: the one place that knows what PEFT, torch and others put into them.

torch.compile, DDP, FSDP, activation checkpointing and Lightning's Fabric put a module of their own around a model or
its layers, and PEFT puts ``base_model.model.`` in front. A state dict that is taken through them has their names in
its keys, and no model that the file is loaded into has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .pipeline_parts import parts_in, split_part

PREFIX = "base_model.model."  # PEFT's, before the name of every module of the base model
# no model has submodules of these names of its own
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_fpw_module")
# DDP, DataParallel and DeepSpeed; Opacus. Models do have a submodule `module`: it is a wrapper's for certain before
# PEFT's prefix only, and likely so where everything begins with it
OUTERMOST = ("module.", "_module.")

# those that torch and fairscale leave out of state dicts, and put in as one is loaded
_HOOKED = re.compile(r"(?:(?<=\.)|^)(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module)(?:\.|$)")
_WRAPPER = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(WRAPPERS)})(?:\.|$)")
_PEFT = r"(?:(?:_?module\.)*base_model\.(?:_?module\.)*model\.)+"
_FRONT = re.compile(rf"^{_PEFT}")
# a PeftModel inside another model, whose own PEFT prefix is not in front
_INSIDE = re.compile(rf"(?<=\.){_PEFT}")
# the same in a regular expression, where dots may be escaped
_IN_PATTERN = re.compile(rf"(?<![A-Za-z0-9_])(?:{'|'.join(WRAPPERS)})\\?\.")
_PEFT_IN_PATTERN = re.compile(r"^(\^?)(?:.*\.)?(?:(?:_?module\\?\.)*base_model\\?\.model\\?\.)+")
_OUTER_IN_PATTERN = re.compile(r"^(\^?)(?:_?module\\?\.)+")


def unwrapped_name(name: str) -> str:
    """Return a module's name, or the key of one of its tensors, without the names of wrappers, but with PEFT's."""
    return _WRAPPER.sub("", name).removesuffix(".")


def stored_name(name: str) -> str:
    """Return a module's name as the keys of its model's state dict have it: FSDP and checkpointing hide their own."""
    return _HOOKED.sub("", name).removesuffix(".")


def unwrapped_in(value: Any) -> Any:
    """Return a list, a set or a dict with `unwrapped_name` of each name or key; anything else as it is."""
    if isinstance(value, Mapping):
        return {unwrapped_name(name): entry for name, entry in value.items()}
    return type(value)(map(unwrapped_name, value)) if isinstance(value, (list, set, tuple)) else value


def plain_name(name: str) -> str:
    """Return a module's name, or the key of one of its tensors, without what is for certain a wrapper's.

    ``_orig_mod.base_model.model.base_model.model.layers.0._orig_mod.q_proj`` is ``layers.0.q_proj``.
    """
    plain = unwrapped_name(name)
    short = _FRONT.sub("", plain)
    return short if short != plain else _INSIDE.sub("", plain, count=1)


def has_peft_prefix(name: str) -> bool:
    """Return whether PEFT's prefix is in front of a name or key, wrappers aside."""
    return _FRONT.match(unwrapped_name(name)) is not None


def plain_names(names: Iterable[str], *, outermost: bool = True) -> dict[str, str]:
    """Return each of the names or keys of one adapter with its plain one, see `plain_name`.

    Where all of them begin with ``module.``, as DDP has it, that is taken for a wrapper's too. What stands before
    PEFT's prefix is the model that holds a PeftModel, such as a LightningModule, and is left out where it is the same
    in all that have the prefix: the adapter is of the model behind it. A pipeline's parts stay.

    Args:
        names: All of one adapter.
        outermost: Whether ``module.`` may be a wrapper's.
    """
    names = list(names)
    if not names:
        return {}
    outer = _outer_model(names)
    found = {name: plain_name(unwrapped_name(name).removeprefix(outer)) for name in names}
    while outermost:
        outer = next((each for each in OUTERMOST if all(plain.startswith(each) for plain in found.values())), "")
        if not outer:
            break
        found = {name: plain_name(plain.removeprefix(outer)) for name, plain in found.items()}
    # each part of a pipeline may be wrapped by itself
    for part in parts_in(found.values()):
        own = {name: split_part(plain)[1] for name, plain in found.items() if split_part(plain)[0] == part}
        short = plain_names(own.values(), outermost=outermost)
        found |= {name: f"{part}.{short[rest]}" for name, rest in own.items()}
    return found


def _outer_model(names: Iterable[str]) -> str:
    """Return what stands before PEFT's prefix in all names that have it, "" where that differs or is a part's name."""
    plain = [unwrapped_name(name) for name in names]
    inside = [found for name in plain if not _FRONT.match(name) and (found := _INSIDE.search(name))]
    outer = {found.string[: found.start()] for found in inside}
    only = outer.pop() if len(outer) == 1 else ""
    bare = only.removeprefix("_").removeprefix("module.")
    return "" if split_part(f"{bare}x")[0] else only


def clashes(plain: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the pairs of different names that are one plain name, of what `plain_names` returns."""
    first: dict[str, str] = {}
    return [(known, name) for name, short in plain.items() if (known := first.setdefault(short, name)) != name]


def plain_patterns(pattern: str) -> list[str]:
    """Return a regular expression for modules' names as it is, and for plain names, where these differ."""
    short = _PEFT_IN_PATTERN.sub(r"\1", _IN_PATTERN.sub("", pattern))
    return list(dict.fromkeys([pattern, short, _OUTER_IN_PATTERN.sub(r"\1", short)]))
