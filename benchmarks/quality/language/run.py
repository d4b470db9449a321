"""The language benchmark; see README.md beside this file.

    python benchmarks/quality/language/run.py                     # q,v: the table, then its further rows; all linear
    python benchmarks/quality/language/run.py qv --minutes 30     # for so long; the same command goes on
    python benchmarks/quality/language/run.py qv --only reviews reuters
    python benchmarks/quality/language/tables.py                  # tables and figure from the results

Every cell is written to benchmarks/results/quality/language/ as it ends and never run twice, on any machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import torch  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from benchmarks.quality.bench import OutOfTime  # noqa: E402
from benchmarks.quality.language.bench import LanguageBench  # noqa: E402
from benchmarks.quality.language.prompts import ORDER  # noqa: E402
from benchmarks.quality.language.rows import MORE, TABLE  # noqa: E402
from benchmarks.quality.run import note  # noqa: E402
from subspace_peft.basis.cache import cache_home  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "quality" / "language"
STAGES = {"qv": ("qv", TABLE), "qv-more": ("qv", MORE), "linear": ("linear", TABLE), "linear-more": ("linear", MORE)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(STAGES)}; all without any")
    parser.add_argument("--only", nargs="*", choices=ORDER, metavar="task", help="held-out tasks; all without it")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3], help="report seeds")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument(
        "--cache", type=Path, default=cache_home() / "quality" / "language", help="hidden states, sources"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.stages if name not in STAGES]:
        parser.error(f"there is no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    torch.set_num_threads(1)
    disable_progress_bar()
    began = time.time()
    chosen = given.stages or list(STAGES)
    try:
        for stage in chosen:
            targets, rows = STAGES[stage]
            until = began + 60 * given.minutes
            LanguageBench(given.cache, given.out, targets, until, seeds=given.seeds).perform(rows, given.only)
    except OutOfTime:
        print("The time is over. The same command goes on where this one stopped.")
    note(given.out / "machine.json", [f"language {stage}" for stage in chosen], time.time() - began)


if __name__ == "__main__":
    main()
