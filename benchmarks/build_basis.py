"""Time, memory and energy kept of building a basis from a large fleet, beside exact and other published ways.

    python benchmarks/build_basis.py
    python benchmarks/build_basis.py --adapters 50 100 --layers 1

Synthetic fleets with the shapes of Mistral-7B's q_proj and v_proj (a few layers of 32), r=16, float16 files: common
directions of falling weight and noise of each adapter's own. Every measurement is a process of its own with one
thread: wall and CPU seconds, and peak memory above what the process held after its imports. `build_basis` works on the
whole fleet, both factors of every module, statistics and all. The others get one factor, the first q_proj's lora_B, in
memory from the start, and find its leading centred directions, as EigenLoRAx asks for (the covariance and
`torch.linalg.eig` of its released way, written here once more). Seconds for all 32 layers are extrapolated and say so.
Files are asked out of the page cache before they are read, which a file system may ignore.

Two packages of the index, vlora-dev and lorashare, compress the same whole fleet up to a size that they can take, each
with the most components that need no more numbers than our U, V and cores (peers/fleet_compressors.py, in a virtual
environment of their own which sees this one's torch).

The floor is the larger of two: reading the bytes once, and the products with B and A that the build makes (its passes,
at its subspaces' width, and the two of its probe) at the fastest rate that a large float32 product reaches here, in
one thread. Writes JSON and a Markdown table to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peers.fleet_compressors import VERSIONS, environment
from safetensors import safe_open
from safetensors.torch import save_file
from timing import write
from tqdm.auto import tqdm

from subspace_peft import build_basis
from subspace_peft.builders.spectral_bound import PROBE_PASSES, PROBES
from subspace_peft.builders.streaming import width_of

SHAPES = {"q_proj": (4096, 4096), "v_proj": (1024, 4096)}
ALL_LAYERS = 32
RANK = 16
COMMON = 64  # directions that all adapters draw from
OWN = 1.6  # size of an adapter's own noise beside them
FACTOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def make_fleet(root: Path, count: int, layers: int, shapes: Mapping[str, tuple[int, int]] = SHAPES) -> list[Path]:
    """Folders of `count` LoRAs; the first n of them are the fleet of n."""
    draw = torch.Generator().manual_seed(0)
    fall = torch.arange(1, COMMON + 1) ** -0.5
    common = {}
    for layer in range(layers):
        for name, sides in shapes.items():
            bases = [torch.linalg.qr(torch.randn(d, COMMON, generator=draw))[0] * fall for d in sides]
            common[f"base_model.model.model.layers.{layer}.self_attn.{name}"] = bases
    folders = []
    for number in tqdm(range(count), desc="writing LoRAs", unit="adapter", delay=2):
        tensors = {}
        for module, bases in common.items():
            left, right = (
                base @ torch.randn(COMMON, RANK, generator=draw)
                + OWN / len(base) ** 0.5 * torch.randn(len(base), RANK, generator=draw)
                for base in bases
            )
            tensors |= {f"{module}.lora_B.weight": 0.1 * left.half(), f"{module}.lora_A.weight": 0.1 * right.T.half()}
        folder = root / f"lora-{number}"
        folder.mkdir()
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "base_model_name_or_path": "synthetic"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders.append(folder)
    return folders


def files(folders: list[Path]) -> list[Path]:
    return [folder / "adapter_model.safetensors" for folder in folders]


def uncached(folders: list[Path]) -> None:
    for file in files(folders):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def stack(folders: list[Path]) -> torch.Tensor:
    """Return the columns of all adapters' first factor as rows (N·r, d), float32."""
    rows = torch.empty(len(folders), RANK, SHAPES["q_proj"][0])
    for number, file in enumerate(files(folders)):
        with safe_open(file, framework="pt") as tensors:
            rows[number] = tensors.get_tensor(FACTOR).T
    return rows.flatten(0, 1)


def svd(rows: torch.Tensor, k: int) -> torch.Tensor:
    return torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:k].T


def covariance_eig(rows: torch.Tensor, k: int) -> torch.Tensor:
    centred = rows - rows.mean(0)
    values, vectors = torch.linalg.eig(centred.T @ centred)
    return vectors.real[:, values.real.argsort(descending=True)[:k]]


def incremental_pca(rows: torch.Tensor, k: int) -> torch.Tensor:
    from sklearn.decomposition import IncrementalPCA

    return torch.from_numpy(IncrementalPCA(k, batch_size=32 * RANK).fit(rows.numpy()).components_).float().T


def peft_incremental_pca(rows: torch.Tensor, k: int) -> torch.Tensor:
    from peft.utils.incremental_pca import IncrementalPCA

    return IncrementalPCA(k, batch_size=32 * RANK).fit(rows).components_.float().T


ONE_FACTOR: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "torch.linalg.svd of the stack": svd,
    "covariance and torch.linalg.eig (EigenLoRAx's way)": covariance_eig,
    "scikit-learn IncrementalPCA": incremental_pca,
    "PEFT's IncrementalPCA": peft_incremental_pca,
}
PEERS = tuple(f"{name} {version}" for name, version in VERSIONS.items())
WHOLE = ("reading the bytes", "build_basis", "build_basis, exact throughout", *PEERS)


def status(name: str) -> int:
    """Return a memory figure of this process, in bytes."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def child(
    title: str,
    folders: list[Path],
    k: int,
    memory: str,
    *,
    threads: int = 1,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
) -> dict[str, Any]:
    """One measurement, in this process, with so many threads; `shapes` are those of the fleet."""
    torch.set_num_threads(threads)
    small = torch.randn(300, 64)
    for dtype in (torch.float32, torch.float64):
        # what libraries set up at their first use is no part of a method's cost
        (
            torch.linalg.svd(small.to(dtype)),
            torch.linalg.qr(small.to(dtype)),
            torch.linalg.eigh(small.to(dtype).T @ small.to(dtype)),
        )
    if title in ONE_FACTOR:
        rows = stack(folders)
        incremental_pca(torch.randn(64, 64), 2)
        peft_incremental_pca(torch.randn(64, 64), 2)
        start, wall, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
        found = ONE_FACTOR[title](rows, k)
        facts = spent(wall, cpu, start)
        centred = rows - rows.mean(0)
        held = float((centred @ torch.linalg.qr(found)[0]).square().sum(dtype=torch.float64))
        return {**facts, "share": held / float(centred.square().sum(dtype=torch.float64))}
    uncached(folders)
    start, wall, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    if title == "reading the bytes":
        block = bytearray(1 << 22)
        for file in files(folders):
            with open(file, "rb", buffering=0) as stream:
                while stream.readinto(block):
                    pass
        return spent(wall, cpu, start)
    if title.endswith("exact throughout"):
        from subspace_peft.builders import module_plan

        module_plan.EXACT_COLUMNS = module_plan.EXACT_NUMBERS = 1 << 40
        memory = "1TB"
    basis = build_basis([str(folder) for folder in folders], k=k, max_memory=memory, progress=False)
    facts = spent(wall, cpu, start)
    found = basis.info["measured"]
    return {
        **facts,
        "energy_kept": found["energy_kept"],
        "certificates": found["certificates"],
        "products": products(found["certificates"], len(folders), k, shapes),
        "numbers": numbers(len(folders), len(basis) // len(shapes), k, shapes),
    }


def products(
    certificates: dict[str, Any], count: int, k: int, shapes: Mapping[str, tuple[int, int]] = SHAPES
) -> float:
    """Return the floating-point operations of the products with B and A, and those of the probe.

    Per pass and side, both ways: ``4 · rows · width · d``.
    """
    rows, total = count * RANK, 0.0
    for name, facts in certificates.items():
        sides = shapes[name.rsplit(".", 1)[-1]]
        width = min(width_of(k, rows), rows)
        total += (
            4.0 * rows * sum(sides) * (facts["passes"] * width + (PROBE_PASSES * PROBES if facts["passes"] else 0))
        )
    return total


def numbers(count: int, layers: int, k: int, shapes: Mapping[str, tuple[int, int]] = SHAPES) -> int:
    """How many numbers U, V and the cores of all adapters are."""
    return layers * sum(k * (out + inner) + count * k * k for out, inner in shapes.values())


def peak() -> float:
    """Floating-point operations a second of a large float32 product in one thread, the fastest of ten, by CPU time."""
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    times = []
    for _ in range(10):
        began = time.process_time()
        left @ right
        times.append(time.process_time() - began)
    return 2 * 2048**3 / min(times)


def spent(wall: float, cpu: float, start: int) -> dict[str, float]:
    return {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": max(0, status("VmHWM") - start),
    }


def measure(root: Path, args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Results per number of adapters and way; an interrupted run of the same settings goes on from `--out`."""
    results: dict[str, Any] = {}
    if args.out.is_file() and (found := json.loads(args.out.read_text()))["settings"] == json.loads(
        json.dumps(settings)
    ):
        results = found["results"]
    make_fleet(root, max(args.adapters), args.layers)
    python = environment(args.environment or root / "environment") if args.peers_up_to else None
    jobs = [(n, title) for n in args.adapters for title in (*WHOLE, *ONE_FACTOR)]
    for n, title in tqdm(jobs, desc="measuring", unit="run", delay=2):
        most = args.exact_up_to if title.endswith("exact throughout") else args.peers_up_to if title in PEERS else n
        if title in results.get(str(n), {}) or n > most:
            continue
        command = [sys.executable, __file__, "--child", title, "--root", str(root), "--adapters", str(n)]
        command += ["--k", str(args.k), "--max-memory", args.max_memory]
        if title in PEERS:
            command = [
                str(python),
                str(Path(__file__).parent / "peers" / "fleet_compressors.py"),
                title.split()[0],
                str(root),
                str(n),
            ]
            command += [str(numbers(n, args.layers, args.k))]
        own = {**os.environ, "OMP_NUM_THREADS": "1"}
        fastest = peak() if title == "build_basis" else 0.0
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=own)
        found = json.loads(done.stdout.splitlines()[-1])
        # measured beside it: a shared machine is not equally fast at all times
        results.setdefault(str(n), {})[title] = {**found, "peak": fastest} if fastest else found
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"settings": settings, "results": results}))
    return results


def table(results: dict[str, Any], layers: int, k: int) -> str:
    lines = [
        (
            f"Of Mistral-7B's {ALL_LAYERS} layers (q_proj, v_proj; r={RANK}, k={k}), {layers} were built. One thread."
            " Energy: for one factor its centred energy in k directions over the exact SVD's; for build_basis the"
            " worst module's and side's over its certified bound."
        ),
        "",
        (
            "| adapters | | of | CPU s | wall s | peak memory, MB | energy, of the most there is | both factors of"
            f" all {ALL_LAYERS} layers, CPU s, extrapolated |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for n, rows in results.items():
        best = rows["torch.linalg.svd of the stack"]["share"]
        own = rows["build_basis"]
        floor = own["products"] / own["peak"]
        lines.append(
            f"| {n} | products with B and A, {own['products'] / 1e9:,.0f} GFLOP at {own['peak'] / 1e9:.0f} GFLOP/s |"
            f" {layers} layers | {floor:.3g} | | | | {ALL_LAYERS / layers * floor:,.0f} |"
        )
        for title, row in rows.items():
            # a factor of q_proj's size is 4,096 wide; v_proj's lora_B of 1,024 counts as a quarter, in favour of those
            # whose cost grows faster
            times = ALL_LAYERS / layers if title in WHOLE else ALL_LAYERS * 3.25
            if "share" in row:
                energy = f"{row['share'] / best:.4%}"
            elif "certificates" in row:
                worst = min(
                    held / most for facts in row["certificates"].values() for held, most in (facts["out"], facts["in"])
                )
                energy = f"{worst:.4%}; kept by both sides {row['energy_kept']:.4f}, in {row['numbers']:,} numbers"
            elif "kept" in row:
                energy = (
                    f"kept {row['kept']:.4f} of ΔW with {row['components']} components, in {row['numbers']:,} numbers"
                )
            else:
                energy = ""
            what = f"{layers} layers" if title in WHOLE else "one factor"
            lines.append(
                f"| {n} | {title} | {what} | {row['cpu_seconds']:.3g} | {row['wall_seconds']:.3g} |"
                f" {row['peak_bytes'] / 1e6:,.0f} | {energy} | {times * row['cpu_seconds']:,.0f} |"
            )
    return "\n".join([*lines, "", *verdicts(results)]) + "\n"


def verdicts(results: dict[str, Any]) -> list[str]:
    """Return the aims, beside the results."""
    lines = [
        (
            "| adapters | CPU over the larger floor (aim: at most 2) | covariance and eig over build_basis, both"
            " factors of all layers (aim: at least 50) | CPU per adapter and layer, ms | peak memory, MB |"
        ),
        "|---|---|---|---|---|",
    ]
    for n, rows in results.items():
        own = rows["build_basis"]
        floor = max(own["products"] / own["peak"], rows["reading the bytes"]["cpu_seconds"])
        layers = len(own["certificates"]) / len(SHAPES)
        slow = 3.25 * layers * rows["covariance and torch.linalg.eig (EigenLoRAx's way)"]["cpu_seconds"]
        each = 1000 * own["cpu_seconds"] / int(n) / layers
        lines.append(
            f"| {n} | {own['cpu_seconds'] / floor:.1f} | {slow / own['cpu_seconds']:.0f} | {each:.1f} |"
            f" {own['peak_bytes'] / 1e6:,.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[50, 100, 200, 500])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--max-memory", default="2GB")
    parser.add_argument("--exact-up-to", type=int, default=50, help="adapters for which all is also built exactly")
    parser.add_argument(
        "--peers-up-to", type=int, default=50, help="adapters that other packages are given too; 0 for none"
    )
    parser.add_argument(
        "--environment", type=Path, help="where their virtual environment is kept (default: a new one)"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "build_basis.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folders = [args.root / f"lora-{number}" for number in range(args.adapters[0])]
        print(json.dumps(child(args.child, folders, args.k, args.max_memory)))
        return
    torch.set_num_threads(1)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "child", "root", "environment")}
    with tempfile.TemporaryDirectory() as root:
        results = measure(Path(root), args, settings)
    write(args.out, {"settings": settings, "results": results}, table(results, args.layers, args.k))


if __name__ == "__main__":
    main()
