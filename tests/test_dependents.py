"""What depends on a basis: tasks and bundles of this machine that need it are noted, and named before it goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model

from subspace_peft import SubspaceBasis, SubspaceConfig, build_basis, bundle_tasks, project_lora
from subspace_peft.basis.dependents import dependents_of
from subspace_peft.cli import main
from subspace_peft.errors import OccupiedError

from .models import bert, randomise


@pytest.fixture(scope="module")
def other(fleets, tmp_path_factory):
    """A stored basis that is not the one of `bases`."""
    basis = build_basis(fleets[bert][:3], k=3, progress=False)
    basis.save_pretrained(tmp_path_factory.mktemp("dependents") / "other")
    return basis


def test_what_is_saved_and_loaded_on_a_basis_is_named(other, bases, tmp_path):
    folder = Path(shutil.copytree(other.location, tmp_path / "basis"))
    basis = SubspaceBasis.from_pretrained(folder)
    known = set(dependents_of(basis.fingerprint))
    model = get_peft_model(bert(), SubspaceConfig(basis=str(folder)))
    model.save_pretrained(tmp_path / "saved")
    randomise(get_peft_model(bert(), SubspaceConfig(basis=str(folder), save_basis=True))).save_pretrained(
        tmp_path / "carries"
    )
    shutil.copytree(tmp_path / "saved", tmp_path / "copied")
    PeftModel.from_pretrained(bert(), tmp_path / "copied")
    bundle_tasks([tmp_path / "saved"], tmp_path / "bundle", progress=False)
    found = set(dependents_of(basis.fingerprint)) - known
    assert found == {str(tmp_path / name) for name in ("saved", "copied", "bundle")}
    shutil.rmtree(tmp_path / "copied")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    (tmp_path / "saved" / "adapter_config.json").write_text(json.dumps({**config, "basis_fingerprint": "0" * 64}))
    assert set(dependents_of(basis.fingerprint)) - known == {str(tmp_path / "bundle")}
    with pytest.raises(OccupiedError, match="1 task or bundle of this machine needs that basis"):
        bases[bert].save_pretrained(folder)


def test_notes_are_hints(other, own_cache):
    notes = own_cache / "dependents"
    notes.mkdir(parents=True, exist_ok=True)
    for text in ("{}", "[", '[3, null, "/nowhere"]', "[" * 100000):
        (notes / f"{other.fingerprint}.json").write_text(text)
        assert dependents_of(other.fingerprint) == []
    assert dependents_of("../../etc") == dependents_of(None) == []


def test_cache_rm_names_what_needs_the_basis(other, fleets, tmp_path, capsys, monkeypatch):
    from subspace_peft.basis import cache

    folder = Path(shutil.copytree(other.location, tmp_path / "basis"))
    cache.keep(folder, fingerprint=other.fingerprint, location="org/basis", revision="0" * 40)
    project_lora(fleets[bert][0], SubspaceBasis.from_pretrained(folder)).save_pretrained(tmp_path / "task")
    assert main(["cache", "rm", other.fingerprint[:12]]) == 0
    out = capsys.readouterr().out
    assert "1 task or bundle of this machine needs that basis" in out and str(tmp_path / "task") in out
