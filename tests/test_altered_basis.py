"""Bases whose tensors were changed in place: they are no longer taken for the one that their fingerprint names."""

from __future__ import annotations

import gc
import shutil

import pytest
import torch

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.basis.basis import alive
from subspace_peft.basis.resolve import resolve_basis
from subspace_peft.errors import BadFileError, SubspaceError

from .test_build import fleet

CHANGES = {
    "in place": lambda tensor: tensor.mul_(2),
    "noise": lambda tensor: tensor.add_(0.01 * torch.randn_like(tensor)),
    "one entry": lambda tensor: tensor[1].fill_(0.5),
    "through .data": lambda tensor: tensor.data.mul_(2),
    "through NumPy": lambda tensor: tensor.numpy().fill(0.25),
    "its storage": lambda tensor: tensor.set_(torch.zeros_like(tensor)),
}


def fresh(tmp_path, seed):
    """A basis alive, and its folder with the same numbers."""
    basis = build_basis(fleet(3, seed=seed), k=3, progress=False)
    basis.save_pretrained(tmp_path / "basis")
    return basis


@pytest.mark.parametrize("key", ["U", "V", "M"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_good_file_is_preferred_over_a_changed_basis(change, key, tmp_path):
    basis = fresh(tmp_path, 100 + list(CHANGES).index(change))
    good = basis["a.q"].U.clone()
    assert alive(basis.fingerprint) is not None
    with torch.no_grad():
        CHANGES[change](getattr(basis["a.q"], key))
    with pytest.warns(UserWarning, match=r"changed in place \(module 'a\.q'\)"):
        found = resolve_basis(str(tmp_path / "basis"), fingerprint=basis.fingerprint)
    assert found is not basis and torch.equal(found["a.q"].U, good)
    # said once; the good one is alive now
    assert resolve_basis(None, fingerprint=basis.fingerprint) is found
    with pytest.raises(SubspaceError, match=r"1 modules of the basis were changed in place.*'a\.q'"):
        basis.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / "basis_config.json").exists()
    # what it is now can be a basis of its own
    own = SubspaceBasis(dict(basis.items()), basis.info)
    assert own != basis
    own.save_pretrained(tmp_path / "own")
    assert SubspaceBasis.from_pretrained(tmp_path / "own") == own


def test_rounded_bases_too(tmp_path):
    basis = build_basis(fleet(3, seed=300), k=3, progress=False).to_precision("int8")
    basis.save_pretrained(tmp_path / "basis")
    basis.stored("a.q")["U"].zero_()
    with pytest.warns(UserWarning, match="changed in place"):
        found = resolve_basis(str(tmp_path / "basis"), fingerprint=basis.fingerprint)
    assert found is not basis and found["a.q"].U.any()


def test_what_was_changed_back_is_the_same_again(tmp_path):
    basis = fresh(tmp_path, 301)
    U = basis["a.q"].U
    before = U.clone()
    U.zero_()
    U.copy_(before)
    assert alive(basis.fingerprint) is basis
    basis.save_pretrained(tmp_path / "again")


def test_the_callers_mapping_is_not_the_bases(tmp_path):
    modules = dict(build_basis(fleet(3, seed=302), k=3, progress=False).items())
    basis = SubspaceBasis(modules)
    modules["a.q"] = modules["a.q"].truncate(1, 1)
    basis.save_pretrained(tmp_path / "basis")
    assert SubspaceBasis.from_pretrained(tmp_path / "basis").shapes()["a.q"]["k_out"] == 3


def test_nothing_is_kept_alive_by_it(tmp_path):
    basis = fresh(tmp_path, 303)
    fingerprint = basis.fingerprint
    del basis
    gc.collect()
    assert alive(fingerprint) is None


def test_a_damaged_copy_does_not_hide_a_whole_one(tmp_path):
    """Its error may keep the damaged basis alive: a notebook keeps the last one."""
    basis = fresh(tmp_path, 900)
    damaged = shutil.copytree(tmp_path / "basis", tmp_path / "damaged")
    raw = bytearray((damaged / "basis.safetensors").read_bytes())
    raw[-1] ^= 16
    (damaged / "basis.safetensors").write_bytes(bytes(raw))
    asked = basis.fingerprint
    del basis
    gc.collect()
    broken = SubspaceBasis.from_pretrained(damaged)
    assert alive(asked) is broken
    with pytest.raises(BadFileError, match="altered or damaged"):
        dict(broken)
    found = resolve_basis(str(tmp_path / "basis"), fingerprint=asked)
    assert found is not broken and len(dict(found)) == len(broken)
