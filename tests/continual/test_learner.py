"""Learning task after task: old tasks answer as before to the bit, and what is wrong in a call is said."""

from __future__ import annotations

import errno
import math
import os
import shutil
import warnings

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from peft import PeftModel
from safetensors.torch import load_file

from subspace_peft import ContinualOptions, SubspaceBasis, SubspaceConfig, save_adapter
from subspace_peft.basis import dependents
from subspace_peft.continual import learner as learners
from subspace_peft.errors import DiskError, OccupiedError, SubspaceError
from subspace_peft.tuner.base_weights import model_name

from ..models import bert, inputs, train_lora
from .runs import arguments, contents, copied, data, learn, learner, model, options

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def again(run, **more):
    """A learner that knows the data of the task a."""
    made = learner(run, **more)
    made.learn("a", data(ord("a")), data(ord("a") + 100))
    return made


def logits(made, name):
    with torch.no_grad():
        return made.load(name).eval()(inputs()).logits


# -- growth and forgetting ----------------------------------------------------------------------


def test_tasks_answer_as_before_to_the_bit_after_growth(run):
    with again(run) as made:
        before, tensors = logits(made, "a"), load_file(made.task_folder("a") / "adapter_model.safetensors")
        old = made.basis_folder
        size = SubspaceBasis.from_pretrained(old).shapes()
        made.learn("b", data(1), data(2))
        made.learn("c", data(3), data(4))
        assert torch.equal(logits(made, "a"), before)
        now = load_file(made.task_folder("a") / "adapter_model.safetensors")
        assert now.keys() == tensors.keys() and all(torch.equal(now[key], tensors[key]) for key in now)
        # not equal by chance: the basis did grow
        grown = SubspaceBasis.from_pretrained(made.basis_folder).shapes()
        assert made.basis_folder != old and not old.exists()
        for name, shape in grown.items():
            for side in ("k_out", "k_in"):
                assert size[name][side] < shape[side] <= size[name][side] + 2
        R = made.matrix
        assert R.bwt() == R.forgetting() == 0.0 and R.learned == 3
        assert made.status.growth[name] == [(5 + t - 1, 5 + t - 1) for t in range(4)]


def test_absorption_changes_no_logit_but_by_rounding(run):
    with again(run) as made:
        made.learn("b", data(1), data(2))
        changes = made.status.changes
    assert changes.keys() == {"a", "b"} and max(changes.values()) < 1e-5


def test_the_newest_version_alone_is_kept_and_its_lineage_recorded(run):
    with again(run) as made:
        made.learn("b", data(1), data(2))
        assert [each.name for each in (run / "versions").iterdir()] == ["3"]
        basis = SubspaceBasis.from_pretrained(made.basis_folder)
        assert len(basis.info["lineage"]) == 2 and not (run / "work").exists()
        assert [each.number for each in made.status.versions] == [1, 2, 3]


def test_every_version_is_kept_where_that_is_asked_for(first_basis, tmp_path):
    learn(tmp_path / "run", "ab", first_basis, options=options(keep="all"))
    assert sorted(each.name for each in (tmp_path / "run" / "versions").iterdir()) == ["1", "2", "3"]
    PeftModel.from_pretrained(model(), tmp_path / "run/versions/2/tasks/a")


def test_a_version_that_something_else_depends_on_stays(run, tmp_path):
    with again(run) as made:
        version = made.basis_folder
        save_adapter(made.load("a"), tmp_path / "mine")
        made.learn("b", data(1), data(2))
        assert version.exists() and not (version.parent / "tasks").exists()
        PeftModel.from_pretrained(model(), tmp_path / "mine")
        shutil.rmtree(tmp_path / "mine")
        made.learn("c", data(3), data(4))
        assert not version.exists()


def test_a_version_with_more_dependents_than_are_noted_stays(run, tmp_path, monkeypatch):
    monkeypatch.setattr(dependents, "MOST_NOTES", 2)
    with again(run) as made:
        version = made.basis_folder
        save_adapter(made.load("a"), tmp_path / "mine")
        for number in range(2):  # a later note of the run's own takes the place of the one outside
            save_adapter(made.load("a"), tmp_path / "run" / f"more-{number}")
        assert not dependents.all_noted(SubspaceBasis.from_pretrained(version).fingerprint)
        shutil.rmtree(tmp_path / "run" / "more-0")
        made.learn("b", data(1), data(2))
        assert version.exists()
        PeftModel.from_pretrained(model(), tmp_path / "mine")


def test_without_own_directions_the_basis_stays(first_basis, tmp_path):
    with learner(tmp_path / "run", first_basis, options=options(probe="never")) as made:
        for name in "ab":
            made.learn(name, data(ord(name)), data(ord(name) + 100))
        assert len(made.status.versions) == 1 and made.status.extra_rank == {"a": 0, "b": 0}
        assert made.matrix.bwt() == 0


# -- the probe ----------------------------------------------------------------------


@pytest.mark.parametrize(("core", "own", "chosen"), [(0.5, 0.52, 1), (0.5, 0.51, 0), (0.5, 0.4, 0)])
def test_the_probe_decides_by_validation_and_margin(first_basis, tmp_path, core, own, chosen):
    """A metric that says what it is told, of models with and without own directions."""

    def metric(made, dataset):
        if made.peft_config["default"].extra_rank:
            return own
        return core

    with learner(tmp_path / "run", first_basis, options=options(probe="auto", margin=0.015), metric=metric) as made:
        made.learn("b", data(1), data(2))
        assert made.status.extra_rank == {"b": chosen}


def test_a_probe_holds_examples_out_and_takes_its_share(first_basis, tmp_path):
    seen = []

    def train(made, task):
        seen.append((len(task.train_dataset), task.share, made.peft_config["default"].extra_rank, task.seed))

    made = learner(tmp_path / "run", first_basis, options=options(probe="auto", validation_share=0.25), train=train)
    with made:
        made.learn("b", data(1), data(2))
        assert [each[:3] for each in seen] == [(9, 0.5, 0), (9, 0.5, 1), (12, 1.0, made.status.extra_rank["b"])]
        # both from one seed, so that only the directions differ
        assert seen[0][3] == seen[1][3] != seen[2][3]
        seen.clear()
        made.learn("c", data(1), data(2), validation_dataset=data(5))
        assert [each[0] for each in seen] == [12, 12, 12]


def test_forward_transfer_is_measured_from_the_second_task_on(first_basis, tmp_path):
    with learner(tmp_path / "run", first_basis, options=options(forward=True)) as made:
        made.learn("a", data(1), data(2))
        assert made.matrix.forward == {} and math.isnan(made.matrix.fwt())
        made.learn("b", data(3), data(4))
        assert made.matrix.forward.keys() == made.matrix.baseline.keys() == {"b"}
        assert math.isfinite(made.matrix.fwt())


# -- models, LoRAs, loops ----------------------------------------------------------------------


def test_a_base_model_that_is_given_stays_as_it_was(first_basis, tmp_path):
    base = model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    grads = [each.requires_grad for each in base.parameters()]
    with learner(tmp_path / "run", first_basis, model=base) as made:
        made.learn("b", data(1), data(2))
    assert not hasattr(base, "peft_config") and base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert [each.requires_grad for each in base.parameters()] == grads


def test_tasks_with_different_labels_get_models_of_their_own(first_basis, tmp_path):
    def classifier(name):
        torch.manual_seed(0)
        made = bert()
        made.num_labels = made.config.num_labels = 2 if name == "two" else 3
        made.classifier = torch.nn.Linear(32, made.num_labels)
        return made

    three = [{**row, "labels": place % 3} for place, row in enumerate(data(3))]
    with learner(tmp_path / "run", first_basis, model=classifier) as made:
        made.learn("two", data(1), data(2))
        made.learn("three", three, three)
        assert made.load("three").get_base_model().classifier.modules_to_save["default"].out_features == 3
        assert made.matrix.bwt() == 0


def test_a_lora_is_projected_with_what_the_basis_lacks(first_basis, tmp_path):
    lora = train_lora(bert, tmp_path / "lora", seed=77, r=1, task_type="SEQ_CLS")
    with learner(tmp_path / "run", first_basis, options=options(extra_rank=2)) as made:
        made.learn("b", lora=lora, eval_dataset=data(2))
        with torch.no_grad():
            right = PeftModel.from_pretrained(model(), lora).eval()(inputs()).logits
            plain = model()(inputs()).logits
        # what the core leaves of an update of rank 1 has rank 2 at most
        assert (logits(made, "b") - right).abs().max() < 1e-4 * (plain - right).abs().max()


def test_a_loop_of_ones_own(first_basis, tmp_path):
    def train(made, task):
        optimizer = torch.optim.AdamW([each for each in made.parameters() if each.requires_grad], lr=1e-2)
        made.train()
        for row in task.train_dataset[:4]:
            loss = made(row["input_ids"][None], labels=torch.tensor([row["labels"]])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def metric(made, dataset):
        rows = torch.stack([row["input_ids"] for row in dataset])
        return (made(rows).logits.argmax(-1) == torch.tensor([row["labels"] for row in dataset])).float().mean()

    with learner(tmp_path / "run", first_basis, train=train, metric=metric) as made:
        made.learn("b", data(1), data(2))
        assert made.status.changes == {} and made.evaluate("b") == made.matrix.acc()


def test_nothing_is_written_but_into_the_runs_folder(first_basis, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with learner(tmp_path / "run", first_basis, args=arguments("elsewhere")) as made:
        made.learn("b", data(1), data(2))
        made.evaluate("b", data(3))
    assert list((tmp_path / "here").iterdir()) == []
    assert not any(each.is_file() for each in (tmp_path / "run" / "work").rglob("*"))


def test_the_callers_random_numbers_go_on_as_they_would(first_basis, tmp_path):
    with learner(tmp_path / "run", first_basis) as made:
        examples = data(1), data(2)
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        made.learn("b", *examples)
        assert torch.equal(torch.rand(3), expected)


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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "base"}, "model is a str: give a base model"),
        ({"args": "x"}, "args is a str"),
        ({"config": {"alpha": 3}}, "config is a dict: give a SubspaceConfig"),
        ({"config": SubspaceConfig(basis="x")}, "config has basis='x', which the learner sets"),
        ({"config": SubspaceConfig(extra_rank=2)}, "config has extra_rank=2, which the learner sets"),
        ({"args": arguments(push_to_hub=True)}, "push_to_hub would push the checkpoints"),
    ],
)
def test_arguments_of_the_learner(first_basis, tmp_path, given, said):
    with pytest.raises(SubspaceError, match=said):
        learner(tmp_path / "run", first_basis, **given)


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
        with pytest.raises(OccupiedError, match=r"and no run\. Give an empty folder, or one that is not there"):
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


def test_a_basis_that_is_gone_is_missed(run):
    shutil.rmtree(run / "versions")
    with learner(run) as made, pytest.raises(SubspaceError):
        made.learn("a", data(ord("a")), data(ord("a") + 100))
        made.learn("b", data(1), data(2))


def test_it_shows_itself(run):
    with learner(run) as made, warnings.catch_warnings():
        assert repr(made).startswith("ContinualLearner(folder: ") and "ACC: " in repr(made)
        assert "after" in made._repr_html_()
    assert model_name(model()) == "" and learners.__doc__
