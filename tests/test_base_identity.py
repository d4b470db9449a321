"""The base model by its weights: what is recorded, and which models are told from one another."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from subspace_peft import (
    SubspaceBasis,
    SubspaceConfig,
    TaskBank,
    build_basis,
    complete_basis,
    hotswap,
    record_base_model,
    update_basis,
)
from subspace_peft.basis.base_notes import note_file
from subspace_peft.basis.base_weights import compare, places, read_sample
from subspace_peft.cli.main import main
from subspace_peft.convert import migrate_task
from subspace_peft.errors import BadFileError, BasisMismatchError, SubspaceError
from subspace_peft.report.inspect import inspect_path

from .models import bert, train_lora

SIZES = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def wide(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**SIZES, vocab_size=50)).eval()


@torch.no_grad()
def changed(change: Callable[[torch.Tensor], torch.Tensor], seed: int = 0, what: str = "") -> nn.Module:
    model = wide(seed)
    torch.manual_seed(9)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and what in name:
            parameter.copy_(change(parameter))
    return model


def by_block(weight: torch.Tensor, size: int, levels: int) -> torch.Tensor:
    parts = weight.flatten().view(-1, size)
    scale = parts.abs().amax(1, keepdim=True) / levels
    return ((parts / scale).round() * scale).view_as(weight)


def noise(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda w: w + share * w.std() * torch.randn_like(w)


SAME: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "itself": lambda w: w,
    "float16": lambda w: w.half().float(),
    "bfloat16": lambda w: w.bfloat16().float(),
    "int8 per row": lambda w: by_block(w, 256, 127) if w.numel() % 256 == 0 else w,
    "int8 per tensor": lambda w: by_block(w, w.numel(), 127),
    "fp8": lambda w: (w * 64).to(torch.float8_e4m3fn).float() / 64,
    "4 bits": lambda w: by_block(w, 64, 7),
    "3 bits": lambda w: by_block(w, 64, 3),
}
OTHER = {
    "absolute noise of .05": lambda w: w + 0.05 * torch.randn_like(w),
    "relative noise of .05": noise(0.05),
    "relative noise of .1": noise(0.1),
    "noise of .05 on 4 bits": lambda w: noise(0.05)(by_block(w, 64, 7)),
    "zeros": torch.zeros_like,
    "another sign": torch.neg,
    "rows in another order": lambda w: w.flip(0),
}

PLACES = [[15, 2], [9, 2], [11, 4], [0, 0], [10, 7], [5, 6]]


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("loras")
    return [str(lora(root / f"lora{i}", i)) for i in range(3)]


def lora(folder: Path, seed: int) -> Path:
    import peft

    model = peft.get_peft_model(wide(), peft.LoraConfig(r=2, target_modules=["query", "value"]))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recorded(loras, tmp_path_factory) -> Path:
    """A stored basis that was built with its base model at hand."""
    basis = build_basis(loras, k=4, base_model=wide(), progress=False)
    return basis.save_pretrained(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def plain(loras, tmp_path) -> Path:
    """A stored basis that does not know its base model's weights."""
    return build_basis(loras, k=4, progress=False).save_pretrained(tmp_path / "plain")


def adapt(model: nn.Module, basis: object, **config: object) -> PeftModel:
    place = basis if isinstance(basis, SubspaceBasis) else str(basis)
    return get_peft_model(model, SubspaceConfig(**{"basis": place, "task_type": "SEQ_CLS", **config}))


@pytest.mark.parametrize("name", SAME)
def test_copies_in_other_precisions_pass(recorded, name):
    adapt(changed(SAME[name]), recorded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_passes_without_a_word(recorded, dtype):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weights")
        adapt(wide().to(dtype), recorded)


@pytest.mark.parametrize("name", OTHER)
def test_other_weights_are_refused_before_the_model_is_touched(recorded, name):
    model = changed(OTHER[name])
    with pytest.raises(BasisMismatchError, match=r"not those in the basis's own record.*Farthest: .*query|value"):
        adapt(model, recorded)
    assert not any("base_layer" in key for key in model.state_dict())
    adapt(model, recorded, check_base_model=False)


def test_another_seed_is_another_model_and_one_other_module_is_noticed(recorded):
    with pytest.raises(BasisMismatchError, match="another model's weights"):
        adapt(wide(1), recorded)
    model = wide()
    nn.init.normal_(model.bert.encoder.layer[1].attention.self.value.weight, std=0.02)
    with pytest.raises(BasisMismatchError, match=r"Farthest: bert\.encoder\.layer\.1\.attention\.self\.value \(1\."):
        adapt(model, recorded)


def test_a_light_change_is_said_and_passes(recorded):
    with pytest.warns(UserWarning, match=r"differ from those in the basis's own record.*Relative distance 0\.0"):
        adapt(changed(noise(0.01)), recorded)


def test_weights_say_more_than_names(recorded):
    for own in ("org/the-model", "other/copy-4bit", "/somewhere/else"):
        model = wide()
        model.config._name_or_path = own
        adapt(model, recorded)
        other = wide(1)
        other.config._name_or_path = own
        with pytest.raises(BasisMismatchError, match="another model's weights"):
            adapt(other, recorded)


def test_the_first_training_in_a_basis_in_memory_is_recorded_and_saved_with_it(loras, tmp_path):
    basis = build_basis(loras, k=4, progress=False)
    fingerprint = basis.fingerprint
    assert "base_weights" not in basis.info
    adapt(wide(), basis, save_basis=True)
    assert basis.info["base_weights"]["taken"] == "training"
    with pytest.raises(BasisMismatchError, match="first training"):
        adapt(wide(1), basis, save_basis=True)
    folder = basis.save_pretrained(tmp_path / "basis")
    again = SubspaceBasis.from_pretrained(folder)
    assert again.fingerprint == fingerprint and again.info["base_weights"] == basis.info["base_weights"]
    with pytest.raises(BasisMismatchError, match="first training"):
        adapt(wide(1), folder)


def test_an_adapter_that_is_not_trained_or_not_checked_records_nothing(loras):
    basis = build_basis(loras, k=4, progress=False)
    adapt(wide(1), basis, save_basis=True, inference_mode=True)
    adapt(wide(1), basis, save_basis=True, check_base_model=False)
    assert "base_weights" not in basis.info


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


def test_recording_keeps_the_fingerprint_and_refuses_another_model(plain):
    basis = SubspaceBasis.from_pretrained(plain)
    record_base_model(basis, wide())
    again = SubspaceBasis.from_pretrained(plain)
    assert again == basis and again.info["base_weights"] == basis.info["base_weights"]
    record_base_model(again, wide().bfloat16())
    with pytest.raises(BasisMismatchError, match=r"--force\) replaces"):
        record_base_model(again, wide(1))
    assert record_base_model(again, wide(1), overwrite=True).info["base_weights"] != basis.info["base_weights"]
    adapt(wide(1), plain)


def test_models_without_readable_weights_are_not_recorded(plain):
    basis = SubspaceBasis.from_pretrained(plain)
    with torch.device("meta"):
        bare = BertForSequenceClassification(BertConfig(**SIZES, vocab_size=50))
    with pytest.raises(SubspaceError, match="cannot be read"):
        record_base_model(basis, bare)
    merged = adapt(wide(), plain)
    nn.init.normal_(next(p for n, p in merged.named_parameters() if "subspace_coef" in n))
    merged.merge_adapter()
    with pytest.raises(SubspaceError, match="cannot be read"):
        record_base_model(basis, merged)
    merged.unmerge_adapter()
    record_base_model(basis, merged)
    with pytest.raises(BasisMismatchError, match="None of the basis's"):
        record_base_model(basis, nn.Sequential(nn.Linear(3, 3)))


def test_weights_that_accelerate_keeps_elsewhere_are_compared(recorded):
    from accelerate import cpu_offload

    good, wrong = wide(), wide(1)
    for model in (good, wrong):
        cpu_offload(model, execution_device="cpu")
        assert model.bert.encoder.layer[0].attention.self.query.weight.is_meta
    adapt(good, recorded)
    with pytest.raises(BasisMismatchError, match="another model's weights"):
        adapt(wrong, recorded)


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


@pytest.mark.parametrize("builder", ["adapters", "random", "base-weights"])
def test_every_builder_records_the_model_at_hand_also_one_without_its_head(loras, builder):
    given = {} if builder == "adapters" else {"target_modules": ["query"]}
    bare = wide().bert
    assert type(bare) is BertModel
    sources = loras if builder == "adapters" else None
    basis = build_basis(sources, k=2, builder=builder, base_model=bare, progress=False, **given)
    adapt(wide(), basis, save_basis=True)
    with pytest.raises(BasisMismatchError, match="another model's weights"):
        adapt(wide(1), basis, save_basis=True)


def test_the_command_line_records_and_says_so(plain, tmp_path, capsys):
    assert inspect_path(plain)["base_weights"] == "not recorded yet"
    assert "base weights: not recorded yet" in (plain / "README.md").read_text()
    for seed in (0, 1):
        wide(seed).save_pretrained(tmp_path / f"model{seed}")
    assert main(["record-base", str(plain), "--base-model", str(tmp_path / "model0")]) == 0
    assert "base weights: recorded of 4 modules, float32, of …/model0" in capsys.readouterr().out
    assert "base weights: recorded of 4 modules" in (plain / "README.md").read_text()
    # no path of this machine
    assert str(tmp_path) not in json.dumps(SubspaceBasis.from_pretrained(plain).info["base_weights"])
    assert main(["record-base", str(plain), "--base-model", str(tmp_path / "model1")]) == 1
    assert "another model's weights" in capsys.readouterr().err
    assert main(["record-base", str(plain), "--base-model", str(tmp_path / "model1"), "--force"]) == 0
    adapt(wide(1), plain)


ODD = [
    5,
    {},
    {"format": True},
    {"values": {}},
    {"values": {"a": 5}},
    {"values": {"a": "?"}},
    {"values": {"a": "AAAA"}},
    {"values": {"a": "AACAfw=="}},
    {"values": {"a\n": "AACAPw=="}},
    {"values": {"a": "A" * 5000}},
    {"values": {f"m{i}": "AACAPw==" for i in range(300)}},
    {"rounded": 1},
    {"stored_as": None},
    {"model": 5},
]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_records_are_refused(recorded, tmp_path, odd):
    config = json.loads((recorded / "basis_config.json").read_text())
    record = {**config["base_weights"], **odd} if isinstance(odd, dict) and odd else odd
    (tmp_path / "basis.safetensors").write_bytes((recorded / "basis.safetensors").read_bytes())
    (tmp_path / "basis_config.json").write_text(json.dumps({**config, "base_weights": record}))
    with pytest.raises(BadFileError, match="base_weights"):
        SubspaceBasis.from_pretrained(tmp_path)
    with pytest.raises(SubspaceError, match="base_weights"):
        SubspaceConfig(basis=str(recorded), base_weights=record)


def test_a_record_of_a_newer_format_is_left_alone(recorded, tmp_path):
    config = json.loads((recorded / "basis_config.json").read_text())
    (tmp_path / "basis.safetensors").write_bytes((recorded / "basis.safetensors").read_bytes())
    (tmp_path / "basis_config.json").write_text(json.dumps({**config, "base_weights": {"format": 2, "new": []}}))
    assert inspect_path(tmp_path)["base_weights"] == "not recorded yet"


def test_places_are_the_same_everywhere():
    assert places("model.layers.0.self_attn.q_proj", 16, 8, 6).tolist() == PLACES
    assert torch.equal(places("a", 5, 7, 128)[:16], places("a", 5, 7, 16))


def test_a_records_distance_is_that_of_the_matrices():
    torch.manual_seed(0)
    model, other = wide(), changed(noise(0.2))
    from subspace_peft.tuner.base_weights import BaseWeights

    def layers(m: nn.Module) -> dict[str, nn.Module]:
        return {name: each for name, each in m.named_modules() if isinstance(each, nn.Linear) and "layer" in name}

    samples = [BaseWeights(m, layers(m)).sample("build", 256) for m in (model, other)]
    assert read_sample(json.loads(json.dumps(samples[0].record()))).values.keys() == layers(model).keys()
    assert compare(*samples).distance == pytest.approx(0.2, rel=0.1)
    assert compare(samples[0], copy.deepcopy(samples[0])).distance == 0


def test_the_small_fleets_base_is_told_too(tmp_path):
    folders = [str(train_lora(bert, tmp_path / f"lora{i}", seed=i)) for i in range(2)]
    basis = build_basis(folders, k=2, base_model=bert(), progress=False)
    get_peft_model(bert(), SubspaceConfig(basis=basis, save_basis=True))
    with pytest.raises(BasisMismatchError, match="another model's weights"):
        get_peft_model(bert(seed=1), SubspaceConfig(basis=basis, save_basis=True))


def test_a_random_basis_belongs_to_every_model_of_its_shapes(tmp_path):
    # its bytes, and so its fingerprint, are those of another model's
    for seed in (0, 1):
        random = build_basis(k=2, builder="random", base_model=wide(seed), target_modules=["query"], progress=False)
        random.info.pop("base_weights")
        random.save_pretrained(tmp_path / f"basis{seed}")
        adapt(wide(seed), tmp_path / f"basis{seed}").save_pretrained(tmp_path / f"task{seed}")
        PeftModel.from_pretrained(wide(seed), tmp_path / f"task{seed}")
    assert random.fingerprint == SubspaceBasis.from_pretrained(tmp_path / "basis0").fingerprint
    # a task in it belongs to the weights that it was trained on
    with pytest.raises(BasisMismatchError, match="that the task was trained on"):
        PeftModel.from_pretrained(wide(1), tmp_path / "task0")


@pytest.mark.parametrize("absent", ["model", "taken", "rounded", "stored_as", "values"])
def test_a_record_that_lacks_a_part_is_no_reason_to_crash(recorded, absent):
    stored = SubspaceBasis.from_pretrained(recorded).info["base_weights"]
    record = {name: value for name, value in stored.items() if name != absent}
    assert (read_sample(record) is None) == (absent != "model")
