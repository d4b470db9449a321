"""The options of continual learning, each defined once. Importing this module needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from ..builders.option_checks import Check, Options, one_of, option, truth, truth_or_none, whole
from ..errors import SubspaceError

PROBES = ("auto", "always", "never")
KEEP = ("needed", "all")
#: What may change while a run goes on: it decides nothing about what was learned before.
CHANGEABLE = ("refit_every", "max_k", "max_drift", "keep", "push_basis_to", "push_tasks_to", "private", "lora_rank")


def share(*, whole_allowed: bool = False) -> Check:
    """Return a check for shares above 0 and below 1, or up to 1 where `whole_allowed`."""

    def check(name: str, value: Any) -> float:
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not (0 < value < 1 or (whole_allowed and value == 1)):
            raise SubspaceError(
                f"{name}={value!r}: give a share above 0 and {'up to' if whole_allowed else 'below'} 1."
            )
        return float(value)

    return check


def at_least_0(name: str, value: Any) -> float:
    """Return a number from 0 on; raise `SubspaceError` where it is none."""
    if isinstance(value, bool) or not isinstance(value, Real) or not value >= 0:
        raise SubspaceError(f"{name}={value!r}: give a number, 0 or more.")
    return float(value)


def text_or_none(name: str, value: Any) -> str | None:
    """Return a text or None; raise `SubspaceError` for other values."""
    if value is None or (isinstance(value, str) and value):
        return value
    raise SubspaceError(f"{name}={value!r}: give a text, such as 'org/name'.")


@dataclass(frozen=True, repr=False)
class ContinualOptions(Options):
    """The options of `ContinualLearner`.

    Attributes:
        extra_rank: φ, how many directions of its own a task may bring beside the basis, per module.
        probe: ``auto``: validation decides whether a task gets its own directions. ``always`` and ``never`` decide it
            beforehand; without own directions the basis does not grow.
        margin: with ``auto``: by how much of the score the core with own directions has to beat the core alone.
        probe_share: share of a training's steps that each of the two short trainings of a probe takes.
        validation_share: share of a task's training examples that a probe holds out, where no validation set is given.
            The training itself has all of them.
        refit_every: refit the basis within a fixed size after so many tasks; None: never.
        max_k: most directions per side and module; where a version has more, it is refitted within so many.
        max_drift: refuse a refit by which a task, an earlier or the new one, may change by more than this share of its
            update's norm in a module.
        forward: measure forward transfer too, by two short trainings more for each task.
        keep: ``needed``: keep the newest version and those that something else depends on. ``all``: every one.
        push_basis_to: Hub repository that gets each version of the basis as a commit.
        push_tasks_to: Hub repository of each task, with ``{task}`` in the place of its name: ``org/run-{task}``.
        private: whether repositories that are made are private; None for the owner's default.
        lora_rank: the rank of the LoRA per task that a run's bytes are compared with.
        seed: of all that is random; each phase of each task has a seed of its own, made from it.
        progress: show bars of what takes long.

    Raises:
        SubspaceError: a value that is none of an option's; or options that do not go together.
    """

    extra_rank: int = option(2, "directions of its own that a task may bring, per module", whole(0))
    probe: str = option("auto", "whether a probe decides about own directions", one_of(*PROBES))
    margin: float = option(0.01, "by how much own directions have to raise the score", at_least_0)
    probe_share: float = option(0.25, "share of a training that a probe takes", share(whole_allowed=True))
    validation_share: float = option(0.2, "share of the examples that a probe holds out", share())
    refit_every: int | None = option(None, "refit after so many tasks", whole(1, optional=True))
    max_k: int | None = option(None, "most directions per side and module", whole(1, optional=True))
    max_drift: float = option(0.05, "most drift that a refit may cause", at_least_0)
    forward: bool = option(False, "measure forward transfer too", truth)
    keep: str = option("needed", "which versions stay on disk", one_of(*KEEP))
    push_basis_to: str | None = option(None, "Hub repository of the basis", text_or_none)
    push_tasks_to: str | None = option(None, "Hub repository of a task, with {task} in it", text_or_none)
    private: bool | None = option(None, "make new repositories private", truth_or_none)
    lora_rank: int = option(8, "rank of the LoRAs to compare bytes with", whole(1))
    seed: int = option(0, "of all that is random", whole(0))
    progress: bool = option(True, "show bars", truth)

    __hash__ = Options.__hash__

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe == "always" and not self.extra_rank:
            raise SubspaceError("probe='always' asks for own directions, and extra_rank is 0. Give 1 or more of them.")
        if self.push_tasks_to is not None and "{task}" not in self.push_tasks_to:
            raise SubspaceError(
                f"push_tasks_to={self.push_tasks_to!r}: all tasks would be pushed to one repository. Write {{task}} in"
                " the place of a task's name, as in 'org/run-{task}'."
            )
        if self.push_tasks_to is not None and self.push_basis_to is None:
            raise SubspaceError(
                "push_tasks_to= pushes tasks, which others load with their basis: give push_basis_to='org/basis' too."
            )

    def record(self) -> dict[str, Any]:
        """Return the options as a journal has them, as JSON values."""
        return {name: getattr(self, name) for name in self.names() if name != "progress"}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ContinualOptions:
        """Return the options of a journal's record."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


#: Dotted names of what a run that goes on may change.
MAY_CHANGE = frozenset(f"options.{name}" for name in CHANGEABLE)
