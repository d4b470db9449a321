"""The options of builds, updates and completions, each defined once: default, check, help text and flag.

Importing this module needs no torch: the command line makes its flags from these definitions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SubspaceError
from .option_checks import (
    Options,
    anything,
    base_name,
    directions_or_share,
    directions_or_share_or_none,
    names_or_none,
    number,
    one_of,
    option,
    parse_size,
    size,
    sizes_by_name,
    truth,
    truth_or_none,
    weights_or_file,
    whole,
    whole_number,
)

BUILDERS = ("adapters", "eigenlora", "random", "base-weights")
CONTROLS = ("random", "base-weights")  # builders that need no fleet
FILLINGS = ("random", "base-weights")
WEIGHTS = ("equal", "norm")
DEFAULT_K = 32
DEFAULT_ADD = 8

SKIP_BAD = ("leave bad sources out, each with its reason", truth)
ALLOW_BIN = ("read pickled adapter_model.bin too, weights_only", truth)
BASE_MODEL_NAME = ("the one base model that all sources are of, whatever name their configs give it", base_name)
ALTERNATIONS = ("most rounds after the HOSVD (default: {default})", whole(0))
SEED = ("of all random directions (default: {default})", whole())
INPUT_SIDE = ("directions on the input side, where they differ", whole(1, optional=True))


@dataclass(frozen=True, repr=False)
class BuildOptions(Options):
    """The options that decide which basis is built.

    Attributes:
        k: directions per side, or a share of energy in (0, 1) that every module has to keep; default 32.
        k_in: directions on the input side where they differ from `k`.
        k_pattern: another number of directions, on both sides, for some modules: a module's name, the end of it or a
            regular expression → k, as in PEFT's ``rank_pattern``. The page of `report_basis` shows what that keeps.
        budget: instead of `k`, how many parameters a task may train in all, Σ k_out·k_in over modules: spread over
            modules and sides to where the fleet holds most above its strength-matched null, see `budget.spread`.
            Directions that hold no more than the null are not bought, so less may be spent. Takes three to five times
            as long (`adapters` only).
        builder: ``adapters``: truncated HOSVD of the updates ΔW, free of the factors' gauge, with alternations
            (JD-Full, arXiv 2407.00066). ``eigenlora``: PCA of the raw factors (arXiv 2502.04700), for comparison.
            ``random``: zero-mean Gaussian, orthonormalised, the control. ``base-weights``: top singular vectors of the
            base model's weights (LoRA-XS, arXiv 2405.17604), the other control.
        weights: ``equal``: every source's ΔW counts as of norm 1 in every module. ``norm``: as large as it is. A
            mapping, or a JSON file of one, from source (its name or place) to a number: as often as that, of norm 1;
            others once. In each case the members of a shared-seed group share one vote.
        alternations: at most this many rounds after the HOSVD (`adapters` only).
        directions: how many direction tensors G to keep for the `directions` coefficients: the leading principal
            axes of the sources' cores, or random orthonormal ones where there is no fleet.
        keep_cores: whether the sources' own cores are stored, for starts at a named source; default: up to 64 sources.
        leave_one_out: measure how much a basis built without a source keeps of it (`adapters` only): one more build
            per shared-seed group, of the modules that are decomposed exactly; default: for fleets of 2 to 8 groups.
        complete: where the fleet spans fewer than `k` directions, fill up with ``random`` or ``base-weights`` ones,
            see `complete_basis`; None: the basis is smaller then, and nothing is made up.
        target_modules: names or ends of names of the base model's modules, or a regular expression, as in PEFT.
        seed: of the `random` builder and of random directions.
        base_model_name: Hub id or folder of the one base model that all sources are of, where their configurations
            have several names for it (copies of other owners, folders). It is recorded, with the names it replaces.
        skip_bad: leave bad sources out, with their reasons in ``basis.info["skipped"]``, instead of raising.
        partial: allow modules that only some sources adapt; each is then built from those.
        allow_bin: take pickled sources (``adapter_model.bin``) too, read with ``weights_only=True``.
    """

    k: int | float | None = option(
        None,
        f"directions per side, or a share of energy to keep (0.9); default: {DEFAULT_K}",
        anything,  # the budget comes first, see below
        flags=("-k", "--k"),
        convert=number,
    )
    budget: int | None = option(
        None,
        "instead of -k, what a task may train in all: spread to where the fleet holds most above chance",
        anything,
        convert=int,
        metavar="PARAMETERS",
    )
    k_in: int | None = option(None, *INPUT_SIDE, convert=int)
    k_pattern: Mapping[str, int] | None = option(
        None,
        "another k for some modules: a name, the end of one or a regular expression, and the number",
        sizes_by_name,
        nargs="+",
        metavar="NAME=K",
    )
    builder: str = option(
        "adapters", "where the basis comes from (default: {default})", one_of(*BUILDERS), choices=BUILDERS
    )
    weights: str | Path | Mapping[str, float] = option(  # noqa: RUF009 - it is a field
        "equal",
        "how sources count: {default} (default), norm, or a JSON file of numbers by source",
        weights_or_file,
        metavar="HOW",
    )
    alternations: int = option(10, *ALTERNATIONS, convert=int)
    directions: int = option(0, "direction tensors to keep", whole(0), convert=int, metavar="M")
    keep_cores: bool | None = option(
        None, "store the sources' own cores, for starts at a source (default: for up to 64 sources)", truth_or_none
    )
    leave_one_out: bool | None = option(
        None,
        "measure what a basis built without a source keeps of it (default: for 2 to 8 sources)",
        truth_or_none,
    )
    complete: str | None = option(
        None,
        "fill up to k where the fleet spans fewer directions (default: leave it at those)",
        one_of(*FILLINGS, optional=True),
        choices=FILLINGS,
    )
    target_modules: str | Sequence[str] | None = option(
        None, "the base model's modules", names_or_none, nargs="+", metavar="NAME"
    )
    seed: int = option(0, *SEED, convert=int)
    base_model_name: str | None = option(None, *BASE_MODEL_NAME, metavar="NAME")
    skip_bad: bool = option(False, *SKIP_BAD)
    allow_bin: bool = option(False, *ALLOW_BIN)
    partial: bool = option(False, "allow modules that only some sources adapt", truth)

    __hash__ = Options.__hash__  # dataclass's own fails for mappings and lists

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            self._check_budget()
        elif self.k is not None:
            self._store("k", directions_or_share("k", self.k))
        if isinstance(self.k, float):
            if self.builder != "adapters" or self.k_in is not None:
                raise SubspaceError("A share of energy as k is for the builder `adapters`, and decides k_in itself.")
            if self.complete is not None:
                self._refuse_filling()
        if self.complete is not None and self.controls:
            self._refuse_filling()
        if self.k_pattern is not None and (self.k_in is not None or self.complete is not None):
            other = "k_in" if self.k_in is not None else "complete"
            raise SubspaceError(
                f"k_pattern does not go with {other}: it gives some modules another number of directions, the same on"
                f" both sides. Leave {other} or k_pattern out."
            )

    def _check_budget(self) -> None:
        budget = whole_number(self.budget)
        if budget is None or budget < 1:
            raise SubspaceError(f"budget={self.budget!r}: give how many parameters a task may train in all, as 24576.")
        self._store("budget", budget)
        if any(each is not None for each in (self.k, self.k_in, self.k_pattern, self.complete)):
            given = "k_pattern" if self.k_pattern is not None else "k, k_in and complete"
            raise SubspaceError(f"A budget decides every module's k_out and k_in: leave {given} out, or the budget.")
        if self.builder != "adapters":
            raise SubspaceError(
                f"A budget is spread by what a fleet's updates hold: for the builder `adapters`, not {self.builder!r}."
            )

    def _refuse_filling(self) -> None:
        raise SubspaceError(
            f"complete={self.complete!r}: a fleet's basis is filled up to a number of directions. Give k as a"
            " number, and the builder `adapters` or `eigenlora`."
        )

    @property
    def controls(self) -> bool:
        """Whether the builder makes a control, which needs no fleet."""
        return self.builder in CONTROLS

    @property
    def size(self) -> tuple[int | float, int | None]:
        """The directions asked for, k and k_in, where no budget decides them."""
        return DEFAULT_K if self.k is None else self.k, self.k_in

    def check_inputs(self, *, sources: Any, base_model: Any) -> None:
        """Raise `SubspaceError` where the options need sources or a base model, and there are none."""
        if self.complete == "base-weights":
            check_filling_model(self.complete, base_model)
        if sources is None and not self.controls:
            raise SubspaceError(f"The builder {self.builder!r} needs source adapters; pass their folders or Hub ids.")

    def check_clusters(self) -> None:
        """Raise `SubspaceError` where a fleet that is divided into clusters cannot have these options."""
        odd = {"builder", "k_in", "k_pattern", "target_modules", "weights", "budget"}
        if clash := [name for name in self.changed() if name in odd]:
            raise SubspaceError(
                f"clusters= does not go with {clash[0]}=: clusters are of sources, each update counting as of norm 1,"
                " at one number of directions."
            )
        if isinstance(self.k, float):
            raise SubspaceError(f"k={self.k!r}: clusters are compared at a number of directions; give one from 1 on.")

    def record(self) -> dict[str, Any]:
        """Return what the basis's config says of its build; `BuildOptions(**record)` makes the same basis.

        Options that matter only where they are given are absent elsewhere.
        """
        k, k_in = (None, None) if self.budget is not None else self.size
        kept = ("builder", "weights", "alternations", "directions", "seed", "keep_cores", "partial", "allow_bin")
        rare = ("k_pattern", "budget", "complete", "leave_one_out", "base_model_name")
        return {
            "k": k,
            "k_in": k_in,
            **{name: getattr(self, name) for name in kept},
            **{name: value for name in rare if (value := getattr(self, name)) is not None},
        }


@dataclass(frozen=True, repr=False)
class UpdateOptions(Options):
    """The options that decide how a basis is updated.

    Attributes:
        add: at most so many new directions per side and module, or the share of the new adapters' energy in (0, 1)
            that old and new directions have to keep together in every module. Default: 8, and of tasks on this basis
            as many as their own directions need; where a number is given, these too are at most so many.
        add_in: on the input side, where that differs.
        k: instead of growing, fit so many directions from scratch.
        k_in: on the input side, where that differs.
        max_drift: with `k`: refuse a basis in which a stored source's core or one of `cores` loses more than this
            share of its norm in a module.
        weights: ``equal`` or ``norm``, as in `build_basis`.
        alternations: at most this many rounds after the HOSVD.
        base_model_name: Hub id or folder of the one base model that the new adapters and the basis are of, whatever
            names their configurations give it.
        skip_bad: leave bad sources out, with their reasons in ``basis.info["skipped"]``, instead of raising.
        partial: allow modules that only some of the new adapters have. Modules of the basis that none of them has are
            always allowed.
        allow_bin: take pickled sources (``adapter_model.bin``) too, read with ``weights_only=True``.
    """

    add: int | float | None = option(
        None,
        f"most new directions per side, or a share of the new adapters' energy to keep (default: {DEFAULT_ADD}; of"
        " tasks on this basis what their own directions need)",
        directions_or_share_or_none,
        convert=number,
    )
    add_in: int | None = option(None, "on the input side, where they differ", whole(0, optional=True), convert=int)
    k: int | None = option(
        None,
        "fit so many directions from scratch; tasks drift",
        whole(1, optional=True),
        flags=("-k", "--k"),
        convert=int,
    )
    k_in: int | None = option(None, *INPUT_SIDE, convert=int)
    # the command line's --max-drift bounds the tasks' drift too, so it is defined there
    max_drift: float | None = option(None, "", anything, flags=())
    weights: str = option("equal", "how sources count (default: {default})", one_of(*WEIGHTS), choices=WEIGHTS)
    alternations: int = option(10, *ALTERNATIONS, convert=int)
    base_model_name: str | None = option(None, *BASE_MODEL_NAME, metavar="NAME")
    skip_bad: bool = option(False, *SKIP_BAD)
    partial: bool = option(False, "allow modules that only some of the new sources adapt", truth)
    allow_bin: bool = option(False, *ALLOW_BIN)

    __hash__ = Options.__hash__  # dataclass's own fails for mappings and lists

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.add_in is not None and isinstance(self.add, float):
            raise SubspaceError(
                f"add_in={self.add_in}: give a number for add as well; a share of energy decides both sides itself."
            )
        if self.k is None and (self.k_in is not None or self.max_drift is not None):
            raise SubspaceError(
                "k_in and max_drift are for a basis that is fitted from scratch: give k as well. Growing loses"
                " nothing."
            )
        if self.max_drift is not None and not self.max_drift >= 0:
            raise SubspaceError(f"max_drift={self.max_drift}: give 0 or more, as a share of ‖ΔW‖.")

    @property
    def growth(self) -> int | float:
        """The directions to add for adapters, or the share of their energy to keep."""
        return DEFAULT_ADD if self.add is None else self.add

    @property
    def bounded(self) -> bool:
        """Whether a number bounds the directions that tasks' own ones add, too."""
        return self.add is not None or self.add_in is not None

    @property
    def absorbs(self) -> bool:
        """Whether tasks on the basis are absorbed, instead of approximated as adapters are."""
        return self.refit is None and not isinstance(self.add, float)

    @property
    def refit(self) -> tuple[int, int] | None:
        """The directions to fit from scratch, output and input side; None where the basis grows."""
        return None if self.k is None else (self.k, self.k_in or self.k)

    def record(self, tasks: int) -> dict[str, Any]:
        """Return what the basis's config says of its update; `tasks` is how many tasks' cores it was fitted to."""
        kept = ("add", "add_in", "k", "k_in", "max_drift", "weights", "alternations", "partial", "allow_bin")
        said = {} if self.base_model_name is None else {"base_model_name": self.base_model_name}
        return {**{name: getattr(self, name) for name in kept}, "tasks": tasks, **said}


@dataclass(frozen=True, repr=False)
class CompleteOptions(Options):
    """The options that decide how a basis is filled up.

    Attributes:
        k: directions per side.
        k_in: directions on the input side where they differ from `k`.
        with_: ``random`` or ``base-weights``.
        seed: of the random directions.
        base_model_name: Hub id of the basis's base model, where the basis records none or a folder.
    """

    k: int = option(DEFAULT_K, "directions per side", whole(1), flags=("-k", "--k"), convert=int, required=True)
    k_in: int | None = option(None, *INPUT_SIDE, convert=int)
    with_: str = option("random", "(default: {default})", one_of(*FILLINGS), flags=("--with",), choices=FILLINGS)
    seed: int = option(0, *SEED, convert=int)
    base_model_name: str | None = option(
        None, "the basis's base model, where it records none or a folder", base_name, metavar="NAME"
    )

    __hash__ = Options.__hash__

    @property
    def size(self) -> tuple[int, int]:
        """Directions on the output and on the input side."""
        return self.k, self.k_in or self.k


@dataclass(frozen=True, repr=False)
class Resources(Options):
    """The memory, disk and network that building may use, which do not change the basis.

    How many processes build is decided by the launcher that starts them (`accelerate launch`, torchrun).

    Attributes:
        max_memory: how much building may take beside the interpreter, its libraries and sources in memory (those given
            so, converted or pickled ones): bytes, or a text like ``2GB``. It is each process's own.
        work_folder: where finished modules are kept, so that a call with the same sources and arguments goes on where
            an interrupted one stopped, to the same bytes. Remove it when the basis is saved.
        token: as in huggingface_hub.
        progress: show bars for steps that take over two seconds.
    """

    max_memory: int | str = option(
        "2GB",
        "what building may take beside the interpreter (default: {default}); the basis is the same whatever it is",
        size,
        metavar="SIZE",
    )
    work_folder: str | Path | None = option(None, "", anything, flags=())  # noqa: RUF009 - it is a field
    token: str | bool | None = option(None, "", anything, flags=())
    progress: bool = option(True, "no progress bars", truth, flags=("--quiet",))

    __hash__ = Options.__hash__

    @property
    def memory(self) -> int:
        """The bytes of `max_memory`."""
        return parse_size(self.max_memory)


def check_filling_model(with_: str, base_model: Any) -> None:
    """Raise `SubspaceError` where a basis is to be completed from a base model, and there is none."""
    if with_ == "base-weights" and base_model is None:
        raise SubspaceError("To complete with base-weights pass the base model: base_model= (--base-model).")
