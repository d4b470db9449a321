"""The rows of a comparison: how each model is adapted, and which learning rates its sweep tries."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
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
        """Return `model` with this method's adapter; without one, frozen but for parameters with `head` in their name.

        Raises:
            SubspaceError: the adapter does not fit the model, which is left as it was.
        """
        if self.adapter is not None:
            return get_peft_model(model, self.adapter())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(head is not None and bool(self.rates) and head in name)
        return model

    def for_seed(self, seed: int | None) -> PeftConfig | None:
        """Return the configuration of a run with `seed`: here the same for all of them."""
        return None if self.adapter is None else self.adapter()

    def identity(self, seed: int | None = None) -> dict[str, Any]:
        """Return all that decides this method's results beside rate and seed, as JSON holds it.

        That is the name and the configuration of the run's adapter, a basis as its fingerprint wherever it lies.
        """
        config = self.for_seed(seed)
        if config is None:
            return {"name": self.name, "adapter": None}
        values = {key: value for key, value in config.to_dict().items() if key not in _WHEREABOUTS}
        if isinstance(config, SubspaceConfig):
            basis = config.resolve()
            values["basis"] = config.basis if basis is None else basis.fingerprint
        # sets come in another order in every process
        plain = json.loads(
            json.dumps(values, default=lambda v: sorted(v) if isinstance(v, (set, frozenset)) else str(v))
        )
        return {"name": self.name, "adapter": plain}


def adapted(
    *,
    target_modules: Sequence[str] | str,
    layers: Sequence[int] | None = None,
    layers_pattern: str | None = None,
    task_type: str | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return what every PEFT configuration of a comparison is given: the adapted modules, and the trained head.

    Args:
        target_modules, layers, layers_pattern: as LoRA's `target_modules`, `layers_to_transform`, `layers_pattern`.
        task_type: as PEFT's: ``SEQ_CLS``, ``CAUSAL_LM``, …, or None.
        modules_to_save: the head's name where `task_type` does not tell PEFT.
    """
    where: dict[str, Any] = {
        "task_type": task_type,
        "target_modules": target_modules if isinstance(target_modules, str) else list(target_modules),
        "modules_to_save": list(modules_to_save) if modules_to_save else None,
    }
    if layers:
        where |= {"layers_to_transform": list(layers), "layers_pattern": layers_pattern}
    return where


def head_only(rates: tuple[float, ...] = HEAD_RATES) -> Method:
    """Return the row that trains nothing but the head."""
    return Method("head only", None, rates)


def lora(r: int, where: Mapping[str, Any], rates: tuple[float, ...] = LORA_RATES) -> Method:
    """Return the row of stock LoRA, its α twice its rank, on the modules that `where` names, see `adapted`."""
    return Method(f"LoRA r={r}", lambda: LoraConfig(r=r, lora_alpha=2 * r, **where), rates)


def vera(
    r: int, where: Mapping[str, Any], rates: tuple[float, ...] = VERA_RATES, *, name: str | None = None
) -> Method:
    """Return the row of VeRA (Kopiczko et al., arXiv 2310.11454), on the modules that `where` names."""

    def config() -> PeftConfig:
        with warnings.catch_warnings():
            # PEFT warns that the random projections are not saved. They are no part of a task, as a basis is not
            warnings.simplefilter("ignore")
            return VeraConfig(r=r, save_projection=False, **where)

    return Method(name or f"VeRA r={r}", config, rates)


def in_basis(
    name: str, basis: SubspaceBasis, where: Mapping[str, Any], rates: tuple[float, ...] = CORE_RATES, **config: Any
) -> Method:
    """Return a row whose coefficients are trained in `basis`; `config` goes to `SubspaceConfig`."""
    # a basis without a place of its own can only travel with the task
    given = {"save_basis": basis.location is None, **config, **where}
    return Method(name, lambda: SubspaceConfig(basis=basis, **given), rates)


def methods(
    *,
    basis: SubspaceBasis,
    random: SubspaceBasis | None,
    coefficients: str = "core",
    k: int | None = None,
    r: int = 8,
    alpha: float | None = None,
    mean_gain: str = "none",
    extra_rank: int = 0,
    head: bool = True,
    sweep: int = 0,
    **where: Any,
) -> list[Method]:
    """Return the compared methods: head only (or base model), mean only, LoRA, VeRA, a random basis, this basis.

    Args:
        basis: the basis under test. Where it has no mean core (one not built from adapters) the mean-only row is left
            out.
        random: the control of equal size; None leaves its row out.
        coefficients, k, alpha, mean_gain, extra_rank: of "this basis"; the random basis has the same kind, `k`,
            `alpha` and `extra_rank`. With ``coefficients="none"`` the mean-only row is all there is of the basis, and
            the last two rows are left out.
        r: LoRA's rank, and that of the `factor` coefficients.
        head: whether there is a trained head beside the adapter. Without one, as with every causal language model, the
            first row is the base model, untrained.
        sweep: keep at most so many rates of each, the middle ones; 0: all.
        where: the adapted modules, the same for all rows, see `adapted`.

    Returns:
        The rows in that order. Their configurations are made, and checked, when `adapter` is called.
    """
    modules = adapted(**where)
    given = {"k": k, "r": r, **({} if alpha is None else {"alpha": alpha})}
    has_head = head and modules["task_type"] != "CAUSAL_LM"
    rows = [head_only() if has_head else Method("base model", None, ())]
    if all(basis[name].M is not None for name in basis):
        mean = {"coefficients": "none", "mean_gain": "trainable"}
        rows.append(in_basis("mean only", basis, modules, MEAN_RATES, **given, **mean))
    rows += [lora(r, modules), vera(256, modules, name="VeRA")]
    if coefficients != "none":
        kind = {**given, "coefficients": coefficients, **({"extra_rank": extra_rank} if extra_rank else {})}
        if random is not None:
            rows.append(in_basis("random basis", random, modules, **kind))
        rows.append(in_basis("this basis", basis, modules, **kind, mean_gain=mean_gain))
    return [replace(row, rates=_middle(row.rates, sweep)) for row in rows] if sweep > 0 else rows


def candidates(
    *,
    basis: SubspaceBasis,
    own: Sequence[int],
    coefficients: str = "core",
    k: int | None = None,
    r: int = 8,
    alpha: float | None = None,
    mean_gain: str = "none",
    sweep: int = 0,
    **where: Any,
) -> list[Method]:
    """Return what `--stage choose` chooses among: this basis, it with directions of the task's own, LoRA.

    Args:
        basis, coefficients, k, r, alpha, mean_gain, sweep, where: as in `methods`, of all rows but LoRA's.
        own: how many directions per module; a row for each.

    Returns:
        The rows in that order. The first and the last are those of `methods`.
    """
    modules = adapted(**where)
    given = {"k": k, "r": r, "coefficients": coefficients, "mean_gain": mean_gain}
    given |= {} if alpha is None else {"alpha": alpha}
    rows = [in_basis("this basis", basis, modules, **given)]
    rows += [in_basis(own_name(count), basis, modules, **given, extra_rank=count) for count in own]
    rows.append(lora(r, modules))
    return [replace(row, rates=_middle(row.rates, sweep)) for row in rows] if sweep > 0 else rows


def own_name(count: int) -> str:
    """Return the name of the row of this basis with so many directions of the task's own."""
    return f"this basis + {count} own"


def _middle(rates: tuple[float, ...], count: int) -> tuple[float, ...]:
    start = max(0, len(rates) - count) // 2
    return rates[start : start + count]


def method_named(rows: Sequence[Method], name: str) -> Method:
    """Return the row called `name`.

    Raises:
        SubspaceError: there is none; names the rows there are.
    """
    for row in rows:
        if row.name == name:
            return row
    raise SubspaceError(f"There is no row {name!r}; there are {', '.join(row.name for row in rows)}.")
