"""Check that a base model is the one that the basis was built for and the task was trained on.

Weights say more than names: where they are on record and the same, the name does not matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..base_names import SAME, BaseName, difference, is_doubtful, known_names, read_name, relation
from ..basis import SubspaceBasis
from ..basis.base_notes import belongs_to_none, known_weights
from ..basis.base_weights import MOST_MODULES, STRICT, Likeness, WeightSample, compare, read_sample
from ..basis.module_store import names_of
from ..errors import BasisMismatchError
from .base_weights import IN_TASK, BaseWeights, is_merged, layers_of, model_name
from .targets import base_weight, readable
from .task_sizes import TaskSizes

if TYPE_CHECKING:
    from .config import SubspaceConfig

PROBED_MODULES, PROBED_SIDE = 4, 3
SAME_WEIGHTS = 0.9  # cosine of probes: 4-bit quantisation of one model keeps 0.99, two models have about 0
NAMED = 3  # modules in a message


@dataclass(frozen=True)
class CheckedBase:
    """What is kept of the base weights of an adapter that passed.

    Attributes:
        probe: see `probe`; None where it could not be taken.
        sample: the task's own record of the weights; None where they cannot be read.
        first: the basis's record of the weights, where this is the first training in it; else None.
    """

    probe: list[float] | None = None
    sample: WeightSample | None = None
    first: WeightSample | None = None


def check_base(
    model: nn.Module,
    config: SubspaceConfig,
    layers: Mapping[str, nn.Module],
    basis: SubspaceBasis | None,
    names: Mapping[str, str],
) -> CheckedBase:
    """Hold a base model against the records of the basis and of a loaded task.

    Warns where the weights are near those on record, but differ by more than their precision explains.

    Args:
        model: the base model.
        config: the adapter's.
        layers: target module → layer, in the model's order.
        basis: the adapter's; None where it is in the task's own file.
        names: target module → its name in the basis.

    Raises:
        BasisMismatchError: it is another model, by its weights or, where these are on no record, by its name.
    """
    found = None if basis is None else probe(layers, basis, names, config.sizes)
    rounded = None if found is None else [float(f"{value:.4g}") for value in found]
    if not config.check_base_model:
        return CheckedBase(rounded)
    weights = BaseWeights(model, {names[name]: layer for name, layer in layers.items()})
    own = read_sample(config.base_weights) if config.loaded else None
    known = known_weights(basis) if basis is not None and not config.generated else None
    also = {name for each in (own, known and known[0]) if each is not None for name in each.values}
    sample = weights.sample("training", IN_TASK, also)
    told = [
        record is not None and sample is not None and _judge(model, record, sample, where)
        for record, where in ((own, "that the task was trained on"), known or (None, ""))
    ]
    if basis is not None and not any(told):
        check_base_name(model, basis.info)
        if config.loaded and own is None and found is not None and config.base_probe is not None:
            _judge_probe(model, config, found, list(layers), rounded=sample is None or sample.rounded)
    if config.loaded or basis is None:
        return CheckedBase(rounded)
    # of a pipeline's basis another part may be on record
    nothing = told[1] or sample is None or belongs_to_none(basis) or config.inference_mode
    first = None if nothing else BaseWeights(model, layers_of(model, basis) or weights.layers, weights.found)
    return CheckedBase(
        rounded,
        weights.sample("training", IN_TASK),
        None if first is None else first.sample("training", MOST_MODULES),
    )


def _judge(model: nn.Module, known: WeightSample, found: WeightSample, where: str) -> bool:
    """Refuse, or warn of, a model whose weights are not those on record; return whether they could be compared."""
    likeness = compare(known, found)
    if likeness is None:
        return False
    said = told_of(known, found, likeness)
    if not likeness.same:
        mend = ""
        if "first training" in where:
            mend = (
                " If that training was on the wrong model, record the right one in the basis:"
                " record_base_model(basis, model) (subspace-peft record-base BASIS --base-model MODEL)."
            )
        raise BasisMismatchError(
            f"The base model's weights are not those {where}: {said} Load that base model, or pass"
            f" check_base_model=False in the config to try anyway.{mend}"
        )
    if likeness.changed:
        warnings.warn(
            f"The base model's weights differ from those {where}: {said} Tasks keep their function only as far as the"
            " weights are the same; load that base model, or pass check_base_model=False in the config.",
            stacklevel=2,
        )
    return True


def require_same_base(one: SubspaceConfig, other: SubspaceConfig, what: str) -> None:
    """Refuse a task whose base weights are on record and are not those of another task, in whose place it is to run.

    Args:
        one: the task's configuration.
        other: that of the adapter in the model.
        what: the task, for the message.

    Raises:
        BasisMismatchError: they are others.
    """
    known, found = read_sample(one.base_weights), read_sample(other.base_weights)
    if known is None or found is None or not (one.check_base_model and other.check_base_model):
        return
    likeness = compare(known, found)
    if likeness is not None and not likeness.same:
        raise BasisMismatchError(
            f"{what} was trained on other base weights than the adapter in this model:"
            f" {told_of(known, found, likeness)} Leave it out, or load the base model that it was trained on."
        )


def told_of(known: WeightSample, found: WeightSample, likeness: Likeness) -> str:
    """Return in words how the weights of a model compare with a record: names, precisions, distances, modules."""
    far = list(likeness.modules.items())[:NAMED]
    listed = ", ".join(f"{name} ({distance:.2g})" for name, distance in far)
    return (
        f"on record is {known.model or 'a model without a name'} ({known.stored_as}), this one is"
        f" {found.model or 'a model without a name'} ({found.stored_as}). Relative distance {likeness.distance:.2g},"
        f" up to {likeness.limit:g} {'is' if likeness.rounded else 'would be'} within the precision: {likeness.words}."
        f" Farthest: {listed}."
    )


def _judge_probe(
    model: nn.Module, config: SubspaceConfig, found: Sequence[float], names: Sequence[str], *, rounded: bool
) -> None:
    """Refuse a model whose probe is not that of a task which an earlier version saved, without a record of weights.

    That version did not say whether it was trained on a quantised base, so that the bound has to be loose.
    """
    known = config.base_probe or ()
    if not same_weights(known, found):
        raise BasisMismatchError(
            f"The base model's weights are not those that the task was trained on ({config.base_model_name_or_path}):"
            f" this {type(model).__name__} ({model_name(model)}) has other weights in"
            f" {names_of(probed_modules(names), 2)}. Load that base model, or pass check_base_model=False in the"
            " config to try anyway."
        )
    one, other = torch.tensor(known), torch.tensor(found)
    gap = float((other - one).norm() / one.norm())
    if gap > STRICT and not rounded:
        warnings.warn(
            f"The base model's weights differ from those that the task was trained on"
            f" ({config.base_model_name_or_path}), by {gap:.2g} in the few values on record. Where the task was"
            " trained on a quantised copy, that is its rounding; else this is a changed model: load the right one, or"
            " pass check_base_model=False in the config.",
            stacklevel=2,
        )


def check_base_name(model: nn.Module, info: Mapping[str, Any]) -> None:
    """Refuse a model with another Hub id than the one that the basis was built for, where no weights are on record.

    Two different Hub ids cannot be one model unless the basis's record says so; folders may hold any copy, which only
    the weights can tell. A folder that is called otherwise is therefore said, not refused.

    Args:
        model: the base model.
        info: the basis's record, see `known_names`.

    Raises:
        BasisMismatchError: both are Hub ids with their owners, and differ.
    """
    own = read_name(model_name(model))
    known = [read for name in known_names(info) if (read := read_name(name)) is not None]
    if own is None or not known:
        return
    if all(is_doubtful(own.text, each.text) for each in known):
        warnings.warn(
            f"The basis was built for {known[0].shown}, and the model is {own.shown}:"
            f" {difference(known[0].text, own.text)}. No weights of the base model are on record yet that would tell."
            " If they are one model, record it in the basis, record_base_model(basis, model) (subspace-peft"
            " record-base BASIS --base-model MODEL); if not, load the right one.",
            stacklevel=2,
        )
    if not _whole_id(own) or own.real is not None:
        return
    if all(_whole_id(each) and relation(own.text, each.text) != SAME for each in known):
        raise BasisMismatchError(
            f"The basis was built for {known[0].text!r}, but the model is {own.text!r}:"
            f" {difference(known[0].text, own.text)}. Load that one, build a basis for this one, or pass"
            " check_base_model=False if you know that they share their weights."
        )


def _whole_id(name: BaseName) -> bool:
    return name.is_id and "/" in name.text


def probed_modules(names: Sequence[str]) -> list[str]:
    """Return the modules whose weights are probed: evenly spread over the depth, the same for the same targets."""
    return sorted({names[i * (len(names) - 1) // max(PROBED_MODULES - 1, 1)] for i in range(PROBED_MODULES)})


def probe(
    layers: Mapping[str, nn.Module], basis: SubspaceBasis, names: Mapping[str, str], sizes: TaskSizes
) -> list[float] | None:
    """Return a few values ``UᵀW₀Vᵀ`` of the base weights, by which a wrong base model is noticed.

    Args:
        layers: target module → layer, in the model's order.
        basis: the adapter's.
        names: target module → its name in the basis.
        sizes: which part of the basis the adapter uses.

    Returns:
        The values; None where the weights are not there, cannot be read, or hold merged updates.
    """
    probed = probed_modules(list(layers))
    if any(map(is_merged, layers.values())):
        return None
    if any(parameter.is_meta for parameter in next(iter(layers.values())).parameters()):
        return None
    if not all(readable(layers[name]) for name in probed):
        return None
    values = []
    for name in probed:
        part = sizes.part(name, basis[names[name]])
        weight = base_weight(layers[name]).cpu()
        values.append((part.U[:, :PROBED_SIDE].float().T @ weight @ part.V[:PROBED_SIDE].float().T).flatten())
    return torch.cat(values).tolist()


def same_weights(recorded: Sequence[float], found: Sequence[float]) -> bool:
    """Tell whether two probes may be of one model's weights, such as a quantised copy's."""
    one, other = torch.tensor(recorded, dtype=torch.float32), torch.tensor(found, dtype=torch.float32)
    return bool(one.shape == other.shape and torch.cosine_similarity(one, other, dim=0) > SAME_WEIGHTS)
