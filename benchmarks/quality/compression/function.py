"""At which share of energy kept is a function lost? Over all adapters and schemes of a fleet that lose no bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .compared import FLOAT

LEVELS = (0.99, 0.95, 0.9, 2 / 3, 0.5)


def points(trained: Mapping[str, Any], cells: Iterable[Mapping[str, Any]], *, rounded: bool = False) -> list[dict]:
    """Return an entry per adapter, seed and scheme, in the words of `energy_and_function.bins`.

    Args:
        trained: see `compared.rows_of`.
        cells: of a fleet.
        rounded: those that are stored in fewer bits, and no others.
    """
    found = []
    for cell in cells:
        kinds = [value for key, value in cell["scheme"].items() if key in ("basis", "core", "kind")]
        if "refused" in cell or rounded != any(kind != FLOAT for kind in kinds):
            continue
        for name, (_, test, _, same, change, kept) in cell["members"].items():
            alone = trained[cell["adapters"]]["members"][name]
            found.append(
                {
                    "kept": kept,
                    "same_answers": same,
                    "change": change,
                    "accuracy": test or 0.0,
                    "accuracy_lora": alone["lora"][1],
                    "accuracy_without": alone["bare"][1],
                }
            )
    return found


def binned(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what points of like energy have in common, see `benchmarks/energy_and_function.py`."""
    from benchmarks.energy_and_function import bins

    return bins(found)


def needed(found: Sequence[Mapping[str, Any]], level: float) -> float | None:
    """Return the least share of energy from which on every bin has so much of the gain left; None where none has.

    Args:
        found: of `binned`.
        level: of what the LoRAs add to the base model under their heads.
    """
    least = None
    for each in reversed(found):
        if each["gain_left"] is None or each["gain_left"] < level:
            break
        least = each["from"]
    return least


def unchanged(found: Sequence[Mapping[str, Any]], same: float) -> float | None:
    """Return the least share of energy from which on every bin has so many equal answers."""
    least = None
    for each in reversed(found):
        if each["same_answers"] < same:
            break
        least = each["from"]
    return least


def between(found: Sequence[Mapping[str, Any]], low: float, high: float) -> dict[str, float] | None:
    """Return what points of an energy from `low` to below `high` have in common; None where there are none."""
    some = [each for each in found if low <= each["kept"] < high]
    if not some:
        return None
    gain = sum(each["accuracy_lora"] - each["accuracy_without"] for each in some)
    left = sum(each["accuracy"] - each["accuracy_without"] for each in some)
    same = sum(each["same_answers"] for each in some) / len(some)
    return {"points": len(some), "gain_left": left / gain if gain > 0 else float("nan"), "same_answers": same}
