"""What is written from an adapter with names of wrappers in its keys fits the plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

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

from ..models import bert
from .names import KINDS, Fleet, P, logits, lora


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
