"""Record in a basis which weights its base model has, and hold a model against that record."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..basis import SubspaceBasis
from ..basis.base_notes import known_weights
from ..basis.base_weights import KEY, MOST_MODULES, Likeness, WeightSample, compare, read_sample
from ..errors import BasisMismatchError, SubspaceError
from .base_check import told_of
from .base_weights import BaseWeights, layers_of


def weights_of(basis: SubspaceBasis, model: nn.Module, taken: str) -> WeightSample | None:
    """Return the entries of a model's weights that a basis's record holds; None where they cannot be read."""
    layers = layers_of(model, basis)
    known = known_weights(basis)
    also = () if known is None else known[0].values
    return BaseWeights(model, layers).sample(taken, MOST_MODULES, also) if layers else None


def hold_against(basis: SubspaceBasis, model: nn.Module) -> Likeness | None:
    """Refuse a model whose weights are not those that a basis has on record in itself.

    Returns:
        How they compare; None where there is no such record, or the weights cannot be read.

    Raises:
        BasisMismatchError: they are others; names the modules that are farthest.
    """
    known = read_sample(basis.info.get(KEY))
    found = None if known is None else weights_of(basis, model, "record_base_model")
    likeness = None if known is None or found is None else compare(known, found)
    if likeness is not None and not likeness.same:
        assert known is not None and found is not None
        raise BasisMismatchError(
            f"The base model given is not the one of the basis {basis.location or 'in memory'}:"
            f" {told_of(known, found, likeness)} Give that model."
        )
    return likeness


def keep_weights(basis: SubspaceBasis, model: nn.Module | None, taken: str = "build") -> None:
    """Record a model's weights in a basis in memory that has no record yet."""
    if model is not None and read_sample(basis.info.get(KEY)) is None:
        found = weights_of(basis, model, taken)
        if found is not None:
            basis.info[KEY] = found.record()


def record_base_model(
    basis: SubspaceBasis | str | Path, model: nn.Module, *, overwrite: bool = False
) -> SubspaceBasis:
    """Record in a basis which weights its base model has: some entries of the matrices that it has directions for.

    From then on other weights are refused wherever the basis is used, whatever the model is called, while copies in
    half precision, 8 or 4 bits pass. Neither the tensors nor the fingerprint change, so tasks stay valid. The files of
    a stored basis are written again.

    Args:
        basis: the basis, or its folder.
        model: the base model, adapted or not.
        overwrite: replace a record of other weights.

    Returns:
        The basis, with ``info["base_weights"]``.

    Raises:
        BasisMismatchError: other weights are on record, and `overwrite` is off; or the model has none of the modules.
        SubspaceError: the basis is on the Hub; the model's weights cannot be read.
        OSError: the disk refuses.
    """
    found = basis if isinstance(basis, SubspaceBasis) else SubspaceBasis.from_pretrained(basis)
    place = None if found.location is None else Path(found.location)
    if place is not None and not place.is_dir():
        raise SubspaceError(
            f"{found.location}: the basis is on the Hub. Save it in a folder, record the base model there, and push it"
            " again; its fingerprint stays the same."
        )
    if not layers_of(model, found):
        raise BasisMismatchError(
            f"None of the basis's {len(found)} modules is in this {type(model).__name__}. Give the base model that it"
            " was built for."
        )
    if not overwrite:
        try:
            hold_against(found, model)
        except BasisMismatchError as error:
            raise BasisMismatchError(f"{error} overwrite=True (--force) replaces the record.") from None
    sample = weights_of(found, model, "record_base_model")
    if sample is None:
        raise SubspaceError(
            f"The weights of this {type(model).__name__} cannot be read: they are on the meta device, sharded, of a"
            " quantised kind that only computes, or hold merged adapters. Load the model whole, and unmerge it."
        )
    found.info[KEY] = sample.record()
    if place is not None:
        found.save_pretrained(place)
    return found
