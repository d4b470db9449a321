"""The demo's results: facts, tables, and what they mean in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common as shared
from offline.texts import TextTask

from subspace_peft import SubspaceBasis
from subspace_peft.energy import percent


def task_folder(folder: Path, task: str, row: str) -> Path:
    """Return the folder of a row's saved task."""
    return folder / "tasks" / f"{task}-{row.replace(' ', '-').replace('=', '')}"


def basis_facts(basis: SubspaceBasis, k: int, folder: Path) -> dict[str, Any]:
    """Return the results of the basis: its size, its sources, and how much of them it keeps."""
    measured, sources = basis.info["measured"], basis.info["sources"]
    return {
        "fingerprint": basis.fingerprint,
        "modules": len(basis),
        "k": k,
        "bytes": (folder / "basis" / "basis.safetensors").stat().st_size,
        "energy_kept": measured["energy_kept"],
        "energy_random": measured["energy_random"],
        "sources": [source["name"] for source in sources],
        "seed_groups": len({source["seed_group"] for source in sources}),
    }


def task_facts(task: TextTask, rows: Sequence[Mapping[str, Any]], tests: int, folder: Path) -> dict[str, Any]:
    """Return the results of a held-out task: its rows, with the standard error of `tests` examples."""
    described = []
    for row in rows:
        score, head_bytes = row["test"], 4 * row["trained_head"]
        saved = task_folder(folder, task.name, row["method"])
        described.append(
            {
                "row": row["method"],
                "accuracy": score,
                "standard_error": math.sqrt(score * (1 - score) / tests),
                "adapter_parameters": row["trained_adapter"],
                "head_parameters": row["trained_head"],
                "bytes": row["bytes"] + head_bytes,
                "bytes_without_head": row["bytes"],
                "seconds": row["seconds"],
                "learning_rate": row["rate"],
                "validation_accuracy": row["validations"][0],
                "curve": row["curves"][0],
                "folder": str(saved.relative_to(folder)) if saved.is_dir() else None,
            }
        )
    return {"task": task.name, "about": task.about, "test": tests, "rows": described}


def tables(results: Mapping[str, Any], compared: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return a table per held-out task, as lines of Markdown."""
    lines = []
    for task in results["held_out"]:
        error = max(row["standard_error"] for row in task["rows"])
        title = (
            f"{task['task']} ({task['about']}): accuracy on {task['test']} test examples, standard error {error:.3f}"
        )
        lines += [f"{title} at most", "", *shared.markdown_table(compared[task["task"]]).splitlines(), ""]
    return lines


def reading(tasks: Sequence[Mapping[str, Any]], row: str, other: str) -> tuple[float, str]:
    """Return how far `row` is above `other` in accuracy, on average over the tasks, and "above", "below" or "level".

    Level are those whose difference is below two standard errors, of the test examples alone.
    """
    gaps, variances = [], []
    for task in tasks:
        rows = {each["row"]: each for each in task["rows"]}
        gaps.append(rows[row]["accuracy"] - rows[other]["accuracy"])
        variances.append(rows[row]["standard_error"] ** 2 + rows[other]["standard_error"] ** 2)
    gap, noise = sum(gaps) / len(gaps), math.sqrt(sum(variances)) / len(variances)
    return gap, "level" if abs(gap) < 2 * noise else "above" if gap > 0 else "below"


def headline(results: Mapping[str, Any]) -> list[str]:
    """Return one sentence that says what came out, and one or two that say what it means, from the results alone."""
    tasks, adapters = results["held_out"], len(results["basis"]["sources"])
    ours, lora = (_mean_size(tasks, name) for name in ("this basis", "LoRA r=8"))
    gap, beside_lora = reading(tasks, "this basis", "LoRA r=8")
    often = {"above": "more often than", "level": "about as often as", "below": "less often than"}[beside_lora]
    noise = ", within the noise" if beside_lora == "level" else ""
    one = "a new task" if len(tasks) == 1 else f"each of {len(tasks)} new tasks"
    saved = (
        f"In one sentence: trained in the basis that {adapters} LoRA adapters share, {one} took {ours:,} bytes beside"
        f" its last layer, in place of a LoRA's {lora:,}"
    )
    if results["quick"]:
        return [f"{saved}.", "This was the quick version, on so few examples that its scores mean nothing."]
    lines = [f"{saved}, and was right {often} the LoRA ({_points(gap)} of accuracy{noise})."]
    to_random, beside_random = reading(tasks, "this basis", "random basis")
    to_head, beside_head = reading(tasks, "this basis", "head only")
    apart = (
        f"({_points(to_random)} beside a basis of random directions, {_points(to_head)} beside training the model's"
        " last layer alone)"
    )
    if "below" in (beside_random, beside_head):
        means = (
            f"For you: what these adapters share did not help these tasks {apart}. Where accuracy counts most, train a"
            " LoRA; a basis is then for storing and serving many tasks only."
        )
    elif (beside_random, beside_head) == ("above", "above"):
        means = (
            f"For you: what these adapters share helped these tasks {apart}. If you have adapters of tasks like your"
            " next one, a basis of them is worth a try."
        )
    else:
        means = (
            f"For you: whether what these adapters share helped cannot be told from so few examples {apart}. The saved"
            " bytes are certain; the accuracy on a task of yours you have to measure, beside a LoRA."
        )
    return [*lines, means]


def _points(gap: float) -> str:
    return f"{round(100 * gap, 1) + 0.0:+.1f} points"  # a -0.0 becomes +0.0


def _mean_size(tasks: Sequence[Mapping[str, Any]], name: str) -> int:
    sizes = [row["bytes_without_head"] for task in tasks for row in task["rows"] if row["row"] == name]
    return round(sum(sizes) / len(sizes))


def details(results: Mapping[str, Any]) -> list[str]:
    """Return sizes, checks and a plain reading of the tables, made from the results only."""
    basis = results["basis"]
    lines = [
        f"Basis: {basis['bytes']:,} bytes for {basis['modules']} modules, k={basis['k']}, from"
        f" {len(basis['sources'])} adapters ({basis['seed_groups']} random starts); it keeps"
        f" {percent(basis['energy_kept'])} of their energy (the squared size of their updates), a random one"
        f" {percent(basis['energy_random'])}."
    ]
    for task, checked in zip(results["held_out"], results["checks"], strict=True):
        scores = {row["row"]: row for row in task["rows"]}
        ours, lora, random = scores["this basis"], scores["LoRA r=8"], scores["random basis"]
        noise = math.hypot(ours["standard_error"], random["standard_error"])
        gap, place = reading([task], "this basis", "random basis")
        place = "within the noise of" if place == "level" else place
        lines += [
            f"{task['task']}: this basis {ours['accuracy']:.3f}, {place} a random one ({random['accuracy']:.3f},"
            f" difference {gap:+.3f} ± {noise:.3f}); LoRA {lora['accuracy']:.3f}, the fleet's mean alone"
            f" {scores['mean only']['accuracy']:.3f}, head only {scores['head only']['accuracy']:.3f}. Without the"
            f" head its file has {ours['bytes_without_head']:,} bytes, LoRA's {lora['bytes_without_head']:,}.",
            f"{task['task']}: reloaded in a fresh process its logits differ by at most"
            f" {checked['reloaded_max_difference']:.1e}, exported to LoRA r={checked['exported_rank']} in stock PEFT"
            f" by {checked['exported_max_difference']:.1e} (logits up to {checked['logits_scale']:.1f}).",
        ]
    return [
        *lines,
        f"One seed, few examples: differences under about two standard errors mean nothing. {results['seconds']:.0f}"
        " seconds in all.",
    ]
