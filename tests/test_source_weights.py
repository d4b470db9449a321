"""Sources that count as much as the weights given."""

from __future__ import annotations

import json

import pytest
import torch

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.builders import module_plan, rebuild_basis
from subspace_peft.builders.weights import read_weights
from subspace_peft.cli import main
from subspace_peft.errors import SubspaceError

from .test_build import deltas, fleet
from .test_streaming import saved_fleet, shared_fleet


@pytest.mark.parametrize("exactly", [True, False])
def test_a_weight_is_a_share_of_the_moment(exactly, monkeypatch):
    if not exactly:
        monkeypatch.setattr(module_plan, "EXACT_COLUMNS", 0)
    states = fleet(n=4)
    weights = [1.0, 5.0, 0.25, 1.0]
    names = [source["name"] for source in build_basis(states, k=3, progress=False).info["sources"]]
    given = {names[1]: 5, names[2]: 0.25}
    found = build_basis(states, k=3, weights=given, alternations=0, progress=False)["a.q"]
    moment = sum(w * d @ d.T / d.square().sum() for w, d in zip(weights, deltas(states), strict=True))
    expected = torch.linalg.eigh(moment)[1].flip(1)[:, :3]
    cosines = torch.linalg.svdvals(expected.T @ found.U.double())
    torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_equal_weights_change_nothing_and_tiny_ones_leave_out():
    states = fleet(n=4)
    plain = build_basis(states, k=3, progress=False)
    names = [source["name"] for source in plain.info["sources"]]
    assert build_basis(states, k=3, weights=dict.fromkeys(names, 1.0), progress=False).fingerprint == plain.fingerprint
    nearly = build_basis(states, k=3, weights={names[3]: 1e-12}, alternations=0, progress=False)
    without = build_basis(states[:3], k=3, alternations=0, progress=False)
    for name in without:
        cosines = torch.linalg.svdvals(without[name].U.double().T @ nearly[name].U.double())
        torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_a_file_of_weights_on_the_command_line_is_recorded_and_repeated(tmp_path, capsys):
    folders = saved_fleet(tmp_path / "loras", shared_fleet(n=5))
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({folders[0]: 3, "lora-2": 0.5}))
    out = tmp_path / "basis"
    assert main(["build", *folders, "--out", str(out), "-k", "4", "--weights", str(file), "--quiet"]) == 0
    basis = SubspaceBasis.from_pretrained(out)
    assert basis.info["build"]["weights"] == {"lora-0": 3.0, "lora-2": 0.5}
    assert basis != build_basis(folders, k=4, progress=False)
    assert rebuild_basis(basis, progress=False) == basis
    file.write_text(json.dumps({"lora-2": 0.5, "lora-9": 2}))
    assert (
        main(["build", *folders, "--out", str(tmp_path / "other"), "-k", "4", "--weights", str(file), "--quiet"]) == 1
    )
    assert "'lora-9' is no source's name or place" in capsys.readouterr().err
    assert SubspaceBasis.from_pretrained(out) == basis


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("frobenius", "no such file"),
        ({}, "numbers by source"),
        ({"a": 0}, "above 0"),
        ({"a": -1}, "above 0"),
        ({"a": True}, "above 0"),
        ({"a": float("nan")}, "above 0"),
        ({"a": "2"}, "above 0"),
        ({"a": None}, "above 0"),
    ],
)
def test_weights_that_are_none(given, said):
    with pytest.raises(SubspaceError, match=said):
        read_weights(given)


@pytest.mark.parametrize("text", ["[1, 2]", "{", '"equal"', "\x00"])
def test_files_that_hold_no_weights(tmp_path, text):
    (tmp_path / "weights.json").write_text(text)
    with pytest.raises(SubspaceError, match=r"weights\.json"):
        read_weights(tmp_path / "weights.json")


def test_two_names_of_one_source_are_refused(tmp_path, capsys):
    folders = saved_fleet(tmp_path / "loras", shared_fleet(n=3))
    for given in ({folders[0]: 3, "lora-0": 0.5}, {"lora-0": 2, folders[0]: 2}):
        with pytest.raises(SubspaceError, match=r"weights: 'lora-0' and .*lora-0' are one source, 'lora-0'"):
            build_basis(folders, k=2, weights=given, progress=False)
        (tmp_path / "weights.json").write_text(json.dumps(given))
        files = {"build.json": {"sources": folders, "weights": given}}
        files["own.json"] = {"sources": [{"model": folders[0], "weight": 3}, *folders[1:]], "weights": {"lora-0": 2}}
        for name, body in files.items():
            (tmp_path / name).write_text(json.dumps(body))
        calls = [
            [*folders, "--weights", tmp_path / "weights.json"],
            *(["--config", tmp_path / name] for name in files),
        ]
        for call in calls:
            for dry in ([], ["--dry-run"]):
                words = ["build", *map(str, call), "-k", "2", "--out", str(tmp_path / "out"), *dry, "--quiet"]
                assert main(words) == 1
                assert "lora-0" in capsys.readouterr().err
