"""Names of what was inside the library before it lay in recipes/: cards and copied recipes import them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import common
import pytest

from subspace_peft import recipes
from subspace_peft.errors import SubspaceError

from .. import fresh

ROOT = Path(__file__).parents[2]

# as published cards and recipes of earlier versions write it, where the recipes are on no path
OLD = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from subspace_peft.compare import MeanPooledClassifier, ImageClassifier
    assert "common" not in sys.modules
    from subspace_peft import compare as shared
    from subspace_peft.compare import Cells, Method, SubspaceKnobs, knob, local_splits, parse_knobs
    from subspace_peft.compare.cells import digest
    from subspace_peft.demo import run_demo
    from subspace_peft.metrics import load_metric
    from subspace_peft.offline import packages
    from subspace_peft.offline.prepare import prepare
import common, demo, offline.packages
from subspace_peft import modeling
assert (MeanPooledClassifier, ImageClassifier) == (modeling.MeanPooledClassifier, modeling.ImageClassifier)
assert (Cells, SubspaceKnobs, knob) == (common.RunCache, common.CommonArguments, common.argument)
assert shared.Recipe is common.Recipe and Method is common.Method and digest is common.digest
assert run_demo is demo.run_demo and packages.fetch is offline.packages.fetch
assert load_metric("glue", "rte").compute(predictions=[1], references=[1]) == {"accuracy": 1.0}
for each in caught:
    if issubclass(each.category, FutureWarning) and any(w in str(each.message) for w in ("has moved", "is called")):
        print(str(each.message).partition(";")[0])
"""


def test_old_imports_work_and_say_where_things_are_now(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = fresh.run("-c", OLD, cwd=tmp_path, env=env, check=True)
    for said in (
        "subspace_peft.compare has moved to subspace_peft.modeling and the recipes' module common",
        "subspace_peft.demo has moved to the recipes' module demo",
        "subspace_peft.metrics has moved to the recipes' module common.metrics",
        "subspace_peft.offline.prepare has moved to the recipes' module offline.prepare",
        "common.Cells is called RunCache now",
    ):
        assert said in done.stdout.splitlines()


def test_a_name_that_never_was_is_none():
    with pytest.raises(AttributeError, match="no attribute 'never_there'"):
        _ = common.never_there


def test_a_recipe_that_lacks_a_library_names_the_command(tmp_path, monkeypatch):
    (tmp_path / "painting.py").write_text('"""A recipe."""\nimport no_such_library\n')
    monkeypatch.setattr(recipes, "recipe_folder", lambda: tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SubspaceError, match=r'no_such_library, which .* pip install "subspace-peft\[recipes\]"'):
        recipes.load_recipe("painting")


def test_a_module_of_the_same_name_is_not_taken_for_the_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "recipe_folder", lambda: tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SubspaceError, match=r"hidden by .*common"):
        recipes.load_recipe("common")
