"""Adapters from before transformers renamed a model's modules: function = function, wherever they are read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftMixedModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import subspace_peft
from subspace_peft import (
    SubspaceBasis,
    SubspaceConfig,
    TaskBank,
    build_basis,
    bundle_tasks,
    compress_fleet,
    export_lora,
    hotswap,
    load_task,
    project_lora,
    read_task,
)
from tests.models import needs_transformers_adapters

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
ENDS = ("q_proj", "v_proj", "attn.qkv", "mlp.down_proj", "fc1", "fc2")


def qwen() -> nn.Module:
    rope = {"type": "mrope", "mrope_section": [2, 1, 1], "rope_type": "default"}
    text = {**TEXT, **TOKENS, "num_key_value_heads": 4, "rope_scaling": rope}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [1]})
    return Qwen2_5_VLForConditionalGeneration(config)


def llava() -> nn.Module:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    return LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(**TEXT, **TOKENS), vision_config=vision))


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8))


RENAMES: dict[Callable[[], nn.Module], list[tuple[str, str]]] = {
    qwen: [("model.language_model.", "model."), ("model.visual.", "visual.")],
    llava: [("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower.vision_model.")],
    vit: [
        ("vit.layers.", "vit.encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.v_proj", "attention.attention.value"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ],
}


def made(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def earlier(make: Callable[[], nn.Module], name: str) -> str:
    for now, before in RENAMES[make]:
        name = name.replace(now, before)
    return name


def outputs(model: Any) -> torch.Tensor:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        if "ViT" in type(getattr(base, "model", base)).__name__ or "ViT" in type(base).__name__:
            pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
            return model(pixel_values=pixels).logits
        return model(input_ids=torch.arange(3, 15).view(2, 6)).logits


@dataclass
class Case:
    """A fleet of two LoRAs under earlier names, what each computes, and a basis that holds both exactly."""

    make: Callable[[], nn.Module]
    folder: Path
    fleet: list[str]
    wanted: list[torch.Tensor]
    modules: int
    basis: str
    task: str  # the first, projected
    other: str  # the second, projected
    trained: str  # the first, as an adapter that was made on the model

    def model(self) -> Any:
        return made(self.make)

    def holds(self, model: Any, number: int = 0) -> None:
        off = float((outputs(model.eval()) - self.wanted[number]).abs().max())
        far = float((outputs(self.model()) - self.wanted[number]).abs().max())
        assert off < 1e-5 < 1e-2 < far


@pytest.fixture(scope="module", params=RENAMES, ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    make = request.param
    folder = tmp_path_factory.mktemp(make.__name__)
    linear = {name: layer for name, layer in made(make).named_modules() if isinstance(layer, nn.Linear)}
    sizes = {name: tuple(layer.weight.shape) for name, layer in linear.items() if name.endswith(ENDS)}
    fleet, wanted = [], []
    for seed in (1, 2):
        generator, tensors, model = torch.Generator().manual_seed(seed), {}, made(make)
        for name, (out, inner) in sizes.items():
            A, B = (torch.randn(*shape, generator=generator) * 0.2 for shape in ((3, inner), (out, 3)))
            key = f"base_model.model.{earlier(make, name)}"
            tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
            model.get_submodule(name).weight.data += 2 * B @ A
        lora = folder / f"lora{seed}"
        lora.mkdir()
        save_file(tensors, lora / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = sorted({key.split(".lora_")[0].rsplit(".", 1)[-1] for key in tensors})
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": targets}
        (lora / "adapter_config.json").write_text(json.dumps(config))
        fleet.append(str(lora))
        wanted.append(outputs(model))
    basis = str(build_basis(fleet, k=6, progress=False, keep_cores=True).save_pretrained(folder / "basis"))
    for number, lora in enumerate(fleet):
        project_lora(lora, basis).save_pretrained(folder / f"task{number}")
    model = get_peft_model(made(make), SubspaceConfig(basis=basis, start="lora1", strict=True))
    model.save_pretrained(folder / "trained")
    task, other, trained = (str(folder / name) for name in ("task0", "task1", "trained"))
    return Case(make, folder, fleet, wanted, len(sizes), basis, task, other, trained)


def test_all_modules_of_the_basis_are_adapted_and_nothing_is_said(case: Case) -> None:
    config = SubspaceConfig(basis=case.basis, start="lora1")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*of the basis's")
        model = get_peft_model(case.model(), config)
    assert sum("subspace_coef" in name for name, _ in model.named_parameters()) == case.modules
    case.holds(model)
    names = config.basis_names
    assert names and all(earlier(case.make, name) == own for name, own in names.items())
    # by the names that the model has now
    assert set(names) <= {name for name, _ in case.model().named_modules()}


LOADERS: dict[str, Callable[[Any, str], Any]] = {
    "peft": lambda model, task: PeftModel.from_pretrained(model, task),
    "ours": lambda model, task: (subspace_peft.load_adapter(model, task), model)[1],
    "mixed": lambda model, task: PeftMixedModel.from_pretrained(model, task),
    "transformers": lambda model, task: (model.load_adapter(task), model)[1],
}


@pytest.fixture(scope="module")
def sized(case: Case) -> tuple[str, torch.Tensor]:
    """The first LoRA in fewer directions of the basis, with own directions in some modules; and what it computes."""
    small = case.folder / "small"
    SubspaceBasis.from_pretrained(case.basis).truncate(2).save_pretrained(small)
    projection = project_lora(case.fleet[0], str(small), extra_budget=200)
    assert 0 < len(projection.own_directions) < case.modules or len(set(projection.own_directions.values())) > 1
    folder = projection.save_pretrained(case.folder / "sized")
    task, model = read_task(folder), made(case.make)
    now = {earlier(case.make, name): name for name, _ in model.named_modules()}
    for name, core in task.cores.items():
        delta = task.modules[name].U.double() @ core @ task.modules[name].V.double()
        if name in task.own:
            delta = delta + task.own[name][0] @ task.own[name][1]
        model.get_submodule(now[name]).weight.data += delta.float()
    return str(folder), outputs(model)


def test_patterns_name_modules_by_what_they_were_called(case: Case, sized: tuple[str, torch.Tensor]) -> None:
    task, wanted = sized
    model = PeftModel.from_pretrained(case.model(), task).eval()
    torch.testing.assert_close(outputs(model), wanted, atol=1e-5, rtol=1e-4)
    hotswap(model, task)
    torch.testing.assert_close(outputs(model), wanted, atol=1e-5, rtol=1e-4)
    again = model.save_pretrained(case.folder / "again") or case.folder / "again"
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(case.model(), again).eval()), wanted)


@pytest.mark.parametrize("which", ["task", "trained"])
@pytest.mark.parametrize(
    "loader",
    [pytest.param(name, marks=needs_transformers_adapters if name == "transformers" else ()) for name in LOADERS],
)
def test_a_task_is_loaded(case: Case, loader: str, which: str) -> None:
    case.holds(LOADERS[loader](case.model(), getattr(case, which)))


def test_a_loaded_task_is_saved_under_the_names_of_the_model(case: Case, tmp_path: Path) -> None:
    PeftModel.from_pretrained(case.model(), case.task).save_pretrained(tmp_path)
    now = {name for name, _ in case.model().named_modules()}
    for key in load_file(tmp_path / "adapter_model.safetensors"):
        assert key.removeprefix("base_model.model.").split(".subspace_coef")[0] in now
    case.holds(PeftModel.from_pretrained(case.model(), tmp_path))


def test_a_task_that_carries_its_basis(case: Case, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(case.model(), case.task)
    model.peft_config["default"].save_basis = True
    model.save_pretrained(tmp_path)
    case.holds(PeftModel.from_pretrained(case.model(), tmp_path))


@pytest.mark.parametrize("first", ["task", "trained"])
def test_banks_and_swaps_take_tasks_under_either_name(case: Case, first: str, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(case.model(), getattr(case, first)).eval()
    bank = TaskBank(model)
    for name in ("task", "trained", "other"):
        bank.add(name, getattr(case, name))
    for name, number in (("task", 0), ("trained", 0), ("other", 1)):
        with bank.tasks([name, name]):
            assert torch.allclose(outputs(model), case.wanted[number], atol=1e-5)
    bank.save(tmp_path / "bank.safetensors")
    again = TaskBank(model)
    again.load(tmp_path / "bank.safetensors")
    with again.tasks(["other", "other"]):
        assert torch.allclose(outputs(model), case.wanted[1], atol=1e-5)
    bank.save_task("other", tmp_path / "other")
    case.holds(PeftModel.from_pretrained(case.model(), tmp_path / "other"), 1)
    for name, number in (("other", 1), ("trained", 0), ("task", 0)):
        hotswap(model, getattr(case, name))
        case.holds(model, number)


def test_bundles(case: Case, tmp_path: Path) -> None:
    compress_fleet(case.fleet, case.basis, tmp_path / "fleet")
    case.holds(load_task(case.model(), tmp_path / "fleet", "lora1"))
    bundle_tasks([case.task, case.trained, case.other], tmp_path / "tasks")
    for name, number in (("task0", 0), ("trained", 0), ("task1", 1)):
        case.holds(load_task(case.model(), tmp_path / "tasks", name), number)
    model = PeftModel.from_pretrained(case.model(), case.trained).eval()
    bank = TaskBank(model)
    bank.load(tmp_path / "fleet" / "bundle.safetensors")
    with bank.tasks(["lora2", "lora2"]):
        assert torch.allclose(outputs(model), case.wanted[1], atol=1e-5)


@pytest.mark.parametrize("which", ["task", "trained"])
def test_a_loaded_task_is_exported_as_a_lora_that_stock_peft_loads(case: Case, which: str, tmp_path: Path) -> None:
    export_lora(PeftModel.from_pretrained(case.model(), getattr(case, which)), tmp_path)
    case.holds(PeftModel.from_pretrained(case.model(), tmp_path))


@pytest.mark.parametrize("which", ["task", "trained"])
def test_a_saved_task_is_exported_under_the_names_of_a_model_that_is_given(
    case: Case, which: str, tmp_path: Path
) -> None:
    export_lora(getattr(case, which), tmp_path, model=case.model())
    case.holds(PeftModel.from_pretrained(case.model(), tmp_path))


def test_a_lora_and_a_basis_from_either_side_of_the_renaming(case: Case, tmp_path: Path) -> None:
    if case.make is llava:
        pytest.skip("the names in its vision tower come from two tables, one inside the other")
    # a LoRA trained today, projected onto the earlier basis
    export_lora(case.trained, tmp_path / "lora")
    projection = project_lora(tmp_path / "lora", case.basis)
    assert projection.energy_kept == pytest.approx(1)
    projection.save_pretrained(tmp_path / "task")
    case.holds(PeftModel.from_pretrained(case.model(), tmp_path / "task"))
    # an earlier LoRA, projected onto a basis of today's names
    basis = build_basis([str(tmp_path / "lora")], k=3, progress=False).save_pretrained(tmp_path / "basis")
    projection = project_lora(case.fleet[0], SubspaceBasis.from_pretrained(basis))
    assert projection.energy_kept == pytest.approx(1)
    projection.save_pretrained(tmp_path / "earlier")
    case.holds(PeftModel.from_pretrained(case.model(), tmp_path / "earlier"))
