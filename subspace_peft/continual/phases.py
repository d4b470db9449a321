"""The phases in which a task is learned. Each writes its results, and only then records that it is finished.

A phase sees what earlier ones have written and recorded, and nothing else, so that it does the same in the process
that began the task and in one that goes on with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .._io.progress import begin, progress_bar
from ..basis import SubspaceBasis
from ..builders import build_basis, plan_refit, refit_basis
from ..convert import absorb_task, migrate_task, project_lora
from ..errors import SubspaceError
from ..logging import get_logger
from ..tuner.task_file import COEFFICIENT_KEY, WEIGHTS_FILE
from .data import held_out, part
from .journal import Journal, seed_of
from .options import ContinualOptions
from .store import RunFolder
from .training import LOGITS, TaskData, TaskRun, Workshop, largest_change, own_randomness

logger = get_logger()

ROUNDING = 1e-5  # of a task's parameters in float32, as a share of its update's norm


@dataclass
class Run:
    """What the phases of a run work with.

    Attributes:
        journal: what is finished.
        places: the run's folder.
        options: the run's options.
        shop: makes, trains and measures models.
        data: task → what this process knows of it.
    """

    journal: Journal
    places: RunFolder
    options: ContinualOptions
    shop: Workshop
    data: dict[str, TaskData]

    @property
    def newest(self) -> int:
        """The number of the newest version."""
        return int(self.journal.versions[-1]["version"])

    def seed(self, name: str, *words: str) -> int:
        """Return the seed of a phase of a task."""
        return seed_of(self.options.seed, name, *words)

    def basis(self, version: int | None = None) -> SubspaceBasis:
        """Open a version of the basis; the newest by default. Its place is the run's, whatever else has the same."""
        folder = self.places.basis(version or self.newest)
        found = SubspaceBasis.from_pretrained(folder)
        found.location = str(folder.resolve())
        return found

    def trained(self) -> dict[str, Path]:
        """Return `trained_tasks` of the run."""
        return trained_tasks(self.journal, self.places)

    def run(self, name: str) -> None:
        """Go through the phases of a task that was begun, from the first that is not finished."""
        for phase, work in WORK.items():
            if self.journal.phase(name, phase) is None:
                begin(f"{name}: {phase}")
                logger.info("%s: %s", name, phase)
                with own_randomness(self.seed(name, phase)):
                    work(self, self.data[name])
        self.places.clear(self.journal)


def version_facts(number: int, kind: str, task: str | None, basis: SubspaceBasis, folder: Path) -> dict[str, Any]:
    """Return what the journal says of a version whose basis lies in `folder`."""
    shapes = basis.shapes()
    return {
        "version": number,
        "kind": kind,
        "task": task,
        "fingerprint": basis.fingerprint,
        "k": {name: [shape["k_out"], shape["k_in"]] for name, shape in shapes.items()},
        "bytes": (folder / "basis.safetensors").stat().st_size,
        **({"shapes": {name: [shape["out"], shape["in"]] for name, shape in shapes.items()}} if task is None else {}),
    }


# -- phases -----------------------------------------------------------------------------------------------------------


def probe(run: Run, data: TaskData) -> None:
    """Decide by validation whether the task gets directions of its own."""
    options = run.options
    if options.probe != "auto" or not options.extra_rank:
        chosen = options.extra_rank if options.probe == "always" else 0
        return run.journal.record(data.name, "probe", {"extra_rank": chosen})
    scores = {}
    for kind, extra in (("core", 0), ("own", options.extra_rank)):
        if data.lora is not None:
            model = run.shop.loaded(
                data.name, _projected(run, data, extra, run.places.work(data.name) / f"probe-{kind}")
            )
            judged = _validation(data)
        else:
            learned, judged = _split(run, data)
            model = _short(run, data, learned, run.basis(), extra, kind)
        scores[kind] = run.shop.score(model, data, judged)
    needed = scores["own"] > scores["core"] + options.margin
    chosen = options.extra_rank if needed else 0
    logger.info("%s: %s; own directions: %d", data.name, scores, chosen)
    run.journal.record(data.name, "probe", {**scores, "extra_rank": chosen})


def forward(run: Run, data: TaskData) -> None:
    """Measure R[i−1, i] and b_i: the core alone after a short training, in the basis and in random directions."""
    if not run.options.forward or data.train is None or not run.journal.learned():
        return run.journal.record(data.name, "forward", {}) if run.options.forward else None
    basis = run.basis()
    control = build_basis(builder="random", like=basis, seed=run.seed(data.name, "random"), progress=False)
    # its place tells that no task has to carry it
    control.save_pretrained(run.places.work(data.name) / "random", overwrite=True)
    scores = {}
    for kind, directions in (("core", basis), ("random", control)):
        model = _short(run, data, data.train, directions, 0, f"forward-{kind}")
        scores[kind] = run.shop.score(model, data, data.evaluation)
    return run.journal.record(data.name, "forward", scores)


def train(run: Run, data: TaskData) -> None:
    """Train the task, or project its LoRA, in the form that was chosen."""
    extra = run.journal.phase(data.name, "probe")["extra_rank"]
    place = _trained(run, data.name, extra)
    if place.exists():
        shutil.rmtree(place)
    if data.lora is not None:
        _projected(run, data, extra, place)
        return run.journal.record(data.name, "train", {"extra_rank": extra})
    seed = run.seed(data.name, "train")
    with own_randomness(seed):
        model = run.shop.adapted(data.name, run.basis(), extra)
    folder = run.places.work(data.name) / "train"
    run.shop.fit(model, data, TaskRun(data.name, data.train, data.validation, 1.0, seed, folder))
    model.save_pretrained(str(place))
    run.journal.record(data.name, "train", {"extra_rank": extra})


def absorb(run: Run, data: TaskData) -> None:
    """Grow the basis by the task's own directions, and take all tasks over to it: older ones bit for bit."""
    extra = run.journal.phase(data.name, "train")["extra_rank"]
    if not extra:
        return run.journal.record(data.name, "absorb", {"added": 0})
    name, version = data.name, run.newest
    own = _trained(run, name, extra)
    before = _answers(run, data, own)
    old = run.basis()
    new, moved = absorb_task(own, old, progress=False)
    if new.fingerprint == old.fingerprint:
        # its directions lie within the basis's
        moved.save_pretrained(run.places.task(version, name))
        change = _change(run, data, before, version)
        return run.journal.record(name, "absorb", {"added": 0, "change": change})
    for entry in new.info.get("sources") or []:
        if entry.get("location") == str(own):
            # its place is gone once the task is learned
            entry["location"] = f"task {name} of a continual run"
    number = version + 1
    new.save_pretrained(run.places.basis(number))
    new = run.basis(number)
    for other in _earlier(run, name):
        migrate_task(run.places.task(version, other), new, pad=False).save_pretrained(run.places.task(number, other))
    moved.save_pretrained(run.places.task(number, name))
    change = _change(run, data, before, number)
    facts = version_facts(number, "absorb", name, new, run.places.basis(number))
    shapes, grown = old.shapes(), new.shapes()
    added = max(grown[each][side] - shapes[each][side] for each in shapes for side in ("k_out", "k_in"))
    return run.journal.record(name, "absorb", {"added": added, "change": change}, version=facts)


def refit(run: Run, data: TaskData) -> None:
    """Fit the basis again within a fixed size, where that is due: what tasks may lose is said before, and bounded."""
    size = _refit_size(run)
    if size is None:
        return None
    name, version, old = data.name, run.newest, run.basis()
    names = [*_earlier(run, name), name]
    plan = plan_refit(old, {each: str(run.places.task(version, each)) for each in names}, size)
    if not plan.modules:
        return run.journal.record(name, "refit", {})
    task, module, drift = plan.worst
    said = f"by up to {drift:.2%} of its update's norm ({task}, in {module})"
    bound = run.options.max_drift
    if drift > bound:
        raise SubspaceError(
            f"After task {name!r} the basis is due for a refit within {_words(size)}, which would change a task"
            f" {said}, more than max_drift={bound:g}. Allow more drift with max_drift, or more directions with max_k;"
            " both may be changed while a run goes on."
        )
    logger.warning("After task %r the basis is refitted within %s; that changes a task %s.", name, _words(size), said)
    number = version + 1
    refit_basis(plan, max_drift=bound).save_pretrained(run.places.basis(number))
    new = run.basis(number)
    for other in names:
        # the bound holds for exact numbers, and what is written is rounded
        moved = migrate_task(run.places.task(version, other), new, max_drift=bound + ROUNDING)
        moved.save_pretrained(run.places.task(number, other))
    facts = version_facts(number, "refit", name, new, run.places.basis(number))
    drifts = {each: max(plan.drift[each].values()) for each in names}
    return run.journal.record(name, "refit", {}, version={**facts, "drift": drift, "drifts": drifts})


def scores(run: Run, data: TaskData) -> None:
    """Score all tasks that are learned by now: a row of the matrix."""
    names = [*run.journal.learned(), data.name]
    basis = run.basis()  # in memory it is found by all tasks, and opened once
    row = {
        name: run.shop.score(
            run.shop.loaded(name, run.places.task(run.newest, name)), run.data[name], run.data[name].evaluation
        )
        for name in progress_bar(names, desc="scoring", unit="task", shown=run.options.progress)
    }
    del basis
    files = {name: run.places.task(run.newest, name) / WEIGHTS_FILE for name in names}
    run.journal.record(
        data.name,
        "scores",
        {
            "scores": row,
            "bytes": {name: file.stat().st_size for name, file in files.items()},
            "head_bytes": {name: _head_bytes(file) for name, file in files.items()},
        },
    )


def push(run: Run, data: TaskData) -> None:
    """Push the version and the task, where the options say to which repositories."""
    options = run.options
    if options.push_basis_to is None:
        return
    from ..tasks.push import push_saved_task

    basis = run.basis()
    pushed = {each["phases"].get("push", {}).get("fingerprint") for each in run.journal.tasks}
    facts: dict[str, Any] = {"fingerprint": basis.fingerprint}
    if basis.fingerprint not in pushed:
        message = f"Version {basis.info.get('version') or 1}, after task {data.name}"
        revision = basis.push_to_hub(options.push_basis_to, private=options.private, commit_message=message)
        facts["basis"] = [options.push_basis_to, revision]
    if options.push_tasks_to is not None:
        repo = options.push_tasks_to.replace("{task}", data.name)
        revision = push_saved_task(
            run.places.task(run.newest, data.name),
            repo,
            push_basis_to=options.push_basis_to,
            private=options.private,
        )
        facts["task"] = [repo, revision]
    run.journal.record(data.name, "push", facts)


def done(run: Run, data: TaskData) -> None:
    """Record that the task is learned."""
    run.journal.record(data.name, "done", {})


WORK = {
    "probe": probe,
    "forward": forward,
    "train": train,
    "absorb": absorb,
    "refit": refit,
    "scores": scores,
    "push": push,
    "done": done,
}


# -- parts of phases --------------------------------------------------------------------------------------------------


def _refit_size(run: Run) -> tuple[int, int] | None:
    """Return the directions per side that the basis is to be refitted within now; None where no refit is due."""
    options, known = run.options, run.journal.versions
    sides = list(zip(*known[-1]["k"].values(), strict=True))
    most = options.max_k
    if most is not None and any(k > most for side in sides for k in side):
        return most, most
    if options.refit_every is None or (len(run.journal.learned()) + 1) % options.refit_every:
        return None
    first = list(zip(*known[0]["k"].values(), strict=True))
    return (most, most) if most is not None else (max(first[0]), max(first[1]))


def _words(size: tuple[int, int]) -> str:
    return (
        f"{size[0]} directions per side" if size[0] == size[1] else f"{size[0]} output and {size[1]} input directions"
    )


def trained_tasks(journal: Journal, places: RunFolder, *, unfinished: bool = True) -> dict[str, Path]:
    """Return saved tasks by which a base model is told: the last one learned, and the one that is not finished.

    Args:
        journal: The run's.
        places: Its folder.
        unfinished: Name the one that is not finished as well, where it is trained.
    """
    newest = max(each["version"] for each in journal.versions)
    found = {name: [places.task(newest, name)] for name in journal.learned()[-1:]}
    if unfinished and (entry := journal.unfinished()) is not None:
        name = entry["name"]
        found[name] = [places.work(name) / "own" / name, places.task(newest, name)]
    saved = {name: [each for each in some if (each / "adapter_config.json").is_file()] for name, some in found.items()}
    return {name: some[0] for name, some in saved.items() if some}


def _trained(run: Run, name: str, extra: int) -> Path:
    """Return where a trained task is written: to its place on the version, or aside until it is absorbed."""
    # the basis's record calls its source as the folder is called
    return run.places.work(name) / "own" / name if extra else run.places.task(run.newest, name)


def _earlier(run: Run, name: str) -> list[str]:
    return [each for each in run.journal.learned() if each != name]


def _short(run: Run, data: TaskData, learned: Any, directions: SubspaceBasis, extra: int, kind: str) -> Any:
    """Train for a probe's share of the steps, from one seed for all kinds, and return the model."""
    seed = run.seed(data.name, "short")
    with own_randomness(seed):
        model = run.shop.adapted(data.name, directions, extra)
    folder = run.places.work(data.name) / kind
    run.shop.fit(model, data, TaskRun(data.name, learned, None, run.options.probe_share, seed, folder))
    return model


def _split(run: Run, data: TaskData) -> tuple[Any, Any]:
    """Return what a probe trains on and what it is judged by."""
    if data.validation is not None:
        return data.train, data.validation
    return held_out(data.train, run.options.validation_share, run.seed(data.name, "held out"), data.name)


def _validation(data: TaskData) -> Any:
    if data.validation is None:
        raise SubspaceError(
            f"Task {data.name!r} comes from a LoRA, and has no data to judge by whether it needs its own directions."
            " Give validation_dataset=, or decide beforehand with probe='always' or probe='never'."
        )
    return data.validation


def _projected(run: Run, data: TaskData, extra: int, place: Path) -> Path:
    """Write a LoRA's projection into a folder, with own directions where they are asked for."""
    more: Mapping[str, Any] = {"extra_rank": extra} if extra else {}
    project_lora(data.lora, run.places.basis(run.newest), **more).save_pretrained(place)
    return place


def _answers(run: Run, data: TaskData, folder: Path) -> torch.Tensor | None:
    """Return the logits of a saved task on an evaluation batch; None where the user's own functions measure."""
    if run.shop.train is not None or callable(data.metric):
        return None
    batch = part(data.evaluation, range(min(LOGITS, len(data.evaluation))))
    return run.shop.logits(run.shop.loaded(data.name, folder), data, batch)


def _change(run: Run, data: TaskData, before: torch.Tensor | None, version: int) -> float | None:
    """Return the largest change of a logit between a task before and on a version; None where it is not measured."""
    if before is None:
        return None
    return largest_change(before, _answers(run, data, run.places.task(version, data.name)))  # type: ignore[arg-type]


def _head_bytes(file: Path) -> int:
    """Return the bytes of a task's tensors that are no coefficients, such as a classifier's."""
    with safe_open(file, framework="pt") as stored:
        others = [key for key in stored.keys() if not COEFFICIENT_KEY.match(key)]  # noqa: SIM118
        return sum(stored.get_tensor(key).nbytes for key in others)
