"""Fields of `SubspaceConfig` that would do nothing: a warning says what happens instead."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from subspace_peft import SubspaceConfig, TaskBank, load_adapter
from subspace_peft.tasks import read_task

from ..models import bert, randomise
from .conftest import said

IGNORED: list[tuple[dict[str, Any], str]] = [
    ({"k": 64}, r"k=64: the basis has no more than k=4, which is used"),
    ({"rank_pattern": {"query": 64}}, r"rank_pattern\['query'\]=64: the basis has no more than k=4"),
    ({"k": 2, "rank_pattern": {".*": 3}}, r"k=2 has no effect: rank_pattern gives every module its own"),
    ({"r": 4}, r"r=4 has no effect with coefficients='core'"),
    ({"r": 4, "coefficients": "diagonal"}, r"r=4 has no effect with coefficients='diagonal'"),
    ({"r": 4, "coefficients": "directions"}, r"r=4 has no effect with coefficients='directions'"),
    ({"r": 4, "coefficients": "none", "mean_gain": "trainable"}, r"r=4 has no effect with coefficients='none'"),
    ({"r": 64, "coefficients": "factor"}, r"r=64: the cores are of rank 4 at most, which is used"),
    ({"r": 3, "k": 2, "coefficients": "factor"}, r"r=3: the cores are of rank 2 at most"),
    ({"seed": 1}, r"seed=1 has no effect: the basis is read"),
    ({"seed": 1, "coefficients": "directions"}, r"seed=1 has no effect: the basis is read"),
    ({"start": "mean", "init_weights": False}, r"start='mean' has no effect with init_weights=False"),
    ({"basis_revision": "v2"}, r"basis_revision='v2' has no effect"),
    ({"basis": "base-weights", "seed": 1, "k": 2}, r"seed=1 has no effect: the basis is made of the base model"),
    ({"basis": "random", "k": 500}, r"k=500: these modules have no more than k=32, which is used"),
    ({"basis": "random", "k": 2, "r": 3}, r"r=3 has no effect"),
    ({"basis": "random", "k": 2, "basis_revision": "v2"}, r"basis_revision='v2' has no effect"),
]


def configured(work: Path, given: dict[str, Any]) -> SubspaceConfig:
    generated = given.get("basis") in ("random", "base-weights")
    targets = {"target_modules": ["query", "value"]} if generated else {}
    return SubspaceConfig(**{"basis": str(work / "basis"), **targets, **given})


@pytest.mark.parametrize(("given", "text"), IGNORED, ids=[repr(given) for given, _ in IGNORED])
def test_a_field_that_does_nothing_is_said(work: Path, given: dict[str, Any], text: str) -> None:
    assert re.search(text, said(lambda: get_peft_model(bert(), configured(work, given))))


USED: list[dict[str, Any]] = [
    {},
    {"k": 2},
    {"k": 4},
    {"rank_pattern": {"query": 2}},
    {"k": 3, "rank_pattern": {"query": 2}},
    {"coefficients": "factor"},
    {"coefficients": "factor", "r": 2},
    {"coefficients": "directions"},
    {"coefficients": "none", "mean_gain": "trainable", "k": 2},
    {"alpha": 8.0, "dropout": 0.1, "bias": "all"},
    {"mean_gain": "fixed"},
    {"start": "lora1"},
    {"start": "mean"},
    {"init_weights": False},
    {"check_base_model": False, "save_basis": True},
    {"basis": "random", "k": 4, "seed": 3},
    {"basis": "random", "seed": 3, "coefficients": "directions", "k": 2},
    {"basis": "base-weights", "k": 4},
    {"basis": "base-weights", "k": 2, "seed": 3, "coefficients": "directions"},
]


@pytest.mark.parametrize("given", USED, ids=repr)
def test_a_field_that_is_used_is_not_spoken_of(work: Path, given: dict[str, Any]) -> None:
    assert not said(lambda: get_peft_model(bert(), configured(work, given)))


@pytest.mark.parametrize("given", [given for given, _ in IGNORED if "basis" not in given][:9], ids=repr)
def test_a_saved_task_is_loaded_without_a_word(work: Path, given: dict[str, Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = randomise(get_peft_model(bert(), configured(work, given)))
        model.save_pretrained(tmp_path)
    assert not said(lambda: PeftModel.from_pretrained(bert(), tmp_path))
    assert not said(lambda: load_adapter(bert(), tmp_path))


def test_what_is_made_of_other_adapters_is_not_spoken_of(work: Path) -> None:
    model = get_peft_model(bert(), configured(work, {"coefficients": "factor", "r": 2}))
    model.add_adapter("other", configured(work, {"coefficients": "factor", "r": 2}))
    assert not said(
        lambda: model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="linear")
    )
    bank = TaskBank(model, "default")
    bank.add("one", read_task(model, adapter_name="other").cores)
    assert not said(lambda: bank.load_adapter("one"))


def test_truncation_is_what_k_means(work: Path) -> None:
    whole, cut = (get_peft_model(bert(), configured(work, {"k": k})) for k in (None, 2))
    for (name, layer), (_, other) in zip(whole.named_modules(), cut.named_modules(), strict=True):
        if hasattr(layer, "subspace_U"):
            assert torch.equal(layer.subspace_U["default"][:, :2], other.subspace_U["default"]), name


def test_the_default_rank_is_said_where_it_is_given(work: Path) -> None:
    config = SubspaceConfig(basis=work / "basis", r=8)
    assert "r=8 has no effect" in said(lambda: get_peft_model(bert(), config))
    assert not said(lambda: get_peft_model(bert(), SubspaceConfig(basis=work / "basis")))
