"""Does the energy that a fleet's basis keeps of an adapter left out tell where the basis helps?

    python benchmarks/quality/energy.py                 # after run.py; seconds, nothing is trained

Reads the twelve text tasks' own adapters from the cache (trains those that are missing), measures by `report_basis`
what a basis of the eleven others keeps of each, and writes energy.json beside the results. tables.py holds it against
the scores.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

from benchmarks.quality import tasks  # noqa: E402
from benchmarks.quality.paired import Difference  # noqa: E402
from subspace_peft._io.atomic import write_text_aside  # noqa: E402

SHUFFLES = 20_000
K = 16


def agreement(energy: dict[str, float], found: Difference, seed: int = 0) -> tuple[float, float]:
    """Return Spearman's correlation over tasks between energy kept and a score difference, and its chance.

    The chance is the share of shufflings with one as large or larger, of either sign.

    Raises:
        ValueError: fewer than three tasks in common, or the same number for all.
    """
    common = [task for task in found.tasks if task in energy]
    a, b = (rankdata([each[task] for task in common]) for each in (energy, found.tasks))
    if len(common) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        raise ValueError(f"{len(common)} tasks in common: nothing to correlate.")
    a, b = (each - each.mean() for each in (a, b))
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    value = float(a @ b) / scale
    drawn = np.random.default_rng(seed)
    shuffled = np.array([a @ drawn.permutation(b) for _ in range(SHUFFLES)]) / scale
    return value, float((np.abs(shuffled) >= abs(value) - 1e-12).mean())


def main(arguments: list[str] | None = None) -> None:
    from benchmarks.quality.fleet import source
    from benchmarks.quality.run import RESULTS
    from subspace_peft import build_basis
    from subspace_peft.basis.cache import cache_home
    from subspace_peft.report import report_basis

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=cache_home() / "quality", help="as of run.py")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(arguments)
    folders = [str(source(name, given.cache)) for name in tasks.names("text")]
    report = report_basis(build_basis(folders, k=K, progress=False), folders, progress=False)
    kept = {entry["name"]: {key: entry[key] for key in ("unseen", "mean_only")} for entry in report.sources}
    body = {"k": K, "random": report.numbers["random"], "tasks_left_out": kept}
    write_text_aside(given.out / "energy.json", json.dumps(body, indent=1) + "\n")
    print(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
