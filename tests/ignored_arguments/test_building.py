"""Options of builds, updates and completions that would do nothing, or ask for more than there is."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from subspace_peft import SubspaceBasis, build_basis, complete_basis, update_basis
from subspace_peft.builders import plan_build, rebuild_basis
from subspace_peft.tasks import read_task

from ..models import bert
from .conftest import loras, said

BUILD: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["query"]}, r"target_modules= \(--target-modules\) has no effect with the builder 'adapters'"),
    ({"like": True}, r"like= \(--like\) has no effect with the builder 'adapters'"),
    ({"seed": 3}, r"seed= \(--seed\) has no effect with the builder 'adapters'"),
    ({"seed": 3, "complete": "base-weights", "base_model": True}, r"seed= \(--seed\) has no effect"),
    ({"builder": "eigenlora", "target_modules": ["query"]}, r"target_modules=.*'eigenlora'"),
    ({"builder": "eigenlora", "alternations": 2}, r"alternations= \(--alternations\) has no effect"),
    ({"builder": "eigenlora", "leave_one_out": True}, r"leave_one_out= \(--leave-one-out\) has no effect"),
    ({"builder": "random", "weights": "norm"}, r"weights= \(--weights\) has no effect with the builder 'random'"),
    ({"builder": "random", "alternations": 2}, r"alternations= .*has no effect"),
    ({"builder": "random", "keep_cores": True}, r"keep_cores= .*has no effect"),
    ({"builder": "random", "leave_one_out": True}, r"leave_one_out= .*has no effect"),
    ({"builder": "random", "like": True, "sources": None, "k": 2}, r"k= \(-k\) has no effect: the sizes are those"),
    ({"builder": "random", "like": True, "sources": None, "k_in": 2}, r"k_in= \(--k-in\) has no effect"),
    ({"builder": "random", "like": True}, r"the sources have no effect.*like="),
    ({"builder": "random", "like": True, "sources": None, "skip_bad": True}, r"skip_bad= .*no source is read"),
    ({"builder": "random", "like": True, "sources": None, "allow_bin": True}, r"allow_bin= .*no source is read"),
    ({"builder": "random", "target_modules": ["query"]}, r"target_modules= .*has no effect.*the sources"),
    (
        {"builder": "base-weights", "base_model": True, "target_modules": ["query"], "sources": None, "seed": 3},
        r"seed= .*has no effect.*singular vectors are not drawn",
    ),
    (
        {"builder": "base-weights", "base_model": True, "target_modules": ["query"]},
        r"the sources have no effect.*base_model=",
    ),
]


def build_arguments(work: Path, given: dict[str, Any]) -> dict[str, Any]:
    made = {"sources": loras(work), "k": 4, "progress": False, **given}
    if made.get("like"):
        made["like"] = SubspaceBasis.from_pretrained(work / "basis")
        if "k" not in given:
            made.pop("k")
    if made.get("base_model"):
        made["base_model"] = bert()
    return made


@pytest.mark.parametrize("function", [build_basis, plan_build], ids=["build", "plan"])
@pytest.mark.parametrize(("given", "text"), BUILD, ids=[repr(given) for given, _ in BUILD])
def test_an_option_that_a_builder_ignores_is_said(
    work: Path, given: dict[str, Any], text: str, function: Callable[..., Any]
) -> None:
    assert re.search(text, said(lambda: function(**build_arguments(work, given))))


BUILT: list[dict[str, Any]] = [
    {},
    {"weights": "norm", "alternations": 2, "directions": 2, "keep_cores": True, "leave_one_out": True},
    {"complete": "random", "seed": 3, "k": 12},
    {"base_model": True},
    {"skip_bad": True, "partial": True, "allow_bin": True},
    {"builder": "eigenlora", "weights": "norm", "leave_one_out": False},
    {"builder": "random", "seed": 3, "k_in": 5, "directions": 2},
    {"builder": "random", "like": True, "sources": None, "seed": 3},
    {"builder": "base-weights", "base_model": True, "target_modules": ["query"], "sources": None},
    {
        "builder": "base-weights",
        "base_model": True,
        "target_modules": ["query", "value"],
        "sources": None,
        "like": True,
    },
]


@pytest.mark.parametrize("given", BUILT, ids=repr)
def test_an_option_that_is_used_is_not_spoken_of(work: Path, given: dict[str, Any]) -> None:
    assert not said(lambda: build_basis(**build_arguments(work, given)))


def test_fewer_directions_than_asked_for_are_said_and_recorded(work: Path, tmp_path: Path) -> None:
    made: list[SubspaceBasis] = []
    text = said(lambda: made.append(build_basis(loras(work), k=20, progress=False)))
    assert re.search(r"k=20: the fleet spans fewer directions in 4 of 4 modules .* which get 8\.", text)
    recorded = SubspaceBasis.from_pretrained(made[0].save_pretrained(tmp_path)).info["measured"]["fewer_directions"]
    assert recorded["asked"] == [20, 20]
    assert set(recorded["modules"].values().__iter__().__next__()) == {8} and len(recorded["modules"]) == 4
    # asked for by no number, or filled up, or all that a module has
    for given in ({}, {"k": 20, "complete": "random"}, {"k": 0.9}, {"k": 8}):
        basis: list[SubspaceBasis] = []
        assert not said(
            lambda given=given, basis=basis: basis.append(build_basis(loras(work), progress=False, **given))
        )
        assert "fewer_directions" not in basis[0].info["measured"]


def test_a_rebuild_takes_the_record_without_a_word(work: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        like = SubspaceBasis.from_pretrained(work / "basis")
        build_basis(like=like, builder="random", k=3, progress=False).save_pretrained(tmp_path / "random")
        build_basis(loras(work), k=20, seed=3, progress=False).save_pretrained(tmp_path / "fleet")
    for name in ("random", "fleet"):
        assert not said(lambda name=name: rebuild_basis(tmp_path / name, progress=False))


def test_updates_and_completions(work: Path) -> None:
    new, basis = [str(work / "lora3")], str(work / "basis")
    assert "add= (--add) has no effect with k=" in said(lambda: update_basis(basis, new, k=6, add=3, progress=False))
    cores = [read_task(work / "task1").cores]
    assert "cores= has no effect without k=" in said(lambda: update_basis(basis, new, cores=cores, progress=False))
    assert "fewer directions" in said(lambda: update_basis(basis, new, k=20, progress=False))
    assert not said(lambda: update_basis(basis, new, add=3, progress=False))
    assert not said(lambda: update_basis(basis, new, k=6, cores=cores, progress=False))
    assert "base_model= (--base-model) has no effect" in said(lambda: complete_basis(basis, k=6, base_model=bert()))
    filled = {"k": 6, "with_": "base-weights", "base_model": bert()}
    assert "seed= (--seed) has no effect" in said(lambda: complete_basis(basis, seed=2, **filled))
    assert not said(lambda: complete_basis(basis, **filled))
    assert not said(lambda: complete_basis(basis, k=6, seed=2))
    assert "k=3 has no effect: every module has as many" in said(lambda: complete_basis(basis, k=3))


def test_a_control_takes_the_place_of_a_basis(work: Path) -> None:
    made = build_basis(builder="random", like=work / "basis", progress=False)
    assert made.shapes().keys() == SubspaceBasis.from_pretrained(work / "basis").shapes().keys()
