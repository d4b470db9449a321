"""How rows get into PEFT's own tests; the suite itself is run by `make test-peft`."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import peft
import pytest

from subspace_peft import SubspaceConfig

from .peft_suite import run
from .peft_suite.models import ADAPTERS, MODELS, make
from .peft_suite.patch import LayoutError, after, again, beside, patched, within
from .peft_suite.rows import COEFFICIENTS, SubspaceRandomConfig, batch_rows, rows, several_active_rows, subspace_config

SOURCE = """
import os
from peft import (
    IA3Config,
    LoraConfig,
)

ROWS = [
    (IA3Config, {}),
    (LoraConfig, {}),
]


def can(config_cls):
    return "é", config_cls in (LoraConfig,), config_cls not in (IA3Config, LoraConfig), config_cls in (IA3Config,)


class TestIt:
    def name(self):
        return TestIt, LoraConfig, "lora"


LAST = len(ROWS)
"""


def namespace(*edits) -> dict[str, object]:
    made: dict[str, object] = {}
    exec(patched("test_it.py", SOURCE, list(edits)), made)
    return made


def test_rows_go_in_after_the_list_and_before_its_first_use():
    made = namespace(after("ROWS", "ROWS = [row for row in ROWS if row[0] is LoraConfig] + rows('SEQ_CLS')"))
    assert [row[0].__name__ for row in made["ROWS"]] == ["LoraConfig", *["SubspaceConfig"] * len(COEFFICIENTS)]
    assert made["LAST"] == 1 + len(COEFFICIENTS)
    assert {row[1]["task_type"] for row in made["ROWS"][1:]} == {"SEQ_CLS"}


def test_a_class_is_copied_or_changed_in_place():
    made = namespace(again("TestIt", {"LoraConfig": "SubspaceConfig", '"lora"': '"subspace"'}))
    assert made["TestIt"]().name() == (made["TestIt"], peft.LoraConfig, "lora")
    assert made["TestItSubspace"]().name() == (made["TestItSubspace"], SubspaceConfig, "subspace")
    made = namespace(within("TestIt", {"LoraConfig": "SubspaceConfig"}))
    assert made["TestIt"]().name()[1] is SubspaceConfig and made["LAST"] == 2


def test_tuples_of_able_methods_get_ours():
    can = namespace(beside("LoraConfig", "SubspaceConfig"))["can"]
    assert can(SubspaceConfig) == can(peft.LoraConfig) == ("é", True, False, False)
    assert can(peft.IA3Config) == ("é", False, False, True)
    assert namespace()["can"](SubspaceConfig) == ("é", False, True, False)


@pytest.mark.parametrize(
    "edit",
    [after("GONE", ""), again("Gone", {}), within("TestIt", {"gone": ""}), beside("LoHaConfig", "SubspaceConfig")],
)
def test_another_layout_is_an_error_that_names_file_and_place(edit):
    with pytest.raises(LayoutError, match=r"test_it\.py: .*(GONE|Gone|gone|LoHaConfig).*adapt FILES"):
        patched("test_it.py", SOURCE, [edit])


def test_another_version_of_peft_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(peft, "__version__", "0.0.1")
    with pytest.raises(SystemExit, match=r"PEFT 0\.0\.1 is installed.*0\.21\.2"):
        run.prepare(tmp_path)


def test_rows_are_configurations_that_pefts_tests_can_make():
    for made in rows(), rows("CAUSAL_LM"):
        assert [cls(**given).coefficients for cls, given in made] == ["core", "factor", "diagonal", "core"]
    for _, _, cls, one, other in several_active_rows():
        assert cls(**one).to_dict() != cls(**other).to_dict()
    assert all(one.to_dict() != other.to_dict() for _, one, other in batch_rows())
    assert SubspaceRandomConfig(target_modules=["lin"]).generated
    config = subspace_config(target_modules=["lin"], r=16, lora_alpha=2, init_subspace_weights=False)
    assert (config.k, config.init_weights) == (4, False)


@pytest.mark.parametrize("name", [name for name in MODELS if "OPT" not in name])
def test_models_are_small_and_the_same_each_time(name):
    one, other = make(name), make(name)
    assert sum(p.numel() for p in one.parameters()) < 300_000
    assert all((a == b).all() for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert type(one).__name__ == MODELS[name][0] and not set(MODELS) & set(ADAPTERS)


def test_outcomes_are_counted_by_what_pytest_reports(monkeypatch):
    monkeypatch.setitem(run.KNOWN, "::test_known", "its reason")
    report = ElementTree.fromstring(
        "<testsuite><testcase classname='a.TestA' name='test_good'/><testcase classname='a.TestA'"
        " name='test_bad'><failure message='E: no\n more'/></testcase><testcase classname='a.TestA'"
        " name='test_known'><error message='x'/></testcase><testcase classname='a.TestA' name='test_left'><skipped"
        " message=\"for &lt;class 'x.Y'&gt;\"/></testcase></testsuite>"
    )
    outcome, total = run.Outcome(), run.Outcome(passed=2)
    for case in report:
        outcome.add(case)
    assert (outcome.passed, outcome.ran, dict(outcome.skipped)) == (1, 3, {"for it": 1})
    assert outcome.failed == {"TestA::test_bad": "E: no more"}
    assert outcome.known == {"TestA::test_known": "its reason"}
    total.take(outcome)
    assert (total.passed, total.ran) == (3, 5)
