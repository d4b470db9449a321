"""Learn tasks one after another, by every method; see README.md beside this file.

    python benchmarks/continual/run.py                                # everything, resumable
    python benchmarks/continual/run.py --orders A --seeds 1           # one order, one seed
    python benchmarks/continual/run.py "OSF" "append 2" --minutes 30  # some methods, for so long
    python benchmarks/continual/tables.py                             # tables and figures from the results

Every stream is kept in --cache and never run twice; results are written to benchmarks/results/continual/ as they come.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import torch  # noqa: E402
from common.run_cache import plain  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from benchmarks.continual.methods import methods, random_basis  # noqa: E402
from benchmarks.continual.setting import ORDERS, SEEDS, Data, K, Stream  # noqa: E402
from benchmarks.continual.streams import Method, Streams, every_stream  # noqa: E402
from benchmarks.quality.bench import Bench, OutOfTime  # noqa: E402
from benchmarks.quality.run import note  # noqa: E402
from subspace_peft._io.atomic import write_text_aside  # noqa: E402
from subspace_peft.basis.cache import cache_home  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "continual"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {**methods(), f"random basis k={K}": random_basis()}
    parser.add_argument("methods", nargs="*", metavar="method", help=f"of {', '.join(known)}; all without any")
    parser.add_argument("--orders", nargs="*", default=list(ORDERS), choices=list(ORDERS), help="of the tasks")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no task after so long")
    parser.add_argument("--data", type=Path, default=cache_home() / "quality", help="hidden states and given adapters")
    parser.add_argument("--cache", type=Path, default=cache_home() / "continual", help="finished streams")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.methods if name not in known]:
        parser.error(f"there is no method {unknown[0]!r}; there are {', '.join(known)}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bar()
    began = time.time()
    streams = Streams(Data(Bench(given.data)), given.cache, began + 60 * given.minutes)
    chosen = [known[name] for name in given.methods or known]
    try:
        for order, stream in every_stream(given.orders, given.seeds):
            for method in chosen:
                rate, tried = streams.rate(known[method.swept] if method.swept else method)
                found = with_baseline(streams, stream, streams.result(method, stream, rate))
                write(given.out, method, rate, tried, f"{order}{stream.seed}", found)
    except OutOfTime:
        print("The time is over. The same command goes on where this one stopped.")
    note(given.out / "machine.json", [method.name for method in chosen], time.time() - began)


def with_baseline(streams: Streams, stream: Stream, found: dict[str, Any]) -> dict[str, Any]:
    """Add to a method's forward scores those in as many random directions as its basis had."""
    baseline = {}
    for step in found["steps"]:
        if "forward" in step:
            control = random_basis(step["forward"]["k"])
            rate, _ = streams.rate(random_basis())
            alone = replace(stream, given=(), arriving=(step["task"],))
            baseline[step["task"]] = streams.result(control, alone, rate)["R"][0][0]
    return {**found, "baseline": baseline}


def write(
    folder: Path, method: Method, rate: float, tried: dict[float, float], stream: str, found: dict[str, Any]
) -> None:
    """Add a stream to a method's file of results, whatever other streams it has."""
    file = folder / f"{slug(method.name)}.json"
    body = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    streams = body.get("streams", {}) if body.get("rate") == rate else {}
    streams[stream] = found
    body = {
        "method": method.name,
        "rate": rate,
        "sweep": sorted(tried.items()),
        "streams": dict(sorted(streams.items())),
    }
    write_text_aside(file, json.dumps(plain(body), separators=(",", ":")).replace('{"tasks"', '\n{"tasks"') + "\n")


def slug(name: str) -> str:
    """Return a method's name as that of its file."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    main()
