"""Old names keep working: each module and each name that moved, with a FutureWarning that names the new place."""

from __future__ import annotations

import importlib
import pickle
import sys

import pytest

import subspace_peft
from subspace_peft import _moved

LIBRARY = {old: places for old, places in _moved.MODULES.items() if "recipes:" not in str(places)}


def old_module(name: str) -> object:
    """Import `subspace_peft.<name>` as if for the first time."""
    sys.modules.pop(f"subspace_peft.{name}", None)
    module = importlib.import_module(f"subspace_peft.{name}")
    # the import system hangs it on its parent, where a name that moved may be called the same
    parent, _, child = f"subspace_peft.{name}".rpartition(".")
    vars(sys.modules[parent]).pop(child, None)
    return module


@pytest.mark.parametrize("old", sorted(LIBRARY))
def test_an_old_module_gives_what_the_new_one_has(old: str):
    places = LIBRARY[old]
    places = (places,) if isinstance(places, str) else places
    with pytest.warns(FutureWarning, match=rf"subspace_peft\.{old} has moved to subspace_peft\.{places[0]}"):
        module = old_module(old)
    for place in places:
        new = importlib.import_module(f"subspace_peft.{place}")
        for name in getattr(new, "__all__", [name for name in vars(new) if not name.startswith("_")]):
            assert getattr(module, name) is getattr(new, name)
    with pytest.raises(AttributeError, match="no attribute 'never_there'"):
        _ = module.never_there


@pytest.mark.parametrize(
    ("module", "name", "place"),
    [(m, n, p) for m, names in _moved.NAMES.items() for n, p in names.items() if not p.startswith("recipes:")],
)
def test_an_old_name_is_the_new_one(module: str, name: str, place: str):
    where, _, new = place.partition(":")
    with pytest.warns(FutureWarning, match=rf"subspace_peft\.{module}\.{name} has moved to subspace_peft\.{where}\."):
        found = getattr(importlib.import_module(f"subspace_peft.{module}"), name)
    assert found is getattr(importlib.import_module(f"subspace_peft.{where}"), new or name)


def test_the_warning_points_at_the_import_that_has_to_change():
    with pytest.warns(FutureWarning) as caught:
        old_module("build")
    assert {warning.filename for warning in caught} == {importlib.__file__}, "importlib.import_module is the caller"
    sys.modules.pop("subspace_peft.build", None)
    with pytest.warns(FutureWarning) as caught:
        import subspace_peft.build  # noqa: F401
    assert [warning.filename for warning in caught] == [__file__]


def test_a_renamed_name_warns_once_where_it_is_imported():
    with pytest.warns(FutureWarning):
        old_module("tuner.arrivals")
    with pytest.warns(FutureWarning) as caught:
        from subspace_peft.tuner.arrivals import Arrivals  # noqa: F401

        from subspace_peft.tuner import TaskBank  # noqa: F401
    assert [warning.filename for warning in caught] == [__file__] * 2
    said = {str(warning.message).partition(" ")[0] for warning in caught}
    assert said == {"subspace_peft.tuner.TaskBank", "subspace_peft.tuner.arrivals.Arrivals"}


def test_pickles_that_name_an_old_module_are_read():
    sys.modules.pop("subspace_peft.build.factors", None)
    with pytest.warns(FutureWarning):
        made = pickle.loads(b"\x80\x04csubspace_peft.build.factors\nFactors\n.")
    assert made is importlib.import_module("subspace_peft.sources").Factors


def test_the_public_face_needs_no_old_name(recwarn: pytest.WarningsRecorder):
    for name in subspace_peft.__all__:
        getattr(subspace_peft, name)
    for package in ("basis", "builders", "bundle", "convert", "report", "sources", "tasks", "tuner"):
        module = importlib.import_module(f"subspace_peft.{package}")
        for name in module.__all__:
            getattr(module, name)
    assert not [w for w in recwarn if "has moved to" in str(w.message)]
