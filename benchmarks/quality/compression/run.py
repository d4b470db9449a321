"""What is left of a fleet of LoRAs in fewer bytes? See README.md beside this file.

    python benchmarks/quality/compression/run.py                  # all groups, resumable
    python benchmarks/quality/compression/run.py text --minutes 30
    python benchmarks/quality/compression/tables.py               # tables and figures from the results

A cell, one way to store one fleet, is measured once: what the cache or the committed results have is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import torch  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from benchmarks.quality import tasks  # noqa: E402
from benchmarks.quality.bench import OutOfTime  # noqa: E402
from benchmarks.quality.compression.cells import Plan, Results, perform  # noqa: E402
from benchmarks.quality.compression.choices import CHOICES, MAIN_CHOICES, SEEDS, Choice, sweep  # noqa: E402
from benchmarks.quality.compression.fleets import (  # noqa: E402
    benchmark_fleets,
    choice_plans,
    continued_fleet,
    family_fleets,
    members_of,
)
from benchmarks.quality.run import note  # noqa: E402
from subspace_peft._io.atomic import write_text_aside  # noqa: E402
from subspace_peft.basis.cache import cache_home  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "quality" / "compression"
GROUPS = ("text", "image", "families", "choices", "choices-family", "continued")  # in the order of a run
FAMILIES = ("kinds", "groups", "digits")
LARGE = "kinds"  # of more than 32 members


def swept_rate(file: Path, names: Sequence[str], folder: Path) -> Callable[[Choice], float]:
    """Return a function that gives a choice's best rate, from the sweeps in `file` or swept now on `names`."""

    def rate_of(choice: Choice) -> float:
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if choice.swept_as not in kept:
            swept = next(each for each in CHOICES if each.slug == choice.swept_as)
            kept[choice.swept_as] = sorted(sweep(swept, names, folder).items())
            write_text_aside(file, json.dumps(kept, indent=1) + "\n")
        return max(kept[choice.swept_as], key=lambda pair: pair[1])[0]

    return rate_of


def plans(group: str, cache: Path, out: Path) -> Iterable[Plan]:
    """Return the plans of a group, in the order in which they are measured."""
    names = tasks.names("text")
    rate_of = swept_rate(out / "choices-rates.json", names, cache)
    if group == "families":
        return family_fleets(cache, FAMILIES)
    if group == "choices":
        return choice_plans("choices", names, cache, rate_of)
    if group == "choices-family":
        # at the rates of the twelve tasks
        return choice_plans(f"choices-{LARGE}", members_of(LARGE), cache, rate_of, MAIN_CHOICES, SEEDS[:1])
    if group == "continued":
        return [continued_fleet(cache)]
    return benchmark_fleets(cache)[group]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="group", help=f"of {', '.join(GROUPS)}; all without any")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so long")
    parser.add_argument("--only", nargs="*", metavar="SEED", help="only fleets of these seeds")
    parser.add_argument("--cache", type=Path, default=cache_home() / "quality", help="hidden states, adapters, cells")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.groups if name not in GROUPS]:
        parser.error(f"there is no group {unknown[0]!r}; there are {', '.join(GROUPS)}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bar()
    began = time.time()
    chosen = given.groups or list(GROUPS)
    try:
        for group in chosen:
            for plan in plans(group, given.cache, given.out):
                if given.only and plan.variant.rpartition("seed ")[2] not in given.only:
                    continue
                results = Results(given.out / f"{plan.fleet}.json", given.cache / "compression" / plan.fleet)
                perform(plan, results, began + 60 * given.minutes)
    except OutOfTime:
        print("The time is over. The same command goes on where this one stopped.")
    note(given.out / "machine.json", chosen, time.time() - began)


if __name__ == "__main__":
    main()
