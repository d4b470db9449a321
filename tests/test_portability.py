"""Nothing needs POSIX without a fallback, text has an encoding of its own, and every console can print what is said.

Other systems are simulated: what they lack is taken away, and what they refuse is refused. None of them was run.
"""

from __future__ import annotations

import argparse
import ast
import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from subspace_peft._io import folder_names, places
from subspace_peft._io.atomic import write_all_aside, write_folder_aside, write_text_aside
from subspace_peft.basis import cache
from subspace_peft.cli import main
from subspace_peft.cli.console import HANDLER, PLAIN, leave, make_printable, plain
from subspace_peft.cli.main import parser
from subspace_peft.errors import DiskError, SubspaceError

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(file for folder in ("subspace_peft", "recipes") for file in (ROOT / folder).rglob("*.py"))

POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix", "readline", "curses"}
POSIX_CALLS = {
    *("fork", "forkpty", "getuid", "geteuid", "getgid", "getegid", "getpgid", "setsid", "killpg", "link", "symlink"),
    *("mkfifo", "mknod", "chown", "lchown", "sysconf", "sync", "nice", "wait", "wait3", "wait4", "statvfs", "uname"),
    *("sched_getaffinity", "getloadavg", "pread", "pwrite", "posix_fallocate", "fdatasync", "dup2", "O_DIRECTORY"),
    *("waitpid", "SIGKILL", "SIGHUP", "SIGALRM", "alarm", "setitimer", "pthread_sigmask"),
}
CATCHING = {"ImportError", "ModuleNotFoundError", "OSError", "AttributeError", "Exception"}
# takes an encoding, at which position behind a path; `open` of os, tarfile, zipfile and PIL opens no text
TEXT = {"read_text": 0, "write_text": 1}
NO_TEXT = ("os", "tarfile", "zipfile", "Image", "opened")


def parents(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def names_in(node: ast.AST | None) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} if node is not None else set()


def has_fallback(node: ast.AST, above: dict[ast.AST, ast.AST]) -> bool:
    """Whether a node is in a `try` or `suppress` that catches what a system without it raises, or behind `hasattr`."""
    own = getattr(node, "attr", None)
    while node in above:
        inner, node = node, above[node]
        if isinstance(node, (ast.If, ast.IfExp)) and inner is not node.test and own is not None:
            test = node.test
            if isinstance(test, ast.Call) and ast.unparse(test.func) == "hasattr" and f"'{own}'" in ast.unparse(test):
                return True
        if (
            isinstance(node, ast.Try)
            and inner in node.body
            and any(names_in(h.type) & CATCHING for h in node.handlers)
        ):
            return True
        if isinstance(node, ast.With) and inner in node.body:
            calls = [each.context_expr for each in node.items if isinstance(each.context_expr, ast.Call)]
            if any("suppress" in ast.unparse(call.func) and names_in(call) & CATCHING for call in calls):
                return True
    return False


def posix_only(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of what other systems lack and no fallback stands for."""
    tree = ast.parse(source)
    above = parents(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            named = {alias.name for alias in node.names} | (
                {node.module} if isinstance(node, ast.ImportFrom) else set()
            )
            found = next(iter(named & POSIX_MODULES), None)
        elif (
            isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("os", "signal")
        ):
            found = node.attr if node.attr in POSIX_CALLS else None
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = node.value if node.value.startswith(("/dev/", "/proc/", "/tmp/", "/sys/")) else None
        else:
            continue
        if found and not has_fallback(node, above):
            yield node.lineno, found


def unsafe_calls(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and words of calls that depend on the system's encoding, or on how it renames and deletes."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        given = {word.arg for word in node.keywords}
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        words = ast.unparse(node)
        holder = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if name in TEXT and isinstance(node.func, ast.Attribute) and len(node.args) <= TEXT[name]:
            if "encoding" not in given:
                yield node.lineno, words
        elif (
            name == "open"
            and holder not in ("os", "tarfile", "zipfile", "Image", "opened")
            and "encoding" not in given
        ):
            modes = [each.value for each in node.args if isinstance(each, ast.Constant)]
            modes += [word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)]
            if not any(isinstance(mode, str) and "b" in mode and len(mode) < 4 for mode in modes):
                yield node.lineno, words
        elif name in ("run", "Popen", "check_output") and given & {"text", "universal_newlines"}:
            if "encoding" not in given:
                yield node.lineno, words
        elif words.startswith("os.rename("):
            yield node.lineno, words  # Windows refuses where the target exists: os.replace, or Path.rename in a `try`
        elif name == "TemporaryDirectory" and "ignore_cleanup_errors" not in given and "dir" not in given:
            yield node.lineno, words  # Windows cannot delete a file that is still mapped


@pytest.mark.parametrize("look", [posix_only, unsafe_calls])
def test_no_code_depends_on_the_system(look):
    found = [
        f"{file.relative_to(ROOT)}:{line}: {what}"
        for file in SHIPPED
        for line, what in look(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("look", "source"),
    [
        (posix_only, "import fcntl"),
        (posix_only, "def f():\n    from resource import getrusage"),
        (posix_only, "import os\nos.fork()"),
        (posix_only, "import os\ntry:\n    pass\nexcept OSError:\n    os.getuid()"),
        (posix_only, "import os\ntry:\n    os.link(a, b)\nexcept KeyError:\n    pass"),
        (posix_only, "import os, signal\nos.kill(1, signal.SIGKILL)"),
        (posix_only, "os.fork() if hasattr(os, 'getuid') else 0"),
        (posix_only, "open('/dev/null', 'wb')"),
        (unsafe_calls, "open(file)"),
        (unsafe_calls, "open(file, 'w')"),
        (unsafe_calls, "file.open('a')"),
        (unsafe_calls, "file.read_text()"),
        (unsafe_calls, "file.write_text(text)"),
        (unsafe_calls, "subprocess.run(command, text=True)"),
        (unsafe_calls, "os.rename(a, b)"),
        (unsafe_calls, "tempfile.TemporaryDirectory()"),
    ],
)
def test_code_that_depends_on_the_system_is_seen(look, source):
    assert list(look(source))


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    import fcntl\nexcept ImportError:\n    fcntl = None",
        "from contextlib import suppress\nwith suppress(OSError):\n    os.link(a, b)",
        "open(file, 'rb')\nopen(file, mode='wb')\nfile.read_text(encoding='utf-8')\nread_text(file)",
        "getattr(os, 'getuid', lambda: 0)()",
        "cores = os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else ()",
    ],
)
def test_fallbacks_are_seen(source):
    assert not list(posix_only(source)) and not list(unsafe_calls(source))


# Consoles


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii", "cp932", "utf-8"])
def test_consoles_without_a_character_print_a_plain_one(encoding):
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding)
    make_printable(stream)
    print("✓ 3 → 4 ‖ΔW‖ ≤ 2 日 \udcff", file=stream, flush=True)
    said = written.getvalue().decode(encoding)
    assert "3" in said and "W" in said
    if encoding == "cp1252":
        assert said.splitlines()[0] == "yes 3 -> 4 |dW| <= 2 \\u65e5 \\udcff"
    if encoding == "utf-8":
        assert said.splitlines()[0] == "✓ 3 → 4 ‖ΔW‖ ≤ 2 日 \\udcff"


def test_every_stand_in_is_plain_and_is_the_text_itself_where_that_can_be_printed():
    assert all(stand_in.isascii() and stand_in for stand_in in PLAIN.values())
    assert plain("".join(PLAIN), "utf-8") == "".join(PLAIN)
    assert plain("naïve → ", "cp1252") == "naïve -> "


def test_streams_that_handle_errors_themselves_are_left_alone():
    replacing = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    make_printable(replacing, io.StringIO(), object())
    assert replacing.errors == "replace"


def sub_parsers(one: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield one
    for action in one._actions:
        if isinstance(action, argparse._SubParsersAction):
            for other in dict.fromkeys(action.choices.values()):
                yield from sub_parsers(other)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_all_help_can_be_printed(encoding, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and sys.stdout.errors == HANDLER
    verbs = list(sub_parsers(parser()))
    for verb in verbs:
        verb.print_help(sys.stdout)
    assert len(verbs) > 15 and written.getvalue().count(b"usage:") == len(verbs) + 1


def test_results_and_errors_are_printed_on_a_narrow_console(tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True))
    assert main(["cp", "--json"]) == 0
    assert json.loads(sys.stdout.buffer.getvalue()).keys() >= {"demo", "glue"}
    assert main(["validate", str(tmp_path / "日本")]) == 1
    assert b"\\u65e5" in sys.stderr.buffer.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), io.TextIOWrapper(io.BytesIO())])
def test_a_stream_without_a_descriptor_can_be_left(stream):
    leave(stream)


# Files


def test_files_are_flushed_by_handles_that_may_write(tmp_path, monkeypatch):
    """Windows refuses to flush what is open for reading only."""
    fcntl = pytest.importorskip("fcntl")
    modes = []
    monkeypatch.setattr("os.fsync", lambda handle: modes.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE))
    write_text_aside(tmp_path / "a", "a")
    write_folder_aside(tmp_path / "b", lambda folder: (folder / "c").write_text("c"))
    assert modes == [os.O_RDWR] * 2


def test_a_file_that_another_program_holds_open_stays_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("before")

    def refuse(*given):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("os.replace", refuse)
    monkeypatch.setattr("subspace_peft._io.disk.WINDOWS", True)
    with pytest.raises(DiskError, match="or a program has the file open"):
        write_all_aside({tmp_path / "a": lambda place: place.write_bytes(b"after")})
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "before"


def test_locks_are_left_out_where_the_system_has_none(tmp_path, monkeypatch):
    from subspace_peft.bundle.write import _locked

    monkeypatch.setitem(sys.modules, "fcntl", None)
    with _locked(tmp_path):
        (tmp_path / "written").touch()
    monkeypatch.undo()
    with _locked(tmp_path):
        assert (tmp_path / "written").exists()


@pytest.mark.parametrize("refusal", [OSError(errno.EPERM, "no"), NotImplementedError(), AttributeError("link")])
def test_files_are_copied_where_they_cannot_be_linked(refusal, tmp_path, monkeypatch):
    def refuse(*given):
        raise refusal

    (tmp_path / "a").write_bytes(b"bytes")
    monkeypatch.setattr("os.link", refuse)
    cache._link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"bytes"


def test_a_user_without_a_home_or_a_number_has_a_cache_and_relative_places(tmp_path, monkeypatch):
    def none():
        raise RuntimeError("Could not determine home directory.")

    for name in ("SUBSPACE_PEFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", none)
    monkeypatch.delattr("os.getuid")
    assert cache.cache_home().name == "subspace_peft-user"
    assert places.relative_place(tmp_path / "a" / "b", tmp_path / "a" / "c") == "../b"


# Names


@pytest.mark.parametrize("name", ["con", "NUL", "com1", "LPT9.txt", "aux.task", "ends.", "ends "])
def test_names_that_windows_keeps_are_refused_there(name, tmp_path, monkeypatch):
    folder_names.check_folder_names(tmp_path, [name])
    monkeypatch.setattr(folder_names, "WINDOWS", True)
    with pytest.raises(SubspaceError, match="Windows allows no folder"):
        folder_names.check_folder_names(tmp_path, ["fine", name])


@pytest.mark.parametrize("name", ["console", "com", "com10", "nullify", "a.con", "lpt"])
def test_names_like_those_are_fine(name, monkeypatch):
    assert not folder_names.DEVICE.fullmatch(name)


@pytest.mark.parametrize(("one", "other"), [("SST2", "sst2"), ("caf\u00e9", "cafe\u0301"), ("Straße", "STRASSE")])
def test_names_that_a_disk_takes_for_one_are_refused_there_and_nowhere_else(one, other, tmp_path, monkeypatch):
    folder_names.check_folder_names(tmp_path / "new", [one, "third", other])
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(folder_names, "_takes_for_one", lambda *given: True)
    with pytest.raises(SubspaceError, match="does not tell their names apart") as refused:
        folder_names.check_folder_names(tmp_path, [one, "third", other])
    assert repr(one) in str(refused.value) and repr(other) in str(refused.value)
    folder_names.check_folder_names(tmp_path, [one, "third"])


def test_a_disk_is_asked_itself_which_names_it_tells_apart(tmp_path, monkeypatch):
    assert not folder_names._takes_for_one(tmp_path / "a" / "b", "A", "a")
    found = Path.exists
    monkeypatch.setattr("pathlib.Path.exists", lambda self: found(self.with_name(self.name.upper())))
    assert folder_names._takes_for_one(tmp_path / "a" / "b", "A", "a")


def test_tasks_are_extracted_all_or_none_where_names_clash(tmp_path, monkeypatch):
    from subspace_peft.bundle import load

    class Known(dict):
        location = str(tmp_path / "bundle")

    monkeypatch.setattr(folder_names, "_takes_for_one", lambda *given: True)
    with pytest.raises(SubspaceError, match="written to one folder"):
        load._check_folders(Known(), tmp_path / "out", ["a", "A"], {})
    assert not (tmp_path / "out").exists()


def test_tasks_are_carried_over_all_or_none_where_names_clash(tmp_path, monkeypatch):
    from subspace_peft.cli.migrating import Carried

    for name in ("x/a", "y/A"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(folder_names, "_takes_for_one", lambda *given: True)
    found = Carried([str(tmp_path / "x/a"), str(tmp_path / "y/A")], str(tmp_path / "out"), 0.1, False)
    with pytest.raises(SubspaceError, match="written to one folder"):
        found.check_folders()


@pytest.mark.parametrize("place", [r"C:\Users\me\loras", r"\\server\share", "/home/me", "~/loras", r"D:/x"])
def test_places_of_every_system_are_known_as_absolute(place):
    assert places.is_absolute(place) and places.shown_place(place).startswith("./")
    assert not set(places.shown_place(place)[2:]) & set("/\\~:")


@pytest.mark.slow
def test_a_whole_path_opens_no_text_in_the_system_s_encoding(tmp_path):
    """Python itself warns of every text that is opened so; none may be this package's."""
    import subprocess

    from .uneven import saved, states

    loras = saved(tmp_path / "loras", states(4))
    basis = str(tmp_path / "basis")
    python = [sys.executable, "-X", "warn_default_encoding", "-W", "default::EncodingWarning"]
    for words in (
        ["build", *loras, "-k", "3", "--out", basis],
        ["inspect", basis],
        ["report", basis, "--fleet", *loras, "--out", str(tmp_path / "report")],
        ["project", loras[0], "--basis", basis, "--out", str(tmp_path / "task")],
        ["bundle", "ls", str(tmp_path / "nothing")],
        ["cp", "glue", "--out", str(tmp_path / "copied")],
    ):
        done = subprocess.run(
            [*python, "-m", "subspace_peft", *words],
            capture_output=True,
            encoding="cp1252",
            cwd=ROOT,
            env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "LC_ALL": "C"},
            check=False,
        )
        own = [line for line in done.stderr.splitlines() if "EncodingWarning" in line and "subspace_peft" in line]
        assert not own and "Traceback" not in done.stderr, done.stderr
        assert done.returncode == (words[0] == "bundle"), done.stderr
