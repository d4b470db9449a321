"""Flags of the command line that would do nothing are refused, or a warning says what happens instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from subspace_peft.cli.main import main

from .conftest import said

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
