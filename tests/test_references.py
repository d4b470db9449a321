"""What may be listed as a source: files, text files, patterns, places inside Hub repositories, collections; and what
repeats another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from subspace_peft import build_basis
from subspace_peft.builders.duplicates import cosine, duplicates, sketch
from subspace_peft.cli import main
from subspace_peft.errors import SourceError
from subspace_peft.hub import looks_like_path, same_model, split_inside
from subspace_peft.sources import expand, open_source

from .hub import Hub, commit_of
from .models import bert
from .test_build import deltas, fleet
from .test_hub import client

# -- names
# --------------------------------------------------------------------------------------------------------------


def test_names_of_one_model():
    same = same_model
    assert same(None, "org/model") and same("org/model", None) and same("org/model", "org/model")
    assert same("model", "org/model") and same("org/model", "model") and same("/a/model/", "/a/model")
    assert not same("org/model", "other/model") and not same("del", "org/model") and not same("/a/model", "/b/model")


def test_what_a_references_text_means():
    assert split_inside("org/name") == ("org/name", None, None)
    assert split_inside("org/name@v1:a/b/") == ("org/name", "v1", "a/b")
    assert split_inside("org/name:x.safetensors") == ("org/name", None, "x.safetensors")
    assert split_inside("org/name@refs/pr/3") == ("org/name", "refs/pr/3", None)
    paths = ("/a", "./a", "~/a", "a/b/c", "a\\b")
    assert all(map(looks_like_path, paths))
    assert not any(map(looks_like_path, ("a/b", "name", "a/b@refs/pr/3", "a/b:c/d/e")))


def renamed(folders, tmp_path: Path, *bases: str | None) -> list[str]:
    made = []
    for number, (folder, base) in enumerate(zip(folders, bases, strict=True)):
        copy = tmp_path / "renamed" / f"lora{number}"
        shutil.copytree(folder, copy)
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        made.append(str(copy))
    return made


def test_an_older_id_without_its_owner_is_the_same_base_model(fleets, tmp_path):
    folders = renamed(fleets[bert], tmp_path, "base", "org/base", "base", None, "base")
    assert build_basis(folders, k=3, progress=False).base_model == "org/base"
    others = renamed(fleets[bert][:4], tmp_path / "more", "org/base", "base", "base", "other/base")
    with pytest.raises(SourceError, match=r"1 of 4 .*\n.*'other/base', the others on 'org/base'.*--base-model-name"):
        build_basis(others, progress=False)


# -- lists and patterns
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(fleets, tmp_path) -> Path:
    """``fleet/lora0 … lora2`` beside a README."""
    for number, source in enumerate(fleets[bert][:3]):
        shutil.copytree(source, tmp_path / "fleet" / f"lora{number}")
    (tmp_path / "fleet" / "README.md").write_text("three adapters")
    return tmp_path / "fleet"


def test_lists_and_patterns_stand_for_what_they_name(folder, fleets, tmp_path, monkeypatch):
    plain = build_basis([str(folder / f"lora{n}") for n in range(3)], k=3, progress=False).fingerprint
    (folder.parent / "fleet.txt").write_text(
        f"# the fleet\n\n fleet/lora0  # the first\n{folder / 'lora1'}\nfleet/*2\n", encoding="utf-8"
    )
    ways = [
        str(folder / "*"),
        folder / "lora[0-2]",
        str(folder / "**" / "adapter_config.json"),
        str(folder.parent / "fleet.txt"),
        [folder / "lora0", str(folder / "lora[12]")],
        [f"{folder}/*/adapter_model.safetensors"],
    ]
    for way in ways:
        assert build_basis(way, k=3, progress=False).fingerprint == plain, way
    monkeypatch.chdir(folder)
    assert build_basis("lora*", k=3, progress=False).fingerprint == plain
    assert main(["build", "../fleet.txt", "--out", str(tmp_path / "b"), "-k", "3", "--quiet", "--json"]) == 0
    assert json.loads((tmp_path / "b" / "basis_config.json").read_text())["fingerprint"] == plain


def test_a_folders_own_name_may_hold_brackets(folder):
    odd = folder.rename(folder.parent / "fleet [v1]")
    assert open_source(str(odd / "lora0")).name == "lora0"
    assert expand(str(odd / "lora0")) == ([str(odd / "lora0")], [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("empty.txt", "no source is listed"),
        ("nowhere.txt", "cannot be read"),
        ("nested.txt", "list within a list"),
        ("binary.txt", "cannot be read"),
        ("nothing-*", "matches no folder"),
        ("fleet", r"is not in there.*Its folders are: .*/\*"),
        ("fleet/README.md", r"no \.safetensors file"),
    ],
)
def test_references_that_name_nothing(folder, tmp_path, text, message):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "nested.txt").write_text("empty.txt\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match=message) as caught:
        build_basis([str(tmp_path / text), "/no/such/folder"], progress=False)
    assert "2 of 2" in str(caught.value) and "/no/such/folder" in str(caught.value)


# -- the Hub
# --------------------------------------------------------------------------------------------------------------


def test_folders_and_files_inside_repositories_and_collections(folder, fleets, tmp_path):
    shutil.copy(folder / "lora1" / "adapter_model.safetensors", folder / "style.safetensors")
    repos = {"org/many": {"main": folder, "v1": folder}, "org/one": {"main": folder / "lora2"}}
    collections = {
        "org/fleet-0123": [("model", "org/one"), ("dataset", "org/data")],
        "org/none-1": [("space", "org/x")],
    }
    program = """
        from subspace_peft import build_basis
        from subspace_peft.sources import open_source
        from subspace_peft.errors import SourceError
        basis = build_basis(["org/many@v1:lora0", "org/many:lora1", "collection:org/fleet-0123"], k=3, progress=False)
        print(basis.fingerprint)
        print([(s["name"], s["location"], s["revision"]) for s in basis.info["sources"]])
        print(open_source("org/many:style.safetensors").name)
        for bad in ("org/many:lora9", "org/many", "org/many:none.safetensors", "org/nobody", "org/many:a.bin"):
            try:
                open_source(bad)
            except SourceError as error:
                print(error)
        try:
            build_basis(["collection:org/none-1", "collection:org/unknown-1"], progress=False)
        except SourceError as error:
            print(str(error).replace("\\n", " "))
    """
    with Hub(repos, collections) as hub:
        done = client(hub, tmp_path / "home", program)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == build_basis(fleets[bert][:3], k=3, progress=False).fingerprint
    many, one = commit_of(folder), commit_of(folder / "lora2")
    assert lines[1] == str(
        [("lora0", "org/many:lora0", many), ("lora1", "org/many:lora1", many), ("one", "org/one", one)]
    )
    assert lines[2] == "style"
    rest = "\n".join(lines[3:])
    assert "org/many:lora9: the repository has no lora9/adapter_config.json" in rest
    assert "org/many: the repository has no adapter_config.json" in rest and "as org/many:folder" in rest
    assert "there is no none.safetensors in the repository at revision main" in rest
    assert "org/nobody: there is no such folder, and the Hub gave no adapter" in rest
    assert "org/many:a.bin: it holds a.bin" in rest and "--allow-bin" in rest
    assert "2 of 2 sources" in rest and "there is no model in it" in rest and "gave no such collection" in rest


# -- pickled files
# ----------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.write_text, (self.file, "executed")


def test_pickled_weights_only_when_asked_for_and_never_as_code(fleets, tmp_path, capsys):
    old = Path(shutil.copytree(fleets[bert][0], tmp_path / "old"))
    torch.save(load_file(old / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match="allow_bin=True"):
        open_source(str(old))
    mixed = [str(old), *fleets[bert][1:3]]
    basis = build_basis(mixed, k=3, allow_bin=True, progress=False)
    assert basis.fingerprint == build_basis(fleets[bert][:3], k=3, progress=False).fingerprint
    assert main(["build", *mixed, "--out", str(tmp_path / "b"), "-k", "3", "--quiet", "--allow-bin"]) == 0
    assert basis.fingerprint in capsys.readouterr().out

    for content in ({"x": Trap(tmp_path / "trap")}, {"x": "text"}, [torch.zeros(2)]):
        torch.save(content, old / "adapter_model.bin")
        with pytest.raises(SourceError, match=r"adapter_model\.bin"):
            open_source(str(old), allow_bin=True)
    (old / "adapter_model.bin").write_bytes(b"no pickle")
    with pytest.raises(SourceError, match="weights_only=True"):
        open_source(str(old), allow_bin=True)
    assert not (tmp_path / "trap").exists()


# -- duplicates
# -------------------------------------------------------------------------------------------------------------


def test_copies_of_a_source_are_listed_all_at_once_and_can_be_left_out(fleets, tmp_path):
    same, half = tmp_path / "same", tmp_path / "half"
    for copy in (same, half):
        shutil.copytree(fleets[bert][0], copy)
    file = half / "adapter_model.safetensors"
    save_file({key: value.to(torch.bfloat16) for key, value in load_file(file).items()}, file)
    listed = [*fleets[bert], str(same), str(half)]
    with pytest.raises(SourceError, match=r"2 of 7") as caught:
        build_basis(listed, k=3, progress=False)
    text = str(caught.value)
    assert f"{same}: a duplicate of {fleets[bert][0]}: the same bytes" in text
    assert f"{half}: a duplicate of {fleets[bert][0]}: cosine of the updates" in text
    basis = build_basis(listed, k=3, skip_bad=True, progress=False)
    assert basis.fingerprint == build_basis(fleets[bert], k=3, progress=False).fingerprint
    assert [entry["location"] for entry in basis.info["skipped"]] == [str(same), str(half)]


def test_the_same_update_in_another_gauge_is_a_duplicate_and_a_relative_is_none():
    states = fleet(3)
    turned = {key: value * (5.0 if "lora_B" in key else 0.2) for key, value in states[0].items()}
    with pytest.raises(
        SourceError, match=r"in memory, number 4: a duplicate of in memory, number 1: cosine .* 1\.00000"
    ):
        build_basis([*states, turned], progress=False)
    relative = {key: value + 0.1 * torch.randn_like(value) for key, value in states[0].items()}
    assert len(build_basis([*states, relative], k=4, progress=False).info["sources"]) == 4


def test_cosines_are_those_of_the_dense_updates_and_sketches_agree_with_them():
    states = fleet(2)
    sources = [open_source(state) for state in states]
    dense = [torch.cat([deltas([state], module)[0].flatten() for module in ("a.q", "a.v")]) for state in states]
    expected = torch.cosine_similarity(*dense, dim=0).item()
    assert cosine(*sources) == pytest.approx(expected, abs=1e-12)
    assert cosine(sources[0], sources[0]) == pytest.approx(1)
    update = sources[0].factors("a.q")
    many = sketch(update, 20_000)
    # each probe's square is ‖ΔW‖² on average
    assert many.square().mean().sqrt().item() == pytest.approx(update.norm(), rel=0.05)
    sketches = [torch.stack([sketch(source.factors(name)) for name in source.keys]) for source in sources]
    assert duplicates(sources, sketches) == []
    assert duplicates(sources, sketches, same=-1) == []  # the sketch sees that they differ, and nothing is read again
