"""A task's own directions in a bank: its room for them, its files, and the ways to folders, adapters and exports."""

from __future__ import annotations

import json
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from subspace_peft import SubspaceConfig, TaskBank, bundle_tasks
from subspace_peft.bundle.format import BUNDLE_FILE
from subspace_peft.errors import BadFileError, BasisMismatchError, SubspaceError
from subspace_peft.serve import TaskExports
from subspace_peft.tasks import SavedTask, read_task

from .models import bert, inputs, layers
from .test_tuner_identities import TABLE as KINDS_OF_TASKS

FIRST = "bert.encoder.layer.0.attention.self.query"
# name → what the task's configuration has
TASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one": {"extra_rank": 1},
    "two": {"extra_rank": 2, "coefficients": "factor", "r": 2},
    "part": {"extra_rank": 2, "extra_rank_pattern": {"query": 0, "1.attention.self.value": 1}},
    "small": {"extra_rank": 1, "k": 4, "rank_pattern": {"query": 3}},
}


def adapted(basis: Any, **config: Any) -> PeftModel:
    return get_peft_model(bert(), SubspaceConfig(basis=basis, **config)).eval()


def trained(basis: Any, seed: int = 3, **config: Any) -> PeftModel:
    model, generator = adapted(basis, **config), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "subspace_coef" in name:
            std = 0.7 if "extra" in name else 0.1
            parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(inputs(), **kwargs).logits


def close(given: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def place(bases) -> str:
    return bases[bert].location


@pytest.fixture(scope="module")
def saved(place, tmp_path_factory) -> dict[str, Path]:
    """A folder for each task."""
    root = tmp_path_factory.mktemp("tasks")
    for i, (name, config) in enumerate(TASKS.items()):
        trained(place, seed=i, **config).save_pretrained(root / name)
    return {name: root / name for name in TASKS}


@pytest.fixture(scope="module")
def alone(saved) -> dict[str, torch.Tensor]:
    return {name: logits(PeftModel.from_pretrained(bert(), folder)) for name, folder in saved.items()}


@pytest.fixture
def bank(place, saved) -> TaskBank:
    made = TaskBank(adapted(place), extra_rank=2, capacity=2)
    for name, folder in saved.items():
        made.add(name, folder)
    return made


def check(bank: TaskBank, alone: dict[str, torch.Tensor], prefix: str = "") -> None:
    for name, expected in alone.items():
        close(logits(bank.model, adapter_names=[prefix + name] * 3), expected)


# -- the ways in and out ----------------------------------------------------------------------------------------------


def test_tasks_move_between_folder_bank_adapter_and_file(bank, alone, place, tmp_path):
    check(bank, alone)
    for name, expected in alone.items():
        bank.save_task(name, tmp_path / name)
        close(logits(PeftModel.from_pretrained(bert(), tmp_path / name)), expected)
        with warnings.catch_warnings():
            # of a configuration that a task's file gave, nothing has to be said
            warnings.filterwarnings("error", message="SubspaceConfig")
            bank.load_adapter(name)
        bank.model.set_adapter(name)
        close(logits(bank.model), expected)
        bank.add(f"of cores {name}", bank[name], own=bank.own(name))
        bank.add(f"of a task {name}", bank.as_task(name))
        bank.remove(name)
        bank.add(name)  # the adapter of that name
    bank.model.set_adapter("default")
    for prefix in ("", "of cores ", "of a task "):
        check(bank, alone, prefix)
    file = bank.save(tmp_path / "bank.safetensors")
    again = TaskBank(adapted(place), extra_rank=3)
    assert again.load(file) == list(bank)
    check(again, alone)
    for name in bank:
        for module, pair in bank.own(name).items():
            assert all(torch.equal(*sides) for sides in zip(again.own(name)[module], pair, strict=True))


def test_a_task_without_own_directions_leaves_as_earlier_versions_wrote_it(bank, saved, tmp_path):
    bank.save_task("plain", tmp_path / "plain")
    keys = load_file(tmp_path / "plain" / "adapter_model.safetensors").keys()
    assert keys == load_file(saved["plain"] / "adapter_model.safetensors").keys()
    assert "extra_rank" not in json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert bank.own("plain") == {}


def test_numbers_of_own_directions_are_those_of_the_task(bank, tmp_path):
    expected = {"plain": [0, 0, 0, 0], "one": [1, 1, 1, 1], "two": [2, 2, 2, 2], "part": [0, 2, 0, 1]}
    for name, ranks in expected.items():
        config = bank.as_task(name).config
        assert [config.sizes.extra_of(module, {"out": 32, "in": 32}) for module in bank.layers] == ranks
        given = bank.own(name)
        assert [len(given[module][1]) if module in given else 0 for module in bank.layers] == ranks
    assert "room for own directions: 2" in repr(bank)
    assert {module: tuple(core.shape) for module, core in bank["small"].items()} == bank.layout.cores


def test_the_adapter_trains_on_from_where_the_task_was(bank, alone):
    """Both sides of every direction get gradients, those of a task that had no effect yet too."""
    fresh = bank.as_task("two")
    for B, _ in fresh.own.values():
        B.zero_()
    bank.add("fresh", fresh)
    for name in ("two", "fresh"):
        bank.load_adapter(name)
        bank.model.set_adapter(name)
        logits_of = bank.model.train()(inputs()).logits
        logits_of.square().sum().backward()
        layer = bank.layers[FIRST].subspace_coef[name]
        assert layer.extra_rank == 2
        assert layer.extra_U.grad.abs().max() > 0
        assert (layer.extra_V.grad.abs().max() > 0) == (name == "two")  # as at a start


# -- the room ---------------------------------------------------------------------------------------------------------


def test_the_room_is_the_adapters_by_module_unless_it_is_said(place, saved):
    like = TaskBank(adapted(place, **TASKS["part"]))
    assert [like.layout.own.get(module, (0,))[0] for module in like.layers] == [0, 2, 0, 1]
    like.add("part", saved["part"])
    with pytest.raises(BasisMismatchError, match=r"has 1 own direction in module .*query.*room for 0"):
        like.add("one", saved["one"])
    none = TaskBank(adapted(place, **TASKS["two"]), extra_rank=0)
    assert none.layout.width == none.layout.core_width
    none.add("plain", saved["plain"])
    every = TaskBank(adapted(place), extra_rank=50)
    assert {rank for rank, _, _ in every.layout.own.values()} == {32}, "no more than fit"
    assert TaskBank(adapted(place)).rows.shape == none.rows.shape


def test_more_own_directions_than_room_are_refused_with_a_remedy_that_is_one(place, saved, alone):
    bank = TaskBank(adapted(place), extra_rank=1)
    bank.add("one", saved["one"])
    before = bank["one"], bank.own("one")
    with pytest.raises(BasisMismatchError, match=r"'one' has 2 own directions .*room for 1") as heard:
        bank.add("one", saved["two"])
    assert torch.equal(bank["one"][FIRST], before[0][FIRST])
    assert torch.equal(bank.own("one")[FIRST][0], before[1][FIRST][0])
    call = str(heard.value).split("`")[1]
    wider = eval(call, {"TaskBank": TaskBank, "model": bank.model})
    wider.add("two", saved["two"])
    close(logits(bank.model, adapter_names=["two"] * 3), alone["two"])


def test_the_room_that_is_asked_for_is_enough_for_all_modules_and_tasks(bank, place, saved, alone, tmp_path):
    # the first module in which there is no room is not the one that needs most, nor is the first task of a file
    extra = {"extra_rank": 1, "extra_rank_pattern": {"1.attention.self.value": 3}}
    trained(place, seed=9, **extra).save_pretrained(tmp_path / "uneven")
    with pytest.raises(BasisMismatchError, match=r"has 3 own directions in module .*value.*room for 0") as heard:
        TaskBank(adapted(place)).add("uneven", tmp_path / "uneven")
    wider = eval(str(heard.value).split("`")[1], {"TaskBank": TaskBank, "model": adapted(place)})
    wider.add("uneven", tmp_path / "uneven")
    file = bank.save(tmp_path / "bank.safetensors")
    with pytest.raises(BasisMismatchError, match=r"'two' has 2 own .*cores_only=True.*load_task") as heard:
        TaskBank(adapted(place)).load(file)
    wider = eval(str(heard.value).split("`")[1], {"TaskBank": TaskBank, "model": adapted(place)})
    wider.load(file)
    check(wider, alone)


@pytest.mark.parametrize("kind", ["folder", "adapter", "task"])
def test_the_projection_that_is_named_where_room_lacks_is_a_remedy(place, saved, kind):
    model = adapted(place)
    model.load_adapter(saved["two"], "two")
    bank = TaskBank(model, "default")
    given = {"folder": saved["two"], "adapter": None, "task": read_task(saved["two"])}[kind]
    with pytest.raises(BasisMismatchError, match=r"'two' has 2 own directions .*projection on the basis") as heard:
        bank.add("two", given)
    if kind == "task":
        assert "`without_own()`" in str(heard.value)
        projection = given.without_own()
    else:
        projection = eval(str(heard.value).split("`")[3], {"read_task": read_task, "model": model})
    bank.add("projection", projection)
    wanted = read_task(saved["two"]).without_own().cores[FIRST]
    torch.testing.assert_close(bank["projection"][FIRST], wanted.float(), atol=1e-5, rtol=1e-4)


def test_directions_without_effect_need_no_room(bank, place):
    task = bank.as_task("two")
    for B, _ in task.own.values():
        B[:, 1] = 0
    narrow = TaskBank(adapted(place), extra_rank=1)
    narrow.add("two", task)
    close(logits(narrow.model, adapter_names=["two"] * 3), logits(with_task(bank, task), adapter_names=["x"] * 3))
    assert all(len(A) == 1 for _, A in narrow.own("two").values())


def with_task(bank: TaskBank, task: SavedTask) -> PeftModel:
    bank.add("x", task)
    return bank.model


def test_rows_that_are_used_again_are_clean(bank, saved, alone):
    bank.remove("two")
    bank.add("plain again", saved["plain"])
    assert bank.own("plain again") == {}
    bank.add("one", saved["plain"])
    assert bank.own("one") == {}
    close(logits(bank.model, adapter_names=["one"] * 3), alone["plain"])


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "wrong sizes": ({"own": {FIRST: (torch.ones(32, 1), torch.ones(1, 31))}}, BasisMismatchError, "32 × 32"),
    "sides that differ": ({"own": {FIRST: (torch.ones(32, 2), torch.ones(1, 32))}}, BasisMismatchError, "give"),
    "vectors": ({"own": {FIRST: (torch.ones(32), torch.ones(32))}}, BasisMismatchError, "give"),
    "another module": ({"own": {"nope": (torch.ones(32, 1), torch.ones(1, 32))}}, BasisMismatchError, "no core"),
    "NaN": ({"own": {FIRST: (torch.full((32, 1), torch.nan), torch.ones(1, 32))}}, BadFileError, "NaN"),
    "too many": ({"own": {FIRST: (torch.ones(32, 3), torch.ones(3, 32))}}, BasisMismatchError, "extra_rank=3"),
}


@pytest.mark.parametrize("case", BAD)
def test_own_directions_that_do_not_fit_are_refused(bank, case):
    how, error, message = BAD[case]
    names = list(bank)
    with pytest.raises(error, match=message):
        bank.add("new", bank["plain"], **how)
    assert list(bank) == names


def test_arguments_that_mean_nothing_are_refused(bank, saved, place):
    for task in (saved["one"], None):
        with pytest.raises(SubspaceError, match="own= belongs to cores"):
            bank.add("default", task, own=bank.own("one"))
    for extra_rank in (-1, 1.5, True, "2"):
        with pytest.raises(SubspaceError, match="extra_rank="):
            TaskBank(bank.model, extra_rank=extra_rank)
    with pytest.raises(SubspaceError, match="no task 'nope'"):
        bank.own("nope")
    larger = TaskBank(adapted(place, k=4))
    with pytest.raises(BasisMismatchError, match=r"\(6, 6\)"):
        larger.add("plain", saved["plain"])
    with pytest.raises(BasisMismatchError, match=r"\(3, 3\)"):  # cores do not tell which basis they are of
        bank.add("x", {module: core[:3, :3] for module, core in bank["plain"].items()})


# -- files ------------------------------------------------------------------------------------------------------------


def header(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def index_of(file: Path) -> dict[str, Any]:
    return json.loads(header(file)["__metadata__"]["bank"])


def rewrite(file: Path, change: Any) -> None:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + length])
    index = json.loads(head["__metadata__"]["bank"])
    change(index)
    head["__metadata__"]["bank"] = json.dumps(index)
    text = json.dumps(head).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_only_files_with_own_directions_have_the_newer_format(bank, place, saved, alone, tmp_path):
    assert index_of(bank.save(tmp_path / "with.safetensors"))["format_version"] == 2
    assert header(tmp_path / "with.safetensors")["own"]["shape"][0] == 4, "of those that have any"
    for name in ("one", "two", "part", "small"):
        bank.remove(name)
    file = bank.save(tmp_path / "without.safetensors")
    assert index_of(file)["format_version"] == 1
    assert header(file).keys() == {"__metadata__", "cores"}
    old = TaskBank(adapted(place))
    old.load(file)
    check(old, {"plain": alone["plain"]})


def test_a_file_goes_into_a_bank_with_other_room(bank, place, alone, tmp_path):
    file = bank.save(tmp_path / "bank.safetensors")
    narrow = TaskBank(adapted(place), extra_rank=1)
    with pytest.raises(BasisMismatchError, match=r"'two' has 2 own directions .*room for 1"):
        narrow.load(file)
    assert len(narrow) == 0
    assert narrow.load(file, cores_only=True) == list(bank)
    check(narrow, {name: alone[name] for name in ("plain", "one", "small")})
    assert narrow.own("two") == {}
    half = bank.save(tmp_path / "half.safetensors", torch.bfloat16)
    bank.load(half)
    assert bank.own("two").keys() == narrow.layers.keys()


@pytest.mark.parametrize(("coefficients", "gain"), KINDS_OF_TASKS)
@pytest.mark.parametrize("packed", [False, True], ids=["bank", "bundle"])
def test_a_bank_without_room_holds_the_projection_of_the_whole_task(place, coefficients, gain, packed, tmp_path):
    """Its row's ΔW is ``U Uᵀ (s U C V + s' u v) Vᵀ V``, whatever the coefficients."""
    config = {"coefficients": coefficients, "mean_gain": gain, **({"r": 2} if coefficients == "factor" else {})}
    model = trained(place, extra_rank=2, extra_rank_pattern={"1.attention.self.value": 1}, **config)
    model.save_pretrained(tmp_path / "task")
    if packed:
        file = Path(bundle_tasks([tmp_path / "task"], tmp_path / "bundle", progress=False).location, BUNDLE_FILE)
    else:
        wide = TaskBank(model)
        wide.add("task", tmp_path / "task")
        file = wide.save(tmp_path / "bank.safetensors")
    narrow = TaskBank(adapted(place), extra_rank=0)
    with pytest.raises(BasisMismatchError, match="room for 0"):
        narrow.load(file)
    narrow.load(file, cores_only=True)
    cores = read_task(tmp_path / "task").without_own().cores
    for layer in layers(model):
        U, V = (getattr(layer, f"subspace_{side}")["default"].double() for side in "UV")
        whole, own = layer.get_delta_weight("default").double(), layer.own_part("default")
        core = narrow["task"][layer.key].double()
        torch.testing.assert_close(U @ core @ V, U @ (U.T @ whole @ V.T) @ V, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(core, cores[layer.key], atol=1e-5, rtol=1e-4)
        # own directions have a part in the basis, so the core alone is another
        assert (U.T @ own[0].double() @ own[1].double() @ V.T).abs().max() > 1e-2
    assert narrow.own("task") == {}


BROKEN: dict[str, tuple[Any, str]] = {
    "newer": (lambda index: index.update(format_version=3), "format version 3, and this reads 1 and 2"),
    "no format": (lambda index: index.update(format_version=True), "format version True"),
    "older with own": (lambda index: index.update(format_version=1), "format version 1, which does not go with"),
    "none": (lambda index: index.pop("own"), "format version 2, which does not go with"),
    "no mapping": (lambda index: index.update(own=[]), "no tasks with own"),
    "other tasks": (lambda index: index["own"].update(tasks=["nope"]), "other tasks"),
    "twice": (lambda index: index["own"]["tasks"].append("one"), "other tasks"),
    "other modules": (lambda index: index["own"]["modules"].update(nope=[1, 32, 32]), "other modules"),
    "no sizes": (lambda index: index["own"]["modules"].update({FIRST: [1, 32]}), "no sizes"),
    "negative": (lambda index: index["own"]["modules"].update({FIRST: [-1, 32, 32]}), "no sizes"),
    "another width": (lambda index: index["own"]["modules"].update({FIRST: [1, 32, 32]}), "its index says"),
    "swapped": (lambda index: index["own"]["modules"].update({FIRST: [2, 33, 31]}), "32 × 32"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_were_altered_are_refused(bank, place, case, tmp_path):
    file = bank.save(tmp_path / "bank.safetensors")
    change, message = BROKEN[case]
    rewrite(file, change)
    for room, cores_only in ((2, False), (2, True), (0, True)):
        fresh = TaskBank(adapted(place), extra_rank=room)
        with pytest.raises(SubspaceError, match=message):
            fresh.load(file, cores_only=cores_only)
        assert len(fresh) == 0
    if case == "swapped":
        with pytest.raises(BasisMismatchError, match="32 × 32"):
            TaskExports(file, cache=tmp_path / "cache").find("two")


def test_values_that_are_not_finite_are_refused(bank, place, tmp_path):
    bank.rows[bank.slots["two"], -1] = torch.inf
    file = bank.save(tmp_path / "bank.safetensors")
    with pytest.raises(BadFileError, match="NaN or infinite"):
        TaskBank(adapted(place), extra_rank=2).load(file)
    exports = TaskExports(file, cache=tmp_path / "cache")
    with pytest.raises(BadFileError, match="NaN or infinite"):
        exports.find("two")
    assert exports.find("one") is not None


def test_exports_of_a_bank_have_them(bank, alone, tmp_path):
    exports = TaskExports(bank.save(tmp_path / "bank.safetensors"), cache=tmp_path / "cache")
    for name, expected in alone.items():
        made = PeftModel.from_pretrained(bert(), exports.find(name))
        assert type(made.peft_config["default"]) is LoraConfig
        close(logits(made), expected)


def test_a_bundles_tasks_come_with_theirs(saved, place, alone, tmp_path):
    order = ["one", "plain", "two", "part"]
    bundle = bundle_tasks([saved[name] for name in order], tmp_path / "bundle", progress=False)
    file = Path(bundle.location, BUNDLE_FILE)
    bank = TaskBank(adapted(place), extra_rank=2)
    assert sorted(bank.load(file)) == sorted(order)
    check(bank, {name: alone[name] for name in order})
    with pytest.raises(BasisMismatchError, match="room for 0"):
        TaskBank(adapted(place)).load(file)
    for damage in (
        lambda index: index["entries"].pop("one"),
        lambda index: index["entries"]["one"].update(modules={FIRST: 3}),
        lambda index: index["entries"]["one"].update(modules={name: [6, 5] for name in bank.layers}),
        lambda index: index.update(apart=["one", "two", "part", "more"]),
    ):
        altered = tmp_path / "altered.safetensors"
        altered.write_bytes(file.read_bytes())
        rewrite(altered, damage)
        with pytest.raises(BadFileError, match=r"not a readable bank|another size than the index"):
            TaskBank(adapted(place), extra_rank=2).load(altered)
    plain = TaskBank(adapted(place))
    plain.load(file, cores_only=True)
    assert torch.equal(plain["plain"][FIRST], bank["plain"][FIRST])
    assert read_task(plain.model, adapter_name="default").own == {}
