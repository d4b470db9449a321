"""A basis on disk: read lazily, verified, written aside; what was there before stays."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import subspace_peft.basis.files as basis_files
from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.errors import BadFileError, BasisMismatchError, BasisNotFoundError

from . import fresh
from .models import bert

# -- basis ----------------------------------------------------------------------------------------------------------


def test_a_basis_survives_the_disk(bases, basis_folder):
    basis, loaded = bases[bert], SubspaceBasis.from_pretrained(basis_folder)
    assert loaded.fingerprint == basis.fingerprint
    assert loaded == basis
    assert loaded.shapes() == basis.shapes()
    for name in basis:
        for key, value in basis[name].tensors().items():
            assert torch.equal(value, loaded[name].tensors()[key])
    # the copy lies elsewhere, and says the places of its sources as seen from where the basis was
    assert SubspaceBasis.from_pretrained(basis.location).info["sources"] == basis.info["sources"]
    assert [entry["sha256"] for entry in loaded.info["sources"]] == [
        entry["sha256"] for entry in basis.info["sources"]
    ]
    assert pickle.loads(pickle.dumps(loaded)).fingerprint == basis.fingerprint


def test_a_basis_is_read_one_module_at_a_time(basis_folder, monkeypatch):
    read = []
    original = basis_files.ModuleBasis
    monkeypatch.setattr(basis_files, "ModuleBasis", lambda **tensors: read.append(1) or original(**tensors))
    basis = SubspaceBasis.from_pretrained(basis_folder)
    assert (len(basis), read) == (4, [])
    basis[next(iter(basis))]
    assert read == [1]


def test_a_basis_that_was_opened_by_a_relative_path_is_read_from_anywhere(basis_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(basis_folder.parent)
    basis = SubspaceBasis.from_pretrained(basis_folder.name)
    monkeypatch.chdir(tmp_path.parent)
    whole = SubspaceBasis.from_pretrained(basis_folder)
    for name, module in basis.items():
        assert torch.equal(module.U, whole[name].U)


def test_truncating_keeps_the_leading_directions_and_changes_the_fingerprint(bases):
    small = bases[bert].truncate(3)
    assert small.fingerprint != bases[bert].fingerprint
    for name, module in small.items():
        assert torch.equal(module.U, bases[bert][name].U[:, :3])
        assert torch.equal(module.V, bases[bert][name].V[:3])
        assert module.cores.shape == (5, 3, 3)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("truncated tensors", BadFileError, "truncated"),
        ("flipped byte", BadFileError, "was altered or damaged"),
        ("tensors of another basis", BadFileError, "altered or damaged|do not belong together"),
        ("config is no json", BadFileError, "not a basis's config"),
        ("a hash was changed", BadFileError, "do not add up"),
        ("newer format", BadFileError, "format version 99"),
        ("a shape was changed", BadFileError, "directions in out=32 dimensions"),
        ("no tensors", BadFileError, "missing"),
        ("no config", BasisNotFoundError, "it is not a basis"),
    ],
)
def test_damaged_bases_are_refused(basis_folder, bases, fleets, damage, error, message, tmp_path):
    tensors, config = basis_folder / "basis.safetensors", basis_folder / "basis_config.json"
    content = json.loads(config.read_text())
    first = next(iter(content["modules"]))
    if damage == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "flipped byte":
        data = bytearray(tensors.read_bytes())
        data[-9] ^= 1
        tensors.write_bytes(data)
    elif damage == "tensors of another basis":
        other = build_basis(fleets[bert][:3], k=6, directions=3, progress=False)
        other.save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "basis.safetensors", tensors)
    elif damage == "config is no json":
        config.write_text("{")
    elif damage == "a hash was changed":
        content["modules"][first]["sha256"] = "0" * 64
    elif damage == "newer format":
        content["format_version"] = 99
    elif damage == "a shape was changed":
        content["modules"][first]["shape"]["k_out"] = 10**9
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "no config":
        config.unlink()
    if damage.startswith(("a ", "newer")):
        config.write_text(json.dumps(content))
    with pytest.raises(error, match=message) as caught:
        for module in SubspaceBasis.from_pretrained(basis_folder).values():
            assert module
    assert str(basis_folder) in str(caught.value)


def test_a_basis_of_another_fingerprint_is_refused_naming_both(basis_folder, bases):
    with pytest.raises(BasisMismatchError) as caught:
        SubspaceBasis.from_pretrained(basis_folder, fingerprint="f" * 64)
    assert "f" * 64 in str(caught.value)
    assert bases[bert].fingerprint in str(caught.value)


@pytest.mark.parametrize("where", ["/no/such/place", "./nor/here", "a/b/c"])
def test_no_such_folder(where):
    with pytest.raises(BasisNotFoundError, match="no folder"):
        SubspaceBasis.from_pretrained(where)


def test_a_full_disk_leaves_the_earlier_basis_as_it_was(basis_folder, fleets, monkeypatch):
    before = {file.name: file.read_bytes() for file in basis_folder.iterdir()}
    other = build_basis(fleets[bert][:3], k=3, progress=False)

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(basis_files, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        other.save_pretrained(basis_folder, overwrite=True)
    assert {file.name: file.read_bytes() for file in basis_folder.iterdir()} == before


def test_a_killed_save_leaves_the_earlier_basis_as_it_was(basis_folder, fleets, tmp_path):
    before = {file.name: file.read_bytes() for file in basis_folder.iterdir()}
    script = f"""
        import os, signal
        import subspace_peft.basis.files as files
        from subspace_peft import build_basis
        original = files.save_file
        def killed(tensors, path, metadata=None):
            original(tensors, path, metadata=metadata)
            os.kill(os.getpid(), signal.SIGKILL)
        files.save_file = killed
        build_basis({fleets[bert][:3]!r}, k=3, progress=False).save_pretrained({str(basis_folder)!r}, overwrite=True)
    """
    done = fresh.run("-c", script)
    assert done.returncode == -9
    assert {name: (basis_folder / name).read_bytes() for name in before} == before
    assert SubspaceBasis.from_pretrained(basis_folder)[next(iter(SubspaceBasis.from_pretrained(basis_folder)))]


def test_own_readme_text_is_kept(basis_folder, bases):
    readme = basis_folder / "README.md"
    assert "subspace-basis" in readme.read_text()
    readme.write_text("mine")
    SubspaceBasis.from_pretrained(basis_folder).save_pretrained(basis_folder)
    assert readme.read_text() == "mine"
