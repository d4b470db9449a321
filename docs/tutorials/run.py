"""Execute the tutorials and save them with what they printed: `make tutorials`.

    python docs/tutorials/run.py              # all five
    python docs/tutorials/run.py 3-serve      # one of them

They share the base model, data and adapters of `subspace-peft demo --stage sources`, which are made
once and kept in `.cache/tutorials`. Each runs in a temporary folder and in a kernel of this
interpreter, whatever kernels Jupyter knows; the fourth one talks to a Hub on loopback.
tests/docs/test_tutorials.py executes them in the same way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNEL = "this-interpreter"
# what other libraries write to stderr, whatever this package does
FOREIGN = re.compile(
    r"^Failed to load CPU gemm_4bit_forward from kernels-community.*\n?", re.MULTILINE
)
IGNORED = ("ignore::FutureWarning:transformers.modeling_utils", "ignore:IProgress not found")
SECONDS = 900  # for a cell; the longest takes half a minute on a core of its own


def tutorials() -> list[Path]:
    """Return the notebooks, in reading order."""
    return sorted(HERE.glob("*.ipynb"))


def make_fleet(folder: Path) -> Path:
    """Make base model, data and adapters in `folder`/fleet as a reader does; finished ones stay."""
    folder.mkdir(parents=True, exist_ok=True)
    # packages are fetched once for all runs
    env = {**quiet(), "SUBSPACE_PEFT_CACHE": str(ROOT / ".cache" / "subspace_peft")}
    command = [
        sys.executable,
        "-m",
        "subspace_peft",
        "demo",
        "--stage",
        "sources",
        "--out",
        "fleet",
    ]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}"
        )
    return folder / "fleet"


def execute(notebook: NotebookNode, fleet: Path) -> NotebookNode:
    """Execute a copy of a notebook beside `fleet`, and return it cleaned.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    notebook = nbformat.from_dict(notebook)
    with tempfile.TemporaryDirectory(prefix="tutorial-") as scratch, hub() as settings:
        work, own = Path(scratch, "work"), Path(scratch, "own")
        work.mkdir()
        (work / "fleet").symlink_to(fleet.resolve(), target_is_directory=True)
        env = {
            **quiet(),
            **settings,
            "HF_HOME": str(own / "huggingface"),
            "IPYTHONDIR": str(own / "ipython"),
            "SUBSPACE_PEFT_CACHE": str(own / "subspace_peft"),
        }
        with kernel(own):
            client = NotebookClient(
                notebook,
                kernel_name=KERNEL,
                timeout=SECONDS,
                record_timing=False,
                resources={"metadata": {"path": work}},
            )
            client.execute(env=env)
        return clean(notebook, work)


def quiet() -> dict[str, str]:
    """Return an environment in which other libraries say nothing of their own."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONWARNINGS": ",".join(IGNORED),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }


@contextlib.contextmanager
def hub() -> Iterator[dict[str, str]]:
    """Serve an empty Hub on loopback, and give the environment in which it is *the* Hub."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from tests.push_hub import PushHub

    with PushHub() as server:
        yield {
            "HF_ENDPOINT": server.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_loopback",
        }


@contextlib.contextmanager
def kernel(folder: Path) -> Iterator[None]:
    """Let Jupyter know a kernel of this interpreter, described in `folder`."""
    place = folder / "kernels" / KERNEL
    place.mkdir(parents=True)
    command = [
        sys.executable,
        "-Xfrozen_modules=off",
        "-m",
        "ipykernel_launcher",
        "-f",
        "{connection_file}",
        "--log-level=ERROR",
    ]
    spec = {"argv": command, "display_name": KERNEL, "language": "python"}
    (place / "kernel.json").write_text(json.dumps(spec))
    known = {
        "JUPYTER_PATH": str(folder),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
    }
    with mock.patch.dict(os.environ, known):
        yield


def clean(notebook: NotebookNode, work: Path) -> NotebookNode:
    """Drop what only this run has: bars, other libraries' notices, its folder `work`, metadata."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    here = sorted({f"{work}{os.sep}", f"{work.resolve()}{os.sep}"}, key=len, reverse=True)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = _joined(each for each in cell.outputs if _is_kept(each))
            for output in cell.outputs:
                _relative(output, here)
    return notebook


def _is_kept(output: NotebookNode) -> bool:
    if output.output_type == "stream" and output.name == "stderr":
        output.text = FOREIGN.sub("", output.text)
        return bool(output.text)
    page = output.get("data", {}).get("text/html")
    return page is None or bool(page.strip() and "<progress" not in page)


def _joined(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """Join what was printed before and after something that is dropped."""
    joined: list[NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if output.output_type == "stream" and last is not None and last.get("name") == output.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _relative(output: NotebookNode, here: Iterable[str]) -> None:
    """Show places in the run's folder as they are seen from there."""
    for place in here:
        if "text" in output:
            output.text = output.text.replace(place, "")
        for kind, shown in output.get("data", {}).items():
            if isinstance(shown, str):
                output.data[kind] = shown.replace(place, "")
    if "metadata" in output:
        output.metadata = nbformat.from_dict({})


def main() -> None:
    """Execute and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 3-serve; all by default")
    given = parser.parse_args()
    files = {file.stem: file for file in tutorials()}
    if unknown := sorted(set(given.names) - set(files)):
        parser.error(f"there is no tutorial {', '.join(unknown)}; there are {', '.join(files)}")
    fleet = make_fleet(ROOT / ".cache" / "tutorials")
    for name in given.names or files:
        print(name, flush=True)
        nbformat.write(execute(nbformat.read(files[name], as_version=4), fleet), files[name])


if __name__ == "__main__":
    main()
