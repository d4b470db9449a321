"""A basis with fewer directions than wanted, filled up with random ones or with singular vectors of base weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._io.progress import progress_bar
from ..base_names import said_of_basis
from ..basis import ModuleBasis, SubspaceBasis
from ..basis.controls import gaussian
from ..basis.lineage import next_version, warn_float32
from ..basis.matching import same_plain_module
from ..basis.module import fix_signs
from ..energy import DEFINITION, of_random
from ..errors import SubspaceError
from .base_model import base_model_name as named
from .base_model import check_weights, keep_weights
from .controls import linear_weights
from .ignored import warn_of_ignored_in_completion
from .options import BuildOptions, CompleteOptions, Resources, check_filling_model

SPARE = 8
NEW = 1e-3  # a singular vector with less than this of its norm outside what is there adds a direction of rounding


def complete_basis(
    basis: SubspaceBasis | str | Path,
    k: int,
    *,
    with_: str = "random",
    k_in: int | None = None,
    base_model: nn.Module | None = None,
    base_model_name: str | None = None,
    seed: int = 0,
    token: str | bool | None = None,
    progress: bool = True,
) -> SubspaceBasis:
    """Fill a basis up to k directions per side and module.

    The directions it has stay bit for bit, so its tasks move to the new basis exactly. A fleet that spans fewer than k
    directions, or whose further ones are noise, leaves room in which a new task may still need to move. M, G, stored
    cores and their RMS are padded with zeros; energies stay as they were, as the fleet has nothing in the new
    directions.

    Args:
        basis: a basis, its folder or its Hub id.
        k: directions on the output side, and on the input side unless `k_in` is given. Modules that have as many stay
            as they are.
        with_: ``random``: zero-mean Gaussian, orthogonal to the old directions and orthonormal; a function of `seed`,
            the module's name, the shapes and the old directions. ``base-weights``: the leading left and right singular
            vectors of the base weight (LoRA-XS, arXiv 2405.17604), made orthogonal to the old directions one after the
            other; at most min(out, in) of them.
        k_in: directions on the input side where they differ from `k`.
        base_model: the model whose weights `base-weights` takes, linear layers only. It is left as it was.
        base_model_name: Hub id of the basis's base model, where the basis records none or a folder; recorded from now
            on.
        seed: of the random directions.
        token: as in huggingface_hub.
        progress: show a bar where it takes longer than two seconds.

    Returns:
        A basis in memory, a further version; its ``info["columns"]`` says per module and side which directions come
        from where.

    Raises:
        SubspaceError: arguments that clash; a module that the base model does not have as a linear layer.
    """
    options = CompleteOptions(k=k, k_in=k_in, with_=with_, seed=seed, base_model_name=base_model_name)
    resources = Resources(token=token, progress=progress)
    check_filling_model(with_, base_model)
    old = basis if isinstance(basis, SubspaceBasis) else SubspaceBasis.from_pretrained(basis, token=resources.token)
    warn_float32(old)
    warn_of_ignored_in_completion(options, base_model, old)
    weights = linear_weights(base_model, "all-linear") if with_ == "base-weights" and base_model is not None else None
    name = named(said_of_basis(old.base_model, options.base_model_name), base_model)
    check_weights(old, base_model)
    modules = _completed(old, options, weights, resources.progress)
    info = next_version(old, modules, origin=with_)
    done = {"with": with_, "k": k, "k_in": k_in, "seed": seed}
    new = SubspaceBasis(
        modules, {**info, **_measured(old, modules), "base_model_name_or_path": name, "completed": done}
    )
    keep_weights(new, base_model)
    return new


def complete_built(
    basis: SubspaceBasis, options: BuildOptions, weights: Mapping[str, torch.Tensor] | None, progress: bool
) -> SubspaceBasis:
    """Fill up a basis that is being built: it stays the first version.

    Args:
        basis: as it was built.
        options: of its build, with a number of directions for `k`.
        weights: base weights (out, in) by module, where the new directions come from them.
        progress: show a bar where it takes longer than two seconds.
    """
    k, k_in = options.size
    origin = str(options.complete)
    filling = CompleteOptions(k=int(k), k_in=k_in, with_=origin, seed=options.seed)
    modules = _completed(basis, filling, weights, progress)
    columns = next_version(basis, modules, origin=origin)["columns"]
    return SubspaceBasis(modules, {**basis.info, **_measured(basis, modules), "columns": columns})


def _measured(basis: SubspaceBasis, modules: Mapping[str, ModuleBasis]) -> dict[str, Any]:
    """Return the measurements of the basis, with the energy that a random one of the new size keeps."""
    known = basis.info.get("measured")
    if not isinstance(known, Mapping):
        return {}
    random = {name: m.k_out * m.k_in / (m.out_features * m.in_features) for name, m in modules.items()}
    weights = known.get("energy_per_module") if known.get("definition") == DEFINITION else None
    mean = of_random(random, weights if isinstance(weights, Mapping) else None)
    return {"measured": {**known, "energy_random": mean, "energy_random_per_module": random}}


def _completed(
    basis: Mapping[str, ModuleBasis],
    options: CompleteOptions,
    weights: Mapping[str, torch.Tensor] | None,
    progress: bool,
) -> dict[str, ModuleBasis]:
    bar = progress_bar(basis, desc=f"completing ({options.with_})", unit="module", shown=progress)
    return {name: _complete(name, basis[name], options, weights) for name in bar}


def _complete(
    name: str, module: ModuleBasis, options: CompleteOptions, weights: Mapping[str, torch.Tensor] | None
) -> ModuleBasis:
    k, k_in = options.size
    sides = (("U", module.U, min(k, module.out_features)), ("V", module.V.T, min(k_in, module.in_features)))
    if all(columns.shape[1] >= size for _, columns, size in sides):
        return module
    if weights is None:
        drawn = {
            # a few more than needed: where next to nothing is left of one, the next takes its place
            side: gaussian(
                f"{options.seed}/{name}/{side}/complete", len(columns), min(len(columns), size + SPARE)
            ).double()
            for side, columns, size in sides
        }
    else:
        shape = (module.out_features, module.in_features)
        weight = filling_weights(weights, {name: shape})[name]
        P, _, Th = torch.linalg.svd(weight.detach().double().cpu(), full_matrices=False)
        drawn = {"U": P, "V": Th.T}
    U, V = (
        torch.cat([columns, _beside(columns, drawn[side], size - columns.shape[1]).to(columns.dtype)], 1)
        for side, columns, size in sides
    )
    return padded(module, U.contiguous(), V.T.contiguous())


def padded(module: ModuleBasis, U: torch.Tensor, V: torch.Tensor) -> ModuleBasis:
    """Return the module with U and V that begin with its own, and zeros in the cores for the further directions."""
    more = (0, len(V) - module.k_in, 0, U.shape[1] - module.k_out)
    cores = {
        key: None if value is None else torch.nn.functional.pad(value, more)
        for key, value in (("M", module.M), ("G", module.G), ("core_rms", module.core_rms), ("cores", module.cores))
    }
    return replace(module, U=U, V=V, **cores)


def _beside(old: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    """Return the first `count` candidates outside the old directions, orthonormal to them and to each other.

    Args:
        old: (d, k), orthonormal.
        candidates: (d, n).
        count: how many are wanted.

    Returns:
        (d, ≤ count).
    """
    basis = torch.linalg.qr(old.double())[0]
    found: list[torch.Tensor] = []
    for candidate in candidates.T:
        if len(found) >= count:
            break
        rest = candidate / candidate.norm()
        # twice: the second time removes what rounding left in the first
        for _ in range(2):
            rest = rest - basis @ (basis.T @ rest)
        if (size := float(rest.norm())) > NEW:
            basis = torch.cat([basis, (rest / size)[:, None]], 1)
            found.append(rest / size)
    return fix_signs(torch.stack(found, 1)) if found else old[:, :0].double()


def filling_weights(
    weights: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """Return the base weights (out, in) of a basis's modules.

    Args:
        weights: of the base model, by its own names.
        shapes: per module of the basis its (out, in).

    Raises:
        SubspaceError: a module is no linear layer of the base model, or of another shape.
    """
    found = {}
    for name, shape in shapes.items():
        hits = same_plain_module(name, weights)
        if len(hits) != 1 or tuple(weights[hits[0]].shape) != shape:
            raise SubspaceError(
                f"Module {name!r} of shape {shape} is no linear layer of the base model ({len(hits)} have its name)."
                " Pass the model that the basis was built for, or complete with random directions."
            )
        found[name] = weights[hits[0]]
    return found
