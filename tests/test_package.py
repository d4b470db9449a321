"""The wheel and the source distribution: what is in them, what they say of themselves, and that a wheel works."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from .uneven import saved, states

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    keep = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SUBSPACE_PEFT_CACHE")}
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", cwd=cwd, env={**keep, "PYTHONUTF8": "1", **env}, check=False
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """All files under version control; a source distribution, unpacked, has no record of them."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no checkout")
    return run("git", "ls-files", "-z", cwd=ROOT).stdout.split("\0")[:-1]


@pytest.fixture(scope="module")
def checkout(tracked, tmp_path_factory) -> Path:
    """A copy of the checkout, of the files under version control, in which nothing else lies."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory) -> dict[str, Path]:
    """The source distribution, and the wheel that is made from it, not from the checkout."""
    for needed in ("build", "hatchling"):
        pytest.importorskip(needed)
    before = sorted(checkout.rglob("*"))
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(checkout), cwd=out)
    assert sorted(checkout.rglob("*")) == before, "building leaves nothing behind"
    return {"sdist": next(out.glob("*.tar.gz")), "wheel": next(out.glob("*.whl"))}


def names_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


def test_the_source_distribution_has_all_that_is_under_version_control(built, tracked):
    with tarfile.open(built["sdist"]) as opened:
        names = {member.name.partition("/")[2] for member in opened if member.isfile()}
    assert {name for name in tracked if (ROOT / name).exists()} - names == set()
    assert names - set(tracked) == {"PKG-INFO"}


def test_the_wheel_has_the_package_and_the_recipes_and_nothing_else(built, tracked):
    there = [name for name in tracked if (ROOT / name).exists()]
    expected = {name for name in there if name.startswith("subspace_peft/")}
    expected |= {f"subspace_peft/_{name}" for name in there if name.startswith("recipes/")}
    names = names_of(built["wheel"])
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".html.j2") for name in names) and "subspace_peft/py.typed" in names
    assert {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"} == {
        name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name
    }


def test_a_wheel_of_the_checkout_is_that_of_the_source_distribution(built, checkout, tmp_path):
    run(
        *(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(checkout)),
        cwd=tmp_path,
    )
    assert next(tmp_path.glob("*.whl")).read_bytes() == built["wheel"].read_bytes()


def test_what_it_says_of_itself_can_be_shown(built):
    pytest.importorskip("twine")
    said = run(
        sys.executable, "-m", "twine", "check", "--strict", *map(str, built.values()), cwd=built["wheel"].parent
    ).stdout
    assert said.count("PASSED") == 2
    with zipfile.ZipFile(built["wheel"]) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith("/METADATA"))
        facts = email.message_from_bytes(opened.read(name))
    assert facts["License-Expression"] == "Apache-2.0" and facts["Requires-Python"] == ">=3.10"
    assert facts["Summary"] and len(facts["Summary"]) < 140 and "Operating System :: POSIX :: Linux" in str(facts)
    assert facts["Description-Content-Type"] == "text/markdown"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The scripts' folder of a fresh environment that has the wheel, and what it needs from the environment here."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, with_pip=True)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = str(scripts / "python")
    pip = (python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(built["wheel"]))
    run(*pip, cwd=folder)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    # searched behind the environment's own packages; what is installed here for editing is not followed from there
    here = [place for place in dict.fromkeys(sys.path) if Path(place).name in ("site-packages", "dist-packages")]
    Path(site, "here.pth").write_text("\n".join(here) + "\n", encoding="utf-8")
    where = run(python, "-c", "import subspace_peft; print(subspace_peft.__file__)", cwd=folder).stdout.strip()
    assert Path(where).is_relative_to(folder), "this is the wheel's, not the checkout's"
    return scripts


def test_an_installed_wheel_works_outside_of_the_checkout(installed, tmp_path):
    verb = str(installed / "subspace-peft")
    cache = {"SUBSPACE_PEFT_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}

    def ask(*words: str) -> str:
        return run(verb, *words, cwd=tmp_path, **cache).stdout

    version = run(
        str(installed / "python"), "-c", "import subspace_peft; print(subspace_peft.__version__)", cwd=tmp_path
    ).stdout.strip()
    assert "usage: subspace-peft" in ask("--help") and version in ask("--version")
    assert version in ask("env")
    loras = saved(tmp_path / "loras", states(3))
    ask("build", *loras, "-k", "3", "--out", "basis")
    assert "3 modules" in ask("inspect", "basis") or '"modules"' in ask("inspect", "basis", "--json")
    ask("report", "basis", "--fleet", *loras, "--out", "report")
    assert list((tmp_path / "report").glob("*.html"))
    listed = ask("cp")
    assert {"demo", "glue", "mistral", "image_classification"} <= set(listed.split())
    copied = Path(tmp_path, ask("cp", "glue", "--out", "copied").strip().splitlines()[-1])
    assert copied.is_file() and (copied.parent / "common" / "__init__.py").is_file()
    assert "usage" in run(str(installed / "python"), str(copied), "--help", cwd=tmp_path, **cache).stdout
