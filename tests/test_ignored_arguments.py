"""Arguments that would do nothing are refused, or a warning says what happens instead: tables of both."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from subspace_peft import (
    SubspaceBasis,
    SubspaceConfig,
    TaskBank,
    build_basis,
    bundle_tasks,
    complete_basis,
    compress_fleet,
    export_lora,
    extract_tasks,
    hotswap,
    load_adapter,
    load_task,
    migrate_task,
    open_bundle,
    project_lora,
    update_basis,
)
from subspace_peft.builders import plan_build, rebuild_basis
from subspace_peft.cli.main import main
from subspace_peft.errors import SubspaceError
from subspace_peft.tasks import read_task
from subspace_peft.tasks.push import push_task
from tests.models import bert, randomise, train_lora

SAID = re.compile(r"has no effect|have no effect|which is used|fewer directions|no more than|more than")


def said(call: Callable[[], Any]) -> str:
    """What `call` warns of, in one text; other packages' warnings aside."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return " ".join(text for each in caught if SAID.search(text := str(each.message)))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    for i in (1, 2, 3):
        train_lora(bert, folder / f"lora{i}", seed=i)
    built = build_basis(loras(folder), k=4, directions=2, keep_cores=True, progress=False)
    built.save_pretrained(folder / "basis")
    for i in (1, 2):
        project_lora(folder / f"lora{i}", built).save_pretrained(folder / f"task{i}")
    bundle_tasks([folder / "task1", folder / "task2"], folder / "bundle", progress=False)
    return folder


def loras(folder: Path) -> list[str]:
    return [str(folder / f"lora{i}") for i in (1, 2)]


# -- SubspaceConfig: field × combination ------------------------------------------------------------------------------

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


# -- build_basis: option × builder ------------------------------------------------------------------------------------

BUILD: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["query"]}, r"target_modules= \(--target-modules\) has no effect with the builder 'adapters'"),
    ({"like": True}, r"like= \(--like\) has no effect with the builder 'adapters'"),
    ({"seed": 3}, r"seed= \(--seed\) has no effect with the builder 'adapters'"),
    ({"seed": 3, "complete": "base-weights", "base_model": True}, r"seed= \(--seed\) has no effect"),
    ({"builder": "eigenlora", "target_modules": ["query"]}, r"target_modules=.*'eigenlora'"),
    ({"builder": "eigenlora", "alternations": 2}, r"alternations= \(--alternations\) has no effect"),
    ({"builder": "eigenlora", "leave_one_out": True}, r"leave_one_out= \(--leave-one-out\) has no effect"),
    ({"builder": "random", "weights": "norm"}, r"weights= \(--weights\) has no effect with the builder 'random'"),
    ({"builder": "random", "alternations": 2}, r"alternations= .*has no effect"),
    ({"builder": "random", "keep_cores": True}, r"keep_cores= .*has no effect"),
    ({"builder": "random", "leave_one_out": True}, r"leave_one_out= .*has no effect"),
    ({"builder": "random", "like": True, "sources": None, "k": 2}, r"k= \(-k\) has no effect: the sizes are those"),
    ({"builder": "random", "like": True, "sources": None, "k_in": 2}, r"k_in= \(--k-in\) has no effect"),
    ({"builder": "random", "like": True}, r"the sources have no effect.*like="),
    ({"builder": "random", "like": True, "sources": None, "skip_bad": True}, r"skip_bad= .*no source is read"),
    ({"builder": "random", "like": True, "sources": None, "allow_bin": True}, r"allow_bin= .*no source is read"),
    ({"builder": "random", "target_modules": ["query"]}, r"target_modules= .*has no effect.*the sources"),
    (
        {"builder": "base-weights", "base_model": True, "target_modules": ["query"], "sources": None, "seed": 3},
        r"seed= .*has no effect.*singular vectors are not drawn",
    ),
    (
        {"builder": "base-weights", "base_model": True, "target_modules": ["query"]},
        r"the sources have no effect.*base_model=",
    ),
]


def build_arguments(work: Path, given: dict[str, Any]) -> dict[str, Any]:
    made = {"sources": loras(work), "k": 4, "progress": False, **given}
    if made.get("like"):
        made["like"] = SubspaceBasis.from_pretrained(work / "basis")
        if "k" not in given:
            made.pop("k")
    if made.get("base_model"):
        made["base_model"] = bert()
    return made


@pytest.mark.parametrize("function", [build_basis, plan_build], ids=["build", "plan"])
@pytest.mark.parametrize(("given", "text"), BUILD, ids=[repr(given) for given, _ in BUILD])
def test_an_option_that_a_builder_ignores_is_said(
    work: Path, given: dict[str, Any], text: str, function: Callable[..., Any]
) -> None:
    assert re.search(text, said(lambda: function(**build_arguments(work, given))))


BUILT: list[dict[str, Any]] = [
    {},
    {"weights": "norm", "alternations": 2, "directions": 2, "keep_cores": True, "leave_one_out": True},
    {"complete": "random", "seed": 3, "k": 12},
    {"base_model": True},
    {"skip_bad": True, "partial": True, "allow_bin": True},
    {"builder": "eigenlora", "weights": "norm", "leave_one_out": False},
    {"builder": "random", "seed": 3, "k_in": 5, "directions": 2},
    {"builder": "random", "like": True, "sources": None, "seed": 3},
    {"builder": "base-weights", "base_model": True, "target_modules": ["query"], "sources": None},
    {
        "builder": "base-weights",
        "base_model": True,
        "target_modules": ["query", "value"],
        "sources": None,
        "like": True,
    },
]


@pytest.mark.parametrize("given", BUILT, ids=repr)
def test_an_option_that_is_used_is_not_spoken_of(work: Path, given: dict[str, Any]) -> None:
    assert not said(lambda: build_basis(**build_arguments(work, given)))


def test_fewer_directions_than_asked_for_are_said_and_recorded(work: Path, tmp_path: Path) -> None:
    made: list[SubspaceBasis] = []
    text = said(lambda: made.append(build_basis(loras(work), k=20, progress=False)))
    assert re.search(r"k=20: the fleet spans fewer directions in 4 of 4 modules .* which get 8\.", text)
    recorded = SubspaceBasis.from_pretrained(made[0].save_pretrained(tmp_path)).info["measured"]["fewer_directions"]
    assert recorded["asked"] == [20, 20]
    assert set(recorded["modules"].values().__iter__().__next__()) == {8} and len(recorded["modules"]) == 4
    # asked for by no number, or filled up, or all that a module has
    for given in ({}, {"k": 20, "complete": "random"}, {"k": 0.9}, {"k": 8}):
        basis: list[SubspaceBasis] = []
        assert not said(
            lambda given=given, basis=basis: basis.append(build_basis(loras(work), progress=False, **given))
        )
        assert "fewer_directions" not in basis[0].info["measured"]


def test_a_rebuild_takes_the_record_without_a_word(work: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        like = SubspaceBasis.from_pretrained(work / "basis")
        build_basis(like=like, builder="random", k=3, progress=False).save_pretrained(tmp_path / "random")
        build_basis(loras(work), k=20, seed=3, progress=False).save_pretrained(tmp_path / "fleet")
    for name in ("random", "fleet"):
        assert not said(lambda name=name: rebuild_basis(tmp_path / name, progress=False))


def test_updates_and_completions(work: Path) -> None:
    new, basis = [str(work / "lora3")], str(work / "basis")
    assert "add= (--add) has no effect with k=" in said(lambda: update_basis(basis, new, k=6, add=3, progress=False))
    cores = [read_task(work / "task1").cores]
    assert "cores= has no effect without k=" in said(lambda: update_basis(basis, new, cores=cores, progress=False))
    assert "fewer directions" in said(lambda: update_basis(basis, new, k=20, progress=False))
    assert not said(lambda: update_basis(basis, new, add=3, progress=False))
    assert not said(lambda: update_basis(basis, new, k=6, cores=cores, progress=False))
    assert "base_model= (--base-model) has no effect" in said(lambda: complete_basis(basis, k=6, base_model=bert()))
    filled = {"k": 6, "with_": "base-weights", "base_model": bert()}
    assert "seed= (--seed) has no effect" in said(lambda: complete_basis(basis, seed=2, **filled))
    assert not said(lambda: complete_basis(basis, **filled))
    assert not said(lambda: complete_basis(basis, k=6, seed=2))
    assert "k=3 has no effect: every module has as many" in said(lambda: complete_basis(basis, k=3))


# -- keywords that a function would pass on to nowhere ----------------------------------------------------------------


def test_an_unknown_keyword_is_a_type_error(work: Path, tmp_path: Path) -> None:
    task, bundle = str(work / "task1"), str(work / "bundle")
    model = PeftModel.from_pretrained(bert(), task)
    bank = TaskBank(model)
    cores = read_task(task).cores
    calls: list[Callable[[], Any]] = [
        lambda: bank.add("a", task, foo=3),
        lambda: bank.add("a", cores, foo=3),
        lambda: bank.add("a", cores, revision="main"),
        lambda: bank.add("default", revision="main"),
        lambda: read_task(task, foo=3),
        lambda: load_adapter(bert(), task, foo=3),
        lambda: hotswap(model, task, foo=3),
        lambda: export_lora(task, tmp_path / "out", foo=3),
        lambda: migrate_task(task, str(work / "basis"), foo=3),
        lambda: load_task(bert(), bundle, "task1", foo=3),
        lambda: extract_tasks(bundle, tmp_path / "tasks", foo=3),
        lambda: push_task(model, "org/task", foo=3),
        lambda: model.push_to_hub("org/task", foo=3),
        lambda: project_lora(str(work / "lora1"), str(work / "basis"), foo=3),
        lambda: build_basis(loras(work), foo=3),
        lambda: SubspaceConfig(foo=3),
    ]
    for number, call in enumerate(calls):
        with pytest.raises(TypeError, match=r"foo|revision"):
            call()
            pytest.fail(f"call {number}")
    assert not bank
    assert not (tmp_path / "out").exists()


def test_an_argument_of_another_kind_of_task_is_refused(work: Path, tmp_path: Path) -> None:
    task, basis = str(work / "task1"), str(work / "basis")
    model = PeftModel.from_pretrained(bert(), task)
    read = read_task(task)
    bundle = open_bundle(work / "bundle")
    calls: list[Callable[[], Any]] = [
        lambda: read_task(model, basis=basis),
        lambda: read_task(read, basis=basis),
        lambda: read_task(read, adapter_name="default"),
        lambda: read_task(task, adapter_name="default"),
        lambda: export_lora(model, tmp_path / "out", basis=basis),
        lambda: export_lora(model, tmp_path / "out", revision="main"),
        lambda: export_lora(task, tmp_path / "out", adapter_name="default"),
        lambda: open_bundle(bundle, revision="main"),
        lambda: load_task(bert(), bundle, "task1", cache_dir=tmp_path),
    ]
    for number, call in enumerate(calls):
        with pytest.raises(SubspaceError, match="leave it out"):
            call()
            pytest.fail(f"call {number}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["k", "r", "alpha", "coefficients", "mean_gain", "target_modules", "strict"])
def test_a_field_beside_a_saved_task_is_refused(work: Path, field: str) -> None:
    task, value = str(work / "task1"), getattr(SubspaceConfig(), field) or 2
    for call in (
        lambda: SubspaceConfig.from_pretrained(task, **{field: value}),
        lambda: PeftModel.from_pretrained(bert(), task, **{field: value}),
    ):
        with pytest.raises(SubspaceError, match=f"{field}= has no effect on a saved task"):
            call()
    assert PeftModel.from_pretrained(bert(), task, basis=str(work / "basis"), check_base_model=False)


def test_a_revision_of_a_folder_is_said(work: Path) -> None:
    task = str(work / "task1")
    assert "revision='v2' has no effect" in said(lambda: read_task(task, revision="v2"))
    assert "revision='v2' has no effect" in said(lambda: load_adapter(bert(), task, revision="v2"))
    assert "revision='v2' has no effect" in said(lambda: open_bundle(work / "bundle", revision="v2"))


def test_keywords_that_are_known_are_taken(work: Path) -> None:
    task, basis = str(work / "task1"), str(work / "basis")
    model = PeftModel.from_pretrained(bert(), task)
    bank = TaskBank(model)
    assert not said(lambda: bank.add("a", task, token=False, basis=basis))
    assert not said(lambda: bank.add("b", task, subfolder=""))
    assert not said(lambda: load_task(model, work / "bundle", "task2", torch_device="cpu", low_cpu_mem_usage=True))
    assert list(bank) == ["a", "b"]


# -- the command line: flags that would do nothing --------------------------------------------------------------------

FLAGS: list[tuple[str, str]] = [
    ("build {lora1} {lora2} -k 4 --budget 100 --out {out}", r"budget.*leave.*k"),
    ("build {lora1} {lora2} --force --dry-run", r"--force has no effect without --out"),
    ("build --from-config {basis} -k 3 --out {out}", r"leave -k out"),
    ("update {basis} {lora3} --out {out} -k 6 --add 3", r"--add has no effect with -k"),
    ("update {basis} {lora3} --out {out} -k 6 --add-in 3", r"--add-in has no effect with -k"),
    ("update {basis} {lora3} --out {out} --max-drift 0.1", r"--max-drift has no effect without --tasks or -k"),
    ("update {basis} {lora3} --out {out} --tasks {task1}", r"Give both, --tasks and --tasks-out"),
    ("complete {basis} -k 6 --out {out} --base-model {lora1}", r"--base-model has no effect with random directions"),
    ("complete {basis} -k 6 --out {out} --with base-weights --seed 3 --base-model x", r"--seed has no effect"),
    ("project {lora1} --basis {basis} --force", r"--force has no effect without --out"),
    ("bundle extract {bundle} task1 --all --out {out}", r"give names, as 'task1', or --all, not both"),
    ("bundle extract {bundle} --all --out {out} --revision v2", r"--revision has no effect on"),
    ("bundle ls {bundle} --revision v2", r"--revision has no effect on"),
    ("push {basis} org/basis --push-basis-to org/other", r"--push-basis-to has no effect on a basis"),
    ("push {basis} org/basis --force", r"--force has no effect on a basis"),
    ("cache rm 1234 --all", r"--all has no effect beside a fingerprint"),
    ("cp --force", r"--force has no effect without a recipe"),
]


@pytest.mark.parametrize(("line", "text"), FLAGS, ids=[line.replace("{", "").replace("}", "") for line, _ in FLAGS])
def test_a_flag_that_does_nothing_is_refused(
    work: Path, line: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {name: str(work / name) for name in ("lora1", "lora2", "lora3", "basis", "task1", "bundle")}
    assert main(line.format(**names, out=tmp_path / "out").split()) == 1
    assert re.search(text, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("build {lora1} {lora2} -k 4 --seed 3 --out {out}", r"seed=.*\(--seed\) has no effect"),
        ("build {lora1} {lora2} -k 4 --target-modules query --out {out}", r"\(--target-modules\) has no effect"),
        ("build {lora1} {lora2} -k 20 --out {out}", r"fewer directions in 4 of 4"),
        (
            "build {lora1} {lora2} -k 4 --builder eigenlora --alternations 3 --dry-run",
            r"--alternations\) has no effect",
        ),
    ],
)
def test_an_option_of_another_builder_is_said_on_the_command_line(
    work: Path, line: str, text: str, tmp_path: Path
) -> None:
    names = {name: str(work / name) for name in ("lora1", "lora2")}
    assert re.search(text, said(lambda: main([*line.format(**names, out=tmp_path / "out").split(), "--quiet"])))


def test_truncation_is_what_k_means(work: Path) -> None:
    whole, cut = (get_peft_model(bert(), configured(work, {"k": k})) for k in (None, 2))
    for (name, layer), (_, other) in zip(whole.named_modules(), cut.named_modules(), strict=True):
        if hasattr(layer, "subspace_U"):
            assert torch.equal(layer.subspace_U["default"][:, :2], other.subspace_U["default"]), name


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda work: build_basis(loras(work), k=200, complete="random", progress=False), "k=200: no module has more"),
        (lambda work: complete_basis(work / "basis", 200, progress=False), "k=200: no module has more than 32"),
        (lambda work: update_basis(work / "basis", [work / "more"], add=50, progress=False), "span no more than 4"),
        (
            lambda work: export_lora(work / "task1", work / "out", part="unet"),
            "part='unet' \\(--part unet\\) has no effect",
        ),
    ],
    ids=["build", "complete", "update", "export"],
)
def test_more_than_there_can_be_is_said(work: Path, call: Callable[[Path], Any], text: str) -> None:
    if not (work / "more").exists():
        train_lora(bert, work / "more", seed=9)
    assert re.search(text, said(lambda: call(work)))


def test_the_default_rank_is_said_where_it_is_given(work: Path) -> None:
    config = SubspaceConfig(basis=work / "basis", r=8)
    assert "r=8 has no effect" in said(lambda: get_peft_model(bert(), config))
    assert not said(lambda: get_peft_model(bert(), SubspaceConfig(basis=work / "basis")))


def test_a_part_that_the_basis_lacks_is_named(work: Path) -> None:
    with pytest.raises(SubspaceError, match=r"part='unet' \(--part\): the basis has no such part"):
        project_lora(work / "lora1", work / "basis", part="unet")


def test_an_export_for_a_model_without_the_modules_is_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(SubspaceError, match="2 of its 4 modules are not in the given model"):
        export_lora(work / "task1", tmp_path / "out", model=bert(layers=1))
    assert not (tmp_path / "out").exists()
    export_lora(work / "task1", tmp_path / "out", model=bert())


@pytest.mark.parametrize("name", ["bassis", "check_base_modle"])
def test_a_misspelt_keyword_of_loading_is_a_type_error(work: Path, name: str) -> None:
    with pytest.raises(TypeError, match="did you mean"):
        PeftModel.from_pretrained(bert(), work / "task1", **{name: False})


def test_a_control_takes_the_place_of_a_basis(work: Path) -> None:
    made = build_basis(builder="random", like=work / "basis", progress=False)
    assert made.shapes().keys() == SubspaceBasis.from_pretrained(work / "basis").shapes().keys()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda work, out: SubspaceBasis.from_pretrained(work / "basis", revision="v2"),
            r"revision='v2' has no effect",
        ),
        (lambda work, out: export_lora(work / "task1", out, rank=64), r"rank=64 \(--rank 64\) has no effect"),
        (
            lambda work, out: compress_fleet(
                loras(work), work / "basis", out, min_energy=0.0, residual=2, progress=False
            ),
            r"residual=2 \(--residual\) has no effect with min_energy=0",
        ),
    ],
    ids=["revision of a folder", "rank above the task's", "residual that nothing needs"],
)
def test_an_argument_without_an_effect_is_said(
    work: Path, tmp_path: Path, call: Callable[[Path, Path], Any], text: str
) -> None:
    assert re.search(text, said(lambda: call(work, tmp_path / "out")))


def test_the_same_arguments_where_they_do_something_are_not_spoken_of(work: Path, tmp_path: Path) -> None:
    basis = SubspaceBasis.from_pretrained(work / "basis")
    assert not said(lambda: SubspaceBasis.from_pretrained(work / "basis"))
    assert not said(lambda: export_lora(work / "task1", tmp_path / "lora", rank=2))
    assert not said(lambda: compress_fleet(loras(work), basis, tmp_path / "bundle", residual=2, progress=False))
