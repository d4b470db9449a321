"""The rows of a comparison: how each model is adapted, and which learning rates its sweep tries."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from torch import nn

from subspace_peft.basis import SubspaceBasis
from subspace_peft.errors import SubspaceError
from subspace_peft.tuner import SubspaceConfig

HEAD_RATES = (1e-3, 5e-3, 2e-2)
MEAN_RATES = (3e-2, 1e-1, 3e-1)
LORA_RATES = (1e-3, 2.5e-3, 6e-3, 1.5e-2)
VERA_RATES = (2e-2, 8e-2, 3.2e-1)
CORE_RATES = (3e-4, 1e-3, 4e-3, 1.2e-2)

# of a configuration, these say where things lie or who wrote them, not what is trained
_WHEREABOUTS = (
    "basis",
    "basis_revision",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "subspace_version",
    "card",
)


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        name: as the table prints it.
        adapter: makes the PEFT configuration, a new one at every call, since PEFT fills it in when it is used; None
            where nothing but the head is trained.
        rates: learning rates of its sweep, ascending; empty where nothing is trained at all.

    Raises:
        SubspaceError: rates that are not ascending, finite and above 0; an adapter without rates.
    """

    name: str
    adapter: Callable[[], PeftConfig] | None
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", tuple(float(rate) for rate in self.rates))
        fine = all(math.isfinite(rate) and rate > 0 for rate in self.rates)
        if not fine or any(low >= high for low, high in zip(self.rates, self.rates[1:], strict=False)):
            raise SubspaceError(f"Method {self.name!r}: rates={self.rates}: give ascending numbers above 0.")
        if self.adapter is not None and not self.rates:
            raise SubspaceError(f"Method {self.name!r} trains an adapter, so it needs at least one learning rate.")

    def apply(self, model: nn.Module, head: str | None) -> nn.Module:
        """`model` with this method's adapter; without one, frozen but for the parameters whose name contains `head`.

        Raises `SubspaceError` where the adapter does not fit the model, before the model is touched.
        """
        if self.adapter is not None:
            return get_peft_model(model, self.adapter())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(head is not None and bool(self.rates) and head in name)
        return model

    def identity(self) -> dict[str, Any]:
        """What decides this method's results beside rate and seed, as JSON holds it: the name and the adapter's
        configuration, a basis as its fingerprint wherever it lies.
        """
        if self.adapter is None:
            return {"name": self.name, "adapter": None}
        config = self.adapter()
        values = {key: value for key, value in config.to_dict().items() if key not in _WHEREABOUTS}
        if isinstance(config, SubspaceConfig):
            basis = config.resolve()
            values["basis"] = config.basis if basis is None else basis.fingerprint
        # sets come in another order in every process
        plain = json.loads(
            json.dumps(values, default=lambda v: sorted(v) if isinstance(v, (set, frozenset)) else str(v))
        )
        return {"name": self.name, "adapter": plain}


def methods(
    *,
    task_type: str | None,
    target_modules: Sequence[str] | str,
    layers: Sequence[int] | None = None,
    layers_pattern: str | None = None,
    basis: SubspaceBasis,
    random: SubspaceBasis | None,
    coefficients: str = "core",
    k: int | None = None,
    r: int = 8,
    alpha: float | None = None,
    mean_gain: str = "none",
    head: bool = True,
    modules_to_save: Sequence[str] | None = None,
    sweep: int = 0,
) -> list[Method]:
    """The compared methods, all on the same modules: head only (or the base model), mean only, LoRA, VeRA, a random
    basis, this basis.

    Args:
        task_type: as PEFT's: ``SEQ_CLS``, ``CAUSAL_LM``, …, or None.
        target_modules, layers, layers_pattern: the adapted modules, as LoRA's `target_modules`, `layers_to_transform`
            and `layers_pattern`.
        basis: the basis under test. Where it has no mean core (one not built from adapters) the mean-only row is left
            out.
        random: the control of equal size; None leaves its row out.
        coefficients, k, alpha, mean_gain: of "this basis"; the random basis has the same kind, `k` and `alpha`. With
            ``coefficients="none"`` the mean-only row is all there is of the basis, and the last two rows are left out.
        r: LoRA's rank, and that of the `factor` coefficients.
        head: whether there is a trained head beside the adapter. Without one, as with every causal language model, the
            first row is the base model, untrained.
        modules_to_save: the head's name where `task_type` does not tell PEFT.
        sweep: keep at most so many rates of each, the middle ones; 0: all.

    Returns:
        The rows in that order. Their configurations are made, and checked, when `adapter` is called.
    """
    where: dict[str, Any] = {
        "task_type": task_type,
        "target_modules": target_modules if isinstance(target_modules, str) else list(target_modules),
        "modules_to_save": list(modules_to_save) if modules_to_save else None,
    }
    if layers:
        where |= {"layers_to_transform": list(layers), "layers_pattern": layers_pattern}

    def lora() -> PeftConfig:
        return LoraConfig(r=r, lora_alpha=2 * r, **where)

    def vera() -> PeftConfig:
        with warnings.catch_warnings():
            # PEFT warns that the random projections are not saved. They are no part of a task, as a basis is not
            warnings.simplefilter("ignore")
            return VeraConfig(r=256, save_projection=False, **where)

    def inside(which: SubspaceBasis, **config: Any) -> Callable[[], PeftConfig]:
        given = {"k": k, "r": r, **({} if alpha is None else {"alpha": alpha}), **config}
        # a basis without a place of its own can only travel with the task
        return lambda: SubspaceConfig(basis=which, save_basis=which.location is None, **given, **where)

    has_head = head and task_type != "CAUSAL_LM"
    rows = [Method("head only", None, HEAD_RATES) if has_head else Method("base model", None, ())]
    if all(basis[name].M is not None for name in basis):
        rows.append(Method("mean only", inside(basis, coefficients="none", mean_gain="trainable"), MEAN_RATES))
    rows += [
        Method(f"LoRA r={r}", lora, LORA_RATES),
        Method("VeRA", vera, VERA_RATES),
    ]
    if coefficients != "none":
        if random is not None:
            rows.append(Method("random basis", inside(random, coefficients=coefficients), CORE_RATES))
        rows.append(Method("this basis", inside(basis, coefficients=coefficients, mean_gain=mean_gain), CORE_RATES))
    return [replace(row, rates=_middle(row.rates, sweep)) for row in rows] if sweep > 0 else rows


def _middle(rates: tuple[float, ...], count: int) -> tuple[float, ...]:
    start = max(0, len(rates) - count) // 2
    return rates[start : start + count]


def method_named(rows: Sequence[Method], name: str) -> Method:
    """The row called `name`. Raises `SubspaceError` naming the rows there are."""
    for row in rows:
        if row.name == name:
            return row
    raise SubspaceError(f"There is no row {name!r}; there are {', '.join(row.name for row in rows)}.")
