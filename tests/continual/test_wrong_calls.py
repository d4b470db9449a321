"""What is wrong in a call of a learner is said and changes nothing; so do faults."""

from __future__ import annotations

import errno
import math
import os
import warnings

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from subspace_peft import ContinualOptions, SubspaceBasis, SubspaceConfig
from subspace_peft.continual import learner as learners
from subspace_peft.continual.arguments import recorded
from subspace_peft.continual.lock import LOCK_FILE
from subspace_peft.errors import BasisNotFoundError, DiskError, OccupiedError, SubspaceError
from subspace_peft.tuner.base_weights import model_name

from ..models import gpt2
from .runs import again, arguments, contents, copied, data, learner, model, options

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


# -- calls that are wrong ----------------------------------------------------------------------


def labelled(names):
    """A data set whose column of labels is numbered by `names`."""
    rows = data(1)
    features = Features({"input_ids": Sequence(Value("int64")), "labels": ClassLabel(names=list(names))})
    columns = {"input_ids": [row["input_ids"].tolist() for row in rows], "labels": [row["labels"] for row in rows]}
    return Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("b", {"eval_dataset": data(2)}, "Task 'b' has no training data"),
        ("b", {"train_dataset": data(1)}, "Task 'b' has no evaluation data"),
        ("b", {"train_dataset": [], "eval_dataset": data(2)}, "its training data are empty"),
        ("b", {"train_dataset": data(1), "eval_dataset": []}, "its evaluation data are empty"),
        ("b", {"train_dataset": iter(data(1)), "eval_dataset": data(2)}, "a list_iterator, which has no length"),
        ("b", {"train_dataset": data(1), "eval_dataset": data(2), "lora": "x"}, "give train_dataset= or lora=, not"),
        ("b", {"lora": "/nowhere/at-all", "eval_dataset": data(2)}, "nowhere"),
        ("a/b", {"train_dataset": data(1), "eval_dataset": data(2)}, "'a/b' cannot be a folder's"),
        (3, {"train_dataset": data(1), "eval_dataset": data(2)}, "3 cannot be a folder's"),
        (
            "b",
            {"train_dataset": labelled("xy"), "eval_dataset": labelled("yx")},
            "data number the labels 0 'y'",
        ),
        ("b", {"train_dataset": [{**row, "labels": 2} for row in data(1)], "eval_dataset": data(2)}, "labels up to 2"),
        ("b", {"train_dataset": data(1), "eval_dataset": data(2), "args": 3}, "args is a int: give TrainingArguments"),
    ],
)
def test_a_call_that_is_wrong_changes_nothing(run, name, given, said):
    with again(run) as made:
        before = contents(run)
        with pytest.raises(SubspaceError, match=said):
            made.learn(name, **given)
        assert contents(run) == before


def test_a_training_that_is_judged_on_the_way_needs_data_to_judge_by(run):
    judged = arguments(eval_strategy="epoch")
    with again(run) as made:
        with pytest.raises(SubspaceError, match=r"\(eval_strategy='epoch'\).*Give validation_dataset="):
            made.learn("b", data(1), data(2), args=judged)
        assert made.status.unfinished is None
        assert made.learn("b", data(1), data(2), validation_dataset=data(3), args=judged).learned == ("a", "b")


def test_what_seldom_decides_a_training_is_recorded_where_it_does():
    assert "dataloader_drop_last" not in recorded(arguments())
    assert recorded(arguments(dataloader_drop_last=True))["dataloader_drop_last"] is True


def test_a_task_is_learned_once(run):
    with learner(run) as made:
        before = contents(run)
        made.learn("a", data(ord("a")), data(ord("a") + 100))
        assert contents(run) == before
        with pytest.raises(SubspaceError, match=r"'a' was learned already, from other data \(training\)"):
            made.learn("a", data(9), data(ord("a") + 100))
        with pytest.raises(SubspaceError, match=r"from other data \(evaluation\)"):
            made.learn("a", data(ord("a")), data(9))
        with pytest.raises(SubspaceError, match="was learned with the labels None, and now has"):
            made.learn("a", data(ord("a")), data(ord("a") + 100), labels=["no", "yes"])
        with pytest.warns(UserWarning, match="stays as it is, though learning_rate was 0.003, and is 0.1 now"):
            made.learn("a", data(ord("a")), data(ord("a") + 100), args=arguments(learning_rate=0.1))
        assert contents(run) == before


def test_earlier_tasks_data_have_to_be_known(run):
    with learner(run) as made:
        with pytest.raises(SubspaceError, match=r"does not know the data of a. Call `learn\('a', …\)`"):
            made.learn("b", data(1), data(2))
        with pytest.raises(SubspaceError, match="does not know how task 'a' is scored"):
            made.evaluate("a")
        with pytest.raises(SubspaceError, match=r"Task 'b' is not learned\. Learned are: a"):
            made.task_folder("b")


def test_other_settings_are_named(run, first_basis, tmp_path):
    with pytest.raises(SubspaceError, match=r"options\.extra_rank was 1, and is 2 now"):
        learner(run, options=options(extra_rank=2))
    with pytest.raises(SubspaceError, match=r'config.coefficients was null, and is "factor" now'):
        learner(run, config=SubspaceConfig(coefficients="factor", r=2))
    other = SubspaceBasis.from_pretrained(first_basis).truncate(3)
    with pytest.raises(SubspaceError, match="basis was "):
        learner(run, other)
    # the basis that it began with may be given again, or left out, and the storage policy may change
    learner(run, first_basis).close()
    learner(run, options=options(keep="all", max_drift=0.1)).close()
    with pytest.raises(SubspaceError, match="holds no run yet, so its first basis is needed"):
        learner(tmp_path / "new")
    with pytest.raises(BasisNotFoundError, match="not-there"):
        learner(tmp_path / "new", tmp_path / "not-there")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "what", "given"),
    [
        ("train_dataset", "training", {}),
        ("eval_dataset", "evaluation", {}),
        ("validation_dataset", "validation", {}),
        ("eval_dataset", "evaluation", {"compute_metrics": lambda found: {"x": 1.0}}),
    ],
)
def test_data_without_labels(run, name, what, given):
    bare = [{"input_ids": row["input_ids"]} for row in data(3)]
    with again(run) as made:
        before = contents(run)
        said = f"'b': its {what} data have no labels: an example has input_ids, .* takes them as labels"
        with pytest.raises(SubspaceError, match=said):
            made.learn("b", **{"train_dataset": data(1), "eval_dataset": data(2), name: bare}, **given)
        assert contents(run) == before and made.status.unfinished is None


def test_data_without_labels_are_enough_where_the_users_own_functions_make_them(first_basis, tmp_path):
    bare = [{"input_ids": row["input_ids"]} for row in data(3)]

    def collate(rows):
        return {"input_ids": torch.stack([row["input_ids"] for row in rows]), "labels": torch.zeros(len(rows)).long()}

    with learner(tmp_path / "collated", first_basis, data_collator=collate) as made:
        assert made.learn("t", bare, bare).matrix.score(1, 1) >= 0
    with learner(tmp_path / "own", first_basis, train=lambda model, run: None, metric=lambda model, rows: 1) as made:
        assert made.learn("t", bare, bare).matrix.score(1, 1) == 1


def wide():
    return BertForSequenceClassification(
        BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=100)
    )


def adapted():
    return get_peft_model(model(), LoraConfig(r=2, target_modules=["query"]))


# what a learner refuses when it is made
REFUSED = [
    ({"model": "base"}, "model is a str: give a base model"),
    ({"args": "x"}, "args is a str"),
    ({"config": {"alpha": 3}}, "config is a dict: give a SubspaceConfig"),
    ({"config": SubspaceConfig(basis="x")}, "config has basis='x', which the learner sets"),
    ({"config": SubspaceConfig(extra_rank=2)}, "config has extra_rank=2, which the learner sets"),
    (
        {"config": SubspaceConfig(extra_rank_pattern={"value": 2}), "options": options(probe="never")},
        "extra_rank_pattern={'value': 2}, and no task gets own directions with probe='never'",
    ),
    ({"args": arguments(push_to_hub=True)}, "push_to_hub would push the checkpoints"),
    ({"options": {"extra_rank": 1}}, "options is a dict: give ContinualOptions"),
    ({"learning_rate": 1.0}, "learning_rate= is no argument of the learner, and none that .* Trainer, .*callbacks"),
    ({"eval_dataset": []}, "eval_dataset= is no argument of the learner"),
    ({"config": SubspaceConfig(target_modules=r".*nope")}, "target_modules=.* names no module of Bert"),
    ({"config": SubspaceConfig(target_modules=["key"])}, "target modules are not in the basis"),
    ({"config": SubspaceConfig(start="mine")}, "no such source in the basis"),
    ({"model": gpt2()}, "None of the basis's .* modules .* is in GPT2LMHeadModel"),
    ({"model": wide()}, "have other shapes than the basis"),
    ({"model": adapted()}, "The base model has adapters already"),
]


@pytest.mark.parametrize("there", [False, True], ids=["no folder", "an empty folder"])
@pytest.mark.parametrize(("given", "said"), REFUSED)
def test_what_is_refused_leaves_no_trace(first_basis, tmp_path, given, said, there):
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
    with pytest.raises(SubspaceError, match=said):
        learner(folder, first_basis, **given)
    assert sorted(tmp_path.rglob("*")) == [folder] * there


@pytest.mark.parametrize(("given", "said"), REFUSED)
def test_what_is_refused_of_a_run_that_was_begun_leaves_no_trace(run, given, said):
    (run / LOCK_FILE).unlink()
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    # a setting that changed is found first
    said = rf"{said}|this run began with other settings: (config|base_model)"
    with pytest.raises(SubspaceError, match=said):
        learner(run, **given)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    learner(run).close()


def test_other_settings_leave_no_trace(run, first_basis):
    (run / LOCK_FILE).unlink()
    before = contents(run)
    for given in (
        {"basis": SubspaceBasis.from_pretrained(first_basis).truncate(3)},
        {"options": options(extra_rank=2)},
        {"config": SubspaceConfig(coefficients="factor", r=2)},
    ):
        with pytest.raises(SubspaceError, match="this run began with other settings"):
            learner(run, **given)
        assert contents(run) == before and not (run / LOCK_FILE).exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"extra_rank": -1}, "extra_rank=-1: give a whole number, at least 0"),
        ({"probe": "maybe"}, "choose one of auto, always, never"),
        ({"probe": "always", "extra_rank": 0}, "probe='always' asks for own directions, and extra_rank is 0"),
        ({"margin": -0.1}, "margin=-0.1: give a number, 0 or more"),
        ({"margin": math.nan}, "margin=nan"),
        ({"probe_share": 0}, "probe_share=0: give a share above 0 and up to 1"),
        ({"validation_share": 1}, "validation_share=1: give a share above 0 and below 1"),
        ({"max_k": 0}, "max_k=0"),
        ({"push_tasks_to": "org/x"}, "all tasks would be pushed to one repository"),
        ({"push_tasks_to": "org/{task}"}, "give push_basis_to='org/basis' too"),
        ({"push_basis_to": 3}, "push_basis_to=3: give a text"),
    ],
)
def test_options_that_are_wrong(given, said):
    with pytest.raises(SubspaceError, match=said):
        ContinualOptions(**given)


@pytest.mark.parametrize("there", ["notes.txt", "work/mine/a.txt", "versions/1/mine.txt"])
def test_a_folder_of_something_else_is_left_alone(first_basis, tmp_path, there):
    file = tmp_path / "run" / there
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    for _ in range(2):  # and again: nothing of the first attempt counts as a run
        with pytest.raises(OccupiedError, match=r"and no run: .* Give an empty folder, or one that is not there"):
            learner(tmp_path / "run", first_basis)
    assert file.read_text() == "mine" and [each for each in tmp_path.rglob("*") if each.is_file()] == [file]


def test_two_learners_on_one_folder(run):
    with learner(run) as first:
        with pytest.raises(OccupiedError, match=rf"{run} is in use"):
            learner(run)
        first.learn("a", data(ord("a")), data(ord("a") + 100))
    with pytest.raises(SubspaceError, match="This learner is closed"):
        first.learn("a", data(ord("a")), data(ord("a") + 100))
    learner(run).close()


# -- faults ----------------------------------------------------------------------


def test_a_loss_that_is_not_finite_harms_nothing(run):
    with again(run) as made:
        before = contents(run / "versions")
        with pytest.raises(SubspaceError, match=r"Task 'b': the training diverged: .* is not finite. Lower the"):
            made.learn("b", data(1), data(2), args=arguments(learning_rate=1e30))
        assert contents(run / "versions") == before
        assert made.status.unfinished == ("b", "train")
        with pytest.raises(SubspaceError, match=r"begun with something else: training.learning_rate was 1e\+30"):
            made.learn("b", data(1), data(2))
        with pytest.raises(SubspaceError, match=r"Task 'b' was begun and is not finished\. Learn it first"):
            made.learn("c", data(3), data(4))
        made.learn("b", data(1), data(2), restart=True)
        assert made.tasks == ["a", "b"]


def test_a_task_can_be_given_up(run):
    with again(run) as made:
        before = contents(run)
        with pytest.raises(SubspaceError, match="diverged"):
            made.learn("b", data(1), data(2), args=arguments(learning_rate=1e30))
        made.drop("b")
        assert contents(run) == before
        with pytest.raises(SubspaceError, match="'b' was never begun"):
            made.drop("b")
        with pytest.raises(SubspaceError, match="'a' is learned already"):
            made.drop("a")


@pytest.mark.parametrize("after", [0, 1, 4, 9])
def test_a_full_disk(run, monkeypatch, after):
    """The disk is full from some file on; once there is room, the same call goes on to the same bytes."""
    whole = copied(run, run.parent / "whole")
    with again(whole) as made:
        made.learn("b", data(1), data(2))
    count = [0]
    flush = os.fsync

    def fsync(handle):
        count[0] += 1
        if count[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    with again(run) as made:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(DiskError, match="the disk is full"):
                made.learn("b", data(1), data(2))
        made.learn("b", data(1), data(2))
    assert contents(run) == contents(whole)


def test_it_shows_itself(run):
    with learner(run) as made, warnings.catch_warnings():
        assert repr(made).startswith("ContinualLearner(folder: ") and "ACC: " in repr(made)
        assert "after" in made._repr_html_()
    assert model_name(model()) == "" and learners.__doc__
