"""What is said of supported versions agrees, wherever it is said."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest depends on it there

ROOT = Path(__file__).resolve().parent.parent
LOWEST = ROOT / "constraints-lowest.txt"
# the matrix leaves these extras out: tools of the developer's machine, and the ecosystem's packages, which have floors
# of their own
TOOLS = {"dev", "docs", "versions", "ecosystem", "quantization", "trl", "diffusers", "peft-suite", "vllm"}


def said_in_pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def floors() -> dict[str, Version]:
    """The lowest release of every requirement of the library, its extras and its tests."""
    project = said_in_pyproject()
    extras = project["optional-dependencies"]
    found: dict[str, Version] = {}
    for line in [*project["dependencies"], *(line for name in sorted(extras.keys() - TOOLS) for line in extras[name])]:
        requirement = Requirement(line)
        if requirement.name == project["name"]:
            continue
        (specifier,) = requirement.specifier
        assert specifier.operator == ">=", f"{line}: no floor"
        version = Version(specifier.version)
        assert found.setdefault(requirement.name, version) == version, f"{line}: another floor elsewhere"
    return found


def pins(file: Path) -> dict[str, Version]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    found = {name: Version(version) for name, version in (line.split("==") for line in lines)}
    assert len(found) == len(lines), f"{file.name}: a name twice"
    return found


def test_the_lowest_constraints_are_the_floors_of_pyproject() -> None:
    assert pins(LOWEST) == floors()


def test_a_floor_that_is_said_twice_is_one() -> None:
    """On Python 3.10, for which trl and diffusers have no such release, the rest of `ecosystem` can be installed."""
    extras = said_in_pyproject()["optional-dependencies"]
    said = [Requirement(line) for line in extras["ecosystem"]]
    for name in ("trl", "diffusers"):
        (alone,) = map(Requirement, extras[name])
        (beside,) = (each for each in said if each.name == name)
        assert alone.specifier == beside.specifier and alone.marker is None
        assert beside.marker and not beside.marker.evaluate({"python_version": "3.10"})
        assert beside.marker.evaluate({"python_version": "3.11"})


def test_the_versions_developed_with_are_admitted() -> None:
    developed = {canonicalize_name(name): version for name, version in pins(ROOT / "constraints.txt").items()}
    below = {
        name: floor for name, floor in floors().items() if name != "pip" and developed[canonicalize_name(name)] < floor
    }
    assert not below


def test_the_pythons_claimed_are_among_those_that_nox_runs() -> None:
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    (run,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "PYTHONS"
    )
    project = said_in_pyproject()
    claimed = re.findall(r"Python :: (3\.\d+)$", "\n".join(project["classifiers"]), flags=re.MULTILINE)
    assert claimed
    assert set(claimed) <= set(run)
    assert project["requires-python"] == f">={run[0]}"
