"""The cost of loading tasks of a bundle: into a bank, as PEFT adapters, and over HTTP by byte ranges.

    python benchmarks/bundle.py
    python benchmarks/bundle.py --tasks 100 --stock 10

A RoBERTa-base-shaped encoder (12 × 768) with query and value adapted, core k=16, as in load_many.py. Seconds are CPU
time of this process. Requests and bytes are counted by a Hub on loopback (tests/push_hub.py) that serves ranges: of
opening the bundle and reading one task, of a second task, and of --stock more, the basis aside. Writes JSON and a
Markdown table to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from huggingface_hub import constants
from load_many import TARGETS, encoder
from peft import get_peft_model
from timing import write
from tqdm.auto import tqdm

from subspace_peft import SubspaceConfig, TaskBank, build_basis, bundle_tasks, load_task, open_bundle, push_bundle
from subspace_peft.bundle import bundle as opened
from subspace_peft.bundle.format import BUNDLE_FILE
from tests.push_hub import PushHub

POINTS = (1, 100, 1000)


def make_bundle(root: Path, tasks: int, k: int) -> dict[int, Path]:
    """Bundles of the first 1, 100, … tasks: one of each count up to `tasks`."""
    basis = build_basis(builder="random", base_model=encoder(), target_modules=TARGETS, k=k, progress=False)
    basis.save_pretrained(root / "basis")
    model = get_peft_model(encoder(), SubspaceConfig(basis=str(root / "basis"), target_modules=TARGETS))
    bank, draw, made = TaskBank(model, capacity=tasks), torch.Generator().manual_seed(0), {}
    sizes = {module: layer.r["default"] for module, layer in bank.layers.items()}
    for number in tqdm(range(tasks), desc="making tasks", unit="task", delay=2):
        bank.add(f"t{number}", {module: torch.randn(size, generator=draw) for module, size in sizes.items()})
        if number + 1 in (*POINTS, tasks):
            bundle_tasks(bank, root / f"bundle{number + 1}")
            made[number + 1] = root / f"bundle{number + 1}"
    return made


def seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def on_this_machine(made: dict[int, Path], stock: int) -> dict[str, dict[int, float]]:
    """Row → number of tasks → seconds of CPU for all of them, the bundle's opening included."""
    rows: dict[str, dict[int, float]] = {}
    for count, folder in made.items():
        config = SubspaceConfig(basis=str(folder.parent / "basis"), target_modules=TARGETS)

        def into_bank(bank: TaskBank, folder: Path = folder) -> None:
            bank.load(folder / BUNDLE_FILE)

        def one_by_one(bank: TaskBank, folder: Path = folder) -> None:
            found = open_bundle(folder)
            for name in tqdm(found, desc="bank.add", unit="task", delay=2):
                bank.add(name, found.read(name).cores)

        for title, run in (
            ("bank.load(file)", into_bank),
            ("bank.add(name, open_bundle(…).read(name).cores)", one_by_one),
        ):
            bank = TaskBank(get_peft_model(encoder(), config), capacity=count)
            opened._opened.clear()
            rows.setdefault(title, {})[count] = seconds(lambda run=run, bank=bank: run(bank))
        if count <= stock:
            opened._opened.clear()
            model = get_peft_model(encoder(), config)

            def as_adapters(model: Any = model, folder: Path = folder, count: int = count) -> None:
                for number in tqdm(range(count), desc="load_task", unit="task", delay=2):
                    load_task(model, folder, f"t{number}")

            rows.setdefault("load_task(model, …), an adapter each", {})[count] = seconds(as_adapters)
    return rows


def over_http(folder: Path, more: int, root: Path) -> dict[str, dict[str, int]]:
    """Return what is loaded → requests and bytes that the Hub sent."""
    with PushHub() as hub:
        constants.ENDPOINT = hub.url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_DISABLE_XET, constants.HF_HUB_OFFLINE = True, False
        constants.HF_HUB_CACHE = str(root / "cache")
        push_bundle(folder, "org/bundle", force=True, token="none")
        opened._opened.clear()
        found: dict[str, dict[str, int]] = {}
        # from the end, where the first request, of the file's beginning, has not been
        names = list(reversed(list(open_bundle(folder))))
        for title, wanted in (
            ("open and one task", names[:1]),
            ("a second task", names[1:2]),
            (f"{more} further tasks", names[2 : 2 + more]),
        ):
            hub.log.clear()
            hub.sent = 0
            for name in tqdm(wanted, desc=title, unit="task", delay=2):
                open_bundle("org/bundle").read(name)
            found[title] = {"tasks": len(wanted), "requests": len(hub.log), "bytes": hub.sent}
        found["the whole file"] = {"tasks": len(names), "requests": 1, "bytes": open_bundle("org/bundle").store.size}
    return found


def table(rows: dict[str, dict[int, float]], http: dict[str, dict[str, int]]) -> str:
    points = sorted({point for row in rows.values() for point in row})
    lines = [
        f"| seconds of CPU for so many tasks | {' | '.join(f'{p:,}' for p in points)} |",
        "|---" * (len(points) + 1) + "|",
    ]
    for title, row in rows.items():
        cells = ["not measured" if point not in row else f"{row[point]:.3g}" for point in points]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| over HTTP | tasks | requests | bytes |", "|---|---|---|---|"]
    lines += [
        f"| {title} | {row['tasks']:,} | {row['requests']:,} | {row['bytes']:,} |" for title, row in http.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument(
        "--stock", type=int, default=100, help="at most so many as adapters, and further ones over HTTP"
    )
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bundle.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=kind)
    with tempfile.TemporaryDirectory() as root:
        os.environ["SUBSPACE_PEFT_CACHE"] = str(Path(root, "own"))
        made = make_bundle(Path(root), args.tasks, args.k)
        rows = on_this_machine(made, args.stock)
        http = over_http(made[args.tasks], args.stock, Path(root))
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    write(args.out, {"settings": settings, "results": rows, "http": http}, table(rows, http))


if __name__ == "__main__":
    main()
