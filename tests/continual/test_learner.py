"""Learning task after task: old tasks answer as before to the bit, and what is wrong in a call is said."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from subspace_peft import SubspaceBasis, save_adapter
from subspace_peft.basis import basis, dependents

from ..models import bert, inputs, train_lora
from .runs import again, arguments, data, learn, learner, model, options

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


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


def test_a_basis_is_opened_as_often_whatever_the_number_of_tasks(run, monkeypatch):
    opened, read = [], basis.open_basis
    monkeypatch.setattr(basis, "open_basis", lambda place, **how: opened.append(place) or read(place, **how))
    counts = []
    with again(run) as made:
        for name in "bcd":
            opened.clear()
            made.learn(name, data(ord(name)), data(ord(name) + 100))
            counts.append(len(opened))
    assert counts[0] == counts[1] == counts[2] > 0


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
