"""Say once where an optimiser's learning rate for coefficients lies outside the range in which they learn.

Coefficients want a rate that the Trainer's default, 5e-5, is far below. So that it is noticed under any trainer and
in plain loops, with nothing for the user to add, one hook looks at each optimiser before its first step. It holds
models and optimisers weakly, and costs one look-up per step afterwards.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .._io.warn import warn_caller
from .coefficients import Coefficients

USUAL_ALPHA = 256.0


@dataclass(frozen=True)
class Rates:
    """Learning rates of AdamW that were measured, docs/evidence.md, "Rates".

    Attributes:
        least: the lowest at which it is said to learn.
        most: the highest at which it is stable.
        start: the one to start from.
        scaled: whether they are those at alpha=256, and go down as alpha goes up.
    """

    least: float
    most: float
    start: float
    scaled: bool

    def at(self, alpha: float) -> Rates:
        """Return these rates at another `alpha`: a step of rate η moves ΔW by at most alpha·η."""
        factor = USUAL_ALPHA / alpha if self.scaled else 1.0
        return Rates(self.least * factor, self.most * factor, self.start * factor, self.scaled)


# of 12 text and 5 image tasks: the best rates of sweeps were 3e-4 … 1.92e-2, and 1.2e-3 and 4.8e-3 good for all
OF_CORES = Rates(1e-4, 2e-2, 3e-3, scaled=True)
# of the fleet's mean alone, whose gain multiplies a matrix that alpha does not scale: best rates were 0.025 … 1.6
OF_GAINS = Rates(2.5e-2, 1.6, 0.4, scaled=False)

_watched: weakref.WeakKeyDictionary[Coefficients, float] = weakref.WeakKeyDictionary()
_judged: weakref.WeakKeyDictionary[torch.optim.Optimizer, Any] = weakref.WeakKeyDictionary()
_said: set[str] = set()
_lock = threading.Lock()
_hook: Any = None


def watch(coefficients: Coefficients, scale: float) -> None:
    """Have the rate looked at with which an optimiser trains `coefficients`, should one do so.

    Args:
        coefficients: of one task in one module; held weakly.
        scale: its configured s.
    """
    global _hook
    with _lock:
        _watched[coefficients] = scale * math.sqrt(coefficients.steps)
        if _hook is None:
            _hook = register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    known, now = _judged.get(optimizer), (len(_watched), len(optimizer.param_groups))
    if known == now:
        return
    with _lock:
        _judged[optimizer] = _judge(optimizer, known) or now


def _judge(optimizer: torch.optim.Optimizer, before: Any) -> Mapping[int, float] | None:
    """Warn of rates outside the range.

    Args:
        optimizer: what is about to take a step.
        before: what this returned before the step before.

    Returns:
        The rates, by place of their groups, of low ones that are yet to be judged, since they may be rising; else
        None.
    """
    if not _like_adam(optimizer):
        return None
    rising = {}
    owners = {id(p): (module, name) for module in list(_watched) for name, p in module.named_parameters()}
    for place, group in enumerate(optimizer.param_groups):
        rate, planned = _rate_of(group)
        held = [found for p in group["params"] if p.requires_grad for found in _owners(p, owners)]
        if rate is None or not held:
            continue
        for rates, alpha in {_rates_of(module, name) for module, name in held if _counts(module, name)}:
            if rate > rates.most:
                _say(rate, rates, alpha, optimizer)
            elif rate < rates.least:
                last = before.get(place) if isinstance(before, Mapping) else None
                # a loop that raises its rate by hand says so nowhere: it is judged once it no longer does
                if not planned and (last is None or rate > last):
                    rising[place] = rate
                else:
                    _say(rate, rates, alpha, optimizer)
    return rising or None


def _owners(parameter: Any, owners: Mapping[int, tuple[Coefficients, str]]) -> Iterator[tuple[Coefficients, str]]:
    """Yield the coefficients that a trained tensor is of, with its name there; FSDP makes one of several."""
    if id(parameter) in owners:
        yield owners[id(parameter)]
    for info in getattr(parameter, "_param_infos", None) or ():
        if isinstance(module := getattr(info, "module", None), Coefficients) and module in _watched:
            yield module, info.param_name


def _counts(module: Coefficients, name: str) -> bool:
    """Return whether the rate of this tensor decides: a gain's does where nothing else is trained."""
    return name != "gain" or _only_gain(module)


def _only_gain(module: nn.Module) -> bool:
    return set(module._parameters) <= {"gain"}


def _rates_of(module: Coefficients, name: str) -> tuple[Rates, float]:
    alpha = _watched[module]
    return (OF_GAINS if name == "gain" else OF_CORES).at(alpha), alpha


def _rate_of(group: Mapping[str, Any]) -> tuple[float | None, bool]:
    """Return a parameter group's highest rate, and whether a schedule planned it; None where it has none."""
    # a schedule that warms up begins at 0, and notes here where it goes to
    values = {key: group.get(key) for key in ("lr", "initial_lr", "max_lr")}
    rates = [float(value) for value in values.values() if isinstance(value, (int, float, torch.Tensor))]
    return (max(rates) if rates else None), any(values[key] is not None for key in ("initial_lr", "max_lr"))


def _like_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step's size is the rate's, as in Adam, also of 8 bits; not in SGD and Prodigy."""
    names = [kind.__name__.lower() for kind in type(optimizer).__mro__]
    return any("adam" in name for name in names) and not any(name.startswith("dadapt") for name in names)


def _say(rate: float, rates: Rates, alpha: float, optimizer: torch.optim.Optimizer) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    low = rate < rates.least
    message = (
        f"{type(optimizer).__name__} trains subspace coefficients at a learning rate of {rate:g},"
        f" {'below' if low else 'above'} the range in which they were measured to learn, {rates.least:g} to"
        f" {rates.most:g}{f' at alpha={alpha:g}' if rates.scaled else ''}:"
        f" {'they will hardly move' if low else 'training is not stable there'}. Start from {rates.start:g}, as with"
        f" TrainingArguments(learning_rate={rates.start:g}), or give them a parameter group with that rate."
    )
    if message not in _said:
        _said.add(message)
        warn_caller(message)
