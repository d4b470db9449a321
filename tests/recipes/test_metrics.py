"""The metrics' twins give what scikit-learn, scipy and a hand-written longest common subsequence give."""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
import threading
from pathlib import Path

import evaluate
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from common import metrics
from common.metrics import load_metric
from rouge_score import rouge_scorer, scoring

from subspace_peft.errors import SubspaceError

from .. import fresh

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize(
    ("name", "config"),
    [("glue", "sst2"), ("glue", "stsb"), ("glue", "cola"), ("accuracy", None), ("rouge", None), ("exact_match", None)],
)
def test_bad_input_is_refused(name, config):
    value = "a" if name in ("rouge", "exact_match") else 1
    # evaluate itself compares the lengths of a batch, in its own words
    with pytest.raises(ValueError, match=r"1 predictions for 2 references|Mismatch in the number of predictions"):
        load_metric(name, config).compute(predictions=[value], references=[value, value])
    with pytest.raises(SubspaceError, match="0 predictions for 0 references"):
        load_metric(name, config).compute(predictions=[], references=[])


def test_an_example_without_a_reference_is_refused():
    with pytest.raises(SubspaceError, match="example 1 has no reference"):
        load_metric("rouge").compute(predictions=["a", "b"], references=[["a"], []])


def test_unknown_metrics_and_tasks_are_refused():
    with pytest.raises(SubspaceError, match="choose one of cola"):
        load_metric("glue", "mpc")
    with pytest.raises(SubspaceError, match="choose one of cola"):
        load_metric("glue")
    with pytest.raises(SubspaceError, match="no twin"):
        load_metric("bleurt")


@pytest.mark.parametrize(
    ("package", "name", "config"),
    [
        ("sklearn.metrics", "glue", "mrpc"),
        ("scipy.stats", "glue", "stsb"),
        ("rouge_score.rouge_scorer", "rouge", None),
    ],
)
def test_a_missing_package_is_named_with_the_extra(monkeypatch, package, name, config):
    monkeypatch.setitem(sys.modules, package, None)
    values = ["a", "b"] if name == "rouge" else [0, 1]
    with pytest.raises(ImportError, match=r'pip install "subspace-peft\[recipes\]"'):
        load_metric(name, config).compute(predictions=values, references=values)


def test_accuracy_takes_what_the_published_one_takes():
    weights = RNG.uniform(0, 1, 60)
    for given in ({"normalize": False}, {"sample_weight": weights}, {"sample_weight": weights, "normalize": False}):
        expected = sklearn.metrics.accuracy_score(TRUTH, GUESS, **given)
        assert load_metric("accuracy").compute(predictions=GUESS, references=TRUTH, **given) == {
            "accuracy": pytest.approx(expected)
        }
    rows, near = [[0, 1], [1, 1], [0, 0]], [[0, 1], [1, 0], [0, 0]]
    found = load_metric("accuracy", "multilabel").compute(predictions=near, references=rows)
    assert found == {"accuracy": pytest.approx(sklearn.metrics.accuracy_score(np.array(rows), np.array(near)))}
    with pytest.raises(ValueError, match=r"\[3, 3, 2\]"):
        load_metric("accuracy").compute(predictions=[1, 1, 0], references=[1, 0, 0], sample_weight=[1.0, 1.0])


def test_rouge_is_within_the_scatter_of_the_published_bootstrap():
    # metrics/rouge/rouge.py of huggingface/evaluate: the median of the bootstrap means of score(reference, prediction)
    vocabulary = ["the", "cat", "cats", "sat", "on", "a", "Running", "runs,"]
    guesses, truths = ([" ".join(row) for row in RNG.choice(vocabulary, (60, 6))] for _ in range(2))
    scorer, aggregator = (
        rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True),
        scoring.BootstrapAggregator(),
    )
    for guess, truth in zip(guesses, truths, strict=True):
        aggregator.add_scores(scorer.score(truth, guess))
    state = np.random.get_state()
    np.random.seed(0)
    published = {kind: score.mid.fmeasure for kind, score in aggregator.aggregate().items()}
    np.random.set_state(state)
    given = {"rouge_types": ["rouge1", "rougeL"], "use_stemmer": True}
    found = load_metric("rouge").compute(predictions=guesses, references=truths, **given)
    assert found == pytest.approx(published, abs=0.005)
    # what the bootstrap does not give: the same numbers whatever the generator's state
    np.random.seed(1)
    assert load_metric("rouge").compute(predictions=guesses, references=truths, **given) == found
    np.random.set_state(state)


def test_texts_combine_too():
    both = evaluate.combine([load_metric("rouge"), load_metric("exact_match")])
    both.add_batch(predictions=["a b"], references=["a b"])
    both.add_batch(predictions=["c"], references=["d"])
    assert both.compute() == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5, "rougeLsum": 0.5, "exact_match": 0.5}


@pytest.fixture
def online(monkeypatch):
    """As if the Hub answered and nothing asked for offline mode."""
    for name in metrics.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(metrics, "_answers", lambda endpoint: True)


def test_the_published_metric_comes_first_where_the_hub_is_in_reach(online, monkeypatch, caplog):
    monkeypatch.setattr(evaluate, "load", lambda name, config: ("published", name, config))
    assert load_metric("glue", "rte") == ("published", "glue", "rte")
    assert load_metric("bleurt") == ("published", "bleurt", None)
    with pytest.raises(SubspaceError, match="choose one of cola"):
        load_metric("glue", "mpc")

    def gone(name: str, config: str | None) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(evaluate, "load", gone)
    with caplog.at_level(logging.INFO, logger="common"):
        assert load_metric("glue", "rte").compute(predictions=[1], references=[1]) == {"accuracy": 1.0}
    assert [record.getMessage() for record in caplog.records] == [
        "glue: the twin that comes with subspace_peft, not evaluate.load's (no network)."
    ]
    with pytest.raises(SubspaceError, match="no network") as caught:
        load_metric("bleurt")
    assert isinstance(caught.value.__cause__, ConnectionError)


@pytest.mark.parametrize("variable", metrics.OFFLINE)
def test_offline_mode_asks_no_server_even_beside_a_folder_of_the_metrics_name(
    online, monkeypatch, caplog, tmp_path, variable
):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(evaluate, "load", lambda name, config: pytest.fail("asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glue").mkdir()
    with caplog.at_level(logging.INFO, logger="common"):
        assert load_metric("glue", "rte").compute(predictions=[1], references=[1]) == {"accuracy": 1.0}
    assert len(caplog.records) == 1 and "offline mode" in caplog.text


def test_a_hub_that_accepts_and_never_answers_is_not_waited_for():
    # in a process of its own: evaluate reads HF_ENDPOINT once
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        held: list[socket.socket] = []

        def hold() -> None:
            try:
                while True:
                    held.append(silent.accept()[0])
            except OSError:
                return

        threading.Thread(target=hold, daemon=True).start()
        code = (
            "import time, common.metrics as it\n"
            "it.PATIENCE = 1.0\n"
            "start = time.monotonic()\n"
            "made = [type(it.load_metric('glue', 'rte')).__module__ for _ in range(3)]\n"
            "print(made[0], time.monotonic() - start < 60)\n"
        )
        environment = {key: value for key, value in os.environ.items() if key not in metrics.OFFLINE}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "NO_PROXY": "127.0.0.1"}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "recipes", ROOT)))
        done = fresh.run("-c", code, env=environment)
        assert done.stdout.split() == ["common.metrics", "True"], done.stderr
        assert held, "the endpoint was not asked at all"
        for connection in held:
            connection.close()


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


def test_a_metric_of_ones_own_is_loaded_from_its_folder_also_offline(tmp_path):
    folder = tmp_path / "always"
    folder.mkdir()
    (folder / "always.py").write_text(SCRIPT)
    assert load_metric(str(folder)).compute(predictions=[1], references=[0]) == {"always": 7}


def test_nothing_is_left_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_metric("glue", "sst2").compute(predictions=GUESS, references=TRUTH)
    assert list(Path(tmp_path).iterdir()) == []
