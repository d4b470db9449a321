"""Many tasks in one file: every task comes out as it went in, alone; appending leaves the rest; bad files are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftMixedModel, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

import subspace_peft._atomic as atomic
from subspace_peft import (
    SubspaceConfig,
    TaskBank,
    add_tasks,
    build_basis,
    bundle_tasks,
    export_lora,
    extract_task,
    extract_tasks,
    load_task,
    open_bundle,
    project_lora,
)
from subspace_peft.bundle.layout import BUNDLE_FILE, check_name
from subspace_peft.cli import main
from subspace_peft.errors import BadFileError, BasisMismatchError, SubspaceError

from .conftest import bert, inputs, randomise

KINDS = [
    {},
    {"coefficients": "factor", "r": 3},
    {"mean_gain": "fixed", "alpha": 100.0},
    {"modules_to_save": ["classifier"], "id2label": {0: "ham", 1: "spam"}},
    {"k": 3},
    {"target_modules": ["query"], "coefficients": "diagonal"},
]
NAMES = [f"task{i}" for i in range(len(KINDS))]


def logits(model, **kwargs):
    with torch.no_grad():
        return model.eval()(inputs(), **kwargs).logits


def save(make, folder: Path, basis: str, seed: int = 0, **config: object) -> Path:
    model = randomise(get_peft_model(make(), SubspaceConfig(basis=basis, **config)), seed=seed)
    if "modules_to_save" in config:
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save["default"].weight.normal_(
                generator=torch.Generator().manual_seed(seed)
            )
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folders(bases, tmp_path):
    return [save(bert, tmp_path / name, bases[bert].location, i, **KINDS[i]) for i, name in enumerate(NAMES)]


@pytest.fixture
def bundle(folders, tmp_path):
    metrics = {"task0": {"accuracy": 0.91}}
    return bundle_tasks(folders, tmp_path / "bundle", metrics=metrics, progress=False)


def rewrite(folder: Path, change) -> None:
    """Change a bundle's header in place, data as it is."""
    file = folder / BUNDLE_FILE
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    index = json.loads(header["__metadata__"]["bank"])
    change(header, index)
    header["__metadata__"]["bank"] = json.dumps(index)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


# -- in and out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_every_task_comes_out_as_it_went_in(number, bundle, folders, tmp_path):
    expected = logits(PeftModel.from_pretrained(bert(), folders[number]))
    name = NAMES[number]
    assert not torch.allclose(expected, logits(bert()), atol=1e-4)
    loaded = load_task(bert(), bundle.location, name)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(load_task(bert(), bundle, name, as_lora=True)), expected, atol=1e-5, rtol=1e-4)
    out = extract_task(bundle, name, tmp_path / "out")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bert(), out)), expected, atol=1e-5, rtol=1e-4)
    assert "import subspace_peft" in (out / "README.md").read_text()
    lora = extract_task(bundle, name, tmp_path / "lora", as_lora=True)
    assert json.loads((lora / "adapter_config.json").read_text())["peft_type"] == "LORA"
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bert(), lora)), expected, atol=1e-5, rtol=1e-4)
    # and in again: the same bytes
    again = bundle_tasks({name: out}, tmp_path / "again", progress=False)
    for module, core in bundle.read(name).cores.items():
        torch.testing.assert_close(again.read(name).cores[module], core, atol=1e-7, rtol=1e-6)


def test_cores_of_a_usual_size_and_trained_modules_survive_to_the_bit(fleets, tmp_path):
    build_basis(fleets[bert], k=16, progress=False).save_pretrained(tmp_path / "basis")
    task = save(bert, tmp_path / "task", str(tmp_path / "basis"), modules_to_save=["classifier"])
    made = bundle_tasks([task], tmp_path / "bundle", progress=False)
    out = load_file(extract_task(made, "task", tmp_path / "out") / "adapter_model.safetensors")
    before = load_file(task / "adapter_model.safetensors")
    assert out.keys() == before.keys() and all(torch.equal(out[key], value) for key, value in before.items())


def test_the_index_says_what_is_in_it(bundle, folders, bases):
    assert list(bundle) == NAMES and bundle.fingerprint == bases[bert].fingerprint and len(bundle) == len(KINDS)
    assert bundle["task0"].metrics == {"accuracy": 0.91} and bundle["task1"].metrics == {}
    assert bundle["task0"].source["location"] == str(folders[0])
    assert bundle["task3"].id2label == {0: "ham", 1: "spam"} and bundle["task3"].modules_to_save == ["classifier"]
    # three cores of 36 numbers lie in rows; a task's file has hundreds of bytes of header
    assert bundle["task0"].bytes == 4 * 36 * 4 < (folders[0] / "adapter_model.safetensors").stat().st_size
    assert "load_task" in (Path(bundle.location) / "README.md").read_text()


def test_a_loaded_task_knows_where_it_came_from(bundle, bases):
    model = load_task(bert(), bundle.location, "task0")
    model = load_task(model, bundle.location, "task3", "mine")
    assert model.active_adapters == ["task0"] and set(model.peft_config) == {"task0", "mine"}
    config = model.peft_config["mine"]
    assert config.basis_fingerprint == bases[bert].fingerprint and config.id2label == {0: "ham", 1: "spam"}
    assert config.bundle == {
        "location": bundle.location, "revision": None, "task": "task3", "sha256": bundle["task3"].sha256,
    }  # fmt: skip
    assert not any(p.requires_grad for p in model.parameters() if p.shape == (6, 6))
    trained = load_task(bert(), bundle, "task0", is_trainable=True)
    assert [p for n, p in trained.named_parameters() if "subspace_coef" in n and p.requires_grad]


def test_reading_one_task_reads_no_other(bundle, monkeypatch):
    asked = []
    read = type(bundle.store).read
    monkeypatch.setattr(type(bundle.store), "read", lambda self, a, b: (asked.append((a, b)), read(self, a, b))[1])
    for name in ("task1", "task3"):
        bundle.read(name)
    assert asked == [bundle.span("task1"), bundle.span("task3")]


def test_names_banks_models_projections_and_mappings(bundle, folders, fleets, bases, tmp_path):
    model = PeftModel.from_pretrained(bert(), folders[0], adapter_name="one")
    model.load_adapter(folders[1], "two")
    made = bundle_tasks([model, project_lora(fleets[bert][0], bases[bert])], tmp_path / "a", progress=False)
    assert list(made) == ["one", "two", "lora0"]
    bank = TaskBank(model)
    bank.add("three", folders[2])
    again = bundle_tasks(bank, tmp_path / "b", progress=False)
    torch.testing.assert_close(
        logits(load_task(bert(), again, "three")),
        logits(PeftModel.from_pretrained(bert(), folders[2])),
        atol=1e-5,
        rtol=1e-4,
    )
    assert list(bundle_tasks({"x": folders[0], "y z": folders[0]}, tmp_path / "c", progress=False)) == ["x", "y z"]
    dotted = bundle_tasks({"v1.2": folders[0]}, tmp_path / "d", progress=False)
    assert load_task(bert(), dotted, "v1.2").active_adapters == ["v1_2"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, folders, tmp_path):
    made = bundle_tasks(folders, tmp_path / "bundle", dtype=dtype, progress=False)
    assert made["task0"].bytes == 4 * 36 * dtype.itemsize and not made.verify()
    added = add_tasks(made, {"more": folders[0]}, progress=False)
    assert added["more"].bytes == made["task0"].bytes
    expected = logits(PeftModel.from_pretrained(bert(), folders[3]))
    torch.testing.assert_close(logits(load_task(bert(), added, "task3")), expected, atol=0.1, rtol=0.1)
    # safetensors' own reader takes it, misaligned as nothing is
    with safe_open(Path(added.location, BUNDLE_FILE), framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            assert torch.isfinite(tensors.get_tensor(key).double()).all()
    assert all(
        piece.start % torch.empty(0, dtype=dtype).element_size() == 0
        for key, piece in added.pieces.items()
        if "pad" not in key
    )


# -- the bank ---------------------------------------------------------------------------------------------------------


def test_a_bundle_loads_straight_into_a_bank(folders, bases, tmp_path):
    bundle_tasks(folders[:3], tmp_path / "plain", progress=False)
    bank = TaskBank(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location)).eval())
    assert bank.load(tmp_path / "plain" / BUNDLE_FILE) == NAMES[:3]
    given = logits(bank.model, adapter_names=["task2", "__base__", "task1"])
    for row, number in ((0, 2), (2, 1)):
        expected = logits(PeftModel.from_pretrained(bert(), folders[number]))[row]
        torch.testing.assert_close(given[row], expected, atol=1e-5, rtol=1e-4)


def test_a_bank_says_what_it_does_not_hold(folders, bases, tmp_path):
    file = Path(bundle_tasks(folders[:4], tmp_path / "heads", progress=False).location, BUNDLE_FILE)
    bank = TaskBank(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location)).eval())
    with pytest.raises(SubspaceError, match=r"'task3', have trained modules.*cores_only"):
        bank.load(file)
    assert len(bank) == 0
    assert bank.load(file, cores_only=True) == NAMES[:4]
    core = open_bundle(tmp_path / "heads").read("task3").cores
    assert all(torch.equal(bank["task3"][module], value) for module, value in core.items())
    file = Path(bundle_tasks(folders, tmp_path / "all", progress=False).location, BUNDLE_FILE)
    with pytest.raises(BasisMismatchError, match="'task4' has other modules"):
        bank.load(file, cores_only=True)


def test_a_bank_puts_modules_into_its_own_order(folders, bases, tmp_path):
    made = bundle_tasks(folders[:2], tmp_path / "bundle", progress=False)

    def turn(header, index):
        # as a writer with another order of modules would have it: the first module last
        first, *rest = index["modules"]
        index["modules"] = {name: index["modules"][name] for name in [*rest, first]}

    file = Path(made.location, BUNDLE_FILE)
    expected = made.read("task0").cores
    data = bytearray(file.read_bytes())
    for name in ("task0", "task1"):
        start, end = made.span(name)
        data[start:end] = data[start + 144 : end] + data[start : start + 144]
    file.write_bytes(bytes(data))
    rewrite(Path(made.location), turn)
    bank = TaskBank(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location)).eval())
    bank.load(file)
    assert all(torch.equal(bank["task0"][module], core) for module, core in expected.items())


# -- appending --------------------------------------------------------------------------------------------------------


def test_appending_leaves_what_is_there_to_the_byte(bundle, folders, tmp_path):
    before = {name: bundle.raw(name) for name in bundle}
    entries = {name: bundle.entry(name) for name in bundle}
    more = save(bert, tmp_path / "more", bundle.index["config"]["basis"], 7)
    head = save(bert, tmp_path / "head", bundle.index["config"]["basis"], 8, modules_to_save=["classifier"])
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
    with pytest.raises(BadFileError, match="replaced it meanwhile"):
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
    program = "import sys; from subspace_peft import add_tasks; add_tasks(sys.argv[1], {sys.argv[2]: sys.argv[3]}, progress=False)"
    started = [
        subprocess.Popen([sys.executable, "-c", program, bundle.location, name, str(folders[0])])
        for name in ("left", "right")
    ]
    assert [each.wait() for each in started] == [0, 0]
    assert {"left", "right", *NAMES} == set(open_bundle(bundle.location))


# -- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "..", ".", "", "/etc", "a\\b", "C:x", ".hidden", "x\0y", "__base__", "a" * 201, " x", 7]
)
def test_names_that_are_no_folders_are_refused_both_ways(name, bundle, folders, tmp_path):
    with pytest.raises(SubspaceError, match="cannot be a task's name"):
        bundle_tasks({name: folders[0]}, tmp_path / "no", progress=False)
    assert not (tmp_path / "no").exists()

    def put(header, index):
        index["tasks"][0] = name
        index["entries"][name] = index["entries"].pop("task0")

    rewrite(Path(bundle.location), put)
    with pytest.raises(BadFileError, match=r"cannot be a task's name|KeyError"):
        extract_tasks(bundle.location, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert check_name("billing v2") == "billing v2"


def claim(key, value):
    return lambda header, index: header["cores"].__setitem__(key, value)


DAMAGE = {
    "terabytes of cores": (claim("shape", [10**9, 144]), "claims"),
    "terabytes that add up": (
        lambda header, index: header["cores"].update(shape=[10**9, 144], data_offsets=[0, 4 * 144 * 10**9]), "claims",
    ),
    "negative sizes": (claim("shape", [-1, -144]), "whole numbers"),
    "overflowing offsets": (claim("data_offsets", [0, 2**70]), "claims"),
    "another dtype": (claim("dtype", "F8_E4M3"), "F8_E4M3"),
    "too few rows": (lambda header, index: index["tasks"].pop(), "cores has shape"),
    "a name twice": (lambda header, index: index["tasks"].__setitem__(1, "task0"), "one name"),
    "no entry": (lambda header, index: index["entries"].pop("task1"), "task1"),
    "no hash": (lambda header, index: index["entries"]["task1"].pop("sha256"), "sha256"),
    "no basis": (lambda header, index: index.pop("basis_fingerprint"), "basis_fingerprint"),
    "negative modules": (
        lambda header, index: index["modules"].update({name: [-6, -6] for name in index["modules"]}), "sizes",
    ),
    "other modules": (lambda header, index: index["modules"].popitem(), "cores has shape"),
    "a core too short": (lambda header, index: header["0/core"].update(shape=[35], data_offsets=[0, 140]), "core of shape"),
    "a newer format": (lambda header, index: index.update(format_version=2), "format version 2"),
    "modules of a task": (lambda header, index: index["entries"]["task4"].update(modules=7), "AttributeError|TypeError"),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_headers_that_lie_are_refused_before_anything_is_allocated(how, bundle):
    change, message = DAMAGE[how]
    rewrite(Path(bundle.location), change)
    with pytest.raises(BadFileError, match=message):
        open_bundle(bundle.location)


@pytest.mark.parametrize("how", ["length", "half a header", "half the data", "no bundle", "a bank", "empty"])
def test_files_that_are_no_bundles(how, bundle, folders, bases, tmp_path):
    file = Path(bundle.location) / BUNDLE_FILE
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    if how == "a bank":
        TaskBank(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location))).save(file)
    else:
        given = {
            "length": (10**12).to_bytes(8, "little") + data[8:], "half a header": data[: header // 2], "empty": b"",
            "half the data": data[: (header + len(data)) // 2], "no bundle": (folders[0] / "adapter_model.safetensors").read_bytes(),
        }  # fmt: skip
        file.write_bytes(given[how])
    with pytest.raises(BadFileError, match=r"bundle|bank"):
        open_bundle(bundle.location)


def test_a_damaged_task_is_refused_and_the_others_are_read(bundle):
    file = Path(bundle.location) / BUNDLE_FILE
    for name in ("task2", "task3"):
        data = bytearray(file.read_bytes())
        data[bundle.span(name)[1] - 1] ^= 1
        file.write_bytes(bytes(data))
    found = open_bundle(bundle.location)
    model = load_task(bert(), found, "task0")
    for name in ("task2", "task3"):
        with pytest.raises(BadFileError, match=f"'{name}' has sha256"):
            load_task(model, found, name)
    assert set(found.verify()) == {"task2", "task3"} and list(model.peft_config) == ["task0"]
    assert main(["bundle", "ls", bundle.location, "--verify"]) == 1


def test_what_cannot_be_packed(folders, fleets, bases, tmp_path, bundle):
    build_basis(fleets[bert][:3], k=4, progress=False).save_pretrained(tmp_path / "other")
    stranger = save(bert, tmp_path / "stranger", str(tmp_path / "other"))
    own = save(bert, tmp_path / "own", bases[bert].location, save_basis=True)
    memory = build_basis(fleets[bert][:3], k=5, progress=False)
    (tmp_path / "twin").mkdir()
    twin = save(bert, tmp_path / "twin" / "task0", bases[bert].location)
    nan = {module: core * float("nan") for module, core in project_lora(fleets[bert][0], bases[bert]).cores.items()}
    projection = project_lora(fleets[bert][0], bases[bert])
    projection.cores.update(nan)
    cases = [
        ([], "at least one task"),
        ([folders[0], stranger], "'stranger' is on the basis"),
        ([folders[0], twin], "Two tasks are called 'task0'"),
        ([own], "carries its basis"),
        ([project_lora(fleets[bert][0], memory)], "has to be stored"),
        ([fleets[bert][0]], "not SUBSPACE"),
        ([tmp_path / "nowhere"], "nowhere"),
        ([bert()], "got Bert"),
        ([projection], "NaN"),
        ({"x": bundle}, "got Bundle"),
    ]
    for tasks, message in cases:
        with pytest.raises(SubspaceError, match=message):
            bundle_tasks(tasks, tmp_path / "no", progress=False)
    with pytest.raises(SubspaceError, match="none of the tasks' names"):
        bundle_tasks([folders[0]], tmp_path / "no", metrics={"nobody": {}}, progress=False)
    with pytest.raises(SubspaceError, match="no JSON"):
        bundle_tasks([folders[0]], tmp_path / "no", metrics={"task0": {"loss": float("nan")}}, progress=False)
    with pytest.raises(SubspaceError, match="stored as floats"):
        bundle_tasks([folders[0]], tmp_path / "no", dtype=torch.int8, progress=False)
    assert not (tmp_path / "no").exists()
    # said where its basis is, a self-contained task can be packed, too
    made = bundle_tasks([own], tmp_path / "yes", basis=bases[bert].location, progress=False)
    expected = logits(PeftModel.from_pretrained(bert(), own))
    torch.testing.assert_close(logits(load_task(bert(), made, "own")), expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_loaded(bundle, fleets, bases, tmp_path):
    with pytest.raises(SubspaceError, match=r"no task 'nobody'.*task0"):
        load_task(bert(), bundle.location, "nobody")
    with pytest.raises(SubspaceError, match="no bundle"):
        load_task(bert(), tmp_path, "task0")
    model = load_task(bert(), bundle, "task0")
    with pytest.raises(SubspaceError, match="'task0' already"):
        load_task(model, bundle, "task0")
    lora = PeftModel.from_pretrained(bert(), fleets[bert][0])
    with pytest.raises(SubspaceError, match=r"LORA.*as_lora=True"):
        load_task(lora, bundle, "task0")
    load_task(lora, bundle, "task0", as_lora=True)
    mixed = PeftMixedModel.from_pretrained(bert(), fleets[bert][0])
    assert set(load_task(mixed, bundle, "task0").peft_config) == {"default", "task0"}
    other = build_basis(fleets[bert][:3], k=4, progress=False)
    with pytest.raises(BasisMismatchError, match=bases[bert].fingerprint):
        load_task(bert(), bundle, "task0", basis=other)
    copy = bases[bert].save_pretrained(tmp_path / "copy")
    assert load_task(bert(), bundle, "task0", basis=copy).peft_config["task0"].basis == str(copy)
    with pytest.raises(SubspaceError, match="is a file"):
        extract_task(bundle, "task0", Path(bundle.location) / BUNDLE_FILE)


def test_the_command_line(folders, tmp_path, capsys):
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps({"task0": {"metrics": {"accuracy": 0.9}, "id2label": {"0": "no", "1": "yes"}}}))
    out = str(tmp_path / "made")
    given = [str(folder) for folder in folders]
    assert main(["bundle", "create", *given[:4], "--out", out, "--facts", str(facts), "--quiet"]) == 0
    assert main(["bundle", "add", out, *given[4:], "--quiet"]) == 0
    capsys.readouterr()
    assert main(["bundle", "ls", out]) == 0
    listed = capsys.readouterr().out
    assert "6 tasks" in listed and "accuracy 0.9" in listed and "no, yes" in listed and "with classifier" in listed
    assert main(["bundle", "ls", out, "--json", "--verify"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["tasks"]) == set(NAMES) and facts["tasks"]["task0"]["metrics"] == {"accuracy": 0.9}
    assert main(["bundle", "extract", out, "task1", "task3", "--out", str(tmp_path / "x"), "--quiet"]) == 0
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"task1", "task3"}
    export_lora(str(tmp_path / "x" / "task1"), tmp_path / "lora")
    capsys.readouterr()
    for wrong, says in (
        (["bundle", "extract", out, "--out", "y"], "--all"),
        (["bundle", "extract", out, "../x", "--out", str(tmp_path / "y")], "no task '../x'"),
        (["bundle", "add", out, given[0]], "--replace"),
        (["bundle", "ls", str(tmp_path / "nowhere")], "no bundle"),
        (["bundle", "create", given[0], "--out", out, "--facts", given[0]], "JSON"),
    ):
        assert main(wrong) == 1 and says in capsys.readouterr().err
    assert not (tmp_path / "y").exists()
