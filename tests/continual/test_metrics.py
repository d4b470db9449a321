"""ACC, BWT, forgetting and FWT against their formulas, and what they are where something is missing."""

from __future__ import annotations

import json
import math

import pytest

from subspace_peft.continual import ScoreMatrix
from subspace_peft.continual.metrics import columns
from subspace_peft.errors import SubspaceError

NAN = math.nan
# R of three tasks: the first is forgotten in part and partly regained, the second gains
ROWS = [[0.9], [0.5, 0.8], [0.7, 0.85, 0.6]]
FORWARD, BASELINE = {"b": 0.55, "c": 0.4}, {"b": 0.5, "c": 0.5}


def matrix(rows=ROWS, forward=FORWARD, baseline=BASELINE, names=("a", "b", "c")):
    return ScoreMatrix(names, rows, forward, baseline)


def test_the_formulas():
    R = matrix()
    assert R.acc() == pytest.approx((0.7 + 0.85 + 0.6) / 3)
    assert R.bwt() == pytest.approx(((0.7 - 0.9) + (0.85 - 0.8)) / 2)
    assert R.forgetting() == pytest.approx((max(0.9 - 0.7, 0.5 - 0.7) + (0.8 - 0.85)) / 2)
    assert R.fwt() == pytest.approx(((0.55 - 0.5) + (0.4 - 0.5)) / 2)
    assert (R.score(3, 1), R.last()) == (0.7, {"a": 0.7, "b": 0.85, "c": 0.6})


def test_scores_that_do_not_change_are_no_transfer_at_all():
    R = ScoreMatrix("abc", [[0.1], [0.1, 0.2], [0.1, 0.2, 0.3]])
    # to the bit: differences of equal numbers
    assert R.bwt() == R.forgetting() == 0.0


@pytest.mark.parametrize(
    ("rows", "known"),
    [
        ([], {}),
        ([[0.5]], {"acc": 0.5}),
        ([[0.5], [0.5, None]], {"bwt": 0.0, "forgetting": 0.0}),
        ([[0.5], [NAN, 0.7]], {}),
        ([[0.5], [0.4]], {"bwt": -0.1, "forgetting": 0.1}),
        ([[None], [0.4, 0.6]], {"acc": 0.5}),
        # R[1, 1] is missing, a later best is not
        ([[None], [0.6, 0.2], [0.5, 0.1, 0.9]], {"acc": 0.5, "forgetting": 0.1}),
    ],
)
def test_a_metric_that_needs_a_missing_entry_is_nan(rows, known):
    R = matrix(rows, {}, {}, ("a", "b", "c")[: max(len(rows), 1)])
    for name, value in R.metrics().items():
        assert value == pytest.approx(known[name]) if name in known else math.isnan(value), name


def test_forward_transfer_needs_both_of_every_later_task():
    assert math.isnan(matrix(forward={"b": 0.5}).fwt())
    assert math.isnan(matrix(baseline={"c": 0.5}).fwt())
    assert math.isnan(matrix([[0.5]], names="a").fwt())
    # the first task has none, and one that is given is not asked for
    assert matrix(forward={**FORWARD, "a": 9}, baseline={**BASELINE, "a": 1}).fwt() == pytest.approx(matrix().fwt())


def test_a_row_may_have_the_scores_of_tasks_to_come():
    R = matrix([[0.9, 0.1, 0.2], [0.5, 0.8, 0.3], [0.7, 0.85, 0.6]])
    assert R.score(1, 3) == 0.2 and R.metrics() == pytest.approx(matrix().metrics())


@pytest.mark.parametrize(
    ("names", "rows", "said"),
    [
        ("aba", [], "'a' is in the matrix of scores twice"),
        ("a", [[0.1], [0.2]], "2 rows of up to 1 scores for 1 tasks"),
        ("a", [[0.1, 0.2]], "1 rows of up to 2 scores"),
    ],
)
def test_what_is_no_matrix(names, rows, said):
    with pytest.raises(SubspaceError, match=said):
        ScoreMatrix(names, rows)


def test_places_outside():
    with pytest.raises(SubspaceError, match=r"R\[0, 1\]"):
        matrix().score(0, 1)


def test_json_has_null_where_there_is_no_number():
    R = matrix([[0.5], [None, 0.7]], {}, {}, ("a", "b"))
    found = json.loads(json.dumps(R.to_dict(), allow_nan=False))
    assert found["scores"] == [[0.5, None], [None, 0.7]]
    assert (found["acc"], found["bwt"], found["fwt"]) == (None, None, None)


def test_the_tables():
    text = matrix().table()
    assert text.splitlines() == [
        "after      a      b      c",
        "a      0.900      –      –",
        "b      0.500  0.800      –",
        "c      0.700  0.850  0.600",
        "",
        "ACC 0.717, BWT -0.075, forgetting 0.075, FWT -0.025",
    ]
    assert matrix().table(markdown=True).splitlines()[:3] == [
        "| after | a | b | c |",
        "|---|---:|---:|---:|",
        "| a | 0.900 | – | – |",
    ]
    # a name cannot end a cell
    assert "a\\|b" in columns(["x"], [["a|b"]], markdown=True)


def test_it_shows_itself():
    assert repr(matrix()).startswith("ScoreMatrix(tasks: 3, ACC: 0.7167, BWT: -0.075")
    assert "0.850" in matrix()._repr_html_()
    assert repr(ScoreMatrix("a", [])) == "ScoreMatrix(tasks: 0)"
