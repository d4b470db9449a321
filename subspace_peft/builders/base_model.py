"""The base model that is at hand while a basis is made: held against what is on record, and recorded."""

from __future__ import annotations

from torch import nn

from ..base_names import DIFFERENT, read_name, relation
from ..basis import SubspaceBasis
from ..errors import SubspaceError


def model_name(model: nn.Module | None) -> str | None:
    """Return the id or folder that a base model was loaded from, in its normal form, where it is known."""
    found = read_name(getattr(getattr(model, "config", None), "_name_or_path", None))
    return None if found is None else found.text


def base_model_name(recorded: str | None, model: nn.Module | None) -> str | None:
    """Return the name of the base model that sources or a basis are of: theirs, or else the model's own Hub id.

    Args:
        recorded: the name that they give, or that the user says.
        model: the base model, or None.

    Raises:
        SubspaceError: the model is another one on the Hub.
    """
    own = model_name(model)
    if recorded is not None and own is not None and relation(recorded, own) == DIFFERENT:
        raise SubspaceError(
            f"base_model= (--base-model) is {own!r}, but the adapters are of {recorded!r}, which is another model on"
            " the Hub. Give that one; or, where both are one model, say so with base_model_name= (--base-model-name)"
            " and this model's name."
        )
    # a folder of this machine says nothing to others
    return recorded or (own if _is_hub_id(own) else None)


def _is_hub_id(name: str | None) -> bool:
    read = read_name(name)
    return read is not None and read.is_id and read.real is None


def check_weights(basis: SubspaceBasis, model: nn.Module | None) -> None:
    """Refuse a model whose weights are not those that a basis has on record.

    Raises:
        BasisMismatchError: they are others; names the modules that are farthest.
    """
    if model is not None:
        from ..tuner.base_record import hold_against

        hold_against(basis, model)


def keep_weights(basis: SubspaceBasis, model: nn.Module | None) -> None:
    """Record a model's weights in a basis that was just made, where it has no record yet."""
    if model is not None:
        from ..tuner.base_record import keep_weights as keep

        keep(basis, model)
