"""Say which arguments of a build have no effect with its builder, and what happens instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .._io.warn import warn_caller
from ..basis import ModuleBasis, SubspaceBasis
from ..basis.module_store import names_of
from .options import DEFAULT_ADD, DEFAULT_K, BuildOptions, CompleteOptions, UpdateOptions


def warn_of_ignored(options: BuildOptions, *, sources: Any, like: Any, base_model: Any) -> None:
    """Warn, once for all, of arguments of `build_basis` that decide nothing.

    Args:
        options: as they were given.
        sources: as in `build_basis`, as are the others.
        like: see there.
        base_model: see there.
    """
    given = set(options.changed())
    said = (
        _of_a_control(options, given, sources, like, base_model)
        if options.controls
        else _of_a_fleet(options, given, like)
    )
    _warn("build_basis", said)


def _of_a_fleet(options: BuildOptions, given: set[str], like: Any) -> list[str]:
    said = []
    builder = f"with the builder {options.builder!r}"
    if "target_modules" in given:
        said.append(
            f"target_modules= (--target-modules) has no effect {builder}: a basis has all modules that its sources"
            " adapt. A task on it names fewer in its own target_modules"
        )
    if like is not None:
        said.append(f"like= (--like) has no effect {builder}: modules and sizes are those of the sources")
    if "seed" in given and options.complete != "random":
        said.append(f"seed= (--seed) has no effect {builder}, which draws nothing at random")
    if options.builder == "eigenlora":
        if "alternations" in given:
            said.append(f"alternations= (--alternations) has no effect {builder}: its factors are taken as they are")
        if options.leave_one_out:
            said.append(f"leave_one_out= (--leave-one-out) has no effect {builder}: that is measured for 'adapters'")
    return said


def _of_a_control(options: BuildOptions, given: set[str], sources: Any, like: Any, base_model: Any) -> list[str]:
    builder, said = f"with the builder {options.builder!r}", []
    for name in ("weights", "alternations"):
        if name in given:
            said.append(f"{name}= (--{name}) has no effect {builder}, which takes nothing of any source's updates")
    if options.keep_cores:
        said.append(f"keep_cores= (--keep-cores) has no effect {builder}: it has no sources")
    if options.leave_one_out:
        said.append(f"leave_one_out= (--leave-one-out) has no effect {builder}: it has no sources")
    if "seed" in given and options.builder == "base-weights" and not options.directions:
        said.append(f"seed= (--seed) has no effect {builder}: singular vectors are not drawn")
    where = "like= (--like)" if like is not None else "base_model= (--base-model)" if base_model is not None else ""
    if like is not None:
        for name, flag in (("k", "-k"), ("k_in", "--k-in"), ("k_pattern", "--k-pattern")):
            if name in given:
                said.append(f"{name}= ({flag}) has no effect: the sizes are those of like= (--like)")
    if where and sources is not None:
        said.append(f"the sources have no effect {builder}: the modules are those of {where}")
    unread = bool(where) or sources is None
    for name in ("skip_bad", "allow_bin"):
        if name in given and unread:
            said.append(f"{name}= (--{name.replace('_', '-')}) has no effect: no source is read")
    if "target_modules" in given and (base_model is None or (like is not None and options.builder == "random")):
        said.append(
            "target_modules= (--target-modules) has no effect: they are names of base_model= (--base-model), and the"
            f" modules are those of {'like= (--like)' if like is not None else 'the sources'}"
        )
    return said


def warn_of_ignored_in_update(options: UpdateOptions, *, cores: bool) -> None:
    """Warn of options of `update_basis` that decide nothing.

    Args:
        options: as they were given.
        cores: whether tasks' cores were given.
    """
    said = []
    if options.refit is not None:
        for name in ("add", "add_in"):
            if name in options.changed():
                said.append(
                    f"{name}= (--{name.replace('_', '-')}) has no effect with k= (-k), which fits all directions from"
                    " scratch"
                )
    elif cores:
        said.append("cores= has no effect without k=: where a basis grows, its tasks lose nothing")
    _warn("update_basis", said)


def warn_of_ignored_in_completion(options: CompleteOptions, base_model: Any, basis: SubspaceBasis) -> None:
    """Warn of arguments of `complete_basis` that decide nothing."""
    said = []
    k, k_in = options.size
    if all(
        shape["k_out"] >= min(k, shape["out"]) and shape["k_in"] >= min(k_in, shape["in"])
        for shape in basis.shapes().values()
    ):
        # a fact, and no setting
        has = basis.describe_k().removeprefix("k=")
        said.append(f"k={k} has no effect: every module has as many directions already, {has}")
    elif most := _beyond(k, k_in, basis.shapes().values()):
        said.append(f"k={k}: no module has more than {most} directions, its width")
    if options.with_ == "random" and base_model is not None:
        said.append("base_model= (--base-model) has no effect with random directions")
    if options.with_ != "random" and "seed" in options.changed():
        said.append("seed= (--seed) has no effect with the base weights' directions, which are not drawn")
    _warn("complete_basis", said)


def _beyond(k: int, k_in: int, shapes: Iterable[Mapping[str, int]]) -> int | None:
    """Return the width of the widest module where it has fewer directions than are asked for on both sides."""
    shapes = list(shapes)
    most = max(max(shape["out"], shape["in"]) for shape in shapes)
    return most if min(k, k_in) > most else None


def warn_of_width(options: BuildOptions, shapes: Iterable[Mapping[str, int]]) -> None:
    """Warn where every module of a basis that is built is narrower than what was asked for."""
    k = options.k if options.k_in is None or options.k is not None else DEFAULT_K
    if isinstance(k, int) and (most := _beyond(k, options.k_in or k, shapes)):
        warn_caller(f"k={k}: no module has more than {most} directions, its width.")


def fewer_directions(
    modules: Mapping[str, ModuleBasis], options: BuildOptions | UpdateOptions, own: Mapping[str, int] | None = None
) -> dict[str, Any] | None:
    """Return what a basis's record says where its fleet spans fewer directions than were asked for; else None.

    Args:
        modules: the basis's.
        options: of its build or its update. A share of energy, or the default, asks for no number.
        own: module → directions of both sides, where it has another k.
    """
    k = options.k if options.k_in is None or options.k is not None else DEFAULT_K
    usual = (k, options.k_in or k) if isinstance(k, int) else None
    asked = {name: usual for name in modules if usual is not None} | {name: (n, n) for name, n in (own or {}).items()}
    short = {
        name: [modules[name].k_out, modules[name].k_in]
        for name, (k_out, k_in) in asked.items()
        if modules[name].k_out < min(k_out, modules[name].out_features)
        or modules[name].k_in < min(k_in, modules[name].in_features)
    }
    most = max((asked[name] for name in short), default=(0, 0))
    return {"asked": list(most), "modules": short} if short else None


def warn_of_few_added(options: UpdateOptions, old: SubspaceBasis, new: SubspaceBasis, *, absorbing: bool) -> None:
    """Warn where no module of a basis that grew got as many directions as were asked for, or too few for its tasks.

    Args:
        options: of the update.
        old: the basis before.
        new: the basis that grew.
        absorbing: whether tasks on the old basis were absorbed.
    """
    if options.refit is not None or not options.bounded or not isinstance(options.growth, int):
        return
    if absorbing:
        facts = new.info["update"]["modules"]
        short = [
            name
            for name, each in facts.items()
            if any(had < needed for had, needed in zip(each["added"], each.get("needed") or (0, 0), strict=True))
        ]
        if short:
            most = max(max(facts[name]["needed"]) for name in short)
            warn_caller(
                f"add={options.growth}: the tasks' own directions need up to {most} beside the basis's, and in"
                f" {len(short)} modules ({names_of(short, 3)}) only the strongest are absorbed. Leave add= (--add) out"
                " to absorb all: else such tasks keep their own directions when they are migrated."
            )
        return
    if options.add in (None, DEFAULT_ADD):
        return
    before, after = old.shapes(), new.shapes()
    most = max(after[name][side] - before[name][side] for name in before for side in ("k_out", "k_in"))
    if most < options.growth:
        warn_caller(f"add={options.growth}: the new adapters span no more than {most} directions beside the basis's.")


def warn_of_fewer(found: Mapping[str, Any] | None, count: int) -> None:
    """Warn of what `fewer_directions` found.

    Args:
        found: its result.
        count: modules of the basis.
    """
    if found is None:
        return
    sizes = sorted({side for each in found["modules"].values() for side in each})
    has = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    k, k_in = found["asked"]
    asked = f"k={k}" if k == k_in else f"k={k}, k_in={k_in}"
    warn_caller(
        f"{asked}: the fleet spans fewer directions in {len(found['modules'])} of {count} modules"
        f" ({names_of(found['modules'], 3)}), which get {has}. More sources span more; complete= (--complete)"
        " fills the basis up."
    )


def _warn(function: str, said: Iterable[str]) -> None:
    text = ". ".join(said)
    if text:
        warn_caller(f"{function}: {text}.")
