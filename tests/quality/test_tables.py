"""The quality benchmark's statistics, tables and the comparison of energies with scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks.quality import sections, tables
from benchmarks.quality.energy import agreement
from benchmarks.quality.generated import markers
from benchmarks.quality.paired import difference, mean_score
from benchmarks.quality.sections import energy_section

# -- statistics
# ---------------------------------------------------------------------------------------------------------


def test_a_constant_difference_has_an_interval_of_no_width():
    found = difference({"a": [0.5, 0.6], "b": [0.7, 0.8]}, {"a": [0.49, 0.59], "b": [0.69, 0.79]})
    assert found.mean == pytest.approx(1.0) and found.low == pytest.approx(1.0) and found.high == pytest.approx(1.0)
    assert (found.wins, found.ties, found.losses) == (2, 0, 0) and found.beyond_noise


def test_differences_are_antisymmetric_and_count_wins_ties_and_losses():
    ours = {"a": [0.9, 0.8], "b": [0.5, 0.5], "c": [0.1, 0.3]}
    theirs = {"a": [0.8, 0.8], "b": [0.502, 0.5], "c": [0.4, 0.4], "elsewhere": [1.0, 1.0]}
    there, back = difference(ours, theirs), difference(theirs, ours)
    assert there.mean == pytest.approx(-back.mean) and there.low == pytest.approx(-back.high)
    assert (there.wins, there.ties, there.losses) == (1, 1, 1) and not there.beyond_noise
    assert there.low < there.mean < there.high and "elsewhere" not in there.tasks


def test_the_interval_has_about_the_spread_of_the_mean_over_tasks():
    drawn = np.random.default_rng(0)
    effects = drawn.normal(0, 0.05, size=400)
    ours = {str(i): [0.5 + e] * 3 for i, e in enumerate(effects)}
    found = difference(ours, {task: [0.5] * 3 for task in ours})
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 100 * effects.std() / 400**0.5, rel=0.1)


def test_a_diverged_run_counts_as_zero_and_other_seeds_are_refused():
    assert difference({"a": [None, 0.5]}, {"a": [0.5, 0.5]}).mean == pytest.approx(-25)
    assert mean_score({"a": [None, 0.5]}, ["a"]) == pytest.approx(25)
    with pytest.raises(ValueError, match="number of seeds"):
        difference({"a": [0.1]}, {"a": [0.1, 0.2]})
    with pytest.raises(ValueError, match="No task in common"):
        difference({"a": [0.1]}, {"b": [0.1]})


# -- tables
# -------------------------------------------------------------------------------------------------------------


def row(method: str, tests: list, validations: list | None = None, at_edge: bool = False) -> dict:
    ends = validations or tests
    return {
        "method": method,
        "rate": 1e-3,
        "at_edge": at_edge,
        "trained": 10,
        "head": 2,
        "tests": tests,
        "validations": ends,
        "sweep": [[1e-3, 0.5], [4e-3, 0.4]],
        "curves": [[[20, end - 0.1], [60, end]] for end in ends],
        "seconds": 1.0,
    }


@pytest.fixture
def results(tmp_path):
    def write(name: str, tasks: dict) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps({"experiment": name, "tasks": tasks}))

    main = {
        task: [
            row("LoRA r=8", [0.8, 0.82]),
            row("fleet", [0.81, 0.83]),
            row("random", [0.7, 0.7], at_edge=task == "mail"),
        ]
        for task in ("movies", "mail")
    }
    write("main", main)
    write("main-more", {"movies": [row("hybrid", [0.75, 0.75])]})
    write("ablation-b-mean", {"movies": [row("mean fixed", [0.71, 0.73])]})
    (tmp_path / "machine.json").write_text("{}")
    return tmp_path


def test_tables_say_what_the_results_say(results):
    text = tables.render(tables.read(results))
    assert "| movies | 81.0 | 82.0 | 75.0 | 70.0 |" in text
    assert "| mail | 81.0 | 82.0 | – | 70.0 |" in text
    assert "| fleet − LoRA r=8 | +1.0 [+1.0, +1.0] * | 2 / 0 / 0 | 2 |" in text
    assert "| (b) mean fixed | -10.0 [-10.0, -10.0] * | 0 / 0 / 1 | 1 |" in text
    assert "| LoRA r=8 | 0.001 | 0.001 | 0.001 | 2 |" in text and "### 2 text tasks, 300" in text
    assert "at an edge after widening: 1 of 8" in text


def test_an_ablation_with_a_fleet_row_of_its_own_is_held_against_it(results):
    rows = [row("fleet", [0.6, 0.6]), row("own first gradient", [0.65, 0.65])]
    body = {"experiment": "ablation-d-gradient", "tasks": {"movies": rows}}
    (results / "ablation-d-gradient.json").write_text(json.dumps(body))
    text = tables.render(tables.read(results))
    assert "| (d) own first gradient | +5.0 [+5.0, +5.0] * | 1 / 0 / 0 | 1 |" in text and "(d) fleet" not in text


def test_rates_between_are_held_against_the_usual_ones(results):
    listed = [
        row("fleet", [0.8, 0.8]),
        row("fleet at half the rate", [0.79, 0.79]),
        row("LoRA r=8", [0.85, 0.85]),
        row("LoRA r=8 at half the rate", [0.83, 0.83]),
    ]
    body = {"experiment": "ablation-g-rates", "tasks": {"movies": listed}}
    (results / "ablation-g-rates.json").write_text(json.dumps(body))
    text = tables.render(tables.read(results))
    part = text[text.index("### Usual rates and half of them") :]
    for line in (
        "fleet at half the rate − fleet | -1.0 ",
        "LoRA r=8 at half the rate − LoRA r=8 | -2.0 ",
        "fleet − LoRA r=8 | -5.0 ",
        "fleet at half the rate − LoRA r=8 at half the rate | -4.0 ",
        "fleet, run again − first run | -2.0 ",
    ):
        assert f"| {line}" in part
    assert "(g)" not in text


def test_the_longer_runs_and_those_at_a_high_rate_have_sections(results):
    def write(name, listed):
        (results / f"{name}.json").write_text(json.dumps({"experiment": name, "tasks": {"movies": listed}}))

    write("longer", [row("LoRA r=8", [0.8, 0.8]), row("fleet", [0.83, 0.83])])
    write("fast", [row("fleet at 4 × the rate", [0.8, 0.3])])
    write("fast-clipped", [row("fleet at 4 × the rate", [0.8, 0.7])])
    text = tables.render(tables.read(results))
    longer = text[text.index("### 60 steps, 1 tasks") :]
    assert "| fleet − LoRA r=8 | +3.0 [+3.0, +3.0] * | 1 / 0 / 0 | 1 |" in longer
    assert "| worst seed | without a limit | gradients cut to norm 1 |" in text and "| movies | 30.0 | 70.0 |" in text
    assert "| gradients cut to norm 1 − without a limit | +20.0 " in text


def test_own_directions_are_held_against_the_core_its_control_and_loras_of_as_many_directions(results):
    def listed(core: float) -> list[dict]:
        scores = {
            "fleet": core,
            "fleet + 1 own": core + 0.01,
            "random + 1 own": core - 0.02,
            "LoRA r=1": core - 0.03,
            "LoRA r=8": 0.8,
        }
        return [row(method, [score, score]) for method, score in scores.items()]

    body = {"experiment": "own-directions", "tasks": {"movies": listed(0.8), "mail": listed(0.6)}}
    (results / "own-directions.json").write_text(json.dumps(body))
    text = tables.render(tables.read(results))
    part = text[text.index("### Directions of a task's own beside the basis, rates swept") :]
    assert "| task | fleet | fleet + 1 own | random | random + 1 own | LoRA r=1 | LoRA r=8 |" in part
    # the random basis alone is the main table's
    assert "| mail | 60.0 | 61.0 | 70.0 | 58.0 | 57.0 | 80.0 |" in part
    for line in (
        "fleet + 1 own − fleet | +1.0 [+1.0, +1.0] * | 2 / 0 / 0 | 2 |",
        "fleet + 1 own − LoRA r=1 | +4.0 [",
        "random + 1 own − LoRA r=1 | +1.0 [",
        "fleet + 1 own − random + 1 own | +3.0 [",
        "opinion tasks: fleet + 1 own − LoRA r=8 | +1.0 [",
        "other tasks: fleet + 1 own − LoRA r=8 | -19.0 [",
    ):
        assert f"| {line}" in part
    assert "at usual rates" not in text


def test_the_rates_that_all_tasks_tried_have_a_mean(results):
    rows = tables.read(results)["main"]
    rows["fleet"]["mail"]["sweep"] = [[1e-3, 0.7], [2.5e-4, 0.9]]
    assert sections.transfer_table([("k = 16", rows), ("nothing", {})]) == [
        "| | 0.001 |",
        "|---|---|",
        "| k = 16 (2 tasks) | 60.0 |",
    ]


def test_the_share_of_runs_near_the_target_per_step(results):
    main = tables.read(results)["main"]
    assert sections.reached(main, "fleet") == {20: 0.0, 60: 1.0}
    assert sections.reached(main, "random") == {20: 0.0, 60: 0.0}


def test_the_command_writes_tables_figures_and_the_pages_part(results, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*markers(tables.SCRIPT)), encoding="utf-8")
    tables.main(["--results", str(results), "--page", str(page)])
    text = page.read_text(encoding="utf-8")
    assert (
        text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "fleet − LoRA r=8" in text
    )
    assert (results / "tables.md").read_text(encoding="utf-8") in text
    for name in ("scores.png", "differences.png"):
        assert (results / name).read_bytes().startswith(b"\x89PNG")


def test_the_command_says_what_to_do_without_results(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tables.main(["--results", str(tmp_path)])
    assert "run.py" in capsys.readouterr().err


def test_calls_are_noted_with_their_machine(tmp_path, monkeypatch):
    from benchmarks.quality import run

    for name in ("one", "one", "other"):
        monkeypatch.setattr(run, "machine", lambda name=name: {"processor": name})
        run.note(tmp_path / "machine.json", ["main"], 120.0)
    kept = json.loads((tmp_path / "machine.json").read_text())
    assert [each["processor"] for each in kept["machines"]] == ["one", "other"]
    assert [each["machine"] for each in kept["runs"]] == [0, 0, 1] and kept["runs"][0]["minutes"] == 2.0


# -- energy and scores
# ---------------------------------------------------------------------------------------------------


def test_agreement_is_spearmans_and_knows_chance():
    draw = np.random.default_rng(3)
    names = [f"t{i}" for i in range(9)]
    ours = {name: draw.random(3).tolist() for name in names}
    found = difference(ours, {name: [0.5] * 3 for name in names})
    energy = {name: round(float(draw.random()), 1) for name in names}  # with ties
    value, chance = agreement(energy, found)
    expected = spearmanr([energy[name] for name in names], [found.tasks[name] for name in names])
    assert value == pytest.approx(expected.statistic)
    assert chance == pytest.approx(expected.pvalue, abs=0.05)
    best, least = agreement(found.tasks, found)
    assert best == pytest.approx(1) and least < 0.001
    with pytest.raises(ValueError, match="nothing to correlate"):
        agreement(dict.fromkeys(names, 0.1), found)


def test_the_table_of_energies_is_in_order_and_names_every_task():
    def rows(scores):
        return {task: {"tests": values} for task, values in scores.items()}

    fleet = {"a": [0.9, 0.9], "b": [0.5, 0.5], "c": [0.7, 0.7]}
    found = {"main": {"fleet": rows(fleet), "random": rows({task: [0.5, 0.5] for task in fleet})}}
    energy = {
        "k": 16,
        "random": 0.0017,
        "tasks_left_out": {"a": {"unseen": 0.12}, "c": {"unseen": 0.08}, "b": {"unseen": 0.04}},
    }
    text = energy_section(energy, found)
    lines = [line for line in text if line.startswith("| ")]
    assert lines[1:] == ["| b | 4.0% | +0.0 |", "| c | 8.0% | +20.0 |", "| a | 12.0% | +40.0 |"]
    assert "+1.00" in text[-2]
