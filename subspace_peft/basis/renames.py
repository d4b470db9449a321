"""Names that transformers has given to modules since adapters were saved, read by its own conversion tables.

A table is a list of transforms of the names of weights, in the order in which they are applied. A model has one of its
own (`transformers.conversion_mapping.get_model_conversion_mapping`). Without a model, all of them are asked.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

WEIGHT = ".weight"


def table_of(model: Any) -> list[Any]:
    """Return the transforms by which transformers reads earlier checkpoints of `model`; empty where it has none."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    return get_model_conversion_mapping(model, add_legacy=False) if isinstance(model, PreTrainedModel) else []


def converted(names: Iterable[str], table: Sequence[Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Return what modules are called after a table's transforms.

    Args:
        names: names of modules.
        table: of `table_of`.

    Returns:
        The modules that were only renamed, earlier → new name; and those whose weight became part of another tensor,
        such as of the fused weights of experts, earlier name → that tensor's name.
    """
    renamings = [each for each in table if not hasattr(each, "operations")]
    converters = [each for each in table if hasattr(each, "operations")]
    renamed: dict[str, str] = {}
    fused: dict[str, str] = {}
    # some transforms ask to see the names in order
    for name in sorted(names, key=_natural):
        key = name + WEIGHT
        for each in renamings:
            key, _ = each.rename_source_key(key)
        for each in converters:
            made, pattern = each.rename_source_key(key)
            if pattern is not None:
                fused[name] = made.removesuffix(WEIGHT)
                break
        else:
            if key != name + WEIGHT and key.endswith(WEIGHT):
                renamed[name] = key.removesuffix(WEIGHT)
    return renamed, fused


def same_by_any_table(module_name: str, names: Iterable[str]) -> list[str]:
    """Return those of `names` that some model of transformers renames to `module_name`, or gets by renaming it."""
    form, known = _form(module_name), list(names)
    # names that differ in numbers alone are renamed alike, so that one of each form tells which tables matter
    one_of_each = list({_form(name): name for name in known}.values())
    found: set[str] = set()
    for table in _tables():
        renamed, _ = converted(one_of_each, table)
        if form in map(_form, renamed.values()):
            found |= {old for old, new in converted(known, table)[0].items() if new == module_name}
        new = converted([module_name], table)[0].get(module_name)
        if new in known:
            found.add(new)
    return sorted(found)


def _form(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@functools.lru_cache(maxsize=1)
def _tables() -> list[list[Any]]:
    """Return every table of transformers that renames something."""
    try:
        from transformers import conversion_mapping as mapping

        # fills the mapping's own cache, of which there is no public list
        mapping.get_checkpoint_conversion_mapping("llava")
        known = mapping._checkpoint_conversion_mapping_cache
    except (ImportError, AttributeError):
        return []
    # transforms note that they were used, and these are transformers' own
    distinct = {repr(table): copy.deepcopy(table) for table in (known or {}).values()}
    return [table for table in distinct.values() if any(not hasattr(each, "operations") for each in table)]
