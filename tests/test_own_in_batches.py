"""Rows of a mixed batch whose tasks have directions of their own equal these tasks alone, live and in a bank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from subspace_peft import SubspaceConfig, TaskBank
from subspace_peft.tasks import read_task

from .models import TARGETS as LORA_TARGETS
from .models import bert, gpt2, layers
from .threads.served import MODELS

# a task per kind of coefficients, with as many own directions, more, fewer or none
TASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {"extra_rank": 3},
    "factor": {"coefficients": "factor", "r": 2, "extra_rank": 1},
    "diagonal": {"coefficients": "diagonal", "extra_rank": 2, "extra_rank_pattern": {"lin": 0, "conv": 3}},
    "only": {"extra_rank_pattern": {"embed": 2, "flat": 1}},
}


class Scaled(nn.Embedding):
    """As some decoders have it: what is looked up is multiplied."""

    embed_scale = 3.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale


class Every(nn.Module):
    """Every kind of layer that is adapted: embeddings, convolutions, linear layers and a `Conv1D`."""

    def __init__(self, **conv: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = Scaled(50, 36)
        self.conv = nn.Conv2d(4, 8, **{"kernel_size": 3, "stride": 2, "padding": 1, **conv})
        self.point = nn.Conv2d(8, 6, 1)
        self.lin = nn.Linear(6, 5)
        self.flat = Conv1D(4, 5)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).view(len(ids), 4, 6, 6)
        x = torch.tanh(self.point(torch.tanh(self.conv(x)))).flatten(2).transpose(1, 2)
        return self.head(torch.tanh(self.flat(torch.tanh(self.lin(x)))).amax(1))


TARGETS = ["embed", "conv", "point", "lin", "flat", "head"]
CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"kernel_size": 2, "stride": 1, "padding": "same"},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"padding_mode": "reflect"},
    {"padding_mode": "circular", "stride": 1, "dilation": 2, "padding": 2},
    {"padding_mode": "replicate", "padding": "same", "stride": 1},
]
NAMES = ["wide", "__base__", "plain", "only", "factor", "wide", "diagonal"]
IDS = torch.randint(0, 50, (len(NAMES), 4), generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, ids: torch.Tensor = IDS, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids, **kwargs)


def filled(model: nn.Module) -> nn.Module:
    """Random coefficients and own directions, as if trained, of about the same effect."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "subspace_coef" in name:
            std = 0.5 if "extra" in name else 0.02
            parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(conv: dict[str, Any] | None = None, **config: Any) -> PeftModel:
    """A model with all tasks as adapters, on one basis, and one on another."""
    basis = {"basis": "random", "k": 4, "target_modules": TARGETS, "save_basis": True, **config}
    model = None
    for name, given in TASKS.items():
        made = SubspaceConfig(**basis, **given)
        if model is None:
            model = get_peft_model(Every(**(conv or {})), made, adapter_name=name)
        else:
            model.add_adapter(name, made)
    model.add_adapter("elsewhere", SubspaceConfig(**{**basis, "k": 3, "seed": 5}, extra_rank=1))
    return filled(model)


def alone(model: PeftModel, ids: torch.Tensor, names: list[str]) -> torch.Tensor:
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(outputs(model, ids[i : i + 1]))
        else:
            model.set_adapter(name)
            rows.append(outputs(model, ids[i : i + 1]))
    model.set_adapter("plain")
    return torch.cat(rows)


def banked(model: PeftModel, adapter: str = "plain", **how: Any) -> TaskBank:
    """A bank of the tasks, called by capital letters."""
    bank = TaskBank(model, adapter, **{"extra_rank": 3, **how})
    for name in TASKS:
        bank.add(name.upper(), read_task(model, adapter_name=name))
    return bank


HOLDS = {"live": str, "bank": str.upper, "both": lambda name: name.upper() if name in ("wide", "only") else name}


@pytest.mark.parametrize("holds", HOLDS)
@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_a_row_is_its_task_alone(conv, holds):
    model = adapted(conv)
    expected = alone(model, IDS, NAMES)
    banked(model)
    names = [name if name == "__base__" else HOLDS[holds](name) for name in NAMES]
    torch.testing.assert_close(outputs(model, adapter_names=names), expected, atol=1e-4, rtol=1e-4)
    base = outputs(Every(**conv))
    assert [bool((row - other).abs().max() > 1e-2) for row, other in zip(expected, base, strict=True)] == [
        name != "__base__" for name in NAMES
    ]


@pytest.mark.parametrize("alpha", [256.0, 100.0])
def test_tasks_of_all_kinds_of_layers_become_adapters_again(alpha):
    model = adapted(alpha=alpha)
    bank = banked(model)
    for name in TASKS:
        expected = alone(model, IDS, [name] * len(IDS))
        bank.load_adapter(name.upper())
        for layer in layers(model):
            assert layer.extra_rank[name.upper()] == layer.extra_rank[name]
        torch.testing.assert_close(alone(model, IDS, [name.upper()] * len(IDS)), expected, atol=1e-4, rtol=1e-4)


def test_tasks_on_several_bases_have_theirs():
    model = adapted()
    names = ["elsewhere", "wide", "__base__", "ONLY", "elsewhere", "factor", "PLAIN"]
    expected = alone(model, IDS, [name.lower() if name != "__base__" else name for name in names])
    banked(model)
    torch.testing.assert_close(outputs(model, adapter_names=names), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("holds", HOLDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype, holds):
    model = adapted().to(dtype)
    expected = alone(model, IDS, NAMES)
    banked(model)
    given = outputs(model, adapter_names=[name if name == "__base__" else HOLDS[holds](name) for name in NAMES])
    assert given.dtype == dtype
    how = {"atol": 0.06, "rtol": 0.06} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(given, expected, **how)


@pytest.mark.parametrize("kind", ["8 bits", "4 bits"])
def test_quantised_layers(kind):
    make, targets, given = MODELS[kind]
    torch.manual_seed(0)
    base = {"basis": "random", "k": 3, "target_modules": targets, "save_basis": True}
    model = get_peft_model(make(), SubspaceConfig(**base, extra_rank=2))
    model.add_adapter("second", SubspaceConfig(**base, extra_rank=1))
    model.add_adapter("plain", SubspaceConfig(**base))
    filled(model)
    x = torch.cat([given(), given()])
    names = ["second", "__base__", "plain", "default"]
    expected = alone(model, x, names)
    bank = TaskBank(model, "default")
    for name in ("second", "plain", "default"):
        bank.add(name.upper(), read_task(model, adapter_name=name))
    for each in (names, ["SECOND", "__base__", "PLAIN", "default"], ["SECOND", "__base__", "PLAIN", "DEFAULT"]):
        torch.testing.assert_close(outputs(model, x, adapter_names=each), expected, atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_input_through_every_row():
    model = adapted().eval()
    x = torch.randn(len(NAMES), 4, 6, 6, generator=torch.Generator().manual_seed(4)).requires_grad_()
    conv = model.base_model.model.conv
    (given,) = torch.autograd.grad(conv(x, adapter_names=NAMES).square().sum(), x)
    for i, name in enumerate(NAMES):
        row = x.detach()[i : i + 1].requires_grad_()
        weight = conv.base_layer.weight + (0 if name == "__base__" else conv.get_delta_weight(name).detach())
        result = conv.base_layer._conv_forward(row, weight, conv.base_layer.bias)
        (expected,) = torch.autograd.grad(result.square().sum(), row)
        torch.testing.assert_close(given[i : i + 1], expected, atol=1e-4, rtol=1e-4)


def test_the_present_scale_and_a_set_one_count():
    model = adapted()
    for layer in layers(model):
        layer.set_scale("wide", 0.5)
    expected = alone(model, IDS, NAMES)
    torch.testing.assert_close(outputs(model, adapter_names=NAMES), expected, atol=1e-4, rtol=1e-4)


def test_the_number_of_products_does_not_grow_with_the_number_of_tasks(monkeypatch):
    """One with the cores, one for each side of the own directions, for one task or many; none where none has any."""
    model = adapted()
    bank = banked(model)
    calls: list[str] = []

    def counted(function: Any) -> Any:
        return lambda *given, **how: calls.append(function.__name__) or function(*given, **how)

    monkeypatch.setattr(torch, "bmm", counted(torch.bmm))
    monkeypatch.setattr(torch.Tensor, "baddbmm_", counted(torch.Tensor.baddbmm_))
    found = []
    for names in (["WIDE"], ["WIDE", "ONLY", "FACTOR", "DIAGONAL"], ["PLAIN"]):
        calls.clear()
        outputs(model, IDS[:4], adapter_names=(names * 4)[:4])
        found.append(len(calls))
    assert found[0] == found[1] > found[2] == len(layers(model))
    assert bank.gather(["PLAIN"]).shape == (1, bank.layout.core_width)


def test_no_tensor_of_a_batch_has_the_size_of_an_update():
    """What is gathered for a row is its core and its directions, and no copy of the basis."""
    model = adapted()
    bank = banked(model)
    with bank.tasks(["WIDE", "ONLY", "__base__"]):
        outputs(model, IDS[:3])
        for layer in layers(model):
            (group,) = layer.row_slot.open[0].names[id(layer.row_slot)].prepared[id(layer)]
            assert group.U is layer.subspace_U["plain"]
            assert group.V is layer.subspace_V["plain"]
            rank = bank.layout.own[layer.bank_place][0]
            assert group.own.A.shape == (3, rank, layer.in_features)
            assert group.own.B.shape == (3, rank, layer.out_features)


@pytest.mark.usefixtures("compiler")
def test_one_compilation_serves_all_batches_with_own_directions_and_one_those_without():
    model = get_peft_model(
        bert(layers=1), SubspaceConfig(basis="random", k=3, target_modules=["query", "value"], extra_rank=1)
    )
    bank = TaskBank(filled(model), extra_rank=2)
    for i, rank in enumerate((0, 0, 1, 2)):
        draw = torch.Generator().manual_seed(i)
        own = {
            name: (torch.randn(32, rank, generator=draw), torch.randn(rank, 32, generator=draw))
            for name in bank.layers
        }
        bank.add(f"t{i}", {name: torch.randn(3, 3, generator=draw) for name in bank.layers}, own=own)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    x = torch.randint(0, 100, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for names, count in ((["t0", "t1"], 1), (["t2", "__base__"], 2), (["t1", "t3"], 2), (["__base__", "t1"], 2)):
            with bank.tasks(names):
                given = compiled(x).logits
                assert counter.frame_count == count
                torch.testing.assert_close(given, model(x).logits, atol=1e-5, rtol=1e-4)
        given = compiled(x, adapter_names=["t3", "default"]).logits
        torch.testing.assert_close(given, model(x, adapter_names=["t3", "default"]).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("encoded", [False, True], ids=["decoder", "encoder and decoder"])
def test_generation_with_beams(bases, encoded, beams):
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, vocab_size=100, decoder_start_token_id=0)
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(config) if encoded else gpt2()
    basis = {"basis": "random", "k": 4, "target_modules": ["q", "v"]} if encoded else {"basis": bases[gpt2]}
    model = get_peft_model(base, SubspaceConfig(**basis, extra_rank=2))
    model.add_adapter("two", SubspaceConfig(**basis, extra_rank=1))
    filled(model)
    bank = TaskBank(model)
    bank.add("banked", read_task(model, adapter_name="two"))
    ids = torch.randint(1, 100, (4, 6), generator=torch.Generator().manual_seed(2))
    how = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    names = ["banked", "__base__", "default", "two"]
    mixed = model.generate(input_ids=ids, adapter_names=names, **how)
    with bank.tasks(names, copies=beams):
        assert torch.equal(model.generate(input_ids=ids, **how), mixed)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                single = model.generate(input_ids=ids[i : i + 1], **how)
        else:
            model.set_adapter("two" if name == "banked" else name)
            single = model.generate(input_ids=ids[i : i + 1], **how)
        assert torch.equal(mixed[i, : single.shape[1]], single[0])


@pytest.mark.parametrize("order", [("task", "plain"), ("plain", "task")])
def test_a_task_with_own_directions_beside_a_lora(bases, order):
    """In PEFT's mixed model: both updates add up, merge and leave the weights again."""
    configs = {
        "task": SubspaceConfig(basis=bases[bert], extra_rank=2, extra_rank_pattern={"0.attention.self.value": 0}),
        "plain": LoraConfig(r=4, target_modules=LORA_TARGETS[bert], init_lora_weights=False),
    }
    torch.manual_seed(0)
    model = get_peft_model(bert(), configs[order[0]], adapter_name=order[0], mixed=True)
    assert isinstance(model, PeftMixedModel)
    model.add_adapter(order[1], configs[order[1]])
    model.set_adapter(list(order))
    filled(model)
    x = torch.randint(0, 100, (3, 7), generator=torch.Generator().manual_seed(1))

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(x).logits

    both = logits()
    for name in order:
        model.set_adapter(name)
        assert (logits() - both).abs().max() > 1e-4
    model.set_adapter(list(order))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(logits(), both, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(), both, atol=1e-5, rtol=1e-4)
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(x).logits, both, atol=1e-5, rtol=1e-4)
