"""Run by tests/fresh.py: `fresh_server.py MODULE…` imports the modules, then forks for every request on stdin.

A request is a line of JSON, an answer a line with one number: the process id for a program to run, and the exit status
for one to wait for. The import of this package, and what depends on environment variables, happen after the fork.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import sys
import threading
import traceback
import types
from typing import Any, NoReturn


def read_environment_again() -> None:
    """Have huggingface_hub take its constants, the endpoint and the cache among them, from this environment."""
    if constants := sys.modules.get("huggingface_hub.constants"):
        importlib.reload(constants)
    if api := sys.modules.get("huggingface_hub.hf_api"):
        api.api.endpoint = constants.ENDPOINT


def become(request: dict[str, Any]) -> None:
    """Turn a fork into the process that was asked for, and run its program."""
    for number, (name, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), *((file, os.O_WRONLY | os.O_CREAT) for file in request["files"])]
    ):
        opened = os.open(name, flags)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    read_environment_again()
    kind, *rest = request["arguments"]
    more = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:1] = ["" if kind in ("-c", "-m") else os.path.dirname(kind), *more]
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


def run(request: dict[str, Any]) -> NoReturn:
    """Run the program of a request in this fork; end without taking all modules apart, which takes half a second."""
    status = 0
    try:
        become(request)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        status = 1
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    """Answer requests until stdin ends."""
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif (answer := os.fork()) == 0:
            run(request)
        print(answer, flush=True)


if __name__ == "__main__":
    serve()
