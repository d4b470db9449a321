"""Files of earlier versions load through every public door with their numbers, and are written as they were: bases."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from subspace_peft import (
    ModuleBasis,
    SubspaceBasis,
    update_basis,
)
from subspace_peft.cli import main
from subspace_peft.energy import EnergyRecord

from .checks import (
    COPIED,
    EXPECTED,
    TENSORS,
    VERSIONS,
    close_numbers,
    folders,
    said,
    same_json,
    without,
)

# what `inspect --json` says and did not say then
SAID_SINCE = {"energy_kept_at_least", "energy_over_modules", "base_model_names", "base_weights"} | {
    "base_weights_recorded",
    "k_range",
    "verdict",
}


@pytest.mark.parametrize("folder", folders("bases"))
def test_a_basis_loads_and_is_written_again_as_it_was(folder, tmp_path, capsys):
    root = folder.parent.parent
    expected, tensors = EXPECTED[root]["bases"][folder.name], TENSORS[root]
    basis = SubspaceBasis.from_pretrained(folder, fingerprint=expected["fingerprint"])
    assert basis.fingerprint == expected["fingerprint"]
    assert basis.digests == expected["digests"]
    assert basis.shapes() == expected["shapes"]
    assert (basis.describe_k(), basis.precision, basis.base_model) == tuple(
        expected[key] for key in ("k", "precision", "base_model")
    )
    wanted = said(folder / "basis_config.json")
    measured = {**wanted, **wanted.get("measured", {})}
    assert wanted["fingerprint"] == expected["fingerprint"]
    assert basis.info == without(wanted, "modules", "fingerprint", "format_version")
    saved = load_file(folder / "basis.safetensors")
    for name, module in basis.items():
        assert isinstance(module, ModuleBasis)
        for key, value in module.tensors().items():
            meant = tensors.get(f"bases/{folder.name}/{name}.{key}", saved[f"{name}.{key}"])
            torch.testing.assert_close(value, meant, atol=1e-6, rtol=1e-6)
        core = torch.ones(module.k_out, module.k_in, dtype=torch.float64)
        torch.testing.assert_close(module.project(module.reconstruct(core)), core, atol=1e-5, rtol=1e-5)
    basis.save_pretrained(tmp_path)
    assert (tmp_path / "basis.safetensors").read_bytes() == (folder / "basis.safetensors").read_bytes()
    same_json(said(tmp_path / "basis_config.json"), said(folder / "basis_config.json"))
    assert main(["validate", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert main(["inspect", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.pop("location") == str(folder)
    assert shown.keys() - SAID_SINCE == set(expected["inspect"])
    for key, value in expected["inspect"].items():
        if key == "sources":
            # beside a share kept it is said whether that is a lower bound, and of rounded bases it is what these keep
            for now, before in zip(shown[key], measured[key], strict=True):
                now.pop("energy_kept_at_least", None)
                assert now == {**before, "energy_kept": pytest.approx(before["energy_kept"], abs=2e-3)}
        elif key == "energy_kept":
            kept = [entry["energy_kept"] for entry in shown["sources"]]
            assert shown[key] == pytest.approx(sum(kept) / len(kept))
        else:
            assert shown[key] == (measured[key] if key in COPIED else close_numbers(value))
    assert "random" in shown.get("energy_over_modules", ["random"])


@pytest.mark.parametrize("root", VERSIONS, ids=lambda root: root.name)
def test_a_basis_is_built_again_and_updated(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(root)  # from where its sources' places are relative
    assert (
        main(
            [
                "build",
                "--from-config",
                str(root / "bases" / "float32"),
                "--out",
                str(tmp_path / "again"),
                "--json",
                "--quiet",
            ]
        )
        == 0
    )
    old, again = (
        SubspaceBasis.from_pretrained(root / "bases" / "float32"),
        SubspaceBasis.from_pretrained(tmp_path / "again"),
    )
    # of sources, as both versions define it; the means over modules are the earlier one's
    before, now = EnergyRecord.of(old.info), EnergyRecord.of(again.info)
    assert [each.kept for each in now.sources] == pytest.approx([each.kept for each in before.sources], abs=1e-6)
    assert now.kept == pytest.approx(before.kept, abs=1e-6)
    assert now.over_modules == () and "random" in before.over_modules
    for name, module in old.items():
        for key, value in module.tensors().items():
            torch.testing.assert_close(again[name].tensors()[key], value, atol=1e-4, rtol=1e-3)
    new, wanted = update_basis(old, ["loras/bert-5"], add=2, progress=False), root / "bases" / "updated"
    expected = SubspaceBasis.from_pretrained(wanted)
    assert [entry["fingerprint"] for entry in new.info["lineage"]] == [old.fingerprint]
    assert new.info["update"] == close_numbers(expected.info["update"])
    assert new.info["columns"] == expected.info["columns"]
    for precision in ("int8", "float16", "bfloat16"):
        # rounding is the same everywhere
        assert old.to_precision(precision).fingerprint == EXPECTED[root]["bases"][precision]["fingerprint"]
