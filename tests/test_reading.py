"""Reading a fleet's files: each byte once per pass, the same numbers as safetensors gives, changes noticed."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from subspace_peft import build_basis
from subspace_peft.builders.reader import Reader
from subspace_peft.builders.scan import scan
from subspace_peft.builders.seed_groups import seed_groups
from subspace_peft.errors import SourceError
from subspace_peft.sources import open_source
from subspace_peft.sources.factors import gram

from .models import bert
from .test_build import fleet


class Counting(io.FileIO):
    """A file that counts the bytes read from it."""

    total = 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        type(self).total += count or 0
        return count

    def read(self, size=-1):
        block = super().read(size)
        type(self).total += len(block)
        return block


@pytest.fixture
def counted(monkeypatch):
    """Bytes read unbuffered from here on; a file's header is read by another way."""
    original = builtins.open
    monkeypatch.setattr(Counting, "total", 0)

    def opened(file, mode="r", buffering=-1, **more):
        return Counting(file) if (mode, buffering) == ("rb", 0) else original(file, mode, buffering, **more)

    monkeypatch.setattr(builtins, "open", opened)
    return Counting


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_scan_reads_every_byte_once_and_finds_hash_and_norms(fleets, tmp_path, counted, dtype):
    folder = Path(fleets[bert][0])
    tensors = {key: value.to(dtype) for key, value in load_file(folder / "adapter_model.safetensors").items()}
    config = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["unrelated"]}))
    file = tmp_path / "adapter_model.safetensors"
    save_file({**tensors, "base_model.model.unrelated.weight": torch.arange(1000)}, file)
    source = open_source(tmp_path)
    scan(source)
    assert counted.total == file.stat().st_size
    assert source.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    for module, norm in source.norms.items():
        update = source.factors(module)
        assert norm == pytest.approx((update.B @ update.A).norm().item(), rel=1e-6)


def test_a_group_is_held_whole_and_read_once(fleets, counted):
    sources = [open_source(folder) for folder in fleets[bert]]
    for source in sources:
        scan(source)
    modules = list(sources[0].keys)
    reader = Reader(sources, held=reader_size(sources, modules[:2]))
    groups = list(reader.groups(modules))
    assert groups == [modules[:2], modules[2:]]
    for group in groups:
        counted.total = 0
        reader.hold(group)
        pairs = {(i, module): reader.pair(i, module) for i in range(len(sources)) for module in group}
        assert counted.total == sum(t.numel() * t.element_size() for pair in pairs.values() for t in pair)
        for (i, module), pair in pairs.items():
            for mine, key in zip(pair, (sources[i].keys[module][side] for side in ("B", "A")), strict=True):
                assert torch.equal(mine, sources[i].read(key))


@pytest.mark.parametrize("columns", [0, 1 << 20], ids=["streamed", "exact"])
def test_a_build_reads_every_byte_twice(fleets, counted, monkeypatch, columns):
    monkeypatch.setattr("subspace_peft.builders.module_plan.EXACT_COLUMNS", columns)
    build_basis(fleets[bert], k=2, progress=False)
    files = [Path(folder) / "adapter_model.safetensors" for folder in fleets[bert]]
    stored = sum(tensor.numel() * tensor.element_size() for file in files for tensor in load_file(file).values())
    assert counted.total == sum(file.stat().st_size for file in files) + stored


def reader_size(sources, modules):
    probe = Reader(sources, held=0)
    return sum(probe.size(module) for module in modules)


def test_a_module_too_large_to_hold_is_read_piece_by_piece(fleets):
    sources = [open_source(folder) for folder in fleets[bert]]
    for source in sources:
        scan(source)
    reader = Reader(sources, held=10)
    modules = list(sources[0].keys)
    assert list(reader.groups(modules)) == [[module] for module in modules]
    reader.hold(modules[:1])
    B, A = reader.pair(1, modules[0])
    whole = sources[1].raw(modules[0])
    assert torch.equal(B.double(), whole[0])
    assert torch.equal(A.double(), whole[1])


def test_a_file_that_changes_meanwhile_is_noticed(fleets, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    for file in Path(fleets[bert][0]).iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    source = open_source(folder)
    scan(source)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(SourceError, match=f"{file} was changed while"):
        Reader([source], held=1 << 20).hold(list(source.keys))


def test_grams_of_half_precision_do_not_overflow():
    rows = torch.full((2, 3), 3e38, dtype=torch.bfloat16)
    assert torch.isfinite(gram(rows)).all()
    torch.testing.assert_close(gram(rows), rows.double() @ rows.double().T)


def test_seed_groups_of_large_adapters_are_found_across_blocks(monkeypatch):
    monkeypatch.setattr("subspace_peft.builders.seed_groups.ROWS", 3)
    torch.manual_seed(0)
    starts = [torch.randn(4, 3000, dtype=torch.float64) for _ in range(3)]
    owner = [0, 1, 0, 2, 1, 0, 2, 1]
    states = fleet(len(owner), inner=3000, r=4, modules=("q", "v"))
    for state, start in zip(states, owner, strict=True):
        for module in ("q", "v"):
            state[f"{module}.lora_A.weight"] = starts[start] + 0.3 * torch.randn(4, 3000, dtype=torch.float64)
    sources = [open_source(state) for state in states]
    assert seed_groups(sources, ["q", "v"]) == owner
    assert build_basis(states, k=2, progress=False).info["sources"][7]["seed_group"] == 1
