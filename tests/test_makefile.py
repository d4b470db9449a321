"""`make` on machines that lack something, and after interrupted installations; with a Python that only takes notes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.metadata import distributions, version
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")

# answers as a Python does that is new enough, has venv, and notes what it is asked to install
PYTHON = """#!/bin/sh
case "$*" in
  -V) echo Python 3.4.5 ;;
  *"3, 11, 5"*) exit ${BEFORE:-0} ;;
  *version_info*) exit ${OLD:-0} ;;
  *ensurepip*) exit ${NO_VENV:-0} ;;
  "-m venv"*) for folder; do :; done; mkdir -p $folder/bin; echo "$*" >> asked; touch $folder/pyvenv.cfg
              cp "$0" $folder/bin/python ;;
  *"pip --version") exit ${NO_PIP:-0} ;;
  *"pip install"*editable*) echo "$*" >> asked; exit ${BREAKS:-0} ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile, and a Python that only notes what it is asked."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    given = {"PATH": os.environ["PATH"], **env}
    command = ["make", "-C", str(folder), "--no-print-directory", "PYTHON=./python", *words]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=given, check=False)


def asked(folder: Path) -> list[str]:
    file = folder / "asked"
    return file.read_text().splitlines() if file.exists() else []


def test_make_alone_prints_all_targets(checkout):
    said = make(checkout)
    assert said.returncode == 0 and said.stdout == make(checkout, "help").stdout
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert phony
    printed = re.findall(r"^  ([a-z-]+)  +\w", said.stdout, flags=re.MULTILINE)
    assert sorted(printed) == sorted(phony[1].split()) and not asked(checkout)
    assert {"demo", "test", "test-slow", "lint", "docs", "package"} <= set(printed)


def test_help_needs_nothing_but_make(checkout):
    (checkout / "nothing").mkdir()
    command = [shutil.which("make"), "-C", str(checkout), "--no-print-directory", "SHELL=/bin/sh"]
    said = subprocess.run(command, capture_output=True, encoding="utf-8", env={"PATH": str(checkout / "nothing")})
    assert (said.returncode, said.stderr) == (0, "")
    assert re.search(r"^  demo +the main job", said.stdout, flags=re.MULTILINE)


def test_continuous_integration_runs_targets_that_there_are():
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    targets = re.findall(r"^make ([a-z-]+)$", run, flags=re.MULTILINE)
    # what takes seconds comes first, and what takes longest last
    assert targets == ["lint", "package", "docs", "test", "test-slow"]
    assert all(re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE) for target in targets)


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ({"OLD": "1"}, "./python is Python 3.4.5, and 3.10 or newer is needed. Name another: make PYTHON="),
        ({"NO_VENV": "1"}, "cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"),
    ],
)
def test_what_a_machine_lacks_is_said_plainly(lacking, said, checkout):
    for target in ("demo", "test"):
        done = make(checkout, target, **lacking)
        assert done.returncode and said in done.stderr and "Traceback" not in done.stderr
    assert not asked(checkout) and not (checkout / ".venv").exists()


def test_a_machine_without_python_is_told_so(checkout):
    done = make(checkout, "demo", "PYTHON=no-such-python")
    assert done.returncode and "There is no no-such-python. Install Python 3.10 or newer" in done.stderr


def test_an_installation_is_made_once(checkout):
    said = make(checkout, ".venv/.installed").stdout
    assert "Installing what `make .venv/.installed` needs" in said and "minutes, in which pip says nothing" in said
    assert [line.split("--")[-1] for line in asked(checkout)] == ["-m venv .venv", "editable .[dev]"]
    assert "constraint constraints.txt" in asked(checkout)[1]
    make(checkout, ".venv/.installed")
    assert len(asked(checkout)) == 2
    make(checkout, ".venv/.installed-demo")
    assert asked(checkout)[2].endswith("--editable .[demo]"), "the demo's own stamp, in the same environment"


def test_a_python_that_the_constraints_are_not_for_gets_the_newest_releases_for_it(checkout):
    done = make(checkout, ".venv/.installed", BEFORE="1")
    assert done.returncode == 0 and "the newest releases for it are installed" in done.stderr
    assert "constraint" not in asked(checkout)[1] and asked(checkout)[1].endswith("--editable .[dev]")


def test_the_constraints_are_for_every_python_that_gets_them():
    """Of what is installed here in the version of `constraints.txt`, nothing needs a later Python."""
    (least,) = set(re.findall(r"version_info < \((3, 1\d, \d)\)", MAKEFILE))
    least = least.replace(", ", ".")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    held, wanted = 0, dict(line.split("==") for line in lines if "==" in line)
    for each in distributions():
        if wanted.get(each.name.lower()) == each.version and each.metadata["Requires-Python"]:
            held += 1
            assert SpecifierSet(each.metadata["Requires-Python"]).contains(least), each.name
    assert held or wanted["pytest"] != version("pytest")


def test_an_interrupted_installation_is_done_again(checkout):
    assert make(checkout, ".venv/.installed", BREAKS="1").returncode
    assert not (checkout / ".venv" / ".installed").exists()
    assert make(checkout, ".venv/.installed").returncode == 0
    assert sum("[dev]" in line for line in asked(checkout)) == 2
    assert sum("venv" in line for line in asked(checkout)) == 1, "the environment itself was whole"


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(changed, checkout):
    make(checkout, ".venv/.installed")
    os.utime(checkout / changed, (4e9, 4e9))
    make(checkout, ".venv/.installed")
    assert sum("[dev]" in line for line in asked(checkout)) == 2


def test_an_environment_that_cannot_be_used_is_made_again(checkout):
    make(checkout, ".venv/.installed", BREAKS="1")
    make(checkout, ".venv/.installed", NO_PIP="1")
    assert [line for line in asked(checkout) if "venv" in line] == ["-m venv .venv", "-m venv --clear .venv"]


def test_a_folder_that_is_no_environment_is_not_cleared(checkout):
    (checkout / "mine").mkdir()
    (checkout / "mine" / "file").touch()
    done = make(checkout, "VENV=mine", "clean")
    assert done.returncode and "mine is no environment, and stays as it is" in done.stderr
    make(checkout, "VENV=mine", "mine/.installed")
    assert asked(checkout)[0] == "-m venv mine" and (checkout / "mine" / "file").exists()
    assert make(checkout, "VENV=mine", "clean").returncode == 0 and not (checkout / "mine").exists()


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_what_is_not_under_version_control_is_not_packaged(checkout):
    (checkout / ".gitignore").write_text(".venv/\nasked\npython\n/dist/\n")
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "All"]):
        subprocess.run([*git, *words], cwd=checkout, check=True)
    make(checkout, ".venv/.installed")
    shutil.copy(checkout / "python", checkout / ".venv/bin/twine")
    (checkout / "dist").mkdir()
    (checkout / "recipes").mkdir()
    (checkout / "recipes" / "key.txt").touch()
    done = make(checkout, "package")
    assert done.returncode and done.stderr.splitlines()[1] == "recipes/key.txt" and (checkout / "dist").exists()
    (checkout / "recipes" / "key.txt").unlink()
    assert make(checkout, "package").returncode == 0 and not (checkout / "dist").exists()
