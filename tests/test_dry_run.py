"""A dry run refuses whatever the build refuses, in the same words, and plans what the build then makes."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from subspace_peft import SubspaceBasis, build_basis, build_clusters, update_basis
from subspace_peft.builders import BuildOptions, Resources, plan_build, plan_rebuild
from subspace_peft.builders.options import CompleteOptions, UpdateOptions
from subspace_peft.cli import main
from subspace_peft.cli.main import parser
from subspace_peft.errors import SubspaceError

from .models import bert, gpt2
from .test_fleet import broken

# flags → a part of the error; `FLEET` and the other words in capitals are filled in from `world`
BAD = [
    (["FLEET", "-k", "many"], "'many' is no number"),
    (["FLEET", "-k", "0"], "-k 0: give a number of directions"),
    (["FLEET", "-k", "1.5"], "-k 1.5"),
    (["FLEET", "-k", "0.5", "--k-in", "3"], "decides k_in itself"),
    (["FLEET", "--k-in", "0"], "--k-in 0: give a whole number, at least 1"),
    (["FLEET", "--budget", "0"], "--budget 0: give how many"),
    (["FLEET", "--budget", "1"], "4 modules take at least a parameter each"),
    (["FLEET", "--budget", "100", "-k", "4"], "leave k, k_in and complete out"),
    (["FLEET", "--budget", "100", "--builder", "eigenlora"], "not 'eigenlora'"),
    (["FLEET", "--builder", "eigenlora", "-k", "0.5"], "for the builder `adapters`"),
    (["--builder", "eigenlora"], "needs source adapters"),
    (["--builder", "random"], "has to know which modules"),
    (["--builder", "base-weights", "--like", "BASIS"], "not among the base model's given target_modules"),
    (["FLEET", "--weights", "/nope.json"], "no such file"),
    (["FLEET", "--weights", "STRANGERS"], "no source's name or place"),
    (["FLEET", "--alternations", "-1"], "--alternations -1: give a whole number, at least 0"),
    (["FLEET", "--directions", "-1"], "--directions -1"),
    (["FLEET", "--directions", "1000000"], "is too little"),
    (["FLEET", "--keep-cores", "--max-memory", "1KB"], "is too little"),
    (["FLEET", "--leave-one-out", "--max-memory", "lots"], "--max-memory 'lots' is no size"),
    (["FLEET", "--complete", "base-weights"], "pass the base model: --base-model"),
    (["FLEET", "--complete", "random", "-k", "0.5"], "filled up to a number of directions"),
    (["FLEET", "--complete", "base-weights", "-k", "31", "--base-model", "GPT2"], "no linear layer of the base model"),
    (["FLEET", "--base-model", "/no/such/model"], "/no/such/model"),
    (["FLEET", "--base-model-name", ""], "give the base model's id on the Hub"),
    (["FLEET", "--base-model", "EMPTY"], "no model can be loaded from it"),
    (["--builder", "random", "--base-model", "BERT"], "Say which of the base model's modules: --target-modules"),
    (["--builder", "random", "--base-model", "BERT", "--target-modules", "nope"], "matches no linear layer"),
    (["--builder", "random", "--like", "/no/such/basis"], "/no/such/basis"),
    (["NAN", "--skip-bad"], "1 of 1 sources cannot be used"),
    (["FLEET", "--k-pattern", "query"], "--k-pattern ['query']: give names of modules"),
    (["FLEET", "--k-pattern", "query=0"], "k_pattern: 'query' has 0; give a whole number"),
    (["FLEET", "--k-pattern", "query=2", "query=3"], "a name comes twice"),
    (["FLEET", "--k-pattern", "query=2", "nowhere=3"], "k_pattern: 'nowhere' fits none of the"),
    (["FLEET", "--k-pattern", "query=2", "--k-in", "3"], "k_pattern does not go with k_in"),
    (["FLEET", "--k-pattern", "query=2", "--complete", "random"], "k_pattern does not go with complete"),
    (["FLEET", "--k-pattern", "query=2", "--clusters", "2"], "--clusters does not go with --k-pattern"),
    (["FLEET", "--k-pattern", "query=2", "--budget", "100"], "leave k_pattern out, or the budget"),
    (["FLEET", "--clusters", "0"], "--clusters 0: give a number from 1 on"),
    (["FLEET", "--clusters", "2.5"], "--clusters '2.5': give a number from 1 on"),
    (["FLEET", "--clusters", "many"], "--clusters 'many'"),
    (["FLEET", "--clusters", "99"], "there are 5 sources"),
    (["FLEET", "--clusters", "2", "-k", "0.5"], "clusters are compared at a number of directions"),
    (["FLEET", "--clusters", "2", "--like", "BASIS"], "--clusters does not go with --like"),
    (["FLEET", "--clusters", "2", "--seed", "1", "--partial", "--builder", "random"], "does not go with --builder"),
    (["--clusters", "2"], "needs source adapters"),
    (
        ["FLEET", "--weights", "/nope.json", "--clusters", "7", "--builder", "eigenlora", "--directions", "100000"],
        "--clusters does not go with --",
    ),
    (["FLEET", "--out", "FILE"], "is a file; a basis is written into a folder"),
    (["FLEET", "--out", "FILE/basis"], "file is a file, where a folder is needed"),
    (["FLEET", "--out", "/proc/nowhere/basis"], "you have no permission for that in /proc"),
    (["FLEET", "--out", "BERT"], "holds a model"),
    (["FLEET", "-k", "3", "--out", "BASIS"], "holds a basis"),
    (["ONE", "--out", "ONE"], "from which a basis would be made"),
    (["--config", "/no/such.yaml"], "/no/such.yaml: no build can be read"),
    (["--config", "TYPO"], "'alternation' (did you mean 'alternations'?)"),
    (["--from-config", "/no/such/basis"], "/no/such/basis"),
    (["--from-config", "BASIS", "-k", "3"], "leave -k out"),
    (["--from-config", "BASIS", "FLEET"], "takes the sources on record"),
    (["--from-config", "BASIS", "--config", "TYPO"], "two builds"),
    (["--from-config", "INT8", "--precision", "bfloat16"], "is stored as int8"),
    (["--from-config", "GONE"], "1 of its sources are not what they were"),
]
# what argparse refuses
UNREADABLE = [
    ["--builder", "best"],
    ["--complete", "zeros"],
    ["--precision", "int3"],
    ["--seed", "x"],
    ["--alternations", "many"],
    ["--budget", "2.5"],
]
GOOD = [
    ["FLEET", "-k", "3"],
    ["FLEET", "-k", "3", "--base-model-name", "org/base"],
    ["FLEET", "-k", "3", "--k-in", "2", "--weights", "norm", "--alternations", "0"],
    ["FLEET", "-k", "3", "--weights", "VOTES", "--no-leave-one-out", "--no-keep-cores"],
    ["FLEET", "-k", "0.9", "--leave-one-out", "--keep-cores"],
    ["FLEET", "-k", "3", "--builder", "eigenlora", "--directions", "2"],
    ["FLEET", "-k", "31", "--complete", "random", "--seed", "3"],
    ["ONE", "-k", "7", "--complete", "base-weights", "--base-model", "BERT"],
    ["FLEET", "NAN", "-k", "3", "--skip-bad"],
    ["FLEET", "FEWER", "-k", "3", "--partial"],
    ["BIN", "-k", "3", "--allow-bin"],
    ["FLEET", "-k", "3", "--precision", "int8", "--max-memory", "100MB"],
    ["--builder", "random", "--like", "BASIS", "--directions", "2"],
    ["--builder", "random", "FLEET", "-k", "3", "--k-in", "40"],
    ["--builder", "random", "--base-model", "BERT", "--target-modules", "query", "dense", "-k", "40"],
    ["--builder", "base-weights", "--base-model", "BERT", "--target-modules", "query", "dense", "-k", "40"],
    ["FLEET", "-k", "3", "--k-pattern", "query=2", "value=4"],
    ["FLEET", "-k", "0.9", "--k-pattern", "query=2"],
    ["--builder", "random", "--base-model", "BERT", "--target-modules", "query", "dense", "--k-pattern", "que.*=5"],
    ["--config", "BASIS", "--k-pattern", "query=2"],
    ["--config", "BASIS"],
    ["--from-config", "BASIS"],
    ["--from-config", "BASIS/basis_config.json"],
    ["--from-config", "INT8"],
    ["--from-config", "RANDOM"],
    ["--from-config", "UPDATED"],
    ["FLEET", "-k", "3", "--force"],
]


@pytest.fixture(scope="module")
def world(fleets, tmp_path_factory):
    """Words of the tables → what they stand for."""
    root = tmp_path_factory.mktemp("world")
    fleet = fleets[bert]
    nan, fewer = (str(broken(fleet[0], root, how)) for how in ("nan", "fewer-modules"))
    pickled = Path(shutil.copytree(fleet[0], root / "pickled"))
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    for name, make in (("bert", bert), ("gpt2", gpt2)):
        model = make()
        (model.bert if make is bert else model.transformer).save_pretrained(root / name)
    (root / "file").write_text("")
    (root / "empty").mkdir()
    (root / "empty" / "config.json").write_text("{}")
    (root / "strangers.json").write_text(json.dumps({"someone/else": 2}))
    (root / "votes.json").write_text(json.dumps({fleet[0]: 2}))
    (root / "typo.yaml").write_text("sources: [loras/*]\nalternation: 3\n")
    basis = build_basis(fleet[:4], k=4, progress=False)
    basis.save_pretrained(root / "basis")
    basis.to_precision("int8").save_pretrained(root / "int8")
    build_basis(builder="random", like=basis, progress=False).save_pretrained(root / "random")
    update_basis(SubspaceBasis.from_pretrained(root / "basis"), fleet[4:], add=2, progress=False).save_pretrained(
        root / "updated"
    )
    lost = shutil.copytree(fleet[0], root / "lost")
    build_basis([str(lost)], k=2, progress=False).save_pretrained(root / "gone")
    shutil.rmtree(lost)
    places = {"BASIS": "basis", "INT8": "int8", "RANDOM": "random", "UPDATED": "updated", "GONE": "gone"}
    places |= {
        "BERT": "bert",
        "GPT2": "gpt2",
        "FILE": "file",
        "EMPTY": "empty",
        "STRANGERS": "strangers.json",
        "VOTES": "votes.json",
    }
    return {
        "FLEET": fleet,
        "ONE": fleet[:1],
        "NAN": [nan],
        "FEWER": [fewer],
        "BIN": [str(pickled)],
        "TYPO": [str(root / "typo.yaml")],
        **{word: [str(root / place)] for word, place in places.items()},
    }


def filled(arguments, world) -> list[str]:
    found = []
    for each in arguments:
        word, slash, rest = each.partition("/")
        found += [text + slash + rest for text in world[word]] if word in world else [each]
    return found


def ran(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["build", *arguments, "--quiet", "--json"])
    said, error = capsys.readouterr()
    # transformers shows a bar of its own where it loads a base model
    return code, said, error[error.find("subspace-peft build:") :] if "subspace-peft build:" in error else ""


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_both_refuse_in_the_same_words(arguments, message, world, tmp_path, capsys):
    given = filled(arguments, world)
    given += [] if "--out" in given else ["--out", str(tmp_path / "out")]
    planned, built = ran(capsys, *given, "--dry-run"), ran(capsys, *given)
    assert planned == built
    assert built[:2] == (1, "") and message in built[2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", UNREADABLE, ids=" ".join)
def test_values_that_cannot_be_read_end_both(arguments):
    for dry in ([], ["--dry-run"]):
        with pytest.raises(SystemExit, match="2"):
            main(["build", *arguments, *dry])


@pytest.mark.parametrize("arguments", GOOD, ids=" ".join)
def test_both_accept_and_agree(arguments, world, tmp_path, capsys):
    given = [*filled(arguments, world), "--out", str(tmp_path / "out")]
    code, said, error = ran(capsys, *given, "--dry-run")
    assert (code, error) == (0, "") and list(tmp_path.iterdir()) == []
    plan = json.loads(said)
    code, _, error = ran(capsys, *given)
    assert (code, error) == (0, "")
    basis = SubspaceBasis.from_pretrained(tmp_path / "out")
    shapes = basis.shapes()
    assert plan["modules"].keys() == shapes.keys()
    for name, size in plan["modules"].items():
        at_most = {"k_out", "k_in"} if "0.9" in arguments else set()
        assert all(size[key] >= shapes[name][key] for key in at_most)
        assert all(size[key] == shapes[name][key] for key in {"out", "in", "k_out", "k_in"} - at_most)
    assert plan["seconds"] > 0 and plan["memory"] > 0 and plan["bytes_of_basis"] > 0


def test_bad_sources_are_what_the_build_refuses(world, tmp_path, capsys):
    given = [*world["FLEET"], *world["NAN"], *world["FEWER"], *world["BIN"], "--out", str(tmp_path / "out")]
    code, said, _ = ran(capsys, *given, "--dry-run")
    reasons = [entry["reason"] for entry in json.loads(said)["skipped"]]
    assert code == 1 and len(reasons) == 3
    code, _, error = ran(capsys, *given)
    assert code == 1 and "3 of 8 sources cannot be used" in error
    for reason in reasons:
        assert (
            reason.replace("allow_bin=True (--allow-bin)", "--allow-bin").replace(
                "partial=True (--partial)", "--partial"
            )
            in error
        )


def test_clusters_are_planned_as_one_basis_of_all(world, tmp_path, capsys):
    code, said, _ = ran(capsys, *world["FLEET"], "-k", "3", "--clusters", "auto", "--dry-run")
    assert code == 0 and {size["k_out"] for size in json.loads(said)["modules"].values()} == {3}
    assert build_clusters(world["FLEET"], 1, k=3, progress=False).bases[0] == build_basis(
        world["FLEET"], k=3, progress=False
    )


def test_the_tables_have_every_flag_of_the_verb():
    build = next(a for a in parser()._actions if a.dest == "verb").choices["build"]
    flags = {action.dest: action.option_strings for action in build._actions if action.option_strings}
    used = {word for row in [*(row for row, _ in BAD), *GOOD, *UNREADABLE] for word in row}
    shown_otherwise = {"help", "dry_run", "json", "verbose", "quiet"}
    assert [dest for dest, words in flags.items() if not used & set(words) and dest not in shown_otherwise] == []
    assert {each.name for each in fields(BuildOptions)} <= flags.keys()


WRONG = {
    "k": True,
    "budget": 2.5,
    "k_in": 1.0,
    "k_pattern": {"query": "8"},
    "builder": "best",
    "weights": {"a": 0},
    "alternations": None,
    "directions": "3",
    "keep_cores": "yes",
    "leave_one_out": 2,
    "complete": "zeros",
    "target_modules": 3,
    "seed": 0.5,
    "base_model_name": " ",
    "skip_bad": "no",
    "allow_bin": None,
    "partial": 1.0,
    "max_memory": "2 apples",
    "progress": "no",
}


@pytest.mark.parametrize("name", WRONG)
def test_values_of_a_wrong_kind_are_refused_in_python(name, fleets):
    said = []
    for call in (build_basis, plan_build, build_clusters):
        with pytest.raises(SubspaceError) as caught:
            call(fleets[bert][:2], **{name: WRONG[name]})
        said.append(str(caught.value))
    assert said[0] == said[1] and name in said[0]
    assert name in said[2]


def test_numbers_and_truths_of_other_libraries_are_stored_as_pythons_own():
    five = np.int64(5)
    options = BuildOptions(k=five, k_in=five, alternations=five, directions=five, seed=five, skip_bad=0, partial=1)
    assert options == BuildOptions(k=5, k_in=5, alternations=5, directions=5, seed=5, skip_bad=False, partial=True)
    json.dumps(options.record())
    options = BuildOptions(budget=five, keep_cores=1, leave_one_out=np.bool_(False), allow_bin=np.bool_(True))
    assert (options.budget, options.keep_cores, options.leave_one_out, options.allow_bin) == (5, True, False, True)
    kept = [options.budget, options.keep_cores, options.leave_one_out, options.allow_bin]
    assert list(map(type, kept)) == [int, bool, bool, bool]
    assert type(BuildOptions(k=np.float32(0.5)).k) is float and type(UpdateOptions(add=np.int64(3)).add) is int
    assert Resources(progress=0).progress is False and Resources(max_memory=np.int64(10**6)).memory == 10**6
    for wrong in ({"seed": None}, {"k": np.bool_(True)}, {"seed": True}, {"seed": np.float64(1)}, {"partial": 2}):
        with pytest.raises(SubspaceError, match=next(iter(wrong))):
            BuildOptions(**wrong)


def test_target_modules_that_are_no_regular_expression(world, fleets):
    for call in (build_basis, plan_build):
        with pytest.raises(SubspaceError, match=r"target_modules='\(': it is no regular expression"):
            call(builder="random", base_model=bert(), target_modules="(")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"options": {"k": 4}}, "options={'k': 4}: give BuildOptions"),
        ({"options": BuildOptions}, "give BuildOptions"),
        ({"options": UpdateOptions()}, "give BuildOptions"),
        ({"resources": BuildOptions()}, "give Resources"),
    ],
    ids=str,
)
def test_objects_that_are_no_options(fleets, given, said):
    for call in (build_basis, plan_build, build_clusters):
        with pytest.raises(TypeError, match=re.escape(said)):
            call(fleets[bert][:2], **given)


def test_options_can_be_hashed_and_are_optional():
    one, other = (BuildOptions(weights={"a": n}, target_modules=["b"]) for n in (1, 1.0))
    assert one == other and hash(one) == hash(other)
    assert len({UpdateOptions(), UpdateOptions(add=None), Resources(), CompleteOptions()}) == 3
    shown = inspect.signature(build_basis).parameters["options"]
    assert (shown.annotation, shown.default) == ("BuildOptions | None", None)


def test_every_option_has_a_wrong_value_above():
    known = {each.name for kind in (BuildOptions, Resources) for each in fields(kind)}
    # a token is the Hub's to judge, a work folder the disk's
    assert known - WRONG.keys() == {"token", "work_folder"}


def test_options_as_objects_and_as_keywords_are_one_call(fleets):
    options = BuildOptions(k=3, directions=2)
    one = build_basis(fleets[bert], options=options, resources=Resources(progress=False))
    assert one == build_basis(fleets[bert], k=3, directions=2, progress=False)
    assert one.info["build"] == options.record()
    # a keyword beside an object replaces that field
    other = build_basis(fleets[bert], options=options, k=2, progress=False)
    assert (other.describe_k(), other.info["build"]["directions"]) == ("k=2", 2)
    with pytest.raises(TypeError, match="alternation"):
        build_basis(fleets[bert], alternation=3)
    assert pickle.loads(pickle.dumps(options)) == options == BuildOptions(**options.record())
    assert UpdateOptions(k=4).refit == (4, 4) and UpdateOptions().refit is None


def test_plans_of_rebuilds_say_what_is_missing(world):
    assert plan_rebuild(world["UPDATED"][0], progress=False).modules.keys()
    with pytest.raises(SubspaceError, match="1 of its sources"):
        plan_rebuild(world["GONE"][0], progress=False)
