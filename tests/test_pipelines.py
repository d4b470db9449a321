"""LoRA files of diffusion pipelines: a task per part under its model's own names, and back into the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from subspace_peft import (
    SubspaceBasis,
    SubspaceConfig,
    build_basis,
    compress_fleet,
    export_lora,
    extract_task,
    load_adapter,
    load_task,
    migrate_task,
    project_lora,
)
from subspace_peft.cli import main
from subspace_peft.errors import BasisMismatchError, SubspaceError
from subspace_peft.sources import open_source

from .models import gpt2
from .pipeline_files import (
    CLIP,
    CROSS,
    FILES,
    MODELS,
    NAMES,
    SD,
    SDXL,
    TEXT,
    diffusers_file,
    pipeline,
    run,
    text_encoder,
    text_encoder_2,
    unet,
    wanted,
    write,
)


def assert_computes(part: str, model: nn.Module, parts: tuple[str, ...]) -> None:
    want = wanted(part, parts)
    assert (run(part, MODELS[part]()) - want).abs().max() > 1e-2
    assert (run(part, model) - want).abs().max() < 1e-5, part


class Made:
    """Files of one dialect, a basis of them, and the first one as a task."""

    def __init__(self, root: Path, dialect: str, parts: tuple[str, ...]) -> None:
        self.parts = parts
        self.files = [write(FILES[dialect](parts, seed), root / f"style{seed}.safetensors") for seed in range(2)]
        self.basis = build_basis(self.files, k=8, progress=False, partial=True).save_pretrained(root / "basis")
        self.projection = project_lora(self.files[0], self.basis)
        self.task = self.projection.save_pretrained(root / "task")


@pytest.fixture(scope="module", params=[*FILES])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("pipeline"), request.param, SD)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """With two text encoders whose modules have the same names and shapes."""
    return Made(tmp_path_factory.mktemp("xl"), "diffusers", SDXL)


# -- reading
# ---------------------------------------------------------------------------------------------------------------------


def test_each_part_is_a_task_of_its_own(made):
    assert list(made.projection.parts) == ["unet", "text_encoder"]
    assert all(part.energy_kept > 1 - 1e-6 for part in made.projection.parts.values())
    assert sorted(path.name for path in made.task.iterdir()) == ["text_encoder", "unet"]
    for part in SD:
        config = json.loads((made.task / part / "adapter_config.json").read_text())
        assert set(config["target_modules"]) == set(NAMES[part]) and "basis_names" not in config
    with pytest.raises(SubspaceError, match="unet and text_encoder"):
        made.projection.as_task()
    with pytest.raises(SubspaceError, match="folder per part"):
        migrate_task(made.task, made.basis)
    # PEFT asks for an adapter's method first
    with pytest.raises(SubspaceError, match=r"Name one of them: \S*unet"):
        PeftModel.from_pretrained(MODELS["unet"](), made.task)
    assert main(["inspect", str(made.task)]) == main(["push", str(made.task), "org/task"]) == 1


def test_a_prefix_is_a_part_only_where_the_file_is_a_pipelines(tmp_path):
    names = ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    state = {f"{name}.lora_{side}.weight": torch.randn(4, 4) for name in names for side in "AB"}
    assert set(open_source(state).keys) == set(names) and not open_source(state).parts
    assert not open_source(write(state, tmp_path / "gpt2.safetensors")).parts
    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    assert not open_source(model).parts
    # a model that has a submodule of that name, under PEFT's prefix
    own = {f"base_model.model.unet.{key}": value for key, value in state.items()}
    assert not open_source(own).parts
    flux = {f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.randn(4, 4) for side in "AB"}
    assert open_source(flux).parts == ["transformer"]
    renamed = {key.replace("transformer.", "unet.", 1): value for key, value in flux.items()}
    assert open_source(renamed).parts == ["unet"]


def test_one_part_alone_is_written_into_the_folder_itself(tmp_path):
    files = [write(diffusers_file(("unet",), seed), tmp_path / f"u{seed}.safetensors") for seed in range(2)]
    basis = build_basis(files, k=8, progress=False).save_pretrained(tmp_path / "basis")
    task = project_lora(files[0], basis).save_pretrained(tmp_path / "task")
    assert_computes("unet", PeftModel.from_pretrained(unet(), task), ("unet",))
    injected = unet()
    load_adapter(injected, task, "s")
    assert_computes("unet", injected, ("unet",))
    # a bare file of the model itself, projected on the pipeline's basis, and the other way round
    bare = {key.removeprefix("unet."): value for key, value in diffusers_file(("unet",), 0).items()}
    own = project_lora(bare, basis)
    assert not own.parts and own.as_task().cores.keys() == CROSS.keys()
    bare_basis = build_basis([bare], k=4, progress=False)
    assert project_lora(files[0], bare_basis).energy_kept > 1 - 1e-6


# -- writers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", SD)
def test_what_is_written_computes_what_the_file_does(made, tmp_path, part):
    assert_computes(part, PeftModel.from_pretrained(MODELS[part](), made.task / part), SD)
    assert_computes(part, PeftModel.from_pretrained(MODELS[part](), made.task, subfolder=part), SD)
    injected = MODELS[part]()
    load_adapter(injected, made.task, "s")
    assert_computes(part, injected, SD)
    compress_fleet(made.files, made.basis, tmp_path / "bundle", progress=False)
    loaded = load_task(MODELS[part](), tmp_path / "bundle", "style0")
    assert_computes(part, loaded, SD)
    assert_computes(part, loaded.merge_and_unload(), SD)
    assert_computes(part, load_task(MODELS[part](), tmp_path / "bundle", f"style0.{part}", as_lora=True), SD)
    extract_task(tmp_path / "bundle", "style0", tmp_path / "extracted")
    assert_computes(part, PeftModel.from_pretrained(MODELS[part](), tmp_path / "extracted" / part), SD)
    export_lora(made.task, tmp_path / "lora")
    assert_computes(part, PeftModel.from_pretrained(MODELS[part](), tmp_path / "lora" / part), SD)
    started = MODELS[part]()
    started.add_adapter(SubspaceConfig(basis=str(made.basis), start="style0"), "s")
    assert_computes(part, started, SD)


def test_diffusers_own_loader_of_a_model_takes_both_exports(made, tmp_path):
    export_lora(made.task, tmp_path / "file", format="diffusers")
    export_lora(made.task / "unet", tmp_path / "folder")
    model = unet()
    model.load_lora_adapter(str(tmp_path / "file"), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    assert_computes("unet", model, SD)
    model = unet()
    model.load_lora_adapter(
        str(tmp_path / "folder"),
        prefix="base_model.model",
        weight_name="adapter_model.safetensors",
        use_safetensors=True,
    )
    assert_computes("unet", model, SD)
    # a file that is read again gives the same task
    again = project_lora(tmp_path / "file" / "pytorch_lora_weights.safetensors", made.basis)
    for part, projection in again.parts.items():
        for name, core in projection.cores.items():
            torch.testing.assert_close(core, made.projection.parts[part].cores[name], atol=1e-5, rtol=1e-4)


def test_a_residual_travels_with_its_part(made, tmp_path):
    small = build_basis([made.files[1]], k=2, progress=False).save_pretrained(tmp_path / "small")
    report = compress_fleet([made.files[0]], small, tmp_path / "bundle", residual=8, min_energy=1.0, progress=False)
    assert report.adapters[0].parts == ["style0.unet", "style0.text_encoder"]
    for part in SD:
        assert_computes(part, load_task(MODELS[part](), tmp_path / "bundle", "style0"), SD)


def test_own_directions_travel_with_their_part(made, tmp_path):
    """What a basis of another style lacks goes along: in each part's task, and in both exports of all of them."""
    small = build_basis([made.files[1]], k=2, progress=False).save_pretrained(tmp_path / "small")
    project_lora(made.files[0], small, extra_rank=8).save_pretrained(tmp_path / "task")
    file = export_lora(tmp_path / "task", tmp_path / "file", format="diffusers")
    assert file.rank == 10 and file.energy_kept == 1
    export_lora(tmp_path / "task", tmp_path / "lora")
    for part in SD:
        assert_computes(part, PeftModel.from_pretrained(MODELS[part](), tmp_path / "task" / part), SD)
        assert_computes(part, PeftModel.from_pretrained(MODELS[part](), tmp_path / "lora" / part), SD)
    model = unet()
    model.load_lora_adapter(str(tmp_path / "file"), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    assert_computes("unet", model, SD)


# -- whole pipelines
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [SD, SDXL])
def test_a_pipeline_takes_the_export_of_its_task(tmp_path, parts):
    made = Made(tmp_path, "diffusers", parts)
    assert (
        main(["export-lora", str(made.task), "--format", "diffusers", "--out", str(tmp_path / "export"), "--quiet"])
        == 0
    )
    pipe = pipeline(tmp_path, parts)
    pipe.load_lora_weights(str(tmp_path / "export"), weight_name="pytorch_lora_weights.safetensors")
    for part in parts:
        assert_computes(part, getattr(pipe, part), parts)
    stock = pipeline(tmp_path, parts)
    stock.load_lora_weights(str(made.files[0]))
    for part in parts:
        found, own = run(part, getattr(pipe, part)), run(part, getattr(stock, part))
        torch.testing.assert_close(found, own, atol=1e-5, rtol=0)


def test_one_part_alone_is_exported_for_its_pipeline(made, xl, tmp_path):
    export_lora(made.task / "text_encoder", tmp_path / "one", format="diffusers")
    assert all(key.startswith("text_encoder.text_model.") for key in load_file(next((tmp_path / "one").iterdir())))
    bare = {key.removeprefix("unet."): value for key, value in diffusers_file(("unet",), 0).items()}
    basis = build_basis([bare], k=4, progress=False)
    basis.save_pretrained(tmp_path / "basis")
    project_lora(bare, basis).save_pretrained(tmp_path / "task")
    export_lora(tmp_path / "task", tmp_path / "told", format="diffusers")
    assert all(key.startswith("unet.") for key in load_file(next((tmp_path / "told").iterdir())))
    with pytest.raises(SubspaceError, match="choose one of peft, diffusers"):
        export_lora(tmp_path / "task", tmp_path / "other", format="kohya")


# -- two text encoders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_task_of_one_text_encoder_finds_its_own_part_of_the_basis(xl, tmp_path, part):
    # their names in the basis differ by the part alone
    model = PeftModel.from_pretrained(MODELS[part](), xl.task / part)
    assert_computes(part, model, SDXL)
    model.save_pretrained(tmp_path / "again")
    assert_computes(part, PeftModel.from_pretrained(MODELS[part](), tmp_path / "again"), SDXL)
    injected = MODELS[part]()
    load_adapter(injected, xl.task, "s", subfolder=part)
    assert_computes(part, injected, SDXL)
    compress_fleet(xl.files, xl.basis, tmp_path / "bundle", progress=False)
    assert_computes(part, load_task(MODELS[part](), tmp_path / "bundle", f"style0.{part}"), SDXL)
    moved = SubspaceBasis(dict(SubspaceBasis.from_pretrained(xl.basis)), {"again": 1})
    moved.save_pretrained(tmp_path / "moved")
    migrate_task(xl.task / part, moved).save_pretrained(tmp_path / "migrated")
    assert_computes(part, PeftModel.from_pretrained(MODELS[part](), tmp_path / "migrated"), SDXL)
    stock = MODELS[part]()
    stock.load_adapter(str(xl.task / part))  # transformers' own
    assert_computes(part, stock, SDXL)
    export_lora(xl.task / part, tmp_path / "lora")
    assert_computes(part, PeftModel.from_pretrained(MODELS[part](), tmp_path / "lora"), SDXL)


def test_which_text_encoder_is_meant_is_asked_where_nothing_tells(xl, tmp_path):
    with pytest.raises(BasisMismatchError, match=r"text_encoder and text_encoder_2.*basis_part="):
        text_encoder().add_adapter(SubspaceConfig(basis=str(xl.basis)), "s")
    with pytest.raises(BasisMismatchError, match="no such part"):
        text_encoder().add_adapter(SubspaceConfig(basis=str(xl.basis), basis_part="vae"), "s")
    for part in ("text_encoder", "text_encoder_2"):
        model = MODELS[part]()
        model.add_adapter(SubspaceConfig(basis=str(xl.basis), basis_part=part, start="style0"), "s")
        assert_computes(part, model, SDXL)
    with pytest.raises(SubspaceError, match="text_encoder and text_encoder_2 fit"):
        load_adapter(text_encoder(), xl.task, "s")
    bare = {key.removeprefix("text_encoder_2."): v for key, v in diffusers_file(SDXL, 0).items() if "encoder_2" in key}
    with pytest.raises(BasisMismatchError, match="several modules"):
        project_lora(bare, xl.basis)
    project_lora(bare, xl.basis, part="text_encoder_2").save_pretrained(tmp_path / "task")
    assert_computes("text_encoder_2", PeftModel.from_pretrained(text_encoder_2(), tmp_path / "task"), SDXL)


def test_shapes_tell_text_encoders_apart(tmp_path):
    state = {}
    for part, size in (("text_encoder", 32), ("text_encoder_2", 16)):
        for name in CLIP:
            state |= {f"{part}.{name}.lora_{side}.weight": torch.randn(4, size) for side in "A"}
            state |= {f"{part}.{name}.lora_{side}.weight": torch.randn(size, 4) for side in "B"}
    basis = build_basis([state], k=4, progress=False)
    basis.save_pretrained(tmp_path / "basis")
    config = SubspaceConfig(basis=basis)
    small = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT | {"hidden_size": 16}))
    for size, model in ((32, text_encoder()), (16, small)):
        model.add_adapter(config, "s")
        found = {module.subspace_U["s"].shape[0] for module in model.modules() if hasattr(module, "subspace_U")}
        assert found == {size}


# -- command line
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_line_writes_and_exports_parts(made, tmp_path, capsys):
    out = tmp_path / "task"
    assert main(["project", str(made.files[0]), "--basis", str(made.basis), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"] == ["unet", "text_encoder"]
    assert main(["export-lora", str(out), "--out", str(tmp_path / "lora"), "--quiet"]) == 0
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == ["text_encoder", "unet"]
    assert main(["export-lora", str(out / "unet"), "--out", str(tmp_path / "lora"), "--format", "kohya"]) != 0
