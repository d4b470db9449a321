"""The continual comparison: its summary and tables; and that the committed pages are of the committed results."""

from __future__ import annotations

import json
import math
import re

import pytest

from benchmarks.continual import tables
from benchmarks.continual.run import slug, write
from benchmarks.continual.setting import ORDERS
from benchmarks.continual.streams import Method
from benchmarks.continual.summary import FROZEN, LORA, RANDOM, Row, against, break_even, rows_of

TASKS = {order: tasks[-2:] for order, tasks in ORDERS.items()}


def stream(order: str, scores: list[list[float | None]], own: int, shared: list[int], **more) -> dict:
    steps = [
        {
            "task": name,
            "trained": own // 4,
            "own_bytes": own,
            "shared_bytes": each,
            "jump": {"logits": 0.5, "float32": 0.25, "loss": 0.25, "score": -0.01},
            **more,
        }
        for name, each in zip(TASKS[order], shared, strict=True)
    ]
    return {"tasks": TASKS[order], "R": scores, "change": [[0.0], [2.0, 0.0]], "steps": steps, "seconds": 1.0}


def body(method: str, first: float, later: float, last: float, own=100, shared=(0, 0), **more) -> dict:
    streams = {
        f"{order}{seed}": stream(order, [[first], [later, last]], own, list(shared), **more)
        for order in ORDERS
        for seed in (1, 2)
    }
    return {"method": method, "rate": 1e-3, "sweep": [[1e-3, 0.5], [4e-3, 0.4]], "streams": streams}


@pytest.fixture
def results() -> dict:
    listed = [
        body(LORA, 0.8, 0.8, 0.6, own=1000),
        body(FROZEN, 0.7, 0.7, 0.6, own=100, shared=(1500, 1500)),
        body("sequential LoRA r=8", 0.8, 0.5, 0.7, own=0, shared=(1000, 1000)),
        body("append 2", 0.8, 0.8, 0.7, own=100, shared=(1500, 1900), k=18, drift={"a": 0.25}),
        body(RANDOM, 0.6, 0.6, 0.5),
    ]
    return {each["method"]: each for each in listed}


def test_metrics_are_those_of_the_matrix_over_orders_and_seeds(results):
    rows = rows_of(results)
    assert RANDOM not in rows and rows[LORA].runs() == {"A": [1, 2], "B": [1, 2], "C": [1, 2]}
    found = {name: row.metric("bwt") for name, row in rows.items()}
    assert found[LORA].mean == 0 and found["sequential LoRA r=8"].mean == pytest.approx(-30)
    assert rows["append 2"].metric("acc").mean == pytest.approx(75)
    assert rows["append 2"].metric("acc").low == pytest.approx(75)
    # the frozen basis's forward transfer is what it learned minus what random directions did, from the second task on
    assert rows[FROZEN].metric("fwt").mean == pytest.approx(10)
    assert rows["append 2"].metric("fwt") is None


def test_only_seeds_of_which_all_orders_are_there_count(results):
    del results["append 2"]["streams"]["B2"]
    rows = rows_of(results)
    assert rows["append 2"].runs() == {order: [1] for order in ORDERS}
    assert len(rows[LORA].counted(rows["append 2"])) == 3
    assert against(rows["append 2"], rows[LORA]).mean == pytest.approx(5)
    # of one order alone, where no seed has all
    for stream in ("B1", "C1", "C2"):
        del results["append 2"]["streams"][stream]
    assert rows["append 2"].runs() == {"A": [1, 2]}
    assert against(rows["append 2"], rows[LORA]).tasks.keys() == set(TASKS["A"])
    none = Row("none", {}, {})
    assert none.metric("acc") is None and none.runs() == {} and against(none, rows[LORA]) is None


def test_differences_are_paired_by_task_order_and_seed(results):
    rows = rows_of(results)
    found = against(rows["append 2"], rows[LORA])
    assert found.mean == pytest.approx(5) and len(found.tasks) == len({t for each in TASKS.values() for t in each})
    one = TASKS["A"][0]
    assert against(rows["append 2"], rows[LORA], [one]).tasks.keys() == {one}


def test_bytes_add_up_and_break_even_is_the_first_task_from_which_on_it_is_less(results):
    rows = rows_of(results)
    assert rows["append 2"].total("A1") == [1600, 2100] and break_even(rows["append 2"], rows[LORA]) is None
    assert rows[FROZEN].total("A1") == [1600, 1700] and break_even(rows[FROZEN], rows[LORA]) == 2
    assert break_even(rows["sequential LoRA r=8"], rows[LORA]) == 2


def test_the_order_gap_is_between_the_two_orders_of_a_task():
    shared = ORDERS["A"][0]
    streams = {
        f"{order}1": {"tasks": [shared], "R": [[score]], "steps": []}
        for order, score in {"A": 0.5, "B": 0.7, "C": 0.6}.items()
    }
    assert Row("x", streams, {}).order_gap() == pytest.approx(20)


def test_the_command_writes_tables_figures_and_the_pages_part(results, tmp_path, capsys):
    folder, page = tmp_path / "results", tmp_path / "page.md"
    folder.mkdir()
    for name, each in results.items():
        (folder / f"{slug(name)}.json").write_text(json.dumps(each), encoding="utf-8")
    page.write_text(f"before\n{tables.BEGIN}\nstale\n{tables.END}\nafter\n", encoding="utf-8")
    tables.main(["--results", str(folder), "--page", str(page)])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert (folder / "tables.md").read_text(encoding="utf-8") in text
    assert "| append 2 (all) | " in text and "| append 2 | 18.0 | 18.0 |" in text
    assert "| append 2 | 0.5 | 0.25 | +0.250 | -1.0 | 2 | 25% | 25% |" in text
    assert "sequential LoRA r=8" in (folder / "matrices.md").read_text(encoding="utf-8")
    for name in ("accuracy.png", "growth.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    (folder / f"{slug(LORA)}.json").unlink()
    with pytest.raises(SystemExit):
        tables.main(["--results", str(folder), "--page", str(page)])
    assert "run.py" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nowhere"):
        tables.insert("no markers", "x")


def test_a_stream_joins_those_of_its_method_unless_the_rate_is_another(tmp_path):
    method = Method("append 2", None, None)
    found = {"tasks": ["a"], "R": [[0.5]], "steps": [], "change": [[math.nan]]}
    for name, rate in (("A1", 1e-3), ("B1", 1e-3)):
        write(tmp_path, method, rate, {1e-3: 0.5}, name, found)
    assert list(json.loads((tmp_path / "append-2.json").read_text())["streams"]) == ["A1", "B1"]
    write(tmp_path, method, 4e-3, {1e-3: 0.5}, "C1", found)
    assert list(json.loads((tmp_path / "append-2.json").read_text())["streams"]) == ["C1"]


# -- the committed pages


def test_the_pages_tables_are_those_of_the_committed_results():
    results = tables.read(tables.RESULTS)
    rendered = tables.render(results)
    assert (tables.RESULTS / "tables.md").read_text(encoding="utf-8") == rendered
    assert (tables.RESULTS / "matrices.md").read_text(encoding="utf-8") == tables.matrices(rows_of(results))
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.insert(page, rendered) == page


@pytest.mark.parametrize(
    ("page", "title"),
    [("evidence.md", "Can it learn task after task?"), ("evidence-details.md", "Continual learning")],
)
def test_every_difference_that_a_section_tells_is_in_its_tables(page, title):
    text = (tables.ROOT / "docs" / page).read_text(encoding="utf-8")
    section = text.split(f"## {title}", 1)[1].split("\n## ", 1)[0]
    told = re.findall(r"[+−-]?\d+\.\d+ \[[^\]]+\]", section)
    assert told, "the section tells no difference"
    plain = (tables.RESULTS / "tables.md").read_text(encoding="utf-8").replace("-", "−")
    assert [each for each in told if each.replace("-", "−") not in plain] == []
