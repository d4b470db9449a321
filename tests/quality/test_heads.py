"""How heads start, and which treatment of heads a run's key holds."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.quality import bench as bench_module
from benchmarks.quality.bench import best_head
from benchmarks.quality.experiment import Experiment, perform
from benchmarks.quality.heads import fitted, head_state
from benchmarks.quality.rows import head_only, lora
from benchmarks.quality.training import BRIEF, HEAD_RATE, Budget, draw_examples, make_model, pooled

from .conftest import SMALL, top_of, toy


def test_a_fitted_head_of_numbers_is_a_ridge_regression_in_the_losss_scale():
    from sklearn.linear_model import Ridge

    torch.manual_seed(0)
    x, y = torch.randn(60, 5) * 3 + 1, torch.randn(60)
    y = y + 2 * x[:, 0]
    head = fitted(x, y, 1)
    standard = ((y - y.mean()) / y.std()).numpy()
    scaled = ((x - x.mean(0)) / (x - x.mean(0)).square().mean().sqrt()).numpy()
    candidates = {}
    for strength in (0.1, 1.0, 10.0, 100.0, 1000.0):
        errors = []
        for i in range(60):
            rest = np.arange(60) != i
            model = Ridge(alpha=strength).fit(scaled[rest], standard[rest])
            errors.append(float((model.predict(scaled[i : i + 1])[0] - standard[i]) ** 2))
        candidates[strength] = np.mean(errors)
    best = Ridge(alpha=min(candidates, key=candidates.__getitem__)).fit(scaled, standard)
    ours = x @ head["weight"].T + head["bias"]
    assert np.allclose(ours[:, 0].numpy(), best.predict(scaled), atol=1e-4)


def test_a_fitted_head_of_classes_has_logits_that_are_sure_of_what_can_be_told():
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (90,))
    clear, noise = F.one_hot(labels, 3) + 0.05 * torch.randn(90, 3), torch.randn(90, 40)
    sure, unsure = fitted(clear, labels, 3), fitted(noise, labels, 3)
    loss = F.cross_entropy(clear @ sure["weight"].T + sure["bias"], labels)
    assert float(loss) < 0.02
    # of noise it is not sure, as the left-out examples tell: on new noise its loss is near that of knowing nothing
    fresh, others = torch.randn(300, 40), torch.randint(0, 3, (300,))
    assert float(F.cross_entropy(fresh @ unsure["weight"].T + unsure["bias"], others)) < 1.05 * np.log(3)


def test_a_head_starts_where_the_budget_says_from_its_own_examples_alone():
    small = pooled(top_of(), toy("one"))
    assert head_state(lambda: pytest.fail("not needed"), SMALL, 1) is None
    for start in ("fitted", "trained"):
        budget = replace(SMALL, head_start=start)
        state = head_state(lambda: small, budget, 1)
        assert state["weight"].shape == (2, 16) and state["bias"].shape == (2,)
        assert not torch.equal(state["weight"], head_state(lambda: small, budget, 2)["weight"])
        # labels that are not drawn have no say
        chosen, _ = draw_examples(small, budget, 1)
        other = toy("one")
        rest = [i for i in range(len(other.splits["train"])) if i not in chosen]
        other.splits["train"].labels[rest] = 1 - other.splits["train"].labels[rest]
        again = head_state(lambda other=other: pooled(top_of(), other), budget, 1)
        assert torch.allclose(state["weight"], again["weight"], atol=1e-5)
    with pytest.raises(ValueError, match="head_start='warm': give one of drawn, fitted, trained"):
        head_state(lambda: small, replace(SMALL, head_start="warm"), 1)


def test_a_run_is_the_same_whichever_comes_first(bench, tmp_path):
    rows = [replace(lora(2), rates=(1e-3,))]
    for start in ("fitted", "trained"):
        budget = replace(SMALL, head_start=start)
        first = bench.compare("one", rows, budget)
        # now the features of untouched layers are there, and one seed is run alone
        bench.folder = tmp_path / start
        again = bench.compare("one", rows, budget, seeds=(2,))
        assert again[0]["curves"][0] == first[0]["curves"][1] and again[0]["tests"] == first[0]["tests"][1:]


@pytest.mark.parametrize("row", [head_only, lambda: lora(2)])
def test_every_row_starts_at_the_same_head(bench, monkeypatch, row):
    begun = []

    def watch(model, *_, **__):
        begun.append(
            [p.detach().clone() for name, p in model.named_parameters() if "classifier" in name and p.requires_grad]
        )
        return {"validation": 0.5, "curve": [], "seconds": 0.0}

    monkeypatch.setattr(bench_module, "train", watch)
    budget = replace(SMALL, head_start="fitted")
    bench.compare("one", [replace(row(), rates=(1e-3,))], budget)
    for seed, (weight, bias) in zip((1, 2), begun, strict=True):
        state = head_state(lambda: bench.pooled("one"), budget, seed)
        assert torch.equal(weight, state["weight"]) and torch.equal(bias, state["bias"])


def test_the_heads_rate_moves_the_head_alone(monkeypatch):
    from benchmarks.quality.training import train

    groups = {}

    def note(given, **_):
        groups.update({len(group["params"]): group["lr"] for group in given})
        return torch.optim.SGD(given)

    from peft import get_peft_model

    monkeypatch.setattr(torch.optim, "AdamW", note)
    model = get_peft_model(make_model(top_of(), 2, 0), lora(2).adapter())
    train(model, toy("one"), replace(SMALL, steps=1, head_rate=0.7), 0.1, 1, curve=False)
    # two factors of each of four layers; weight and bias
    assert groups == {8: 0.1, 2: 0.7}


def test_the_first_treatment_is_no_part_of_a_key_so_that_earlier_runs_are_found_again():
    plain = BRIEF.settings()
    assert plain == {key: value for key, value in asdict(BRIEF).items() if not key.startswith("head_")}
    assert replace(BRIEF, head_rate=1.6e-2).settings() == {**plain, "head_rate": 1.6e-2}
    assert replace(BRIEF, head_start="fitted").settings() == {**plain, "head_start": "fitted"}
    assert Budget().head_rate == HEAD_RATE == 5e-3


def test_runs_of_another_treatment_are_done_again(bench, monkeypatch):
    rows = [replace(lora(2), rates=(1e-3,))]
    bench.compare("one", rows, SMALL)
    for other in (replace(SMALL, head_rate=1e-2), replace(SMALL, head_start="fitted")):
        with monkeypatch.context() as patch:
            patch.setattr(bench_module, "train", lambda *_, **__: pytest.fail("trained"))
            bench.compare("one", rows, SMALL)
            with pytest.raises(pytest.fail.Exception, match="trained"):
                bench.compare("one", rows, other)


def test_the_heads_rate_is_chosen_jointly_by_validation(bench, monkeypatch, tmp_path):
    asked = []

    def scores(model, task, budget, rate, seed, *, curve):
        asked.append((budget.head_rate, rate, seed))
        best = budget.head_rate == 1e-2 and rate == 4e-3
        return {"validation": 0.9 if best else 0.5, "curve": [[4, 0.5]], "seconds": 0.0}

    monkeypatch.setattr(bench_module, "train", scores)
    experiment = Experiment(
        "joint",
        ["one"],
        SMALL,
        lambda bench, name: [replace(lora(2), rates=(1e-3, 4e-3, 1.6e-2))],
        folder="heads",
        sweep_seeds=(1, 2),
        head_rates=(5e-3, 1e-2),
    )
    perform(bench, experiment, tmp_path)
    body = json.loads((tmp_path / "heads" / "joint.json").read_text())
    row = body["tasks"]["one"][0]
    assert (row["rate"], row["head_rate"]) == (4e-3, 1e-2) and body["head_rates"] == [5e-3, 1e-2]
    assert {seed for _, _, seed in asked} == {1, 2} and len(asked) == len(set(asked))
    assert (
        best_head([(1.0, {"sweep": [{"validation": None}]}), (2.0, {"sweep": [{"validation": 0.1}]})])["head_rate"]
        == 2
    )


def test_a_trial_looks_at_no_test_score_and_is_not_done_twice(bench, monkeypatch, tmp_path):
    looked = []
    original = bench_module.score
    monkeypatch.setattr(bench_module, "score", lambda *given: looked.append(given[-1]) or original(*given))
    experiment = Experiment(
        "trial",
        ["one"],
        SMALL,
        lambda bench, name: [replace(lora(2), rates=(1e-3, 4e-3, 1.6e-2))],
        seeds=(4, 5),
        sweep_seeds=(4, 5),
        tested=False,
    )
    perform(bench, experiment, tmp_path)
    row = json.loads((tmp_path / "trial.json").read_text())["tasks"]["one"][0]
    assert looked == [] and row["tests"] == [None, None] and None not in row["validations"]
    monkeypatch.setattr(bench_module, "train", lambda *_, **__: pytest.fail("trained again"))
    perform(bench, experiment, tmp_path)
