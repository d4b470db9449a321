"""What docs/evidence-earlier.md says of own directions is what the committed results say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.quality import own_directions, tables
from benchmarks.quality.paired import mean_score
from benchmarks.quality.sections import scores

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality"
INTERVAL = re.compile(r"[+−]?\d+\.\d \[[+−]?\d+\.\d, [+−]?\d+\.\d\]")


@pytest.fixture(scope="module")
def section() -> str:
    text = (ROOT / "docs" / "evidence-earlier.md").read_text(encoding="utf-8")
    return text[text.index("\n## Own directions\n") :].split("\n## ", 2)[1]


@pytest.fixture(scope="module")
def found() -> dict:
    return tables.read(RESULTS)


def test_every_interval_of_the_section_is_in_the_tables(section, found):
    measured = set()
    for name, beside in (("own-directions-one-rate", "one-rate"), ("own-directions", "main")):
        if name in found:
            lines = own_directions.own_section("", found[name], found[beside])
            measured |= set(INTERVAL.findall("\n".join(lines).replace("-", "−")))
    said = INTERVAL.findall(section)
    assert len(said) > 10 and [each for each in said if each not in measured] == []


def test_the_sections_table_is_of_the_results(section, found):
    rows, beside = found["own-directions-one-rate"], found["one-rate"]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(lines) >= 11
    named = dict.fromkeys([*own_directions.FLEET, *own_directions.RANDOM, *own_directions.LORAS, *beside])
    for words, trained, mean, opinion, other in lines:
        name = next(known for known in named if words == known)
        listed = rows[name] if name in rows else beside[name]
        assert len(listed) == 12 and trained == f"{next(iter(listed.values()))['trained']:,}"
        for value, chosen in (
            (mean, list(listed)),
            (opinion, own_directions.tasks.SENTIMENT),
            (other, own_directions.tasks.TOPIC),
        ):
            assert value == f"{mean_score(scores({name: listed}, name), chosen):.1f}", words


def test_the_results_are_of_one_rate_each():
    body = json.loads((RESULTS / "own-directions-one-rate.json").read_text(encoding="utf-8"))
    rates = {(row["method"].split()[0], row["rate"]) for rows in body["tasks"].values() for row in rows}
    assert rates == {("fleet", 4.8e-3), ("random", 4.8e-3), ("LoRA", 6.4e-3)}
