"""One base model under the names that fleets have, and what is certain about them."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from subspace_peft import (
    SubspaceBasis,
    build_basis,
    build_clusters,
    complete_basis,
    compress_fleet,
    project_lora,
    update_basis,
)
from subspace_peft.base_names import DIFFERENT, SAME, UNKNOWN, difference, read_name, relation
from subspace_peft.builders import plan_build, rebuild_basis
from subspace_peft.cli.main import main
from subspace_peft.errors import BasisMismatchError, SourceError, SubspaceError
from subspace_peft.report import analyze_fleet, report_basis

from .models import bert, train_lora

M = "meta-llama/Meta-Llama-3-8B"
CACHED = ".cache/huggingface/hub/models--meta-llama--Meta-Llama-3-8B"
SHA = "0123456789abcdef0123456789abcdef01234567"

SPELLINGS = [
    M + "/",
    "meta-llama/meta-llama-3-8b",
    "META-LLAMA/Meta-Llama-3-8B",
    "Meta-Llama-3-8B",
    M + "@main",
    M + "@refs/pr/3",
    f"https://huggingface.co/{M}",
    f"https://huggingface.co/{M}/",
    f"https://huggingface.co/{M}/tree/main",
    f"https://hf.co/{M}?library=peft#files",
    f"huggingface.co/{M}",
    f"hf://{M}@main",
    f"/home/me/{CACHED}/snapshots/{SHA}",
    f"/home/me/{CACHED}/snapshots/{SHA}/",
    f"/home/me/{CACHED}",
    "C:\\Users\\me\\" + CACHED.replace("/", "\\") + f"\\snapshots\\{SHA}",
    f" {M}\n",
]
OPEN = [
    "unsloth/llama-3-8b-bnb-4bit",
    "unsloth/Meta-Llama-3-8B",
    "/mnt/models/Meta-Llama-3-8B",
    "./models/Meta-Llama-3-8B",
    "~/models/Meta-Llama-3-8B",
    "../Meta-Llama-3-8B",
    "C:\\models\\Meta-Llama-3-8B",
    "models\\Meta-Llama-3-8B",
    f"/home/me/{CACHED}/snapshots/{SHA}/inner",
    "https://example.org/Meta-Llama-3-8B",
    "https://huggingface.co/datasets/meta-llama/Meta-Llama-3-8B",
]
OTHERS = ["meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-70B", "gpt2", "google/gemma-2b"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [*((name, SAME) for name in SPELLINGS), *((n, UNKNOWN) for n in OPEN), *((n, DIFFERENT) for n in OTHERS)],
)
def test_what_two_names_mean_is_certain_open_or_excluded(name, expected):
    assert relation(M, name) == relation(name, M) == expected


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_recorded_as_the_hub_id(name):
    assert read_name(name).text.casefold() in (M.casefold(), "meta-llama-3-8b")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("C:\\Models\\x", "c:/models/X", SAME),
        ("C:\\models\\x", "D:\\models\\x", UNKNOWN),
        ("/a/x/", "/a/y/../x", SAME),
        ("/a/x", "/b/x", UNKNOWN),
        ("gpt2", "openai-community/gpt2", SAME),
        ("a/gpt2", "b/gpt2", UNKNOWN),
        (None, "gpt2", UNKNOWN),
        ("", "gpt2", UNKNOWN),
        ("file:///a/x", "/a/x", SAME),
    ],
)
def test_folders_and_ids_without_an_owner(one, other, expected):
    assert relation(one, other) == relation(other, one) == expected


def test_one_folder_by_any_path_is_one_model(tmp_path, monkeypatch):
    folder = tmp_path / "home" / "models" / "tiny"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    os.symlink(folder, tmp_path / "link")
    for name in ("models/tiny", "./models/tiny", "~/models/tiny", str(tmp_path / "link"), f"{folder}/"):
        assert relation(str(folder), name) == SAME, name
    other = tmp_path / "tiny"
    other.mkdir()
    assert relation(str(folder), str(other)) == UNKNOWN


def test_the_address_of_the_configured_hub_is_an_id(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.local:8080/prefix/")
    assert relation(f"http://hub.local:8080/prefix/{M}/tree/main", M) == SAME


def lora(folder: Path, base: str | None, seed: int) -> Path:
    g = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{key}.lora_A.weight": torch.randn(2, 16, generator=g),
        f"{key}.lora_B.weight": torch.randn(16, 2, generator=g),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return folder


@pytest.fixture
def fleet(tmp_path):
    """Make a fleet of LoRAs, one per name of a base model."""
    count = iter(range(1000))
    return lambda *names: [str(lora(tmp_path / f"lora{(n := next(count))}", name, n)) for name in names]


def test_spellings_of_one_id_make_one_basis_that_says_so(fleet):
    sources = fleet(M, M, M.lower(), f"/home/me/{CACHED}/snapshots/{SHA}", None)
    basis = build_basis(sources, k=2, progress=False)
    assert basis.base_model == M
    names = basis.info["base_model_names"]
    assert not names["said"] and names["unnamed"] == ["lora4"]
    # a user's own folders stay out of it
    assert names["replaced"] == {"lora2": M.lower(), "lora3": M}


@pytest.mark.parametrize("other", OPEN)
def test_what_is_not_certain_is_refused_with_the_remedy_and_taken_when_it_is_said(fleet, other):
    sources = fleet(M, M, other)
    with pytest.raises(SourceError, match=r"(?s)1 of 3 sources.*lora2: .*base_model_name= \(--base-model-name\)"):
        build_basis(sources, k=2, progress=False)
    basis = build_basis(sources, k=2, progress=False, base_model_name=f"https://huggingface.co/{M}")
    assert basis.base_model == M and basis.info["base_model_names"]["said"]
    assert [entry["base_model"] for entry in basis.info["sources"]] == [M] * 3
    replaced = basis.info["base_model_names"]["replaced"]["lora2"]
    assert replaced == (other if "\\" not in other and other[0] not in "/.~h" else f"…/{read_name(other).last}")


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_fleet_without_a_majority_lists_all_and_builds_of_none(fleet, skip_bad):
    sources = fleet("/a/x/checkpoint-1", "/b/y/checkpoint-1", "/c/z")
    with pytest.raises(SourceError, match=r"(?s)3 of 3 sources.*two folders both called 'checkpoint-1'.*/c/z"):
        build_basis(sources, k=2, progress=False, skip_bad=skip_bad)


def test_a_said_name_goes_through_every_way_to_build(fleet, tmp_path, capsys):
    sources = fleet(M, "unsloth/llama-3-8b-bnb-4bit", "/mnt/Meta-Llama-3-8B")
    (tmp_path / "fleet.yaml").write_text(json.dumps({"sources": sources, "k": 2, "base_model_name": M}))
    out = str(tmp_path / "out")
    assert main(["build", "--config", str(tmp_path / "fleet.yaml"), "--out", out, "--quiet"]) == 0
    assert "sources call it" in capsys.readouterr().out
    first = SubspaceBasis.from_pretrained(out)
    assert first.base_model == M
    assert main(["build", *sources, "-k", "2", "--base-model-name", M, "--dry-run"]) == 0
    assert plan_build(sources, k=2, base_model_name=M, progress=False).base_model == M
    again = rebuild_basis(out, progress=False)
    assert again == first and again.info["base_model_names"] == first.info["base_model_names"]
    (part,) = build_clusters(sources, 1, k=2, base_model_name=M, progress=False).bases
    assert part.base_model == M
    # its own sources are found again under their said name
    assert len(report_basis(out, progress=False).sources) == 3


def test_a_basis_remembers_the_ids_that_are_said_to_be_of_its_model(fleet, tmp_path):
    copy = "unsloth/llama-3-8b-bnb-4bit"
    said = build_basis(fleet(M, copy), k=2, progress=False, base_model_name=M)
    (new,) = fleet(copy)
    assert project_lora(new, said).source.base_model == copy
    plain = build_basis(fleet(M, M), k=2, progress=False)
    with pytest.raises(BasisMismatchError, match="--base-model-name"):
        project_lora(new, plain)
    assert project_lora(new, plain, base_model_name=M).source.base_model == M
    with pytest.raises(SubspaceError, match="another model on the Hub"):
        project_lora(new, plain, base_model_name="google/gemma-2b")


def test_update_complete_compress_and_analyze_take_the_name(fleet, tmp_path):
    old = build_basis(fleet("/mnt/llama", "/mnt/llama"), k=2, progress=False)
    old.save_pretrained(tmp_path / "old")
    new = fleet(M)
    with pytest.raises(SourceError, match="--base-model-name"):
        update_basis(old, new, progress=False)
    updated = update_basis(old, new, base_model_name=M, progress=False)
    assert updated.base_model == M
    assert updated.info["base_model_names"] == {"said": True, "replaced": {}, "unnamed": []}
    assert updated.info["update"]["arguments"]["base_model_name"] == M
    with pytest.raises(SubspaceError, match="another model on the Hub"):
        update_basis(updated, fleet(M), base_model_name="google/gemma-2b", progress=False)
    assert complete_basis(old, 4, base_model_name=M, progress=False).base_model == M
    with pytest.raises(SubspaceError, match="--base-model-name"):
        compress_fleet(new, old, tmp_path / "bundle", progress=False)
    compress_fleet(new, old, tmp_path / "bundle", base_model_name=M, min_energy=0, progress=False)
    entry = analyze_fleet([*new, *fleet("/x/y")], basis=old, base_model_name=M, progress=False).sources
    assert all("energy_kept" in each for each in entry)


@pytest.mark.parametrize("said", ["", "  ", 5, "a\nb"])
def test_a_name_that_is_none_is_refused(fleet, said):
    with pytest.raises(SubspaceError, match="base_model_name"):
        build_basis(fleet(M), k=2, progress=False, base_model_name=said)


@pytest.mark.parametrize(
    "names", [5, {}, {"said": 1, "replaced": {}, "unnamed": []}, {"said": True, "replaced": {"a": 1}, "unnamed": []}]
)
def test_an_odd_record_of_names_is_refused(fleet, tmp_path, names):
    folder = build_basis(fleet(M), k=2, progress=False).save_pretrained(tmp_path / "basis")
    config = json.loads((folder / "basis_config.json").read_text())
    (folder / "basis_config.json").write_text(json.dumps({**config, "base_model_names": names}))
    with pytest.raises(SubspaceError, match="base_model_names"):
        SubspaceBasis.from_pretrained(folder)


@pytest.mark.parametrize(("base", "warned"), [("/home/me/models/llama", True), (M, False), (None, False)])
def test_pushing_a_basis_of_a_folders_model_says_that_others_do_not_have_it(fleet, monkeypatch, base, warned):
    basis = build_basis(fleet(base), k=2, progress=False)
    monkeypatch.setattr("subspace_peft.basis.basis.upload", lambda *args, **kwargs: ("org/basis", "0" * 40))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        basis.push_to_hub("org/basis")
    assert any("base_model_name='org/model'" in str(each.message) for each in caught) == warned


@pytest.mark.parametrize(("own", "taken"), [("org/model", "org/model"), ("", None), ("/home/me/models/x", None)])
def test_the_model_at_hand_names_sources_that_name_none_where_it_has_a_hub_id(tmp_path, own, taken):
    folders = [str(train_lora(bert, tmp_path / f"l{i}", seed=i)) for i in range(2)]
    model = bert()
    model.config._name_or_path = own
    assert build_basis(folders, k=2, base_model=model, progress=False).base_model == taken
    for folder in folders:
        config = Path(folder, "adapter_config.json")
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "org/other"}))
    if taken:
        with pytest.raises(SubspaceError, match=r"another model on the Hub.*--base-model-name"):
            build_basis(folders, k=2, base_model=model, progress=False)
    else:
        assert build_basis(folders, k=2, base_model=model, progress=False).base_model == "org/other"


def test_names_without_an_owner_are_not_said_to_be_on_the_hub():
    assert difference("mybert", "mylm") == "two different models"
