"""Other packages that put a fleet of LoRAs on shared components, run by build_basis.py in their own environment.

    python fleet_compressors.py vlora-dev|lorashare FLEET COUNT NUMBERS

Compresses FLEET/lora-0 … by the package's own `from_adapters`, with the most components whose numbers (components,
means, loadings of all adapters) are at most NUMBERS. Prints seconds, peak memory above what the process held after its
imports, and what is kept of the updates: the mean over adapters and modules of ``1 − ‖ΔW − ΔW'‖² / ‖ΔW‖²``, in
factored form.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path
from typing import Any

VERSIONS = {"vlora-dev": "1.0.0", "lorashare": "0.1.3"}


def environment(folder: Path) -> Path:
    """Return the interpreter of a virtual environment with the packages, made where there is none.

    Torch and the rest are this interpreter's.

    Raises:
        SystemExit: the packages cannot be installed.
    """
    python = folder / "bin" / "python"
    mark = folder / "ready.json"
    if mark.is_file() and json.loads(mark.read_text()) == VERSIONS:
        return python
    venv.create(folder, with_pip=True, clear=True)
    wanted = [f"{name}=={version}" for name, version in VERSIONS.items()]
    # without their requirements: they are to run on the same torch as what they are compared with
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *wanted], check=False)
    if done.returncode:
        raise SystemExit(f"{' and '.join(wanted)} cannot be installed. Leave them out with --peers-up-to 0.")
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    Path(site.strip(), "parent.pth").write_text("\n".join(sorted(paths)) + "\n")
    mark.write_text(json.dumps(VERSIONS))
    return python


def status(name: str) -> int:
    """Return a memory figure of this process, in bytes."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def kept(original: dict[str, Any], again: dict[str, Any]) -> list[float]:
    """Per module, of state dicts with ``….lora_A.weight`` and ``….lora_B.weight``."""
    shares = []
    for key in original:
        if not key.endswith("lora_B.weight"):
            continue
        other = key.replace("lora_B", "lora_A")
        (b, a), (d, c) = ((each[key].double(), each[other].double()) for each in (original, again))
        inner = [float(((x.T @ y) * (z @ w.T)).sum()) for x, y, z, w in ((b, b, a, a), (b, d, a, c), (d, d, c, c))]
        shares.append(1 - (inner[0] - 2 * inner[1] + inner[2]) / inner[0])
    return shares


def vlora(folders: list[str], most: int) -> tuple[dict[str, float], Any]:
    from vlora import SharedSubspace, load_adapter

    first = load_adapter(folders[0])
    # per module and side a flattened factor is one vector: components and the mean of its length, one loading per
    # adapter
    sizes = [each[name].numel() for name in first.layer_names for each in (first.lora_a, first.lora_b)]
    components = max(1, (most - sum(sizes)) // sum(size + len(folders) for size in sizes))
    start, wall, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    adapters = [load_adapter(folder) for folder in folders]
    for adapter in adapters:
        # as they come: it decomposes them in their own dtype, which torch cannot do for float16
        adapter.lora_a = {name: value.float() for name, value in adapter.lora_a.items()}
        adapter.lora_b = {name: value.float() for name, value in adapter.lora_b.items()}
    made = SharedSubspace.from_adapters(adapters, task_ids=folders, num_components=components)
    facts = spent(wall, cpu, start)
    numbers = sum(
        each.numel() for d in (made.components_a, made.components_b, made.means_a, made.means_b) for each in d.values()
    )
    numbers += sum(
        each.numel() for task in made.tasks.values() for d in (task.loadings_a, task.loadings_b) for each in d.values()
    )

    def again(folder: str) -> dict[str, Any]:
        weights = made.reconstruct(folder)
        return {
            f"base_model.model.{name}.lora_{side}.weight": each[name]
            for name in weights.layer_names
            for side, each in (("A", weights.lora_a), ("B", weights.lora_b))
        }

    return {**facts, "components": components, "numbers": numbers}, again


def lorashare(folders: list[str], most: int) -> tuple[dict[str, float], Any]:
    from lorashare import SHAREModel
    from lorashare.compression import reconstruct_adapter_weights
    from safetensors.torch import load_file

    first = load_file(Path(folders[0]) / "adapter_model.safetensors")
    rank = min(next(iter(first.values())).shape)
    components = most // sum(max(each.shape) + len(folders) * rank for each in first.values())
    start, wall, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    made = SHAREModel.from_adapters(dict(zip(folders, folders, strict=True)), num_components=components, device="cpu")
    facts = spent(wall, cpu, start)
    numbers = sum(each.numel() for each in made.components.values())
    numbers += sum(each.numel() for loadings in made.all_loadings.values() for each in loadings.values())
    return (
        {**facts, "components": components, "numbers": numbers},
        lambda folder: reconstruct_adapter_weights(made.components, made.all_loadings[folder]),
    )


def spent(wall: float, cpu: float, start: int) -> dict[str, float]:
    return {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": max(0, status("VmHWM") - start),
    }


def main(name: str, fleet: str, count: str, most: str) -> None:
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    small = torch.randn(300, 64)
    # what libraries set up at their first use is no part of a method's cost
    torch.linalg.svd(small), torch.linalg.eigh(small.T @ small)
    folders = [str(Path(fleet, f"lora-{number}")) for number in range(int(count))]
    facts, again = {"vlora-dev": vlora, "lorashare": lorashare}[name](folders, int(most))
    shares = [
        share
        for folder in folders
        for share in kept(load_file(Path(folder) / "adapter_model.safetensors"), again(folder))
    ]
    print(json.dumps({**facts, "kept": sum(shares) / len(shares)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
