"""The record itself: the places it samples, the distance it gives, and what an odd one does."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from subspace_peft import SubspaceBasis, SubspaceConfig
from subspace_peft.basis.base_weights import compare, places, read_sample
from subspace_peft.errors import BadFileError, SubspaceError
from subspace_peft.report.inspect import inspect_path

from .conftest import changed, noise, wide

PLACES = [[15, 2], [9, 2], [11, 4], [0, 0], [10, 7], [5, 6]]
ODD = [
    5,
    {},
    {"format": True},
    {"values": {}},
    {"values": {"a": 5}},
    {"values": {"a": "?"}},
    {"values": {"a": "AAAA"}},
    {"values": {"a": "AACAfw=="}},
    {"values": {"a\n": "AACAPw=="}},
    {"values": {"a": "A" * 5000}},
    {"values": {f"m{i}": "AACAPw==" for i in range(300)}},
    {"rounded": 1},
    {"stored_as": None},
    {"model": 5},
]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_records_are_refused(recorded, tmp_path, odd):
    config = json.loads((recorded / "basis_config.json").read_text())
    record = {**config["base_weights"], **odd} if isinstance(odd, dict) and odd else odd
    (tmp_path / "basis.safetensors").write_bytes((recorded / "basis.safetensors").read_bytes())
    (tmp_path / "basis_config.json").write_text(json.dumps({**config, "base_weights": record}))
    with pytest.raises(BadFileError, match="base_weights"):
        SubspaceBasis.from_pretrained(tmp_path)
    with pytest.raises(SubspaceError, match="base_weights"):
        SubspaceConfig(basis=str(recorded), base_weights=record)


def test_a_record_of_a_newer_format_is_left_alone(recorded, tmp_path):
    config = json.loads((recorded / "basis_config.json").read_text())
    (tmp_path / "basis.safetensors").write_bytes((recorded / "basis.safetensors").read_bytes())
    (tmp_path / "basis_config.json").write_text(json.dumps({**config, "base_weights": {"format": 2, "new": []}}))
    assert inspect_path(tmp_path)["base_weights"] == "not recorded yet"


def test_places_are_the_same_everywhere():
    assert places("model.layers.0.self_attn.q_proj", 16, 8, 6).tolist() == PLACES
    assert torch.equal(places("a", 5, 7, 128)[:16], places("a", 5, 7, 16))


def test_a_records_distance_is_that_of_the_matrices():
    torch.manual_seed(0)
    model, other = wide(), changed(noise(0.2))
    from subspace_peft.tuner.base_weights import BaseWeights

    def layers(m: nn.Module) -> dict[str, nn.Module]:
        return {name: each for name, each in m.named_modules() if isinstance(each, nn.Linear) and "layer" in name}

    samples = [BaseWeights(m, layers(m)).sample("build", 256) for m in (model, other)]
    assert read_sample(json.loads(json.dumps(samples[0].record()))).values.keys() == layers(model).keys()
    assert compare(*samples).distance == pytest.approx(0.2, rel=0.1)
    assert compare(samples[0], copy.deepcopy(samples[0])).distance == 0


@pytest.mark.parametrize("absent", ["model", "taken", "rounded", "stored_as", "values"])
def test_a_record_that_lacks_a_part_is_no_reason_to_crash(recorded, absent):
    stored = SubspaceBasis.from_pretrained(recorded).info["base_weights"]
    record = {name: value for name, value in stored.items() if name != absent}
    assert (read_sample(record) is None) == (absent != "model")
