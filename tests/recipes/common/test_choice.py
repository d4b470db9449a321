"""The choice of a kind of adapter by validation, and the noise that it has to be beyond."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from common import Method, RunCache
from common.choice import KEYS, Candidate, choice_table, choose_smallest, note_choice, write_choice
from common.jackknife import kept_without, standard_error
from common.sweep import try_rates
from peft import LoraConfig
from tqdm.auto import tqdm

from subspace_peft.errors import SubspaceError

from .conftest import Runs, head_only, result

EXAMPLES = 36


def candidate(name: str, size: int, right: int, *, rate: float = 1e-3, converged: bool = True) -> Candidate:
    """One that has the first `right` of the examples right."""
    hits = (np.arange(EXAMPLES) < right).astype(float)
    return Candidate(
        method=Method(name, LoraConfig, (rate,)),
        rate=rate,
        at_edge=False,
        validation=float(hits.mean()) if converged else -math.inf,
        without=[float(hits[kept].mean()) for kept in kept_without(EXAMPLES)] if converged else [],
        trained_adapter=size,
        bytes=4 * size,
        runs=2,
        steps=20,
        seconds=1.5,
    )


def test_the_error_of_a_mean_is_the_paired_one_of_the_textbook():
    draw = np.random.default_rng(3)
    left, right = draw.normal(size=(2, EXAMPLES))
    without = [[float(scores[kept].mean()) for kept in kept_without(EXAMPLES)] for scores in (left, right)]
    expected = (left - right).std(ddof=1) / math.sqrt(EXAMPLES)
    assert standard_error(*without) == pytest.approx(expected)


@pytest.mark.parametrize("score", ["mean", "correlation"])
def test_forty_folds_of_many_examples_say_about_as_much(score):
    draw = np.random.default_rng(0)
    truth, count = draw.normal(size=1000), 1000
    guesses = [truth + draw.normal(size=count) for _ in range(2)]

    def of(guess, kept):
        if score == "mean":
            return -float(np.square(guess - truth)[kept].mean())
        return float(np.corrcoef(guess[kept], truth[kept])[0, 1])

    assert len(kept_without(count)) == 40
    found = standard_error(*[[of(guess, kept) for kept in kept_without(count)] for guess in guesses])
    # against a bootstrap of the same difference
    picks = [draw.integers(0, count, count) for _ in range(400)]
    bootstrap = np.std([of(guesses[0], pick) - of(guesses[1], pick) for pick in picks])
    assert found == pytest.approx(bootstrap, rel=0.35)


def test_folds_are_the_same_at_every_call_and_leave_each_example_out_once():
    kept = kept_without(103)
    out = np.concatenate([np.setdiff1d(np.arange(103), part) for part in kept])
    assert sorted(out) == list(range(103)) and {len(part) for part in kept} == {100, 101}
    assert all((a == b).all() for a, b in zip(kept, kept_without(103), strict=True))


@pytest.mark.parametrize("scores", [[], [0.5], [0.5, None], [0.5, math.nan]])
def test_without_scores_no_difference_is_beyond_noise(scores):
    assert standard_error(scores, [0.1] * len(scores)) == math.inf


def test_a_larger_one_has_to_win_by_more_than_noise():
    # three more of 36 right: 0.083 ahead, with a standard error of 0.0467
    rows = [candidate("small", 10, 20), candidate("large", 99, 23)]
    assert choose_smallest(rows).chosen is rows[1]
    within = choose_smallest(rows, standard_errors=2.0)
    assert within.chosen is rows[0] and within.best is rows[1]
    assert within.errors == pytest.approx((0.0467, 0.0), abs=1e-4)
    assert "large has the best validation score, 0.639, but is only 0.083 ahead" in within.sentence()
    # one more right is one standard error ahead, to a rounding: not beyond
    assert choose_smallest([rows[0], candidate("large", 99, 21)], standard_errors=1.1).chosen is rows[0]


def test_the_smallest_within_noise_is_taken_whatever_the_order():
    rows = [candidate("large", 99, 30), candidate("middle", 50, 29), candidate("small", 10, 12)]
    choice = choose_smallest(rows, standard_errors=1.5)
    assert choice.chosen.method.name == "middle"
    assert [each.method.name for each in choice.candidates] == ["small", "middle", "large"]
    assert "40 more than small" in choice.sentence() and "6 runs, 60 steps, 4.5 seconds" in choice.sentence()


def test_without_a_margin_the_best_is_taken_and_of_equals_the_smallest():
    rows = [candidate("small", 10, 20), candidate("middle", 50, 21), candidate("large", 99, 21)]
    assert choose_smallest(rows, standard_errors=0).chosen is rows[1]


def test_what_diverged_is_not_chosen():
    gone = candidate("small", 10, 30, converged=False)
    choice = choose_smallest([gone, candidate("large", 99, 1)])
    assert choice.chosen.method.name == "large"
    assert "behind by more than noise" not in choice.sentence()
    assert "| small | diverged | – | – |" in choice_table(choice, {})
    with pytest.raises(SubspaceError, match="every training diverged"):
        choose_smallest([gone])


def test_the_table_and_the_file_show_the_test_of_what_was_tested_alone(tmp_path):
    choice = choose_smallest([candidate("small", 10, 20), candidate("large", 99, 34)])
    text = write_choice(choice, tmp_path, title="a task", settings={"seed": 0}, tests={"large": 0.75})
    assert "| **large** | 0.944 | 0.000 | – | 99 | 396 | 2 | 20 | 1.5 | 0.001 | 0.750 |" in text
    assert "| small | 0.556 | 0.389 | 0.082 | 10 | 40 | 2 | 20 | 1.5 | 0.001 | – |" in text
    body = json.loads((tmp_path / "choice.json").read_text())
    assert body["chosen"] == body["best"] == "large" and body["cost"] == {"runs": 4, "steps": 40, "seconds": 3.0}
    assert [row["test"] for row in body["candidates"]] == [None, 0.75]
    (tmp_path / "README.md").write_text("# A LoRA\n\nof someone\n")
    note_choice(tmp_path, choice, {})
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# A LoRA\n\nof someone\n\n## How its kind was chosen\n\nChosen: large;")


def test_runs_without_folds_are_done_again_and_the_sweep_is_what_it_cost(tmp_path):
    cache, runs = RunCache(tmp_path, {}), Runs(lambda rate: 1 - abs(math.log10(rate / 1e-2)))
    method = head_only(1e-3, 1e-2, 1e-1)
    with tqdm(total=3, disable=True) as bar:
        try_rates(method, runs, cache=cache, bar=bar)
        assert len(runs.calls) == 3

        def folded(*given):
            return {**runs(*given), "without": [0.5, 0.75]}

        tried = try_rates(method, folded, cache=cache, keys=KEYS, bar=bar)
        assert len(runs.calls) == 6 and try_rates(method, folded, cache=cache, keys=KEYS, bar=bar) == tried
    assert len(runs.calls) == 6
    made = Candidate.of(method, tried)
    assert (made.rate, made.at_edge, made.runs, made.steps, made.seconds) == (1e-2, False, 3, 48, 6.0)
    assert (made.without, made.trained_adapter, made.bytes) == ([0.5, 0.75], result(0)["trained_adapter"], 7216)
    with tqdm(total=3, disable=True) as bar, pytest.raises(SubspaceError, match="returned no without"):
        try_rates(method, runs, cache=RunCache(tmp_path / "new", {}), keys=KEYS, bar=bar)
