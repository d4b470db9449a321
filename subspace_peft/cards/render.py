"""Cards from their facts: the text is in `templates/`, and a function of the facts alone."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from .._install import INSTALL
from .._shown import said_of_directions
from ..energy import OVER_MODULES, percent
from . import markdown
from .facts import AUTO_CLASSES, BasisFacts, BundledTaskFacts, BundleFacts, SourceFacts, TaskFacts
from .front_matter import front_matter
from .readme import Card

if TYPE_CHECKING:
    from jinja2 import Environment

# what training starts from at the usual alpha; `tuner/learning_rate.py` says which range was measured
RATE, USUAL_ALPHA = 3e-3, 256.0
# settings of a training, in the order in which a card lists them
SETTINGS = {
    "learning_rate": "learning rate of the coefficients",
    "head_learning_rate": "learning rate of what else is trained",
    "epochs": "epochs",
    "steps": "optimizer steps",
    "batch": "examples per step",
    "examples": "training examples",
    "optimizer": "optimizer",
    "scheduler": "scheduler",
    "warmup": "warm-up",
    "weight_decay": "weight decay",
    "precision": "precision",
    "seed": "seed",
    "loss": "training loss",
}


def basis_card(facts: BasisFacts) -> Card:
    """Return the card of a basis: its sources, the energy it keeps, how to train in it."""
    return _card("basis.md.j2", facts, front_matter("basis", facts.base), task_types=AUTO_CLASSES)


def task_card(facts: TaskFacts) -> Card:
    """Return the card of a task: how to load it, its basis, its training, its scores beside those of controls."""
    results = [
        (None if split == "evaluation" else split, name, value)
        for split, numbers in facts.metrics.items()
        for name, value in numbers.items()
        if name != "loss"
    ]
    front = front_matter(
        "task",
        facts.base,
        task_type=facts.task_type,
        coefficients=[facts.coefficients],
        datasets=facts.datasets,
        title=facts.place.name,
        results=results,
    )
    settings = {label: facts.training[key] for key, label in SETTINGS.items() if key in facts.training}
    # where all modules have as many, none is named
    uneven = [(name, count) for name, count in facts.directions.items() if count]
    uneven = uneven if len(set(facts.directions.values())) > 1 else []
    return _card("task.md.j2", facts, front, settings=settings, uneven=uneven, directions=said_of_directions)


def bundle_card(facts: BundleFacts) -> Card:
    """Return the card of many tasks in one file: how to load them, their basis, a table of them."""
    kinds = {task.coefficients for task in facts.tasks if task.coefficients}
    datasets = sorted({name for task in facts.tasks for name in task.datasets})
    front = front_matter(
        "bundle", facts.base, task_type=facts.task_type, coefficients=sorted(kinds), datasets=datasets
    )
    metrics = [
        ", ".join(f"{name} {markdown.number(value)}" for name, value in task.metrics.items()) for task in facts.tasks
    ]
    return _card("bundle.md.j2", facts, front, metrics=metrics)


def _rate(alpha: float | None = None) -> str:
    """Return the learning rate to start from, as it is written in code."""
    mantissa, exponent = f"{RATE * USUAL_ALPHA / (alpha or USUAL_ALPHA):.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _share(value: Any) -> str:
    """Return a share of energy in percent; nothing for what is no number, such as Jinja2's value of a missing one."""
    return percent(value) if isinstance(value, (int, float)) else ""


def _own(task: BundledTaskFacts) -> str:
    """Return how many directions of its own a task has; nothing where it has none."""
    return said_of_directions(task.directions) if any(task.directions.values()) else ""


def _kept(source: SourceFacts | BundledTaskFacts) -> str:
    """Return what the basis keeps of a source or a task."""
    least = "at least " if getattr(source, "energy_kept_at_least", False) else ""
    return "" if source.energy_kept is None else least + percent(source.energy_kept)


def _card(template: str, facts: BasisFacts | TaskFacts | BundleFacts, front: dict[str, Any], **more: Any) -> Card:
    body = _environment().get_template(template).render(facts=facts, **more)
    # comments mark where a card begins and ends: the templates have none, and a value must not bring one in
    return Card(str(markdown.text(facts.place.name)), body.replace("<!--", "<! --"), front)


@functools.cache
def _environment() -> Environment:
    # Jinja2 is imported when the first card is made: the command line's help should not wait for it
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__),
        # values are escaped for Markdown by `finalize`; HTML's own escaping would put entities into code, and leaves
        # alone what `finalize` returns
        autoescape=True,
        finalize=markdown.text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )
    environment.globals.update(arguments=markdown.arguments, literal=markdown.literal, table=markdown.table)
    environment.filters.update(code=markdown.code, fenced=markdown.fenced, number=markdown.number)
    environment.filters["one_line"] = markdown.one_line
    environment.filters.update(percent=percent, share=_share, kept=_kept, own=_own)
    environment.globals.update(over_modules=OVER_MODULES, install=INSTALL, rate=_rate)
    return environment
