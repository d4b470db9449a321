"""The tutorials: what is committed is a whole, clean run, and a run of today prints the same kinds of things."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from filelock import FileLock

FOLDER = Path(__file__).parents[2] / "docs" / "tutorials"
NAMES = ["1-compress", "2-train", "3-serve", "4-share", "5-worth-it"]
MOST_BYTES, WIDEST = 200_000, 100
# a place on a machine, or one that only the run's own Hub has
PLACE = re.compile(r"(?<![\w.])/(?:tmp|home|root|Users|private|var|usr|opt|work)/|[A-Z]:\\|127\.0\.0\.1|localhost")


@pytest.fixture(scope="session")
def runner() -> ModuleType:
    """The script that `make tutorials` runs."""
    spec = importlib.util.spec_from_file_location("tutorials_run", FOLDER / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook: Any) -> list[set[str]]:
    """Per code cell the kinds of its outputs: ``stdout``, ``execute_result`` …"""
    return [{output.get("name") or output.output_type for output in cell.outputs} for cell in code(notebook)]


def texts(notebook: Any) -> list[str]:
    """All that the cells show as text."""
    found = []
    for output in (output for cell in code(notebook) for output in cell.outputs):
        found += [output.text] if "text" in output else [str(value) for value in output.get("data", {}).values()]
    return found


def words(cell: Any) -> set[str]:
    """The words that a cell shows, figures, their order and the letters within fingerprints aside."""
    shown = [output.get("text") or output.get("data", {}).get("text/markdown", "") for output in cell.outputs]
    return set(re.findall(r"\b[A-Za-z]{2,}\b", " ".join(shown)))


def test_a_fingerprint_has_no_words() -> None:
    def cell(text: str) -> Any:
        return nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("stream", name="stdout", text=text)])

    shown = "basis my-basis at commit {}, fingerprint {}, k=16"
    assert words(cell(shown.format("8cb12f90", "71cb9de0"))) == words(cell(shown.format("1de0f7ab", "09af3310")))
    assert words(cell("two own directions")) == {"two", "own", "directions"}


def test_there_are_five(runner: ModuleType) -> None:
    assert [file.stem for file in runner.tutorials()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_is_a_clean_run(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) > len(cells) / 2
    for found in kinds(notebook):
        assert found <= {"stdout", "execute_result", "display_data"}
    for shown in texts(notebook):
        assert "Warning" not in shown and "Traceback" not in shown, shown
        assert "<progress" not in shown and "IPython.core.display.HTML" not in shown
        assert not PLACE.search(shown), shown


@pytest.mark.parametrize("name", NAMES)
def test_its_code_is_python_within_the_page(name: str) -> None:
    for number, cell in enumerate(code(read(name)), 1):
        compile(cell.source, f"{name}, cell {number}", "exec")
        assert max(map(len, cell.source.splitlines())) <= WIDEST


@pytest.mark.parametrize("name", NAMES)
def test_it_says_how_to_use_ones_own_models(name: str) -> None:
    notebook = read(name)
    assert "subspace-peft demo --stage sources --out fleet" in "".join(cell.source for cell in notebook.cells)
    assert "# <- your" in "".join(cell.source for cell in code(notebook)[:2])


def test_a_run_is_cleaned_of_what_only_it_has(runner: ModuleType, tmp_path: Path) -> None:
    new = nbformat.v4
    outputs = [
        new.new_output("display_data", {"text/html": "<div><progress value=3></progress></div>"}),
        new.new_output("display_data", {"text/html": "", "text/plain": "<IPython.core.display.HTML object>"}),
        new.new_output("stream", name="stdout", text="one\n"),
        new.new_output(
            "stream", name="stderr", text="Failed to load CPU gemm_4bit_forward from kernels-community: x\n"
        ),
        new.new_output("stream", name="stdout", text=f"{tmp_path.resolve()}/my-basis\n"),
        new.new_output("execute_result", {"text/plain": f"Basis({tmp_path}/my-basis)"}, metadata={"a": 1}),
        new.new_output("stream", name="stderr", text="UserWarning: mind this\n"),
    ]
    cell = new.new_code_cell("x", outputs=outputs, metadata={"execution": {"iopub": "now"}})
    cleaned = runner.clean(
        new.new_notebook(cells=[cell], metadata={"kernelspec": {"name": "k", "display_name": "k"}}), tmp_path
    )
    assert cleaned.metadata.kernelspec.name == "python3" and not cleaned.cells[0].metadata
    one, result, warning = cleaned.cells[0].outputs
    assert one.text == "one\nmy-basis\n"
    assert result.data == {"text/plain": "Basis(my-basis)"} and not result.metadata
    assert warning.text == "UserWarning: mind this\n"  # ours are not hidden


# -- run today --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def fleet(runner: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base model, data and adapters, made once for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(shared / "tutorials.lock", timeout=1500):
        return runner.make_fleet(shared / "tutorials")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_says_what_is_committed(name: str, runner: ModuleType, fleet: Path) -> None:
    committed = read(name)
    fresh = runner.execute(committed, fleet)
    assert kinds(fresh) == kinds(committed)
    for number, (before, now) in enumerate(zip(code(committed), code(fresh), strict=True), 1):
        old, new = words(before), words(now)
        # figures, their order and a sentence that hangs on them may differ; other words want `make tutorials`
        assert len(old & new) >= 0.8 * len(old | new), (number, old ^ new)
    for shown in texts(fresh):
        for secret in (socket.gethostname(), str(Path.home()), str(fleet), "tutorial-"):
            assert secret not in shown, secret
