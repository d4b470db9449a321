"""Say which fields of a new adapter's configuration have no effect, and what happens instead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._io.warn import warn_caller
from ..basis import SubspaceBasis
from ..basis.module_store import describe_k, names_of
from .config import Default, SubspaceConfig
from .patterns import pattern_for

SEED = SubspaceConfig.seed


def warn_of_ignored_fields(config: SubspaceConfig, basis: SubspaceBasis, names: Mapping[str, str]) -> None:
    """Warn, once for all, of fields that do nothing with the others, or do less than they say.

    Args:
        config: of a new adapter; one that was saved is not looked at.
        basis: its basis.
        names: target module → its name in the basis.
    """
    said = [*_sizes(config, basis, names), *_numbers(config)]
    if config.basis_revision is not None and config.basis_revision != basis.revision and _is_local(basis, config):
        said.append(
            f"basis_revision={config.basis_revision!r} has no effect: it is no Hub repository, and taken as it is"
        )
    if said:
        warn_caller(f"SubspaceConfig: {'. '.join(said)}.")


def _sizes(config: SubspaceConfig, basis: SubspaceBasis, names: Mapping[str, str]) -> list[str]:
    """Return what is to be said of numbers of directions that no module has."""
    shapes, said = basis.shapes(), []
    sides = {name: (shapes[key]["k_out"], shapes[key]["k_in"]) for name, key in names.items()}
    by_pattern: dict[str | None, list[str]] = {}
    for name in names:
        by_pattern.setdefault(pattern_for(config.rank_pattern, name), []).append(name)
    for pattern, modules in by_pattern.items():
        k = config.k if pattern is None else config.rank_pattern[pattern]
        asked = config.sizes.asked(modules[0])
        # more than the larger side has, or of two sizes one that its side does not have
        beyond = max if isinstance(k, int) else min
        if asked is not None and all(
            beyond(has - most for has, most in zip(sides[name], asked, strict=True)) < 0 for name in modules
        ):
            has = describe_k({name: shapes[names[name]] for name in modules})
            field = f"k={k}" if pattern is None else f"rank_pattern[{pattern!r}]={k}"
            where = "these modules have no more" if config.generated else "the basis has no more"
            said.append(f"{field}: {where} than {has}, which is used")
    if config.k is not None and None not in by_pattern:
        said.append(f"k={config.k} has no effect: rank_pattern gives every module its own")
    said += _own(config, shapes, names)
    if config.coefficients == "factor":
        ranks = {
            min(config.sizes.used(name, shapes[key]["k_out"], shapes[key]["k_in"])) for name, key in names.items()
        }
        # the default is nothing that was asked for
        if config.r > max(ranks) and not isinstance(config.r, Default):
            size = f"{max(ranks)}" if len(ranks) == 1 else f"{min(ranks)}…{max(ranks)}"
            said.append(f"r={config.r}: the cores are of rank {size} at most, which is used")
    return said


def _own(config: SubspaceConfig, shapes: Mapping[str, Mapping[str, int]], names: Mapping[str, str]) -> list[str]:
    """Return what is to be said of own directions: more than fit, patterns without a module, where there are none."""
    said, sizes = [], config.sizes
    asked = {name: sizes.extra_asked(name) for name in names}
    most = {name: sizes.extra_of(name, shapes[key]) for name, key in names.items()}
    if cut := [name for name, rank in asked.items() if rank > most[name]]:
        said.append(
            f"extra_rank={asked[cut[0]]}: {names_of(cut, 3)} has no more than {most[cut[0]]} dimensions on one side,"
            " which is used"
        )
    reached = {pattern_for(config.extra_rank_pattern, name) for name in names}
    if unused := [pattern for pattern in config.extra_rank_pattern if pattern not in reached]:
        said.append(f"extra_rank_pattern: no adapted module is called {names_of(unused, 3)}, which has no effect")
    if config.extra_rank and names and not any(rank == config.extra_rank for rank in asked.values()):
        said.append(f"extra_rank={config.extra_rank} has no effect: extra_rank_pattern gives every module its own")
    return said


def _numbers(config: SubspaceConfig) -> list[str]:
    said = []
    if not isinstance(config.r, Default) and config.coefficients != "factor":
        said.append(
            f"r={config.r} has no effect with coefficients={config.coefficients!r}, whose size follows from k: give k,"
            " or coefficients='factor'"
        )
    drawn = config.basis == "random" or (config.generated and config.coefficients == "directions")
    if config.seed != SEED and not drawn:
        what = "is read, not drawn" if not config.generated else "is made of the base model's weights"
        said.append(f"seed={config.seed} has no effect: the basis {what}")
    if not config.init_weights and config.start != "zero":
        said.append(
            f"start={config.start!r} has no effect with init_weights=False, which draws small random coefficients"
        )
    return said


def _is_local(basis: SubspaceBasis, config: SubspaceConfig) -> bool:
    given: Any = config.basis
    if isinstance(given, SubspaceBasis) or config.generated:
        return basis.revision is None
    return given is not None and Path(str(given)).expanduser().is_dir()
