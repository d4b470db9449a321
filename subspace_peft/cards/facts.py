"""The facts that cards are made from; one that is None is unknown, and a card does not mention it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .._io.places import relative_place
from .._moved import moved_name
from ..hub import is_hub_id

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Place:
    """Where a card says to load its object from.

    Attributes:
        reference: Hub id or folder.
        subfolder: folder within it.
        revision: branch, tag or commit sha on the Hub.
        folder: the folder itself, where it is one of this machine.
    """

    reference: str
    subfolder: str | None = None
    revision: str | None = None
    folder: Path | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of_folder(cls, folder: Path) -> Place:
        """Return a folder's place: relative to the working directory where it lies in there, else its last part.

        A card is not tied to the machine that wrote it, and says nothing of that machine.
        """
        folder = folder.resolve()
        below = relative_place(folder, Path.cwd())
        return cls(below if below and below.startswith("./") else f"./{folder.name}", folder=folder)

    @property
    def name(self) -> str:
        """Its last part, as a title."""
        return Path(self.subfolder or self.reference).name or self.reference

    @property
    def repository(self) -> str | None:
        """The Hub id, or None for a folder."""
        return self.reference if is_hub_id(self.reference) else None


@dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """The base model.

    Attributes:
        reference: Hub id or folder.
        revision: on the Hub.
        auto_class: name of the transformers class that makes it.
        class_name: name of its own class.
        family: transformers' `model_type`.
        num_labels: of a trained head, which the base model has to be made for.
        labels: their names.
        code: lines that make `base_model`, where no auto class does.
        injected: the task sits in the model itself, with no PeftModel around it.
    """

    reference: str | None = None
    revision: str | None = None
    auto_class: str | None = None
    class_name: str | None = None
    family: str | None = None
    num_labels: int | None = None
    labels: tuple[str, ...] | None = None
    code: tuple[str, ...] | None = None
    injected: bool = False

    @property
    def hub_id(self) -> str | None:
        """The Hub id, or None for a folder and an unknown model."""
        return self.reference if self.reference and is_hub_id(self.reference) else None

    @property
    def how_to_load(self) -> Literal["code", "auto class"] | None:
        """What a snippet makes the base model with; None where nothing is known that could."""
        if self.code:
            return "code"
        known = self.reference is not None and self.auto_class is not None and self.auto_class.isidentifier()
        return "auto class" if known else None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the auto class beside the reference."""
        return {
            "revision": self.revision,
            "id2label": dict(enumerate(self.labels)) if self.labels else None,
            "num_labels": None if self.labels else self.num_labels,
            # the checkpoint's own head may have other classes; it is replaced by the task's
            "ignore_mismatched_sizes": None if self.num_labels is None else True,
        }


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """A source adapter of a basis, or one that was left out.

    Attributes:
        name: the source's name in the basis.
        location: folder, file or Hub id.
        revision: commit sha on the Hub.
        sha256: of its file.
        ranks: the ranks of its modules, without repetition.
        norm: Frobenius norm of its update, over all modules.
        energy_kept: share of the update's energy that the basis keeps.
        energy_kept_at_least: whether that is a lower bound.
        license: the licence that its README states.
        skipped: the reason why it was left out; None for one that was used.
    """

    name: str
    location: str | None = None
    revision: str | None = None
    sha256: str | None = None
    ranks: tuple[int, ...] = ()
    norm: float | None = None
    energy_kept: float | None = None
    energy_kept_at_least: bool = False
    license: str | None = None
    skipped: str | None = None


@dataclass(frozen=True, kw_only=True)
class BasisFacts:
    """A basis.

    Attributes:
        place: where the card says to load it from.
        fingerprint: sha256 (hex).
        modules: number of modules.
        k: its sizes in words, ``k=16``.
        frozen: how many parameters U and V have, over all modules.
        core: how many parameters a task with dense cores trains.
        builder: name of the builder.
        base: the base model.
        task_type: PEFT's, where all sources have the same.
        energy_kept: share of the sources' energy that the basis keeps.
        energy_kept_at_least: whether that is a lower bound.
        energy_random: the share that a random basis of equal size keeps, in expectation.
        energy_left_out: the share that a basis of the other sources keeps of a source left out.
        energy_over_modules: those of ``kept``, ``random``, ``left_out`` that an earlier version recorded as means over
            modules.
        per_module: module name → those of ``kept``, ``left_out`` and ``random`` that are known of it.
        base_weights: in words, whether it is on record which weights the base model has.
        precision: what U and V are stored as, where it is not float32.
        energy_lost: share of the energy that this precision loses.
        sources: the sources, those left out at the end.
        version: of subspace_peft.
    """

    place: Place
    fingerprint: str
    modules: int
    k: str
    frozen: int
    core: int
    builder: str | None = None
    base: BaseFacts = field(default_factory=BaseFacts)
    task_type: str | None = None
    energy_kept: float | None = None
    energy_kept_at_least: bool = False
    energy_random: float | None = None
    energy_left_out: float | None = None
    energy_over_modules: tuple[str, ...] = ()
    per_module: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    base_weights: str | None = None
    precision: str | None = None
    energy_lost: float | None = None
    sources: tuple[SourceFacts, ...] = ()
    version: str | None = None


@dataclass(frozen=True, kw_only=True)
class BasisReferenceFacts:
    """The basis that tasks live in.

    Attributes:
        fingerprint: sha256 (hex).
        reference: Hub id or folder; None where the basis is in the task's own file, empty where only its fingerprint
            is recorded.
        revision: commit sha on the Hub.
    """

    fingerprint: str | None
    reference: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """A task.

    Attributes:
        place: where the card says to load it from.
        basis: the basis that it lives in.
        coefficients: kind of coefficients.
        mean_gain: how the fleet's mean core takes part.
        start: how the coefficients were initialised.
        alpha: the scale's numerator; None: the usual one.
        base: the base model.
        task_type: PEFT's.
        numbers: how many coefficients it trains, directions of its own among them.
        own: how many parameters its own directions have.
        directions: module → how many directions of its own it has there, of all its modules.
        head: how many other parameters were trained.
        bytes: size of the file.
        training: settings by name, see `tasks.callbacks`.
        metrics: split (``evaluation``, ``test``, …) → metric → number.
        controls: ``title``, ``score`` and ``rows`` of a comparison, as the recipes write them.
        datasets: Hub ids.
        versions: package name → version that saved it.
    """

    place: Place
    basis: BasisReferenceFacts
    coefficients: str
    mean_gain: str = "none"
    start: str = "zero"
    alpha: float | None = None
    base: BaseFacts = field(default_factory=BaseFacts)
    task_type: str | None = None
    numbers: int | None = None
    own: int | None = None
    directions: Mapping[str, int] = field(default_factory=dict)
    head: int | None = None
    bytes: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    controls: Mapping[str, Any] | None = None
    datasets: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BundledTaskFacts:
    """A task in a bundle.

    Attributes:
        name: its name in the bundle.
        coefficients: kind of coefficients.
        numbers: how many parameters its cores have.
        directions: module → how many directions of its own it has there, of all its modules.
        energy_kept: of a task that was an adapter, the share of its energy that the basis keeps.
        metrics: metric → number.
        datasets: Hub ids.
    """

    name: str
    coefficients: str | None = None
    numbers: int | None = None
    directions: Mapping[str, int] = field(default_factory=dict)
    energy_kept: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """Many tasks in one file.

    Attributes:
        place: where the card says to load it from.
        basis: the basis that its tasks live in.
        tasks: its tasks.
        loading: lines of Python that load it once `base_model` is made.
        imports: the imports that these lines need.
        base: the base model.
        task_type: PEFT's.
        bytes: size of the file.
        version: of subspace_peft.
    """

    place: Place
    basis: BasisReferenceFacts
    tasks: tuple[BundledTaskFacts, ...]
    loading: tuple[str, ...]
    imports: tuple[str, ...] = ()
    base: BaseFacts = field(default_factory=BaseFacts)
    task_type: str | None = None
    bytes: int | None = None
    version: str | None = None


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
