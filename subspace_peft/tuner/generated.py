"""Bases that are made at injection: random ones, and the top singular vectors of the base model's weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..basis import ModuleBasis, SubspaceBasis
from ..basis.controls import base_weight_module, random_module, with_random_directions
from ..basis.living import alive
from ..errors import SubspaceError
from .base_check import probe, same_weights
from .config import SubspaceConfig
from .targets import base_of, base_weight, readable, sizes

GENERATED_K = 16


def made_basis(config: SubspaceConfig, layers: Mapping[str, nn.Module]) -> SubspaceBasis:
    """Return the basis of the config's generated kind for the given layers.

    Singular vectors are not computed again where an earlier use of the config has them, as for a second adapter.

    Raises:
        SubspaceError: it is to be made from weights that cannot be read.
    """
    earlier = made_before(config, layers) if config.basis == "base-weights" else None
    return generate(config, layers) if earlier is None else earlier


def made_before(config: SubspaceConfig, layers: Mapping[str, nn.Module]) -> SubspaceBasis | None:
    """Return the basis that an earlier use of `config` generated, where it is alive and of these very layers."""
    basis = None if config.basis_fingerprint is None else alive(config.basis_fingerprint)
    if basis is None or any(name not in basis for name in layers):
        return None
    shapes = basis.shapes()
    for name, layer in layers.items():
        out, inner = sizes(layer)
        k_out, k_in = (min(k, out, inner) for k in config.sizes.asked(name) or (GENERATED_K, GENERATED_K))
        m = max(k_out, k_in) if config.coefficients == "directions" else 0
        if shapes[name] != {"out": out, "in": inner, "k_out": k_out, "k_in": k_in, "directions": m}:
            return None
    found = probe(layers, basis, {name: name for name in layers}, config.sizes)
    known = config.base_probe
    return basis if found is None or known is None or same_weights(known, found) else None


def generate(config: SubspaceConfig, layers: Mapping[str, nn.Module]) -> SubspaceBasis:
    """Return a basis of the config's generated kind for the given layers.

    Raises:
        SubspaceError: it is to be made from weights that cannot be read.
    """
    made: dict[str, ModuleBasis] = {}
    for name, layer in layers.items():
        k_out, k_in = config.sizes.asked(name) or (GENERATED_K, GENERATED_K)
        out, inner = sizes(layer)
        if config.basis == "random":
            module = random_module(name, out, inner, k_out, k_in, config.seed)
        elif not readable(layer):
            raise SubspaceError(
                f"basis='base-weights': the weight of {name!r} ({type(base_of(layer)).__name__}) cannot be read back"
                " from its quantised form. Build the basis from the unquantised model by"
                " `build_basis(builder='base-weights', …)`, and pass that."
            )
        else:
            module = base_weight_module(base_weight(layer), max(k_out, k_in)).truncate(k_out, k_in)
        if config.coefficients == "directions":
            module = with_random_directions(name, module, max(k_out, k_in), config.seed)
        made[name] = module
    return SubspaceBasis(made, {"builder": config.basis, "base_model_name_or_path": config.base_model_name_or_path})
