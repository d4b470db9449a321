"""Completion in a real bash at a terminal: what was typed, Tab, and the arguments that the command then gets."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix" or shutil.which("bash") is None, reason="needs bash at a terminal")
# in place of the command: a line with its arguments, each between signs that no file here has
STAND_IN = """subspace-peft() { printf 'GOT'; printf '{%s}' "$@"; printf 'END\\n'; }"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("shtab")
    found = tmp_path_factory.mktemp("completion")
    done = subprocess.run(
        [sys.executable, "-m", "subspace_peft", "completion", "bash"],
        capture_output=True,
        text=True,
        check=True,
    )
    (found / "script").write_text(done.stdout)
    (found / "my basis" / "version 2").mkdir(parents=True)
    return found


@pytest.mark.parametrize(
    ("typed", "arguments"),
    [
        ("bun\tl\t", ["bundle", "ls"]),
        ("inspect my\t", ["inspect", "my basis/"]),
        ("inspect my\\ b\t", ["inspect", "my basis/"]),
        ("inspect 'my b\t", ["inspect", "my basis/"]),
        ("inspect my\\ basis/ve\t", ["inspect", "my basis/version 2/"]),
        ("build --out my\\ b\t", ["build", "--out", "my basis/"]),
        ("project x --basis my\t --js\t", ["project", "x", "--basis", "my basis/", "--json"]),
        ("report b --fleet x y --fil\t", ["report", "b", "--fleet", "x", "y", "--files"]),
        ("-v inspect --no-v\t", ["-v", "inspect", "--no-verify"]),
    ],
)
def test_tab(typed, arguments, folder):
    assert _got(folder, typed) == arguments


def _got(folder, typed):
    """Return the arguments after a line was typed at a terminal."""
    import pty

    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.environ.update(TERM="dumb", PS1="$ ")
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
    said = b""
    try:
        os.write(terminal, f"{STAND_IN}; source ./script; printf 'REA''DY\\n'\n".encode())
        said = _read(terminal, b"READY\r\n")
        os.write(terminal, f"subspace-peft {typed}\n".encode())
        said = _read(terminal, b"END\r\n")
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)
    found = said.decode().rpartition("GOT")[2].partition("END")[0]
    return found[1:-1].split("}{")


def _read(terminal, end):
    found, begun = b"", time.monotonic()
    while end not in found and time.monotonic() - begun < 30:
        if select.select([terminal], [], [], 1)[0]:
            found += os.read(terminal, 4096)
    assert end in found, found
    return found
