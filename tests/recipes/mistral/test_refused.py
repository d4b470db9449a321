"""recipes/mistral.py: what is refused, and Hub data."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import common as shared
import pytest

from subspace_peft import build_basis
from subspace_peft.errors import SubspaceError

from .conftest import HELD_OUT, make_model, recipe, run


def rewrite(folder: Path, split: str, change: Any) -> None:
    file = folder / "data" / HELD_OUT / f"{split}.jsonl"
    rows = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))


BAD = {
    "unknown task": ([], ["--task", "nothing"], "no task nothing"),
    "unknown source": ([], ["--sources", "nothing"], "no task nothing"),
    "own adapter": ([], ["--sources", HELD_OUT], "own adapter"),
    "own adapter elsewhere": ([], ["--sources", "org/my-copy-lora"], "own adapter"),
    "missing column": (
        ["train", lambda r: {"definition": "", "input": r["input"]}],
        [],
        "copy, train: .*no column output",
    ),
    "empty outputs": (
        ["validation", lambda r: {**r, "output": " "}],
        [],
        "copy, validation: 8 of 8 outputs are empty",
    ),
    "no room": ([], ["--tokens", "12"], "copy, train: no room .* --tokens"),
    "too few": ([], ["--train_examples", "41"], "copy, train: 40 examples, but 41"),
    "a metric": (["task.json"], [], "no metric 'bleu'"),
    "no batch": ([], ["--batch", "0"], "--batch at least 1"),
    "no bitsandbytes": ([], ["--load_in_4bit"], "pip install bitsandbytes"),
    "nothing trained": ([], ["--stage", "evaluate"], "--stage train"),
    "no basis": ([], ["--stage", "train"], "--stage basis"),
    "no sources": ([], ["--stage", "basis"], "--stage sources"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    change, arguments, message = BAD[case]
    if case == "no bitsandbytes":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    data = tmp_path / "data-folder"
    shutil.copytree(folder, data)
    if change == ["task.json"]:
        file = data / "data" / HELD_OUT / "task.json"
        file.write_text(file.read_text().replace("exact_match", "bleu"))
    elif change:
        rewrite(data, *change)
    monkeypatch.setattr(recipe.shared.recipe, "fit", lambda *_: pytest.fail("training began"))
    with pytest.raises(SubspaceError, match=message):
        run(data, tmp_path / "out", *arguments)


def test_a_basis_of_another_base_model_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = build_basis(
        builder="base-weights", base_model=make_model(hidden=64), target_modules=["q_proj", "v_proj"], k=8
    )
    other.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(recipe.shared.recipe, "fit", lambda *_: pytest.fail("training began"))
    for stage in ("all", "compare"):
        with pytest.raises(SubspaceError, match="basis"):
            run(folder, tmp_path / "out", "--basis", str(tmp_path / "other"), "--stage", stage)


def test_an_adapter_of_another_base_model_is_refused(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "a", "--stage", "sources", "--sources", "first")
    file = tmp_path / "a" / "sources" / "first" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "org/other"}))
    with pytest.raises(SubspaceError, match="trained on org/other"):
        run(folder, tmp_path / "b", "--stage", "sources", "--sources", str(file.parent))


def test_adapters_that_exist_are_used_and_a_basis_that_holds_the_tasks_own_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    run(folder, tmp_path / "a", "--stage", "sources")
    made = [str(tmp_path / "a" / "sources" / name) for name in ("first", "last", "second")]
    for stage in ("sources", "basis"):
        run(folder, tmp_path / "b", "--stage", stage, "--sources", *made)
    assert not (tmp_path / "b" / "sources").exists()
    with pytest.raises(SubspaceError, match="own adapter"):
        run(folder, tmp_path / "b", "--stage", "train", "--task", "last", "--basis", str(tmp_path / "b" / "basis"))


@pytest.mark.parametrize("task", ["Lots-of-LoRAs/task1391_winogrande", "Lots-of-LoRAs/task1391"])
def test_lots_of_loras_adapters_are_known_by_their_number(task: str) -> None:
    with pytest.raises(SubspaceError, match="own adapter"):
        recipe.main(["--dry_run", "--task", task])


def test_the_hub_needs_a_task() -> None:
    with pytest.raises(SubspaceError, match="--task"):
        recipe.main([])


def test_hub_data_has_lists_of_answers_and_no_definition() -> None:
    assert shared.one_answer({"input": "x", "output": ["a", "b"]}) == {"definition": "", "input": "x", "output": "a"}
    assert shared.one_answer({"input": "x", "output": []})["output"] is None
