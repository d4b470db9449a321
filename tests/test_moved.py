"""Old names keep working: each module and each name that moved, with a FutureWarning that names the new place."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, get_peft_model
from transformers import BertConfig, BertModel

import subspace_peft
from subspace_peft import SubspaceBasis, SubspaceConfig, _moved
from subspace_peft.modeling import MeanPooledClassifier

LIBRARY = {old: places for old, places in _moved.MODULES.items() if "recipes:" not in str(places)}


def old_module(name: str) -> object:
    """Import `subspace_peft.<name>` as if for the first time."""
    sys.modules.pop(f"subspace_peft.{name}", None)
    module = importlib.import_module(f"subspace_peft.{name}")
    # the import system hangs it on its parent, where a name that moved may be called the same
    parent, _, child = f"subspace_peft.{name}".rpartition(".")
    vars(sys.modules[parent]).pop(child, None)
    return module


@pytest.mark.parametrize("old", sorted(LIBRARY))
def test_an_old_module_gives_what_the_new_one_has(old: str):
    places = LIBRARY[old]
    places = (places,) if isinstance(places, str) else places
    with pytest.warns(FutureWarning, match=rf"subspace_peft\.{old} has moved to subspace_peft\.{places[0]}"):
        module = old_module(old)
    for place in places:
        new = importlib.import_module(f"subspace_peft.{place}")
        for name in getattr(new, "__all__", [name for name in vars(new) if not name.startswith("_")]):
            assert getattr(module, name) is getattr(new, name)
    with pytest.raises(AttributeError, match="no attribute 'never_there'"):
        _ = module.never_there


@pytest.mark.parametrize(
    ("module", "name", "place"),
    [(m, n, p) for m, names in _moved.NAMES.items() for n, p in names.items() if not p.startswith("recipes:")],
)
def test_an_old_name_is_the_new_one(module: str, name: str, place: str):
    where, _, new = place.partition(":")
    with pytest.warns(FutureWarning, match=rf"subspace_peft\.{module}\.{name} has moved to subspace_peft\.{where}\."):
        found = getattr(importlib.import_module(f"subspace_peft.{module}"), name)
    assert found is getattr(importlib.import_module(f"subspace_peft.{where}"), new or name)


def test_the_warning_points_at_the_import_that_has_to_change():
    with pytest.warns(FutureWarning) as caught:
        old_module("build")
    assert {warning.filename for warning in caught} == {importlib.__file__}, "importlib.import_module is the caller"
    sys.modules.pop("subspace_peft.build", None)
    with pytest.warns(FutureWarning) as caught:
        import subspace_peft.build  # noqa: F401
    assert [warning.filename for warning in caught] == [__file__]


def test_a_renamed_name_warns_once_where_it_is_imported():
    with pytest.warns(FutureWarning):
        old_module("tuner.arrivals")
    with pytest.warns(FutureWarning) as caught:
        from subspace_peft.tuner.arrivals import Arrivals  # noqa: F401

        from subspace_peft.tuner import TaskBank  # noqa: F401
    assert [warning.filename for warning in caught] == [__file__] * 2
    said = {str(warning.message).partition(" ")[0] for warning in caught}
    assert said == {"subspace_peft.tuner.TaskBank", "subspace_peft.tuner.arrivals.Arrivals"}


def test_pickles_that_name_an_old_module_are_read():
    sys.modules.pop("subspace_peft.build.factors", None)
    with pytest.warns(FutureWarning):
        made = pickle.loads(b"\x80\x04csubspace_peft.build.factors\nFactors\n.")
    assert made is importlib.import_module("subspace_peft.sources").Factors


def test_adapters_that_name_the_class_of_the_earlier_demo_are_loaded(tmp_path: Path):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=50, **shape)).save_pretrained(tmp_path / "encoder")
    model = MeanPooledClassifier.from_pretrained(tmp_path / "encoder", num_labels=3)
    tokens = torch.arange(12).reshape(2, 6)
    # the demo's class could be saved whole too
    model.save_pretrained(tmp_path / "whole")
    whole = MeanPooledClassifier.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(whole(tokens).logits, model.eval()(tokens).logits)
    config = SubspaceConfig(basis="random", k=2, target_modules=["query"], modules_to_save=["classifier"])
    task = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    task.save_pretrained(tmp_path / "task")
    file = tmp_path / "task" / "adapter_config.json"
    assert json.loads(file.read_text())["auto_mapping"]["parent_library"] == "subspace_peft.modeling"
    file.write_text(file.read_text().replace('"subspace_peft.modeling"', '"subspace_peft.demo.model"'))
    allowed = ["subspace_peft.demo.model"]
    with pytest.warns(FutureWarning, match=r"subspace_peft\.demo\.model has moved to subspace_peft\.modeling"):
        sys.modules.pop(allowed[0], None)
        again = AutoPeftModel.from_pretrained(tmp_path / "task", import_allowlist=allowed, num_labels=3).eval()
    assert torch.equal(again(tokens).logits, task(tokens).logits)


def test_a_mean_pooled_classifier_keeps_the_weights_of_the_encoder_that_it_is_given():
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    encoder = BertModel(config)
    before = encoder.embeddings.word_embeddings.weight.clone()
    assert torch.equal(MeanPooledClassifier(encoder).bert.embeddings.word_embeddings.weight, before)
    assert MeanPooledClassifier(config).bert.config is config


def test_earlier_methods_of_a_configuration_warn(bases: dict[Any, SubspaceBasis]):
    basis = next(iter(bases.values()))
    config = SubspaceConfig(coefficients="core")
    with pytest.warns(FutureWarning, match="on_basis") as caught:
        config.adopt(basis)
    assert caught[0].filename == __file__
    assert config.resolve() is basis and config.basis_fingerprint == basis.fingerprint
    config = SubspaceConfig(basis="random", k=2, basis_fingerprint="0" * 64, base_probe=[1.0])
    with pytest.warns(FutureWarning, match="start_over"):
        config.start_over()
    assert (config.basis_fingerprint, config.base_probe, config.basis) == (None, None, "random")


def test_the_public_face_needs_no_old_name(recwarn: pytest.WarningsRecorder):
    for name in subspace_peft.__all__:
        getattr(subspace_peft, name)
    for package in ("basis", "builders", "bundle", "convert", "report", "sources", "tasks", "tuner"):
        module = importlib.import_module(f"subspace_peft.{package}")
        for name in module.__all__:
            getattr(module, name)
    assert not [w for w in recwarn if "has moved to" in str(w.message)]
