"""Cells are measured once, and the tables say what the cells do. Fake fleets and fake cells."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks.quality.bench import OutOfTime
from benchmarks.quality.compression import cells, choices, continued, fleets, function, peers, tables
from benchmarks.quality.compression.advice import advice_section
from benchmarks.quality.compression.cells import Plan, Results, perform
from benchmarks.quality.compression.choices import CHOICES, SWEPT_WITH, basis_of, trained
from benchmarks.quality.compression.compared import best_within, by_group, fewest, label, read, rows_of
from benchmarks.quality.compression.encoder_members import encoder_member
from benchmarks.quality.compression.members import Fleet, dense
from benchmarks.quality.compression.run import swept_rate
from benchmarks.quality.compression.schemes import Scheme
from subspace_peft.errors import SubspaceError
from subspace_peft.sources import open_source

from .conftest import NAMES, SMALL, top_of, toy

FULL = {"basis": "float32", "core": "float32"}


@pytest.fixture
def small(monkeypatch, toys):
    """Everything that trains does so in a few steps, on toys."""
    monkeypatch.setattr(choices, "SOURCE_BUDGET", SMALL)
    monkeypatch.setattr(continued, "BUDGET", SMALL)
    monkeypatch.setattr(continued, "source", lambda name, folder: fleets.source(name, folder, budget=SMALL))


def member(name, lora, folder):
    return encoder_member(name, lora, folder, load=lambda name, folder: toy(name), kind="text")


def toy_fleet(folder, choice=CHOICES[0], seed=1) -> Fleet:
    made = {name: trained(choice, name, NAMES, seed, 1e-2, folder)[0] for name in NAMES}
    return Fleet([member(name, lora, folder) for name, lora in made.items()])


def test_a_judge_gives_back_the_trained_adapter_and_the_base_model(tmp_path, small):
    from peft import PeftModel

    from benchmarks.quality.training import make_model, score

    fleet = toy_fleet(tmp_path)
    for each in fleet.members:
        task = toy(each.name)
        model = PeftModel.from_pretrained(make_model(top_of(), task.outputs, 0), str(each.folder)).eval()
        whole, bare = cells.reference(each, fleet)
        assert whole.test == pytest.approx(score(model, task, "test"), abs=0.05)
        classifier = model.classifier.modules_to_save["default"]
        split = task.splits["test"]
        features = make_model(top_of(), task.outputs, 0).features(split.hidden.half().float(), split.lengths)
        assert torch.allclose(bare.outputs, classifier(features), atol=1e-3)
        assert not torch.allclose(bare.outputs, whole.outputs, atol=3e-3)
        # and judging leaves nothing behind
        assert torch.equal(each.judge(dense(fleet.factors(each.name))).outputs, whole.outputs)


@pytest.mark.parametrize("choice", [each for each in CHOICES if each.k != 32], ids=lambda choice: choice.slug)
def test_every_choice_trains_what_it_says(tmp_path, small, choice, monkeypatch):
    if choice.k:
        choice = type(choice)(choice.name, choice.rates, basis=choice.basis, k=4)
    monkeypatch.setattr(choices, "FIRST", 2)
    folders = {name: trained(choice, name, NAMES, 1, 1e-2, tmp_path)[0] for name in NAMES}
    sources = {name: open_source(str(folder)) for name, folder in folders.items()}
    module = next(iter(sources[NAMES[0]].keys))
    sides = {name: source.factors(module) for name, source in sources.items()}
    same = all(torch.equal(sides[NAMES[0]].A, each.A) for each in sides.values())
    if choice.start:
        assert same == (choice.start == "frozen")
    else:
        basis = basis_of(choice, NAMES, 1, tmp_path)
        on = basis[basis.find(module)]
        for each in sides.values():
            assert each.norm() > 0
            assert float(on.project((each.B, each.A)).norm()) == pytest.approx(each.norm(), rel=1e-4)
    # a second call trains nothing
    assert trained(choice, NAMES[0], NAMES, 1, 1e-2, tmp_path)[0] == folders[NAMES[0]]


def test_a_shared_start_is_shared_by_tasks_of_other_numbers_of_classes(tmp_path, small, monkeypatch):
    shared = CHOICES[1]
    monkeypatch.setattr(choices.tasks, "load", lambda name, folder: toy(name, {"one": 2, "three": 1}.get(name, 2)))
    monkeypatch.setattr(choices, "train", lambda *args, **more: None)
    found = [trained(shared, name, NAMES, 1, 1e-2, tmp_path)[0] for name in NAMES[:2]]
    sides = [open_source(str(folder)).read(_first_a(folder)) for folder in found]
    assert torch.equal(*sides)


def _first_a(folder):
    source = open_source(str(folder))
    return next(iter(source.keys.values()))["A"]


def test_variants_go_on_from_their_tasks_adapter(tmp_path, small):
    first = open_source(str(fleets.source(NAMES[0], tmp_path, budget=SMALL)))
    found = [open_source(str(continued.continued(NAMES[0], variant, tmp_path))) for variant in (0, 1)]
    module = next(iter(first.keys))
    updates = [dense({module: each.factors(module)})[module] for each in (first, *found)]
    assert not torch.equal(updates[1], updates[2])
    away = [float((each - updates[0]).norm() / updates[0].norm()) for each in updates[1:]]
    assert min(away) > 0 and max(away) < 2


def plan_of(folder, made: list, schemes) -> Plan:
    def make() -> Fleet:
        made.append(1)
        return toy_fleet(folder)

    return Plan("toys", "seed 1", {"members": list(NAMES)}, make, schemes)


def test_a_cell_is_measured_once_from_results_or_from_the_cache(tmp_path, small):
    made: list[int] = []
    schemes = [Scheme("LoRA", {"kind": "float32"}), Scheme("cores", {"k": 4, **FULL})]
    plan = plan_of(tmp_path, made, schemes)
    file, cache = tmp_path / "results" / "toys.json", tmp_path / "cells"
    perform(plan, Results(file, cache))
    first = file.read_bytes()
    whole, cores = read(file)[1]
    for values in whole["members"].values():
        assert values[3:] == pytest.approx([1, 0, 1], abs=1e-3)
    assert whole["bytes"] > cores["bytes"] > 0 and all(values[5] < 1 for values in cores["members"].values())
    # from the committed results alone, and from the cache alone
    perform(plan, Results(file, tmp_path / "elsewhere"))
    file.unlink()
    perform(plan, Results(file, cache))
    assert made == [1] and file.read_bytes() == first
    # what is new is measured, and nothing else
    more = plan_of(tmp_path, made, [*schemes, Scheme("SVD", {"rank": 1, "kind": "int4"})])
    perform(more, Results(file, cache))
    assert len(made) == 2 and len(read(file)[1]) == 3


def test_no_cell_begins_after_the_time_and_refusals_are_kept(tmp_path, small):
    made: list[int] = []
    plan = plan_of(tmp_path, made, [Scheme("cores", {"k": 0, **FULL})])
    results = Results(tmp_path / "toys.json", tmp_path / "cells")
    with pytest.raises(OutOfTime):
        perform(plan, results, until=0)
    assert not made
    perform(plan, results)
    (cell,) = results.cells.values()
    assert "k" in cell["refused"] and "members" not in cell
    assert rows_of(results.trained, results.cells.values()) == []


def test_a_package_that_fails_leaves_no_cell(tmp_path, small, monkeypatch, capsys):
    plan = plan_of(tmp_path, [], [Scheme("vlora-dev", {"numbers": 9}), Scheme("SVD", {"rank": 1, "kind": "int8"})])
    monkeypatch.setattr(peers.fleet_compressors, "environment", lambda folder: sys.executable)
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(peers, "WORKER", worker)
    results = Results(tmp_path / "toys.json", tmp_path / "cells")
    worker.write_text("raise ImportError('no such package')")
    perform(plan, results)
    assert [cell["family"] for cell in results.cells.values()] == ["SVD"]
    assert "no such package" in capsys.readouterr().out
    # but one that has no size as small is a finding
    worker.write_text("import sys; print('too few', file=sys.stderr); sys.exit(3)")
    perform(plan, results)
    assert [cell.get("refused", "")[-7:] for cell in results.cells.values()] == ["", "too few"]


def test_the_key_has_all_that_decides_a_cell():
    plan = Plan("toys", "seed 1", {"rate": 1e-3}, lambda: None, [])
    scheme = Scheme("SVD", {"rank": 1, "kind": "int4"})
    others = [
        Plan("other", "seed 1", {"rate": 1e-3}, lambda: None, []).key(scheme),
        Plan("toys", "seed 2", {"rate": 1e-3}, lambda: None, []).key(scheme),
        Plan("toys", "seed 1", {"rate": 2e-3}, lambda: None, []).key(scheme),
        plan.key(Scheme("SVD", {"rank": 2, "kind": "int4"})),
        plan.key(Scheme("LoRA", {"rank": 1, "kind": "int4"})),
    ]
    assert len({plan.key(scheme), *others}) == 6


def test_a_rate_is_swept_once_and_all_sizes_have_that_of_16(tmp_path, monkeypatch):
    swept: list[str] = []

    def sweep(choice, names, folder):
        swept.append(choice.slug)
        return {rate: -abs(rate - choice.rates[1]) for rate in choice.rates}

    monkeypatch.setattr("benchmarks.quality.compression.run.sweep", sweep)
    rate_of = swept_rate(tmp_path / "rates.json", NAMES, tmp_path)
    for choice in CHOICES:
        assert rate_of(choice) == choice.rates[1]
    assert len(swept) == len(set(swept)) == 6 and "random-k32" not in swept
    assert SWEPT_WITH not in choices.SEEDS


def test_families_that_are_not_there_are_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("no families")

    monkeypatch.setattr(fleets, "import_module", missing)
    with pytest.raises(SubspaceError, match="group `families`"):
        fleets.members_of("kinds")


def fake(family, scheme, size, validation, test, kept=0.5, same=0.9, variant="seed 0") -> dict:
    values = [validation, test, 0.4, same, 0.3, kept]
    key = json.dumps([family, scheme, variant])
    members = {name: list(values) for name in NAMES}
    body = {"key": key, "variant": variant, "adapters": variant, "family": family, "scheme": scheme}
    return {**body, "bytes": size, "members": members, "own": 0.0}


def alone_of(score=0.8, bare=0.3, size=3000) -> dict:
    each = {"lora": [score, score, 0.3], "bare": [bare, bare, 0.9]}
    return {"variant": "", "settings": {}, "bytes": size, "members": dict.fromkeys(NAMES, each)}


CELLS = [
    fake("SVD", {"rank": 4, "kind": "float32"}, 1500, 0.80, 0.79, kept=0.97),
    fake("SVD", {"rank": 2, "kind": "float32"}, 750, 0.70, 0.72, kept=0.85),
    fake("SVD", {"rank": 2, "kind": "int4"}, 100, 0.795, 0.7985, kept=0.84),
    fake("cores", {"k": 8, **FULL}, 600, 0.6, 0.55, kept=0.55),
    fake("cores", {"k": 4, "builder": "random", **FULL}, 600, 0.31, 0.3, kept=0.05),
]


def test_rows_say_what_the_cells_do():
    rows = rows_of({"seed 0": alone_of()}, CELLS)
    first, small, four, ours, control = rows
    assert (first.times, first.adapters, first.seeds) == (2.0, 3, 1)
    assert first.share == pytest.approx(0.79 / 0.8) and first.gain_left == pytest.approx(0.98)
    assert first.lost.mean == pytest.approx(-1.0)
    assert ours.gain_left == pytest.approx(0.5) and control.gain_left == pytest.approx(0)
    assert list(by_group(rows)) == ["SVD in fewer bits", "cores", "cores (random)", "SVD"]
    assert [row.label for row in rows][2:4] == ["SVD r=2, int4", "cores k=8, float32"]
    assert (
        label("clusters", {"k": 16, "clusters": 4, "basis": "int8", "core": "int4"}) == "clusters k=16 in 4, int8/int4"
    )
    # chosen by validation: the smallest that keeps 99 % there
    assert fewest(rows, 0.99) is four and fewest([small, ours], 0.99) is None
    assert fewest(rows, 0.99, against=0.806) is first
    assert best_within(rows, 20) is four and best_within(rows, 40) is None


def test_means_are_over_seeds_and_each_seed_against_its_own_loras():
    later = fake("SVD", {"rank": 4, "kind": "float32"}, 1700, 0.6, 0.6, variant="seed 1")
    trained = {"seed 0": alone_of(), "seed 1": alone_of(score=0.6)}
    (row,) = [each for each in rows_of(trained, [*CELLS, later]) if each.scheme == {"rank": 4, "kind": "float32"}]
    assert row.bytes == 1600 and row.tests["one"] == [0.79, 0.6] and row.lora["one"] == [0.8, 0.6]
    assert row.lost.mean == pytest.approx(-0.5)


def test_the_energy_at_which_function_is_lost():
    trained = {"seed 0": alone_of()}
    points = function.points(trained, CELLS)
    assert len(points) == 4 * len(NAMES)
    bins = function.binned(points)
    assert [each["gain_left"] for each in bins] == pytest.approx([0.0, 0.5, 0.84, 0.98])
    assert function.needed(bins, 0.9) == 0.95 and function.needed(bins, 0.8) == 0.8
    assert function.needed(bins, 0.49) == 0.5 and function.needed(bins, 0.99) is None
    assert function.unchanged(bins, 0.8) == 0.0 and function.unchanged(bins, 0.99) is None
    assert function.between(points, 0.5, 0.9)["gain_left"] == pytest.approx((0.5 + 0.84) / 2)
    assert function.between(points, 0.99, 1.01) is None
    rounded = function.points(trained, CELLS, rounded=True)
    assert [each["kept"] for each in rounded] == [0.84] * len(NAMES)


def test_the_page_has_the_aim_the_curve_and_the_thresholds():
    text = tables.render({"text": ({"seed 0": alone_of()}, CELLS)})
    assert "**99.8 % of the mean score in 30.0 × fewer bytes: SVD r=2, int4**" in text
    assert "| SVD in fewer bits | – | 30.0 (SVD r=2, int4; test 99.8 %)" in text
    assert "| cores (random) | – | – | – | – | – |" in text
    assert "| text | faithful, 95 %–100 % | 3 | 98.0 % | 90.0 % |" in text
    assert (
        "partial (two thirds) 80 % instead of 80 %" in text
        and "cores k=8, float32 (5.0 ×) − SVD r=2, int4 (30.0 ×)" in text
    )
    missed = tables.render({"text": ({"seed 0": alone_of()}, CELLS[3:])})
    assert "takes more than any of these schemes." in missed


def test_advice_compares_every_choice_with_loras_from_own_starts():
    trained, found = {}, []
    for name, score, size in ((CHOICES[0].name, 0.8, 1500), (CHOICES[3].name, 0.796, 60)):
        for seed in (1, 2, 3):
            variant = f"{name}, seed {seed}"
            trained[variant] = alone_of(score)
            family = "SVD" if size > 100 else "given basis"
            scheme = {"rank": 4, "kind": "float32"} if size > 100 else FULL
            found.append(fake(family, scheme, size, score, score, variant=variant))
    text = "\n".join(advice_section("text", trained, found, level=0.99))
    assert f"**{CHOICES[3].name}, stored as given basis, float32: 50.0 × fewer bytes" in text
    assert "| one random basis, k=16 | 79.6 | -0.4 [-0.4, -0.4] | 20 | 50.0 | 79.6 |" in text
    assert advice_section("text", {}, [], level=0.99) == []


def test_main_writes_page_and_figures(tmp_path, capsys):
    body = {"fleet": "text", "trained": {"seed 0": alone_of()}, "cells": CELLS}
    (tmp_path / "text.json").write_text(json.dumps(body))
    tables.main(["--results", str(tmp_path)])
    assert (tmp_path / "tables.md").is_file()
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("bytes.png", "energy.png"))
    with pytest.raises(SystemExit):
        tables.main(["--results", str(tmp_path / "empty")])
