"""The metrics' twins give what scikit-learn, scipy and a hand-written longest common subsequence give."""

from __future__ import annotations

import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from subspace_peft.errors import SubspaceError
from subspace_peft.metrics import load_metric

RNG = np.random.default_rng(0)
TRUTH, GUESS = RNG.integers(0, 2, 60), RNG.integers(0, 2, 60)
SCORES = RNG.uniform(0, 5, 60).astype(np.float32)
NEAR = (SCORES + RNG.normal(0, 1, 60)).astype(np.float32)


@pytest.mark.parametrize("task", ["sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli", "hans"])
def test_accuracy_tasks(task):
    found = load_metric("glue", task).compute(predictions=GUESS, references=TRUTH)
    assert found == {"accuracy": pytest.approx(sklearn.metrics.accuracy_score(TRUTH, GUESS))}


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_accuracy_and_f1_tasks(task):
    found = load_metric("glue", task).compute(predictions=GUESS, references=TRUTH)
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(TRUTH, GUESS))
    assert found["f1"] == pytest.approx(sklearn.metrics.f1_score(TRUTH, GUESS))
    assert found.keys() == {"accuracy", "f1"}


def test_cola_and_stsb():
    found = load_metric("glue", "cola").compute(predictions=GUESS, references=TRUTH)
    assert found == {"matthews_correlation": pytest.approx(sklearn.metrics.matthews_corrcoef(TRUTH, GUESS))}
    found = load_metric("glue", "stsb").compute(predictions=NEAR, references=SCORES)
    assert found == {
        "pearson": pytest.approx(scipy.stats.pearsonr(NEAR, SCORES)[0], abs=1e-6),
        "spearmanr": pytest.approx(scipy.stats.spearmanr(NEAR, SCORES)[0], abs=1e-9),
    }
    assert all(isinstance(value, float) for value in found.values())
    flat = load_metric("glue", "stsb").compute(predictions=np.ones(60, dtype=np.float32), references=SCORES)
    assert all(math.isnan(value) for value in flat.values())


def test_accuracy_alone_and_batches():
    metric = load_metric("accuracy")
    for start in range(0, 60, 7):
        metric.add_batch(predictions=GUESS[start : start + 7], references=TRUTH[start : start + 7])
    assert metric.compute() == {"accuracy": pytest.approx((GUESS == TRUTH).mean())}
    both = evaluate.combine([load_metric("accuracy"), load_metric("glue", "mrpc")])
    found = both.compute(predictions=GUESS, references=TRUTH)
    assert found["glue_accuracy"] == found["accuracy_accuracy"] == pytest.approx((GUESS == TRUTH).mean())
    assert "f1" in str(list(found))


def lcs(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()


@pytest.mark.parametrize(
    ("guess", "truth"),
    [
        ("the cat sat", "the cat sat on the mat"),
        ("a dog", "the cat"),
        ("One, two; THREE", "one two three"),
        ("b a", "a b"),
        ("", "something"),
    ],
)
def test_rouge_l_is_the_longest_common_subsequence(guess, truth):
    a, b = words(guess), words(truth)
    common = lcs(a, b)
    expected = 2 * common / (len(a) + len(b)) if common else 0.0
    assert load_metric("rouge").compute(predictions=[guess], references=[truth])["rougeL"] == pytest.approx(expected)


def test_rouge_averages_and_takes_the_best_reference():
    metric = load_metric("rouge")
    found = metric.compute(predictions=["a b", "c"], references=["a b", "d"])
    assert found == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5, "rougeLsum": 0.5}
    assert load_metric("rouge").compute(predictions=["a b"], references=[["x", "a b"]])["rougeL"] == 1.0
    each = load_metric("rouge").compute(predictions=["a b", "c"], references=["a b", "d"], use_aggregator=False)
    assert each["rouge1"] == [1.0, 0.0]


def test_exact_match_ignores_what_it_is_told_to():
    given = {"predictions": ["Yes!", "no", "room 12"], "references": ["yes", "no", "room 13"]}
    assert load_metric("exact_match").compute(**given) == {"exact_match": pytest.approx(1 / 3)}
    loose = {"ignore_case": True, "ignore_punctuation": True, "ignore_numbers": True}
    assert load_metric("exact_match").compute(**given, **loose) == {"exact_match": 1.0}
    assert load_metric("exact_match").compute(**given, regexes_to_ignore=[r"[!\d]+", "Y|y"]) == {"exact_match": 1.0}


@pytest.mark.parametrize("name", ["accuracy", "rouge", "exact_match"])
def test_bad_input_is_refused(name):
    value = "a" if name in ("rouge", "exact_match") else 1
    with pytest.raises((SubspaceError, ValueError)):
        load_metric(name).compute(predictions=[value], references=[value, value])
    # evaluate itself looks at the first example before it asks us
    with pytest.raises((SubspaceError, ValueError, IndexError)):
        load_metric(name).compute(predictions=[], references=[])


def test_unknown_metrics_and_tasks_are_refused():
    with pytest.raises(SubspaceError, match="choose one of cola"):
        load_metric("glue", "mpc")
    with pytest.raises(SubspaceError, match="no twin"):
        load_metric("bleurt")


def test_the_published_metric_comes_first_where_the_hub_is_in_reach(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(evaluate, "load", lambda name, config: ("published", name, config))
    assert load_metric("glue", "rte") == ("published", "glue", "rte")

    def gone(name: str, config: str | None) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(evaluate, "load", gone)
    assert load_metric("glue", "rte").compute(predictions=[1], references=[1]) == {"accuracy": 1.0}


SCRIPT = """
import datasets
import evaluate


class Always(evaluate.Metric):
    def _info(self):
        v = datasets.Value("int32")
        return evaluate.MetricInfo("", "", features=datasets.Features({"predictions": v, "references": v}))

    def _compute(self, predictions, references):
        return {"always": 7}
"""


def test_a_metric_of_ones_own_is_loaded_from_its_folder_also_offline(tmp_path, monkeypatch):
    folder = tmp_path / "always"
    folder.mkdir()
    (folder / "always.py").write_text(SCRIPT)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert load_metric(str(folder)).compute(predictions=[1], references=[0]) == {"always": 7}


def test_nothing_is_left_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_metric("glue", "sst2").compute(predictions=GUESS, references=TRUTH)
    assert list(Path(tmp_path).iterdir()) == []
