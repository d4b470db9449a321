"""Python looks for garbage neither while packages are imported, nor once more when a command has ended."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, gc, sys, types
from subspace_peft import _lazy
if sys.argv[1] == "ends":
    # what is registered first is called last
    atexit.register(lambda: print("frozen:", gc.get_freeze_count() > 1000))
    from subspace_peft.cli import main
    sys.argv[1:] = sys.argv[2:]
    try:
        main() if sys.argv.pop(1) == "own" else main(sys.argv[1:])
    except SystemExit:
        pass
else:
    seen = []
    own = _lazy.importlib.import_module
    _lazy.importlib = types.SimpleNamespace(import_module=lambda *args: (seen.append(gc.isenabled()), own(*args))[1])
    if sys.argv[1] == "off":
        gc.disable()
    import subspace_peft
    subspace_peft.inspect_path
    try:
        with _lazy.collecting_later():
            raise ValueError
    except ValueError:
        pass
    print(sorted(set(seen)), gc.isenabled())
"""


def said(*words: str) -> str:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_name_is_loaded_without_looking_for_garbage():
    assert said("on") == "[False] True"
    # a program that has switched it off finds it off
    assert said("off") == "[False] False"


@pytest.mark.parametrize(
    ("how", "words", "frozen"),
    [("own", ["cache", "ls"], True), ("called", ["cache", "ls"], False), ("own", ["run", "--help"], False)],
)
def test_a_command_ends_at_once(how, words, frozen):
    assert said("ends", how, *words) == f"frozen: {frozen}"
