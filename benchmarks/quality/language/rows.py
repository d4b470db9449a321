"""The rows of the comparison, by name. A basis is built only when a cell in it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import common as shared
from common import Method
from peft import PeftConfig

from subspace_peft import SubspaceBasis

from .fleet import Fleet
from .setting import CORE_RATES, LORA_RATES, MEAN_RATES, VERA_RATES, WIDE, K

TABLE = ("zero-shot", "LoRA r=8", "fleet", "random", "LoRA r=1", "fleet + 1 own")
MORE = (
    *("mean only", "fleet k=32", "VeRA r=256", "base weights", "random + 1 own"),
    *("fleet + 2 own", "LoRA r=2", "LoRA r=4"),
)
# rows without a sweep of their own, and the row whose rate they take
RATE_OF = {
    "fleet + 1 own": "fleet",
    "fleet + 2 own": "fleet",
    "random + 1 own": "random",
    "LoRA r=2": "LoRA r=1",
    "LoRA r=4": "LoRA r=8",
}
MEAN = {"coefficients": "none", "mean_gain": "trainable"}


@dataclass(frozen=True)
class Row(Method):
    """A row that says what decides it without making it: a basis would need the fleet.

    Attributes:
        made: what decides its basis beside the configuration; empty where it has none.
    """

    made: Mapping[str, Any] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """Return what decides the row, beside rate and seed, on any machine."""
        return {"name": self.name, **(self.made or self.identity())}


def row(name: str, fleet: Fleet, held_out: str, seed: int) -> Row:
    """Return the row called `name` for a held-out task. `seed` is the draw of a random basis.

    Raises:
        KeyError: there is no such row.
    """
    where = shared.adapted(target_modules=fleet.modules, task_type="CAUSAL_LM")
    if name == "zero-shot":
        return Row(name, None, ())
    if name.startswith("LoRA r="):
        return _plain(shared.lora(int(name.removeprefix("LoRA r=")), where, LORA_RATES))
    if name.startswith("VeRA r="):
        return _plain(shared.vera(int(name.removeprefix("VeRA r=")), where, VERA_RATES))
    of_fleet = {"builder": "build_basis", **fleet.facts(held_out)}
    wide = {"basis": lambda: fleet.basis(held_out, WIDE), "made": {**of_fleet, "k": WIDE}}
    core = {"basis": lambda: fleet.basis(held_out, K), "made": {**of_fleet, "k": K}}
    drawn = {"basis": lambda: fleet.control("random", K, seed), "made": {"builder": "random", "k": K, "draw": seed}}
    base = {"basis": lambda: fleet.control("base-weights", K), "made": {"builder": "base-weights", "k": K}}
    listed: dict[str, dict[str, Any]] = {
        "fleet": core,
        "fleet + 1 own": {**core, "config": {"extra_rank": 1}},
        "fleet + 2 own": {**core, "config": {"extra_rank": 2}},
        "fleet k=32": wide,
        "mean only": {**core, "config": MEAN, "rates": MEAN_RATES},
        "random": drawn,
        "random + 1 own": {**drawn, "config": {"extra_rank": 1}},
        "base weights": base,
    }
    return _inside(name, where, **listed[name])


def _plain(method: Method) -> Row:
    return Row(method.name, method.adapter, method.rates)


def _inside(
    name: str,
    where: Mapping[str, Any],
    *,
    basis: Callable[[], SubspaceBasis],
    made: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    rates: tuple[float, ...] = CORE_RATES,
) -> Row:
    given = dict(config or {})

    def adapter() -> PeftConfig:
        inner = shared.in_basis(name, basis(), where, rates, **given).adapter
        assert inner is not None
        return inner()

    return Row(name, adapter, rates, made={"basis": dict(made), "config": given, "where": dict(where)})
