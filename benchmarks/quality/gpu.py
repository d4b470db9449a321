"""What a GPU machine can tell: recipes on full-size models, and the speed and memory of adapters at full width.

    python benchmarks/quality/gpu.py --list                     # the stages, what each needs, and an estimate
    python benchmarks/quality/gpu.py --dry-run                  # every stage at toy size on a processor, without a Hub
    python benchmarks/quality/gpu.py --stage steps-decoder      # one stage; again: what is left of it
    python benchmarks/quality/gpu.py --without-hub              # all stages that need no Hub
    python benchmarks/quality/gpu.py --glue mrpc rte --mistral mistralai/Mistral-7B-Instruct-v0.2 --adapters ID …

Every measurement is kept in --out as soon as it is taken, with the machine that it was taken on, and is not taken
twice on the same kind of machine with the same settings and versions. What is timed is timed in turn, round by round
in random order: read the ratios and their quartiles, of the wall clock where the work is a GPU's. Not run on a GPU
yet: the estimates are guesses.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# the recipes, and the benchmarks that are scripts
sys.path += [str(place) for place in (ROOT, ROOT / "recipes", ROOT / "benchmarks") if str(place) not in sys.path]

import glue  # noqa: E402
import image_classification  # noqa: E402
import mistral  # noqa: E402
import torch  # noqa: E402
from common.run_cache import canonical, plain  # noqa: E402

from benchmarks.quality.gpu_plan import Plan, Stage  # noqa: E402
from benchmarks.quality.gpu_recipes import recipe_stages  # noqa: E402
from benchmarks.quality.gpu_speed import speed_stages  # noqa: E402
from benchmarks.quality.gpu_stand_ins import make_stand_ins, toy_plan  # noqa: E402
from benchmarks.timing import machine, peak_bytes  # noqa: E402
from subspace_peft._io.atomic import write_text_aside  # noqa: E402
from subspace_peft.basis.cache import cache_home  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
# two data sets of the collection whose adapters the recipe names, none of which was trained on them
INSTRUCTIONS = ("Lots-of-LoRAs/task475_yelp_polarity_classification", "Lots-of-LoRAs/task1541_agnews_classification")


def stages(plan: Plan) -> list[Stage]:
    """Return all stages, those that need no Hub first."""
    return [*speed_stages(plan), *recipe_stages(plan)]


class Results:
    """The measurements that were taken, in one file.

    Args:
        file: JSON; made when the first measurement is kept.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.kept: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["cells"] if file.is_file() else []

    def read(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return the measurement of that key, or None."""
        return next((each for each in self.kept if canonical(each["key"]) == canonical(key)), None)

    def write(self, key: dict[str, Any], **found: Any) -> None:
        """Keep a measurement."""
        self.kept.append({"key": plain(key), **plain(found)})
        write_text_aside(self.file, json.dumps({"cells": self.kept}, indent=1, allow_nan=False) + "\n")


def run(chosen: Iterable[Stage], plan: Plan, results: Results) -> None:
    """Take every measurement of the stages that is not kept yet."""
    facts = machine()
    for stage in chosen:
        for name, cell in stage.cells.items():
            key = {"stage": stage.name, "cell": name, "machine": facts, **plan.settings(), "settings": stage.settings}
            if results.read(key) is not None:
                print(f"{stage.name}, {name}: kept", flush=True)
                continue
            began, found = time.perf_counter(), {}
            peak = peak_bytes(lambda cell=cell, found=found: found.update(cell()))
            seconds = time.perf_counter() - began
            # the other stages take the peaks of their contenders, one by one
            results.write(key, seconds=seconds, peak_bytes=peak if stage.hub else None, result=found)
            print(f"{stage.name}, {name}: {seconds:.1f} s", flush=True)


def listing(all_stages: Iterable[Stage]) -> str:
    """Return the stages as a table."""
    lines = ["| stage | what | needs the Hub | measurements | minutes, a guess |", "|---|---|---|---|---|"]
    lines += [
        f"| {stage.name} | {stage.about} | {'yes' if stage.hub else 'no'} | {len(stage.cells)} | {stage.minutes:g} |"
        for stage in all_stages
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the stages, and do nothing")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the processor, nothing is kept")
    parser.add_argument("--stage", nargs="+", metavar="NAME", help="these stages; all by default")
    parser.add_argument("--without-hub", action="store_true", help="only stages that need no Hub")
    parser.add_argument("--device", default="cuda", help="of the stages that need no Hub")
    parser.add_argument("--roberta", default=glue.Arguments.model, help="Hub id or folder")
    parser.add_argument("--vit", default=image_classification.Arguments.model, help="Hub id or folder")
    parser.add_argument("--mistral", default=mistral.MISTRAL, help="Hub id or folder")
    parser.add_argument("--adapters", nargs="+", default=mistral.FLEET, help="published adapters of --mistral")
    parser.add_argument("--glue", nargs="+", default=["mrpc", "rte", "stsb"], help="held-out GLUE tasks")
    parser.add_argument("--images", nargs="+", default=["group9", "group8"], help="held-out groups of classes")
    parser.add_argument("--instructions", nargs="+", default=INSTRUCTIONS, help="held-out data sets")
    parser.add_argument("--cache", type=Path, default=cache_home() / "quality-gpu", help="what recipes leave")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file of the measurements")
    given = parser.parse_args(arguments)
    names = ("device", "roberta", "vit", "mistral", "adapters", "glue", "images", "instructions")
    values = {name: tuple(v) if isinstance(v := getattr(given, name), (list, tuple)) else v for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        plan = Plan(toy=False, folder=given.cache, **values)
        results = given.out
        if given.dry_run and not given.list:
            plan, results = toy_plan(Path(scratch)), Path(scratch) / "results.json"
        everything = stages(plan)
        if unknown := [name for name in given.stage or () if name not in {each.name for each in everything}]:
            parser.error(f"there is no stage {unknown[0]!r}; there are {', '.join(each.name for each in everything)}")
        chosen = [
            each
            for each in everything
            if each.name in (given.stage or [each.name]) and not (given.without_hub and each.hub)
        ]
        if given.list:
            print(listing(chosen))
            return
        if plan.device.startswith("cuda") and not torch.cuda.is_available():
            parser.error("there is no GPU that torch can use: try --dry-run, or --device cpu")
        if plan.device.startswith("cuda"):
            # so that memory is counted from the first measurement on
            torch.cuda.init()
        for kind in (UserWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=kind)
        if plan.toy and any(each.hub for each in chosen):
            make_stand_ins(plan)
        run(chosen, plan, Results(results))
        print(f"{len(Results(results).kept)} measurements {'walked' if plan.toy else f'in {results}'}")


if __name__ == "__main__":
    main()
