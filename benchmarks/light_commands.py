"""How long commands take: CPU time beside a bare `import torch`, what a build spends its time on, and silences.

    python benchmarks/light_commands.py [--before CHECKOUT] [--repeats 5]

`--before` is a checkout of an earlier commit, whose commands are measured in turn with these. Adapters are made up:
small ones for the light commands, 40 of the sizes of MiniLM's query and value for the silences.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import pty
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OFTEN_ENOUGH = 2  # runs of the commands that take seconds
LIGHT = {
    "--help": ["--help"],
    "inspect": ["inspect", "basis"],
    "validate": ["validate", "basis"],
    "bundle ls": ["bundle", "ls", "bundle"],
    "cache ls": ["cache", "ls"],
    "cache verify": ["cache", "verify"],
}
MORE = {
    "analyze": ["analyze", "LORAS", "--basis", "basis"],
    "project": ["project", "loras/lora-0", "--basis", "basis"],
    "report": ["report", "basis", "--out", "report", "--force"],
    "compress": ["compress", "LORAS", "--basis", "basis", "--out", "again", "--min-energy", "0.01", "--force"],
    "export-lora": ["export-lora", "task", "--out", "lora", "--force"],
    "build": ["build", "LORAS", "--out", "built", "-k", "8", "--force"],
}
LONG = {
    "build": ["build", "LORAS", "--out", "built", "-k", "16", "--force"],
    "compress": ["compress", "LORAS", "--basis", "basis", "--out", "again", "--min-energy", "0.01", "--force"],
    "report": ["report", "basis", "--out", "report", "--force"],
    "analyze": ["analyze", "LORAS", "--basis", "basis"],
    "update": ["update", "basis", "new/lora-0", "new/lora-1", "--out", "updated", "--force"],
    "migrate": ["migrate", "bundle", "--basis", "updated", "--out", "migrated", "--force"],
    "clusters": ["build", "LORAS", "--clusters", "2", "--out", "clusters", "-k", "4", "--force"],
}
PHASES = """
import json, sys, time
begin = time.perf_counter()
import torch
torched = time.perf_counter()
from subspace_peft.cli import main
from subspace_peft.builders import build, fleet, prepare
from subspace_peft.basis.basis import SubspaceBasis
imported = time.perf_counter()
spent = {}
def timed(owner, name, label):
    own = getattr(owner, name)
    def call(*args, **more):
        start = time.perf_counter()
        try:
            return own(*args, **more)
        finally:
            spent[label] = spent.get(label, 0.0) + time.perf_counter() - start
    setattr(owner, name, call)
timed(prepare, "gather", "read")
timed(build, "_build_modules", "build")
timed(SubspaceBasis, "save_pretrained", "write")
from subspace_peft.cli import building
timed(building, "inspect", "verdict")
assert main(sys.argv[1:]) == 0
ended = time.perf_counter()
rest = ended - imported - sum(spent.values())
imports = {"import torch": torched - begin, "import the rest": imported - torched}
print("\\n" + json.dumps({**imports, **spent, "other": rest}))
"""


def loras(folder: Path, count: int, rank: int, layers: int, size: int, seed: int = 0) -> None:
    """Write made-up adapters, of a common subspace and noise."""
    numbers = torch.Generator().manual_seed(seed)
    names = [
        f"base_model.model.encoder.layer.{i}.attention.self.{side}"
        for i in range(layers)
        for side in ("query", "value")
    ]
    shared = {
        name: [torch.randn(2 * rank, size, generator=numbers), torch.randn(size, 2 * rank, generator=numbers)]
        for name in names
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["query", "value"]}
    config |= {"base_model_name_or_path": "made-up/encoder"}
    for i in range(count):
        tensors = {}
        for name in names:
            mix = [torch.randn(rank, 2 * rank, generator=numbers), torch.randn(2 * rank, rank, generator=numbers)]
            A = mix[0] @ shared[name][0] + 0.3 * torch.randn(rank, size, generator=numbers)
            B = shared[name][1] @ mix[1] + 0.3 * torch.randn(size, rank, generator=numbers)
            tensors |= {f"{name}.lora_A.weight": 0.01 * A, f"{name}.lora_B.weight": 0.01 * B}
        place = folder / f"lora-{i}"
        place.mkdir(parents=True)
        save_file(tensors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(config))


class Commands:
    """Runs commands of a checkout in a folder.

    Args:
        checkout: whose package is run.
        folder: the working folder.
    """

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.folder = folder
        own = {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **own, "SUBSPACE_PEFT_CACHE": str(folder / "cache")}

    def words(self, arguments: list[str]) -> list[str]:
        fleet = sorted((self.folder / "loras").iterdir())
        return [word for each in arguments for word in (map(str, fleet) if each == "LORAS" else [each])]

    def run(self, arguments: list[str]) -> tuple[float, float]:
        """Run a command; returns its CPU and wall seconds."""
        return self.python(["-m", "subspace_peft", *self.words(arguments)])

    def python(self, arguments: list[str]) -> tuple[float, float]:
        begun = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        said = process.stderr.read().decode()
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(arguments)}: {said}")
        return used.ru_utime + used.ru_stime, wall

    def phases(self, arguments: list[str]) -> dict[str, float]:
        done = subprocess.run(
            [sys.executable, "-c", PHASES, *self.words(arguments)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    def silence(self, arguments: list[str]) -> tuple[float, float]:
        """Run a command on a terminal; returns its longest silence and its wall seconds."""
        near, far = pty.openpty()
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        begun = last = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "subspace_peft", *self.words(arguments)],
            cwd=self.folder,
            env=self.environment,
            stdout=far,
            stderr=far,
        )
        os.close(far)
        longest, tail = 0.0, b""
        while True:
            ready, _, _ = select.select([near], [], [], 0.05)
            now = time.perf_counter()
            if ready:
                try:
                    data = os.read(near, 65536)
                except OSError:
                    break
                if not data:
                    break
                tail = (tail + data)[-2000:]
                longest, last = max(longest, now - last), now
            elif process.poll() is not None:
                break
        longest = max(longest, time.perf_counter() - last)
        os.close(near)
        if process.wait():
            raise SystemExit(f"{' '.join(arguments[:2])}: {tail.decode(errors='replace')}")
        return longest, time.perf_counter() - begun


def prepared(folder: Path, checkout: Path, **sizes: int) -> Commands:
    """Make a fleet with a basis, a bundle and a task in a folder."""
    loras(folder / "loras", **sizes)
    loras(folder / "new", 2, rank=sizes["rank"], layers=sizes["layers"], size=sizes["size"], seed=1)
    commands = Commands(checkout, folder)
    commands.run(["build", "LORAS", "--out", "basis", "-k", "8"])
    commands.run(["compress", "LORAS", "--basis", "basis", "--out", "bundle", "--min-energy", "0.01"])
    commands.run(["project", "loras/lora-0", "--basis", "basis", "--out", "task"])
    return commands


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the ends of some values."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def measured(before: Path | None, repeats: int) -> dict[str, object]:
    """Measure everything."""
    results: dict[str, object] = {}
    checkouts = {"after": ROOT, **({} if before is None else {"before": before})}
    with tempfile.TemporaryDirectory() as scratch:
        small = {
            name: prepared(Path(scratch, name), checkout, count=8, rank=4, layers=2, size=64)
            for name, checkout in checkouts.items()
        }
        times: dict[str, dict[str, list[float]]] = {}
        for turn in range(repeats):
            cpu, _ = small["after"].python(["-c", "import torch"])
            times.setdefault("import torch", {}).setdefault("both", []).append(cpu)
            for command, words in (LIGHT | MORE if turn < OFTEN_ENOUGH else LIGHT).items():
                for name, commands in small.items():
                    times.setdefault(command, {}).setdefault(name, []).append(commands.run(words)[0])
        torch_alone = statistics.median(times["import torch"]["both"])
        results["cpu_seconds"] = {
            command: {
                name: {**spread(each), "ratio": statistics.median(each) / torch_alone} for name, each in own.items()
            }
            for command, own in times.items()
        }
        fleets = {
            "8 adapters of 4 modules of 64 x 64, rank 4": small["after"],
            "8 adapters of 12 modules of 384 x 384, rank 8": prepared(
                Path(scratch, "medium"), ROOT, count=8, rank=8, layers=6, size=384
            ),
        }
        results["build_phases_seconds"] = {
            title: {
                key: statistics.median(each[key] for each in runs)
                for runs in [[commands.phases(LIGHT_BUILD) for _ in range(repeats)]]
                for key in runs[0]
            }
            for title, commands in fleets.items()
        }
        large = prepared(Path(scratch, "large"), ROOT, count=40, rank=8, layers=6, size=384)
        results["longest_silence_seconds"] = {
            verb: dict(zip(("longest", "whole"), large.silence(words), strict=True)) for verb, words in LONG.items()
        }
    return results


LIGHT_BUILD = ["build", "LORAS", "--out", "phases", "-k", "8", "--force", "-q"]


def said(each: dict[str, float]) -> str:
    """Return a median with the ends of its spread."""
    return f"{each['median']:.2f} ({each['least']:.2f} to {each['most']:.2f})"


def table(results: dict[str, object]) -> str:
    """Return the results in Markdown."""
    cpu: dict = results["cpu_seconds"]  # type: ignore[assignment]
    alone = cpu["import torch"]["both"]
    lines = [
        "# Time of commands",
        "",
        f"`{results['command']}`, {results['machine']}; {results['repeats']} runs of each in turn, from `analyze` on"
        f" {min(results['repeats'], OFTEN_ENOUGH)}.",
        "",
        f"CPU seconds, median (least to most); a bare `import torch` takes {alone['median']:.2f}"
        f" ({alone['least']:.2f} to {alone['most']:.2f}). The ratio is to that.",
        "",
        "| command | before | now | ratio before | ratio now |",
        "|---|---|---|---|---|",
    ]
    for command, own in cpu.items():
        if command != "import torch":
            cells = [
                f"{own[name]['median']:.2f} ({own[name]['least']:.2f} to {own[name]['most']:.2f})"
                if name in own
                else ""
                for name in ("before", "after")
            ]
            ratios = [f"{own[name]['ratio']:.2f}" if name in own else "" for name in ("before", "after")]
            lines.append(f"| `{command}` | {' | '.join([*cells, *ratios])} |")
    lines += ["", "What a build spends its wall time on, seconds (median), beside the bare import of torch:", ""]
    phases: dict = results["build_phases_seconds"]  # type: ignore[assignment]
    keys = list(next(iter(phases.values())))
    lines += [f"| fleet | {' | '.join(keys)} | read and build, of all but torch's import | of all |"]
    lines += ["|---" * (len(keys) + 3) + "|"]
    for title, own in phases.items():
        done, whole = own["read"] + own["build"], sum(own.values())
        cells = " | ".join(f"{own[key]:.2f}" for key in keys)
        lines.append(
            f"| {title} | {cells} | {100 * done / (whole - own['import torch']):.0f} % | {100 * done / whole:.0f} % |"
        )
    lines += ["", "Longest silence on a terminal, 40 adapters of 12 modules of 384 x 384, rank 8:", ""]
    lines += ["| command | longest silence, s | whole, s |", "|---|---|---|"]
    silences: dict = results["longest_silence_seconds"]  # type: ignore[assignment]
    lines += [f"| `{verb}` | {each['longest']:.1f} | {each['whole']:.1f} |" for verb, each in silences.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    results = {
        "command": "python benchmarks/light_commands.py" + (" --before EARLIER" if args.before else ""),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}",
        "repeats": args.repeats,
        **measured(None if args.before is None else args.before.resolve(), args.repeats),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "light_commands.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.out / "light_commands.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
