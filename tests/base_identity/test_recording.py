"""When the base model's weights are recorded with a basis: in builds, in the first training, by command."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from subspace_peft import SubspaceBasis, build_basis, record_base_model
from subspace_peft.cli.main import main
from subspace_peft.errors import BasisMismatchError, SubspaceError
from subspace_peft.report.inspect import inspect_path

from .conftest import SIZES, adapt, wide


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
