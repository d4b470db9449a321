"""Does a fleet's basis help? Leave-one-task-out on real texts and images; see README.md beside this file.

    python benchmarks/quality/run.py --quick                    # ten minutes: three tasks, a small fleet
    python benchmarks/quality/run.py                            # everything, a few hours of one core, resumable
    python benchmarks/quality/run.py same-head --minutes 30     # groups, for so long
    python benchmarks/quality/tables.py                         # tables and figures from the results

Every run is kept in --cache and never done twice; results are written to benchmarks/results/quality/ task by task,
those of the main tables and of the trial of heads to same-head/ there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import torch  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from benchmarks.quality.bench import Bench, OutOfTime  # noqa: E402
from benchmarks.quality.encoder import half_is_faster  # noqa: E402
from benchmarks.quality.experiment import perform  # noqa: E402
from benchmarks.quality.experiments import experiments  # noqa: E402
from benchmarks.quality.families.plan import Stage, stages  # noqa: E402
from benchmarks.quality.order import ORDER  # noqa: E402
from benchmarks.quality.same_head import quick  # noqa: E402
from benchmarks.quality.training import Budget  # noqa: E402
from benchmarks.timing import machine  # noqa: E402
from subspace_peft._io.atomic import write_text_aside  # noqa: E402
from subspace_peft.basis.cache import cache_home  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "quality"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {**experiments(), **stages()}
    parser.add_argument("groups", nargs="*", metavar="group", help=f"of {', '.join(groups)}; all without any")
    parser.add_argument(
        "--quick", action="store_true", help="three held-out tasks, two seeds, six tasks' adapters of 60 steps"
    )
    parser.add_argument("--only", nargs="*", help="experiments of the groups, by name")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--cache", type=Path, default=cache_home() / "quality", help="hidden states, sources, runs")
    parser.add_argument("--out", type=Path, help="folder of the results")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.groups if name not in groups]:
        parser.error(f"there is no group {unknown[0]!r}; there are {', '.join(groups)}")
    if given.quick and given.groups:
        parser.error("--quick has rows of its own: give no groups beside it")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bar()
    began = time.time()
    out = given.out or (RESULTS / "quick" if given.quick else RESULTS)
    bench = Bench(given.cache, began + 60 * given.minutes, results=out)
    if given.quick:
        bench = replace(
            bench, seeds=(1, 2), source_budget=Budget(examples=1000, steps=60), fleet=ORDER[:6], widenings=0
        )
        groups = {"quick": [quick()]}
    chosen = given.groups or list(groups)
    try:
        for group in chosen:
            for experiment in groups[group]:
                if not given.only or experiment.name in given.only:
                    if isinstance(experiment, Stage):
                        experiment.perform(bench, out)
                    else:
                        perform(bench, experiment, out)
    except OutOfTime:
        print("The time is over. The same command goes on where this one stopped.")
    note(out / "machine.json", chosen, time.time() - began)


def note(log: Path, groups: list[str], seconds: float) -> None:
    """Add a call to `log`: its groups, minutes, and which of the listed machines it ran on."""
    kept = json.loads(log.read_text()) if log.is_file() else {"machines": [], "runs": []}
    here = {**machine(), "half": half_is_faster()}
    if here not in kept["machines"]:
        kept["machines"].append(here)
    kept["runs"].append(
        {
            "groups": groups,
            "minutes": round(seconds / 60, 1),
            "cpu_minutes": round(time.process_time() / 60, 1),
            "machine": kept["machines"].index(here),
        }
    )
    write_text_aside(log, json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
