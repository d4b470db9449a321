"""The cards: pure functions of their facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .facts import AUTO_CLASSES, BasisFacts, BundleFacts, SourceFacts, TaskFacts
from .parts import (
    REMEDY,
    base_code,
    base_words,
    basis_lines,
    flat,
    front_matter,
    location,
    number,
    quoted,
    section,
    snippet,
    table,
)
from .readme import Card

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
    """A basis: what it was built from, what it keeps, how to train in it."""
    parts = [
        (
            f"A frozen basis for {facts.modules} modules ({facts.k}) of {base_words(facts.base)}, for "
            f"subspace_peft. {facts.frozen:,} frozen numbers, stored once; a task in it is "
            f"{facts.core:,} numbers with the default `core` coefficients."
        ),
        "\n".join(
            [f"- fingerprint: `{facts.fingerprint}`"]
            + ([f"- builder: `{facts.builder}`"] if facts.builder else [])
            + ([_precision(facts)] if facts.precision else [])
            + ([f"- saved by subspace_peft {facts.version}"] if facts.version else [])
        ),
        section("Use", _basis_snippet(facts), REMEDY),
    ]
    energies = {
        "this basis": facts.energy_kept,
        "a basis of the others, of a source left out": facts.energy_left_out,
        "a random basis of equal size (expected)": facts.energy_random,
    }
    rows = [(name, f"{value:.4f}") for name, value in energies.items() if value is not None]
    if rows:
        warning = "Energy is not usefulness: compare with a random basis on your own task before relying on it."
        parts.append(
            section("Energy kept", table(["", "share of the sources' energy"], rows), warning, *_by_module(facts))
        )
    used = [source for source in facts.sources if source.skipped is None]
    if used:
        parts.append(section("Sources", _sources(used)))
    if left := [source for source in facts.sources if source.skipped is not None]:
        rows = [(source.name, source.skipped) for source in left]
        parts.append(section("Left out", table(["source", "why"], rows)))
    front = front_matter("basis", facts.base)
    return Card(facts.place.name, "\n\n".join(parts), front)


def _by_module(facts: BasisFacts) -> list[str]:
    """A table that opens on demand: models have hundreds of modules."""
    if not facts.per_module:
        return []
    titles = {"kept": "kept", "left_out": "of a source left out", "random": "random basis"}
    known = [key for key in titles if any(key in each for each in facts.per_module.values())]
    rows = [
        (f"`{name}`", *(f"{each[key]:.4f}" if key in each else "" for key in known))
        for name, each in facts.per_module.items()
    ]
    lines = table(["module", *(titles[key] for key in known)], rows)
    return [f"<details><summary>By module</summary>\n\n{lines}\n\n</details>"]


def _precision(facts: BasisFacts) -> str:
    lost = "" if facts.energy_lost is None else f", which loses {facts.energy_lost:.2g} of the energy below"
    return f"- stored as `{facts.precision}`{lost}; given in float32"


def _basis_snippet(facts: BasisFacts) -> str:
    if base_code(facts.base) is None:
        lines = [f"basis = subspace_peft.SubspaceBasis.from_pretrained({location(facts.place)})", "print(basis)"]
        return "\n".join(["```python", "import subspace_peft", "", *lines, "```"])
    given = [f"basis={quoted(facts.place.reference)}"]
    if facts.place.revision:
        given.append(f"basis_revision={quoted(facts.place.revision)}")
    given.append(f"basis_fingerprint={quoted(facts.fingerprint)}")
    if facts.task_type in AUTO_CLASSES:
        given.append(f"task_type={quoted(str(facts.task_type))}")
    lines = [
        "config = subspace_peft.SubspaceConfig(",
        *(f"    {each}," for each in given),
        ")",
        "model = get_peft_model(base_model, config)",
        "model.print_trainable_parameters()",
    ]
    return snippet(facts.base, ["from peft import get_peft_model"], lines)


def _sources(sources: list[SourceFacts]) -> str:
    columns: dict[str, Any] = {
        "source": lambda s: s.name,
        "from": lambda s: f"`{s.location}`" if s.location else "",
        "revision": lambda s: f"`{s.revision[:12]}`" if s.revision else "",
        "ranks": lambda s: ", ".join(map(str, s.ranks)),
        "norm of ΔW": lambda s: "" if s.norm is None else f"{s.norm:.4g}",
        "energy kept": lambda s: "" if s.energy_kept is None else f"{s.energy_kept:.4f}",
        "licence": lambda s: s.license or "",
        "sha256": lambda s: f"`{s.sha256[:12]}`" if s.sha256 else "",
    }
    filled = {name: [cell(source) for source in sources] for name, cell in columns.items()}
    shown = {name: cells for name, cells in filled.items() if any(cells)}
    return table(list(shown), zip(*shown.values(), strict=True))


def task_card(facts: TaskFacts) -> Card:
    """A task: how to load it, in which basis it lives, how it was trained, what it scored, beside which controls."""
    size = []
    if facts.numbers is not None:
        size.append(f"{facts.numbers:,} trained numbers (`{facts.coefficients}` coefficients)")
    if facts.head:
        size.append(f"{facts.head:,} more of modules trained whole")
    if facts.bytes is not None:
        size.append(f"{facts.bytes:,} bytes")
    inside = "in a basis of its own" if facts.basis.reference is None else "in a shared, frozen basis"
    first = f"A task of {base_words(facts.base)} {inside}, for PEFT with subspace_peft"
    parts = [
        f"{first}: {', '.join(size)}." if size else f"{first}.",
        section("Loading", _task_snippet(facts), REMEDY),
        section(
            "Basis and coefficients",
            "\n".join(
                [
                    *basis_lines(facts.basis),
                    f"- coefficients: `{facts.coefficients}`, mean gain `{facts.mean_gain}`, start `{facts.start}`",
                    *(
                        [f"- saved by {', '.join(f'{name} {version}' for name, version in facts.versions.items())}"]
                        if facts.versions
                        else []
                    ),
                ]
            ),
        ),
    ]
    settings = [(label, number(facts.training[key])) for key, label in SETTINGS.items() if key in facts.training]
    if settings:
        parts.append(section("Training", table(["", ""], settings)))
    results = flat(facts.metrics)
    if results:
        rows = [(split, name, number(value)) for split, name, value in results]
        parts.append(section("Metrics", table(["on", "metric", "value"], rows)))
    if facts.controls:
        parts.append(section("Beside its controls", *_controls(facts.controls)))
    front = front_matter(
        "task",
        facts.base,
        task_type=facts.task_type,
        coefficients=[facts.coefficients],
        datasets=facts.datasets,
        title=facts.place.name,
        results=[
            (split if split != "evaluation" else None, name, value) for split, name, value in results if name != "loss"
        ],
    )
    return Card(facts.place.name, "\n\n".join(parts), front)


def _task_snippet(facts: TaskFacts) -> str:
    if facts.base.injected:
        return snippet(facts.base, [], [f"subspace_peft.load_adapter(base_model, {location(facts.place)})"])
    load = f"model = PeftModel.from_pretrained(base_model, {location(facts.place)})"
    return snippet(facts.base, ["from peft import PeftModel"], [load])


def _controls(controls: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in controls["rows"]:
        if row.get("diverged"):
            score = f"diverged in {row['diverged']} of {row['seeds']}"
        else:
            spread = "" if row.get("test_sd") is None else f" ± {row['test_sd']:.3f}"
            score = "–" if row["test"] is None else f"{row['test']:.3f}{spread}"
        trained = [number(row[key]) for key in ("trained_adapter", "trained_head", "bytes")]
        rate = "–" if row.get("rate") is None else f"{row['rate']:g}"
        rows.append((row["method"], score, row["seeds"], *trained, rate))
    header = ["method", f"test {controls.get('score') or 'score'}", "seeds", "trained (adapter)", "trained (head)"]
    said = (
        "Every row was trained anew under one budget, at the learning rate that was best for it on the validation"
        " split; mean ± sample "
    )
    said += "standard deviation over the seeds. The row in this task's manner is not of this file's very numbers."
    return [f"{controls.get('title') or ''}", table([*header, "adapter bytes", "learning rate"], rows), said]


def bundle_card(facts: BundleFacts) -> Card:
    """Many tasks in one file: how to load them, in which basis they live, which there are."""
    size = f", {facts.bytes:,} bytes" if facts.bytes is not None else ""
    first = f"{len(facts.tasks)} tasks of {base_words(facts.base)} in one shared, frozen basis{size}, for PEFT with"
    columns: dict[str, Any] = {
        "task": lambda t: f"`{t.name}`",
        "coefficients": lambda t: f"`{t.coefficients}`" if t.coefficients else "",
        "numbers": lambda t: "" if t.numbers is None else number(t.numbers),
        "metrics": lambda t: ", ".join(f"{name} {number(value)}" for name, value in t.metrics.items()),
        "datasets": lambda t: ", ".join(t.datasets),
    }
    filled = {name: [cell(task) for task in facts.tasks] for name, cell in columns.items()}
    shown = {name: cells for name, cells in filled.items() if any(cells) or name == "task"}
    versions = [f"- saved by subspace_peft {facts.version}"] if facts.version else []
    parts = [
        f"{first} subspace_peft.",
        section("Loading", snippet(facts.base, facts.imports, facts.loading), REMEDY),
        section("Basis", "\n".join([*basis_lines(facts.basis), *versions])),
        section("Tasks", table(list(shown), zip(*shown.values(), strict=True))),
    ]
    kinds = {task.coefficients for task in facts.tasks if task.coefficients}
    datasets = sorted({name for task in facts.tasks for name in task.datasets})
    front = front_matter(
        "bundle", facts.base, task_type=facts.task_type, coefficients=sorted(kinds), datasets=datasets
    )
    return Card(facts.place.name, "\n\n".join(parts), front)
