"""recipes/glue.py --stage choose: this basis, it with directions of the task's own, or LoRA, by validation."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import common.recipe as stages
import pytest
from peft import LoraConfig, PeftModel

from subspace_peft import build_basis
from subspace_peft.errors import SubspaceError
from subspace_peft.tuner import SubspaceConfig

from .conftest import tiny

NAMES = ["this basis", "this basis + 1 own", "LoRA r=2"]


def choose(recipe, world: Path, basis: Path, out: Path, *more: str) -> dict[str, dict]:
    given = ["--stage", "choose", "--basis", str(basis), "--own", "1", "--epochs", "1", *more]
    recipe.main(tiny(world, out, *given))
    task = given[given.index("--task") + 1] if "--task" in given else "kept"
    body = json.loads((out / "choose" / task / "choice.json").read_text())
    return {**body, "rows": {row["method"]: row for row in body["candidates"]}}


@pytest.fixture(scope="package")
def basis(recipe, world, tmp_path_factory) -> Path:
    args = recipe.shared.parse_arguments(recipe.Arguments, recipe.PRESETS, tiny(world, world))
    made = build_basis(
        k=4,
        builder="random",
        base_model=recipe.make_model(args, 2, 0),
        target_modules=args.target_modules,
        progress=False,
    )
    folder = tmp_path_factory.mktemp("basis")
    made.save_pretrained(folder, overwrite=True)
    return folder


@pytest.fixture(scope="package")
def chosen(recipe, world, basis, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("chosen")
    choose(recipe, world, basis, out)
    return out


def lora_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    original = stages.choose_smallest

    def won(found, **given):
        best = replace(found[-1], validation=2.0, without=[2.0] * len(found[-1].without))
        return original([*found[:-1], best], **given)

    monkeypatch.setattr(stages, "choose_smallest", won)


def test_every_candidate_is_trained_and_the_chosen_one_alone_is_tested_and_saved(recipe, world, basis, chosen):
    body = choose(recipe, world, basis, chosen)
    assert sorted(body["rows"]) == sorted(NAMES)
    assert {name: row["trained_adapter"] for name, row in body["rows"].items()} == {
        "this basis": 64,
        "this basis + 1 own": 64 + 4 * 64,
        "LoRA r=2": 4 * 2 * 64,
    }
    # one rate each, 32 examples by 16, one epoch
    assert all((row["runs"], row["steps"]) == (1, 2) for row in body["rows"].values())
    assert [name for name, row in body["rows"].items() if row["test"] is not None] == [body["chosen"]]
    assert sorted(path.name for path in (chosen / "tasks").iterdir()) == ["kept-chosen"]
    assert len(list((chosen / "adapters").iterdir())) == 3
    card = (chosen / "tasks" / "kept-chosen" / "README.md").read_text()
    assert f"## How its kind was chosen\n\nChosen: {body['chosen']};" in card


def test_the_saved_adapter_scores_what_is_told_of_it(recipe, world, basis, chosen):
    body = choose(recipe, world, basis, chosen)
    args = recipe.shared.parse_arguments(recipe.Arguments, recipe.PRESETS, tiny(world, chosen))
    task = recipe.load_task(args, "kept")
    model = PeftModel.from_pretrained(recipe.make_model(args, 2, 5), str(chosen / "tasks" / "kept-chosen"))
    assert recipe.test(args, model, task)["test"] == body["rows"][body["chosen"]]["test"]
    without = task.validations_without(recipe.make_trainer(args, model, task))
    # sixteen examples, so as many folds, whose mean is the accuracy on all
    assert len(without) == 16 and sum(without) / 16 == pytest.approx(body["rows"][body["chosen"]]["validation"])


def test_nothing_is_trained_twice_and_the_others_are_tested_when_asked(recipe, world, basis, chosen, trained):
    body = choose(recipe, world, basis, chosen, "--test_others")
    assert trained == [] and None not in [row["test"] for row in body["rows"].values()]
    next((chosen / "cells").glob("lora-r-2-*.json")).unlink()
    choose(recipe, world, basis, chosen)
    assert trained == [1]


def test_a_lost_adapter_is_trained_again(recipe, world, basis, chosen, trained, tmp_path):
    out = shutil.copytree(chosen, tmp_path / "out")
    shutil.rmtree(out / "adapters")
    before = (out / "tasks" / "kept-chosen" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "tasks")
    choose(recipe, world, basis, out)
    assert trained == [1]
    assert (out / "tasks" / "kept-chosen" / "adapter_model.safetensors").read_bytes() == before


def test_a_lora_that_wins_is_saved_as_a_stock_one(recipe, world, basis, chosen, tmp_path, monkeypatch):
    out = shutil.copytree(chosen, tmp_path / "out")
    lora_wins(monkeypatch)
    body = choose(recipe, world, basis, out)
    assert body["chosen"] == "LoRA r=2"
    folder = out / "tasks" / "kept-chosen"
    assert type(LoraConfig.from_pretrained(folder)) is LoraConfig
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    card = (folder / "README.md").read_text()
    assert "## How its kind was chosen\n\nChosen: LoRA r=2;" in card and "448 more than this basis" in card
    # another margin is another choice, of the same runs
    monkeypatch.undo()
    again = choose(recipe, world, basis, out, "--standard_errors", "1e9")
    assert again["chosen"] == "this basis"
    assert isinstance(SubspaceConfig.from_pretrained(folder), SubspaceConfig)
    assert "LoRA r=2 |" in (folder / "README.md").read_text()


def test_no_test_is_looked_at_before_the_choice(recipe, world, basis, tmp_path, monkeypatch):
    events: list[str] = []
    choose_smallest, test = stages.choose_smallest, recipe.LabelledTask.test

    def chosen(*given, **more):
        events.append("choice")
        return choose_smallest(*given, **more)

    def tested(self, trainer):
        events.append("test")
        return test(self, trainer)

    monkeypatch.setattr(stages, "choose_smallest", chosen)
    monkeypatch.setattr(recipe.LabelledTask, "test", tested)
    body = choose(recipe, world, basis, tmp_path, "--task", "kept-number", "--test_others")
    assert events == ["choice", "test", "test", "test"]
    # a correlation is no mean over examples, and has an error all the same
    behind = [row for row in body["rows"].values() if row["behind"]]
    assert behind and all(row["standard_error"] > 0 for row in behind)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--coefficients", "none"], "--coefficients none does not"),
        (["--extra_rank", "2"], "name by --own those to be tried, such as --own 2"),
        (["--own", "0"], "--own 0: give numbers of directions from 1 on"),
        (["--own", "2", "2"], "each once"),
        (["--standard_errors", "-1"], "give a number from 0 on"),
    ],
)
def test_what_leaves_nothing_to_choose_is_refused(more, message, recipe, world, basis, tmp_path):
    with pytest.raises(SubspaceError, match=message):
        recipe.main(tiny(world, tmp_path, "--stage", "choose", "--basis", str(basis), *more))


def test_the_plan_has_the_candidates_and_their_steps(world, dry, tmp_path):
    text = dry(*tiny(world, tmp_path, "--stage", "choose"))
    assert "choose, 5 runs: 20" in text and "this basis + 4 own: 1,088 = 4,352 bytes" in text
    assert "own:" not in dry(*tiny(world, tmp_path))
