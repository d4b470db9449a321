"""A basis with fewer directions than wanted, filled up: with random ones, or with singular vectors of the base
weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..basis import ModuleBasis, SubspaceBasis
from ..basis.controls import gaussian
from ..basis.lineage import next_version
from ..basis.module import fix_signs
from ..basis.module_store import same_module
from ..errors import SubspaceError
from .controls import linear_weights

FILLINGS = ("random", "base-weights")
SPARE = 8
NEW = 1e-3  # a singular vector with less than this of its norm outside what is there adds a direction of rounding


def complete_basis(
    basis: SubspaceBasis | str | Path,
    k: int,
    *,
    with_: str = "random",
    k_in: int | None = None,
    base_model: nn.Module | None = None,
    seed: int = 0,
    token: str | bool | None = None,
    progress: bool = True,
) -> SubspaceBasis:
    """A basis filled up to k directions per side and module; those it has stay bit for bit, so its tasks move to it
    exactly.

    A fleet that spans fewer than k directions, or whose further ones are noise, leaves room in which a new task may
    still need to move. M, G, stored cores and their RMS are padded with zeros; energies are what they were, as the
    fleet has nothing in the new directions.

    Args:
        basis: a basis, its folder or its Hub id.
        k: directions on the output side, and on the input side unless `k_in` is given. Modules that have as many stay
            as they are.
        with_: ``random``: zero-mean Gaussian, orthogonal to what is there and orthonormal; a function of `seed`, the
            module's name, the shapes and the directions that are there. ``base-weights``: the leading left and right
            singular vectors of the base weight (LoRA-XS, arXiv 2405.17604), made orthogonal to what is there one after
            the other; at most min(out, in) of them.
        base_model: the model whose weights `base-weights` takes, linear layers only. It is left as it was.
        seed: of the random directions.
        token: as in huggingface_hub.
        progress: show a bar where it takes longer than two seconds.

    Returns:
        A basis in memory, a further version; its ``info["columns"]`` says per module and side which directions come
        from where.

    Raises:
        SubspaceError: arguments that clash; a module that the base model does not have as a linear layer.
    """
    _check(k, k_in, with_, base_model)
    old = basis if isinstance(basis, SubspaceBasis) else SubspaceBasis.from_pretrained(basis, token=token)
    modules = completed(old, (k, k_in or k), with_, base_model, seed, progress)
    info = next_version(old, modules, origin=with_)
    done = {"with": with_, "k": k, "k_in": k_in, "seed": seed}
    return SubspaceBasis(modules, {**info, **_measured(old, modules), "completed": done})


def complete_built(
    basis: SubspaceBasis,
    k: tuple[int, int],
    with_: str,
    base_model: nn.Module | None,
    seed: int,
    progress: bool,
) -> SubspaceBasis:
    """As `complete_basis`, of a basis that is being built: it stays the first version."""
    modules = completed(basis, k, with_, base_model, seed, progress)
    columns = next_version(basis, modules, origin=with_)["columns"]
    return SubspaceBasis(modules, {**basis.info, **_measured(basis, modules), "columns": columns})


def _measured(basis: SubspaceBasis, modules: Mapping[str, ModuleBasis]) -> dict[str, Any]:
    """What was measured of the basis, and what a random one of the new size keeps."""
    known = basis.info.get("measured")
    if not isinstance(known, Mapping):
        return {}
    random = {name: m.k_out * m.k_in / (m.out_features * m.in_features) for name, m in modules.items()}
    mean = sum(random.values()) / len(random)
    return {"measured": {**known, "energy_random": mean, "energy_random_per_module": random}}


def completed(
    basis: Mapping[str, ModuleBasis],
    k: tuple[int, int],
    with_: str,
    base_model: nn.Module | None,
    seed: int,
    progress: bool,
) -> dict[str, ModuleBasis]:
    """Every module filled up to k, output and input side."""
    weights = linear_weights(base_model, "all-linear") if with_ == "base-weights" and base_model is not None else None
    bar = tqdm(basis, desc=f"completing ({with_})", unit="module", delay=2, disable=not progress)
    return {name: _complete(name, basis[name], k, weights, seed) for name in bar}


def _complete(
    name: str, module: ModuleBasis, k: tuple[int, int], weights: Mapping[str, torch.Tensor] | None, seed: int
) -> ModuleBasis:
    sides = (("U", module.U, min(k[0], module.out_features)), ("V", module.V.T, min(k[1], module.in_features)))
    if all(columns.shape[1] >= size for _, columns, size in sides):
        return module
    if weights is None:
        drawn = {
            # a few more than needed: where next to nothing is left of one, the next takes its place
            side: gaussian(f"{seed}/{name}/{side}/complete", len(columns), min(len(columns), size + SPARE)).double()
            for side, columns, size in sides
        }
    else:
        P, _, Th = torch.linalg.svd(_weight(name, weights, module).detach().double().cpu(), full_matrices=False)
        drawn = {"U": P, "V": Th.T}
    U, V = (
        torch.cat([columns, _beside(columns, drawn[side], size - columns.shape[1]).to(columns.dtype)], 1)
        for side, columns, size in sides
    )
    return padded(module, U.contiguous(), V.T.contiguous())


def padded(module: ModuleBasis, U: torch.Tensor, V: torch.Tensor) -> ModuleBasis:
    """The module with U and V that begin with its own, and zeros in the cores that belong to the further ones."""
    more = (0, len(V) - module.k_in, 0, U.shape[1] - module.k_out)
    cores = {
        key: None if value is None else torch.nn.functional.pad(value, more)
        for key, value in (("M", module.M), ("G", module.G), ("core_rms", module.core_rms), ("cores", module.cores))
    }
    return replace(module, U=U, V=V, **cores)


def _beside(old: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` of the candidates (d, n) that lie outside what is there, orthonormal to it and to each other;
    (d, ≤ count)."""
    basis = torch.linalg.qr(old.double())[0]
    found: list[torch.Tensor] = []
    for candidate in candidates.T:
        if len(found) >= count:
            break
        rest = candidate / candidate.norm()
        # twice: what rounding leaves after the first time is removed by the second
        for _ in range(2):
            rest = rest - basis @ (basis.T @ rest)
        if (size := float(rest.norm())) > NEW:
            basis = torch.cat([basis, (rest / size)[:, None]], 1)
            found.append(rest / size)
    return fix_signs(torch.stack(found, 1)) if found else old[:, :0].double()


def _weight(name: str, weights: Mapping[str, torch.Tensor], module: ModuleBasis) -> torch.Tensor:
    hits = same_module(name, weights)
    shape = (module.out_features, module.in_features)
    if len(hits) != 1 or tuple(weights[hits[0]].shape) != shape:
        raise SubspaceError(
            f"Module {name!r} of shape {shape} is no linear layer of the base model ({len(hits)} have its name). Pass"
            " the model that the basis was built for, or complete with random directions."
        )
    return weights[hits[0]]


def _check(k: Any, k_in: Any, with_: str, base_model: nn.Module | None) -> None:
    for name, value in (("k", k), ("k_in", k_in)):
        if (value is not None or name == "k") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise SubspaceError(f"{name}={value!r}: give a number of directions, at least 1.")
    check_filling(with_, base_model)


def check_filling(with_: str, base_model: nn.Module | None) -> None:
    """Raise `SubspaceError` where there is no such filling, or it lacks the base model."""
    if with_ not in FILLINGS:
        raise SubspaceError(f"A basis cannot be completed with {with_!r}; choose one of {', '.join(FILLINGS)}.")
    if with_ == "base-weights" and base_model is None:
        raise SubspaceError("To complete with base-weights pass the base model: base_model= (--base-model).")
