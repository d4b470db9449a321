"""What ``--json`` prints of every verb: numbers as numbers, absent as null, and the keys of earlier versions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from subspace_peft.cli import main
from subspace_peft.cli.common import print_json

from .models import bert

BASIS = """base_model base_model_names base_weights build builder bytes certificates core_numbers_per_task definition
energy_kept energy_kept_per_module energy_per_module energy_random energy_random_per_module fingerprint frozen_numbers
k kind location modules precision revision shapes skipped sources verified"""
INT, SHARE, TEXT, TRUTH = {int}, {int, float}, {str}, {bool}
MAYBE = {type(None)}
# verb → (its words, keys of version 0.1.0, types of some: a path with dots and [] for each of a list)
TABLE: dict[str, tuple[str, str, dict[str, set[type]]]] = {
    "build": (
        "build LORAS --out basis -k 6 -q",
        f"{BASIS} energy_left_out energy_left_out_per_module energy_null energy_null_per_module",
        {"bytes": INT, "modules": INT, "energy_kept": SHARE, "k_range.[]": INT, "revision": MAYBE, "k": TEXT},
    ),
    "plan": (
        "build LORAS --dry-run -k 6 -q",
        "base_model bytes_at_most bytes_of_basis bytes_to_read memory modules seconds skipped sources",
        {"bytes_to_read": INT, "memory": INT, "seconds": SHARE, "base_model": {str, type(None)}},
    ),
    "clusters": (
        "build LORAS --out clusters -k 3 --clusters 2 -q",
        "clusters energy_kept energy_kept_single k modules_compared single_k sources steps",
        {"k": INT, "energy_kept": SHARE, "single_k": INT},
    ),
    "inspect": (
        "inspect basis",
        BASIS,
        {"core_numbers_per_task": INT, "base_weights_recorded": TRUTH, "verified": TRUTH, "sources.[].ranks.[]": INT},
    ),
    "validate": (
        "validate basis",
        "energy_kept energy_kept_at_least fingerprint location modules orthonormality problems",
        {"orthonormality": SHARE, "modules": INT, "energy_kept_at_least": TRUTH},
    ),
    "analyze": (
        "analyze LORAS --basis basis -q",
        "cosines near_duplicates outliers skipped sources",
        {"cosines.[].[]": SHARE, "sources.[].norm": SHARE, "sources.[].energy_kept": SHARE},
    ),
    "report": (
        "report basis --out report -q",
        "basis how modules numbers page skipped sources verdict",
        {"basis.bytes": INT, "basis.k_range.[]": INT, "numbers.kept": SHARE},
    ),
    "project": (
        "project LORA --basis basis --out task -q",
        """basis energy_kept energy_random energy_with_own fingerprint modules out own_directions own_parameters
        relative_error source verdict""",
        {"energy_kept": SHARE, "relative_error": SHARE},
    ),
    "task": (
        "inspect task",
        """alpha base_model basis basis_fingerprint basis_revision bytes carries_basis coefficients kind location
        mean_gain modules other_tensors task_type update_norms""",
        {"alpha": SHARE, "bytes": INT, "carries_basis": TRUTH, "basis_revision": MAYBE},
    ),
    "export-lora": (
        "export-lora task --out lora",
        "bytes energy_kept folder modules modules_to_save rank",
        {"bytes": INT, "rank": INT, "energy_kept": SHARE},
    ),
    "compress": (
        "compress LORAS --basis basis --out bundle --min-energy 0.01 -q",
        "adapters folder min_energy residual storage",
        {"storage.after": INT, "adapters.[].total.kept": SHARE, "adapters.[].refused": MAYBE, "min_energy": SHARE},
    ),
    "bundle create": ("bundle create task --out other -q", "fingerprint location revision tasks", {"revision": MAYBE}),
    "bundle ls": (
        "bundle ls bundle --verify -q",
        "fingerprint location revision tasks",
        {"tasks.lora0.bytes": INT, "tasks.lora0.energy_kept": SHARE, "tasks.lora0.problem": MAYBE},
    ),
    "bundle extract": ("bundle extract bundle --all --out extracted -q", "lora0 lora1", {"lora0": TEXT}),
    "update": (
        "update basis NEW --out v2 --tasks task --tasks-out tasks -q",
        "arguments fingerprint from k modules out skipped tasks version",
        {"version": INT, "tasks.[].drift": SHARE, "k_range.[]": INT},
    ),
    "migrate": (
        "migrate task --basis v2 --out tasks-2 -q",
        "fingerprint tasks",
        {"tasks.[].drift": SHARE, "tasks.[].out": TEXT},
    ),
    "complete": ("complete basis -k 8 --out full -q", BASIS, {"bytes": INT, "k_range.[]": INT}),
    "cache ls": ("cache ls", "", {}),
    "cp": ("cp", "demo glue image_classification mistral", {"glue": TEXT}),
}
# a number, written for people
FORMATTED = re.compile(r"[-+]?\d[\d,. ]*(%|bytes|[kMG]i?B|s|seconds|points)?", re.IGNORECASE)
NAMED = {"fingerprint", "sha256", "basis_fingerprint", "from", "of", "version", "subspace_peft_version"}


@pytest.fixture(scope="module")
def printed(fleets, tmp_path_factory):
    """What every verb of the table prints, run one after the other in one folder."""
    folder = tmp_path_factory.mktemp("json")
    *old, new = fleets[bert]
    places = {"LORAS": old, "LORA": [old[0]], "NEW": [new]}
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SUBSPACE_PEFT_CACHE", str(folder / "cache"))
        for name, (words, _, _) in TABLE.items():
            said: list[str] = []
            patch.setattr("builtins.print", lambda *text, said=said, **more: said.extend(map(str, text)))
            arguments = [each for word in words.split() for each in places.get(word, [word])]
            try:
                assert main([*arguments, "--json"]) == 0, said
            finally:
                patch.undo()
                patch.chdir(folder)
                patch.setenv("SUBSPACE_PEFT_CACHE", str(folder / "cache"))
            found[name] = json.loads("\n".join(said))
    return found


def values(found, path: list[str]):
    """Return the values at a path."""
    if not path:
        return [found]
    first, *rest = path
    inner = found if first == "[]" else [found[first]]
    return [each for one in inner for each in values(one, rest)]


def leaves(found, key: str = ""):
    """Yield every value that is no list or object, with the key that it stands at."""
    if isinstance(found, dict):
        for name, each in found.items():
            yield from leaves(each, name)
    elif isinstance(found, list):
        for each in found:
            yield from leaves(each, key)
    else:
        yield key, found


@pytest.mark.parametrize("name", TABLE)
def test_keys_and_types(printed, name):
    _, keys, types = TABLE[name]
    found = printed[name]
    if keys:
        assert set(keys.split()) <= found.keys()
    for path, wanted in types.items():
        there = values(found, path.split("."))
        assert there and {type(each) for each in there} <= wanted, (path, there)


@pytest.mark.parametrize("name", TABLE)
def test_no_number_is_a_text_alone(printed, name):
    for key, value in leaves(printed[name]):
        if isinstance(value, str) and key not in NAMED:
            assert not FORMATTED.fullmatch(value.strip()), (key, value)
            assert value not in ("None", "nan", "inf", "True", "False"), key


def test_what_is_no_value_of_json_is_a_fault_and_no_text(capsys):
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": Path("x"), "d": (1, True, None)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": "x", "d": [1, True, None]}
    with pytest.raises(TypeError, match="a set is no value of JSON"):
        print_json({"a": {1}})


def test_the_demo_prints_json_alone(monkeypatch, capsys):
    class Recipe:
        @staticmethod
        def run_demo(out, **more):
            print("what it says on its way")
            return {"base": str(out), "seconds": 1.5}

    monkeypatch.setattr("subspace_peft.recipes.load_recipe", lambda name: Recipe)
    assert main(["demo", "--out", "there", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"base": "there", "seconds": 1.5} and "on its way" in said.err
    assert main(["demo", "--out", "there"]) == 0
    assert capsys.readouterr().out == "what it says on its way\n"
