"""`build_basis`: from source adapters to a basis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..basis import ModuleBasis, SubspaceBasis
from ..errors import SubspaceError
from .factors import Factors
from .fleet import Fleet, facts, gather
from .generic import build_generic
from .held_out import left_out_energy, wanted
from .hosvd import Pair, factor_pca, hosvd

BUILDERS = ("adapters", "eigenlora", "random", "base-weights")
WEIGHTS = ("equal", "norm")
CORES_KEPT_UP_TO = 64


def build_basis(
    sources: Iterable[Any] | None = None,
    *,
    k: int | float = 32,
    k_in: int | None = None,
    builder: str = "adapters",
    weights: str = "equal",
    alternations: int = 10,
    directions: int = 0,
    keep_cores: bool | None = None,
    leave_one_out: bool | None = None,
    like: SubspaceBasis | None = None,
    base_model: nn.Module | None = None,
    target_modules: str | Sequence[str] | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    partial: bool = False,
    allow_bin: bool = False,
    token: str | bool | None = None,
    progress: bool = True,
) -> SubspaceBasis:
    """Build a shared basis: per target module an orthonormal output basis U (out, k_out) and input basis V (k_in, in).

    Args:
        sources: the fleet, a list (one alone counts as a list of one): LoRA folders, LoRA files of diffusers or kohya, Hub ids
            (``org/name@revision:folder``), patterns (``loras/*``), text files of such references (``fleet.txt``), Hub collections
            (``collection:owner/slug``), state dicts, ``(state_dict, config)`` pairs or live PeftModels. Rank, scaling and target
            modules are read from each. Not needed by the last two builders.
        k: directions per side, or a share of energy in (0, 1) that every module has to keep.
        k_in: directions on the input side where they differ from `k`.
        builder: ``adapters``: truncated HOSVD of the updates ΔW, free of the factors' gauge, with alternations (JD-Full,
            arXiv 2407.00066). ``eigenlora``: PCA of the raw factors (arXiv 2502.04700), for comparison. ``random``:
            zero-mean Gaussian, orthonormalised, the control. ``base-weights``: top singular vectors of the base model's
            weights (LoRA-XS, arXiv 2405.17604), the other control.
        weights: ``equal``: every source's ΔW counts as of norm 1 in every module. ``norm``: as large as it is. Either
            way the members of a shared-seed group share one vote.
        alternations: at most this many rounds after the HOSVD (`adapters` only).
        directions: how many direction tensors G to keep for the `directions` coefficients: the leading principal
            axes of the sources' cores, or random orthonormal ones where there is no fleet.
        keep_cores: whether the sources' own cores are stored, for starts at a named source; default: up to 64 sources.
        leave_one_out: measure what a basis built without a source keeps of it (`adapters` only): one more build per shared-seed group;
            default: for fleets of 2 to 8 groups.
        like: a basis whose modules and sizes the `random` builder takes over.
        base_model: the model whose modules and weights `random` and `base-weights` take, with `target_modules`. The other builders
            need it for sources of PEFT's other methods, which `convert_to_lora` turns into LoRA. It is left as it was.
        target_modules: names or ends of names of `base_model`'s modules, or a regular expression, as in PEFT.
        seed: of the `random` builder and of random directions.
        skip_bad: leave bad sources out, with their reasons in ``basis.info["skipped"]``, instead of raising.
        partial: allow modules that only some sources adapt; each is then built from those.
        allow_bin: take pickled sources (``adapter_model.bin``) too, read with ``weights_only=True``.
        token: as in huggingface_hub.
        progress: show bars for what takes over two seconds.

    Returns:
        A basis in memory, float32, every tensor's sign fixed: same bytes from same inputs on one platform.

    Raises:
        SourceError: bad sources; lists all of them.
        SubspaceError: arguments that clash.
    """
    _check_arguments(k, k_in, builder, weights, directions)
    arguments = {
        "k": k, "k_in": k_in, "builder": builder, "weights": weights, "alternations": alternations,
        "directions": directions, "seed": seed, "keep_cores": keep_cores, "partial": partial, "allow_bin": allow_bin,
    }  # fmt: skip
    if builder in ("random", "base-weights"):
        return build_generic(
            builder, sources=sources, like=like, base_model=base_model, target_modules=target_modules,
            k=k, k_in=k_in, directions=directions, seed=seed, token=token, progress=progress, arguments=arguments,
            allow_bin=allow_bin, skip_bad=skip_bad,
        )  # fmt: skip
    if sources is None:
        raise SubspaceError(f"The builder {builder!r} needs source adapters; pass their folders or Hub ids.")
    fleet = gather(
        sources, skip_bad=skip_bad, partial=partial, token=token, progress=progress, allow_bin=allow_bin, base_model=base_model
    )  # fmt: skip
    if keep_cores is None:
        keep_cores = len(fleet.sources) <= CORES_KEPT_UP_TO
    modules: dict[str, ModuleBasis] = {}
    energies: dict[str, list[float | None]] = {}
    left_out: dict[str, list[float | None]] = {}
    held_out = builder == "adapters" and wanted(leave_one_out, fleet.groups)
    for name in tqdm(fleet.modules, desc="building", unit="module", delay=2, disable=not progress):
        members = [i for i, source in enumerate(fleet.sources) if name in source.keys and source.norms[name] > 0]
        if not members:
            raise SubspaceError(f"Module {name!r}: every source's update is zero. Leave it out of the sources.")
        updates = [fleet.sources[i].factors(name) for i in members]
        votes = fleet.votes(members)
        if builder == "adapters":
            norms = [fleet.sources[i].norms[name] if weights == "equal" else 1.0 for i in members]
            scaled = [vote**0.5 / norm for vote, norm in zip(votes, norms, strict=True)]
            pair = hosvd(updates, scaled, k, k_in, alternations)
            if held_out:
                groups = [fleet.groups[i] for i in members]
                left_out[name] = left_out_energy(updates, scaled, groups, pair, alternations)
        else:
            pair = factor_pca([fleet.sources[i].raw(name) for i in members], int(k), k_in)
        module, kept = _with_statistics(pair, updates, votes, directions, keep_cores, len(fleet.sources), members)
        modules[name] = module
        energies[name] = [None] * len(fleet.sources)
        for i, share in zip(members, kept, strict=True):
            energies[name][i] = share
    info = _info(fleet, builder, arguments, modules, energies)
    info["measured"] |= _mean_left_out(left_out)
    return SubspaceBasis(modules, info)


def _check_arguments(k: int | float, k_in: int | None, builder: str, weights: str, directions: int) -> None:
    if builder not in BUILDERS:
        raise SubspaceError(f"There is no builder {builder!r}; choose one of {', '.join(BUILDERS)}.")
    if weights not in WEIGHTS:
        raise SubspaceError(f"There is no weighting {weights!r}; choose one of {', '.join(WEIGHTS)}.")
    if isinstance(k, bool) or (isinstance(k, float) and not 0 < k < 1) or (isinstance(k, int) and k < 1):
        raise SubspaceError(f"k={k!r}: give a number of directions (1, 2, …) or a share of energy to keep (0.5).")
    if isinstance(k, float) and (builder != "adapters" or k_in is not None):
        raise SubspaceError("A share of energy as k is for the builder `adapters`, and decides k_in itself.")
    if k_in is not None and k_in < 1:
        raise SubspaceError(f"k_in={k_in}: give at least 1.")
    if directions < 0:
        raise SubspaceError(f"directions={directions}: give 0 or more.")


def _with_statistics(
    pair: Pair,
    updates: Sequence[Factors],
    votes: Sequence[float],
    directions: int,
    keep_cores: bool,
    fleet_size: int,
    members: Sequence[int],
) -> tuple[ModuleBasis, list[float]]:
    """The module's basis with mean core, RMS, cores and directions, and per member the share of its energy kept."""
    U, V = pair.U.float(), pair.V.float()
    # statistics are of the float32 basis that is stored, not of the float64 one it was rounded from
    U64, V64 = U.double(), V.double()
    cores = torch.stack([(U64.T @ update.B) @ (update.A @ V64.T) for update in updates])
    weight = torch.tensor(votes, dtype=torch.float64) / sum(votes)
    # rounding can bring the share of a source that lies wholly inside a hair above one
    kept = [
        min(1.0, float(core.square().sum()) / update.norm() ** 2) for core, update in zip(cores, updates, strict=True)
    ]
    stored = torch.zeros(fleet_size, *cores.shape[1:], dtype=torch.float64)
    stored[list(members)] = cores
    module = ModuleBasis(
        U=U.contiguous(),
        V=V.contiguous(),
        M=torch.einsum("n,noi->oi", weight, cores).float(),
        G=_principal_cores(cores, weight, directions) if directions else None,
        core_rms=torch.einsum("n,noi->oi", weight, cores.square()).sqrt().float(),
        cores=stored.float() if keep_cores else None,
        spectrum_out=pair.spectrum_out.float(),
        spectrum_in=pair.spectrum_in.float(),
    )
    return module, kept


def _principal_cores(cores: torch.Tensor, weight: torch.Tensor, m: int) -> torch.Tensor:
    """The m leading principal axes (uncentred, each source of norm 1) of the cores (N, k_out, k_in), at most N."""
    flat = cores.flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-300) * weight.sqrt()[:, None]
    _, S, axes = torch.linalg.svd(flat, full_matrices=False)
    axes = axes[: max(1, int((1e-6 * S[0] < S).sum()))][:m]
    top = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * torch.where(top < 0, -1.0, 1.0).to(axes.dtype)
    return axes.reshape(-1, *cores.shape[1:]).float().contiguous()


def _mean_left_out(shares: dict[str, list[float | None]]) -> dict[str, Any]:
    means = {
        name: sum(known) / len(known)
        for name, each in shares.items()
        if (known := [share for share in each if share is not None])
    }
    if not means:
        return {}
    return {"energy_left_out": sum(means.values()) / len(means), "energy_left_out_per_module": means}


def _info(
    fleet: Fleet,
    builder: str,
    arguments: dict[str, Any],
    modules: dict[str, ModuleBasis],
    energies: dict[str, list[float | None]],
) -> dict[str, Any]:
    entries = []
    for i, source in enumerate(fleet.sources):
        norms = source.norms
        total = sum(norm**2 for norm in norms.values())
        shares = [energies[name][i] for name in norms if name in energies]
        kept = sum((s or 0.0) * norms[name] ** 2 for s, name in zip(shares, norms, strict=True)) / total
        ranks = sorted({int(source.raw(name)[1].shape[0]) for name in norms})
        entries.append(
            {
                "name": source.name, "location": source.location, "revision": source.revision,
                "sha256": source.sha256, "base_model": source.base_model, "license": source.license,
                "task_type": source.task_type, "ranks": ranks,
                "modules": len(norms), "norm": total**0.5, "seed_group": fleet.groups[i], "energy_kept": kept,
                **facts(source),
            }
        )  # fmt: skip
    per_module = {
        name: sum(known) / len(known)
        for name, shares in energies.items()
        if (known := [s for s in shares if s is not None])
    }
    random = {name: m.k_out * m.k_in / (m.out_features * m.in_features) for name, m in modules.items()}
    return {
        "base_model_name_or_path": fleet.base_model,
        "builder": builder,
        "build": arguments,
        "sources": entries,
        "skipped": fleet.skipped,
        "measured": {
            "energy_kept": sum(per_module.values()) / len(per_module),
            "energy_random": sum(random.values()) / len(random),
            "energy_kept_per_module": per_module,
            "energy_random_per_module": random,
        },
    }
