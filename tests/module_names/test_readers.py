"""Names of wrappers in an adapter's keys: every reader leaves them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from subspace_peft import SubspaceConfig, build_basis, project_lora
from subspace_peft.basis.module_names import plain_name, plain_names, plain_patterns
from subspace_peft.errors import SourceError
from subspace_peft.sources import open_source

from ..models import bert, randomise
from .names import KINDS, P


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
