"""A task's trained parameters on another basis, of the kind that they are of."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..basis.module import module_shape
from ..basis.transfer import Transfer
from ..tuner import SubspaceConfig

ALIKE = 1e-5  # relative difference that float32's rounding may make between two equal cores

Coefficients = dict[str, torch.Tensor]


def same_kind(
    config: SubspaceConfig,
    moved: SubspaceConfig,
    name: str,
    numbers: Coefficients,
    move: Transfer,
    shape: Mapping[str, int],
) -> Coefficients | None:
    """Compute trained parameters of the same kind in the new basis.

    Args:
        config: The task's configuration.
        moved: Its configuration on the new basis.
        name: The module.
        numbers: The module's trained parameters, by name.
        move: Transfer to the part of the new basis that the task uses.
        shape: Sizes of the new basis's module.

    Returns:
        The parameters by name, float64; None if the new basis cannot hold this kind exactly.
    """
    ratio = config.sizes.scale(name, module_shape(move.old)) / moved.sizes.scale(name, shape)
    old, new = move.old, move.new
    if config.mean_gain != "none" and not (
        old.M is not None and new.M is not None and _alike(move.core(old.M), new.M.double())
    ):
        return None
    gain = {"gain": numbers["gain"].double()} if "gain" in numbers else {}
    if config.coefficients == "none":
        return gain
    sizes = moved.sizes.expected(name, shape)
    if config.coefficients == "core":
        return {"weight": move.core(numbers["weight"]) * ratio, **gain}
    if config.coefficients == "factor":
        return {**_factors(numbers, move, sizes["down"][0], ratio), **gain}
    if config.coefficients == "diagonal":
        k = min(old.k_out, old.k_in)
        core = torch.zeros(old.k_out, old.k_in, dtype=torch.float64)
        core[:k, :k] = torch.diag(numbers["weight"].double())
        core = move.core(core) * ratio
        found = core.diagonal().clone()
        core.diagonal().zero_()
        return {"weight": found, **gain} if float(core.norm()) <= ALIKE * float(found.norm()) else None
    if config.coefficients != "directions" or old.G is None or new.G is None or len(new.G) < len(old.G):
        return None
    images, targets = move.core(old.G), new.G[: len(old.G)].double()
    along = (images * targets).sum((1, 2))
    if not _alike(images, along[:, None, None] * targets):
        return None
    weight = torch.zeros(len(new.G), dtype=torch.float64)
    weight[: len(old.G)] = numbers["weight"].double() * along * ratio
    return {"weight": weight, **gain}


def _factors(numbers: Coefficients, move: Transfer, r: int, ratio: float) -> Coefficients:
    up, down = move.left @ numbers["up"].double(), numbers["down"].double() @ move.right
    up = up * ratio
    have = up.shape[1]
    if r < have:
        P, S, Th = torch.linalg.svd(up @ down, full_matrices=False)
        return {"up": P[:, :r] * S[:r], "down": Th[:r]}
    # where r is more than the old basis had directions: rows for the new ones, which `up` leaves at zero, as at the
    # start of training
    rows = torch.eye(down.shape[1], dtype=torch.float64).flip(0)[: r - have]
    return {"up": torch.nn.functional.pad(up, (0, r - have)), "down": torch.cat([down, rows])}


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).norm()) <= ALIKE * max(float(one.norm()), 1e-300)
