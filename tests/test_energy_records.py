"""What is on record of a basis's energy: lower bounds of later versions, cut bases, records of earlier versions."""

from __future__ import annotations

import json

import pytest

from subspace_peft import build_basis, complete_basis, project_lora, update_basis
from subspace_peft.cli import main
from subspace_peft.energy import EnergyRecord, percent
from subspace_peft.report import report_basis

from .test_one_number import run
from .uneven import saved, states


def test_a_record_that_its_cores_contradict_is_found(tmp_path, capsys):
    build_basis(saved(tmp_path / "loras", states(3)), k=4, progress=False).save_pretrained(tmp_path / "basis")
    file = tmp_path / "basis" / "basis_config.json"
    config = json.loads(file.read_text())
    config["sources"][1]["energy_kept"] = 0.99
    file.write_text(json.dumps(config))
    assert main(["validate", str(tmp_path / "basis")]) == 1
    assert "source 'lora-1': energy kept 99.0 % is on record, and its stored cores hold" in capsys.readouterr().out


def test_lower_bounds_are_said_to_be_such(tmp_path, capsys):
    loras = saved(tmp_path / "loras", states(7))
    old = build_basis(loras[:5], k=4, progress=False)
    old.save_pretrained(tmp_path / "old")
    made = {"update": update_basis(old, loras[5:], progress=False), "complete": complete_basis(old, 6, progress=False)}
    for name, new in made.items():
        new.save_pretrained(tmp_path / name)
        record = EnergyRecord.of(new.info)
        assert record.at_least and record.over_modules == ()
        for lora, known in zip(loras, record.sources, strict=False):
            now = project_lora(lora, new).energy_kept
            assert now >= known.kept - 1e-6 and (known.at_least or now == pytest.approx(known.kept, abs=1e-5))
        assert record.kept == pytest.approx(sum(each.kept for each in record.sources) / len(record.sources))
        text = run(capsys, "inspect", tmp_path / name)
        assert f"energy kept at least {percent(record.kept)} " in text
        assert f"  lora-0: ranks [3], energy kept at least {percent(record.sources[0].kept)}," in text
        assert (
            run(capsys, "validate", tmp_path / name).rstrip().endswith(f"energy kept at least {percent(record.kept)}")
        )
        assert f"| this basis | at least {percent(record.kept)} |" in (tmp_path / name / "README.md").read_text()
        # measured again, it is exact
        report = report_basis(tmp_path / name, loras[: len(record.sources)], progress=False)
        now = [project_lora(lora, new).energy_kept for lora in loras[: len(record.sources)]]
        assert report.numbers["kept"] == pytest.approx(sum(now) / len(now), abs=1e-6)
        assert new.info["measured"]["energy_random"] == pytest.approx(report.numbers["random"], abs=1e-9)


def test_a_cut_basis_says_what_the_cut_one_keeps(tmp_path):
    loras = saved(tmp_path / "loras", states())
    for cores in (True, False):
        cut = build_basis(loras, k=6, keep_cores=cores, progress=False).truncate(2)
        for lora, known in zip(loras, EnergyRecord.of(cut.info).sources, strict=True):
            expected = project_lora(lora, cut).energy_kept
            assert known.left_out is None
            assert known.kept == (pytest.approx(expected, abs=1e-5) if cores else None)


def test_records_of_earlier_versions_are_recomputed_or_named():
    sources = [{"name": "one", "energy_kept": 0.9}, {"name": "two", "energy_kept": 0.7}]
    measured = {
        "energy_kept": 0.62,
        "energy_random": 0.1,
        "energy_left_out": 0.2,
        "energy_kept_per_module": {"q": 0.5},
    }
    record = EnergyRecord.of({"sources": sources, "measured": measured})
    assert (record.kept, record.random, record.left_out) == (pytest.approx(0.8), 0.1, 0.2)
    assert record.over_modules == ("random", "left_out") and record.per_module == {"q": {"kept": 0.5}}
    rounded = EnergyRecord.of({"sources": sources, "precision": {"stored": "int8", "energy_lost": 0.01}})
    assert [each.kept for each in rounded.sources] == pytest.approx([0.891, 0.693])
    bare = EnergyRecord.of({"sources": [{"name": "one"}], "measured": measured})
    assert bare.kept == 0.62 and bare.over_modules == ("kept", "random", "left_out")
    # a file may say anything
    odd = EnergyRecord.of(
        {"sources": [{"energy_kept": "much"}, {}], "measured": {"energy_kept": None, "definition": []}}
    )
    assert odd.kept is None and odd.per_module == {} and EnergyRecord.of({}).sources == []
    assert EnergyRecord.of({"measured": {"energy_kept_per_module": {"q": float("nan"), "v": True}}}).per_module == {}
