"""Another k for some modules of a basis."""

from __future__ import annotations

import json

import pytest
import yaml

import subspace_peft.builders.module_plan as module_plan
from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.builders import plan_build, rebuild_basis
from subspace_peft.builders.k_pattern import sizes_by_pattern
from subspace_peft.cli import main
from subspace_peft.errors import SubspaceError

from .test_streaming import saved_fleet, shared_fleet

NAMES = ["a.layer.1.query", "a.layer.1.value", "a.layer.11.query", "b.out"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (None, {}),
        ({"query": 3}, {"a.layer.1.query": 3, "a.layer.11.query": 3}),
        ({"1.query": 3}, {"a.layer.1.query": 3}),
        ({"b.out": 2}, {"b.out": 2}),
        ({r"layer\.\d+\.(query|value)": 4}, {"a.layer.1.query": 4, "a.layer.1.value": 4, "a.layer.11.query": 4}),
        # of several that fit the first one counts, but the whole name before all
        ({"query": 3, "a.layer.1.query": 5}, {"a.layer.1.query": 5, "a.layer.11.query": 3}),
        ({"1.query": 5, "query": 3}, {"a.layer.1.query": 5, "a.layer.11.query": 3}),
        ({"(": 1}, None),
        ({"quer": 1}, None),
        ({"query": 1, "key": 1}, None),
    ],
    ids=str,
)
def test_which_modules_a_pattern_names(pattern, expected):
    if expected is None:
        with pytest.raises(SubspaceError, match="fits none of the 4 modules, such as"):
            sizes_by_pattern(pattern, NAMES)
    else:
        assert sizes_by_pattern(pattern, NAMES) == expected


def test_a_name_that_is_no_regular_expression_is_a_name():
    assert sizes_by_pattern({"m.(x": 2}, ["m.(x", "m.y"]) == {"m.(x": 2}


@pytest.fixture
def folders(tmp_path):
    return saved_fleet(tmp_path / "loras", shared_fleet(n=4, out=40, inner=30, ranks=(4,)))


@pytest.mark.parametrize("streamed", [False, True])
def test_every_module_is_what_a_build_with_its_k_gives(folders, streamed, monkeypatch, tmp_path):
    if streamed:
        monkeypatch.setattr(module_plan, "EXACT_COLUMNS", 2)
    made = build_basis(folders, k=5, k_pattern={"v": 3}, progress=False)
    for name, k in (("m.q", 5), ("m.v", 3)):
        alone = build_basis(folders, k=k, progress=False)
        assert made[name].digest() == alone[name].digest()
        assert (
            made.info["measured"]["energy_kept_per_module"][name]
            == (alone.info["measured"]["energy_kept_per_module"][name])
        )
    assert made.info["build"]["k_pattern"] == {"v": 3}
    plan = plan_build(folders, k=5, k_pattern={"v": 3}, progress=False)
    assert {name: size["k_out"] for name, size in plan.modules.items()} == {"m.q": 5, "m.v": 3}
    made.save_pretrained(tmp_path / "basis")
    assert plan.bytes_of_basis == (tmp_path / "basis" / "basis.safetensors").stat().st_size or streamed
    assert rebuild_basis(tmp_path / "basis", progress=False) == made


def test_a_share_of_energy_has_exceptions_too(folders):
    made = build_basis(folders, k=0.7, k_pattern={"m.v": 2}, progress=False)
    assert made["m.q"].k_out == build_basis(folders, k=0.7, progress=False)["m.q"].k_out > 2
    assert made["m.v"].k_out == made["m.v"].k_in == 2


def test_more_than_the_fleet_spans_is_said(folders):
    with pytest.warns(UserWarning, match=r"k=99: the fleet spans fewer directions in 1 of 2 modules \(m.v\)"):
        made = build_basis(folders, k=3, k_pattern={"v": 99}, progress=False)
    assert made["m.v"].k_out == 16 and made["m.q"].k_out == 3


def test_flags_and_files_are_one(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = {"sources": ["loras/lora-0", "loras/lora-1"], "k": 4, "k_pattern": {"q": 2}}
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(file))
    quiet = ("--quiet", "--force")
    assert main(["build", "--config", "fleet.yaml", "--out", "one", *quiet]) == 0
    assert (
        main(["build", "loras/lora-0", "loras/lora-1", "-k", "4", "--k-pattern", "q=2", "--out", "two", *quiet]) == 0
    )
    one, two = (SubspaceBasis.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert one == two and one["m.q"].k_out == 2 and one["m.v"].k_out == 4
    # a flag wins over the file
    assert main(["build", "--config", "fleet.yaml", "--k-pattern", "q=3", "--out", "three", *quiet]) == 0
    config = json.loads((tmp_path / "three" / "basis_config.json").read_text())
    assert config["build"]["k_pattern"] == {"q": 3}
