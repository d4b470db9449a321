"""The short table of the evidence's page."""

from __future__ import annotations

import pytest

from benchmarks.quality.paired import difference
from benchmarks.quality.summary import summary, told


def row(trained: int, *tests: float) -> dict:
    return {"trained": trained, "tests": list(tests), "validations": list(tests), "sweep": [], "rate": 0.0}


@pytest.fixture
def rows() -> dict:
    each = {"movies": 0.5, "newsgroups": 0.6, "reviews": 0.9}
    return {
        "LoRA r=8": {task: row(1000, value, value + 0.02) for task, value in each.items()},
        "head only": {task: row(0, value - 0.1, value - 0.08) for task, value in each.items()},
        "fleet": {task: row(40, value + 0.01, value + 0.03) for task, value in each.items()},
        "random": {"movies": row(40, 0.5, 0.5)},
    }


def test_every_row_stands_beside_the_head_and_lora(rows):
    lines = {line.split(" | ")[0].strip("| "): line for line in summary(rows)}
    assert (
        "| over head only | against LoRA r=8 | against LoRA r=8, opinion tasks | against LoRA r=8, other tasks |"
        in (lines["3 tasks"])
    )
    assert lines["fleet"].split(" | ")[1:3] == ["40 (4.0 %)", "68.7"]
    assert "+11.0 [+11.0, +11.0] \\*" in lines["fleet"] and "+1.0 [+1.0, +1.0] \\*" in lines["fleet"]
    assert lines["LoRA r=8"].split(" | ")[4] == "–" and lines["head only"].split(" | ")[3] == "–"


def test_a_row_that_some_tasks_lack_is_left_out(rows):
    assert not any(line.startswith("| random") for line in summary(rows))


def test_random_directions_have_a_column_where_all_tasks_have_them(rows):
    assert "over random" not in summary(rows)[0]
    rows["random"] = {task: row(40, *each["tests"]) for task, each in rows["head only"].items()}
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in summary(rows)}
    assert lines["3 tasks"][3:5] == ["over head only", "over random"]
    assert lines["fleet"][3] == lines["fleet"][4] and lines["random"][4] == "–"


def test_tasks_of_one_kind_have_one_column(rows):
    images = {name: {"tops": each["newsgroups"]} for name, each in rows.items() if name != "random"}
    assert summary(images)[0].count("against LoRA r=8") == 1


def test_the_wider_of_both_intervals_is_told():
    found = difference({"a": [0.5], "b": [0.6]}, {"a": [0.4], "b": [0.58]})
    low, high = found.by_t
    assert low < found.low < found.high < high
    assert told(found) == f"+6.0 [−{-low:.1f}, +{high:.1f}]"
