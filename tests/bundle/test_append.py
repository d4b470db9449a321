"""Appending to a bundle leaves what is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import subspace_peft._io.atomic as atomic
from subspace_peft import add_tasks, build_basis, load_task, open_bundle
from subspace_peft.bundle.format import BUNDLE_FILE
from subspace_peft.errors import BadFileError, BasisMismatchError, SubspaceError

from .. import fresh
from ..models import bert
from .conftest import NAMES, logits, save


def test_appending_leaves_what_is_there_to_the_byte(bundle, folders, tmp_path):
    before = {name: bundle.raw(name) for name in bundle}
    entries = {name: bundle.entry(name) for name in bundle}
    basis = bundle.config("task0").resolve()
    more = save(bert, tmp_path / "more", basis, 7)
    head = save(bert, tmp_path / "head", basis, 8, modules_to_save=["classifier"])
    made = add_tasks(bundle.location, [more, head], metrics={"head": {"f1": 0.5}}, progress=False)
    assert set(made) == {*before, "more", "head"} and not made.verify()
    assert {name: made.raw(name) for name in before} == before
    assert {name: made.entry(name) for name in before} == entries
    for name, folder in (("more", more), ("head", head)):
        expected = logits(PeftModel.from_pretrained(bert(), folder))
        torch.testing.assert_close(logits(load_task(bert(), made, name)), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(SubspaceError, match=r"'more' already.*replace=True"):
        add_tasks(made, [more], progress=False)
    replaced = add_tasks(made, {"more": folders[1]}, replace=True, progress=False)
    assert replaced.raw("more") == before["task1"] and len(replaced) == len(made)
    # the one that was open before was not changed under its reader: it says so
    with pytest.raises(BadFileError, match="was replaced since"):
        bundle.read("task0")


@pytest.mark.parametrize("how", ["disk", "damaged", "another basis", "killed"])
def test_a_failed_append_leaves_the_bundle_as_it_was(how, bundle, folders, fleets, tmp_path, monkeypatch):
    folder = Path(bundle.location)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    new, error, message = folders[0], OSError, "No space"
    if how == "disk":
        monkeypatch.setattr(
            atomic.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
    elif how == "damaged":
        file, (start, _) = folder / BUNDLE_FILE, bundle.span("task1")
        data = bytearray(file.read_bytes())
        data[start] ^= 1
        file.write_bytes(bytes(data))
        before[BUNDLE_FILE] = bytes(data)
        error, message = BadFileError, "'task1' has sha256"
    elif how == "another basis":
        build_basis(fleets[bert][:3], k=4, progress=False).save_pretrained(tmp_path / "other")
        new = save(bert, tmp_path / "stranger", str(tmp_path / "other"))
        error, message = BasisMismatchError, "on the basis"
    else:
        monkeypatch.setattr(atomic.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        error, message = KeyboardInterrupt, None
    with pytest.raises(error, match=message):
        add_tasks(folder, {"new": new}, progress=False)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_two_that_add_at_once_both_add(bundle, folders):
    program = (
        "import sys; from subspace_peft import add_tasks; add_tasks(sys.argv[1], {sys.argv[2]: sys.argv[3]},"
        " progress=False)"
    )
    started = [fresh.start("-c", program, bundle.location, name, str(folders[0])) for name in ("left", "right")]
    for each in started:
        each.communicate()
    assert [each.returncode for each in started] == [0, 0]
    assert {"left", "right", *NAMES} == set(open_bundle(bundle.location))
