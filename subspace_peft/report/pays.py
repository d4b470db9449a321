"""From how many adapters on a basis and tasks in it are smaller than LoRAs. Importing this module needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FLOAT32 = 4
WIDTHS = {"float64": 8, "float32": 4}  # bytes of a LoRA's numbers; of all other dtypes two
BASIS_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def break_even(basis: float, per_lora: float, per_task: float) -> int | None:
    """Return from how many adapters on a basis and a task for each take fewer bytes than the LoRAs; None: never.

    Args:
        basis: bytes of the basis, without the cores of its sources.
        per_lora: mean bytes of a LoRA.
        per_task: bytes of a task.
    """
    saved = per_lora - per_task
    # N adapters as LoRAs take N·per_lora bytes, in the basis its own and N·per_task
    return None if saved <= 0 else math.ceil(basis / saved)


def break_even_on_record(info: Mapping[str, Any], sizes: Mapping[str, Any]) -> tuple[int | None, bool]:
    """Return the same as far as a basis's config tells, and whether it does.

    It does where every source adapts all modules with one rank in one dtype.

    Args:
        info: see `SubspaceBasis`.
        sizes: of the modules, as `SubspaceBasis.shapes` returns them.
    """
    sources, precision, shapes = info.get("sources"), info.get("precision"), list(sizes.values())
    try:
        kind = precision["stored"] if isinstance(precision, Mapping) else "float32"
        width, scale = BASIS_WIDTHS[kind], FLOAT32 if kind == "int8" else 0
        rank_sum, per_lora = 0, 0.0
        for source in sources:  # type: ignore[union-attr]
            (rank,), (dtype,) = source["ranks"], source["dtypes"]
            if source["modules"] != len(shapes):
                return None, False
            rank_sum += rank
            per_lora += WIDTHS.get(dtype, 2) * rank * sum(each["out"] + each["in"] for each in shapes)
        basis = task = 0
        for each in shapes:
            out, inner, a, b = each["out"], each["in"], each["k_out"], each["k_in"]
            task += FLOAT32 * a * b
            basis += width * (out * a + inner * b) + scale * (a + b)
            spans = min(rank_sum, out) + min(rank_sum, inner)
            basis += FLOAT32 * ((2 + (each.get("directions") or 0)) * a * b + spans)
        return break_even(basis, per_lora / len(sources), task), True  # type: ignore[arg-type]
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None, False  # an earlier version's record, or another program's
