"""The cost of loading the 1st, 10th, 100th and 1,000th task: PEFT's `load_adapter` and a `TaskBank`.

    python benchmarks/load_many.py
    python benchmarks/load_many.py --stock 20 --tasks 100

A RoBERTa-base-shaped encoder (12 × 768) with query and value adapted, core k=16 beside LoRA r=8. `load_adapter` walks
all modules and all adapters loaded so far, so it is measured up to --stock adapters; beside its seconds stand those
spent in this package's own code. The bank takes the same folders one by one, and then all tasks from one file. Seconds
are CPU time of this process: per point the median of up to five loads that end there. Writes JSON and a Markdown table
to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from timing import write
from torch import nn
from tqdm.auto import tqdm
from transformers import RobertaConfig, RobertaModel

import subspace_peft
from subspace_peft import SubspaceConfig, TaskBank, build_basis

TARGETS = ["query", "value"]
POINTS = (1, 10, 100, 1000)
WINDOW = 5
OWN = str(Path(subspace_peft.__file__).parent)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    # few tokens: the walk is over modules, and the embedding is none that is adapted
    return RobertaModel(RobertaConfig(vocab_size=1000), add_pooling_layer=False).eval()


def make_tasks(root: Path, count: int, k: int) -> tuple[list[Path], Path]:
    """Folders of `count` saved tasks on one basis, and one bank file of them all."""
    basis = build_basis(builder="random", base_model=encoder(), target_modules=TARGETS, k=k, progress=False)
    basis.save_pretrained(root / "basis")
    model = get_peft_model(encoder(), SubspaceConfig(basis=str(root / "basis"), target_modules=TARGETS))
    model.save_pretrained(str(root / "tasks" / "default"))
    bank, draw = TaskBank(model, capacity=count), torch.Generator().manual_seed(0)
    folders = []
    for number in tqdm(range(count), desc="writing tasks", unit="task", delay=2):
        sizes = {module: layer.r["default"] for module, layer in bank.layers.items()}
        bank.add(f"t{number}", {module: torch.randn(size, generator=draw) for module, size in sizes.items()})
        folders.append(bank.save_task(f"t{number}", root / "tasks" / f"t{number}"))
    return folders, bank.save(root / "bank.safetensors")


def make_loras(root: Path, count: int) -> list[Path]:
    model = get_peft_model(encoder(), LoraConfig(r=8, target_modules=TARGETS))
    folders = []
    for number in tqdm(range(count), desc="writing LoRAs", unit="adapter", delay=2):
        folders.append(root / "loras" / f"t{number}")
        model.save_pretrained(str(folders[-1]))
    return folders


def own_seconds(profile: cProfile.Profile) -> float:
    """Seconds in this package's functions and in what they call, such as reading files and tensors."""
    total = 0.0
    for (file, _, name), (_, _, own, _, callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if file.startswith(OWN):
            total += own
        else:
            # of a function outside, what callers in this package account for; what a method of ours extends would have
            # run without it
            total += sum(
                spent[2] for (caller, _, by), spent in callers.items() if caller.startswith(OWN) and by != name
            )
    return total


def timed(load: Callable[[int], Any], count: int, title: str, profiled: bool = False) -> dict[int, dict[str, float]]:
    """Point → the seconds of the loads that end there, and those in our own code."""
    spent, own = [], []
    for number in tqdm(range(count), desc=title, unit="task", delay=2):
        if profiled and any(point - WINDOW <= number < point for point in POINTS):
            # a profiler slows what it watches: the next load is timed without one
            with cProfile.Profile(time.process_time) as profile:
                load(number)
            own.append((number, own_seconds(profile)))
            continue
        began = time.process_time()
        load(number)
        spent.append((number, time.process_time() - began))
    found = {}
    for point in (point for point in POINTS if point <= count):
        near = [seconds for number, seconds in spent if number < point + WINDOW][-WINDOW:] if profiled else None
        near = near or [seconds for number, seconds in spent if number < point][-WINDOW:]
        found[point] = {"seconds": statistics.median(near)}
        if ours := [seconds for number, seconds in own if number < point][-WINDOW:]:
            found[point]["own_seconds"] = statistics.median(ours)
    return found


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("adapter_*"))


def measure(root: Path, tasks: int, stock: int, k: int) -> dict[str, dict[str, Any]]:
    folders, file = make_tasks(root, tasks, k)
    loras = make_loras(root, min(stock, tasks))
    results: dict[str, dict[str, Any]] = {}

    for title, given in (("core, load_adapter", folders[: len(loras)]), ("LoRA r=8, load_adapter", loras)):
        model = PeftModel.from_pretrained(encoder(), str(given[0]), adapter_name="first")
        before = held(model)

        def load(number: int, model: PeftModel = model, given: list[Path] = given) -> None:
            model.load_adapter(str(given[number]), f"t{number}")

        results[title] = {"points": timed(load, len(given), title), "file_bytes": size(given[0])}
        results[title]["memory_bytes"] = (held(model) - before) / len(given)
        if title.startswith("core"):
            model = PeftModel.from_pretrained(encoder(), str(given[0]), adapter_name="first")
            profiled = timed(lambda n, model=model, given=given: load(n, model, given), len(given), "profiled", True)
            for point, numbers in profiled.items():
                results[title]["points"][point]["own_seconds"] = numbers["own_seconds"]

    model = PeftModel.from_pretrained(encoder(), str(folders[0]), adapter_name="first")
    bank = TaskBank(model, capacity=tasks)
    points = timed(lambda number: bank.add(f"t{number}", folders[number]), tasks, "core, bank.add(folder)")
    row = bank.rows.element_size() * bank.rows.shape[1]
    results["core, bank.add(folder)"] = {"points": points, "file_bytes": size(folders[0]), "memory_bytes": row}

    bank = TaskBank(model, capacity=tasks)
    began = time.process_time()
    bank.load(file)
    each = (time.process_time() - began) / tasks
    results["core, bank.load(file)"] = {
        "points": {point: {"seconds": each} for point in POINTS if point <= tasks},
        "file_bytes": file.stat().st_size / tasks,
        "memory_bytes": row,
    }
    return results


def held(model: nn.Module) -> int:
    """Bytes of distinct storage in the model's parameters and buffers, and in what its adapter layers share."""
    seen: dict[int, int] = {}
    for module in model.modules():
        holders = [getattr(module, f"subspace_{name}", {}) for name in "UVMG"]
        shared = [holder[name] for holder in holders for name in holder]
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False), *shared):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(seen.values())


def table(results: dict[str, dict[str, Any]]) -> str:
    points = sorted({point for row in results.values() for point in row["points"]})
    lines = [
        (
            f"| milliseconds of CPU for task number (in our own code) | {' | '.join(f'{p:,}' for p in points)} | file,"
            " bytes | memory, bytes |"
        ),
        "|---" * (len(points) + 3) + "|",
    ]
    for title, row in results.items():
        cells = []
        for point in points:
            numbers = row["points"].get(point)
            own = f" ({1e3 * numbers['own_seconds']:.1f})" if numbers and "own_seconds" in numbers else ""
            cells.append("not measured" if numbers is None else f"{1e3 * numbers['seconds']:.3g}{own}")
        lines.append(f"| {title} | {' | '.join(cells)} | {row['file_bytes']:,.0f} | {row['memory_bytes']:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--stock", type=int, default=200, help="at most so many by PEFT's load_adapter")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "load_many.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=kind)
    with tempfile.TemporaryDirectory() as root:
        results = measure(Path(root), args.tasks, args.stock, args.k)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    write(args.out, {"settings": settings, "results": results}, table(results))


if __name__ == "__main__":
    main()
