"""The versions matrix: `nox` runs the fast tests on every Python, with the lowest and the newest releases that
pyproject.toml admits."""

from __future__ import annotations

import nox

# uv's environments share one copy of each release by hard links: with torch's CUDA builds that is gigabytes for every
# environment.
nox.options.default_venv_backend = "uv|virtualenv"

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# The lowest torch and numpy have no wheels for later Pythons.
LOWEST_PYTHONS = ("3.10", "3.11", "3.12")

MATRIX = [(python, "lowest") for python in LOWEST_PYTHONS] + [(python, "newest") for python in PYTHONS]

# A log has to tell by itself what ran.
SAY_VERSIONS = """
import platform
from importlib.metadata import version
names = "torch peft transformers accelerate datasets evaluate huggingface_hub safetensors numpy".split()
print("Python", platform.python_version(), *(f"{name} {version(name)}" for name in names), sep=" | ")
"""


@nox.session
@nox.parametrize("python,which", MATRIX)
def tests(session: nox.Session, which: str) -> None:
    """The fast tests; what follows `--` goes to pytest."""
    constraint = ("--constraint", "constraints-lowest.txt") if which == "lowest" else ()
    session.install(*constraint, "--editable", ".[test]")
    session.run("python", "-c", SAY_VERSIONS)
    # One thread: the tests' models are too small to share among cores.
    session.run("python", "-m", "pytest", "-m", "not slow", "tests", *session.posargs, env={"OMP_NUM_THREADS": "1"})
