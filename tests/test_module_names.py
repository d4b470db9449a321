"""Names of wrappers in an adapter's keys: every reader leaves them out, and what is written fits the plain model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from subspace_peft import (
    SubspaceBasis,
    SubspaceConfig,
    TaskBank,
    build_basis,
    compress_fleet,
    export_lora,
    extract_task,
    hotswap,
    load_adapter,
    load_task,
    migrate_task,
    project_lora,
)
from subspace_peft.basis.module_names import plain_name, plain_names, plain_patterns
from subspace_peft.errors import SourceError
from subspace_peft.sources import open_source

from .models import bert, inputs, randomise

P = "base_model.model."


def per_layer(wrapper: str) -> Callable[[str], str]:
    return lambda key: re.sub(r"layer\.(\d+)\.", rf"layer.\1.{wrapper}.", key)


KINDS: dict[str, Callable[[str], str]] = {
    "compiled": lambda key: "_orig_mod." + key,
    "compiled inside": lambda key: key.replace(P, f"{P}_orig_mod."),
    "compiled layers": per_layer("_orig_mod"),
    "compiled linears": lambda key: key.replace(".lora_", "._orig_mod.lora_"),
    "tuner compiled": lambda key: key.replace(P, "base_model._orig_mod.model."),
    "ddp": lambda key: "module." + key,
    "ddp inside": lambda key: key.replace(P, f"{P}module."),
    "ddp, no peft": lambda key: "module." + key.removeprefix(P),
    "fsdp": lambda key: "_fsdp_wrapped_module." + per_layer("_fsdp_wrapped_module")(key),
    "checkpointing": per_layer("_checkpoint_wrapped_module"),
    "fabric": lambda key: "_forward_module." + key,
    "peft twice": lambda key: P + key,
    "peft three times, wrapped": lambda key: f"{P}module.{P}_orig_mod." + key,
    "all at once": lambda key: "module._orig_mod." + per_layer("_checkpoint_wrapped_module._orig_mod")(P + key),
    "ddp of compiled, no peft": lambda key: "module._orig_mod." + key.removeprefix(P),
    "lightning": lambda key: f"_forward_module.student.{key}",
    "no prefix": lambda key: key.removeprefix(P),
}


def test_the_table_of_names():
    name = f"{P}bert.encoder.layer.0.attention.self.query.lora_A.weight"
    for kind, rename in KINDS.items():
        if kind not in ("ddp inside", "lightning") and "no peft" not in kind:
            assert plain_name(rename(name)) == name.removeprefix(P), kind
        assert plain_names([rename(name)]) == {rename(name): name.removeprefix(P)}, kind
    # names that models have
    for own in (
        "model.module.layers.0",
        "encoder.base_model.layers",
        "transformer.h.0.attn.c_attn",
        "unet.down_blocks.0",
    ):
        assert plain_name(own) == own
    # one that does not begin with it tells a submodule from a wrapper
    assert set(plain_names(["module.a", "head.b"]).values()) == {"module.a", "head.b"}
    # two PeftModels in another module
    both = [f"{each}.{P}layers.0.q_proj" for each in ("actor", "critic")]
    assert list(plain_names(both).values()) == ["actor.layers.0.q_proj", "critic.layers.0.q_proj"]
    assert plain_name(f"llm.{P}model.layers.0.q_proj") == "llm.model.layers.0.q_proj"
    assert plain_names([f"unet.module.{P}down.q", "vae.q"])[f"unet.module.{P}down.q"] == "unet.down.q"
    assert r"^layer\.\d+\.query" in plain_patterns(r"^_orig_mod\.layer\.\d+\._orig_mod\.query")
    assert "layer.0.query" in plain_patterns(f"{P}module.layer.0.query")


# -- adapters
# ---------------------------------------------------------------------------------------------------------------------


def lora(folder: Path, seed: int, rename: Callable[[str], str] = lambda key: key, **config: Any) -> Path:
    """A stock LoRA whose scale differs from module to module, its classifier trained; keys renamed."""
    given = {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["query", "value"],
        "alpha_pattern": {rename(f"{P}bert.encoder.layer.1.attention.self.query").removeprefix(P): 12},
        "modules_to_save": ["classifier"],
        "task_type": "SEQ_CLS",
    }
    model = get_peft_model(bert(), LoraConfig(**{**given, **config}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file({rename(key): value for key, value in load_file(file).items()}, file)
    # the pattern that this model was trained with, whatever it is called in the file
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(inputs()).logits


class Fleet:
    """A clean LoRA, what it computes, and a basis that holds it whole."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clean = lora(root / "clean", 0, alpha_pattern={"layer.1.attention.self.query": 12})
        self.want = logits(PeftModel.from_pretrained(bert(), self.clean))
        others = [lora(root / f"other{i}", 1 + i, alpha_pattern={}) for i in range(2)]
        self.basis = build_basis([self.clean, *others], k=12, progress=False).save_pretrained(root / "basis")
        self.odd = {kind: lora(root / kind, 0, rename) for kind, rename in KINDS.items()}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("names"))


# -- readers
# ---------------------------------------------------------------------------------------------------------------------


def as_folder(folder: Path, scratch: Path) -> Any:
    return folder


def as_pickle(folder: Path, scratch: Path) -> Any:
    torch.save(load_file(folder / "adapter_model.safetensors"), scratch / "adapter_model.bin")
    (scratch / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    return scratch


def as_state_and_config(folder: Path, scratch: Path) -> Any:
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def as_state(folder: Path, scratch: Path) -> Any:
    return load_file(folder / "adapter_model.safetensors")


def as_lone_file(folder: Path, scratch: Path) -> Any:
    save_file(load_file(folder / "adapter_model.safetensors"), scratch / "style.safetensors")
    return scratch / "style.safetensors"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", [as_folder, as_pickle, as_state_and_config, as_state, as_lone_file])
def test_every_reader_gives_the_names_and_updates_of_the_clean_adapter(fleet, tmp_path, reader, kind):
    clean = open_source(fleet.clean)
    found = open_source(reader(fleet.odd[kind], tmp_path), allow_bin=True)
    assert set(found.keys) == set(clean.keys) and not found.parts
    guessed = reader in (as_state, as_lone_file)
    for module in clean.keys:
        scale = clean.scale(module, 4) if guessed else 1.0
        one, other = (source.factors(module) for source in (clean, found))
        torch.testing.assert_close(other.B @ other.A * scale, one.B @ one.A)
    assert {found.plain(key) for key in found.other_keys} == {"classifier.weight", "classifier.bias"}


def test_a_live_model_in_a_wrapper_is_read(fleet):
    clean = open_source(fleet.clean)
    model = PeftModel.from_pretrained(bert(), fleet.clean)
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        source = open_source(wrapped)
        assert set(source.keys) == set(clean.keys)
        assert project_lora(wrapped, fleet.basis).energy_kept > 1 - 1e-6
    assert len(build_basis([nn.DataParallel(model), fleet.root / "other0"], k=8, progress=False)) == 4
    inner = get_peft_model(torch.compile(bert()), LoraConfig(r=4, target_modules=["query"]))
    assert all(name.startswith("bert.encoder") for name in open_source(inner).keys)


class Wrapping(nn.Module):
    """A model that really has a submodule called `module`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


@pytest.mark.parametrize("live", [False, True])
def test_a_submodule_called_module_keeps_working(tmp_path, live):
    x = torch.randn(3, 8)
    model = get_peft_model(Wrapping(), LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    want = model(x)
    model.save_pretrained(tmp_path / "lora")
    source = model if live else tmp_path / "lora"
    basis = build_basis([source], k=2, progress=False)
    basis.save_pretrained(tmp_path / "basis")
    project_lora(source, basis).save_pretrained(tmp_path / "task")
    torch.testing.assert_close(PeftModel.from_pretrained(Wrapping(), tmp_path / "task")(x), want, atol=1e-5, rtol=1e-5)
    if live:
        assert set(basis) == {"module.0", "module.1"}


# -- writers
# ---------------------------------------------------------------------------------------------------------------------


def projected(source: Any, fleet: Fleet, folder: Path) -> nn.Module:
    project_lora(source, fleet.basis).save_pretrained(folder / "task")
    return PeftModel.from_pretrained(bert(), folder / "task")


def compressed(source: Any, fleet: Fleet, folder: Path) -> nn.Module:
    compress_fleet([source], fleet.basis, folder / "bundle", progress=False)
    return load_task(bert(), folder / "bundle", Path(source).name)


def extracted(source: Any, fleet: Fleet, folder: Path) -> nn.Module:
    compress_fleet([source], fleet.basis, folder / "bundle", progress=False)
    extract_task(folder / "bundle", Path(source).name, folder / "task")
    return PeftModel.from_pretrained(bert(), folder / "task")


def built(source: Any, fleet: Fleet, folder: Path) -> nn.Module:
    basis = build_basis([source, fleet.root / "other0"], k=8, progress=False).save_pretrained(folder / "basis")
    project_lora(fleet.clean, basis).save_pretrained(folder / "task")
    return PeftModel.from_pretrained(bert(), folder / "task")


def exported(source: Any, fleet: Fleet, folder: Path) -> nn.Module:
    project_lora(source, fleet.basis).save_pretrained(folder / "task")
    export_lora(folder / "task", folder / "lora")
    return PeftModel.from_pretrained(bert(), folder / "lora")


def migrated(source: Any, fleet: Fleet, folder: Path) -> nn.Module:
    project_lora(source, fleet.basis).save_pretrained(folder / "task")
    wide = SubspaceBasis.from_pretrained(fleet.basis)
    other = SubspaceBasis(dict(wide), {**wide.info, "again": 1})
    other.save_pretrained(folder / "other")
    migrate_task(folder / "task", other).save_pretrained(folder / "moved")
    return PeftModel.from_pretrained(bert(), folder / "moved")


def merged(source: Any, fleet: Fleet, folder: Path) -> nn.Module:
    return projected(source, fleet, folder).merge_and_unload()


WRITERS = [projected, compressed, extracted, built, exported, migrated, merged]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_written_computes_what_the_clean_adapter_does(fleet, tmp_path, writer, kind):
    found = logits(writer(fleet.odd[kind], fleet, tmp_path))
    assert (found - fleet.want).abs().max() < 1e-5


@pytest.mark.parametrize("outer", ["student.", "model.", "lit.model."])
@pytest.mark.parametrize("writer", [each for each in WRITERS if each is not built])
def test_the_name_of_a_model_around_the_adapted_one_is_left_out(fleet, tmp_path, writer, outer):
    # injected, so without PEFT's prefix, as the state dict of a LightningModule has it
    odd = lora(tmp_path / "odd", 0, lambda key: outer + key.removeprefix(P))
    assert (logits(writer(odd, fleet, tmp_path)) - fleet.want).abs().max() < 1e-5


def test_the_name_of_a_head_s_model_stays_where_peft_says_that_it_is_the_models(fleet, tmp_path):
    clean = SubspaceBasis.from_pretrained(fleet.basis)
    backbone = SubspaceBasis({name.removeprefix("bert."): module for name, module in clean.items()}, clean.info)
    backbone.save_pretrained(tmp_path / "backbone")
    project_lora(fleet.clean, backbone).save_pretrained(tmp_path / "task")
    assert (logits(PeftModel.from_pretrained(bert(), tmp_path / "task")) - fleet.want).abs().max() < 1e-5
    export_lora(tmp_path / "task", tmp_path / "lora")
    assert (logits(PeftModel.from_pretrained(bert(), tmp_path / "lora")) - fleet.want).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["compiled", "peft twice"])
def test_load_adapter_and_started_from_a_source(fleet, tmp_path, kind):
    odd = [fleet.odd[kind], lora(tmp_path / "odd1", 1, KINDS[kind])]
    basis = build_basis(odd, k=8, progress=False).save_pretrained(tmp_path / "basis")
    assert all(name.startswith("bert.") for name in SubspaceBasis.from_pretrained(basis))
    config = SubspaceConfig(basis=str(basis), start=kind, task_type="SEQ_CLS", modules_to_save=["classifier"])
    model = get_peft_model(bert(), config)
    model.load_state_dict(
        {key.replace("classifier.", "classifier.modules_to_save.default."): value for key, value in head(fleet)},
        strict=False,
    )
    assert (logits(model) - fleet.want).abs().max() < 1e-5
    plain = lora(tmp_path / "plain", 0, KINDS[kind], modules_to_save=None, task_type=None)
    project_lora(plain, basis).save_pretrained(tmp_path / "task")
    injected = bert()
    load_adapter(injected, tmp_path / "task", "s")
    injected.load_state_dict({key.removeprefix(P): value for key, value in head(fleet)}, strict=False)
    assert (logits(injected) - fleet.want).abs().max() < 1e-5


def head(fleet: Fleet) -> list[tuple[str, torch.Tensor]]:
    state = load_file(fleet.clean / "adapter_model.safetensors")
    return [(key, value) for key, value in state.items() if "lora" not in key]


# -- what earlier versions saved, and live models in wrappers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["compiled", "compiled inside", "compiled layers", "ddp", "peft twice"])
def test_bases_and_tasks_that_were_saved_with_such_names_are_found(fleet, tmp_path, kind):
    clean = SubspaceBasis.from_pretrained(fleet.basis)
    wrapped = {KINDS[kind](P + name).removeprefix(P): module for name, module in clean.items()}
    old = SubspaceBasis(wrapped, clean.info)
    old.save_pretrained(tmp_path / "old")
    project_lora(fleet.clean, old).save_pretrained(tmp_path / "task")
    assert (logits(PeftModel.from_pretrained(bert(), tmp_path / "task")) - fleet.want).abs().max() < 1e-5
    # the task's own names
    config = json.loads((tmp_path / "task" / "adapter_config.json").read_text())
    config["target_modules"] = [KINDS[kind](P + name).removeprefix(P) for name in config["target_modules"]]
    (tmp_path / "task" / "adapter_config.json").write_text(json.dumps(config))
    file = tmp_path / "task" / "adapter_model.safetensors"
    save_file({KINDS[kind](key) if "subspace" in key else key: value for key, value in load_file(file).items()}, file)
    model = PeftModel.from_pretrained(bert(), tmp_path / "task")
    assert (logits(model) - fleet.want).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert (logits(PeftModel.from_pretrained(bert(), tmp_path / "again")) - fleet.want).abs().max() < 1e-5


@pytest.mark.parametrize("save_basis", [False, True])
def test_a_task_of_a_compiled_model_loads_with_and_without_it(fleet, tmp_path, save_basis):
    def compiled() -> nn.Module:
        return torch.compile(bert(), backend="eager")

    model = get_peft_model(compiled(), SubspaceConfig(basis=str(fleet.basis), save_basis=save_basis))
    want = logits(randomise(model))
    model.save_pretrained(tmp_path / "task")
    names = [*load_file(tmp_path / "task" / "adapter_model.safetensors")]
    names += json.loads((tmp_path / "task" / "adapter_config.json").read_text())["target_modules"]
    assert not any("_orig_mod" in name for name in names)
    for base in (bert(), compiled()):
        torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "task")), want)
    # of an adapter in a wrapper, as a task, in a bank, and swapped in
    export_lora(nn.DataParallel(model), tmp_path / "lora")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(bert(), tmp_path / "lora")), want, atol=1e-5, rtol=1e-4
    )
    if not save_basis:
        bank = TaskBank(model)
        bank.add("again", tmp_path / "task")
        hotswap(get_peft_model(compiled(), SubspaceConfig(basis=str(fleet.basis))), tmp_path / "task")


# -- refusals
# ---------------------------------------------------------------------------------------------------------------------


def test_keys_that_are_one_key_without_wrappers_are_named(fleet, tmp_path):
    state = load_file(fleet.clean / "adapter_model.safetensors")
    key = next(key for key in state if "lora_A" in key)
    both = {**state, f"_orig_mod.{key}": state[key] * 2}
    for reference in (both, (both, json.loads((fleet.clean / "adapter_config.json").read_text()))):
        with pytest.raises(SourceError, match=r"_orig_mod.*are both") as caught:
            open_source(reference)
        assert key in str(caught.value)
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(SourceError, match="are both"):
        open_source(tmp_path / "both.safetensors")


@pytest.mark.parametrize("reader", ["kohya", "pipeline"])
def test_state_dicts_of_kohya_and_compiled_kohya_files_are_read(reader):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    A, B = torch.randn(2, 6), torch.randn(8, 2)
    if reader == "kohya":
        stem = "lora_unet__orig_mod_" + name.replace(".", "_")
        state = {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": torch.tensor(1.0)}
    else:
        state = {f"unet._orig_mod.{name}.lora_A.weight": A, f"unet._orig_mod.{name}.lora_B.weight": B}
    source = open_source(state)
    assert list(source.keys) == [f"unet.{name}"] and source.parts == ["unet"]
    scale = 0.5 if reader == "kohya" else 1.0
    update = source.factors(f"unet.{name}")
    torch.testing.assert_close(update.B @ update.A, (scale * B @ A).double(), atol=1e-6, rtol=1e-6)


def test_an_embedding_in_a_lone_file_is_read(tmp_path):
    state = {
        f"_orig_mod.{P}model.embed_tokens.lora_embedding_A": torch.randn(2, 12),
        f"_orig_mod.{P}model.embed_tokens.lora_embedding_B": torch.randn(6, 2),
    }
    save_file(state, tmp_path / "one.safetensors")
    source = open_source(tmp_path / "one.safetensors")
    assert source.shape("model.embed_tokens") == (6, 12, 2) and not source.other_keys


class Reward(nn.Module):
    """A model whose own modules are called as PEFT's wrapper is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base_model = nn.ModuleDict({"model": nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.base_model["model"]
        return inner["down"](inner["up"](x).tanh())


def test_a_model_with_modules_called_base_model_keeps_working(tmp_path):
    x = torch.randn(3, 8)
    lora = get_peft_model(Reward(), LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    basis = build_basis([tmp_path / "lora"], k=2, progress=False)
    basis.save_pretrained(tmp_path / "basis")
    project_lora(tmp_path / "lora", basis).save_pretrained(tmp_path / "task")
    model = PeftModel.from_pretrained(Reward(), tmp_path / "task")
    torch.testing.assert_close(model(x), lora(x), atol=1e-5, rtol=1e-5)
    trained = get_peft_model(Reward(), SubspaceConfig(basis=str(tmp_path / "basis")))
    want = randomise(trained)(x)
    trained.save_pretrained(tmp_path / "trained")
    torch.testing.assert_close(PeftModel.from_pretrained(Reward(), tmp_path / "trained")(x), want)
