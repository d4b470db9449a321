"""The recipes as a user meets them: listed, copied out, run as scripts; the smoke presets on real models and data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from subspace_peft.cli import main
from subspace_peft.errors import SubspaceError
from subspace_peft.recipes import copy_recipe, list_recipes, recipe_files, recipe_folder

from .. import fresh
from .conftest import REAL_CACHE, ROOT

RECIPES = ["data", "demo", "glue", "image_classification", "mistral"]


def test_recipes_are_listed_with_what_they_do(capsys):
    assert list(list_recipes()) == RECIPES
    assert all(len(words) > 20 for words in list_recipes().values())
    assert main(["cp"]) == 0
    assert "instruction tuning" in capsys.readouterr().out.lower()
    assert main(["cp", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == RECIPES


@pytest.mark.parametrize("name", ["data", "glue"])
def test_a_copy_is_the_recipe_with_its_imports_and_runs_elsewhere(name, tmp_path, capsys):
    assert main(["cp", name, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    copy = Path(printed.out.strip())
    assert copy == tmp_path / f"{name}.py"
    for file in recipe_files(name):
        assert (tmp_path / file).read_bytes() == (recipe_folder() / file).read_bytes()
    packages = {"offline"} if name == "data" else {"common", "offline"}
    assert {path.name for path in tmp_path.iterdir()} == {copy.name, *packages}
    assert all(f"{tmp_path / package}: " in printed.err for package in packages)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(ROOT)}
    given = ["--help"] if name == "data" else ["--preset", "offline", "--dry-run"]
    env["SUBSPACE_PEFT_CACHE"] = str(tmp_path / "cache")
    done = fresh.run(str(copy), *given, cwd=tmp_path, env=env, check=True)
    assert (f"python recipes/{name}.py" if name == "data" else "Would fetch") in done.stdout


def test_every_recipe_is_copied_into_one_folder(tmp_path, capsys):
    for name in RECIPES:
        assert main(["cp", name, "--out", str(tmp_path), "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert Path(printed["file"]) == tmp_path / f"{name}.py"
        assert all(Path(file).is_file() for file in printed["beside"])
    (tmp_path / "common" / "table.py").write_text("edited")
    with pytest.raises(SubspaceError, match=r"common.table\.py: exists already"):
        copy_recipe("mistral", tmp_path)
    assert (tmp_path / "common" / "table.py").read_text() == "edited"


def test_copies_overwrite_nothing_unasked(tmp_path):
    target = tmp_path / "mine.py"
    copy_recipe("glue", target)
    target.write_text("edited")
    with pytest.raises(SubspaceError, match="exists already"):
        copy_recipe("glue", target)
    assert target.read_text() == "edited"
    copy_recipe("glue.py", target, force=True)
    assert target.read_text() != "edited"
    with pytest.raises(SubspaceError, match="there are data, demo, glue"):
        copy_recipe("squad", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glue", "image_classification", "mistral"])
def test_the_smoke_preset_runs_on_real_models_and_data(name, tmp_path):
    # images and instructions need npm and apt-get, and mistral most of a minute
    env = {**os.environ, "SUBSPACE_PEFT_CACHE": str(REAL_CACHE), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(recipe_folder() / f"{name}.py"), "--preset", "smoke", "--out", str(tmp_path / "out")]
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out" / "compare").glob("*/results.json")
    rows = [row["method"] for row in json.loads(results.read_text())["results"]]
    first = "base model" if name == "mistral" else "head only"
    assert rows == [first, "mean only", "LoRA r=8", "VeRA", "random basis", "this basis"]
    assert "| this basis |" in done.stdout
    assert {"table.md", "curves.png"} <= {file.name for file in results.parent.iterdir()}
