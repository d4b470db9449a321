"""Other packages that put a fleet of LoRAs on shared components, each run in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file

from benchmarks.peers import fleet_compressors
from subspace_peft.basis.cache import cache_home
from subspace_peft.errors import SubspaceError
from subspace_peft.sources import open_source

from .members import Fleet, dense
from .storing import Updates

WORKER = Path(__file__).with_name("peer_worker.py")
TOO_FEW = 3  # the worker's exit status where the package has no size as small


class PeerError(Exception):
    """Another package cannot be installed, or fails: no result, and no reason to keep one."""


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """A fleet that another package has compressed, and its LoRAs as that package gives them back.

    Attributes:
        bytes: of its components, means and loadings, in float32 as it stores them.
        facts: its components.
        again: adapter → its LoRA's state dict; the configuration is the original's.
        configs: adapter → the original's configuration.
    """

    bytes: int
    facts: Mapping[str, Any]
    again: Mapping[str, Mapping[str, Any]]
    configs: Mapping[str, Mapping[str, Any]]

    def updates(self, name: str) -> Updates:
        source = open_source((dict(self.again[name]), dict(self.configs[name])))
        return dense({module: source.factors(module) for module in source.keys})


def vlora(fleet: Fleet, numbers: int) -> Rebuilt:
    """Compress by vlora-dev with at most so many `numbers` per adapter, shared ones counted in."""
    return _compressed("vlora-dev", fleet, numbers)


def lorashare(fleet: Fleet, numbers: int) -> Rebuilt:
    """Compress by lorashare with at most so many `numbers` per adapter, shared ones counted in."""
    return _compressed("lorashare", fleet, numbers)


def environment() -> Path:
    """Return the interpreter that has both packages, from the cache or made now, outside this repository.

    Raises:
        PeerError: they cannot be installed.
    """
    try:
        return fleet_compressors.environment(cache_home() / "fleet-compressors")
    except SystemExit as error:
        raise PeerError(str(error)) from None


def _compressed(package: str, fleet: Fleet, numbers: int) -> Rebuilt:
    with TemporaryDirectory() as home:
        most = str(numbers * len(fleet.folders))
        command = [str(environment()), str(WORKER), package, most, home, *_without_heads(fleet, Path(home))]
        # torch and safetensors are those of this process, wherever it has them from
        where = {**os.environ, "PYTHONPATH": str(Path(safetensors.__file__).parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, env=where)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            why = f"{package} cannot compress this fleet to {numbers} numbers per adapter: {last}"
            raise SubspaceError(why) if done.returncode == TOO_FEW else PeerError(why)
        facts = json.loads(Path(home, "facts.json").read_text(encoding="utf-8"))
        again = {name: load_file(Path(home, f"{place}.safetensors")) for place, name in enumerate(fleet.names)}
    configs = {
        member.name: json.loads((member.folder / "adapter_config.json").read_text(encoding="utf-8"))
        for member in fleet.members
    }
    shown = {key: facts[key] for key in ("components", "numbers")}
    return Rebuilt(4 * int(facts["numbers"]), shown, again, configs)


def _without_heads(fleet: Fleet, home: Path) -> list[str]:
    """Write copies of the LoRAs without their heads, which no scheme compresses; return their folders in order."""
    folders = []
    for place, member in enumerate(fleet.members):
        copy = home / f"lora-{place}"
        copy.mkdir()
        factors = load_file(member.folder / "adapter_model.safetensors")
        save_file({key: each for key, each in factors.items() if ".lora_" in key}, copy / "adapter_model.safetensors")
        (copy / "adapter_config.json").write_bytes((member.folder / "adapter_config.json").read_bytes())
        folders.append(str(copy))
    return folders
