"""Keywords that a function would pass on to nowhere are refused; what has no effect is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from subspace_peft import (
    SubspaceBasis,
    SubspaceConfig,
    TaskBank,
    build_basis,
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
from subspace_peft.errors import SubspaceError
from subspace_peft.tasks import read_task
from subspace_peft.tasks.push import push_task

from ..models import bert, train_lora
from .conftest import loras, said


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
