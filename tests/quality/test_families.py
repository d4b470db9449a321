"""Families of toy tasks: pools, draws of sources, own adapters refused, runs kept and gone on with."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.quality import bench as bench_module
from benchmarks.quality.bench import Bench, OutOfTime
from benchmarks.quality.families import plan, pools, registry, runs
from benchmarks.quality.families.cells import Cell, Store, reached
from benchmarks.quality.families.facts import energy_kept
from benchmarks.quality.families.plan import Stage, core, counts, curve_cells, size_cells, stages
from benchmarks.quality.families.pools import Family, Member, pool_of, without_copies
from benchmarks.quality.families.runs import Runs
from subspace_peft.errors import SubspaceError

from .conftest import SMALL, toy

LETTERS = "abcdefgh"


def made(name: str = "letters", per_class: int = 150, members: str = LETTERS, **more) -> Family:
    """Return a family whose items are `per_class` texts of each letter."""
    items = [f"{letter}{name} {i}" for letter in members for i in range(per_class)]
    return Family(
        name,
        "letter: this or another",
        "text",
        items,
        [item[0] for item in items],
        items,
        {f"{name}-{x}": Member((x,), tuple(y for y in members if y != x)) for x in members},
        **{"held_out": 2, "tuning": 1, **more},
    )


@pytest.fixture
def small(monkeypatch):
    for table in (pools.SIZES, pools.SOURCE_SIZES):
        for pool, size in {"train": 40, "validation": 10, "test": 20}.items():
            monkeypatch.setitem(table, pool, size)
    monkeypatch.setattr(pools, "LEAST", {"train": 10, "validation": 4, "test": 8})
    monkeypatch.setattr(pools, "RICH", 30)


@pytest.fixture
def families(small, toys, monkeypatch):
    """Two families of eight toy tasks each, in the place of the real ones."""
    two = {name: made(name) for name in ("letters", "signs")}
    makers = {name: ("text", lambda name=name: two[name]) for name in two}
    for module in (registry, runs, plan):
        monkeypatch.setattr(module, "MAKERS", makers)
        monkeypatch.setattr(module, "family", two.__getitem__)
    for name in two:
        monkeypatch.setitem(bench_module.tasks.FAMILIES, name, ("text", lambda name, folder: toy(name)))
    monkeypatch.setattr(runs, "budget_of", lambda examples: SMALL)
    monkeypatch.setattr(runs, "TUNING_SEEDS", (11,))
    monkeypatch.setattr(plan, "COUNTS", (2, 4))
    return two


@pytest.fixture
def letters(families, tmp_path):
    return Runs("letters", Bench(tmp_path / "cache", source_budget=SMALL, seeds=(1, 2)), tmp_path / "out")


def test_every_document_is_in_one_pool_of_a_fixed_share():
    names = [f"document {i}" for i in range(4000)]
    shares = Counter(map(pool_of, names))
    assert all(abs(shares[pool] / 4000 - share) < 0.03 for pool, share in pools.POOLS.items())
    assert [pool_of(name) for name in names] == [pool_of(name) for name in names]


def test_no_item_is_in_two_pools_whichever_members_use_it(small):
    family = made()
    seen: dict[int, set[str]] = {}
    for name in family.order:
        for pool, chosen in family.draw(name).items():
            for place, _ in chosen:
                seen.setdefault(place, set()).add(pool)
    assert len(seen) > 200 and all(len(each) == 1 for each in seen.values())
    # and items are shared: the negatives of one are the positives of another
    assert sum(len(set(map(tuple, family.draw(name)["train"]))) for name in family.order) > len(seen) / 2


def test_items_of_one_document_stay_together(small):
    family = made()
    together = Family(**{**vars_of(family), "documents": [item[0] for item in family.items]})
    pools_of = {family.classes[p]: pool for pool, found in together.pools.items() for c in found.values() for p in c}
    assert all({pools_of[c]} == {pool for pool, f in together.pools.items() if c in f} for c in LETTERS)


def vars_of(family: Family) -> dict:
    return {key: getattr(family, key) for key in family.__dataclass_fields__}


def test_a_members_halves_are_even_and_negatives_come_from_all_other_classes(small):
    family = made()
    for name in family.order:
        for pool, chosen in family.draw(name).items():
            labels = Counter(label for _, label in chosen)
            assert labels[0] == labels[1] == pools.SIZES[pool] // 2
            negatives = Counter(family.classes[place] for place, label in chosen if label == 0)
            assert max(negatives.values()) - min(negatives.get(c, 0) for c in family.members[name].no) <= 1
            assert {family.classes[place] for place, label in chosen if label == 1} == set(family.members[name].yes)


def test_poor_members_are_left_out_and_those_between_are_sources_only(small):
    family = made()
    few = {"a": 12, "b": 36}
    kept = [i for i, item in enumerate(family.items) if int(item.split()[1]) < few.get(item[0], 150)]
    pick = lambda values: [values[i] for i in kept]  # noqa: E731
    cut = Family(
        **{
            **vars_of(family),
            "items": pick(family.items),
            "classes": pick(family.classes),
            "documents": pick(family.documents),
        }
    )
    assert "letters-a" not in cut.order and cut.order[-1] != cut.order[0]
    with pytest.raises(SubspaceError, match="no member 'letters-a'"):
        cut.draw("letters-a")


def test_copies_that_share_a_run_of_words_are_dropped():
    texts = ["one two three four five six", "zero one two three four five", "one two three", "six five four three two"]
    assert without_copies(texts, 5) == [0, 2, 3]


def test_sources_are_nested_depend_on_the_seed_and_never_hold_the_member(families, letters):
    held = families["letters"].held()
    draws = {seed: [letters.fleet(held[0], n, seed) for n in (2, 4, 6)] for seed in (1, 2, 3)}
    for seed, (two, four, six) in draws.items():
        assert two == four[:2] and four == six[:4] and len(set(six)) == 6
        assert not {f"letters/{name}" for name in held} & set(six), seed
    assert len({tuple(each[0]) for each in draws.values()}) > 1
    tuned = families["letters"].tuned()[0]
    assert f"letters/{tuned}" not in letters.fleet(tuned, 5, 1)
    with pytest.raises(SubspaceError, match="6 sources"):
        letters.fleet(held[0], 7, 1)


def test_a_mixed_fleet_has_nothing_of_the_members_family(letters):
    held = registry_family(letters).held()[0]
    assert {name.partition("/")[0] for name in letters.fleet(held, 4, 1, mixed=True)} == {"signs"}


def registry_family(of: Runs) -> Family:
    return runs.family(of.name)


def test_a_basis_has_the_drawn_sources_and_refuses_the_members_own(families, letters, monkeypatch):
    held = families["letters"].held()[0]
    basis = letters.basis(held, 2, 4, 1)
    assert [each["name"] for each in basis.info["sources"]] == [
        name.partition("/")[2] for name in letters.fleet(held, 2, 1)
    ]
    monkeypatch.setattr(letters, "fleet", lambda member, *_: [f"letters/{held}", "letters/letters-a"])
    with pytest.raises(SubspaceError, match="own adapter"):
        letters.basis(held, 2, 4, 1)


def test_k_is_capped_at_what_the_sources_span():
    assert [reached(32, n) for n in (2, 4, 8)] == [16, 32, 32] and reached(16, 1) == 8
    assert core("a", 100, 1, 32, 2).k == 16


def test_no_cell_is_there_twice_and_no_capped_size_repeats_a_smaller_one(families):
    listed = [
        c for group in stages().values() for stage in group if stage.cells for c in stage.cells("letters", "x", 1)
    ]
    assert len(set(listed)) > 30
    sizes = [cell for cell in size_cells("letters", "x", 1) if cell.row == "core"]
    assert sizes and all(cell.k in (8, 32) for cell in sizes) and len(set(sizes)) == len(sizes)
    assert {(c.sources, c.k) for c in sizes if c.k == 32} == {(n, 32) for n in counts("letters") if n >= 4}
    first = list(curve_cells("letters", "x", 1))
    assert not set(first) & set(sizes) and len(set(first)) == len(first)


def test_every_row_of_every_stage_can_be_run(families, letters, monkeypatch):
    monkeypatch.setattr(plan, "MIXED", (2,))
    held = families["letters"].held()[0]
    done = set()
    for group in stages().values():
        for stage in group:
            for cell in stage.cells("letters", held, 1) if stage.cells else ():
                if cell.row not in done:
                    done.add(cell.row)
                    brief = Cell(held, cell.row, 24, 1, 1e-3, min(cell.k, 4), min(cell.sources, 2), cell.mixed)
                    run = letters.run(brief)
                    assert 0 <= run["test"] <= 1 and run["trained"] == (
                        0 if cell.row == "head only" else run["trained"]
                    )
    assert done == set(runs.RATES)


def test_a_finished_run_is_taken_from_the_results_on_another_machine(families, letters, tmp_path, monkeypatch):
    held = families["letters"].held()[0]
    cell = Cell(held, "LoRA r=8", 24, 1, 1e-3)
    first = letters.run(cell)
    elsewhere = Runs("letters", Bench(tmp_path / "new cache", source_budget=SMALL), tmp_path / "out")
    monkeypatch.setattr(bench_module, "train", lambda *_, **__: pytest.fail("trained again"))
    assert {key: elsewhere.run(cell)[key] for key in first} == first
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        elsewhere.run(Cell(held, "LoRA r=8", 24, 2, 1e-3))


def test_results_of_another_setting_are_refused(tmp_path):
    store = Store(tmp_path / "letters.json", {"digest": "a", "top": 2})
    store.add(Cell("x", "LoRA r=8", 24, 1, 1e-3), {"test": 0.5, "validation": 0.5, "trained": 1})
    assert Store(tmp_path / "letters.json", {"digest": "a", "top": 2}).runs.keys() == store.runs.keys()
    with pytest.raises(SubspaceError, match=r"\(digest differ\)"):
        Store(tmp_path / "letters.json", {"digest": "b", "top": 2})


def test_the_rate_of_a_row_is_chosen_on_tuning_members_alone(families, letters, monkeypatch):
    asked = []

    def run(cell: Cell) -> dict:
        asked.append(cell)
        return {"validation": {1e-3: 0.5, 4e-3: 0.7, 1.6e-2: 0.7}.get(cell.rate, 0.1)}

    monkeypatch.setattr(letters, "run", run)
    monkeypatch.setitem(runs.RATES, "core", (1e-3, 4e-3, 1.6e-2))
    # of equals the smaller
    assert letters.rate("core") == 4e-3
    assert {cell.member for cell in asked} == set(families["letters"].tuned()) and {c.row for c in asked} == {"core"}
    monkeypatch.setitem(runs.RATES, "core", (1e-3, 4e-3))
    asked.clear()
    letters.rate("core")
    # the best was at the edge: one step further
    assert max(cell.rate for cell in asked) == 1.6e-2


def test_a_stage_cut_short_goes_on_and_does_nothing_twice(families, tmp_path, monkeypatch):
    for row in runs.RATES:
        monkeypatch.setitem(runs.RATES, row, (1e-3,))
    monkeypatch.setattr(plan, "FEW", (24,))
    bench = Bench(tmp_path / "cache", source_budget=SMALL, seeds=(1,), until=0)
    stage = Stage("curves", ("letters",), curve_cells)
    with pytest.raises(OutOfTime):
        stage.perform(bench, tmp_path)
    bench.until = float("inf")
    stage.perform(bench, tmp_path)
    body = json.loads((tmp_path / "families" / "letters.json").read_text())
    held = families["letters"].held()
    mine = [run for run in body["runs"] if run["member"] in held]
    assert len(mine) == len(held) * (3 + len(counts("letters"))) and body["facts"]["held_out"] == held
    monkeypatch.setattr(bench_module, "train", lambda *_, **__: pytest.fail("trained again"))
    stage.perform(bench, tmp_path)


def test_the_trial_looks_at_tuning_members_alone_and_trains_nothing_in_vain(families, letters, monkeypatch, capsys):
    asked = []

    def run(cell: Cell) -> dict:
        asked.append(cell)
        return {"validation": 0.5, "test": 0.9 if cell.row == "LoRA r=8" else 0.8}

    monkeypatch.setattr(letters, "run", run)
    monkeypatch.setattr(plan, "TUNING_SEEDS", (11,))
    plan.try_headroom(letters)
    tuned = families["letters"].tuned()
    assert f"{tuned[0]} +10.0 on 80.0" in capsys.readouterr().out
    assert {cell.member for cell in asked} == set(tuned)
    ours = set(asked)
    asked.clear()
    for row in ("LoRA r=8", "head only"):
        letters.rate(row)
    assert set(asked) == ours


def test_weights_are_measured_once_and_kept(families, letters, monkeypatch):
    monkeypatch.setattr(plan, "MIXED", (2,))
    monkeypatch.setattr(letters, "rate", lambda row: 1e-3)
    plan.measure(letters)
    facts = json.loads((letters.out / "letters.json").read_text())["facts"]
    assert set(facts["headroom"]) == set(families["letters"].order)
    assert len(facts["energies"]) == 2 * 2 * (len(counts("letters")) + 1)
    assert all(0 <= each["own"] <= 1 and 0 <= each["quick"] <= 1 for each in facts["energies"])
    assert all(each["class"] in ("unrelated", "little", "part", "mostly") for each in facts["energies"])
    assert all(0 <= each["left_out"] <= 1 for each in facts["energies"])
    letters.bench.until = 0
    plan.measure(letters)  # nothing is left to do


def test_energy_kept_is_all_of_a_source_in_a_basis_large_enough(families, letters):
    held = families["letters"].held()[0]
    basis = letters.basis(held, 2, 16, 1)
    source = letters.bench.source(letters.fleet(held, 2, 1)[0])
    assert energy_kept(basis, source) == pytest.approx(1, abs=1e-5)
    assert 0 <= energy_kept(letters.basis(held, 2, 2, 1), letters.bench.source(f"letters/{held}")) < 1


def test_hidden_states_of_a_member_are_those_of_its_items(small, tmp_path, monkeypatch):
    from benchmarks.quality.families import hidden

    calls = []

    def states(items):
        calls.append(len(items))
        return [np.full((2 + len(item) % 3, 4), len(item), dtype=np.float16) for item in items]

    monkeypatch.setattr(hidden, "_text_states", states)
    family = made(per_class=60)
    for name in family.order[:2]:
        task = hidden.load(family, name, tmp_path)
        for pool, chosen in family.draw(name).items():
            split = task.splits[pool]
            sizes = torch.tensor([len(family.items[place]) for place, _ in chosen])
            assert torch.equal(split.hidden[:, 0, 0], sizes.float()) and torch.equal(split.lengths, 2 + sizes % 3)
            assert split.labels.tolist() == [label for _, label in chosen]
            # padding is zero
            assert split.hidden[split.lengths < split.hidden.shape[1]][:, -1].abs().sum() == 0
    assert len(calls) == 1


def test_a_familys_member_is_a_task_of_the_benchmark(small, monkeypatch, tmp_path):
    from benchmarks.quality import tasks

    assert tasks.kind_of("groups/rec.autos") == "text" and tasks.kind_of("digits/3-or-5") == "image"
    with pytest.raises(KeyError, match="no task 'groop/rec'"):
        tasks.kind_of("groop/rec")
    monkeypatch.setitem(tasks.FAMILIES, "groups", ("text", lambda name, folder: toy(name)))
    assert tasks.load("groups/rec.autos", tmp_path).name == "groups/rec.autos"
