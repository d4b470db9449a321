"""Builds written down in a file: sources and options, merged with flags; a basis's own record is such a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from subspace_peft import SubspaceBasis, __version__, build_basis, update_basis
from subspace_peft.builders.build_file import read_build_file
from subspace_peft.builders.options import BuildOptions, UpdateOptions
from subspace_peft.cli import main
from subspace_peft.energy import EnergyRecord
from subspace_peft.errors import SubspaceError

from .models import bert


def built(folder: Path, *arguments: str) -> SubspaceBasis:
    assert main(["build", *arguments, "--out", str(folder), "--quiet"]) == 0
    return SubspaceBasis.from_pretrained(folder)


def written(file: Path, text: str | dict) -> str:
    file.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return str(file)


def test_a_file_of_sources_and_options(fleets, tmp_path, monkeypatch):
    loras = tmp_path / "fleet" / "loras"
    for n, folder in enumerate(fleets[bert]):
        shutil.copytree(folder, loras / f"lora{n}")
    file = written(
        tmp_path / "fleet" / "fleet.yaml",
        """
        sources:
          - loras/lora[0-2]        # paths beside this file
          - model: loras/lora3
            weight: 2.5
          - {model: loras/lora4}
        k: 4
        directions: 2
        keep_cores: false
        max_memory: 1GB
        """,
    )
    folders = [str(loras / f"lora{n}") for n in range(5)]
    expected = build_basis(
        folders, k=4, directions=2, keep_cores=False, weights={folders[3]: 2.5}, max_memory="1GB", progress=False
    )
    basis = built(tmp_path / "basis", "--config", file)
    # a saved basis names its sources without saying where on this machine they are
    recorded = {**expected.info["build"], "weights": {"lora3": 2.5}}
    assert basis == expected and basis.info["build"] == recorded
    # flags win, and sources given there take the place of the file's
    basis = built(tmp_path / "other", *folders[:2], "--config", file, "-k", "3", "--weights", "norm", "--keep-cores")
    assert basis == build_basis(folders[:2], k=3, directions=2, weights="norm", keep_cores=True, progress=False)
    # from elsewhere as well
    monkeypatch.chdir(tmp_path / "fleet")
    assert main(["build", "--config", "fleet.yaml", "--dry-run", "--quiet"]) == 0
    assert built(tmp_path / "third", "--config", "fleet.yaml").fingerprint == expected.fingerprint


@pytest.fixture
def beside(fleets, tmp_path):
    """A folder with sources, a0 to a2, in its folder loras."""
    for n, folder in enumerate(fleets[bert][:3]):
        shutil.copytree(folder, tmp_path / "fleet" / "loras" / f"a{n}")
    return tmp_path / "fleet"


@pytest.mark.parametrize("kind", ["mapping", "file"])
@pytest.mark.parametrize("listed", ["loras/*", ["loras/a0", "./loras/a1/", "loras/a2"], "list.txt"], ids=str)
@pytest.mark.parametrize("key", ["loras/a0", "./loras/a0/", "a0"])
def test_keys_of_weights_are_looked_for_as_sources_are(beside, monkeypatch, key, listed, kind):
    (beside / "list.txt").write_text("loras/a0\nloras/a1\nloras/a2")
    (beside / "w.json").write_text(json.dumps({key: 2}))
    weights = {key: 2} if kind == "mapping" else "w.json"
    file = read_build_file(written(beside / "a.yaml", {"sources": listed, "weights": weights}))
    expected = build_basis(file.sources, k=2, weights={"a0": 2}, progress=False)
    for given in ([], [str(beside / "loras" / f"a{n}") for n in range(3)]):
        made = build_basis(given or file.sources, k=2, progress=False, **file.settings_for(given or None))
        assert made == expected
    monkeypatch.chdir(beside)
    assert main(["build", "loras/a0", "loras/a1", "--config", "a.yaml", "--dry-run", "--quiet"]) == 0
    monkeypatch.chdir(beside.parent)
    assert main(["build", "--config", "fleet/a.yaml", "--dry-run", "--quiet"]) == 0


def test_a_weight_of_a_source_goes_with_it(beside, capsys):
    sources = [{"model": "loras/a0", "weight": 2}, "loras/a1"]
    file = written(beside / "a.yaml", {"sources": sources, "k": 2})
    assert main(["build", str(beside / "loras/a1"), "--config", file, "--dry-run", "--quiet"]) == 0
    for key in ("loras/a0", "a0"):
        file = written(beside / "b.yaml", {"sources": sources, "weights": {key: 3}})
        assert main(["build", "--config", file, "--dry-run", "--quiet"]) == 1
        assert "loras/a0' has a weight of its own" in capsys.readouterr().err


def test_a_source_with_its_hash_has_the_name_that_the_file_gives(beside, tmp_path, capsys):
    build_basis([str(beside / "loras/a0")], k=2, progress=False).save_pretrained(tmp_path / "old")
    recorded = SubspaceBasis.from_pretrained(tmp_path / "old").info["sources"][0]["sha256"]
    first = {"model": "loras/a0", "name": "first", "sha256": recorded}
    file = written(beside / "a.yaml", {"sources": [first, "loras/a1"], "weights": {"first": 2}, "k": 2})
    basis = built(tmp_path / "basis", "--config", file)
    assert [entry["name"] for entry in basis.info["sources"]] == ["first", "a1"]
    file = written(beside / "b.yaml", {"sources": [{**first, "weight": 3}], "weights": {"first": 2}})
    assert main(["build", "--config", file, "--dry-run"]) == 1
    assert "has a weight of its own, and another one in weights, as 'first'" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["gone", "broken"])
def test_the_weight_of_a_source_that_is_left_out_goes_with_it(beside, tmp_path, capsys, how):
    if how == "gone":
        shutil.rmtree(beside / "loras" / "a1")
    else:
        (beside / "loras" / "a1" / "adapter_model.safetensors").write_bytes(b"")
    sources = ["loras/a0", {"model": str(beside / "loras" / "a1"), "weight": 2}, {"model": "loras/a2", "weight": 3}]
    file = written(beside / "a.yaml", {"sources": sources, "k": 2})
    assert main(["build", "--config", file, "--dry-run", "--quiet"]) == 1
    assert "would be refused" in capsys.readouterr().out
    assert main(["build", "--config", file, "--dry-run", "--quiet", "--skip-bad"]) == 0
    basis = built(tmp_path / "basis", "--config", file, "--skip-bad")
    assert basis.info["build"]["weights"] == {"a2": 3.0}
    assert built(tmp_path / "again", "--config", str(tmp_path / "basis")) == basis
    # by name, and where no weight is left
    places = [str(beside / "loras" / f"a{n}") for n in range(3)]
    basis = build_basis(places, k=2, weights={"a1": 2}, skip_bad=True, progress=False)
    assert basis == build_basis([places[0], places[2]], k=2, progress=False)
    assert basis.info["build"]["weights"] == "equal"


def test_json_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"sources": ["a"], "k": 3}), encoding="utf-8-sig")
    assert read_build_file(tmp_path / "a.json").settings == {"k": 3}
    (tmp_path / "a.json").write_text('{"k": 3, "k": 4}')
    with pytest.raises(SubspaceError, match="the key 'k' is there twice"):
        read_build_file(tmp_path / "a.json")


@pytest.mark.parametrize(("key", "value"), [("sources", 5), ("modules", 5)])
def test_a_basiss_record_with_nonsense(tmp_path, key, value):
    config = {"format_version": 1, "modules": {}, "build": {"builder": "base-weights"}, "sources": [], key: value}
    with pytest.raises(SubspaceError, match=f"{key}: 5"):
        read_build_file(written(tmp_path / "basis_config.json", json.dumps(config)))


def test_clusters_precision_and_models_in_a_file(fleets, tmp_path):
    bert().bert.save_pretrained(tmp_path / "model")
    file = written(tmp_path / "a.yaml", {"sources": fleets[bert], "k": 3, "clusters": 2, "precision": "int8"})
    assert main(["build", "--config", file, "--out", str(tmp_path / "parts"), "--quiet"]) == 0
    assert SubspaceBasis.from_pretrained(tmp_path / "parts" / "cluster-0").precision == "int8"
    control = {"builder": "base-weights", "base_model": "model", "target_modules": ["query"], "k": 3}
    basis = built(tmp_path / "control", "--config", written(tmp_path / "b.json", json.dumps(control)))
    assert basis.describe_k() == "k=3" and all(name.endswith("query") for name in basis)
    again = built(tmp_path / "again", "--config", str(tmp_path / "control"), "--base-model", str(tmp_path / "model"))
    assert again == basis
    like = written(tmp_path / "c.yaml", {"builder": "random", "like": "control"})
    assert built(tmp_path / "random", "--config", like).shapes() == basis.shapes()


@pytest.mark.parametrize(
    "arguments",
    [
        {"k": 0.8, "weights": "norm", "directions": 2},
        {"k": 4, "k_in": 2, "alternations": 0, "keep_cores": False, "leave_one_out": True},
        {"k": 31, "complete": "random", "seed": 3},
        {"budget": 100},
        {"k": 3, "builder": "random", "seed": 5},
    ],
    ids=str,
)
def test_a_basiss_record_is_such_a_file(fleets, tmp_path, arguments, capsys):
    old = build_basis(fleets[bert], **arguments, progress=False).to_precision("int8")
    old.save_pretrained(tmp_path / "old")
    # the folder itself, and its config
    for number, place in enumerate((tmp_path / "old", tmp_path / "old" / "basis_config.json")):
        again = built(tmp_path / f"again{number}", "--config", str(place))
        assert again == old and again.info == {**old.info, "subspace_peft_version": __version__}
    assert main(["build", "--from-config", str(tmp_path / "old"), "--dry-run", "--quiet"]) == 0
    if arguments.get("builder") == "random":
        return
    # written out by hand, with and without the hashes, beside the basis's config, whose paths they have
    config = json.loads((tmp_path / "old" / "basis_config.json").read_text())
    for number, sources in enumerate((config["sources"], [entry["location"] for entry in config["sources"]])):
        file = written(
            tmp_path / "old" / f"{number}.yaml", {**config["build"], "sources": sources, "precision": "int8"}
        )
        assert built(tmp_path / f"written{number}", ("--config", "--from-config")[number], file) == old


def test_weights_by_source_survive_their_record(fleets, tmp_path):
    old = build_basis(fleets[bert], k=3, weights={fleets[bert][1]: 3, "lora2": 0.5}, progress=False)
    old.save_pretrained(tmp_path / "old")
    assert built(tmp_path / "again", "--config", str(tmp_path / "old")) == old
    assert built(tmp_path / "flags", "--config", str(tmp_path / "old"), "--weights", "equal") != old


def test_sources_of_a_record_have_to_be_what_they_were(fleets, tmp_path, capsys):
    copies = [shutil.copytree(folder, tmp_path / f"lora{n}") for n, folder in enumerate(fleets[bert][:3])]
    build_basis(list(map(str, copies)), k=3, progress=False).save_pretrained(tmp_path / "old")
    shutil.rmtree(copies[0])
    shutil.copy(Path(fleets[bert][4], "adapter_model.safetensors"), copies[1])
    for dry in ([], ["--dry-run"]):
        given = ["build", "--config", str(tmp_path / "old"), "--out", str(tmp_path / "new"), "--quiet", *dry]
        assert main(given) == 1
        said = capsys.readouterr().err
        assert "2 of 3 sources are not what they were" in said
        assert f"{copies[0]}: there is no such folder" in said and f"{copies[1]}: its file has sha256" in said
    assert not (tmp_path / "new").exists()


def test_a_commit_on_the_hub_is_kept():
    def sources(*entries):
        file = Path("nowhere/fleet.yaml")
        from subspace_peft.builders import build_file

        return [build_file._source(file, entry) for entry in entries]

    found = sources(
        {"model": "org/a", "revision": "abc"}, {"model": "org/a:x", "revision": "abc", "weight": 2}, "org/b"
    )
    assert found == [("org/a@abc", None), ("org/a@abc:x", 2), ("org/b", None)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sources: [a]\nalternation: 3", "'alternation' (did you mean 'alternations'?)"),
        ("sources: [a]\nskip-bad: true\nk: 3", "'skip-bad' (did you mean 'skip_bad'?)"),
        ("zebra: 3", "unknown: 'zebra'. Known are sources, k, budget"),
        ("sources: [{modell: a}]", "'modell' (did you mean 'model'?)"),
        ("sources: [{weight: 2}]", "give its path or Hub id as `model:`"),
        ("sources: [3]", "source 3: give a path"),
        ("sources: [{model: a, weight: 2}]\nweights: norm", "Leave one of the two out"),
        ("- a\n- b", "it holds a list"),
        ("sources: [a", "no build can be read from it"),
        ("", "it holds a NoneType"),
        ("sources: 5", "sources: 5: give a list"),
        ("sources: true", "sources: True: give a list"),
        ("sources: 1.5", "sources: 1.5: give a list"),
        ("sources: false", "sources: False: give a list"),
        ("sources: [a]\nlike: 5", "like: 5: give a folder or a Hub id"),
        ("sources: [a]\nbase_model: ''", "base_model: '': give a folder or a Hub id"),
        ("sources: [a]\nlike: [a]", "like: ['a']: give"),
        ("sources: [a]\nbase_model: [a]", "base_model: ['a']: give"),
        ("sources: [{model: a, name: b}]", "source 'a': name goes with the source's `sha256:`"),
        ("sources: [{model: a, converted_from: LOHA}]", "source 'a': converted_from goes with"),
        ("sources: [{model: a, sha256: c, name: n}, {model: b, sha256: d, name: n}]", "'n': two sources"),
        ("sources: [a]\nk: 3\nk: 4", "the key 'k' is there twice"),
        ("sources: [{model: a, model: b}]", "the key 'model' is there twice"),
        ("weights: {a: 1, a: 2}", "the key 'a' is there twice"),
    ],
)
def test_files_that_describe_no_build(tmp_path, text, said):
    with pytest.raises(SubspaceError) as caught:
        read_build_file(written(tmp_path / "fleet.yaml", text))
    assert str(caught.value).startswith(f"{tmp_path / 'fleet.yaml'}: ") and said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("k: many", "build: k: 'many': give a number of directions"),
        ("k: '3'", "build: k: '3'"),
        ("skip_bad: 'no'", "build: skip_bad: 'no': give True or False"),
        ("precision: int3", "build: precision: 'int3'"),
        ("clusters: 0", "build: clusters: 0"),
        ("clusters: 1.5", "build: clusters: 1.5"),
        ("max_memory: lots", "build: max_memory: 'lots'"),
        ("max_memory: true", "build: max_memory: True is no size"),
        ("partial: 2", "build: partial: 2: give True or False"),
        ("target_modules: '('", "build: target_modules: '(': it is no regular expression"),
        ("complete: base-weights", "pass the base model: --base-model"),
        ("weights: {nobody: 2}", "'nobody' is no source's name"),
        ("weights: 3", "weights"),
    ],
)
def test_values_in_a_file_are_checked_as_flags_are_and_named_as_there(fleets, tmp_path, capsys, text, said):
    file = written(tmp_path / "fleet.yaml", f"sources: {json.dumps(fleets[bert][:2])}\n{text}")
    errors = []
    for dry in ([], ["--dry-run"]):
        assert main(["build", "--config", file, "--out", str(tmp_path / "out"), "--quiet", *dry]) == 1
        errors.append(capsys.readouterr().err)
    assert errors[0] == errors[1] and said in errors[0]


def test_flags_beside_a_file_are_named_as_flags(fleets, tmp_path, capsys):
    file = written(tmp_path / "a.yaml", {"sources": fleets[bert][:2], "k": 3, "seed": True})
    for given, said in ((["-k", "0", "--seed", "1"], "build: -k 0: give"), ([], "build: seed: True: give a whole")):
        assert main(["build", "--config", file, "--dry-run", *given]) == 1
        assert said in capsys.readouterr().err


SAVED = Path(__file__).parent / "saved" / "v0.1.0"


@pytest.mark.parametrize("name", [folder.name for folder in sorted((SAVED / "bases").iterdir())])
def test_records_of_earlier_versions_are_understood(name):
    config = json.loads((SAVED / "bases" / name / "basis_config.json").read_text())
    assert BuildOptions(**config["build"]).record() == config["build"]
    if "update" in config:
        record = dict(config["update"]["arguments"])
        tasks = record.pop("tasks")
        assert UpdateOptions(**record).record(tasks) == config["update"]["arguments"]


def test_a_basis_of_an_earlier_version_is_built_again(tmp_path, monkeypatch):
    monkeypatch.chdir(SAVED)
    old = SubspaceBasis.from_pretrained("bases/small")
    new = built(tmp_path / "new", "--config", "bases/small")
    # other platforms round otherwise, so the fingerprint may be another
    assert new.shapes() == old.shapes() and new.info["build"] == old.info["build"]
    assert EnergyRecord.of(new.info).kept == pytest.approx(EnergyRecord.of(old.info).kept, abs=1e-5)


def test_updated_bases_are_built_again_as_they_were(fleets, bases, tmp_path, capsys):
    old = update_basis(
        SubspaceBasis.from_pretrained(bases[bert].location), new(fleets, tmp_path), add=2, progress=False
    )
    old.save_pretrained(tmp_path / "old")
    assert main(["build", "--config", str(tmp_path / "old"), "--dry-run"]) == 1
    assert "`subspace-peft build --from-config`" in capsys.readouterr().err
    assert main(["build", "--from-config", str(tmp_path / "old"), "--dry-run", "--quiet"]) == 0
    assert built(tmp_path / "again", "--from-config", str(tmp_path / "old")) == old


def new(fleets, tmp_path) -> list[str]:
    from .models import train_lora

    return [str(train_lora(bert, tmp_path / "new", seed=99))]
