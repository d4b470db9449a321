"""Sources, and leaving the held-out task out of its basis."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from benchmarks.quality import fleet as fleet_module
from benchmarks.quality.bases import (
    input_roots,
)
from benchmarks.quality.fleet import others, require_left_out
from benchmarks.quality.training import make_model
from subspace_peft import build_basis
from subspace_peft.errors import SubspaceError

from .conftest import NAMES, SMALL, D, top_of, toy


def test_a_held_out_tasks_own_adapter_is_never_in_its_basis(bench):
    basis = bench.basis("one", k=4)
    assert {each["name"] for each in basis.info["sources"]} == {"three", "seventh"}
    own = bench.source("one")
    all_of_them = build_basis([str(bench.source(name)) for name in NAMES], k=4, progress=False)
    with pytest.raises(SubspaceError, match="own adapter"):
        require_left_out(all_of_them, own)
    with pytest.raises(SubspaceError, match="lists no sources"):
        require_left_out(bench.control("random", "one", 4), own)


def test_a_copy_of_the_own_adapter_under_another_name_is_noticed(bench, tmp_path):

    copy = tmp_path / "innocent"
    shutil.copytree(bench.source("one"), copy)
    basis = build_basis([str(copy), str(bench.source("three"))], k=4, progress=False)
    with pytest.raises(SubspaceError, match="own adapter"):
        require_left_out(basis, bench.source("one"))


def test_a_fleet_of_one_leaves_nothing():
    assert others("a", ["a", "b"]) == ["b"]
    with pytest.raises(SubspaceError, match="empty"):
        others("a", ["a"])


def test_sources_that_start_at_their_inputs_axes(bench, monkeypatch):
    monkeypatch.setattr(fleet_module, "SOURCE_RATE", 0.0)
    from safetensors.torch import load_file

    state = load_file(bench.source("one", "axes") / "adapter_model.safetensors")
    axes = input_roots(make_model(top_of(), 2, 0), fleet_module.some_inputs(toy("one")))
    for key in (key for key in state if "lora_A" in key):
        module = next(module for module in axes if f".{module}." in key)
        assert torch.allclose(state[key] / state[key].norm(dim=1, keepdim=True), axes[module]["axes"][:8], atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "lora_ga"])
def test_a_source_with_a_start_in_the_weights_is_what_it_moved_from_it(bench, monkeypatch, start, tmp_path):
    from safetensors.torch import load_file

    def update(folder):
        state = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        keys = sorted(key for key in state if "lora_A" in key)
        assert all(state[key].shape[0] == config["r"] == 16 for key in keys)
        scale = config["lora_alpha"] / config["r"]
        return [scale * state[key.replace("lora_A", "lora_B")] @ state[key] for key in keys]

    moved = update(bench.source("one", start))
    assert all(each.norm() > 0 for each in moved)
    assert bench.basis("seventh", start=start, k=4)["layer.0.query"].U.shape == (D, 4)
    monkeypatch.setattr(fleet_module, "SOURCE_RATE", 0.0)
    still = update(fleet_module.source("one", tmp_path / "still", start=start, budget=SMALL))
    assert all(each.norm() < 1e-5 for each in still)


def test_a_shared_start_is_the_same_whatever_a_tasks_outputs(bench, monkeypatch, tmp_path):
    from safetensors.torch import load_file

    monkeypatch.setattr(fleet_module, "SOURCE_RATE", 0.0)
    states = []
    for outputs in (2, 5):
        monkeypatch.setattr(fleet_module, "load", lambda name, folder, n=outputs: replace(toy(name), outputs=n))
        folder = fleet_module.source("one", tmp_path / str(outputs), start=7, budget=SMALL)
        states.append(load_file(folder / "adapter_model.safetensors"))
    keys = [key for key in states[0] if "lora_A" in key]
    assert keys and all(torch.equal(states[0][key], states[1][key]) for key in keys)


def test_a_start_that_is_none_is_refused(bench):
    with pytest.raises(SubspaceError, match="'pizza': give a seed or one of axes, pissa, lora_ga"):
        bench.source("one", "pizza")
