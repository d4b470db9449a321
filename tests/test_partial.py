"""A model that has only some of a basis's modules: what is left out is said, and misspelt names are refused."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftMixedModel, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import (
    BertModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from subspace_peft import SubspaceBasis, SubspaceConfig, build_basis, load_adapter, project_lora
from subspace_peft.basis import ModuleBasis
from subspace_peft.errors import BasisMismatchError, SubspaceError
from tests.models import bert, gpt2, needs_transformers_adapters, randomise, train_lora

QUERY = "bert.encoder.layer.1.attention.self.query"


def module(out: int, inner: int, k: int = 2) -> ModuleBasis:
    generator = torch.Generator().manual_seed(out * inner)

    def directions(n: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(n, min(k, n), generator=generator))[0]

    return ModuleBasis(U=directions(out), V=directions(inner).T.contiguous())


def basis_of(sizes: dict[str, tuple[int, int]]) -> SubspaceBasis:
    return SubspaceBasis({name: module(*size) for name, size in sizes.items()})


def adapted(model: nn.Module) -> set[str]:
    return {name.split(".subspace_coef")[0] for name, _ in model.named_parameters() if "subspace_coef" in name}


def warned(call: Callable[[], Any]) -> list[str]:
    """The warnings about parts of a basis that `call` gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught if "of the basis's" in str(each.message)]


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("partial")
    built = build_basis([train_lora(bert, folder / str(i), seed=i) for i in (1, 2)], k=4, progress=False)
    return str(built.save_pretrained(folder / "basis"))


# -- what is left out is said, by every way to add an adapter ---------------------------------------------------------


def transformers_add(model: Any, config: SubspaceConfig) -> Any:
    model.add_adapter(config)
    return model


def peft_add(model: Any, config: SubspaceConfig) -> Any:
    first = SubspaceConfig(basis="random", k=2, target_modules=["dense"])
    model = get_peft_model(model, first)
    model.add_adapter("second", config)
    return model


WAYS: dict[str, Callable[[Any, SubspaceConfig], Any]] = {
    "get_peft_model": get_peft_model,
    "add_adapter": peft_add,
    "inject": lambda model, config: inject_adapter_in_model(config, model),
    "mixed": lambda model, config: PeftMixedModel(model, config),
}


@pytest.mark.parametrize("way", [*WAYS, pytest.param("transformers", marks=needs_transformers_adapters)])
def test_every_way_says_what_is_left_out(basis: str, way: str) -> None:
    add = WAYS.get(way, transformers_add)
    (text,) = warned(lambda: add(bert(layers=1), SubspaceConfig(basis=basis)))
    assert text.startswith("Only 2 of the basis's 4 modules")
    assert "2 are not in the model" in text and QUERY in text
    assert "strict=True" in text
    # a model that has them all
    assert not warned(lambda: add(bert(), SubspaceConfig(basis=basis, strict=True)))


@pytest.mark.parametrize("way", [*WAYS, pytest.param("transformers", marks=needs_transformers_adapters)])
def test_strict_refuses_before_the_model_is_touched(basis: str, way: str) -> None:
    model = bert(layers=1)
    before = [name for name, _ in model.named_modules()]
    if way == "add_adapter":
        model = get_peft_model(model, SubspaceConfig(basis="random", k=2, target_modules=["dense"]))
        before = [name for name, _ in model.named_modules()]
    with pytest.raises(BasisMismatchError, match=f"only 2 of the basis's 4 modules.*{QUERY}"):
        if way == "add_adapter":
            model.add_adapter("second", SubspaceConfig(basis=basis, strict=True))
        else:
            WAYS.get(way, transformers_add)(model, SubspaceConfig(basis=basis, strict=True))
    assert [name for name, _ in model.named_modules()] == before


class Odd(nn.Module):
    """One module of every kind that a basis may name and no adapter can be put around."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.attn = nn.MultiheadAttention(8, 2)
        self.conv = nn.Conv2d(4, 4, 3, groups=2)
        self.norm = nn.LayerNorm(8)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.zeros(3, 8, 8))


def test_kinds_that_cannot_be_adapted_are_told_from_what_is_absent() -> None:
    odd = {"attn", "attn.out_proj", "conv", "experts", "experts.up", "norm"}
    made = basis_of(dict.fromkeys({"lin", "gone", *odd}, (8, 8)))
    (text,) = warned(lambda: inject_adapter_in_model(SubspaceConfig(basis=made, save_basis=True), Odd()))
    assert text.startswith("Only 1 of the basis's 8 modules")
    assert "1 is not in the model (gone)" in text
    assert "6 are there, but of a kind that cannot be adapted" in text
    for said in (
        "MultiheadAttention: attn;",
        "the out_proj of a MultiheadAttention: attn.out_proj",
        "Conv2d of 2 groups: conv",
        "LayerNorm: norm",
        "a parameter that is no layer's weight: experts.up",
    ):
        assert said in text
    with pytest.raises(BasisMismatchError, match=r"can be adapted in Odd.*MultiheadAttention: attn"):
        inject_adapter_in_model(SubspaceConfig(basis=basis_of({"attn": (8, 8)}), save_basis=True), Odd())


def test_the_projection_that_a_multihead_attention_never_calls_is_refused() -> None:
    with pytest.raises(SubspaceError, match=r"attn\.out_proj.*no effect"):
        inject_adapter_in_model(SubspaceConfig(basis="random", target_modules=["out_proj"]), Odd())
    inject_adapter_in_model(SubspaceConfig(basis="random", target_modules=["lin"]), Odd())


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2)).eval()


def test_experts_that_transformers_fused_are_said_by_name() -> None:
    attention = {f"model.layers.{i}.self_attn.q_proj": (32, 32) for i in (0, 1)}
    experts = {f"model.layers.0.block_sparse_moe.experts.{e}.{w}": (48, 32) for e in (0, 1) for w in ("w1", "w3")}
    made = basis_of({**attention, **experts, "model.layers.0.block_sparse_moe.gate": (3, 32)})
    model = mixtral()
    (text,) = warned(lambda: get_peft_model(model, SubspaceConfig(basis=made, save_basis=True)))
    assert text.startswith("Only 2 of the basis's 7 modules")
    assert "5 are there, but of a kind that cannot be adapted" in text
    assert "part of the fused weights gate_up_proj: model.layers.0.block_sparse_moe.experts.0.w1" in text
    assert "Router: model.layers.0.block_sparse_moe.gate" in text


# -- no noise where it is meant ---------------------------------------------------------------------------------------

NARROWED: list[dict[str, Any]] = [
    {"target_modules": ["query"]},
    {"target_modules": r".*\.query"},
    {"target_modules": ["layer.0.attention.self.query", "layer.0.attention.self.value"]},
    {"exclude_modules": ["query"]},
    {"exclude_modules": r".*layer\.1.*"},
    {"layers_to_transform": [0]},
    {"layers_to_transform": 1, "layers_pattern": "layer"},
    {"target_modules": ["query"], "layers_to_transform": [1]},
]


@pytest.mark.parametrize("narrowed", NARROWED, ids=lambda given: "+".join(given))
def test_what_is_narrowed_on_purpose_is_complete(basis: str, narrowed: dict[str, Any]) -> None:
    assert not warned(lambda: get_peft_model(bert(), SubspaceConfig(basis=basis, strict=True, **narrowed)))


@pytest.mark.parametrize(
    "narrowed",
    [{"exclude_modules": r".*layer\.1.*"}, {"layers_to_transform": [0]}, {"target_modules": r".*layer\.0.*query"}],
    ids=lambda given: "+".join(given),
)
def test_what_is_left_out_on_purpose_need_not_be_in_the_model(basis: str, narrowed: dict[str, Any]) -> None:
    config = SubspaceConfig(basis=basis, strict=True, **narrowed)
    assert not warned(lambda: get_peft_model(bert(layers=1), config))


def test_targets_that_the_model_has_in_part_are_said(basis: str) -> None:
    (text,) = warned(lambda: get_peft_model(bert(layers=1), SubspaceConfig(basis=basis, target_modules=["query"])))
    assert text.startswith("Only 1 of the basis's 2 modules") and QUERY in text


def test_a_backbone_of_the_model_is_complete(basis: str) -> None:
    backbone = BertModel(bert().config)
    assert not warned(lambda: get_peft_model(backbone, SubspaceConfig(basis=basis, strict=True)))


class Part(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})


def test_a_pipelines_other_parts_are_not_missed() -> None:
    pipe = {"unet.blocks.a": (8, 8), "unet.blocks.b": (8, 8), "text_encoder.blocks.c": (8, 8)}
    made = basis_of(pipe)
    strict = SubspaceConfig(basis=made, save_basis=True, strict=True, check_base_model=False)
    assert not warned(lambda: inject_adapter_in_model(copy.deepcopy(strict), Part("a", "b")))
    assert not warned(lambda: inject_adapter_in_model(copy.deepcopy(strict), Part("c")))
    with pytest.raises(BasisMismatchError, match=r"only 1 of the basis's 2 modules.*unet\.blocks\.b"):
        inject_adapter_in_model(strict, Part("a"))
    # no part of a pipeline, though its name is that of one
    gpt = basis_of({"transformer.blocks.a": (8, 8), "lm_head": (8, 8)})
    with pytest.raises(BasisMismatchError, match="lm_head"):
        inject_adapter_in_model(SubspaceConfig(basis=gpt, save_basis=True, strict=True), Part("a"))


def test_a_state_dict_that_names_the_modules_narrows(basis: str) -> None:
    state = {f"{QUERY}.subspace_coef.weight": torch.zeros(4, 4)}
    assert not warned(lambda: inject_adapter_in_model(SubspaceConfig(basis=basis), bert(), state_dict=state))


def test_one_configuration_serves_several_models(basis: str) -> None:
    config = SubspaceConfig(basis=basis)
    for layers, count in ((2, 4), (1, 2), (2, 4)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert len(adapted(get_peft_model(bert(layers=layers), config))) == count
    # a generated basis takes PEFT's targets for each kind of model
    generated = SubspaceConfig(basis="random", k=2)
    assert len(adapted(get_peft_model(bert(), generated))) == 4
    assert len(adapted(get_peft_model(gpt2(), generated))) == 2
    # targets that were given are not filled in again
    config.target_modules = {"query"}
    assert len(adapted(get_peft_model(bert(), config))) == 2


def test_strict_is_saved_only_where_it_is_set(basis: str, tmp_path: Path) -> None:
    for strict in (False, True):
        SubspaceConfig(basis=basis, strict=strict).save_pretrained(str(tmp_path / str(strict)))
        saved = json.loads((tmp_path / str(strict) / "adapter_config.json").read_text())
        assert ("strict" in saved) is strict
        assert SubspaceConfig.from_pretrained(str(tmp_path / str(strict))).strict is strict


# -- a saved task needs all of its modules ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(basis: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("task")
    randomise(get_peft_model(bert(), SubspaceConfig(basis=basis))).save_pretrained(folder)
    return str(folder)


LOADERS: dict[str, Callable[[Any, str], Any]] = {
    "peft": lambda model, folder: PeftModel.from_pretrained(model, folder),
    "mixed": lambda model, folder: PeftMixedModel.from_pretrained(model, folder),
    "ours": load_adapter,
    "transformers": lambda model, folder: model.load_adapter(folder),
}


@pytest.mark.parametrize(
    "loader",
    [pytest.param(name, marks=needs_transformers_adapters if name == "transformers" else ()) for name in LOADERS],
)
def test_a_task_is_refused_where_its_modules_are_missing(task: str, loader: str) -> None:
    with pytest.raises(
        BasisMismatchError, match=r"adapts 4 modules, but this .* has no module bert\.encoder\.layer\.1"
    ):
        LOADERS[loader](bert(layers=1), task)
    assert not warned(lambda: LOADERS[loader](bert(), task))


# -- names given by mistake -------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["qeury", "value"]}, r"target_modules: there is no module 'qeury'.*near it: query"),
    ({"target_modules": ["query", "layer.9.attention.self.value"]}, r"'layer\.9\.attention\.self\.value'"),
    ({"target_modules": ["qeury", "vlaue"]}, r"'qeury'.*'vlaue'"),
    ({"exclude_modules": ["qeury"]}, r"exclude_modules: there is no module 'qeury'.*near it: query"),
    ({"exclude_modules": ["query", "valeu"]}, r"'valeu'.*near it: value"),
    ({"modules_to_save": ["clasifier"]}, r"modules_to_save: there is no module 'clasifier'.*classifier"),
    ({"layers_to_transform": [0, 7, 9]}, r"layers_to_transform: the model has no targets in layer 7, 9"),
    ({"layers_to_transform": 5}, r"layer 5"),
    ({"layers_to_transform": [0], "layers_pattern": "layres"}, r"layer 0 \(layers_pattern='layres'\)"),
    (
        {"layers_to_transform": [0], "target_modules": r".*query"},
        r"has no effect where target_modules is one expression",
    ),
    ({"layers_to_transform": [0], "target_modules": [QUERY]}, r"no effect on modules named in full"),
]


@pytest.mark.parametrize(
    ("given", "said"), WRONG, ids=[f"{i}-{'+'.join(given)}" for i, (given, _) in enumerate(WRONG)]
)
@pytest.mark.parametrize("source", ["stored", "random"])
def test_an_entry_that_does_nothing_is_refused(basis: str, source: str, given: dict[str, Any], said: str) -> None:
    where: dict[str, Any] = {"basis": basis} if source == "stored" else {"basis": "random", "k": 2}
    if source == "random":
        given = {"target_modules": ["query", "value"], **given}
    model = bert()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(SubspaceError, match=said):
        get_peft_model(model, SubspaceConfig(**where, **given))
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("builder", ["random", "base-weights"])
def test_a_builder_refuses_them_as_well(builder: str) -> None:
    with pytest.raises(SubspaceError, match=r"'qeury' \(query\) matches no linear layer"):
        build_basis(builder=builder, base_model=bert(), target_modules=["qeury", "value"], k=2, progress=False)


def test_peft_says_what_of_a_rank_pattern_matches_nothing(basis: str) -> None:
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match.*qeury"):
        get_peft_model(bert(), SubspaceConfig(basis=basis, rank_pattern={"qeury": 2, "value": 2}))


RIGHT: list[dict[str, Any]] = [
    {"target_modules": ["query", "value"]},
    {"target_modules": "all-linear", "basis": "random", "k": 2},
    {"basis": "random", "k": 2},  # PEFT's own targets for this kind of model
    {"target_modules": ["layer.0.attention.self.query"]},
    {"target_modules": [QUERY]},
    {"exclude_modules": ["layer.0.attention.self.query", "pooler"]},
    {"rank_pattern": {"query": 2, r"layer\.1\.attention\.self\.value": 3}},
    {"rank_pattern": {"query": 2, ".*": 3}},
    {"modules_to_save": ["classifier"]},
    {"task_type": "SEQ_CLS"},  # PEFT adds the names of heads that other models have
    {"layers_to_transform": [0, 1]},
]


@pytest.mark.parametrize("given", RIGHT, ids=repr)
def test_entries_that_match_are_taken(basis: str, given: dict[str, Any]) -> None:
    assert not warned(lambda: get_peft_model(bert(), SubspaceConfig(**{"basis": basis, **given})))


def test_projected_tasks_bring_targets_of_their_own(basis: str, tmp_path: Path) -> None:
    folder = train_lora(bert, tmp_path / "lora", seed=5)
    project_lora(folder, basis).save_pretrained(tmp_path / "task")
    assert not warned(lambda: PeftModel.from_pretrained(bert(), tmp_path / "task"))
