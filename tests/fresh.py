"""Fresh processes without the price of their imports.

Starting Python with torch, transformers and PEFT takes five to ten seconds of a core. A server imports them once, and
nothing of this package, and forks for every program that a test runs: a process without any state of the test's own,
in a twentieth of the time. Tests of the import itself use `subprocess`.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRELOADED = ("torch", "accelerate", "peft", "transformers.trainer", "transformers.models.bert.modeling_bert")


class Running:
    """A forked process; `communicate` waits for it, as that of `subprocess.Popen` does."""

    def __init__(self, server: Server, pid: int, files: tuple[Path, Path]) -> None:
        self.server, self.pid, self.files = server, pid, files
        self.returncode: int | None = None

    def communicate(self, timeout: float = 250) -> tuple[str, str]:
        """Wait for the end and return what the process wrote to stdout and to stderr."""
        self.returncode = self.server.wait(self.pid, timeout)
        said, errors = (file.read_text(errors="replace") for file in self.files)
        return said, errors


class Server:
    """A process with `preloaded` imported, started at its first use.

    Args:
        preloaded: Modules that the server imports before it forks.
    """

    def __init__(self, *preloaded: str) -> None:
        self.preloaded = preloaded
        self.process: subprocess.Popen[str] | None = None
        self.folder = tempfile.TemporaryDirectory(prefix="fresh-")
        self.count = 0
        atexit.register(self.stop)

    def start(self, *arguments: str, env: dict[str, str] | None = None, cwd: Path | str | None = None) -> Running:
        """Fork a process that runs `arguments`: ``-c program``, ``-m module …`` or ``script …``, as Python takes them.

        Args:
            arguments: Python's command line; a program behind ``-c`` may be indented.
            env: All of the environment, `os.environ` by default.
            cwd: The working folder, the repository's root by default.
        """
        self.count += 1
        files = tuple(Path(self.folder.name, f"{self.count}.{end}") for end in ("out", "err"))
        if arguments[0] == "-c":
            arguments = ("-c", textwrap.dedent(arguments[1]), *arguments[2:])
        request = {"arguments": arguments, "env": dict(os.environ if env is None else env), "cwd": str(cwd or ROOT)}
        pid = self._ask({**request, "files": [str(file) for file in files]}, timeout=250)
        return Running(self, pid, (files[0], files[1]))

    def run(
        self,
        *arguments: str,
        env: dict[str, str] | None = None,
        cwd: Path | str | None = None,
        check: bool = False,
        timeout: float = 250,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, as `subprocess.run` does with text that is captured."""
        running = self.start(*arguments, env=env, cwd=cwd)
        said, errors = running.communicate(timeout)
        assert running.returncode is not None
        done = subprocess.CompletedProcess(list(arguments), running.returncode, said, errors)
        if check:
            assert done.returncode == 0, errors
        return done

    def wait(self, pid: int, timeout: float) -> int:
        """Return a child's exit status, negative for a signal; one that takes longer than `timeout` s is killed."""
        try:
            return self._ask({"wait": pid}, timeout)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            self.stop()
            raise

    def stop(self) -> None:
        """End the server; the next use starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _ask(self, request: dict[str, object], timeout: float) -> int:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("fresh_server.py")), *self.preloaded],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            )
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        answer = ""
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], timeout)[0]:
                raise TimeoutError(f"no answer within {timeout} s to {request}")
            answer = process.stdout.readline()
            return int(answer)
        finally:
            # a test that was interrupted in between leaves no answer behind for the next one
            if not answer and not isinstance(sys.exc_info()[1], TimeoutError):
                self.stop()


#: One for all tests of a pytest process.
server = Server(*PRELOADED)
run = server.run
start = server.start


def start_group(*arguments: str, env: dict[str, str] | None = None) -> list[Running]:
    """Start a program twice, with the environment that torchrun gives the two processes of a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared = {**(os.environ if env is None else env), **shared}
    return [start(*arguments, env={**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
