"""Models that a basis's record of its base model's weights tells from one another, and those it takes as the same."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from subspace_peft import SubspaceBasis, SubspaceConfig, build_basis
from subspace_peft.errors import BasisMismatchError

from ..models import bert, train_lora
from .conftest import OTHER, SAME, adapt, changed, noise, wide


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


def test_weights_that_accelerate_keeps_elsewhere_are_compared(recorded):
    from accelerate import cpu_offload

    good, wrong = wide(), wide(1)
    for model in (good, wrong):
        cpu_offload(model, execution_device="cpu")
        assert model.bert.encoder.layer[0].attention.self.query.weight.is_meta
    adapt(good, recorded)
    with pytest.raises(BasisMismatchError, match="another model's weights"):
        adapt(wrong, recorded)


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
