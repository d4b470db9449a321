"""recipes/mistral.py --stage choose: candidates are chosen by the loss on the answers."""

from __future__ import annotations

import json

import pytest
from common.jackknife import kept_without
from peft import PeftModel

from subspace_peft import build_basis

from .conftest import HELD_OUT, make_model, recipe, run


@pytest.mark.parametrize("more", [(), ("--packing",)])
def test_candidates_are_chosen_by_the_loss_and_tested_by_their_answers(folder, tmp_path, more):
    made = {"base_model": make_model(), "target_modules": ["q_proj", "v_proj"], "progress": False}
    build_basis(k=4, builder="random", **made).save_pretrained(tmp_path / "basis")
    given = ("--basis", str(tmp_path / "basis"), "--own", "1", *more)
    run(folder, tmp_path, "--stage", "choose", *given)
    body = json.loads((tmp_path / "choose" / HELD_OUT / "choice.json").read_text())
    rows = {row["method"]: row for row in body["candidates"]}
    assert set(rows) == {"this basis", "this basis + 1 own", "LoRA r=8"}
    assert all(row["validation"] < 0 for row in rows.values())
    (chosen,) = (row for row in rows.values() if row["test"] is not None)
    assert chosen["method"] == body["chosen"]
    # without each of the eight examples in turn, by the loss per answer token of the others
    typed = ["--preset", "smoke", "--model", str(folder / "model"), "--data_dir", str(folder), *more]
    args = recipe.shared.parse_arguments(recipe.Arguments, recipe.PRESETS, [*typed, "--task", HELD_OUT])
    task = recipe.load_task(args, HELD_OUT)
    saved = tmp_path / "tasks" / f"{HELD_OUT}-chosen"
    model = PeftModel.from_pretrained(recipe.make_model(args, task, 3), str(saved))
    found = task.validations_without(recipe.make_trainer(args, model, task))
    assert len(found) == 8 and len(set(found)) > 1
    counts = [sum(label != -100 for label in row["labels"]) for row in task.splits["validation"]]
    task.splits["validation"] = task.splits["validation"].select(range(1))
    alone = -recipe.make_trainer(args, model, task).evaluate()["eval_loss"]
    (place,) = [i for i, kept in enumerate(kept_without(8)) if 0 not in kept]
    whole = _whole(found, kept_without(8), counts)
    rest = (whole * sum(counts) - alone * counts[0]) / (sum(counts) - counts[0])
    assert found[place] == pytest.approx(rest, rel=1e-4)


def _whole(without, kept, counts):
    """Return the score on all examples, which the scores without each of them determine."""
    total = sum(score * sum(counts[i] for i in places) for score, places in zip(without, kept, strict=True))
    return total / (len(counts) - 1) / sum(counts)
