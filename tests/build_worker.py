"""Run by tests/test_build_processes.py in two processes: `build_worker.py SCENARIO OUT SOURCE…`; each writes
OUT/<rank>.json."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from subspace_peft import build_basis, build_clusters
from subspace_peft.builders import build as building
from subspace_peft.builders import module_plan, rebuild_basis, scan_fleet

RANK = int(os.environ["RANK"])
ARGUMENTS: dict[str, Any] = {"k": 4, "directions": 2, "progress": False}


def counted() -> tuple[list[str], list[str]]:
    """Names of the modules built and of the sources scanned in this process from here on."""
    built: list[str] = []
    scanned: list[str] = []
    build, scan = building._build_module, scan_fleet.scan

    def build_one(plan: Any, reader: Any, name: str, *args: Any, **more: Any) -> Any:
        built.append(name)
        return build(plan, reader, name, *args, **more)

    def scan_one(source: Any) -> Any:
        scanned.append(source.name)
        return scan(source)

    building._build_module, scan_fleet.scan = build_one, scan_one
    return built, scanned


def fail(error: BaseException | None, after: int, pause: float = 0.0) -> None:
    """The second process fails at its next module, by an error or by a kill; the first takes its time for each."""
    build = building._build_module

    def build_one(plan: Any, reader: Any, name: str, *args: Any, **more: Any) -> Any:
        nonlocal after
        time.sleep(pause if RANK == 0 else 0)
        if RANK == 1 and after == 0:
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise error
        after -= 1
        return build(plan, reader, name, *args, **more)

    building._build_module = build_one


def run(scenario: str, out: Path, sources: list[str]) -> dict[str, Any]:
    built, scanned = counted()
    given: dict[str, Any] = dict(ARGUMENTS)
    if scenario == "streamed":
        module_plan.EXACT_COLUMNS = 8
    if scenario in ("two machines", "other files"):
        # no disk in common: each has its own folder of this name
        uuid.getnode = lambda: RANK
        os.chdir(out / f"machine{RANK}")
    if scenario == "budget":
        # its measurements are divided, and gone on from, as the modules are
        given = {"budget": 60, "progress": False, "work_folder": out / f"work{RANK}"}
    if scenario == "other list" and RANK == 1:
        sources = sources[1:]
    if scenario == "bad arguments" and RANK == 1:
        given["k"] = -1
    if scenario == "own disks":
        given["work_folder"] = out / f"work{RANK}"
    if scenario in ("fails", "fails early", "killed"):
        # without a common folder the first hears of it when its share is done
        given["work_folder"] = None if scenario == "fails" else out / "work"
        fail(None if scenario == "killed" else OSError(28, "No space left on device"), 0, pause=1.0)
    if scenario == "clusters":
        found = build_clusters(sources, 2, k=4, progress=False)
        return {"fingerprints": [basis.fingerprint for basis in found.bases], "facts": found.to_dict(), "built": built}
    began = time.perf_counter()
    try:
        basis = rebuild_basis(sources[0], progress=False) if scenario == "rebuilt" else build_basis(sources, **given)
    except Exception as error:
        return {
            "error": type(error).__name__,
            "text": str(error),
            "seconds": time.perf_counter() - began,
            "built": built,
        }
    basis.save_pretrained(out / f"basis{RANK}")
    found: dict[str, Any] = {"fingerprint": basis.fingerprint, "built": built, "scanned": scanned}
    if scenario == "own disks":
        built.clear()
        found["again"] = build_basis(sources, **given).fingerprint
        found["built again"] = list(built)
    # the process group is the script's own from here on
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    return {**found, "sum": float(total), "accelerate's": PartialState().num_processes}


if __name__ == "__main__":
    scenario, out, *sources = sys.argv[1:]
    Path(out, f"{RANK}.json").write_text(json.dumps(run(scenario, Path(out), sources)))
