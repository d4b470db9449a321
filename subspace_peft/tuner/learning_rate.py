"""Say once where an optimiser's learning rate for coefficients lies outside the range in which they learn.

Coefficients want a rate that the Trainer's default, 5e-5, is far below. So that it is noticed under any trainer and
in plain loops, with nothing for the user to add, one hook looks at each optimiser before its steps, until the rate
of each tensor that it holds is judged. It holds models and optimisers weakly, and costs one look-up per step
afterwards.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .._io.warn import warn_caller
from .coefficients import USUAL_ALPHA, Coefficients, MeanOnly


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


# of 12 text and 5 image tasks: the best rates of sweeps were 3e-4 … 1.92e-2, and 1.2e-3 and 4.8e-3 good for all.
# A task's own directions are stored in units that make these their rates, too: in docs/evidence.md they gain at 4.8e-3
# and at 1.92e-2; at 1.2e-3, where the core learns, they hardly move
OF_CORES = Rates(1e-4, 2e-2, 3e-3, scaled=True)
# of the fleet's mean alone, whose gain multiplies a matrix that alpha does not scale: best rates were 0.025 … 1.6
OF_GAINS = Rates(2.5e-2, 1.6, 0.4, scaled=False)

# bounds are met by a rate that float32 or a scale has rounded
SLACK = 1e-6

_watched: weakref.WeakKeyDictionary[Coefficients, float] = weakref.WeakKeyDictionary()
_looks: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Look] = weakref.WeakKeyDictionary()
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


@dataclass
class _Open:
    """Coefficients of one range in one parameter group whose rate is yet to be judged."""

    place: int
    rates: Rates
    alpha: float
    tensors: list[weakref.ref[torch.Tensor]]  # which themselves may hold the optimiser
    last: float | None = None

    def held(self) -> list[torch.Tensor]:
        """Return the tensors."""
        return [tensor for each in self.tensors if (tensor := each()) is not None]

    def judge(self, optimizer: torch.optim.Optimizer) -> bool:
        """Warn of a rate outside the range.

        Returns:
            Whether it is judged; if not, it is asked for again before the next step.
        """
        # an optimiser may hold what is unfrozen only later
        if not any(tensor.requires_grad for tensor in self.held()):
            return False
        rate, planned = _rate_of(optimizer.param_groups[self.place])
        low, high = self.rates.least * (1 - SLACK), self.rates.most * (1 + SLACK)
        if rate > high:
            _say(rate, self.rates, self.alpha, optimizer)
            return True
        if planned > high:
            # said once it gets there: `LambdaLR` may have a factor of 1 to multiply rates of its own with
            return False
        if max(rate, planned) >= low:
            return True
        last, self.last = self.last, rate
        # a rate that is raised beyond what is noted, by hand or in cycles, is judged once it no longer rises
        if last is None or rate > max(last, planned):
            return False
        _say(max(rate, planned), self.rates, self.alpha, optimizer)
        return True


@dataclass
class _Look:
    """What is known of an optimiser: how many groups and tensors it had, which are judged by id, and what is not."""

    size: tuple[int, int]
    judged: set[int]
    left: list[_Open]


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    look, size = _looks.get(optimizer), _size(optimizer)
    if look is not None and look.size == size and not look.left:
        return
    # a rate on the device cannot be read while a graph is captured
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    with _lock:
        if look is None or look.size != size:
            judged = set() if look is None else look.judged
            look = _looks[optimizer] = _Look(size, judged, _unjudged(optimizer, judged))
        for each in list(look.left):
            if each.judge(optimizer):
                look.left.remove(each)
                look.judged.update(map(id, each.held()))


def _size(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    groups = optimizer.param_groups
    return len(groups), sum(len(group["params"]) for group in groups)


def _unjudged(optimizer: torch.optim.Optimizer, judged: set[int]) -> list[_Open]:
    """Return the coefficients that an optimiser holds and that are not `judged`, by group and range."""
    if not _like_adam(optimizer):
        return []
    found: dict[tuple[int, Rates, float], list[weakref.ref[torch.Tensor]]] = {}
    owners = {id(p): (module, name) for module in list(_watched) for name, p in module.named_parameters()}
    for place, group in enumerate(optimizer.param_groups):
        for tensor in group["params"]:
            for module, name in _owners(tensor, owners) if id(tensor) not in judged else ():
                if _counts(module, name):
                    found.setdefault((place, *_rates_of(module, name)), []).append(weakref.ref(tensor))
    return [_Open(*key, tensors) for key, tensors in found.items()]


def _owners(parameter: Any, owners: Mapping[int, tuple[Coefficients, str]]) -> Iterator[tuple[Coefficients, str]]:
    """Yield the coefficients that a trained tensor is of, with its name there; FSDP makes one of several."""
    if id(parameter) in owners:
        yield owners[id(parameter)]
    for info in getattr(parameter, "_param_infos", None) or ():
        if isinstance(module := getattr(info, "module", None), Coefficients) and module in _watched:
            yield module, info.param_name


def _counts(module: Coefficients, name: str) -> bool:
    """Return whether the rate of this tensor decides: a gain's does where nothing else is trained."""
    return name != "gain" or (isinstance(module, MeanOnly) and not module.extra_rank)


def _rates_of(module: Coefficients, name: str) -> tuple[Rates, float]:
    alpha = _watched[module]
    return (OF_GAINS if name == "gain" else OF_CORES).at(alpha), alpha


def _rate_of(group: Mapping[str, Any]) -> tuple[float, float]:
    """Return a parameter group's rate, and the highest that a schedule noted there, or 0."""
    # a schedule that warms up begins at 0, and notes where it goes to
    planned = [group[key] for key in ("initial_lr", "max_lr") if group.get(key) is not None]
    return float(group["lr"]), max(map(float, planned), default=0.0)


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
