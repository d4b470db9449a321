"""`update_basis`: a new version of a basis, grown by what new adapters need and tasks on the old one do not lose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .._untrusted import is_whole
from ..basis import ModuleBasis, SubspaceBasis
from ..basis.lineage import next_version
from ..basis.reference import same_model
from ..basis.transfer import Transfer
from ..errors import SubspaceError
from .beside import exact_beside, frame, grow, refit
from .factors import Factors
from .fleet import Fleet, gather
from .hosvd import Compressed, Pair
from .memory_plan import GUESSED_K, Plan, parse_size
from .reading import Reader
from .record import source_entry
from .sources import Source
from .streaming import ModuleStack, compress

WEIGHTS = ("equal", "norm")


def update_basis(
    basis: SubspaceBasis | str | Path,
    sources: Iterable[Any],
    *,
    add: int | float = 8,
    add_in: int | None = None,
    k: int | None = None,
    k_in: int | None = None,
    cores: Iterable[Mapping[str, torch.Tensor]] = (),
    max_drift: float | None = None,
    weights: str = "equal",
    alternations: int = 10,
    skip_bad: bool = False,
    partial: bool = False,
    allow_bin: bool = False,
    base_model: nn.Module | None = None,
    max_memory: int | str = "2GB",
    token: str | bool | None = None,
    progress: bool = True,
) -> SubspaceBasis:
    """A new version of a basis, for further adapters; `convert.migrate_task` carries the old one's tasks over.

    By default the new U and V begin with the old ones, bit for bit, and go on with directions orthogonal to them: the leading ones of
    what the old basis leaves of the new adapters' updates (HOSVD, then JD-Full's alternations with the old directions held). Tasks then
    lose nothing: their cores are padded with zeros. With `k` both are fitted anew within k directions, for the old sources' stored cores, the
    tasks' `cores` and the new adapters alike: the basis stays small, and tasks drift.

    The mean core M stays the one that the old basis's tasks use (with `k`: its projection), as do direction tensors G and the spectra, which
    are those of the first version's fleet. Stored source cores are joined by the new sources', of which an old source's say what the old
    basis kept of it. Modules that no new adapter changes stay as they are.

    Args:
        basis: a basis, its folder or its Hub id.
        sources: the new adapters, as in `build_basis`. One that is in the basis already (by sha256) is a bad source.
        add: at most so many new directions per side and module, or the share of the new adapters' energy in (0, 1) that old and new
            directions have to keep together in every module.
        add_in: on the input side, where that differs.
        k, k_in: instead of growing, fit so many directions anew.
        cores: with `k`: per task of the old basis its module → core (k_out, k_in) in units of ΔW, such as ``read_task(task).cores``. Each
            counts as much as a new adapter.
        max_drift: with `k`: refuse a basis in which a stored source's core or one of `cores` loses more than this share of its norm in
            a module.
        weights, alternations, skip_bad, partial, allow_bin, base_model, max_memory, token, progress: as in `build_basis`. New adapters
            that leave modules of the basis alone need no `partial`.

    Returns:
        A basis in memory. Its ``info`` has ``version``, ``lineage`` (the fingerprints it came from) and ``update``: the arguments, and per module
        how many directions were added and what the old and the new basis keep of the new adapters. ``measured`` is of the new adapters.

    Raises:
        SourceError: bad sources; lists all of them.
        SubspaceError: arguments that clash; too little memory; more drift than `max_drift`; nothing says what `k` has to keep.
    """
    _check(add, add_in, k, k_in, weights, max_drift)
    memory = parse_size(max_memory)
    old = basis if isinstance(basis, SubspaceBasis) else SubspaceBasis.from_pretrained(basis, token=token)
    known = old.info.get("sources") or []
    fleet = gather(
        sources, skip_bad=skip_bad, partial=partial, token=token, progress=progress, allow_bin=allow_bin, base_model=base_model,
        judge=lambda source: _misfit(source, old), taken=[str(entry.get("name")) for entry in known],
    )  # fmt: skip
    names = {str(old.find(name)): name for name in fleet.modules}
    changed = {
        key: name
        for key, name in names.items()
        if any(name in source.keys and source.norms[name] > 0 for source in fleet.sources)
    }
    fleet = replace(fleet, modules=list(changed.values()))
    shapes = old.shapes()
    most = max(max(shapes[key]["k_out"], shapes[key]["k_in"]) for key in changed)
    more = GUESSED_K if isinstance(add, float) else max(add, add_in or 0)
    plan = Plan(fleet, "adapters", max(most + more, k or 0, k_in or 0), None, weights, memory)
    protected = [_by_basis_name(old, each) for each in cores]
    wanted = None if k is None else (k, k_in or k)
    modules: dict[str, ModuleBasis] = {}
    facts: dict[str, dict[str, Any]] = {}
    reader = Reader(fleet.sources, plan.held)
    bar = tqdm(total=len(changed), desc="updating", unit="module", delay=2, disable=not progress)
    by_name = {name: key for key, name in changed.items()}
    with bar:
        for group in reader.groups(fleet.modules):
            reader.hold(group)
            for name in group:
                key = by_name[name]
                held = _Old(
                    key,
                    _checked(key, old[key], len(known)),
                    _votes(known),
                    [each[key] for each in protected if key in each],
                )
                modules[key], facts[key] = _update_module(
                    plan, reader, name, held, add, add_in, wanted, alternations
                )  # fmt: skip
                bar.update()
    drifts = {key: each.pop("drift") for key, each in facts.items()}
    squares = [each.pop("squares") for each in facts.values()]
    worst = max(drifts, key=drifts.__getitem__)
    if max_drift is not None and drifts[worst] > max_drift:
        raise SubspaceError(
            f"Within k={k} module {worst!r} would lose {drifts[worst]:.3g} of the norm of what the old basis holds, more than "
            f"max_drift={max_drift:g}. Give a larger k, or grow with add= instead, which loses nothing."
        )
    untouched = {
        key: _with_absent(_checked(key, old[key], len(known)), len(fleet.sources)) for key in old if key not in modules
    }
    arguments = {
        "add": add, "add_in": add_in, "k": k, "k_in": k_in, "tasks": len(protected), "max_drift": max_drift, "weights": weights,
        "alternations": alternations, "partial": partial, "allow_bin": allow_bin,
    }  # fmt: skip
    everything = {key: modules.get(key) or untouched[key] for key in old}
    info = _info(old, fleet, names, arguments, everything, facts, drifts if k is not None else {})
    if k is not None:
        info["sources"][: len(known)] = [_after(entry, i, squares) for i, entry in enumerate(known)]
    return SubspaceBasis(everything, info)


@dataclass(frozen=True, eq=False)
class _Old:
    """A module of the old basis: its tensors, the votes of its sources, and the tasks' cores that count as well."""

    name: str
    module: ModuleBasis
    votes: list[float]
    tasks: list[torch.Tensor]


def _update_module(
    plan: Plan,
    reader: Reader,
    name: str,
    old: _Old,
    add: int | float,
    add_in: int | None,
    k: tuple[int, int] | None,
    alternations: int,
) -> tuple[ModuleBasis, dict[str, Any]]:
    task, fixed = plan.module(name), frame(old.module)
    pair: Pair | None = None
    width = task.width
    while pair is None:
        if task.exact:
            pairs = [reader.pair(i, name) for i in task.members]
            updates = [
                Factors(B.double() * scale, A.double()) for (B, A), scale in zip(pairs, task.scales, strict=True)
            ]
            compressed = exact_beside(updates, task.weights, fixed)
        else:
            stack = ModuleStack(
                lambda place: reader.pair(task.members[place], name),
                task.ranks, task.shape, task.scales, task.weights, task.energy, keep=plan.keep,
            )  # fmt: skip
            compressed = compress(stack, width, leading=task.leading, bound=False, fixed=fixed)
        if k is None:
            pair = grow(compressed, old.module, add, add_in, alternations)
        else:
            pair = refit(_joined(compressed, old), k, alternations)
        # a share of energy takes as many directions as it takes
        width *= 2
    a, b = old.module.k_out, old.module.k_in
    kept, kept_before = 0.0, 0.0
    found = torch.zeros(len(plan.fleet.sources), pair.U.shape[1], pair.V.shape[0], dtype=torch.float64)
    shares: list[float | None] = [None] * len(plan.fleet.sources)
    for places, cores in compressed.cores(compressed.scales, pair.u, pair.v):
        for place, core in zip(places, cores, strict=True):
            i, square = task.members[place], float(core.square().sum())
            found[i], shares[i] = core, min(1.0, square / task.norms[place] ** 2)
            kept += task.weights[place] ** 2 * square
    for _, cores in compressed.cores(
        compressed.weights,
        torch.eye(compressed.out.Q.shape[1], a, dtype=torch.float64),
        torch.eye(compressed.inner.Q.shape[1], b, dtype=torch.float64),
    ):
        kept_before += float(cores.square().sum())
    votes = torch.zeros(len(plan.fleet.sources), dtype=torch.float64)
    votes[task.members] = torch.tensor(task.votes, dtype=torch.float64)
    module, drift = _joined_module(old, pair, found, votes)
    squares = [
        (float(was.double().square().sum()), float(now.double().square().sum()))
        for was, now in _stored(old.module, module)
    ]
    return module, {
        "added": [pair.U.shape[1] - a, pair.V.shape[0] - b],
        "kept_before": min(1.0, kept_before / compressed.total), "kept": min(1.0, kept / compressed.total),
        "numerics": "streamed" if compressed.passes else "exact", "drift": drift, "shares": shares, "squares": squares,
    }  # fmt: skip


def _joined(compressed: Compressed, old: _Old) -> Compressed:
    """The new updates and what the old basis holds, its sources' stored cores and its tasks', all of norm 1."""
    cores = [core.double() for core in old.tasks]
    weights = [1.0 / max(float(core.norm()), 1e-300) for core in cores]
    if old.module.cores is not None:
        for core, vote in zip(old.module.cores.double(), old.votes, strict=True):
            if (size := float(core.norm())) > 0:
                cores.append(core)
                weights.append(vote**0.5 / size)
    if not cores:
        raise SubspaceError(
            f"Module {old.name!r}: with k= the directions are fitted anew, and nothing says what the old basis's tasks need: it does not keep "
            "its sources' cores. Pass the tasks' cores with cores= (--tasks), or grow with add=, which loses nothing."
        )
    parts, places = list(compressed.parts), len(compressed.scales)
    room = [side.Q.shape[1] for side in (compressed.out, compressed.inner)]
    left = torch.zeros(len(cores), room[0], old.module.k_in, dtype=torch.float64)
    left[:, : old.module.k_out] = torch.stack(cores)
    right = torch.eye(old.module.k_in, room[1], dtype=torch.float64).expand(len(cores), -1, -1)
    parts.append((list(range(places, places + len(cores))), left, right))
    total = compressed.total + sum(w * w * float(core.square().sum()) for w, core in zip(weights, cores, strict=True))
    return replace(
        compressed, parts=parts, total=total, scales=[*compressed.scales, *[1.0] * len(cores)],
        weights=[*compressed.weights, *weights],
    )  # fmt: skip


def _stored(old: ModuleBasis, new: ModuleBasis) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The old sources' cores, before and after."""
    return [] if old.cores is None or new.cores is None else list(zip(old.cores, new.cores, strict=False))


def _joined_module(old: _Old, pair: Pair, found: torch.Tensor, votes: torch.Tensor) -> tuple[ModuleBasis, float]:
    """The new module, and the most that a stored source's or a task's core loses of its norm."""
    module = old.module
    dtype = module.U.dtype
    bare = ModuleBasis(U=pair.U.to(dtype).contiguous(), V=pair.V.to(dtype).contiguous())
    move = Transfer(module, bare, old.name)
    stored = None if module.cores is None else move.core(module.cores)
    rms = None
    if module.core_rms is not None and (move.leading or stored is not None):
        weight = torch.tensor(old.votes, dtype=torch.float64)
        if stored is not None:
            alive = module.cores.flatten(1).any(1) if module.cores is not None else torch.ones(0)
            weight = weight * alive
            square = torch.einsum("n,noi->oi", weight, stored.square())
        else:
            square = move.core(module.core_rms.double().square()) * weight.sum()
        square = square + torch.einsum("n,noi->oi", votes, found.square())
        rms = (square / (weight.sum() + votes.sum())).sqrt()
    G = None if module.G is None else move.core(module.G)
    if G is not None and not move.leading:
        norms = G.flatten(1).norm(dim=1)[:, None, None]
        G = torch.where(norms > 1e-6, G / norms.clamp_min(1e-6), torch.zeros_like(G))
    parts = {
        "M": None if module.M is None else move.core(module.M),
        "G": G,
        "core_rms": rms,
        "cores": None if stored is None else torch.cat([stored, found]),
    }
    kept = [] if module.cores is None else [core for core in module.cores.double() if core.any()]
    drift = max((move.drift(core, move.core(core)) for core in [*kept, *old.tasks]), default=0.0)
    tensors = {key: None if value is None else value.to(dtype).contiguous() for key, value in parts.items()}
    new = replace(bare, **tensors, spectrum_out=module.spectrum_out, spectrum_in=module.spectrum_in)
    return new, drift


def _checked(name: str, module: ModuleBasis, sources: int) -> ModuleBasis:
    if module.cores is not None and len(module.cores) != sources:
        raise SubspaceError(
            f"Module {name!r} of the basis holds {len(module.cores)} sources' cores, and its config lists {sources} sources. The two do not "
            "belong together: fetch or build the basis again."
        )
    return module


def _with_absent(module: ModuleBasis, count: int) -> ModuleBasis:
    """A module that no new source changes: of those its stored cores are zero."""
    if module.cores is None:
        return module
    return replace(module, cores=torch.cat([module.cores, module.cores.new_zeros(count, module.k_out, module.k_in)]))


def _after(entry: dict[str, Any], number: int, squares: list[list[tuple[float, float]]]) -> dict[str, Any]:
    """An old source's entry when its directions were fitted anew: what is kept of its stored cores, and None where there are none."""
    pairs = [each[number] for each in squares if each]
    before = sum(was for was, _ in pairs)
    share = sum(now for _, now in pairs) / before if before else None
    kept = entry.get("energy_kept")
    return {**entry, "energy_kept": None if share is None or kept is None else kept * min(1.0, share)}


def _votes(entries: list[dict[str, Any]]) -> list[float]:
    groups = [_group(entry, -1 - number) for number, entry in enumerate(entries)]
    sizes = Counter(groups)
    return [1.0 / sizes[group] for group in groups]


def _group(entry: dict[str, Any], otherwise: int) -> int:
    group = entry.get("seed_group")
    return group if is_whole(group, least=0) else otherwise


def _misfit(source: Source, basis: SubspaceBasis) -> str | None:
    for entry in basis.info.get("sources") or []:
        if entry.get("sha256") == source.sha256:
            return f"it is in the basis already, as {entry.get('name')!r} (the same sha256). Leave it out."
    if not same_model(source.base_model, basis.base_model):
        return f"trained on {source.base_model!r}, but the basis is for {basis.base_model!r}. Use adapters of that base model."
    shapes = basis.shapes()
    for name in source.keys:
        key = basis.find(name)
        if key is None:
            return f"it adapts {name!r}, which the basis does not have. Build a basis of its own for such adapters, or leave it out."
        if source.shape(name)[:2] != (shapes[key]["out"], shapes[key]["in"]):
            return (
                f"module {name!r} is {source.shape(name)[:2]}, in the basis {(shapes[key]['out'], shapes[key]['in'])}. It belongs to "
                "another base model."
            )
    return None


def _by_basis_name(basis: SubspaceBasis, cores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    shapes, found = basis.shapes(), {}
    for name, core in cores.items():
        key = basis.find(name)
        size = None if key is None else (shapes[key]["k_out"], shapes[key]["k_in"])
        if key is None or size is None or any(n > m for n, m in zip(core.shape, size, strict=True)):
            raise SubspaceError(
                f"cores: module {name!r} has a core {tuple(core.shape)}, the basis {size or 'no such module'}. Give cores of tasks on "
                "this very basis."
            )
        # a task that uses the leading directions only
        padded = torch.zeros(size, dtype=torch.float64)
        padded[: core.shape[0], : core.shape[1]] = core
        found[key] = padded
    return found


def _check(
    add: int | float, add_in: int | None, k: int | None, k_in: int | None, weights: str, max_drift: float | None
) -> None:
    if weights not in WEIGHTS:
        raise SubspaceError(f"There is no weighting {weights!r}; choose one of {', '.join(WEIGHTS)}.")
    if isinstance(add, bool) or (isinstance(add, float) and not 0 < add < 1) or (isinstance(add, int) and add < 1):
        raise SubspaceError(
            f"add={add!r}: give a number of new directions (1, 2, …) or a share of energy to keep (0.5)."
        )
    if add_in is not None and (add_in < 0 or isinstance(add, float)):
        raise SubspaceError(
            f"add_in={add_in}: give 0 or more, and a number for add; a share decides both sides itself."
        )
    for name, value in (("k", k), ("k_in", k_in)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise SubspaceError(f"{name}={value!r}: give a number of directions, at least 1.")
    if k is None and (k_in is not None or max_drift is not None):
        raise SubspaceError(
            "k_in and max_drift are for a basis that is fitted anew: give k as well. Growing loses nothing."
        )
    if max_drift is not None and not max_drift >= 0:
        raise SubspaceError(f"max_drift={max_drift}: give 0 or more, as a share of ‖ΔW‖.")


def _info(
    old: SubspaceBasis,
    fleet: Fleet,
    names: Mapping[str, str],
    arguments: dict[str, Any],
    modules: Mapping[str, ModuleBasis],
    facts: dict[str, dict[str, Any]],
    drifts: dict[str, float],
) -> dict[str, Any]:
    by_name = {name: key for key, name in names.items()}
    info = next_version(old, modules, refitted=() if arguments["k"] is None else facts)
    known = old.info.get("sources") or []
    first = 1 + max((_group(entry, -1) for entry in known), default=-1)
    entries = []
    for i, source in enumerate(fleet.sources):
        kept = {name: (facts[by_name[name]]["shares"][i] if by_name[name] in facts else None) for name in source.norms}
        entry = source_entry(source, kept, first + fleet.groups[i])
        entries.append({**entry, "version": info["version"]})
    per_module = {}
    for key, each in facts.items():
        seen = [share for share in each.pop("shares") if share is not None]
        per_module[key] = sum(seen) / len(seen)
    random = {name: m.k_out * m.k_in / (m.out_features * m.in_features) for name, m in modules.items()}
    return {
        **info,
        "sources": [*known, *entries],
        "skipped": [*(old.info.get("skipped") or []), *fleet.skipped],
        "update": {"arguments": arguments, "modules": facts, **({"drift": drifts} if drifts else {})},
        "measured": {
            "energy_kept": sum(per_module.values()) / len(per_module),
            "energy_random": sum(random.values()) / len(random),
            "energy_kept_per_module": per_module,
            "energy_random_per_module": random,
        },
    }  # fmt: skip
