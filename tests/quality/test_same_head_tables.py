"""The tables under one treatment of heads, from results that are told."""

from __future__ import annotations

import json

import pytest
from scipy.stats import ttest_1samp, ttest_rel

from benchmarks.quality import same_head_tables, tables
from benchmarks.quality.choice import CHOICE, choice_lines, runs_of, with_choice
from benchmarks.quality.generated import markers
from benchmarks.quality.paired import difference
from benchmarks.quality.rate_choice import choice_of_rates, disagreement, lost, single_seed_cost
from benchmarks.quality.same_head import CHOSEN, FOLDER, HEADS
from benchmarks.quality.same_head_tables import decided, same_head_sections, with_headroom

RESULTS = tables.RESULTS / FOLDER
TRAINED = {"head only": 0, "fleet": 1024, "random": 1024, "fleet + 2 own": 7168, "LoRA r=8": 24576, "LoRA r=2": 6144}


def row(method, tests, validations=None, tried=None, rate=1e-3, at_edge=False):
    ends = validations or tests
    listed = tried or [[1e-3, ends[:2], tests[:2]], [4e-3, [0.1, 0.1], [0.1, 0.1]]]
    return {
        "method": method,
        "rate": rate,
        "at_edge": at_edge,
        "trained": TRAINED[method],
        "head": 2,
        "tests": tests,
        "validations": ends,
        "sweep": [[each[0], sum(value or 0.0 for value in each[1]) / len(each[1])] for each in listed],
        "tried": listed,
        "curves": [[[20, 0.1], [60, end]] for end in ends],
        "seconds": 1.0,
    }


def by_method(tasks):
    rows = {}
    for task, listed in tasks.items():
        for each in listed:
            rows.setdefault(each["method"], {})[task] = each
    return rows


def flat(score):
    return [score, score, score]


@pytest.fixture
def main():
    return by_method(
        {
            "movies": [
                row("head only", flat(0.7)),
                row("LoRA r=8", flat(0.8)),
                row("fleet", flat(0.82)),
                row("random", flat(0.71)),
            ],
            # by its test scores LoRA gains here too, by validation it does not
            "mail": [
                row("head only", flat(0.9)),
                row("LoRA r=8", flat(0.95), flat(0.91)),
                row("fleet", flat(0.9)),
                row("random", flat(0.9)),
            ],
            "tweets": [
                row("head only", flat(0.5)),
                row("LoRA r=8", flat(0.6)),
                row("fleet", flat(0.58)),
                row("random", flat(0.51)),
            ],
        }
    )


# -- intervals


def test_the_interval_by_t_is_that_of_a_paired_t_test_over_tasks():
    ours = {"a": [0.5, 0.6], "b": [0.4, 0.7], "c": [0.9, 0.8], "d": [0.3, 0.1]}
    theirs = {"a": [0.4, 0.5], "b": [0.5, 0.7], "c": [0.8, 0.8], "d": [0.2, 0.1]}
    found = difference(ours, theirs)
    means = [[50 * sum(each[task]) for task in "abcd"] for each in (ours, theirs)]
    wanted = ttest_rel(*means).confidence_interval(0.95)
    assert found.by_t == pytest.approx((wanted.low, wanted.high))
    # over few tasks a bootstrap is too narrow
    assert found.by_t[1] - found.by_t[0] > found.high - found.low
    assert difference({"a": [0.5]}, {"a": [0.4]}).by_t is None


def test_a_draw_of_its_own_per_task_is_inside_the_interval():
    # the same score for every run, but for what the draws add
    draws = {task: [0.5 + 0.05 * (-1) ** (i + j) * (i % 3) for j in range(3)] for i, task in enumerate("abcdefgh")}
    still = {task: [0.5] * 3 for task in draws}
    found = difference(still, draws)
    means = list(found.tasks.values())
    wanted = ttest_1samp(means, 0.0).confidence_interval(0.95)
    assert found.by_t == pytest.approx((wanted.low, wanted.high)) and found.low < found.mean < found.high


# -- tables


def test_tasks_with_headroom_are_chosen_by_validation_scores(main):
    assert with_headroom(main) == ["movies", "tweets"]
    text = "\n".join(same_head_sections({"main": main}))
    first, second = text.split("only where LoRA r=8 gains 3 points over the head on validation (movies, tweets)")
    assert "| fleet − head only | +6.7 [" in first and "| fleet − head only | +10.0 [" in second
    assert "| random − head only | +1.0 [+1.0, +1.0] * | [+1.0, +1.0] * | 2 / 0 / 0 | 2 |" in second
    assert "| fleet | 1,024 | **76.7** | **70.0** | **90.0** | 82.0 | 90.0 | 58.0 |" in first
    assert "| LoRA r=8 − head only | +8.3 [" in first and "mail" not in second.split("### ")[0]


def test_without_headroom_the_tables_say_so():
    rows = by_method({"mail": [row("head only", flat(0.9)), row("LoRA r=8", flat(0.92)), row("fleet", flat(0.9))]})
    text = "\n".join(same_head_sections({"main": rows}))
    assert "LoRA r=8 gains 3 points over the head alone on validation on none of these tasks." in text


def test_a_row_that_is_not_run_on_all_tasks_has_no_mean_and_takes_none_from_others(main):
    main["LoRA r=2"] = {"movies": row("LoRA r=2", flat(0.75))}
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in same_head_tables.table(main)}
    assert lines["row"][1] == "mean of 3" and lines["LoRA r=8"][1] == "**78.3**"
    assert lines["LoRA r=2"] == ["6,144", "–", "–", "–", "75.0", "–", "– |"]


def test_differences_have_both_intervals(main):
    lines = same_head_tables.between(main, [("fleet", "LoRA r=8"), ("fleet", "VeRA r=384")])
    wanted = ttest_rel([82, 90, 58], [80, 95, 60]).confidence_interval(0.95)
    assert len(lines) == 1 and f"| [{wanted.low:+.1f}, {wanted.high:+.1f}] | 1 / 0 / 2 | 3 |" in lines[0]


# -- choice by validation


def test_the_choice_is_by_each_seeds_validation_and_of_equals_the_smallest():
    rows = by_method(
        {
            "a": [
                row("fleet", [0.1, 0.2, 0.3], [0.5, 0.5, 0.5]),
                row("fleet + 2 own", [0.4, 0.5, 0.6], [0.6, 0.5, 0.4]),
                row("LoRA r=8", [0.7, 0.8, 0.9], [0.6, 0.4, 0.7]),
            ],
            "b": [
                row("fleet", [0.1, 0.2, None], [0.5, 0.5, None]),
                row("fleet + 2 own", [0.4, 0.5, None], [0.1, 0.1, None]),
                row("LoRA r=8", [0.7, 0.8, 0.9], [0.1, 0.1, 0.2]),
            ],
        }
    )
    found = with_choice(rows)[CHOICE]
    assert found["a"]["picks"] == ["fleet + 2 own", "fleet", "LoRA r=8"] and found["a"]["tests"] == [0.4, 0.2, 0.9]
    assert found["b"]["picks"] == ["fleet", "fleet", "LoRA r=8"] and found["b"]["tests"] == [0.1, 0.2, 0.9]
    assert found["a"]["trained"] == round((7168 + 1024 + 24576) / 3)
    # the test scores choose nothing
    for each in rows.values():
        for task in each.values():
            task["tests"] = task["tests"][::-1]
    assert with_choice(rows)[CHOICE]["a"]["picks"] == found["a"]["picks"]
    # two rates with two seeds each, and the third seed at the chosen one
    assert [runs_of(each["a"]) for each in rows.values()] == [5, 5, 5]
    lines = choice_lines(with_choice(rows))
    assert "| fleet | 3 of 6 | 5.0 | 1,024 |" in lines and lines[-1].startswith(f"| {CHOICE} | | 15.0 | ")
    assert with_choice({"fleet": rows["fleet"]}) == {"fleet": rows["fleet"]} and choice_lines(rows) == []


def test_runs_of_one_seeds_sweep_are_counted_beside_the_reports():
    earlier = {"sweep": [[1e-3, 0.5], [4e-3, 0.6], [1.6e-2, 0.5]], "tests": [0.1, 0.2, 0.3]}
    assert runs_of(earlier) == 6 and runs_of({**earlier, "sweep": [[1e-3, 0.5]]}) == 3


# -- rates


def test_rates_that_cost_and_seeds_that_disagree_are_told():
    tried = [
        [1e-3, [0.9, 0.1], [0.5, 0.5]],
        [4e-3, [0.6, 0.6], [0.6, 0.6]],
        [1.6e-2, [0.2, 0.7], [0.7, 0.72]],
    ]
    bad = row("LoRA r=8", flat(0.6), tried=tried, rate=4e-3)
    assert lost(bad) == pytest.approx(11.0) and disagreement(bad) == pytest.approx(16)
    # the means are 0.5, 0.6 and 0.45: one seed alone would have taken the first or the last
    assert single_seed_cost(bad) == pytest.approx((10 + 15) / 2)
    fine = row("LoRA r=8", flat(0.6))
    assert lost(fine) == 0 and disagreement(fine) == 1 and single_seed_cost(fine) == 0
    lines = choice_of_rates(by_method({"mail": [bad], "movies": [fine]}), ("LoRA r=8", "fleet"))
    assert lines[2:] == ["| LoRA r=8 | 0.001 | 0.001 | 0.004 | 0 of 2 | mail | 6.2 | mail -11.0 |"]
    # a neighbouring rate is no disagreement, and what was not tested is not told
    near = row("fleet", flat(0.6), tried=[[1e-3, [0.9, 0.1], [None, None]], [4e-3, [0.6, 0.6], [0.5, 0.5]]], rate=4e-3)
    assert disagreement(near) == pytest.approx(4) and lost(near) is None
    assert "| – | " in choice_of_rates(by_method({"mail": [near]}), ("fleet",))[2]


# -- the trial


def trial(lora, fleet, random, head=0.6):
    each = zip(("head only", "LoRA r=8", "fleet", "random"), (head, lora, fleet, random), strict=True)
    return by_method({"movies": [row(name, [None, None], [score, score]) for name, score in each]})


def test_the_trial_decides_for_the_treatment_under_which_adapters_validate_best():
    trials = {
        "as before": trial(0.8, 0.8, 0.7),
        "faster": trial(0.8, 0.8, 0.75),
        "fitted": trial(0.7, 0.7, 0.7, head=0.9),
    }
    assert decided(trials) == "faster"
    # a joint sweep has to be worth its runs
    assert decided({**trials, "swept": trial(0.8, 0.8, 0.76)}) == "faster"
    assert decided({**trials, "swept": trial(0.8, 0.8, 0.77)}) == "swept"
    with pytest.raises(ValueError, match="head-trial"):
        decided({})
    text = "\n".join(
        same_head_sections({f"head-trial-{name.replace(' ', '-')}": each for name, each in trials.items()})
    )
    assert f"| faster: {HEADS['faster'].about} | 60.0 | 80.0 | 80.0 | 75.0 | 78.3 | +5.0 | +20.0 |" in text
    assert "The rule chooses *faster*" in text


def test_the_committed_trial_chose_the_committed_tables_treatment():
    trials = same_head_tables.trials_of(tables.read(RESULTS))
    if len(trials) < len(HEADS):
        pytest.skip("the trial of heads is not measured yet")
    assert decided(trials) == CHOSEN
    for file in RESULTS.glob("*.json"):
        body = json.loads(file.read_text(encoding="utf-8"))
        if "budget" in body and not file.name.startswith("head-trial"):
            assert (body["budget"]["head_start"], body["budget"]["head_rate"]) == (
                HEADS[CHOSEN].start,
                HEADS[CHOSEN].rates[0],
            )


# -- beside the earlier benchmark


def test_both_benchmarks_are_told_apart(main, tmp_path):
    for folder, name in ((tmp_path, "main"), (tmp_path / FOLDER, "main"), (tmp_path / FOLDER, "main-rest")):
        folder.mkdir(exist_ok=True)
        listed = {task: [main[method][task] for method in main] for task in ("movies", "mail")}
        if name == "main-rest":
            listed = {"movies": [row("LoRA r=2", flat(0.75))]}
        (folder / f"{name}.json").write_text(json.dumps({"experiment": name, "tasks": listed}))
    page = tmp_path / "page.md"
    page.write_text("{}\n{}\n".format(*markers(tables.SCRIPT)), encoding="utf-8")
    brief = tmp_path / "evidence.md"
    brief.write_text("{}\nold\n{}\nlast\n".format(*markers(tables.SCRIPT, "text")), encoding="utf-8")
    tables.main(["--results", str(tmp_path), "--page", str(page)])
    ours, earlier = page.read_text(encoding="utf-8").split(f"## {tables.EARLIER}")
    assert "one head treatment, rates swept with two seeds" in ours and "LoRA r=2 − head only" in ours
    assert "every row's rate swept on the task" in earlier and "two seeds" not in earlier
    text = brief.read_text(encoding="utf-8")
    assert "old" not in text and text.endswith("last\n") and "| LoRA r=8 | 24,576 |" in text
    old = tmp_path / tables.EARLIER_PAGE
    old.write_text("{}\n{}\n".format(*markers(tables.SCRIPT, "earlier")), encoding="utf-8")
    tables.main(["--results", str(tmp_path), "--page", str(page)])
    assert "every row's rate swept on the task" in old.read_text(encoding="utf-8")
    assert tables.EARLIER not in page.read_text(encoding="utf-8")
    assert tables.STARRED in page.read_text(encoding="utf-8")
    (tmp_path / "main.json").unlink()
    tables.main(["--results", str(tmp_path), "--page", str(page)])
    assert tables.EARLIER not in page.read_text(encoding="utf-8")
