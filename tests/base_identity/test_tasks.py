"""A saved task knows the weights that it was trained on, and takes them along to another basis."""

from __future__ import annotations

import json
import warnings

import pytest
from peft import PeftModel

from subspace_peft import SubspaceBasis, TaskBank, complete_basis, hotswap, record_base_model, update_basis
from subspace_peft.basis.base_notes import note_file
from subspace_peft.convert import migrate_task
from subspace_peft.errors import BasisMismatchError

from .conftest import OTHER, SAME, adapt, changed, lora, wide


def test_a_stored_basis_is_noted_on_this_machine_when_a_task_is_saved(plain, tmp_path):
    before = {file.name: file.read_bytes() for file in plain.iterdir()}
    model = adapt(wide(), plain)
    # another object of the same basis, while the first is in use
    with pytest.raises(BasisMismatchError, match="in this process"):
        adapt(wide(1), plain)
    fingerprint = model.peft_config["default"].basis_fingerprint
    assert not note_file(fingerprint).exists()
    model.save_pretrained(tmp_path / "task")
    del model
    assert note_file(fingerprint).exists()
    with pytest.raises(BasisMismatchError, match=r"(?s)this machine's note.*record-base BASIS"):
        adapt(wide(1), plain)
    assert {file.name: file.read_bytes() for file in plain.iterdir()} == before
    # what the folder says counts before the note
    record_base_model(str(plain), wide(1))
    adapt(wide(1), plain)
    with pytest.raises(BasisMismatchError, match="the basis's own record"):
        adapt(wide(), plain)


@pytest.mark.parametrize("own_file", [False, True])
def test_a_saved_task_knows_its_base_models_weights(plain, tmp_path, own_file, monkeypatch):
    adapt(wide(), plain, save_basis=own_file).save_pretrained(tmp_path / "task")
    monkeypatch.setenv("SUBSPACE_PEFT_CACHE", str(tmp_path / "another machine"))
    PeftModel.from_pretrained(changed(SAME["4 bits"]), tmp_path / "task")
    for name in ("relative noise of .05", "absolute noise of .05"):
        with pytest.raises(BasisMismatchError, match="that the task was trained on"):
            PeftModel.from_pretrained(changed(OTHER[name]), tmp_path / "task")
    PeftModel.from_pretrained(changed(OTHER["zeros"]), tmp_path / "task", check_base_model=False)
    assert (tmp_path / "task" / "adapter_config.json").stat().st_size < 10_000


def test_a_task_of_an_earlier_version_is_judged_by_its_probe(plain, tmp_path):
    adapt(wide(), plain).save_pretrained(tmp_path / "task")
    file = tmp_path / "task" / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["base_weights"]
    file.write_text(json.dumps(config))
    note_file(config["basis_fingerprint"]).unlink()
    with pytest.raises(BasisMismatchError, match="weights are not those that the task was trained on"):
        PeftModel.from_pretrained(wide(1), tmp_path / "task")
    with pytest.warns(UserWarning, match="in the few values on record"):
        PeftModel.from_pretrained(changed(OTHER["relative noise of .1"]), tmp_path / "task")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weights")
        PeftModel.from_pretrained(wide().bfloat16(), tmp_path / "task")


def test_a_task_of_another_base_does_not_take_a_tasks_place(plain, tmp_path):
    for seed in (0, 1):
        adapt(wide(seed), plain, task_type=None).save_pretrained(tmp_path / f"task{seed}")
        note_file(SubspaceBasis.from_pretrained(plain).fingerprint).unlink()
    model = PeftModel.from_pretrained(wide(), tmp_path / "task0")
    bank = TaskBank(model)
    hotswap(model, tmp_path / "task0")
    bank.add("one", str(tmp_path / "task0"))
    for take in (lambda: hotswap(model, tmp_path / "task1"), lambda: bank.add("two", str(tmp_path / "task1"))):
        with pytest.raises(BasisMismatchError, match="other base weights than the adapter in this model"):
            take()


def test_updates_completions_and_tasks_carried_over_keep_the_record(recorded, loras, tmp_path):
    old = SubspaceBasis.from_pretrained(recorded)
    new = lora(tmp_path / "new", 7)
    updated = update_basis(old, [str(new)], progress=False)
    completed = complete_basis(old, 8, progress=False)
    for basis in (updated, completed, old.to_precision("int8"), old.truncate(2)):
        assert basis.info["base_weights"] == old.info["base_weights"]
    for build in (
        lambda: update_basis(old, [str(new)], base_model=wide(1), progress=False),
        lambda: complete_basis(old, 8, with_="base-weights", base_model=wide(1), progress=False),
    ):
        with pytest.raises(BasisMismatchError, match="is not the one of the basis"):
            build()
    adapt(wide(), recorded).save_pretrained(tmp_path / "task")
    updated.save_pretrained(tmp_path / "updated")
    moved = migrate_task(tmp_path / "task", updated).save_pretrained(tmp_path / "moved")
    PeftModel.from_pretrained(wide(), moved)
    with pytest.raises(BasisMismatchError, match="that the task was trained on"):
        PeftModel.from_pretrained(wide(1), moved)
