"""What the disk refuses is said plainly: which place, why, and what helps. And caches are hints: none is needed."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from subspace_peft import SubspaceBasis, SubspaceConfig, TaskBank, bundle_tasks, export_lora, project_lora
from subspace_peft._io import disk
from subspace_peft._io.atomic import write_aside, write_folder_aside
from subspace_peft.basis import cache
from subspace_peft.basis.dependents import add_dependent, dependents_of
from subspace_peft.basis.locations import add_note, read_notes
from subspace_peft.cli import main
from subspace_peft.errors import DiskError
from subspace_peft.hub import fetch
from subspace_peft.serve import TaskExports

from .models import bert, inputs, randomise

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your quota on this disk is used up",
    errno.EACCES: "you have no permission",
    errno.EPERM: "you have no permission",
    errno.EROFS: "file system that can only be read",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "is a file, where a folder is needed",
    errno.EISDIR: "it is a folder, where a file is needed",
    errno.EFBIG: "the file is larger than the system allows",
    errno.EMFILE: "too many files are open",
    errno.EIO: "the disk reports a fault",
}


@pytest.fixture(scope="module")
def projection(fleets, bases):
    return project_lora(fleets[bert][0], bases[bert])


@pytest.fixture
def writers(projection, bases, tmp_path):
    """Everything that writes, by name, as a function of the place."""
    task = projection.save_pretrained(tmp_path / "task")
    return {
        "basis": bases[bert].to(torch.float16).save_pretrained,
        "task": projection.save_pretrained,
        "export": lambda place: export_lora(task, place),
        "bundle": lambda place: bundle_tasks([task], place, progress=False),
    }


WRITERS = ("basis", "task", "export", "bundle")


def said_of(error: BaseException) -> str:
    said = str(error)
    assert ("[Errno" not in said and ".partial" not in said and "Give another place" in said) or "make" in said.lower()
    return said


@pytest.mark.parametrize("number", REASONS, ids=errno.errorcode.get)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_the_disk_refuses_is_said_by_every_writer(writer, number, writers, tmp_path, monkeypatch):
    def refuse(*given):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", refuse)
    place = tmp_path / "out"
    with pytest.raises(DiskError) as refused:
        writers[writer](place)
    assert REASONS[number] in said_of(refused.value) and str(place) in str(refused.value)
    assert refused.value.errno == number and os.strerror(number) in str(refused.value)
    assert not place.exists() or not list(place.iterdir())


@pytest.mark.parametrize("writer", WRITERS)
def test_places_that_can_be_no_folder(writer, writers, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place, said in (
        (tmp_path / "file" / "inside", f"{tmp_path / 'file'} is a file, where a folder is needed"),
        (tmp_path / ("x" * 300), "the name is too long for the disk (300 bytes)"),
        (tmp_path / ("x" * 300) / "inside", "the name is too long for the disk (300 bytes)"),
    ):
        with pytest.raises(DiskError) as refused:
            writers[writer](place)
        assert said in said_of(refused.value)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_may_not_grow_is_said_and_nothing_is_left(writer, writers, tmp_path):
    """By a true limit of the system's, which reaches safetensors' own writes too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError) as refused:
            writers[writer](tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "larger than the system allows" in said_of(refused.value) and isinstance(refused.value, DiskError)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(projection, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="you have no permission") as refused:
        projection.save_pretrained(tmp_path / "closed" / "task")
    assert isinstance(refused.value, DiskError)


def test_it_is_still_the_error_that_python_raises(tmp_path, monkeypatch):
    def refuse(*given):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(PermissionError) as refused:
        write_aside(tmp_path / "file", lambda path: path.write_text("x"))
    assert isinstance(refused.value, DiskError) and refused.value.errno == errno.EACCES


def test_errors_about_other_places_come_through(tmp_path):
    def read(path):
        (Path("/nowhere") / "else").read_text()

    for write, place in ((write_aside, tmp_path / "file"), (write_folder_aside, tmp_path / "folder")):
        with pytest.raises(FileNotFoundError, match=r"\[Errno 2\].*/nowhere/else"):
            write(place, read)
        with pytest.raises(ValueError, match="mine"):
            write(place, lambda path: (_ for _ in ()).throw(ValueError("mine")))


@pytest.mark.parametrize(
    "command",
    [
        ["project", "LORA", "--basis", "BASIS", "--out", "PLACE"],
        ["complete", "BASIS", "-k", "9", "--out", "PLACE"],
        ["update", "BASIS", "LORA", "--out", "PLACE"],
        ["build", "LORA", "--out", "PLACE"],
        ["compress", "LORA", "--basis", "BASIS", "--out", "PLACE"],
        ["report", "BASIS", "--out", "PLACE"],
        ["bundle", "create", "TASK", "--out", "PLACE"],
        ["export-lora", "TASK", "--out", "PLACE"],
        ["cp", "glue", "--out", "PLACE"],
        ["inspect", "PLACE"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("place", ["file/inside", "x" * 300])
def test_the_command_line_says_it_before_the_work(
    command, place, projection, bases, fleets, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("subspace_peft.builders.build._build_modules", lambda *given: pytest.fail("worked"))
    (tmp_path / "file").write_text("mine")
    words = {"LORA": fleets[bert][0], "BASIS": bases[bert].location, "PLACE": str(tmp_path / place)}
    words["TASK"] = str(projection.save_pretrained(tmp_path / "task"))
    assert main([words.get(word, word) for word in command]) == 1
    err = capsys.readouterr().err
    verb = " ".join(command[:2] if command[0] == "bundle" else command[:1])
    assert err.startswith(f"subspace-peft {verb}: ") and "Traceback" not in err
    if command[0] != "inspect":
        assert "[Errno" not in err
        assert "where a folder is needed" in err if place.startswith("file") else "the name is too long" in err


# -- caches -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["a file", "below a file", "cannot be looked at"])
def closed_cache(request, tmp_path, monkeypatch):
    """A cache that cannot be written, as in a home that is mounted for reading only."""
    (tmp_path / "cache").write_text("")
    place = tmp_path / "cache" / "inside" if request.param == "below a file" else tmp_path / "cache"
    monkeypatch.setenv("SUBSPACE_PEFT_CACHE", str(place))
    if request.param == "cannot be looked at":
        own = os.stat

        def refuse(path, *given, **more):
            if isinstance(path, (str, os.PathLike)) and str(path).startswith(str(place)):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return own(path, *given, **more)

        monkeypatch.setattr("os.stat", refuse)
    return place


def test_training_saving_and_loading_need_no_cache(closed_cache, basis_folder, tmp_path, recwarn):
    model = randomise(get_peft_model(bert(), SubspaceConfig(basis=str(basis_folder))))
    model.save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "task")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(inputs()).logits, model.eval()(inputs()).logits)
    fingerprint = model.peft_config["default"].basis_fingerprint
    cache.keep(basis_folder, fingerprint=fingerprint, location="org/basis", revision="0" * 40)
    add_note(fingerprint, "org/basis", None)
    add_dependent(fingerprint, tmp_path / "task")
    assert cache.find(fingerprint) is None and read_notes(fingerprint) == dependents_of(fingerprint) == []


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    monkeypatch.delenv("SUBSPACE_PEFT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    assert cache.cache_home().name.startswith("subspace_peft-")


def test_exports_say_which_folder_to_name(closed_cache, projection, basis_folder, tmp_path):
    projection.save_pretrained(tmp_path / "tasks" / "one")
    with pytest.raises(DiskError, match=r"Name another folder, by TaskExports\(cache=…\) or in the variable"):
        TaskExports(tmp_path / "tasks").find("one")
    assert TaskExports(tmp_path / "tasks", cache=tmp_path / "exports").find("one").is_dir()


def test_vllms_resolver_logs_what_the_disk_refuses(projection, tmp_path, monkeypatch, caplog):
    resolver = types.ModuleType("vllm.lora.resolver")
    resolver.LoRAResolver = object
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = dict
    for name, module in (("vllm", types.ModuleType("vllm")), ("vllm.lora", types.ModuleType("vllm.lora"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "vllm.lora.resolver", resolver)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    from subspace_peft.serve.vllm_resolver import make_resolver

    projection.save_pretrained(tmp_path / "tasks" / "one")

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    exports = TaskExports(tmp_path / "tasks", cache=tmp_path / "exports")
    assert asyncio.run(make_resolver(exports).resolve_lora("base", "one")) is None
    assert "the disk is full" in caplog.text and "SUBSPACE_PEFT_EXPORTS" in caplog.text
    assert "[Errno" not in caplog.text and list((tmp_path / "exports").iterdir()) == []


def test_a_hub_cache_that_cannot_be_written_is_no_missing_basis(monkeypatch, tmp_path, capsys):
    def full(*given, **more):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "hub" / "blobs"))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    for get in (lambda: fetch("org/basis", "basis_config.json"), lambda: SubspaceBasis.from_pretrained("org/basis")):
        with pytest.raises(DiskError, match=r"the disk is full.* or point HF_HOME to a folder"):
            get()
    assert main(["inspect", "org/basis"]) == 1
    assert "the disk is full" in capsys.readouterr().err


def test_a_bank_says_it_too(projection, bases, tmp_path, monkeypatch):
    bank = TaskBank(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location)))

    def refuse(*given):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(DiskError, match="file system that can only be read"):
        bank.save(tmp_path / "bank.safetensors")


def test_numbers_that_stand_in_the_text_only_are_read():
    class SafetensorError(Exception):
        pass

    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert disk.number_of(SafetensorError(text)) == errno.ENOSPC
    assert disk.number_of(SafetensorError("no header")) is None
    assert disk.number_of(ValueError(text)) is None
    assert disk.plain(OSError("as it is")) == "as it is"
