"""`ContinualLearner`: learn task after task on one basis that grows by what tasks bring, and forgets nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from .._io.disk import writing
from .._shown import Shown
from ..basis import SubspaceBasis
from ..errors import SubspaceError
from ..sources import open_source
from ..tuner import SubspaceConfig
from .arguments import check_arguments, default_arguments
from .base_model import check_trained_on
from .journal import Journal
from .lock import FolderLock
from .metrics import ScoreMatrix
from .options import MAY_CHANGE, ContinualOptions
from .phases import Run, trained_tasks, version_facts
from .settings import check_model, check_pattern, check_trainer, checked_options, settings_of, template
from .status import RunStatus, status_of
from .store import RunFolder
from .task_facts import check_begun, check_learned, facts_of_task
from .training import TaskData, TaskRun, Workshop, own_randomness

Compute = Callable[[Any], Mapping[str, float]]
Metric = str | Callable[[nn.Module, Any], float]


class ContinualLearner(Shown):
    """Learns tasks one after another on one basis; each is a task of PEFT's afterwards, and none is forgotten.

    `learn` has a probe decide whether a task needs directions of its own beside the basis, trains it, and has the
    basis absorb those directions: the next version begins with the old one's directions bit for bit, and earlier
    tasks keep their tensors, so that they answer as before to the bit. With ``max_k`` or ``refit_every`` the basis is
    refitted within a fixed size instead, by which tasks may change up to ``max_drift``.

    The folder has all of it, and a journal: where the process ends, even by ``kill -9``, the same calls with the same
    arguments go on from the last finished phase, and within a training from the Trainer's newest checkpoint, to the
    same bytes. Tasks that are learned are skipped, so the whole script may be run again.

    Examples:
        >>> learner = ContinualLearner(base_model, "my-basis", "my-run", processing_class=tokenizer)
        >>> learner.learn("reviews", train_data, test_data)
        >>> print(learner.status.text())

    Args:
        model: The base model, which stays as it is, or a function that returns a fresh base model for a task's name:
            classifiers of tasks with different labels, for instance.
        basis: The first version of the basis, its folder or its Hub id. It is copied into the run's folder. None where
            the run was begun already.
        folder: The run's folder, made where it does not exist.
        options: See `ContinualOptions`.
        args: How tasks are trained; by default four epochs with batches of 16 and a learning rate of 3e-3, with a
            checkpoint after each. `output_dir` and the seeds are set by the learner.
        config: Further settings of every task, such as `task_type` or `coefficients`; `basis` and `extra_rank` are
            set by the learner.
        compute_metrics: As the Trainer takes it, for all tasks that have none of their own. By default classifiers
            are scored by their accuracy.
        metric: Which of the metrics is the score; or a function of model and data set that returns it. More is better.
        train: A training loop of your own in the Trainer's place: a function of the adapted model and a `TaskRun`.
        **trainer: Further keywords of the Trainer, such as `processing_class`, `data_collator` or `callbacks`.

    Raises:
        SubspaceError: The run was begun with other settings, names them; the basis is missing; an argument is wrong.
        OccupiedError: Another learner works on the folder, names its process; or the folder holds something else.
        BadFileError: The journal is damaged.
        OSError: The disk refuses.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[str], nn.Module],
        basis: SubspaceBasis | str | Path | None,
        folder: str | Path,
        *,
        options: ContinualOptions | None = None,
        args: TrainingArguments | None = None,
        config: SubspaceConfig | None = None,
        compute_metrics: Compute | None = None,
        metric: Metric | None = None,
        train: Callable[[nn.Module, TaskRun], object] | None = None,
        **trainer: Any,
    ) -> None:
        root = Path(folder).expanduser()
        self.options = checked_options(options)
        self._args = None if args is None else check_arguments(args)
        self._compute, self._metric = compute_metrics, metric
        if not callable(model):
            raise SubspaceError(
                f"model is a {type(model).__name__}: give a base model, or a function that returns one."
            )
        config = template(config)
        check_pattern(config, self.options)
        check_trainer(trainer)
        # what refuses a run comes before its folder is made, and the lock's file in it
        journal, places = Journal.read(root), RunFolder(root)
        if basis is None and journal is None:
            raise SubspaceError(f"{root} holds no run yet, so its first basis is needed. Give basis=.")
        first = basis if basis is None or isinstance(basis, SubspaceBasis) else SubspaceBasis.from_pretrained(basis)
        settings = settings_of(model, config, self.options)
        if journal is not None:
            self._check_begun(journal, places, settings, first)
        elif root.is_dir():
            places.check_free()
        if isinstance(model, nn.Module):
            newest = first if journal is None else SubspaceBasis.from_pretrained(places.newest_basis(journal))
            assert newest is not None  # without a journal a basis was given
            check_model(model, newest, config)
            if journal is not None:
                # not by a task that is not finished: it may have to be given up because of its weights
                for task, place in trained_tasks(journal, places, unfinished=False).items():
                    check_trained_on(model, task, place)
        with writing(root):
            root.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(root)
        try:
            shop = Workshop(model, config, root / "work", train, trainer, self.options.progress)
            self._run = Run(self._opened(places, settings, first), places, self.options, shop, {})
            places.clear(self._run.journal)
        except BaseException:
            self._lock.release()
            raise

    def _opened(self, places: RunFolder, settings: dict[str, Any], first: SubspaceBasis | None) -> Journal:
        """Return the journal of the folder, begun where there is none, and held against what is given."""
        # again, under the lock: another learner may have gone on meanwhile
        journal = Journal.read(places.root)
        if journal is None:
            assert first is not None  # a journal that was there does not go
            places.begin()
            # a basis that lies somewhere stays the one that lies there
            own = first if first.location is None else copy.copy(first)
            place = own.save_pretrained(places.basis(1))
            settings = {**settings, "basis": first.fingerprint}
            return Journal.create(places.root, settings, version_facts(1, "start", None, first, place))
        self._check_begun(journal, places, settings, first)
        if journal.state["settings"]["options"] != settings["options"]:
            journal.write({**journal.state, "settings": {**journal.state["settings"], "options": settings["options"]}})
        return journal

    @staticmethod
    def _check_begun(
        journal: Journal, places: RunFolder, settings: dict[str, Any], first: SubspaceBasis | None
    ) -> None:
        """Hold a run that was begun against what is given, and its folder against its journal."""
        fingerprint = journal.state["settings"]["basis"] if first is None else first.fingerprint
        journal.check_settings({**settings, "basis": fingerprint}, MAY_CHANGE)
        places.check_whole(journal)

    # -- learning ---------------------------------------------------------------------------------------------------

    def learn(
        self,
        name: str,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        validation_dataset: Any = None,
        lora: Any = None,
        labels: Sequence[str] | None = None,
        compute_metrics: Compute | None = None,
        metric: Metric | None = None,
        args: TrainingArguments | None = None,
        restart: bool = False,
    ) -> RunStatus:
        """Learn a task: probe, training, absorption, refit where one is due, and the scores of all tasks.

        A task that is learned already is skipped; its data are then known for the scores of later tasks.

        Args:
            name: The task's name, and its folder's: letters, digits, '.', '_' and '-'.
            train_dataset: What to train on, as the Trainer takes it; it has a length. Not with `lora`.
            eval_dataset: What its score in the matrix is measured on.
            validation_dataset: What the probe is judged by; by default a share of the training data that it holds out.
            lora: A LoRA that is projected in a training's place, as `project_lora` takes it.
            labels: Names of the labels by number; by default those that the data sets record.
            compute_metrics: See `ContinualLearner`; of this task.
            metric: See `ContinualLearner`; of this task.
            args: See `ContinualLearner`; of this task.
            restart: Begin a task again that was begun with other data or arguments and is not finished.

        Returns:
            The run's state.

        Raises:
            SubspaceError: Data are missing or empty; the task was learned from other data or with other labels;
                another task is unfinished; earlier tasks' data are not known in this process; the training diverged; a
                refit would cause more drift than allowed.
            OSError: The disk refuses; what was finished stays, and the same call goes on from it.
        """
        self._check_open()
        run, journal = self._run, self._run.journal
        run.places.check_name(name, [each["name"] for each in journal.tasks if each["name"] != name])
        data = TaskData(
            name,
            train_dataset,
            eval_dataset,
            validation_dataset,
            lora,
            compute_metrics or self._compute,
            metric if metric is not None else self._metric,
            check_arguments(args) if args is not None else self._args or default_arguments(run.places.work(name)),
        )
        facts = facts_of_task(data, labels, run.shop, shown=self.options.progress)
        entry = journal.task(name)
        if entry is not None and "done" in entry["phases"]:
            check_learned(entry, facts)
            run.data[name] = data
            return self.status
        self._check_others(name)
        if entry is not None:
            if restart:
                journal.drop(name)
                run.places.clear(journal)
                entry = None
            else:
                check_begun(entry, facts)
        with own_randomness(run.seed(name, "begin")):
            run.shop.check(data, run.trained())
        if lora is not None:
            open_source(lora)  # refuses one that is not there, or none
        run.data[name] = data
        if entry is None:
            journal.begin(name, {**facts, "first_version": run.newest})
        run.run(name)
        return self.status

    def _check_others(self, name: str) -> None:
        """Check that no other task is unfinished, and that the data of all earlier ones are known."""
        journal = self._run.journal
        unfinished = journal.unfinished()
        if unfinished is not None and unfinished["name"] != name:
            raise SubspaceError(
                f"Task {unfinished['name']!r} was begun and is not finished. Learn it first, with the same call as"
                f" before, or give it up with `drop({unfinished['name']!r})`; then learn {name!r}."
            )
        if unknown := [each for each in journal.learned() if each not in self._run.data]:
            raise SubspaceError(
                f"All tasks are scored after each, and this process does not know the data of {', '.join(unknown)}."
                f" Call `learn({unknown[0]!r}, …)` with its data first: a task that is learned is skipped."
            )

    def drop(self, name: str) -> None:
        """Give up a task that was begun and is not finished.

        Raises:
            SubspaceError: It is learned already, or was never begun.
        """
        self._check_open()
        entry = self._run.journal.unfinished()
        if entry is None or entry["name"] != name:
            known = "is learned already" if name in self._run.journal.learned() else "was never begun"
            raise SubspaceError(f"Task {name!r} {known}. Only a task that is not finished can be given up.")
        self._run.journal.drop(name)
        self._run.places.clear(self._run.journal)

    # -- what there is ----------------------------------------------------------------------------------------------

    @property
    def status(self) -> RunStatus:
        """Scores, growth and bytes, as `RunStatus` tells them."""
        return status_of(self._run.journal)

    @property
    def matrix(self) -> ScoreMatrix:
        """The matrix of scores, with ACC, BWT, forgetting and FWT."""
        return self.status.matrix

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks that are learned, in their order."""
        return self._run.journal.learned()

    @property
    def basis_folder(self) -> Path:
        """The folder of the newest version of the basis."""
        return self._run.places.basis(self._run.newest)

    def task_folder(self, name: str) -> Path:
        """Return the folder of a task on the newest version, which `PeftModel.from_pretrained` loads.

        Raises:
            SubspaceError: It is not learned.
        """
        if name not in self.tasks:
            raise SubspaceError(f"Task {name!r} is not learned. Learned are: {', '.join(self.tasks) or 'none'}.")
        return self._run.places.task(self._run.newest, name)

    def load(self, name: str) -> PeftModel:
        """Return a base model with a task that is learned on it."""
        return self._run.shop.loaded(name, self.task_folder(name))

    def evaluate(self, name: str, dataset: Any = None) -> float:
        """Return a task's score now.

        Args:
            name: The task.
            dataset: What to measure on; by default its evaluation data.

        Raises:
            SubspaceError: It is not learned, or its data are not known in this process.
        """
        folder = self.task_folder(name)
        data = self._run.data.get(name)
        if data is None:
            raise SubspaceError(
                f"This process does not know how task {name!r} is scored. Call `learn({name!r}, …)` with its data"
                " first: a task that is learned is skipped."
            )
        return self._run.shop.score(
            self._run.shop.loaded(name, folder), data, data.evaluation if dataset is None else dataset
        )

    # -- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let other learners work on the folder; this one learns nothing any more."""
        self._lock.release()

    def __enter__(self) -> ContinualLearner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._lock.held:
            raise SubspaceError("This learner is closed. Make another one for the folder.")

    def _shown_facts(self) -> Iterable[tuple[str, Any]]:
        yield "folder", self._run.places.root
        yield from self.status._shown_facts()

    def _shown_table(self) -> Any:
        return self.status._shown_table()
