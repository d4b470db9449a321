"""Bases, banks and adapters from strangers: what is wrong with them is said."""

from __future__ import annotations

import json
import time

import pytest
import torch
from peft import PeftModel

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft._io.untrusted import pattern_problem
from subspace_peft.errors import BadFileError, SourceError, SubspaceError
from subspace_peft.tasks import TaskBank
from subspace_peft.tasks.bank_file import read_index, read_own, read_rows

from .conftest import DEEP, HUGE, SLOW_PATTERN
from .make import (
    BASIS_CONFIG,
    CONFIG,
    WEIGHTS,
    Small,
    edit_header,
    edit_json,
    edit_tensors,
    little_memory,
)

# -- a basis's config -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(modules=5), "no modules"),
        (lambda c: c.update(modules={}), "no modules"),
        (lambda c: c.update(modules={"first": 5}), "no sha256"),
        (lambda c: c["modules"]["first"].update(sha256="0" * 63), "no sha256"),
        (lambda c: c["modules"]["first"].update(shape=[1, 2]), "no shape"),
        (lambda c: c["modules"]["first"]["shape"].update(out=HUGE), "not a layer's size"),
        (lambda c: c["modules"]["first"]["shape"].update(out=True), "not a layer's size"),
        (lambda c: c["modules"]["first"]["shape"].update(k_out=11), "dimensions"),
        (lambda c: c["modules"]["first"]["shape"].update(k_in=0), "dimensions"),
        (lambda c: c["modules"]["first"]["shape"].update(directions=10**9), "directions="),
        (lambda c: c["modules"]["first"]["shape"].update(directions=3), "do not belong together"),
        (lambda c: c["modules"]["first"]["shape"].update(k_out=2), "do not belong together"),
        (lambda c: c["modules"].update({"a\nb": c["modules"]["first"]}), "not a module's name"),
        (lambda c: c.update(sources=5), "sources"),
        (lambda c: c.update(sources=[5]), "sources"),
        (lambda c: c.update(measured=[]), "measured"),
        (lambda c: c.update(base_model_name_or_path={}), "base_model_name_or_path"),
        (lambda c: c.update(format_version="1"), "format version"),
        (lambda c: c.update(format_version={"a": HUGE}), "format version"),
        (lambda c: c.update(fingerprint=None), "do not add up"),
    ],
)
def test_a_hostile_config_of_a_basis(files, change, said):
    edit_json(files["basis"] / BASIS_CONFIG, change)
    with little_memory(), pytest.raises(BadFileError, match=said):
        SubspaceBasis.from_pretrained(files["basis"])


def test_two_modules_cannot_pose_as_one_of_a_long_name(files):
    """The fingerprint is a hash over names and hashes in a row: a name that holds a hash would give two bases the same
    one."""
    content = json.loads((files["basis"] / BASIS_CONFIG).read_text())
    first, last = content["modules"]["first"], content["modules"]["last"]
    content["modules"] = {f"first\0{first['sha256']}\nlast": last}
    (files["basis"] / BASIS_CONFIG).write_text(json.dumps(content))
    with pytest.raises(BadFileError, match="not a module's name"):
        SubspaceBasis.from_pretrained(files["basis"])


# -- a bank's file ----------------------------------------------------------------------------------------------------

BAD_INDEXES = [
    {"tasks": 5},
    {"tasks": "ab"},
    {"tasks": ["one"]},
    {"tasks": ["one", "one"]},
    {"tasks": ["one", "__base__"]},
    {"tasks": ["one", 5]},
    {"tasks": ["one", "a\0b"]},
    {"modules": []},
    {"modules": {}},
    {"modules": {"first": 5}},
    {"modules": {"first": [HUGE, 1]}},
    {"modules": {"first": [3, -3]}},
    {"modules": {"first": [1 << 20, 1 << 20]}},
    {"format_version": 99},
    {"basis_fingerprint": 5},
]


@pytest.mark.parametrize("change", BAD_INDEXES, ids=range(len(BAD_INDEXES)))
def test_a_hostile_index_of_a_bank(files, change):
    def lie(header):
        header["__metadata__"]["bank"] = json.dumps({**json.loads(header["__metadata__"]["bank"]), **change})

    edit_header(files["bank.safetensors"], lie)
    bank = TaskBank(PeftModel.from_pretrained(Small(), files["task"]), extra_rank=1)
    with little_memory(), pytest.raises(BadFileError, match="not a readable bank"):
        bank.load(files["bank.safetensors"])
    assert len(bank) == 0


@pytest.mark.parametrize("text", ["", "5", "[]", DEEP, "{"])
def test_a_banks_index_that_is_no_json_object(files, text):
    edit_header(files["bank.safetensors"], lambda header: header["__metadata__"].update(bank=text))
    with pytest.raises(BadFileError, match="not a readable bank"):
        read_index(files["bank.safetensors"])


def test_one_task_out_of_a_bank_is_what_the_bank_holds(files):
    bank = TaskBank(PeftModel.from_pretrained(Small(), files["task"]), extra_rank=1)
    bank.load(files["bank.safetensors"])
    for name in ("one", "two"):
        cores = read_rows(files["bank.safetensors"], name)
        assert all(torch.equal(cores[module], bank[name][module]) for module in bank[name])
        own, held = read_own(files["bank.safetensors"], name), bank.own(name)
        assert own.keys() == held.keys() == ({"first"} if name == "two" else set())
        assert all(torch.equal(*sides) for module in own for sides in zip(own[module], held[module], strict=True))
    with pytest.raises(SubspaceError, match="no task 'three'"):
        read_rows(files["bank.safetensors"], "three")


# -- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        *[{"r": value} for value in (None, "2", 0, HUGE, [], True)],
        *[{"lora_alpha": value} for value in (None, "x", [], HUGE, float("nan"), float("inf"), {})],
        *[
            {"rank_pattern": value}
            for value in (5, [1], "x", {SLOW_PATTERN: 2}, {"(": 2}, {"first": "2"}, {"first": HUGE})
        ],
        *[{"alpha_pattern": value} for value in (5, {"first": "2"}, {"(a|a)*b": 1}, {"first": None})],
        *[{"base_model_name_or_path": value} for value in (5, [], {"a": 1})],
        *[{"peft_type": value} for value in (5, None, [], "MAGIC")],
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_a_hostile_config_of_a_source(files, change):
    edit_json(files["lora0"] / CONFIG, **change)
    with little_memory(), pytest.raises(SourceError, match="lora0"):
        build_basis([str(files["lora0"])], k=2, progress=False)


def test_a_source_of_nothing(files):
    def nothing(tensors):
        for key, value in tensors.items():
            tensors[key] = value[:0] if "lora_A" in key else value[:, :0]

    edit_tensors(files["lora0"] / WEIGHTS, nothing)
    edit_json(files["lora0"] / CONFIG, r=0, rank_pattern={})
    with pytest.raises(SourceError, match="holds nothing"):
        build_basis([str(files["lora0"])], k=2, progress=False)


@pytest.mark.parametrize(
    ("pattern", "harmless"),
    [
        (r".*\.(q|v)_proj", True),
        (r"(.*\.)?layers\.\d+\.(mlp|attn)\..*", True),
        ("first", True),
        (r"model\.layers\.[0-9]+\.x", True),
        (r"(?:a|b)?c", True),
        ("[*+]{1}", True),
        (SLOW_PATTERN, False),
        ("(a|aa)*$", False),
        (".*" * 12 + "x", False),
        ("(a{1,9}){1,9}", False),
        (r"(.+)\1+", False),
        ("(", False),
        ("a" * 3000 + ".*", False),
        ("(" * 5000 + ")" * 5000, False),
    ],
)
def test_patterns_that_could_be_matched_for_ever_are_refused(pattern, harmless):
    began = time.perf_counter()
    assert (pattern_problem(pattern) is None) == harmless
    assert time.perf_counter() - began < 60  # one that is matched takes for ever
