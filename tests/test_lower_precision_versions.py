"""Versions made from a basis that is stored in fewer bits: their files are sound, and tasks move to them exactly."""

from __future__ import annotations

import pytest
import torch

from subspace_peft import SubspaceBasis, build_basis, complete_basis, project_lora, update_basis
from subspace_peft.cli import main
from subspace_peft.convert import migrate_task
from subspace_peft.report import validate_basis

from .models import bert
from .test_build import fleet

MADE = {
    "update": lambda old: update_basis(old, fleet(2, seed=9), progress=False),
    "update k=": lambda old: update_basis(old, fleet(2, seed=9), k=6, progress=False),
    "complete": lambda old: complete_basis(old, 9, progress=False),
    "truncate": lambda old: old.truncate(2),
    "to": lambda old: old.to(torch.float64),
    "own modules": lambda old: SubspaceBasis(dict(old.items()), old.info),
}


@pytest.mark.filterwarnings("ignore:.*next version is stored as float32")
@pytest.mark.parametrize("precision", ["int8", "bfloat16", "float16"])
@pytest.mark.parametrize("made", MADE)
def test_what_is_made_from_it_is_read_again(made, precision, tmp_path):
    old = build_basis(fleet(4), k=5, progress=False).to_precision(precision)
    old.save_pretrained(tmp_path / "old")
    new = MADE[made](SubspaceBasis.from_pretrained(tmp_path / "old"))
    new.save_pretrained(tmp_path / "new")
    again = SubspaceBasis.from_pretrained(tmp_path / "new")
    assert validate_basis(again)["problems"] == []
    assert again == new and again.precision is None and "precision" not in again.info
    for name in new:
        assert torch.equal(again[name].U, new[name].U)
        if made in ("update", "complete"):
            # the directions that tasks are in, to the bit
            assert torch.equal(again[name].U[:, :5], old[name].U) and torch.equal(again[name].V[:5], old[name].V)
    smaller = again.to_precision(precision) if made != "to" else again
    smaller.save_pretrained(tmp_path / "smaller")
    assert validate_basis(tmp_path / "smaller")["problems"] == []


@pytest.mark.parametrize("verb", ["update", "complete"])
def test_the_verbs_say_so_and_tasks_move_exactly(verb, fleets, tmp_path, capsys):
    build_basis(fleets[bert][:3], k=4, progress=False).to_precision("int8").save_pretrained(tmp_path / "old")
    project_lora(fleets[bert][0], tmp_path / "old").save_pretrained(tmp_path / "task")
    what = {"update": [fleets[bert][3]], "complete": ["-k", "6"]}[verb]
    with pytest.warns(UserWarning, match=r"stored as int8; its next version is stored as float32"):
        assert main([verb, str(tmp_path / "old"), *what, "--out", str(tmp_path / "new"), "--quiet"]) == 0
    assert main(["validate", str(tmp_path / "new")]) == 0
    assert migrate_task(tmp_path / "task", tmp_path / "new").total_drift < 1e-5
