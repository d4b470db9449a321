"""Many tasks in one file: every task comes out as it went in, alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

from subspace_peft import (
    SubspaceConfig,
    TaskBank,
    add_tasks,
    build_basis,
    bundle_tasks,
    export_lora,
    extract_task,
    load_task,
    open_bundle,
    project_lora,
)
from subspace_peft.bundle.format import BUNDLE_FILE
from subspace_peft.cli import main
from subspace_peft.errors import BasisMismatchError, SubspaceError

from ..models import bert
from .conftest import KINDS, NAMES, logits, rewrite, save


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


def test_the_index_says_what_is_in_it(bundle, made, bases):
    assert list(bundle) == NAMES and bundle.fingerprint == bases[bert].fingerprint and len(bundle) == len(KINDS)
    assert bundle["task0"].metrics == {"accuracy": 0.91} and bundle["task1"].metrics == {}
    assert bundle["task0"].source["location"] == "task0"
    assert bundle["task3"].id2label == {0: "ham", 1: "spam"} and bundle["task3"].modules_to_save == ["classifier"]
    # three cores of 36 numbers lie in rows; a task's file has hundreds of bytes of header
    assert bundle["task0"].bytes == 4 * 36 * 4 < (made / "task0" / "adapter_model.safetensors").stat().st_size
    assert "load_task" in (Path(bundle.location) / "README.md").read_text()


def test_a_loaded_task_knows_where_it_came_from(bundle, bases):
    model = load_task(bert(), bundle.location, "task0")
    model = load_task(model, bundle.location, "task3", "mine")
    assert model.active_adapters == ["task0"] and set(model.peft_config) == {"task0", "mine"}
    config = model.peft_config["mine"]
    assert config.basis_fingerprint == bases[bert].fingerprint and config.id2label == {0: "ham", 1: "spam"}
    assert config.bundle == {
        "location": bundle.location,
        "revision": None,
        "task": "task3",
        "sha256": bundle["task3"].sha256,
    }
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
    with pytest.raises(
        BasisMismatchError, match=r"'task5' does not fit this bank: module .*value' is in the bank alone"
    ):
        bank.load(file, cores_only=True)
    file = Path(bundle_tasks(folders[:5], tmp_path / "smaller", progress=False).location, BUNDLE_FILE)
    bank.load(file, cores_only=True)
    core = open_bundle(tmp_path / "smaller").read("task4").cores
    for module, value in core.items():  # of the leading three directions
        assert torch.equal(bank["task4"][module][:3, :3], value)
        assert bank["task4"][module].count_nonzero() == value.count_nonzero()


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
