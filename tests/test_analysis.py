"""Before and after a build: the plan, the comparison of a fleet, the check of a basis file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from subspace_peft import ModuleBasis, SubspaceBasis, build_basis
from subspace_peft.builders import plan_build
from subspace_peft.cli import main
from subspace_peft.errors import SourceError, SubspaceError
from subspace_peft.report import analyze_fleet, validate_basis

from .models import bert, train_lora
from .test_build import deltas, fleet
from .test_fleet import broken

# -- the plan
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 0.7])
def test_the_plan_is_what_the_build_then_does(fleets, tmp_path, k):
    bad = [str(broken(fleets[bert][0], tmp_path, how)) for how in ("nan", "zero", "truncated", "fewer-modules")]
    listed = [*fleets[bert], *bad, fleets[bert][1]]
    plan = plan_build(listed, k=k, progress=False)
    basis = build_basis(listed, k=k, skip_bad=True, progress=False)
    assert plan.skipped == basis.info["skipped"] and len(plan.skipped) == 5
    for mine, theirs in zip(plan.sources, basis.info["sources"], strict=True):
        shared = mine.keys() & theirs.keys()
        assert shared >= {"name", "sha256", "ranks", "modules", "norm", "seed_group"}
        assert {key: mine[key] for key in shared} == {key: theirs[key] for key in shared}
    shapes = basis.shapes()
    assert plan.modules.keys() == shapes.keys()
    for name, size in plan.modules.items():
        assert (size["out"], size["in"], size["sources"], size["ranks"]) == (32, 32, 5, 20)
        assert size["k_out"] >= shapes[name]["k_out"] if k == 0.7 else size["k_out"] == shapes[name]["k_out"] == 3
    basis.save_pretrained(tmp_path / "basis")
    if k == 3:
        size = (tmp_path / "basis" / "basis.safetensors").stat().st_size
        assert plan.bytes_of_basis == pytest.approx(size, rel=0.03)
    from pathlib import Path

    assert plan.bytes_to_read == sum(
        (Path(folder) / "adapter_model.safetensors").stat().st_size for folder in fleets[bert]
    )
    assert plan.memory > 8 * 20 * 64 and plan.seconds > 0


def test_dry_runs_build_nothing_and_say_what_would_be_refused(fleets, tmp_path, capsys):
    out = ["--out", str(tmp_path / "basis"), "-k", "3", "--quiet", "--dry-run"]
    assert main(["build", *fleets[bert], *out]) == 0
    said = capsys.readouterr().out
    assert (
        "5 sources of a base model that is not named, 4 modules" in said
        and "32 x 32, ranks 20 of 5 sources, k 3, 3" in said
    )
    bad = str(broken(fleets[bert][0], tmp_path, "nan"))
    assert main(["build", *fleets[bert], bad, *out]) == 1
    assert f"would be refused: {bad}" in capsys.readouterr().out
    assert main(["build", *fleets[bert], bad, *out, "--skip-bad", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"][0]["location"] == bad
    assert not (tmp_path / "basis").exists()
    assert main(["build", *fleets[bert]]) == 1 and "--out FOLDER" in capsys.readouterr().err
    assert main(["build", "--builder", "random", "--dry-run"]) == 1 and "has to know which" in capsys.readouterr().err
    with pytest.raises(SourceError, match="1 of 1 sources cannot be used"):
        plan_build([bad], progress=False)


# -- analyze
# ----------------------------------------------------------------------------------------------------------------


def test_cosines_are_those_of_the_dense_updates():
    states = fleet(4, r=2)
    states[3] = {key: torch.cat([value, value], 0 if "lora_A" in key else 1) for key, value in states[1].items()}
    states[2] = {key: value for key, value in states[2].items() if key.startswith("a.q")}
    found = analyze_fleet(states, progress=False)
    dense = torch.stack(
        [
            torch.cat(
                [
                    (
                        deltas([state], name)[0].flatten()
                        if f"{name}.lora_A.weight" in state
                        else torch.zeros(320).double()
                    )
                    for name in ("a.q", "a.v")
                ]
            )
            for state in states
        ]
    )
    unit = dense / dense.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.tensor(found.cosines, dtype=torch.float64), unit @ unit.T)
    assert found.near_duplicates == [["adapter-2", "adapter-4", pytest.approx(1)]]
    assert (found.sources[1]["nearest"], found.sources[3]["nearest"]) == ("adapter-4", "adapter-2")
    assert [entry["ranks"] for entry in found.sources] == [[2], [2], [2], [4]]


def test_outliers_are_those_of_another_size():
    states = fleet(6)
    assert analyze_fleet(states, progress=False).outliers == []
    for factor in (30.0, 1 / 30):
        odd = {key: value * (factor if "lora_B" in key else 1) for key, value in states[2].items()}
        found = analyze_fleet([*states[:2], odd, *states[3:]], progress=False)
        assert [entry["name"] for entry in found.outliers] == ["adapter-3"] and "median" in found.outliers[0]["reason"]
    assert analyze_fleet([states[0], odd], progress=False).outliers == []  # which of two would be the odd one?


def test_coverage_by_a_basis_and_what_cannot_be_used(fleets, bases, tmp_path, capsys):
    other = str(train_lora(bert, tmp_path / "key", 7, target_modules=["key"]))
    bad = str(broken(fleets[bert][0], tmp_path, "nan"))
    found = analyze_fleet([*fleets[bert], other, bad], basis=bases[bert], progress=False)
    kept = [entry["energy_kept"] for entry in bases[bert].info["sources"]]
    assert [entry["energy_kept"] for entry in found.sources[:5]] == pytest.approx(kept, abs=1e-5)
    assert found.sources[0]["energy_random"] == pytest.approx(6 * 6 / 32**2)
    assert "not in the basis" in found.sources[5]["not_covered"]
    assert [entry["location"] for entry in found.skipped] == [bad]
    assert main(["analyze", *fleets[bert], other, bad, "--basis", bases[bert].location, "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "energy kept" in said and f"cannot be used: {bad}" in said and "not covered" in said
    assert main(["analyze", *fleets[bert], "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["cosines"][0][0] == pytest.approx(1)
    assert main(["analyze", bad, "--quiet"]) == 1 and "NaN" in capsys.readouterr().err


# -- validate
# ---------------------------------------------------------------------------------------------------------------


def test_good_bases_are_valid_in_every_dtype(bases, kind, basis_folder, capsys):
    facts = validate_basis(bases[kind].location)
    assert facts["problems"] == [] and 0 < facts["orthonormality"] < 1e-6 and facts["modules"] == len(bases[kind])
    for dtype in (torch.float16, torch.bfloat16):
        cast = {
            name: ModuleBasis(**{key: value.to(dtype) for key, value in module.tensors().items()})
            for name, module in bases[kind].items()
        }
        assert validate_basis(SubspaceBasis(cast, bases[kind].info))["problems"] == []
    assert main(["validate", str(basis_folder)]) == 0
    assert f"valid; 4 modules read and hashed, fingerprint {bases[bert].fingerprint}" in capsys.readouterr().out


def test_all_that_is_wrong_is_listed(bases, basis_folder, tmp_path, capsys):
    names = list(bases[bert])
    modules = dict(bases[bert].items())
    modules[names[0]] = replace(modules[names[0]], U=modules[names[0]].U * 1.01)
    modules[names[1]] = replace(modules[names[1]], cores=modules[names[1]].cores[:2])
    modules[names[2]] = replace(modules[names[2]], core_rms=-modules[names[2]].core_rms)
    SubspaceBasis(modules, bases[bert].info).save_pretrained(tmp_path / "bad")
    assert main(["validate", str(tmp_path / "bad"), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [problem.split(":")[0] for problem in problems] == [f"module {name!r}" for name in names[:3]]
    assert all(
        word in problem for word, problem in zip(("not orthonormal", "2 cores", "negative"), problems, strict=True)
    )

    file = basis_folder / "basis.safetensors"
    tensors = load_file(file)
    tensors[f"{names[3]}.M"][0, 0] += 1
    tensors[f"{names[1]}.V"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"fingerprint": bases[bert].fingerprint})
    assert main(["validate", str(basis_folder)]) == 1
    said = capsys.readouterr().out
    assert "2 problems" in said and names[3] in said and names[1] in said
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SubspaceError, match="truncated"):
        validate_basis(basis_folder)
    with pytest.raises(SubspaceError, match="no basis_config"):
        validate_basis(shutil.copytree(bases[bert].location, tmp_path / "x").parent)
