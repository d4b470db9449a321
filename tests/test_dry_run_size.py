"""The bytes that a dry run promises are those that the build writes, whatever is stored and as what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from subspace_peft import SubspaceBasis, build_basis, update_basis
from subspace_peft.builders import plan_build, plan_rebuild
from subspace_peft.builders.clusters import build_clusters
from subspace_peft.cli import main

from .test_streaming import saved_fleet, shared_fleet

MODULES = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
GIVEN = {
    "plain": {},
    "one side": {"k_in": 3},
    "no cores": {"keep_cores": False},
    "directions": {"directions": 4},
    "raw": {"builder": "eigenlora"},
    "filled up": {"k": 40, "complete": "random"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    return saved_fleet(tmp_path_factory.mktemp("loras"), shared_fleet(n=6), modules=MODULES)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("basis.safetensors"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("given", GIVEN)
def test_of_every_precision(given, precision, folders, tmp_path):
    options = {"k": 6, **GIVEN[given]}
    plan = plan_build(folders, precision=precision, progress=False, **options)
    build_basis(folders, progress=False, **options).to_precision(precision).save_pretrained(tmp_path / "basis")
    assert plan.bytes_of_basis == plan.bytes_at_most == pytest.approx(size(tmp_path / "basis"), rel=0.03)


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("clusters", [1, 2, 3])
def test_of_every_number_of_clusters(clusters, precision, folders, tmp_path):
    plan = plan_build(folders, k=3, clusters=clusters, precision=precision, progress=False)
    made = build_clusters(folders, clusters, k=3, progress=False).to_precision(precision)
    made.save_pretrained(tmp_path / "clusters")
    assert len(made.bases) == clusters
    assert plan.bytes_of_basis == pytest.approx(size(tmp_path / "clusters"), rel=0.03)


def test_with_auto_it_is_a_range(folders, tmp_path, capsys):
    plan = plan_build(folders, k=3, clusters="auto", progress=False)
    one, six = (plan_build(folders, k=3, clusters=n, progress=False).bytes_of_basis for n in (1, 6))
    assert (plan.bytes_of_basis, plan.bytes_at_most) == (one, six)
    assert main(["build", *folders, "-k", "3", "--clusters", "auto", "--dry-run", "--quiet"]) == 0
    assert f"{one:,} to {six:,} bytes of basis" in capsys.readouterr().out


@pytest.mark.parametrize("precision", [None, "int8"])
def test_of_what_is_built_again_and_of_controls(precision, folders, tmp_path, capsys):
    like = build_basis(folders[:4], k=4, progress=False)
    like.save_pretrained(tmp_path / "like")
    update_basis(like, folders[4:], add=2, progress=False).save_pretrained(tmp_path / "updated")
    more = [] if precision is None else ["--precision", precision]
    calls = {
        "again": ["--from-config", str(tmp_path / "like")],
        "updated again": ["--from-config", str(tmp_path / "updated")],
        "control": ["--builder", "random", "--like", str(tmp_path / "like"), "--directions", "3"],
    }
    for name, call in calls.items():
        out = tmp_path / name
        words = ["build", *call, *more, "--out", str(out), "--quiet", "--json"]
        assert main([*words, "--dry-run"]) == 0
        promised = json.loads(capsys.readouterr().out)["bytes_of_basis"]
        assert main(words) == 0
        capsys.readouterr()
        assert promised == pytest.approx(size(out), rel=0.03), name
    if precision is not None:
        SubspaceBasis.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "rounded")
        assert plan_rebuild(tmp_path / "rounded", progress=False).bytes_of_basis == pytest.approx(
            size(tmp_path / "rounded"), rel=0.03
        )
