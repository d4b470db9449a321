"""Nothing else is written over unless that is asked for: every writer × what lies there × `overwrite`."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model
from safetensors import safe_open

from subspace_peft import (
    SubspaceBasis,
    SubspaceConfig,
    TaskBank,
    build_basis,
    bundle_tasks,
    complete_basis,
    compress_fleet,
    export_lora,
    migrate_task,
    project_lora,
)
from subspace_peft._io.occupied import export_mark
from subspace_peft.bundle import extract_task, migrate_bundle, open_bundle
from subspace_peft.cli import main
from subspace_peft.convert.projection import Projection
from subspace_peft.errors import OccupiedError, SubspaceError
from subspace_peft.tasks.adapter_io import save_adapter

from .models import bert, randomise


class World:
    """Two bases of one fleet, in `root`, and everything that can lie in a folder, by name."""

    def __init__(self, root: Path, fleet: list[str], basis: SubspaceBasis) -> None:
        self.root, self.fleet, self.basis = root, fleet, basis
        self.other = build_basis(fleet[:3], k=3, progress=False)
        self.other.save_pretrained(root / "other")
        self.projection = project_lora(fleet[0], basis)
        self.foreign = project_lora(fleet[1], self.other)
        task = self.projection.save_pretrained(root / "task")
        self.foreign.save_pretrained(root / "other-task")
        export_lora(task, root / "export")
        export_lora(root / "other-task", root / "other-export")
        self.bundle = bundle_tasks([task], root / "bundle", progress=False)
        bundle_tasks([root / "other-task"], root / "other-bundle", progress=False)
        bundle_tasks({"task": task, "more": task}, root / "larger-bundle", progress=False)
        model = bert()
        model.save_pretrained(root / "model")
        (root / "git" / ".git").mkdir(parents=True)
        (root / "git" / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
        (root / "notes").mkdir()
        (root / "notes" / "notes.txt").write_text("mine")
        (root / "empty").mkdir()
        for name in ("basis.safetensors", "adapter_model.safetensors", "bundle.safetensors", "report.html"):
            (root / f"foreign {name}").mkdir()
            (root / f"foreign {name}" / name).write_bytes(b"mine")
        self.model = randomise(get_peft_model(bert(), SubspaceConfig(basis=str(basis.location))))
        self.bank = TaskBank(self.model)
        self.bank.add("task", root / "task")
        self.places = {each.name: each for each in root.iterdir()}
        self.places |= {"basis": Path(str(basis.location)), "lora": Path(fleet[4])}


@pytest.fixture(scope="module")
def world(fleets, bases, tmp_path_factory):
    return World(tmp_path_factory.mktemp("overwriting"), fleets[bert], bases[bert])


FOREIGN = ("basis.safetensors", "adapter_model.safetensors", "bundle.safetensors", "report.html")
# writer → what it writes, as (folder, overwrite) of a world; what may lie there without `overwrite`
WRITERS = {
    "basis": (lambda w, to, force: w.basis.save_pretrained(to, overwrite=force), {"basis"}),
    "projection": (lambda w, to, force: w.projection.save_pretrained(to, overwrite=force), {"task"}),
    "migration": (
        lambda w, to, force: migrate_task(w.root / "task", w.basis).save_pretrained(to, overwrite=force),
        {"task"},
    ),
    "bank's task": (lambda w, to, force: w.bank.save_task("task", to, overwrite=force), {"task"}),
    "extracted task": (lambda w, to, force: extract_task(w.bundle, "task", to, overwrite=force), {"task"}),
    "injected": (lambda w, to, force: save_adapter(w.model, to, overwrite=force), {"task"}),
    "export": (lambda w, to, force: export_lora(w.root / "task", to, overwrite=force), {"export"}),
    "extracted LoRA": (
        lambda w, to, force: extract_task(w.bundle, "task", to, as_lora=True, overwrite=force),
        {"export"},
    ),
    "bundle": (
        lambda w, to, force: bundle_tasks([w.root / "task"], to, overwrite=force, progress=False),
        {"bundle"},
    ),
    "fleet": (
        lambda w, to, force: compress_fleet(
            {Path(w.fleet[0])}, w.basis, to, min_energy=0, overwrite=force, progress=False
        ),
        set(),
    ),
    "migrated bundle": (
        lambda w, to, force: migrate_bundle(w.bundle, w.basis, to, overwrite=force, progress=False),
        {"bundle"},
    ),
}
THINGS = (
    *("basis", "other", "task", "other-task", "lora", "export", "other-export", "bundle", "other-bundle"),
    *("larger-bundle", "model", "git", "notes", "empty", *(f"foreign {name}" for name in FOREIGN)),
)
REPLACED = {
    "basis": "basis.safetensors",
    "bundle": "bundle.safetensors",
    "fleet": "bundle.safetensors",
    "migrated bundle": "bundle.safetensors",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_writer_replaces_its_own_thing_only(writer, thing, world, tmp_path):
    write, own = WRITERS[writer]
    folder = Path(shutil.copytree(world.places[thing], tmp_path / "there"))
    before = contents(folder)
    harmless = thing.startswith("foreign") and thing != f"foreign {REPLACED.get(writer, 'adapter_model.safetensors')}"
    # weights of an adapter and of a bundle, which are none, are things of another kind too
    harmless = harmless and thing in ("foreign basis.safetensors", "foreign report.html")
    if thing in own or thing in ("notes", "empty") or harmless:
        write(world, folder, False)
    else:
        with pytest.raises(OccupiedError, match=r"overwrite=True \(--force\)") as refused:
            write(world, folder, False)
        assert str(folder) in str(refused.value) and contents(folder) == before
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write(world, folder, True)
    after = contents(folder)
    kept = {name for name in before if name.startswith(("notes", ".git", "model", "config.json"))}
    assert all(after[name] == before[name] for name in kept)
    # it is the thing that was written, and none of the other kind is left beside it
    kinds = {"basis_config.json", "adapter_config.json", "bundle.safetensors"} & after.keys()
    if thing not in ("model", "git"):
        assert len(kinds) == 1


def test_a_bundle_with_more_tasks_is_not_made_smaller_by_chance(world, tmp_path):
    folder = Path(shutil.copytree(world.places["larger-bundle"], tmp_path / "there"))
    with pytest.raises(OccupiedError, match="Its 1 tasks that are not among those given, such as 'more'"):
        bundle_tasks([world.root / "task"], folder, progress=False)
    assert len(open_bundle(folder)) == 2


@pytest.mark.parametrize("kind", ["bank", "smaller", "other bank", "bundle", "text"])
def test_a_banks_file_replaces_a_bank_of_the_same_tasks_only(kind, world, tmp_path):
    file = tmp_path / "bank.safetensors"
    if kind in ("bank", "smaller"):
        bank = TaskBank(world.model)
        for name in ("task", "more")[: 2 if kind == "smaller" else 1]:
            bank.add(name, world.root / "task")
        bank.save(file)
    elif kind == "other bank":
        other = get_peft_model(bert(), SubspaceConfig(basis=str(world.root / "other")))
        TaskBank(other).save(file)
    elif kind == "bundle":
        shutil.copy(world.root / "bundle" / "bundle.safetensors", file)
    else:
        file.write_text("mine")
    before = file.read_bytes()
    if kind != "bank":
        with pytest.raises(OccupiedError):
            world.bank.save(file)
        assert file.read_bytes() == before
    assert world.bank.save(file, overwrite=kind != "bank") == file


# -- inputs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(world, tmp_path):
    """Copies of everything, for the command line."""
    made = {name: Path(shutil.copytree(place, tmp_path / name)) for name, place in world.places.items()}
    project_lora(world.fleet[0], SubspaceBasis.from_pretrained(made["basis"])).save_pretrained(tmp_path / "mine")
    made["link"] = tmp_path / "link"
    made["link"].symlink_to(made["basis"], target_is_directory=True)
    return {**made, "mine": tmp_path / "mine"}


# command → what it says; words in capitals are places. None of these may touch anything.
REFUSED = [
    (["build", "LORA", "--out", "LORA"], "from which a basis would be made"),
    (["build", "LORA", "--out", "LORA/basis"], "is inside"),
    (["build", "LORA", "--out", "OTHER"], "holds a basis"),
    (["build", "LORA", "--out", "MODEL"], "holds a model"),
    (["build", "LORA", "--clusters", "1", "--out", "OTHER"], "holds a basis"),
    (["complete", "BASIS", "-k", "9", "--out", "BASIS"], "is the same place"),
    (["complete", "BASIS", "-k", "9", "--out", "LINK"], "is the same place"),
    (["complete", "BASIS", "-k", "9", "--out", "OTHER"], "holds a basis"),
    (["update", "BASIS", "LORA", "--out", "LINK"], "is the same place"),
    (["update", "BASIS", "LORA", "--out", "BUNDLE"], "holds a bundle"),
    (["migrate", "MINE", "--basis", "OTHER", "--out", "PARENT", "--max-drift", "9"], "is the same place"),
    (["project", "LORA", "--basis", "BASIS", "--out", "LORA"], "is the same place"),
    (["project", "LORA", "--basis", "BASIS", "--out", "BUNDLE"], "holds a bundle"),
    (["project", "LORA", "--basis", "BASIS", "--out", "BASIS"], "would still need"),
    (["project", "LORA", "--basis", "BASIS", "--out", "LINK", "--force"], "would still need"),
    (["export-lora", "MINE", "--out", "MINE"], "is the same place"),
    (["export-lora", "MINE", "--out", "LORA"], "may be the result of a training"),
    (["export-lora", "MINE", "--out", "BASIS", "--force"], "would still need"),
    (["bundle", "create", "MINE", "--out", "MINE"], "is the same place"),
    (["bundle", "extract", "BUNDLE", "task", "--out", "EXTRACTED"], "holds a LoRA"),
    (["compress", "LORA", "--basis", "BASIS", "--out", "LORA"], "is the same place"),
    (["compress", "LORA", "--basis", "BASIS", "--out", "BASIS", "--force"], "would still need"),
    (["report", "BASIS", "--out", "OTHER"], "holds a basis"),
    (["report", "BASIS", "--out", "BASIS"], "is the same place"),
]


@pytest.mark.parametrize(("command", "said"), REFUSED, ids=[" ".join(command) for command, _ in REFUSED])
def test_the_command_line_refuses_before_the_work(command, said, places, tmp_path, capsys, monkeypatch):
    shutil.copytree(places["lora"], tmp_path / "extracted" / "task")
    words = {name.upper(): str(place) for name, place in places.items()}
    words |= {"PARENT": str(tmp_path), "EXTRACTED": str(tmp_path / "extracted"), "LORA/basis": words["LORA"] + "/b"}
    before = contents(tmp_path)
    for place in ("subspace_peft.builders.build._build_modules", "subspace_peft.convert.project.Projection.__init__"):
        monkeypatch.setattr(place, lambda *given, **more: pytest.fail("worked before it looked"))
    assert main([words.get(word, word) for word in command]) == 1
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and "overwrite=" not in err
    assert ("--force" in err) == (said != "would still need")
    assert contents(tmp_path) == before


def test_what_a_basis_is_needed_for_is_named_where_it_is_its_own_input(places, capsys):
    config = SubspaceConfig.from_pretrained(str(places["mine"]))
    assert config.basis_fingerprint is not None
    assert main(["complete", str(places["basis"]), "-k", "9", "--out", str(places["basis"])]) == 1
    err = capsys.readouterr().err
    assert (
        "of this machine need" in err and str(places["mine"]) in err and "--force would destroy what is there" in err
    )


def test_relative_names_and_links_are_the_same_place(places, monkeypatch):
    monkeypatch.chdir(places["mine"].parent)
    for out in ("mine", "./mine/../mine"):
        with pytest.raises(OccupiedError, match="is the same place"):
            export_lora(places["mine"], out)


def test_with_force_a_basis_grows_in_place(places, capsys):
    basis = str(places["basis"])
    before = SubspaceBasis.from_pretrained(basis).fingerprint
    with pytest.warns(UserWarning, match="a basis was replaced, and 1 task or bundle of this machine needs") as warned:
        assert main(["complete", basis, "-k", "9", "--out", basis, "--force", "--json"]) == 0
    assert str(places["mine"]) in str(warned[0].message)
    assert SubspaceBasis.from_pretrained(basis).fingerprint != before


def test_the_same_command_again_is_no_reason_to_ask(world, tmp_path, capsys):
    basis, lora = str(world.basis.location), world.fleet[0]
    commands = [
        ["build", *world.fleet, "-k", "3", "--out", str(tmp_path / "built")],
        ["build", *world.fleet, "-k", "3", "--clusters", "1", "--out", str(tmp_path / "clusters")],
        ["update", str(world.root / "other"), world.fleet[4], "--out", str(tmp_path / "updated")],
        ["complete", basis, "-k", "9", "--out", str(tmp_path / "completed")],
        ["project", lora, "--basis", basis, "--out", str(tmp_path / "task")],
        ["export-lora", str(tmp_path / "task"), "--out", str(tmp_path / "export")],
        ["bundle", "create", str(tmp_path / "task"), "--out", str(tmp_path / "bundle")],
        ["bundle", "extract", str(tmp_path / "bundle"), "--all", "--out", str(tmp_path / "extracted")],
        ["compress", lora, "--basis", basis, "--min-energy", "0", "--out", str(tmp_path / "fleet")],
        ["migrate", str(tmp_path / "task"), "--basis", basis, "--out", str(tmp_path / "moved")],
    ]
    for command in commands:
        for _ in range(2):
            assert main([*command, "--json"]) == 0, capsys.readouterr().err


def test_a_basis_that_turns_out_to_be_another_is_not_lost(world, tmp_path, capsys):
    lora = Path(shutil.copytree(world.fleet[0], tmp_path / "lora"))
    command = ["build", str(lora), world.fleet[1], "-k", "3", "--out", str(tmp_path / "basis"), "--quiet"]
    assert main(command) == 0
    before = contents(tmp_path / "basis")
    # the same names, of other bytes: seen when the new basis is there
    shutil.copy(Path(world.fleet[2], "adapter_model.safetensors"), lora)
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "holds a basis" in err and "basis.partial: the same command goes on from them, with --force" in err
    assert contents(tmp_path / "basis") == before and (tmp_path / "basis.partial").is_dir()
    assert main([*command, "--force"]) == 0
    assert contents(tmp_path / "basis") != before and not (tmp_path / "basis.partial").exists()


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_an_export_is_marked_and_its_bytes_are_the_same_each_time(world, tmp_path):
    for name in ("one", "two"):
        export_lora(world.root / "task", tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    file = tmp_path / "one" / "adapter_model.safetensors"
    assert export_mark(file) == world.basis.fingerprint
    with safe_open(file, "pt") as tensors:
        assert tensors.metadata() == {"format": "pt", "subspace_peft": world.basis.fingerprint}
    # trained further by PEFT, it is a training's result
    model = PeftModel.from_pretrained(bert(), tmp_path / "one", is_trainable=True)
    model.save_pretrained(tmp_path / "one")
    with pytest.raises(OccupiedError, match="may be the result of a training"):
        export_lora(world.root / "task", tmp_path / "one")


def test_peft_saves_into_checkpoints_as_before(world, tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    for _ in range(2):
        world.model.save_pretrained(checkpoint)
    save_adapter(world.model, checkpoint)
    world.bank.save_task("task", checkpoint)


@pytest.mark.parametrize("force", [False, True])
def test_a_failed_write_leaves_what_was_there(force, world, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(world.places["task"], tmp_path / "there"))
    before = contents(folder)

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError if force else SubspaceError):
        world.basis.save_pretrained(folder, overwrite=force)
    assert contents(folder) == before


def test_a_readme_of_others_keeps_its_bytes(world, tmp_path):
    own = "Prüfung\n".encode("latin-1")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "README.md").write_bytes(own)
    assert isinstance(world.projection, Projection)
    world.projection.save_pretrained(tmp_path / "task")
    assert own.strip() in (tmp_path / "task" / "README.md").read_bytes()


def test_a_completed_basis_of_the_same_call_is_the_same(world, tmp_path):
    for _ in range(2):
        complete_basis(world.basis, 9, progress=False).save_pretrained(tmp_path / "more")


def test_one_form_of_a_lora_is_not_left_beside_the_other(world, tmp_path):
    folder = Path(shutil.copytree(world.places["lora"], tmp_path / "there"))
    how = {"format": "diffusers", "part": "unet"}
    with pytest.raises(OccupiedError, match="may be the result of a training"):
        export_lora(world.root / "task", folder, **how)
    export_lora(world.root / "task", folder, **how, overwrite=True)
    assert {file.name for file in folder.iterdir()} - {"README.md"} == {"pytorch_lora_weights.safetensors"}
