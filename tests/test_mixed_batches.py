"""A batch in which every row has its own task equals the tasks run one by one."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from subspace_peft import SubspaceConfig, build_basis
from subspace_peft.tuner import SubspaceLayer

from .models import bert, gpt2, randomise

NAMES = ["default", "two", "__base__", "other", "default", "three", "two", "__base__"]


def inputs(rows: int = len(NAMES)) -> torch.Tensor:
    return torch.randint(1, 100, (rows, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(kind, bases, fleets):
    """Four tasks: three kinds of coefficients on one basis, and one on another basis."""
    second = build_basis(fleets[kind][:3], k=4, progress=False)
    made = get_peft_model(kind(), SubspaceConfig(basis=bases[kind], alpha=8.0))
    made.add_adapter("two", SubspaceConfig(basis=bases[kind], alpha=8.0, coefficients="factor", r=3))
    made.add_adapter("three", SubspaceConfig(basis=bases[kind], alpha=8.0, coefficients="diagonal"))
    made.add_adapter("other", SubspaceConfig(basis=second, alpha=8.0, save_basis=True))
    return randomise(made).eval()


def one_by_one(model, x, names):
    rows = []
    for i, name in enumerate(names):
        with torch.no_grad():
            if name == "__base__":
                with model.disable_adapter():
                    rows.append(model(x[i : i + 1]).logits)
            else:
                model.set_adapter(name)
                rows.append(model.eval()(x[i : i + 1]).logits)
    model.set_adapter("default")
    return torch.cat(rows)


@pytest.mark.parametrize(
    "names",
    [NAMES, ["two"] * 8, ["__base__"] * 8, ["other", "two"] * 4, ["default", "__base__"] * 4],
    ids=["all", "one", "base", "two bases", "half base"],
)
def test_a_mixed_batch_equals_the_tasks_one_by_one(model, names):
    with torch.no_grad():
        mixed = model(inputs(), adapter_names=names).logits
    torch.testing.assert_close(mixed, one_by_one(model, inputs(), names), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(model, dtype):
    model = model.to(dtype)
    with torch.no_grad():
        mixed = model(inputs(), adapter_names=NAMES).logits
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, one_by_one(model, inputs(), NAMES), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=str,
)
def test_generation_per_row(bases, how):
    model = get_peft_model(gpt2(), SubspaceConfig(basis=bases[gpt2], alpha=8.0))
    model.add_adapter("two", SubspaceConfig(basis=bases[gpt2], alpha=8.0))
    randomise(model, std=2.0).eval()
    names = ["two", "__base__", "default"]
    common = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False, **how}
    copies = how.get("num_return_sequences", 1)
    torch.manual_seed(0)
    mixed = model.generate(input_ids=inputs(3), adapter_names=names, **common)
    assert len(mixed) == 3 * copies
    if common["do_sample"]:
        return  # other rows draw other numbers; that the rows fit is what is held here
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=inputs(3)[i : i + 1], **common)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=inputs(3)[i : i + 1], **common)
        assert torch.equal(mixed[i * copies : (i + 1) * copies], alone)


@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_decoders(beams):
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, vocab_size=100, decoder_start_token_id=0)
    model = get_peft_model(
        T5ForConditionalGeneration(config), SubspaceConfig(basis="random", k=4, target_modules=["q", "v"], alpha=8.0)
    )
    model.add_adapter("two", SubspaceConfig(basis="random", k=4, target_modules=["q", "v"], alpha=8.0))
    randomise(model, std=2.0).eval()
    names = ["two", "default", "two"]
    common = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
    mixed = model.generate(input_ids=inputs(3), adapter_names=names, **common)
    for i, name in enumerate(names):
        model.set_adapter(name)
        alone = model.generate(input_ids=inputs(3)[i : i + 1], **common)
        assert torch.equal(mixed[i, : alone.shape[1]], alone[0])


def test_modules_to_save_follow_the_rows(bases):
    config = {"basis": bases[bert], "alpha": 8.0, "modules_to_save": ["classifier"]}
    model = get_peft_model(bert(), SubspaceConfig(**config))
    model.add_adapter("two", SubspaceConfig(**config))
    for name, parameter in model.named_parameters():
        if "modules_to_save.two" in name:
            parameter.data.add_(1.0)
    randomise(model).eval()
    with torch.no_grad():
        mixed = model(inputs(2), adapter_names=["two", "default"]).logits
    torch.testing.assert_close(mixed, one_by_one(model, inputs(2), ["two", "default"]), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_mixed_is_said(model):
    with pytest.raises(ValueError, match="training mode"):
        model.train()(inputs(), adapter_names=NAMES)
    model.eval()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        model(inputs(), adapter_names=["nobody"] * 8)
    with pytest.raises(ValueError, match="got 3 and 8"):
        model(inputs(), adapter_names=["two"] * 3)
    with pytest.raises(TypeError, match="list of str"):
        model(inputs(), adapter_names="two")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(inputs(), adapter_names=NAMES)
    model.unmerge_adapter()
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, SubspaceLayer)), (
        "a hook was left behind"
    )


def test_disabled_adapters_stay_disabled(model):
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(
            model(inputs(), adapter_names=NAMES).logits, one_by_one(model, inputs(), ["__base__"] * 8)
        )


def test_the_number_of_products_does_not_grow_with_the_number_of_tasks(bases, monkeypatch):
    """One product with V, one batched with the cores, one with U per layer and forward pass, for 2 tasks or for 12."""
    model = get_peft_model(bert(), SubspaceConfig(basis=bases[bert], alpha=8.0))
    for i in range(11):
        model.add_adapter(f"task{i}", SubspaceConfig(basis=bases[bert], alpha=8.0))
    randomise(model).eval()
    calls = []
    original = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *a, **k: calls.append(1) or original(*a, **k))
    for names in (["default", "task0"] * 6, ["default", *(f"task{i}" for i in range(11))]):
        calls.clear()
        with torch.no_grad():
            model(inputs(12), adapter_names=names)
        assert len(calls) == 4  # the adapted layers
