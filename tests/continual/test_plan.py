"""Plans: what is wrong in one is said in its own words, and one that is right is run, gone on with and added to."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from subspace_peft.cli import main
from subspace_peft.continual.plan import TaskPlan, read_kept_plan, read_plan
from subspace_peft.continual.run_plan import _under_new_head
from subspace_peft.continual.text_tasks import read_task
from subspace_peft.errors import BadFileError, SubspaceError

from .runs import contents

TWO = {
    "name": "two",
    "data": {split: f"two-{split}.csv" for split in ("train", "validation", "test")},
    "text": "sentence",
    "label": "verdict",
    "validation": "validation",
}
THREE = {
    "name": "three",
    "data": {split: f"three-{split}.json" for split in ("train", "test")},
    "text": ["sentence", "verdict"],
    "label": "kind",
    "metric": "f1",
}
PLAN = {
    "base_model": "base",
    "loras": "loras/*",
    "build": {"k": 4},
    "options": {"extra_rank": 1, "probe": "auto", "margin": "1e-9"},
    "training": {"learning_rate": "3e-3", "max_steps": 2, "per_device_train_batch_size": 8, "report_to": "none"},
    "max_length": 12,
    "tasks": [TWO, THREE],
}


def written(folder: Path, plan: dict, name: str = "plan.yaml") -> Path:
    (folder / name).write_text(yaml.safe_dump(plan, sort_keys=False))
    return folder / name


@pytest.fixture
def texts(text_folder, tmp_path):
    """A folder that the plan and the data lie in."""
    for each in text_folder.iterdir():
        (tmp_path / each.name).symlink_to(each)
    return tmp_path


def changed(plan: dict, path: str, value: object) -> dict:
    """Return a plan with another value at a path such as ``tasks.0.metric``; None takes the key away."""
    made = json.loads(json.dumps(plan))
    place, *keys = made, *path.split(".")
    for key in keys[:-1]:
        place = place[int(key) if isinstance(place, list) else key]
    if value is None:
        place.pop(keys[-1])
    else:
        place[keys[-1]] = value
    return made


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("base_model", None, "base_model: give the base model's folder or Hub id"),
        ("base_model", 3, "base_model: 3: give a folder or a Hub id"),
        ("loras", None, "give either `basis:`, or `loras:`"),
        ("basis", "my-basis", "give either `basis:`, or `loras:`"),
        ("loras", [3], r"loras: \[3\]: give a list of folders"),
        ("task", [], r"unknown: 'task' \(did you mean 'tasks'\?\)"),
        ("tasks", [], "tasks: give a list of tasks"),
        ("tasks", [TWO, TWO], "'two' comes twice"),
        ("tasks", ["x"], "tasks: 'x': give a mapping"),
        ("tasks.0.name", None, "task 1: name: None: give up to 64"),
        ("tasks.0.name", "a/b", "name: 'a/b': give up to 64"),
        ("tasks.0.data", None, "task two: data: None: give a file"),
        ("tasks.0.data", {"dev": "x"}, r"task two: data: unknown: 'dev'"),
        ("tasks.0.data", {"train": 3}, "task two: data: give a file for each of train, validation, test"),
        ("tasks.0.txt", "x", r"task two: unknown: 'txt' \(did you mean 'text'\?\)"),
        ("tasks.0.text", ["a", "b", "c"], "task two: text: .*: give a column, or a list of the two"),
        ("tasks.0.labels", ["x"], "task two: labels: .*: give a list of at least two names"),
        ("tasks.0.metric", "rouge", "metric: 'rouge': choose one of accuracy, f1, matthews"),
        ("tasks.0.limit", 0, "limit: 0: give a number of examples"),
        ("tasks.0.label", 3, "label: 3: give a text"),
        ("tasks.0.training", {"seed": 3}, "task two: training: seed is set for each task by the run"),
        ("max_length", "long", "max_length: 'long': give a number of tokens"),
        ("options.extra_rank", -1, "options: extra_rank: -1: give a whole number, at least 0"),
        ("options.margin", "much", "options: margin: 'much': give a number, 0 or more"),
        ("options.prob", "auto", r"options: unknown: 'prob' \(did you mean 'probe'\?\)"),
        ("options.progress", True, "options: unknown: 'progress'"),
        ("options.push_tasks_to", "org/run", "options: push_tasks_to: 'org/run': all tasks would be pushed to one"),
        ("training.output_dir", "x", "training: output_dir is set for each task by the run"),
        ("training", 3, "training: 3: give names with values"),
    ],
)
def test_what_is_wrong_in_a_plan(tmp_path, path, value, said):
    file = written(tmp_path, changed(PLAN, path, value))
    with pytest.raises(SubspaceError, match=said) as error:
        read_plan(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("base_model", "nowhere/base", "nowhere/base: there is no such folder on this machine"),
        ("training.learning_rat", 1, r"training: there is no 'learning_rat'. Did you mean 'learning_rate'\?"),
        ("config", {"alfa": 1}, r"config: there is no 'alfa'. Did you mean 'alpha'\?"),
        ("config", {"extra_rank": 1}, "config: extra_rank is set for each task by the run"),
        ("config", {"alpha": -1}, "config: alpha"),
        ("build", {"kk": 3}, r"build: there is no 'kk'. Did you mean 'k'\?"),
        ("build", {"k": -3}, "loras: k=-3"),
        ("tasks.0.data", "nowhere.csv", "data: there is no nowhere.csv, neither beside the plan nor from here"),
        ("tasks.0.data", {"train": "plan.txt"}, "data: there is no file plan.txt"),
        (
            "tasks.1.data",
            {"train": "three-train.json"},
            "there is no split 'test'; there are train. Name one of these",
        ),
        ("tasks.0.validation", "dev", "validation: there is no split 'dev'"),
        ("tasks.0.text", "text", "text: there is no column 'text'; there are sentence, verdict, kind"),
        ("tasks.0.label", "stars", "label: there is no column 'stars'"),
        ("tasks.0.labels", ["fine", "good"], "train: the label 'bad' is none of fine, good"),
        ("tasks.1.labels", ["x", "y"], "train: the label 2 is none of x, y"),
        ("tasks.1.labels", [1, 2], "train: the label 0 is none of 1, 2"),
        ("tasks.1.label", "one", "label: all of 16 examples have the label 'x' in the column 'one'"),
        ("tasks.1.label", "id", "label: by the numbers in the column 'id', up to 15000000000, there are 15000000001"),
        ("tasks.1.text", "gap", "train: text: 2 of 16 examples have nothing in the column 'gap', the first .* 4"),
        ("tasks.0.data", {"train": "two-train.csv", "test": "empty.csv"}, r"data: .*empty\.csv has no examples"),
        ("tasks.1.data", {"train": "three-train.json", "test": "empty.json"}, r"empty\.json has no examples"),
        ("training.learning_rate", "fast", "training: learning_rate: 'fast': give a number"),
        ("training.max_steps", 2.5, "training: max_steps: 2.5: give a whole number"),
        ("tasks.1.training", {"eval_strategy": "epoch"}, "Task 'three': .*`validation:`"),
        ("training.bf16", "perhaps", "training: bf16: 'perhaps': give true or false"),
        ("training.per_device_train_batch_size", 0, "training: per_device_train_batch_size: 0: give 1 or more"),
        ("tasks.0.training", {"num_train_epochs": "x"}, "training: num_train_epochs: 'x': give a number"),
    ],
)
def test_what_is_wrong_with_what_a_plan_names(texts, capsys, path, value, said):
    plan = changed(PLAN, path, value)
    file = written(texts, plan)
    assert main(["continual", "run", str(file), "--out", str(texts / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("subspace-peft continual run: ")
    assert re.search(said, error), error
    assert not (texts / "run" / "versions").exists()


def test_numbers_below_zero_are_labels_of_their_own(texts):
    task = TaskPlan("t", {"train": str(texts / "three-train.json")}, text="sentence", label="pm", test="train")
    made = read_task(read_plan(written(texts, PLAN)), task, AutoTokenizer.from_pretrained(texts / "base"))
    assert made.labels == ["-1", "1"] and made.train["labels"][:4] == [0, 1, 0, 1]


def test_a_loras_labels_are_those_of_the_training_split(texts):
    rows = json.loads((texts / "three-test.json").read_text())
    (texts / "fewer.json").write_text(json.dumps([row for row in rows if row["kind"] != 1]))
    data = {"train": str(texts / "three-train.json"), "test": str(texts / "fewer.json")}
    task = TaskPlan("t", data, text="sentence", label="kind", lora="loras/0")
    made = read_task(read_plan(written(texts, PLAN)), task, AutoTokenizer.from_pretrained(texts / "base"))
    assert made.labels == ["0", "1", "2"] and made.train is None and set(made.test["labels"]) == {0, 2}


def test_a_number_as_yaml_takes_for_a_text_is_one(texts):
    plan = read_plan(written(texts, PLAN))
    assert (plan.training["learning_rate"], plan.options["margin"]) == (3e-3, 1e-9)
    assert plan.loras == [str(texts / "loras" / "*")] and plan.base_model == str(texts / "base")


def test_a_plan_is_run_shown_gone_on_with_and_added_to(texts, capsys, tmp_path):
    run = texts / "run"
    first = changed(PLAN, "tasks", [TWO])
    assert main(["continual", "run", str(written(texts, first)), "--out", str(run), "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["learned"] == ["two"] and len(found["scores"]) == 1 and found["bwt"] is None
    before = contents(run / "versions")

    # nothing is left to do
    assert main(["continual", "resume", str(run), "-q"]) == 0
    assert contents(run / "versions") == before
    assert "ACC" in capsys.readouterr().out

    # tasks may be added behind
    lora = {**TWO, "name": "lora", "lora": "loras/1"}
    more = changed(PLAN, "tasks", [TWO, THREE, lora])
    assert main(["continual", "run", str(written(texts, more)), "--out", str(run), "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["learned"] == ["two", "three", "lora"]
    assert found["bwt"] == found["forgetting"] == 0
    assert found["scores"][2][0] == found["scores"][0][0]

    assert main(["continual", "status", str(run), "--markdown", "--figure", str(tmp_path / "run.png")]) == 0
    said = capsys.readouterr().out
    assert "| after | two | three | lora |" in said and (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((next(run.glob("versions/*/tasks/two")) / "adapter_config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}


@pytest.fixture
def run(texts):
    """A run of one task."""
    assert (
        main(
            ["continual", "run", str(written(texts, changed(PLAN, "tasks", [TWO]))), "--out", str(texts / "run"), "-q"]
        )
        == 0
    )
    return texts / "run"


def test_what_a_run_does_not_take_from_a_plan_that_changed(run, texts, capsys):
    def said(plan: dict) -> str:
        assert main(["continual", "run", str(written(texts, plan)), "--out", str(run), "-q"]) == 1
        return capsys.readouterr().err

    one = changed(PLAN, "tasks", [TWO])
    assert "options.extra_rank was 1, and is 3 now" in said(changed(one, "options.extra_rank", 3))
    assert "config.alpha was null, and is 128 now" in said(changed(one, "config", {"alpha": 128}))
    assert "'two' was learned in" in said(changed(PLAN, "tasks", [THREE]))
    kept = (run / "plan.json").read_bytes()
    assert "loras was [" in said(changed(one, "loras", "loras/0"))
    assert f"build.k was {PLAN['build']['k']}, and is 7 now" in said(changed(one, "build.k", 7))
    (texts / "other").mkdir()
    assert re.search(r'base_model was ".*base", and is ".*other" now', said(changed(one, "base_model", "other")))
    from_basis = changed(changed(changed(one, "loras", None), "build", None), "basis", str(run / "versions/1/basis"))
    assert "basis was built from `loras:`, and is" in said(from_basis)
    assert (run / "plan.json").read_bytes() == kept
    relabelled = {**TWO, "labels": ["good", "bad"]}
    assert "was learned with the labels ['bad', 'good'], and now has" in said(changed(PLAN, "tasks", [relabelled]))
    assert "was learned already, from other data (training)" in said(changed(PLAN, "tasks", [{**TWO, "limit": 5}]))


def test_a_head_of_its_own_is_no_news_and_a_lacking_encoder_is(texts, monkeypatch):
    heard = io.StringIO()
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [logging.StreamHandler(heard)])
    one = changed(changed(PLAN, "tasks", [THREE]), "options.probe", "never")
    assert main(["continual", "run", str(written(texts, one)), "--out", str(texts / "quiet"), "-q"]) == 0
    assert "MISMATCH" not in heard.getvalue()
    lacking, gone = texts / "lacking", "bert.encoder.layer.0.output.dense.weight"
    shutil.copytree(texts / "base", lacking)
    tensors = load_file(lacking / "model.safetensors")
    del tensors[gone]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    plan = read_plan(written(texts, changed(one, "base_model", "lacking")))
    with pytest.warns(UserWarning, match=f"base_model: .*lacking lacks {gone} of a BertForSequenceClassification"):
        _under_new_head(plan, 2)


def test_a_run_of_a_version_without_an_option_goes_on(run, texts):
    journal = run / "continual.json"
    state = json.loads(journal.read_text())
    del state["settings"]["options"]["forward"]
    journal.write_text(json.dumps(state))
    assert main(["continual", "run", str(texts / "plan.yaml"), "--out", str(run), "-q"]) == 0


def test_a_diverged_training_is_begun_again_with_another_rate(run, texts, capsys):
    broken = changed(changed(PLAN, "training.learning_rate", "1e30"), "tasks.0.training", {"learning_rate": "3e-3"})
    words = ["continual", "run", str(written(texts, broken)), "--out", str(run), "-q"]
    assert main(words) == 1
    assert "Task 'three': the training diverged" in capsys.readouterr().err
    assert main(["continual", "status", str(run)]) == 0
    assert "Task 'three' was begun; next is" in capsys.readouterr().out
    written(texts, PLAN)
    assert main(words) == 1
    assert "training.learning_rate was 1e+30, and is 0.003 now" in capsys.readouterr().err
    assert main([*words, "--restart"]) == 0
    assert json.loads((run / "continual.json").read_text())["tasks"][1]["training"]["learning_rate"] == 3e-3


def test_a_plan_whose_models_were_moved_goes_on(run, texts):
    for name in ("base", "loras"):
        (texts / name).rename(texts / f"moved-{name}")
    moved = changed(changed(changed(PLAN, "tasks", [TWO]), "base_model", "moved-base"), "loras", "moved-loras/*")
    assert main(["continual", "run", str(written(texts, moved)), "--out", str(run), "-q"]) == 0
    assert read_kept_plan(run).base_model == str(texts / "moved-base")


def test_a_task_that_fails_can_be_taken_out_of_the_plan(run, texts, capsys):
    broken = changed(PLAN, "tasks", [TWO, {**THREE, "training": {"learning_rate": "1e30"}}])
    words = ["continual", "run", str(written(texts, broken)), "--out", str(run), "-q"]
    assert main(words) == 1
    written(texts, changed(PLAN, "tasks", [TWO]))
    capsys.readouterr()
    assert main(words) == 1
    assert "'three' was begun in" in (said := capsys.readouterr().err) and "--restart" in said
    assert main([*words, "--restart"]) == 0
    assert [each["name"] for each in json.loads((run / "continual.json").read_text())["tasks"]] == ["two"]
    assert not (run / "work").exists()


def test_folders_without_a_run(tmp_path, capsys):
    assert main(["continual", "status", str(tmp_path)]) == 1
    assert "holds no run: there is no continual.json" in capsys.readouterr().err
    assert main(["continual", "resume", str(tmp_path)]) == 1
    assert "holds no run of a plan" in capsys.readouterr().err
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(BadFileError, match=r"plan\.json: no plan can be read"):
        read_kept_plan(tmp_path)
    assert main(["continual", "run", str(written(tmp_path, PLAN))]) == 1
    assert "Give the run's folder: `out:` in" in capsys.readouterr().err
