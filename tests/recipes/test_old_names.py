"""Names of what was inside the library before it lay in recipes/: cards and copied recipes import them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

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
    assert "subspace_peft.recipe_modules" not in sys.modules
    from subspace_peft import compare as shared
    from subspace_peft.compare import Cells, Method, SubspaceKnobs, knob, local_splits, parse_knobs
    from subspace_peft.compare.cells import digest
    from subspace_peft.demo import run_demo
    from subspace_peft.metrics import load_metric
    from subspace_peft.offline import packages
    from subspace_peft.offline.prepare import prepare
from subspace_peft import modeling
from subspace_peft.recipes import load_recipe
common, demo, fetching = load_recipe("common"), load_recipe("demo"), load_recipe("offline.packages")
assert (MeanPooledClassifier, ImageClassifier) == (modeling.MeanPooledClassifier, modeling.ImageClassifier)
assert (Cells, SubspaceKnobs, knob) == (common.RunCache, common.CommonArguments, common.argument)
assert shared.Recipe is common.Recipe and Method is common.Method and digest is common.digest
assert run_demo is demo.run_demo and packages.fetch is fetching.fetch
assert load_metric("glue", "rte").compute(predictions=[1], references=[1]) == {"accuracy": 1.0}
assert {each.filename for each in caught if "has moved" in str(each.message)} == {"<string>"}
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
        "subspace_peft.compare.Cells has moved to the recipes' common.RunCache",
    ):
        assert done.stdout.splitlines().count(said) == 1


# every old name of a recipe's module, and every module
NAMES = """
import importlib, warnings
from subspace_peft import _moved
from subspace_peft.recipes import load_recipe
warnings.simplefilter("ignore", FutureWarning)
for old, places in _moved.MODULES.items():
    for place in (places,) if isinstance(places, str) else places:
        if place.startswith("recipes:"):
            module, new = importlib.import_module(f"subspace_peft.{old}"), load_recipe(place.removeprefix("recipes:"))
            for name, value in vars(new).items():
                if not name.startswith("_") and getattr(value, "__module__", None) == new.__name__:
                    assert getattr(module, name) is value, (old, name)
for old, names in _moved.NAMES.items():
    for name, place in names.items():
        if place.startswith("recipes:"):
            _, where, new = (place + ":").split(":")[:3]
            module = importlib.import_module(f"subspace_peft.{old}")
            assert getattr(module, name) is getattr(load_recipe(where), new or name)
warnings.simplefilter("error", FutureWarning)
common = load_recipe("common")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    exec("from subspace_peft.recipe_modules.common import Cells")
assert [str(each.message) for each in caught] == ["common.Cells is called RunCache now; the old name will go."]
"""


def test_every_old_module_and_name_of_the_recipes_leads_somewhere(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    fresh.run("-c", NAMES, cwd=tmp_path, env=env, check=True)


def test_functions_take_their_earlier_keywords():
    with pytest.warns(FutureWarning, match="compare: cells= is called cache= now") as caught:
        assert common.compare([], lambda *_: {}, cells=None, progress=False) == []
    assert caught[0].filename == __file__
    with pytest.warns(FutureWarning, match="source_folders: knobs= is called args= now"):
        assert common.source_folders(knobs=SimpleNamespace(sources=["owner/name"], out=".")) == ["owner/name"]
    with pytest.raises(TypeError, match="cells"):
        common.compare([], lambda *_: {}, cells=None, cache=None)


def test_a_name_that_never_was_is_none():
    with pytest.raises(AttributeError, match="no attribute 'never_there'"):
        _ = common.never_there


# a user's own modules, of the names that the recipes have too
OWN = """
import pickle, sys
before = list(sys.path)
{first}
from subspace_peft.compare import RunCache, Task, take_offline
from subspace_peft.compare.data import local_tasks
from subspace_peft.demo import run_demo
from subspace_peft.recipes import load_recipe
load_recipe("glue"), load_recipe("data")
assert sys.path == before
assert not {{"demo", "glue"}} & set(sys.modules)
import common, data, demo, offline
assert (common.MINE, data.MINE, demo.MINE, offline.MINE) == ("common", "data", "demo", "offline")
assert common is not load_recipe("common") and load_recipe("common").RunCache is RunCache
try:
    local_tasks("nowhere")  # imports offline.prepare, when it is called
except Exception as error:
    assert type(error).__name__ == "SubspaceError", error
open("pickled", "wb").write(pickle.dumps(RunCache))
"""


@pytest.mark.parametrize("first", ["", "import common, offline"])
def test_a_users_modules_of_the_same_names_stay_theirs(tmp_path, first):
    for name in ("common", "data", "demo", "offline"):
        (tmp_path / f"{name}.py").write_text(f"MINE = {name!r}\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    fresh.run("-c", OWN.format(first=first), cwd=tmp_path, env=env, check=True)
    read = "import pickle; assert pickle.load(open('pickled', 'rb')).__name__ == 'RunCache'"
    fresh.run("-c", read, cwd=tmp_path, env=env, check=True)


def test_a_recipe_that_lacks_a_library_names_the_command(tmp_path, monkeypatch):
    (tmp_path / "painting.py").write_text('"""A recipe."""\nimport no_such_library\n')
    monkeypatch.setattr(recipes, "recipe_folder", lambda: tmp_path)
    with pytest.raises(SubspaceError, match=r'no_such_library, which .* pip install "subspace-peft\[recipes\]"'):
        recipes.load_recipe("painting")


def test_a_recipe_imports_what_is_beside_it(tmp_path, monkeypatch):
    (tmp_path / "brushes").mkdir()
    (tmp_path / "brushes" / "__init__.py").write_text("")
    (tmp_path / "brushes" / "broad.py").write_text("WIDTH = 3\n")
    (tmp_path / "strokes.py").write_text(
        '"""A recipe."""\nimport os, brushes.broad\nimport brushes.broad as broad\nfrom brushes import broad as same\n'
        "assert brushes.broad is broad is same and os.sep\n"
    )
    monkeypatch.setattr(recipes, "recipe_folder", lambda: tmp_path)
    assert recipes.load_recipe("strokes").broad.WIDTH == 3
    assert not {"brushes", "strokes"} & set(sys.modules)
    with pytest.raises(ModuleNotFoundError, match="never_there"):
        recipes.load_recipe("never_there")
