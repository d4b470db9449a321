"""Where a task's modules go on another basis: the transfers of its cores, its configuration, and the drift."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch

from ..basis import SubspaceBasis
from ..basis.module_store import names_of
from ..basis.transfer import Transfer, norm_of_sum
from ..errors import BasisMismatchError, SubspaceError
from ..tasks.read import SavedTask
from ..tuner import SubspaceConfig
from ..tuner.base_check import PROBED_SIDE
from ..tuner.patterns import exact_pattern

# an own part counts as inside a basis where this share of its norm, or less, lies outside: both are stored in float32
INSIDE = 1e-6


def moves_of(old: SavedTask, new: SubspaceBasis, what: str) -> dict[str, Transfer]:
    """Compute the transfer of every module of a task from the part of its basis that it uses to a new basis.

    Args:
        old: The task.
        new: The basis to migrate to.
        what: The task, for messages.

    Returns:
        Module → transfer to the whole of the new basis's module.

    Raises:
        BasisMismatchError: The new basis lacks a module, or has it in another shape.
    """
    new = new.named(old.config.basis_names or {})
    absent = [name for name in old.cores if new.find(name) is None]
    if absent:
        raise BasisMismatchError(
            f"{what}: {len(absent)} of its modules are not in the new basis, such as {names_of(absent, 3)}; it has"
            f" {names_of(new, 3)}. Migrate it to a version of its own basis."
        )
    return {name: Transfer(old.modules[name], new[str(new.find(name))], name) for name in old.cores}


def moved_config(config: SubspaceConfig, new: SubspaceBasis, moves: Mapping[str, Transfer]) -> SubspaceConfig:
    """Make the task's configuration on the new basis."""
    moved = copy.deepcopy(config)
    moved.basis, moved.basis_revision, moved.basis_fingerprint = new, new.revision, new.fingerprint
    moved.basis_modules = moved.save_basis = moved.bundle = moved.loaded_from = None
    if not all(move.leading for move in moves.values()):
        # the leading k of other directions would be another choice than the one that was made
        moved.k, moved.rank_pattern = None, {}
    if not all(_probed_alike(move) for move in moves.values()):
        moved.base_probe = None
    return moved


def plain_config(task: SavedTask) -> SubspaceConfig:
    """Return a task's configuration with `core` coefficients, and as many own directions as it has.

    Args:
        task: Its own directions may be more or fewer than its configuration says, as those of a bundle's tasks.
    """
    config = copy.deepcopy(task.config)
    config.coefficients, config.mean_gain = "core", "none"
    ranks = {name: B.shape[1] for name, (B, _) in task.own.items()}
    if len(set(ranks.values())) == 1 and len(ranks) == len(task.cores):
        config.extra_rank, config.extra_rank_pattern = next(iter(ranks.values())), {}
    else:
        counts = {name: ranks.get(name, 0) for name in task.cores}
        config.extra_rank, config.extra_rank_pattern = 0, exact_pattern(counts, 0)
    return config


def check_leading(old: SavedTask, moves: Mapping[str, Transfer], what: str) -> None:
    """Raise `SubspaceError` where a new basis does not begin with all that a task uses of its old one, to the bit."""
    for name, move in moves.items():
        changed, used = None if move.leading else "basis", move.old
        if move.leading:
            part = move.new.truncate(used.k_out, used.k_in)
            if old.config.mean_gain != "none" and not _same(used.M, part.M):
                changed = "mean core"
            if old.config.coefficients == "directions" and not _same(used.G, part.G):
                changed = "set of direction tensors"
        if changed is not None:
            raise SubspaceError(
                f"{what}: with pad=False (--no-pad) its tensors stay, on a basis that begins with its own, and module"
                f" {name!r} of the new one has another {changed}. Leave that out: the task is then moved to the"
                " directions that there are, within max_drift= (--max-drift)."
            )


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def keep_sizes(config: SubspaceConfig, moves: Mapping[str, Transfer]) -> None:
    """Let a configuration use as many directions of a larger basis as the task has, so that its tensors stay.

    A `k` suffices where all modules have one size; else patterns do, for ends of names where these decide.

    Args:
        config: on the new basis; changed.
        moves: Module → transfer from the part of the old basis that the task uses.
    """
    sizes = {name: (move.old.k_out, move.old.k_in) for name, move in moves.items()}
    now = {name: config.sizes.used(name, move.new.k_out, move.new.k_in) for name, move in moves.items()}
    if now == sizes:
        return
    config.k, config.rank_pattern = None, {}
    if len(set(sizes.values())) == 1 and len(set(next(iter(sizes.values())))) == 1:
        config.k = next(iter(sizes.values()))[0]
        return
    by_end: dict[str, set[tuple[int, int]]] = {}
    for name, size in sizes.items():
        by_end.setdefault(name.rpartition(".")[2], set()).add(size)
    ends = {name: name.rpartition(".")[2] for name in sizes}
    # the end of a name where it decides, else the name
    found = {end if len(by_end[end]) == 1 else name: sizes[name] for name, end in ends.items()}
    config.rank_pattern = {key: a if a == b else [a, b] for key, (a, b) in exact_pattern(found).items()}


def inside(old: SavedTask, moves: Mapping[str, Transfer]) -> dict[str, torch.Tensor]:
    """Return the modules whose own directions lie in the new basis, with the core that they are there.

    Args:
        old: The task.
        moves: Module → transfer to the part of the new basis that the task uses.

    Returns:
        Module → ``U'ᵀ B A V'ᵀ`` (k_out', k_in') float64, of the own parts ``B A`` that are not zero and of which the
        basis leaves no more than rounding.
    """
    found = {}
    for name, (B, A) in old.own.items():
        U, V = moves[name].new.U.double(), moves[name].new.V.double()
        core = (U.T @ B.double()) @ (A.double() @ V.T)
        size = norm_of_sum([(B, A)])
        if size and norm_of_sum([(B, A), (-(U @ core), V)]) <= INSIDE * size:
            found[name] = core
    return found


def keep_own(config: SubspaceConfig, task: SavedTask, absorbed: Collection[str]) -> list[str]:
    """Let a configuration have the own directions that are left where others have become part of the core.

    Those that are zero go along with the absorbed ones where no others are left: nothing is lost with them.

    Args:
        config: on the new basis; changed.
        task: The task before.
        absorbed: The modules whose own part is in the core now.

    Returns:
        The modules that keep theirs.
    """
    rest = [name for name in task.own if name not in absorbed]
    if not any(all(side.any() for side in task.own[name]) for name in rest):
        config.extra_rank, config.extra_rank_pattern = 0, {}
        return []
    sizes = config.sizes
    counts = {name: sizes.extra_asked(name) if name in rest else 0 for name in task.cores}
    config.extra_rank_pattern = exact_pattern(counts, config.extra_rank)
    return rest


def used_moves(moved: SubspaceConfig, moves: Mapping[str, Transfer]) -> dict[str, Transfer]:
    """Restrict every module's transfer to the part of the new basis that the task uses."""
    return {name: Transfer(move.old, moved.sizes.part(name, move.new), name) for name, move in moves.items()}


def drifts_of(
    old: SavedTask, now: SavedTask, moves: Mapping[str, Transfer], what: str, max_drift: float
) -> tuple[dict[str, float], float]:
    """Measure which share of ΔW's norm a migration changes.

    Args:
        old: The task before.
        now: The task afterwards, its cores and own directions as they are stored.
        moves: Module → transfer to the part of the new basis that the task uses.
        what: The task, for messages.
        max_drift: Largest share that may change in a module.

    Returns:
        Module → share, and the share over all modules together.

    Raises:
        SubspaceError: A module drifts by more than `max_drift`.
    """
    drift, lost, total = {}, 0.0, 0.0
    for name, core in old.cores.items():
        own, own_now = old.own.get(name), now.own.get(name)
        if own is not None and own_now is not None and all(map(torch.equal, own, own_now)):
            own_now = own
        drift[name] = moves[name].drift(core, now.cores[name], own, own_now)
        square = moves[name].size(core, own) ** 2
        lost, total = lost + drift[name] ** 2 * square if square else lost, total + square
    worst = max(drift, key=drift.__getitem__)
    if drift[worst] > max_drift:
        raise SubspaceError(
            f"{what}: on the new basis module {worst!r} would change by {drift[worst]:.3g} of its update's norm, more"
            f" than max_drift={max_drift:g}. Grow the basis with `update_basis(…, add=…)`"
            " (`subspace-peft update --add`), which loses nothing, give it a larger k, or allow more with"
            " max_drift= (--max-drift)."
        )
    return drift, (lost / total) ** 0.5 if total else 0.0


def _probed_alike(move: Transfer) -> bool:
    sides = ((move.old.k_out, move.new.k_out), (move.old.k_in, move.new.k_in))
    return move.leading and all(old == new or old >= PROBED_SIDE for old, new in sides)
