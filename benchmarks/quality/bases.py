"""Bases that the package does not build: put together from those that it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from subspace_peft import SubspaceBasis
from subspace_peft.basis import ModuleBasis

from .encoder import ADAPTED


def each_module(basis: SubspaceBasis, change: Callable[[str, ModuleBasis], ModuleBasis], about: str) -> SubspaceBasis:
    """Return a basis with every module changed; it says so, and keeps its sources."""
    modules = {name: change(name, module) for name, module in basis.items()}
    info = {key: value for key, value in basis.info.items() if key != "measured"}
    return SubspaceBasis(modules, {**info, "changed": about})


def completed(first: torch.Tensor, rest: torch.Tensor, k: int) -> torch.Tensor:
    """Return k orthonormal columns: those of `first` (d, a), then what `rest` (d, b) adds to them, in its order.

    Raises `ValueError` where the two span fewer than k.
    """
    columns = list(first.double().T)
    for column in rest.double().T:
        if len(columns) == k:
            break
        for _ in range(2):  # twice is enough, for rounding
            for known in columns:
                column = column - (known @ column) * known
        if column.norm() > 1e-4:
            columns.append(column / column.norm())
    if len(columns) < k:
        raise ValueError(f"{len(columns)} directions, {k} wanted: give more to complete with.")
    return torch.stack(columns[:k], 1).float().contiguous()


def hybrid(basis: SubspaceBasis, other: SubspaceBasis, k: int, share: float = 0.5) -> SubspaceBasis:
    """Return the leading ``share · k`` directions of `basis` on either side, completed to k with those of `other`."""
    a = round(share * k)

    def change(name: str, module: ModuleBasis) -> ModuleBasis:
        rest = other[name]
        U = completed(module.U[:, :a], rest.U, k)
        V = completed(module.V[:a].T, rest.V.T, k).T.contiguous()
        return ModuleBasis(U=U, V=V)

    return each_module(basis, change, f"leading {a} of {k}, completed")


def one_sided(out: SubspaceBasis, inner: SubspaceBasis) -> SubspaceBasis:
    """Return U of one basis with V of another; the sources are those of the one that has some."""
    owner = out if out.info.get("sources") else inner

    def change(name: str, module: ModuleBasis) -> ModuleBasis:
        return ModuleBasis(U=out[name].U, V=inner[name].V)

    return each_module(owner, change, "two sides of two bases")


def shared_inputs(basis: SubspaceBasis, updates: Mapping[str, list[torch.Tensor]]) -> SubspaceBasis:
    """Return a basis with one V for the query and value of a layer; every module keeps its U.

    V comes from both modules' updates together, each of norm 1.

    Args:
        updates: module → the sources' ΔW (out, in), dense: these modules are small.
    """
    layers: dict[str, list[str]] = {}
    for name in basis:
        layers.setdefault(name.rsplit(".", 1)[0], []).append(name)
    common = {}
    for names in layers.values():
        moment = sum(d.T @ d / d.square().sum() for name in names for d in updates[name])
        V = torch.linalg.eigh(moment)[1].flip(1)[:, : basis[names[0]].k_in].T.float().contiguous()
        common.update(dict.fromkeys(names, V))
    return each_module(basis, lambda name, module: ModuleBasis(U=module.U, V=common[name]), "one V per layer")


def centred(basis: SubspaceBasis, updates: Mapping[str, list[torch.Tensor]]) -> SubspaceBasis:
    """Return the truncated HOSVD of the updates, each of norm 1, without their mean; sizes are those of `basis`."""

    def change(name: str, module: ModuleBasis) -> ModuleBasis:
        unit = torch.stack([d / d.norm() for d in updates[name]])
        return leading(unit - unit.mean(0), module)

    return each_module(basis, change, "centred")


def leading(stack: torch.Tensor, like: ModuleBasis) -> ModuleBasis:
    """Return the truncated HOSVD of a dense `stack` (n, out, in), of the sizes of `like`: these modules are small."""
    out, inner = torch.einsum("nij,nkj->ik", stack, stack), torch.einsum("nij,nik->jk", stack, stack)
    U, V = (torch.linalg.eigh(moment)[1].flip(1) for moment in (out, inner))
    return ModuleBasis(U=U[:, : like.k_out].float().contiguous(), V=V[:, : like.k_in].T.float().contiguous())


def preconditioned(basis: SubspaceBasis, how: str, ridge: float = 0.0) -> SubspaceBasis:
    """Return a basis in which a step moves each entry of the core in proportion to the fleet's use of it.

    Args:
        basis: one with `core_rms`.
        how: ``rms``: entry by entry, to be trained with ``coefficients="directions"``, one direction per entry.
            ``sides``: the best product of one factor per output and one per input direction, put into U and V, so that
            `core` is trained.
        ridge: added to the RMS, as a share of its own root mean square.

    The root mean square of all factors is 1, so that a step's size stays what it was.
    """

    def change(name: str, module: ModuleBasis) -> ModuleBasis:
        assert module.core_rms is not None
        use = module.core_rms.double()
        use = use + ridge * use.square().mean().sqrt()
        if how == "rms":
            use = use / use.square().mean().sqrt()
            G = torch.diag(use.flatten()).reshape(-1, *use.shape)
            return replace(module, G=G.float().contiguous(), cores=None)
        out, inner = use.square().mean(1).sqrt(), use.square().mean(0).sqrt()
        out, inner = out / out.square().mean().sqrt(), inner / inner.square().mean().sqrt()
        return ModuleBasis(U=(module.U.double() * out).float(), V=(module.V.double() * inner[:, None]).float())

    return each_module(basis, change, f"preconditioned by {how}, ridge {ridge:g}")


def scaled_inputs(state: Mapping[str, torch.Tensor], roots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a LoRA's state dict with every A replaced by A·Σ^{1/2}.

    Args:
        state: the LoRA's.
        roots: module → Σ^{1/2} (in, in) of its inputs.
    """
    made = {}
    for key, value in state.items():
        if key.endswith("lora_A.weight"):
            name = next(name for name in roots if f".{name}." in key)
            made[key] = (value.double() @ roots[name].double()).float().contiguous()
        elif key.endswith("lora_B.weight"):
            made[key] = value
    return made


def from_activation_metric(basis: SubspaceBasis, roots: Mapping[str, torch.Tensor], back: str) -> SubspaceBasis:
    """Return a basis built from `scaled_inputs`, with V brought back to the plain metric.

    ``as-is``: V itself; ``inverse``: V·Σ^{-1/2}; ``forward``: V·Σ^{1/2}. The last two orthonormalised again, in order.
    """

    def change(name: str, module: ModuleBasis) -> ModuleBasis:
        V = module.V.double()
        if back != "as-is":
            root = roots[name].double()
            V = V @ (torch.linalg.inv(root) if back == "inverse" else root)
            V = torch.linalg.qr(V.T)[0].T
        return ModuleBasis(U=module.U, V=V.float().contiguous())

    return each_module(basis, change, f"activation metric, {back}")


def input_roots(
    model: Any, task_inputs: list[tuple[torch.Tensor, torch.Tensor]], ridge: float = 1e-3
) -> dict[str, Any]:
    """Return per adapted module Σ^{1/2} and the leading principal axes of its inputs over real tokens.

    Args:
        model: the top layers.
        task_inputs: (hidden, lengths) of unlabelled examples.
        ridge: added to Σ, as a share of its mean eigenvalue.
    """
    sums: dict[str, torch.Tensor] = {}
    hooks = []

    def watch(name: str, module: torch.nn.Module) -> None:
        def note(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            real = torch.arange(inputs[0].shape[1]) < current[0][:, None]
            x = inputs[0][real].double()
            sums[name] = sums.get(name, 0) + x.T @ x

        hooks.append(module.register_forward_pre_hook(note))

    for name, module in model.named_modules():
        if name.endswith(ADAPTED):
            watch(name, module)
    current: list[torch.Tensor] = [torch.empty(0)]
    with torch.no_grad():
        for hidden, lengths in task_inputs:
            current[0] = lengths
            model(hidden, lengths)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, total in sums.items():
        values, axes = torch.linalg.eigh(total / total.diagonal().mean())
        values = values.clamp_min(0) + ridge
        found[name] = {"root": (axes * values.sqrt()) @ axes.T, "axes": axes.flip(1).T.float().contiguous()}
    return found
