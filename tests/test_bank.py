"""A bank of tasks serves what the tasks' adapters would, row by row, and moves them to files and adapters and back."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from subspace_peft import SubspaceConfig, TaskBank, build_basis
from subspace_peft.errors import BadFileError, BasisMismatchError, SubspaceError

from .models import bert, gpt2, inputs, randomise

KINDS = [
    {},
    {"coefficients": "factor", "r": 3},
    {"coefficients": "diagonal", "mean_gain": "fixed"},
    {"mean_gain": "trainable"},
]


def logits(model, **kwargs):
    with torch.no_grad():
        return model.eval()(inputs(), **kwargs).logits


@pytest.fixture
def folders(kind, bases, tmp_path):
    made = {}
    for i, config in enumerate(KINDS):
        model = randomise(get_peft_model(kind(), SubspaceConfig(basis=bases[kind].location, **config)), seed=i)
        model.save_pretrained(tmp_path / f"task{i}")
        made[f"task{i}"] = tmp_path / f"task{i}"
    return made


@pytest.fixture
def bank(kind, bases, folders):
    made = TaskBank(get_peft_model(kind(), SubspaceConfig(basis=bases[kind].location)).eval(), capacity=2)
    for name, folder in folders.items():
        made.add(name, folder)
    return made


def alone(kind, folder) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(kind(), folder))


def test_every_row_is_its_own_task(kind, bank, folders):
    names = ["task2", "__base__", "task0"]
    expected = [alone(kind, folders["task2"])[0], logits(kind())[1], alone(kind, folders["task0"])[2]]
    with bank.tasks(names):
        given = logits(bank.model)
    for row, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(row, wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(logits(bank.model, adapter_names=names), given)
    assert torch.equal(logits(bank.model), logits(kind()))


def test_adapters_and_bank_mix_in_one_batch(kind, bank, folders):
    randomise(bank.model, seed=9)
    own = logits(bank.model)
    given = logits(bank.model, adapter_names=["default", "task1", "__base__"])
    torch.testing.assert_close(given[0], own[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(given[1], alone(kind, folders["task1"])[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(given[2], logits(kind())[2], atol=1e-5, rtol=1e-4)


def test_tasks_move_between_bank_folder_adapter_and_file(kind, bases, bank, folders, tmp_path):
    bank.save_task("task3", tmp_path / "out")
    torch.testing.assert_close(alone(kind, tmp_path / "out"), alone(kind, folders["task3"]), atol=1e-5, rtol=1e-4)
    bank.load_adapter("task1")
    bank.model.set_adapter("task1")
    torch.testing.assert_close(logits(bank.model), alone(kind, folders["task1"]), atol=1e-5, rtol=1e-4)
    bank.add("copy", bank["task1"])
    bank.remove("task1")
    bank.add("task1")  # the adapter of that name
    for module, core in bank["copy"].items():
        torch.testing.assert_close(bank["task1"][module], core, atol=1e-5, rtol=1e-4)
    file = bank.save(tmp_path / "all.safetensors")
    again = TaskBank(get_peft_model(kind(), SubspaceConfig(basis=bases[kind].location)).eval())
    assert again.load(file) == list(bank)
    for name in bank:
        assert all(torch.equal(again[name][module], core) for module, core in bank[name].items())
    half = bank.save(tmp_path / "half.safetensors", torch.bfloat16)
    again.load(half)
    assert len(again) == len(bank)


def test_slots_are_used_again_and_grow(bank):
    cores = bank["task0"]
    for i in range(20):
        bank.add(f"more{i}", {module: i * core for module, core in cores.items()})
    size = len(bank.rows)
    for i in range(20):
        bank.remove(f"more{i}")
    for i in range(20):
        bank.add(f"other{i}", {module: -i * core for module, core in cores.items()})
    assert len(bank.rows) == size
    assert len(bank) == 24
    module = next(iter(cores))
    assert torch.equal(bank["other7"][module], -7 * cores[module])
    bank.add("other7", cores)
    assert torch.equal(bank["other7"][module], cores[module])
    assert len(bank) == 24


def test_generation_with_beams_and_copies_of_the_model(bases, tmp_path):
    model = get_peft_model(gpt2(), SubspaceConfig(basis=bases[gpt2].location)).eval()
    bank = TaskBank(model)
    folders = {}
    for seed in (1, 2):
        folders[f"t{seed}"] = tmp_path / f"t{seed}"
        randomise(get_peft_model(gpt2(), SubspaceConfig(basis=bases[gpt2].location)), seed=seed).save_pretrained(
            folders[f"t{seed}"]
        )
        bank.add(f"t{seed}", folders[f"t{seed}"])
    how = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    given = model.generate(input_ids=inputs(), adapter_names=["t2", "t1", "t2"], **how)
    single = {name: PeftModel.from_pretrained(gpt2(), folder).eval() for name, folder in folders.items()}
    for i, name in enumerate(["t2", "t1", "t2"]):
        expected = single[name].generate(input_ids=inputs()[i : i + 1], **how)[0]
        assert torch.equal(given[i, : len(expected)], expected)
    twin = copy.deepcopy(model)
    bank.remove("t1")
    twins = logits(twin, adapter_names=["t1"] * 3)
    torch.testing.assert_close(twins, logits(single["t1"]), atol=1e-5, rtol=1e-4)
    with pytest.raises(SubspaceError, match="non-existing"):
        logits(model, adapter_names=["t1"] * 3)


def test_what_a_bank_cannot_hold_is_refused(bases, fleets, tmp_path):
    place = bases[bert].location
    bank = TaskBank(get_peft_model(bert(), SubspaceConfig(basis=place)))
    other = build_basis(fleets[bert][:3], k=6, progress=False)
    other.save_pretrained(tmp_path / "other")

    def saved(name: str, **config: object):
        randomise(get_peft_model(bert(), SubspaceConfig(**config))).save_pretrained(tmp_path / name)
        return tmp_path / name

    cases = [
        (saved("a", basis=str(tmp_path / "other")), BasisMismatchError, other.fingerprint),
        (saved("c", basis=place, target_modules=["query"]), BasisMismatchError, "nothing"),
        (saved("d", basis=place, modules_to_save=["classifier"]), SubspaceError, "classifier"),
    ]
    for folder, error, message in cases:
        with pytest.raises(error, match=message):
            bank.add("x", folder)
    small = TaskBank(get_peft_model(bert(), SubspaceConfig(basis=place, k=3)))
    with pytest.raises(BasisMismatchError, match=r"\(6, 6\) in module .*this bank \(3, 3\)"):
        small.add("x", saved("b", basis=place))
    with pytest.raises(SubspaceError, match="means the base model"):
        bank.add("__base__", saved("e", basis=place))
    bank.add("good", tmp_path / "e")
    with pytest.raises(BadFileError, match="NaN"):
        bank.add("bad", {module: core * float("nan") for module, core in bank["good"].items()})
    assert list(bank) == ["good"]
    with pytest.raises(SubspaceError, match="no task 'nobody'"):
        bank["nobody"]
    with pytest.raises(SubspaceError, match="training mode"), bank.tasks(["good"] * 3):
        pass
    file = bank.save(tmp_path / "bank.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:-8])
    with pytest.raises(BadFileError, match="not a readable bank"):
        bank.load(tmp_path / "torn.safetensors")
    tensors = load_file(file)
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(BadFileError, match="not a readable bank"):
        bank.load(tmp_path / "plain.safetensors")
    elsewhere = TaskBank(get_peft_model(bert(), SubspaceConfig(basis=str(tmp_path / "other"))))
    with pytest.raises(BasisMismatchError, match="another model or basis"):
        elsewhere.load(file)
    with pytest.raises(SubspaceError, match="no subspace adapter 'nope'"):
        TaskBank(bank.model, "nope")
    bank.detach()
    bank.model.eval()
    with pytest.raises(SubspaceError, match="non-existing"):
        logits(bank.model, adapter_names=["good"] * 3)


def classifiers(bases, tmp_path):
    """Three classifier tasks, each with a head of its own, and what each gives alone."""
    folders, alone = {}, {}
    for i in range(3):
        model = randomise(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location, task_type="SEQ_CLS")), i)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data.add_(1.0 + i)
        folders[f"head{i}"] = tmp_path / f"head{i}"
        model.save_pretrained(folders[f"head{i}"])
        alone[f"head{i}"] = logits(model)
    return folders, alone


@pytest.mark.parametrize("first", ["with a head", "without"])
def test_the_remedy_for_tasks_with_heads_is_one(bases, tmp_path, first):
    """The message names a call; after it rows name such tasks beside the bank's, and get their own heads."""
    folders, alone = classifiers(bases, tmp_path)
    if first == "with a head":
        model = PeftModel.from_pretrained(bert(), folders["head0"]).eval()
        alone["default"] = alone["head0"]
    else:
        model = get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location)).eval()
        alone["default"] = logits(bert())
    bank = TaskBank(model)
    for name, folder in folders.items():
        with pytest.raises(SubspaceError, match="classifier whole") as heard:
            bank.add(name, folder)
        call = str(heard.value).split("`")[1]
        eval(call, {"model": model})
    model.eval()
    bank.add("plain", zeros(bank))
    alone["plain"] = alone["__base__"] = logits(bert())
    for names in (["head1", "plain", "head2"], ["default", "head0", "__base__"], ["head2", "head2", "default"]):
        for given in (logits(model, adapter_names=names), within(bank, names)):
            for row, name in enumerate(names):
                torch.testing.assert_close(given[row], alone[name][row], atol=1e-5, rtol=1e-4)


def zeros(bank: TaskBank) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(layer.r[bank.adapter]) for name, layer in bank.layers.items()}


def within(bank: TaskBank, names: list[str]) -> torch.Tensor:
    with bank.tasks(names):
        return logits(bank.model)


def test_a_bank_says_what_it_holds(bases):
    bank = TaskBank(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location)))
    assert repr(bank).startswith("TaskBank(tasks: 0, room for: 64, modules: 4,")
    assert f"basis: {bases[bert].fingerprint[:12]}…" in repr(bank)
    for i in range(5):
        bank.add(f"t{i}", zeros(bank))
    assert "tasks: 5 ('t0', 't1', 't2', …)" in repr(bank)
