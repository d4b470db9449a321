"""Builds that are interrupted: they go on where they stopped, to the same bytes, and what was there before is
unharmed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from subspace_peft import build_basis
from subspace_peft.builders import build as building
from subspace_peft.builders import resume, update_basis
from subspace_peft.builders.resume import forget
from subspace_peft.cli import main
from subspace_peft.errors import SubspaceError

from . import fresh
from .models import bert


def contents(folder: Path) -> dict[str, bytes]:
    # the card names the folder that it lies in
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "README.md"}


@pytest.fixture
def whole(fleets, tmp_path):
    """The files of an uninterrupted build."""
    build_basis(fleets[bert], k=4, directions=2, progress=False).save_pretrained(tmp_path / "whole")
    return contents(tmp_path / "whole")


@pytest.fixture
def modules_built(monkeypatch):
    """Names of the modules that are built from here on, and after how many the next is interrupted."""
    built: list[str] = []
    original = building._build_module

    def counted(plan, reader, name, *args, **more):
        if len(built) == counted.stop_after:
            raise KeyboardInterrupt
        built.append(name)
        return original(plan, reader, name, *args, **more)

    counted.stop_after = None
    monkeypatch.setattr(building, "_build_module", counted)
    return built, counted


def test_ctrl_c_keeps_what_is_finished(fleets, tmp_path, whole, modules_built):
    built, settings = modules_built
    arguments = {"k": 4, "directions": 2, "work_folder": tmp_path / "work", "progress": False}
    settings.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        build_basis(fleets[bert], **arguments)
    assert len(built) == 3
    settings.stop_after = None
    build_basis(fleets[bert], **arguments).save_pretrained(tmp_path / "resumed")
    assert len(built) == len(set(built)) == 4
    assert contents(tmp_path / "resumed") == whole
    # a third call has nothing left to do
    build_basis(fleets[bert], **arguments)
    assert len(built) == 4
    forget(tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_other_sources_or_arguments_see_nothing_of_it(fleets, tmp_path, modules_built):
    built, _ = modules_built
    work = tmp_path / "work"
    build_basis(fleets[bert], k=4, work_folder=work, progress=False)
    for sources, more in (
        (fleets[bert][:3], {"k": 4}),
        (fleets[bert], {"k": 3}),
        (fleets[bert], {"k": 4, "weights": "norm"}),
        (fleets[bert], {"k": 4, "keep_cores": False}),
        (fleets[bert][::-1], {"k": 4}),
    ):
        built.clear()
        found = build_basis(sources, **more, work_folder=work, progress=False)
        assert len(built) == 4
        assert found.fingerprint == build_basis(sources, **more, progress=False).fingerprint


def test_a_damaged_file_is_built_again(fleets, tmp_path, whole, modules_built):
    built, _ = modules_built
    arguments = {"k": 4, "directions": 2, "work_folder": tmp_path / "work", "progress": False}
    build_basis(fleets[bert], **arguments)
    half, altered, *_ = sorted((tmp_path / "work").glob("*/*.safetensors"))
    half.write_bytes(half.read_bytes()[:-20])
    altered.write_bytes(altered.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    built.clear()
    build_basis(fleets[bert], **arguments).save_pretrained(tmp_path / "again")
    assert len(built) == 2
    assert contents(tmp_path / "again") == whole


def test_kill_9_at_any_module_and_in_the_midst_of_writing(fleets, tmp_path, whole):
    arguments = ["build", *fleets[bert], "--out", str(tmp_path / "out"), "-k", "4", "--directions", "2", "--quiet"]
    killed = """
        import os, signal, sys
        import subspace_peft.builders.resume as resume
        from subspace_peft.cli import main
        original, count = resume.save_file, 0
        def save(tensors, path, metadata=None):
            global count
            count += 1
            original(tensors, path, metadata=metadata)
            if count == 2:
                os.truncate(path, 100)
                os.kill(os.getpid(), signal.SIGKILL)
        resume.save_file = save
        main(sys.argv[1:])
    """
    partial = tmp_path / "out.partial"
    for finished in (1, 2, 3):
        done = fresh.run("-c", killed, *arguments)
        assert done.returncode == -9
        assert len(list(partial.glob("*/*.safetensors"))) == finished
        assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    assert contents(tmp_path / "out") == whole
    assert not partial.exists()


def test_a_full_disk_says_what_is_kept_and_harms_nothing(fleets, tmp_path, whole, monkeypatch, capsys):
    out = tmp_path / "out"
    build_basis(fleets[bert][:2], k=2, progress=False).save_pretrained(out)
    before = contents(out)
    arguments = ["build", *fleets[bert], "--out", str(out), "-k", "4", "--directions", "2", "--quiet", "--force"]
    original, count = resume.save_file, 0

    def full(tensors, path, metadata=None):
        nonlocal count
        count += 1
        if count == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path, metadata=metadata)

    monkeypatch.setattr(resume, "save_file", full)
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "the disk is full" in message and "[Errno" not in message
    assert "2 finished modules are kept" in message
    assert contents(out) == before
    assert not list((tmp_path / "out.partial").glob("*/.*"))
    monkeypatch.undo()
    assert main(arguments) == 0
    assert contents(out) == whole
    assert not (tmp_path / "out.partial").exists()


def test_ctrl_c_on_the_command_line_says_how_to_go_on(fleets, tmp_path, modules_built, capsys):
    modules_built[1].stop_after = 1
    assert main(["build", *fleets[bert], "--out", str(tmp_path / "out"), "--quiet"]) == 130
    assert "same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_peoples_files_stay(fleets, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text("mine")
    assert main(["build", *fleets[bert], "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert [file.name for file in partial.iterdir()] == ["mine.txt"]
    with pytest.raises(SubspaceError, match="is a file"):
        build_basis(fleets[bert], work_folder=partial / "mine.txt", progress=False)


# -- updates
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def updates_made(monkeypatch):
    """Names of the modules that are updated from here on, and after how many the next is interrupted."""
    from subspace_peft.builders import update as updating

    made: list[str] = []
    original = updating.update_module

    def counted(plan, reader, name, *args):
        if len(made) == counted.stop_after:
            raise KeyboardInterrupt
        made.append(name)
        return original(plan, reader, name, *args)

    counted.stop_after = None
    monkeypatch.setattr(updating, "update_module", counted)
    return made, counted


@pytest.mark.parametrize("given", [{"add": 2}, {"k": 4}], ids=["grown", "refitted"])
def test_an_interrupted_update_goes_on_to_the_same_bytes(fleets, tmp_path, updates_made, given):
    made, settings = updates_made
    old = build_basis(fleets[bert][:2], k=3, progress=False)
    old.save_pretrained(tmp_path / "old")
    update_basis(old, fleets[bert][2:], **given, progress=False).save_pretrained(tmp_path / "whole")
    made.clear()
    settings.stop_after = 3
    arguments = {**given, "work_folder": tmp_path / "work", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        update_basis(old, fleets[bert][2:], **arguments)
    settings.stop_after = None
    # another update sees nothing of it
    update_basis(old, fleets[bert][2:], **{**arguments, "alternations": 1})
    assert len(made) == 3 + 4
    update_basis(old, fleets[bert][2:], **arguments).save_pretrained(tmp_path / "resumed")
    assert len(made) == 3 + 4 + 1
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    if "k" in given:
        # another bound on the drift changes no module
        update_basis(old, fleets[bert][2:], **arguments, max_drift=1.0)
        assert len(made) == 3 + 4 + 1
        # one that has a task's core to keep too is another update
        core = {name: torch.randn(3, 3) for name in old}
        update_basis(old, fleets[bert][2:], cores=[core], **arguments)
        assert len(made) == 3 + 4 + 1 + 4


def test_an_update_on_the_command_line_goes_on_and_cleans_up(fleets, tmp_path, updates_made, capsys):
    made, settings = updates_made
    build_basis(fleets[bert][:2], k=3, progress=False).save_pretrained(tmp_path / "old")
    settings.stop_after = 2
    typed = ["update", str(tmp_path / "old"), *fleets[bert][2:], "--out", str(tmp_path / "new"), "--quiet"]
    assert main(typed) == 130
    assert "same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and (tmp_path / "new.partial").is_dir()
    settings.stop_after = None
    assert main(typed) == 0
    assert len(made) == len(set(made)) == 4
    assert (tmp_path / "new" / "basis_config.json").is_file() and not (tmp_path / "new.partial").exists()
