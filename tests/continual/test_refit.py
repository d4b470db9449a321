"""A run whose basis is refitted within a fixed size: drift is said before, bounded, and no more than that."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from subspace_peft import SubspaceBasis, read_task
from subspace_peft.continual import read_status
from subspace_peft.errors import SubspaceError

from . import runs
from .runs import contents, copied, data, killed, learn, learner, options, own_cache
from .test_kill import at_write, every

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def updates(made, name):
    """A task's updates ΔW by module, float64."""
    task = read_task(made.task_folder(name))
    return {each: task.modules[each].reconstruct(core) for each, core in task.cores.items()}


def again(run, **more):
    return runs.again(run, options=options(**more))


def test_the_drift_is_said_before_and_holds(run, caplog):
    with again(run, max_k=5, max_drift=1.0) as made:
        before = updates(made, "a")
        with caplog.at_level(logging.WARNING, logger="subspace_peft"):
            logging.getLogger("subspace_peft").propagate = True
            made.learn("b", data(1), data(2))
        versions = made.status.versions
        assert [each.kind for each in versions] == ["start", "absorb", "absorb", "refit"]
        assert versions[-2].describe_k() == "6" and versions[-1].describe_k() == "5"
        bound, drifts = versions[-1].drift, versions[-1].drifts
        assert drifts.keys() == {"a", "b"} and max(drifts.values()) == bound
        assert 0 < bound <= 1
        for name, old in before.items():
            assert (updates(made, "a")[name] - old).norm() <= (drifts["a"] + 1e-5) * old.norm()
        assert SubspaceBasis.from_pretrained(made.basis_folder).describe_k() == "k=5"
        said = f"an earlier task drifted by at most {drifts['a']:.2%}, b itself by {drifts['b']:.2%}"
        assert said in made.status.text() and drifts["a"] != drifts["b"]
    said = [each.getMessage() for each in caplog.records if "refitted" in each.getMessage()]
    assert said and f"{bound:.2%}" in said[0] and "within 5 directions per side" in said[0]


def test_more_drift_than_allowed_is_refused_and_the_run_goes_on_with_another_bound(run):
    with again(run, max_k=5, max_drift=0.0) as made:
        with pytest.raises(SubspaceError, match=r"due for a refit within 5 directions per side, which would change a"):
            made.learn("b", data(1), data(2))
        assert made.status.unfinished == ("b", "refit") and made.tasks == ["a"]
    with again(run, max_k=6, max_drift=0.0) as made:
        made.learn("b", data(1), data(2))
        assert [each.kind for each in made.status.versions] == ["start", "absorb", "absorb"]
        assert made.matrix.bwt() == 0


def test_a_refit_comes_after_so_many_tasks_within_the_first_size(run):
    with again(run, refit_every=2, max_drift=1.0) as made:
        for name in "bcd":
            made.learn(name, data(ord(name)), data(ord(name) + 100))
        kinds = [(each.task, each.kind) for each in made.status.versions[1:]]
        assert kinds == [*zip("abbcdd", ["absorb", "absorb", "refit", "absorb", "absorb", "refit"], strict=True)]
        assert made.status.versions[-1].describe_k() == "4"


def test_what_is_not_larger_is_not_refitted(first_basis, tmp_path):
    with learner(tmp_path / "run", first_basis, options=options(probe="never", refit_every=1)) as made:
        made.learn("a", data(1), data(2))
        assert len(made.status.versions) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("before", [True, False])
def test_a_run_with_all_phases_is_killed_in_each(begun, tmp_path, before):
    def score(made, dataset):
        # with own directions more, so that the probe wants them
        rows = torch.stack([row["input_ids"] for row in dataset])
        right = torch.tensor([row["labels"] for row in dataset])
        return float((made(rows).logits.argmax(-1) == right).float().mean()) + made.peft_config["default"].extra_rank

    settings = options(probe="auto", margin=0.5, forward=True, max_k=5, max_drift=1.0)

    def work(folder):
        learn(folder, "ab", basis, options=settings, metric=score)

    with own_cache(tmp_path / "1"):
        basis = tmp_path / "basis"
        copied(begun.parent / "run" / "versions" / "2" / "basis", basis)
        learn(tmp_path / "whole", "ab", basis, options=settings, metric=score)
        whole = contents(tmp_path / "whole")
    with own_cache(tmp_path / "2"):
        folder, died = tmp_path / "run", []
        for arm in every(at_write(2 if before else 1, before=before)):
            if not killed(lambda: work(folder), arm):
                break
            state = read_status(folder)
            died.append(state.unfinished[1] if state.unfinished else "–")
        assert {"probe", "forward", "train", "absorb", "refit", "scores", "done"} <= set(died)
    assert contents(folder) == whole
