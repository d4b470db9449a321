"""Tables, figure and calibration of the families, from made-up runs."""

from __future__ import annotations

import json

import pytest

from benchmarks.quality import calibration
from benchmarks.quality.families import tables
from benchmarks.quality.families.cells import Cell, Store
from benchmarks.quality.families.found import Which, per_seed, pooled, read

MEMBERS, SEEDS = ("one", "two"), (1, 2, 3)
# core minus LoRA r=8 in points, by the number of sources: level from eight on, ahead with sixteen
AHEAD = {2: -4.0, 4: -2.0, 8: 0.0, 16: 1.0}


def write(folder, name: str, ahead: dict[int, float], share: float = 0.01, said: str = "part") -> None:
    store = Store(folder / f"{name}.json", {"digest": name})
    store.facts |= {
        "about": "this or that",
        "members": [*MEMBERS, "tuned"],
        "held_out": list(MEMBERS),
        "headroom": {"one": {"source": 0.9, "head": 0.8}, "two": {"source": 0.9, "head": 0.89}},
        "energies": [
            {
                **{"member": member, "seed": seed, "sources": n, "mixed": mixed, "k": 16, "words": "Next: train."},
                **{"own": share * n, "quick": share * n / 2, "left_out": share * n, "random": 0.002, "class": said},
            }
            for member in MEMBERS
            for seed in SEEDS
            for n, mixed in (*((n, False) for n in ahead), (16, True))
        ],
    }
    for place, member in enumerate((*MEMBERS, "tuned")):
        for seed in SEEDS:
            for examples in (100, 300):
                level = 0.7 + 0.02 * place + 0.01 * seed
                runs = {
                    Cell(member, "head only", examples, seed, 4e-3): level - 0.05,
                    Cell(member, "LoRA r=8", examples, seed, 1.6e-3): level,
                    Cell(member, "random", examples, seed, 4.8e-3, 16): level - 0.03,
                    Cell(member, "core", examples, seed, 4.8e-3, 16, 16, True): level - 0.03,
                }
                for n, points in ahead.items():
                    runs[Cell(member, "core", examples, seed, 4.8e-3, min(16, 8 * n), n)] = level + points / 100
                for cell, test in runs.items():
                    store.add(cell, {"test": test, "validation": test, "trained": 1024, "seconds": 1.0})


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "families", "near", AHEAD)
    write(tmp_path / "families", "far", dict.fromkeys((2, 4, 8, 16), -3.0), 0.001, "unrelated")
    return tmp_path


def test_scores_are_of_held_out_members_and_paired_by_seed(folder):
    near = read(folder / "families")["near"]
    assert {cell.member for cell in near.runs} == set(MEMBERS)
    found = near.minus(near.core(300, 8), Which("random", 300, 16))
    assert found is not None and found.mean == pytest.approx(3) and found.low == pytest.approx(3)
    assert near.points(Which("LoRA r=8", 300)) == pytest.approx(73)
    assert near.minus(Which("VeRA", 300), Which("LoRA r=8", 300)) is None


def test_seeds_that_a_member_lacks_are_left_out_for_all():
    scores = {("a", 1): 0.1, ("a", 2): 0.2, ("b", 1): 0.3}
    assert per_seed(scores) == {"a": [0.1], "b": [0.3]}
    assert per_seed({("a", 2): 0.2, ("b", 1): 0.3}) == {}


def test_several_families_count_together(folder):
    every = read(folder / "families")
    found = pooled([(f, f.core(300, 16), Which("LoRA r=8", 300)) for f in every.values()])
    assert found is not None and found.mean == pytest.approx(-1) and len(found.tasks) == 4


def test_how_many_adapters_are_enough(folder):
    every = read(folder / "families")
    assert tables.enough(every["near"], 300, "LoRA r=8", -0.5) == "8"
    assert tables.enough(every["near"], 300, "LoRA r=8", 0.5) == "16"
    assert tables.enough(every["near"], 300, "random", 0.5) == "4"
    assert tables.enough(every["far"], 300, "LoRA r=8", -0.5) == "not by 16"


def test_a_curve_that_falls_again_is_not_enough_before_that(folder):
    write(folder / "families", "odd", {2: 2.0, 4: -2.0, 8: 2.0})
    assert tables.enough(read(folder / "families")["odd"], 300, "LoRA r=8", 0.5) == "8"


def test_all_tables_and_the_figure_are_made(folder, capsys):
    tables.main(["--results", str(folder / "families")])
    page = (folder / "families" / "tables.md").read_text()
    assert page.strip() in capsys.readouterr().out
    assert "| near | this or that | 3 | one, two | +5.5; 1 of 2 |" in page
    line = next(line for line in page.splitlines() if line.startswith("| near | 300 | 4 | 8 | 16 |"))
    assert "16.0 %" in line and "+1.0" in line
    assert "+0.0 [" in next(line for line in page.splitlines() if line.startswith("| near | 300 | 16 |"))
    # two members, three seeds, at 16 sources both ways
    assert "| 12–25 % | 12 |" in page
    assert (folder / "families" / "curves.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        tables.main(["--results", str(folder / "nothing")])


def test_the_verdict_is_held_against_what_training_gave(folder, capsys):
    said = {
        "class": "little",
        "left_out": 0.04,
        "own": 0.05,
        "quick": None,
        "random": 0.002,
        "words": "",
        "sources": 11,
    }
    (folder / "verdict.json").write_text(json.dumps({"text": {"movies": said, "mail": said}}))
    rows = [{"method": m, "tests": [t, t]} for m, t in (("fleet", 0.7), ("LoRA r=8", 0.72), ("random", 0.69))]
    (folder / "one-rate.json").write_text(json.dumps({"tasks": {"movies": rows}}))
    points = [*calibration.fleet_points(folder), *calibration.family_points(folder / "families", 300)]
    first = points[0]
    assert (first.group, first.task, first.said) == ("text fleet", "movies", "little") and "quick" not in first.kept
    assert first.gains == pytest.approx({"LoRA r=8": -2, "random": 1})
    near = {p.sources: p for p in points if p.group == "near" and p.task == "one" and not p.mixed}
    assert {n: round(p.gains["LoRA r=8"], 6) for n, p in near.items()} == AHEAD
    calibration.main(["--results", str(folder)])
    page = (folder / "calibration.md").read_text()
    assert page in capsys.readouterr().out
    # two families of two members, four fleets of their own and one of others; and one text task
    assert "| unrelated | 10 |" in page and "| part | 10 |" in page and "| little | 1 |" in page
    # of the ten in class part the basis pays in four; all eleven others are rightly told that it does not
    assert "| the verdict: part or mostly | 71 % of 21 | 40 % of 10 | 100 % of 11 |" in page
    assert (folder / "calibration.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        calibration.main(["--results", str(folder / "nothing")])


def test_a_threshold_is_chosen_on_other_groups():
    def point(group: str, kept: float, gain: float) -> calibration.Point:
        return calibration.Point(group, "t", 2, False, "part", {"own": kept}, {"LoRA r=8": gain, "random": gain})

    a = [point("a", 0.1, -3), point("a", 0.3, 2)]
    b = [point("b", 0.1, 2), point("b", 0.3, -3)]
    assert calibration.threshold(a, "own") == pytest.approx(0.2)
    # what b teaches is wrong of a: nothing beyond 0.3 pays, or all does
    assert calibration.left_out_thresholds([*a, *b], "own")[:2] in ([True, True], [False, False])
    assert calibration.left_out_thresholds([*a, *b], "own")[2:] == [False, True]
    assert calibration.spearman(a, "own", "random") is None


def test_the_same_value_everywhere_ranks_nothing():
    points = [calibration.Point("a", str(i), 2, False, "part", {"own": 0.1}, {"LoRA r=8": i}) for i in range(4)]
    assert calibration.spearman(points, "own", "LoRA r=8") is None
