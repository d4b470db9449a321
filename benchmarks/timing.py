"""Paired timing: every contender once per round, in a random order, so that a machine's load falls on all alike."""

from __future__ import annotations

import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def paired(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 2, seed: int = 0
) -> dict[str, list[dict[str, float]]]:
    """Return the seconds of every contender, per round: wall clock and CPU time of this process.

    Where a GPU has been used, each one's work on it is awaited: there the wall clock is the one to read.

    Args:
        contenders: name → what is timed.
        rounds, warmup: rounds that count, and rounds before them that do not.
        seed: of the orders.
    """
    draw, seconds = random.Random(seed), {name: [] for name in contenders}
    for number in range(warmup + rounds):
        order = list(contenders)
        draw.shuffle(order)
        for name in order:
            settle()
            wall, cpu = time.perf_counter(), time.process_time()
            contenders[name]()
            settle()
            spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            if number >= warmup:
                seconds[name].append(spent)
    return seconds


def settle() -> None:
    """Wait for what a GPU still computes, if one has been used by this process."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Return how many bytes of the GPU's memory `run` takes at its peak, beyond what is held before it.

    None where no GPU has been used by this process.
    """
    if not torch.cuda.is_initialized():
        run()
        return None
    settle()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    settle()
    return torch.cuda.max_memory_allocated() - before


def ratios(seconds: Mapping[str, Sequence[Mapping[str, float]]], floor: str) -> dict[str, dict[str, float]]:
    """Return per contender the median and quartiles of its time over that of `floor` in the same round.

    Beside them its median seconds (CPU and wall).
    """
    found = {}
    for name, rounds in seconds.items():
        found[name] = {}
        for clock in ("cpu", "wall"):
            quotients = [own[clock] / other[clock] for own, other in zip(rounds, seconds[floor], strict=True)]
            low, middle, high = statistics.quantiles(quotients, n=4)
            found[name] |= {f"{clock}_ratio": middle, f"{clock}_low": low, f"{clock}_high": high}
            found[name][f"{clock}_seconds"] = statistics.median(one[clock] for one in rounds)
    return found


def saved_bytes(model: torch.nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes of distinct storage that autograd keeps for the backward pass of `run`.

    The parameters and buffers of `model` are left out.
    """
    kept: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        # with its history an output that its own node keeps would hold itself alive, and the whole graph with it
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())


def machine() -> dict[str, Any]:
    """Return the machine and the versions that numbers were measured on."""
    import peft
    import transformers

    import subspace_peft

    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "subspace_peft": subspace_peft.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        **_accelerator(),
    }


def _accelerator() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    facts = torch.cuda.get_device_properties(0)
    return {
        "gpu": facts.name,
        "gpu_bytes": facts.total_memory,
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
    }


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def write(file: Path, body: Mapping[str, Any], table: str) -> None:
    """Write the results as JSON and, beside it, as a Markdown table; print that."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine(), **body}, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
