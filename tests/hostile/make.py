"""What the tests of hostile files share: valid files small enough to mutate by the thousand, and a guard on memory."""

from __future__ import annotations

import contextlib
import json
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from subspace_peft import SubspaceConfig, build_basis
from subspace_peft.tasks import TaskBank

from ..models import randomise

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASIS, BASIS_CONFIG = "basis.safetensors", "basis_config.json"
ALLOWED_BYTES = 256 << 20


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(12, 10), nn.Linear(10, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).tanh())


def make_files(root: Path) -> dict[str, Path]:
    """A LoRA, a basis, a task on it, a self-contained task, and a bank's file, all valid."""
    folders = []
    for seed in range(3):
        base = Small()
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["first", "last"], rank_pattern={"last": 1}))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        model.save_pretrained(root / f"lora{seed}")
        folders.append(str(root / f"lora{seed}"))
    basis = build_basis(folders, k=3, directions=2, progress=False)
    basis.save_pretrained(root / "basis")
    model = randomise(get_peft_model(Small(), SubspaceConfig(basis=str(root / "basis"))))
    model.save_pretrained(root / "task")
    bank = TaskBank(model, extra_rank=1)
    bank.add("one", root / "task")
    own = {"first": (torch.randn(10, 1), torch.randn(1, 12))}
    bank.add("two", {module: 2 * core for module, core in bank["one"].items()}, own=own)
    bank.save(root / "bank.safetensors")
    config = SubspaceConfig(
        basis=str(root / "basis"), save_basis=True, coefficients="directions", mean_gain="trainable"
    )
    randomise(get_peft_model(Small(), config)).save_pretrained(root / "own")
    return {name: root / name for name in ("lora0", "basis", "task", "own", "bank.safetensors")}


def edit_json(file: Path, change: Callable[[dict[str, Any]], object] | None = None, **values: Any) -> None:
    content = json.loads(file.read_text())
    if change is not None:
        change(content)
    file.write_text(json.dumps({**content, **values}))


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and numbers."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: Any, numbers: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def edit_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header, numbers = split(file.read_bytes())
    change(header)
    file.write_bytes(join(header, numbers))


@contextlib.contextmanager
def little_memory(extra: int = ALLOWED_BYTES) -> Iterator[None]:
    """Inside, the process may take no more than `extra` bytes of address space beside what it has: allocations beyond
    fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
