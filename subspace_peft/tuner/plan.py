"""`InjectionPlan`: the tensors and names that an adapter's layers are made from, decided beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..basis import ModuleBasis, SubspaceBasis
from ..basis.base_weights import WeightSample
from ..basis.module import module_shape, tensor_sha256
from .config import SubspaceConfig
from .load_tracker import LoadTracker


@dataclass(frozen=True, eq=False)
class InjectionPlan:
    """For one adapter: the basis's name of each target module, and where the tensors come from.

    Attributes:
        config: the adapter's.
        basis: where the tensors come from; None where the task's own file will bring them.
        names: target module → its name in the basis.
        shapes: the basis's name of a module → its shape, as `SubspaceBasis.shapes` has it.
        carried: target module → shapes and hashes of the tensors that the task's own file has, or will have where it
            is saved; None: it carries no basis.
        tracker: notes the tensors that are loaded from the task's own file; None where that was checked already and a
            new task of the configuration can start.
        filled_in: field of the configuration → the value that the making of the adapter fills in.
        first: the base weights, where this is the first training in a basis that has none on record; else None.
        starts: whether the basis has what the configuration's `start` asks for; a saved task may do without.
    """

    config: SubspaceConfig
    basis: SubspaceBasis | None
    names: Mapping[str, str]
    shapes: Mapping[str, Mapping[str, int]]
    carried: Mapping[str, Any] | None
    tracker: LoadTracker | None
    filled_in: Mapping[str, Any]
    first: WeightSample | None = None
    starts: bool = True

    def __reduce__(self) -> tuple[Any, ...]:
        # of one injection, and no part of a copied or saved model
        return type(None), ()

    def module(self, key: str) -> ModuleBasis:
        """Return the part of the basis that the layer at `key` uses."""
        if self.basis is None:
            return placeholder((self.carried or {})[self.names[key]])
        return self.config.sizes.part(key, self.basis[self.names[key]])

    def basis_key(self, key: str) -> tuple[Any, ...] | None:
        """Return the key by which adapters share tensors at `key`; None where these are yet to be loaded."""
        if self.basis is None:
            return None
        shape = self.shapes[self.names[key]]
        used = self.config.sizes.used(key, shape["k_out"], shape["k_in"])
        return (self.basis.fingerprint, self.names[key], *used)

    def hashes(self, key: str) -> Mapping[str, str]:
        """Return the hashes of the tensors at `key` in the task's own file, by name; empty where it carries none."""
        return (self.carried or {}).get(key, {}).get("sha256", {})


def placeholder(entry: Mapping[str, Any]) -> ModuleBasis:
    """Return zeros in the shape of a basis that the task's own file will fill in.

    Args:
        entry: the module's in `SubspaceConfig.basis_modules`.
    """
    shape, hashes = entry["shape"], entry["sha256"]
    a, b = shape["k_out"], shape["k_in"]
    return ModuleBasis(
        U=torch.zeros(shape["out"], a),
        V=torch.zeros(b, shape["in"]),
        M=torch.zeros(a, b) if "M" in hashes else None,
        G=torch.zeros(shape["directions"], a, b) if "G" in hashes else None,
    )


def carried_entry(config: SubspaceConfig, module: ModuleBasis) -> dict[str, Any]:
    """Return the shape and the hashes of the tensors of `module` that a self-contained task's file carries."""
    tensors = {"U": module.U, "V": module.V}
    if config.mean_gain != "none" and module.M is not None:
        tensors["M"] = module.M
    if config.coefficients == "directions" and module.G is not None:
        tensors["G"] = module.G
    return {
        "shape": module_shape(module),
        "sha256": {key: tensor_sha256(value.float()) for key, value in tensors.items()},
    }
