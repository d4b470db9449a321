"""Base models that are given to a learner: what does not fit a task is said in words, and the model stays as it is."""

from __future__ import annotations

import pytest
import torch

from subspace_peft.continual.training import twin
from subspace_peft.errors import SubspaceError

from ..models import bert, train_lora
from .runs import again, contents, data, learn, learner


def classifier(outputs):
    made = bert()
    made.num_labels = made.config.num_labels = outputs
    made.classifier = torch.nn.Linear(32, outputs)
    return made


def rows(*labels):
    return [{**row, "labels": labels[place % len(labels)]} for place, row in enumerate(data(3))]


def test_what_a_forward_pass_counts_stays_the_twins_own():
    base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    base.register_buffer("packed", torch.zeros(8, dtype=torch.int32))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    made = twin(base).train()
    made(torch.randn(5, 4))
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not torch.equal(made[1].running_mean, base[1].running_mean)
    # weights, and what quantisation packs into buffers, are no copies
    assert made[0].weight.data_ptr() == base[0].weight.data_ptr() and made.packed is base.packed


def test_a_functions_classifier_needs_an_output_for_every_label(first_basis, tmp_path):
    with (
        learner(tmp_path / "run", first_basis, model=lambda name: classifier(2)) as made,
        pytest.raises(SubspaceError, match="'t' has labels up to 2, and the model's classifier 2 outputs"),
    ):
        made.learn("t", rows(0, 1, 2), rows(0, 1, 2))
    # the same call goes on with a function that fits
    with learner(tmp_path / "run", model=lambda name: classifier(3)) as made:
        assert made.learn("t", rows(0, 1, 2), rows(0, 1, 2)).learned == ("t",)


@pytest.mark.parametrize("factory", [True, False])
def test_labels_below_zero(first_basis, tmp_path, factory):
    model = (lambda name: classifier(2)) if factory else classifier(2)
    with (
        learner(tmp_path / "run", first_basis, model=model) as made,
        pytest.raises(SubspaceError, match=r"'t': its data have the label -1"),
    ):
        made.learn("t", rows(0, 1), rows(-1))


def test_one_output_is_no_classifier_to_count_right_answers_of(first_basis, tmp_path):
    values = rows(0.5, 1.5)
    for name, model in (("called", lambda name: classifier(1)), ("run", classifier(1))):
        with learner(tmp_path / name, first_basis, model=model) as made:
            with pytest.raises(SubspaceError, match=r"'t': its model has one output.*compute_metrics"):
                made.learn("t", values, values)
            assert made.status.unfinished is None
    score = {"compute_metrics": lambda found: {"error": -float(abs(found.predictions[:, 0] - found.label_ids).mean())}}
    with learner(tmp_path / "run", **score, model=classifier(1)) as made:
        assert made.learn("t", values, values).matrix.score(1, 1) < 0


def test_a_lora_with_another_classifier(first_basis, tmp_path):
    lora = train_lora(bert, tmp_path / "lora", 5, r=2, task_type="SEQ_CLS")
    with (
        learner(tmp_path / "run", first_basis, model=lambda name: classifier(3)) as made,
        pytest.raises(SubspaceError, match=r"'t'.*classifier.*torch.Size\(\[2, 32\]\)"),
    ):
        made.learn("t", None, rows(0, 1), lora=str(lora))


def test_fractions_are_no_labels_of_a_classifier(first_basis, tmp_path):
    with learner(tmp_path / "run", first_basis) as made, pytest.raises(SubspaceError, match=r"label 1\.5, and the"):
        made.learn("t", rows(0.5, 1.5), rows(0, 1))
    assert not made.status.unfinished


def test_a_training_that_moves_nothing_leaves_nothing_to_absorb(first_basis, tmp_path):
    with learner(tmp_path / "run", first_basis, train=lambda model, run: None) as made:
        status = made.learn("t", rows(0, 1), rows(0, 1))
        assert status.learned == ("t",) and len(status.versions) == 1
        assert made.load("t").peft_config["default"].extra_rank == 0


def test_a_base_model_of_other_weights_is_refused_before_the_folder_changes(run):
    before = contents(run)
    with pytest.raises(SubspaceError, match=r"the run's task 'a' does not belong to this base model.*begun with"):
        learner(run, model=bert(1))
    assert contents(run) == before


def test_a_functions_base_models_are_seen_before_a_task_is_begun(first_basis, tmp_path, monkeypatch):
    from subspace_peft.continual import phases

    def fails(*_, **__):
        raise OSError("the disk is gone")

    right, wrong, folder = (lambda name: bert()), (lambda name: bert(1)), tmp_path / "run"
    learn(folder, "a", first_basis, model=right)
    before = contents(folder)
    with again(folder, model=wrong) as made:
        with pytest.raises(SubspaceError, match="task 'a' does not belong to this base model"):
            made.learn("b", data(1), data(2))
        assert made.status.unfinished is None
    assert contents(folder) == before
    # nor does one go on with a task that is not finished
    with again(folder, model=right) as made, monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        patch.setattr(phases, "absorb_task", fails)
        made.learn("b", data(1), data(2))
    with again(folder, model=wrong) as made:
        with pytest.raises(SubspaceError, match="does not belong to this base model"):
            made.learn("b", data(1), data(2))
        assert made.status.unfinished == ("b", "absorb")
    with again(folder, model=right) as made:
        assert made.learn("b", data(1), data(2)).learned == ("a", "b")
