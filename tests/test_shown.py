"""How results look in a REPL and in a notebook: every class that a public function returns."""

from __future__ import annotations

import html.parser
import importlib
import inspect
import json
import re
import socket
import time
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

import subspace_peft
from subspace_peft import SubspaceConfig, _shown
from subspace_peft._shown import MOST_ROWS, Facts, Shown, short, size
from subspace_peft.builders import BuildOptions, CompleteOptions, Resources, UpdateOptions

from .models import bert

PACKAGES = ["basis", "builders", "bundle", "cards", "convert", "report", "serve", "sources", "tasks", "tuner"]
# small values whose own fields are short, and what torch and PEFT show
PLAIN = {"BasisReference", "ExtraRanks", "OwnUnits", "Place", "TaskSizes", "SubspaceLayer", "SubspaceModel"}


def public() -> Iterator[tuple[str, Any]]:
    for package in ["subspace_peft", *(f"subspace_peft.{name}" for name in PACKAGES)]:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield f"{package}.{name}", value
            elif inspect.isclass(value):
                for own, member in vars(value).items():
                    member = getattr(member, "__func__", getattr(member, "fget", member))
                    if not own.startswith("_") and inspect.isfunction(member):
                        yield f"{package}.{name}.{own}", member


def classes_in(annotation: Any) -> Iterator[type]:
    if inspect.isclass(annotation):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from classes_in(inner)


def returned() -> dict[type, str]:
    found: dict[type, str] = {}
    for name, function in public():
        names = {**vars(typing), **vars(subspace_peft.sources), **inspect.unwrap(function).__globals__}
        text = function.__annotations__.get("return")
        for word in re.findall(r"\w+", text) if isinstance(text, str) else ():
            for kind in classes_in(names.get(word)):
                if kind.__module__.startswith("subspace_peft") and not issubclass(kind, BaseException):
                    found.setdefault(kind, name)
    return found


def test_every_class_that_a_public_function_returns_is_shown_in_short():
    found = returned()
    assert {"SubspaceBasis", "ModuleBasis", "FleetReport", "BuildPlan", "Projection", "Export", "Bundle"} <= {
        kind.__name__ for kind in found
    }
    left = {
        f"{name} returns {kind.__name__}"
        for kind, name in found.items()
        if not issubclass(kind, Shown) and kind.__name__ not in PLAIN
    }
    assert left == set()
    # a dataclass makes a `__repr__` of its own unless it is told not to
    assert {
        kind.__name__ for kind in found if issubclass(kind, Shown) and kind.__repr__ is not Shown.__repr__
    } == set()


class Cells(html.parser.HTMLParser):
    """Takes the tags and cells of HTML, and refuses what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@dataclass(repr=False)
class Example(Shown):
    name: str
    count: int = 30

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "name", self.name
        yield "nothing", None
        yield "count", self.count

    def _shown_table(self) -> Any:
        return ("<i>", "x"), ((f"<b>{i}</b>", i) for i in range(self.count)), self.count


@pytest.mark.parametrize("name", ["plain", "<script>alert(1)</script>", "a & b", '"quoted"', "ΔW"])
def test_html_is_escaped_and_capped(name):
    text = Example(name)._repr_html_()
    found = Cells(text)
    assert found.tags == {"div", "strong", "table", "tr", "td", "th"} and "color" not in text
    assert name in found.cells and "<b>0</b>" in found.cells and "nothing" not in found.cells
    assert found.cells[-1] == f"… and {30 - MOST_ROWS} more" and f"<b>{MOST_ROWS}</b>" not in found.cells
    assert "more" not in Cells(Example(name, MOST_ROWS)._repr_html_()).cells[-1]
    assert repr(Example(name)) == str(Example(name)) == f"Example(name: {name}, count: 30)"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("one\r\nother\ttab", r"one\r\nother\ttab"),
        ("\u202eltr", r"\u202eltr"),
        ("\ud800", r"\ud800"),
        ("nul\0", r"nul\x00"),
    ],
)
def test_what_would_control_a_terminal_is_escaped(name, shown):
    for kind in (Example(name), Facts(name=name)):
        found = Cells(kind._repr_html_())
        assert shown in found.cells and kind._repr_html_().encode()
    assert repr(Example(name)) == f"Example(name: {shown}, count: 30)"


def test_facts_stand_up_to_values_of_any_length():
    found = Example("x" * 10**6)
    assert len(repr(found)) < 2 * _shown.WIDTH and len(found._repr_html_()) < 4000


def test_long_lines_are_wrapped_and_half_made_objects_are_shown():
    assert max(map(len, repr(Example("word " * 60)).splitlines())) <= _shown.WIDTH
    # between facts, and not within one, which a value with two spaces or a path would suffer from
    config = SubspaceConfig(basis="my  basis in a folder", target_modules="layer.(1|2)  .query", task_type="SEQ_CLS")
    assert len(repr(config).splitlines()) == 2 and eval(repr(config)) == config
    half = object.__new__(Example)
    assert repr(half) == "Example(state: incomplete)" and "incomplete" in Cells(half._repr_html_()).cells
    for kind in returned():
        if issubclass(kind, Shown) and not issubclass(kind, dict):
            empty = object.__new__(kind)
            assert repr(empty).startswith(kind.__name__) and Cells(empty._repr_html_())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (9_999, "9,999 bytes"), (10_000, "10.0 kB"), (1_250_000, "1.2 MB"), (3.2e12, "3,200.0 GB")],
)
def test_sizes(count, text):
    assert size(count) == text


def test_long_texts_keep_both_ends():
    assert short("a" * 40 + "b" * 40, 20) == "a" * 9 + "…" + "b" * 10 and short(None) is None


def test_facts_stay_a_dict():
    facts = Facts({"share": 0.123456, "kind": "basis", "modules": {"a": 1, "b": 2}, "none": None, "problems": []})
    assert repr(facts) == str(facts) == "Facts(kind: basis, modules: 2, problems: 0, and: 1 more)"
    assert Cells(facts._repr_html_()).cells[2:] == [
        "kind",
        "basis",
        "modules",
        "2",
        "problems",
        "0",
        "share",
        "0.1235",
    ]
    assert repr(Facts(k="k=6", basis_fingerprint="ab" * 32)) == "Facts(k: 6, basis_fingerprint: abababababab…)"
    assert 'title="' in Facts(energy_kept=0.5)._repr_html_()
    assert json.loads(json.dumps(facts)) == dict(facts) == facts and facts["modules"] == {"a": 1, "b": 2}


# -- the real ones ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(fleets, bases, tmp_path_factory) -> dict[str, Any]:
    """One object of each kind, under the name of its class."""
    from subspace_peft import bundle, convert, report, serve, sources, tasks

    folder = tmp_path_factory.mktemp("results")
    # a copy on the disk whose tensors nothing has read
    bases[bert].save_pretrained(folder / "basis")
    basis = subspace_peft.SubspaceBasis.from_pretrained(folder / "basis")
    loras = fleets[bert]
    projection = convert.project_lora(loras[0], basis)
    projection.save_pretrained(folder / "task")
    model = get_peft_model(bert(), SubspaceConfig(basis=basis, task_type="SEQ_CLS"))
    bank = tasks.TaskBank(model)
    bank.add("spam", projection.cores)
    compressed = bundle.compress_fleet(loras, basis, folder / "bundle", progress=False, min_energy=0)
    opened = bundle.open_bundle(folder / "bundle")
    made = [
        basis,
        bases[bert][next(iter(bases[bert]))],
        projection,
        model.peft_config["default"],
        bank,
        compressed,
        compressed.adapters[0],
        opened,
        opened[next(iter(opened))],
        opened.read(next(iter(opened))),
        tasks.read_task(folder / "task"),
        convert.migrate_task(folder / "task", basis),
        convert.export_lora(folder / "task", folder / "lora"),
        subspace_peft.build_clusters(loras, 2, k=2, progress=False),
        subspace_peft.plan_build(loras, k=2, progress=False),
        report.report_basis(basis, loras, progress=False),
        report.analyze_fleet(loras, basis=basis, progress=False),
        report.inspect_path(folder / "basis"),
        serve.TaskExports(folder),
        sources.open_source(loras[0]),
        sources.open_source(loras[0]).factors(next(iter(sources.open_source(loras[0]).keys))),
        subspace_peft.cards.basis_card,
        BuildOptions(k=4, seed=3),
        Resources(),
        UpdateOptions(add=3),
        CompleteOptions(k=7),
    ]
    return {type(each).__name__: each for each in made if not inspect.isfunction(each)}


def test_real_results_are_short_quick_and_read_nothing(results, monkeypatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("showing an object read a file or asked the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr("safetensors.safe_open", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    # what `Shown` swallows, so that showing never raises, must not be swallowed here
    monkeypatch.setattr(Shown, "_known", lambda self: [(a, str(b)) for a, b in self._shown_facts() if b is not None])
    for name, result in results.items():
        began = time.process_time()
        text, drawn = repr(result), result._repr_html_()
        took = time.process_time() - began
        assert took < 0.05, (name, took)
        assert text.startswith(f"{name}(") and len(text) < 700 and len(text.splitlines()) <= 8, text
        assert " object at 0x" not in text and "tensor(" not in text
        found = Cells(drawn)
        rows = result._shown_table()
        # no row is lost on the way
        assert rows is None or all(cell in found.cells for cell in rows[0])
        assert rows is None or len(list(rows[1])) == rows[2]
        assert str(result) == text


def test_what_a_basis_and_a_report_say(results, bases):
    basis, found = results["SubspaceBasis"], repr(results["SubspaceBasis"])
    assert f"modules: {len(basis)}, k: 6" in found and f"fingerprint: {basis.fingerprint[:12]}…" in found
    assert re.search(r"energy kept of them: (at least )?\d+(\.\d+)? %", found), found
    assert f"at: {short(basis.location)}" in found
    assert next(iter(basis)) in Cells(basis._repr_html_()).cells
    report = re.sub(r"\s+", " ", repr(results["FleetReport"]))
    assert re.search(r"energy kept of them: [\d.]+ %", report) and re.search(r"training new tasks: \w+\)$", report)
    assert repr(results["BuildOptions"]) == "BuildOptions(k=4, seed=3)" and repr(Resources()) == "Resources()"


def test_a_printed_model_says_how_large_its_cores_are():
    model = get_peft_model(bert(), SubspaceConfig(basis="random", k=3, target_modules=["query"]))
    assert "(default): Core(k_out=3, k_in=3)" in str(model)


def test_the_configuration_is_shown_as_it_is_called():
    config = SubspaceConfig(basis="my-basis", k=16, target_modules=["query"], task_type="SEQ_CLS")
    assert repr(config) == "SubspaceConfig(task_type='SEQ_CLS', basis='my-basis', k=16, target_modules={'query'})"
    assert eval(repr(config)) == config
    assert repr(SubspaceConfig()) == "SubspaceConfig()"


def test_help_says_type_default_and_text_of_every_field():
    text = SubspaceConfig.__doc__
    told = text.partition("    Args:\n")[2]
    for field in fields(SubspaceConfig):
        if field.init and "help" in field.metadata:
            head = re.search(rf"^        {field.name} \(`(.+)`, defaults to `(.+)`\):$", told, re.MULTILINE)
            assert head, field.name
            assert re.sub(r"\s+", " ", field.metadata["help"]) in re.sub(r"\s+", " ", told[head.end() :])
    assert max(map(len, text.splitlines())) < 120 and text.index("Args:") < text.index("Raises:")
    assert "learning_rate=3e-3" in text and "1e-4" in text and "2e-2" in text
    # what a user sets comes first
    assert told.index("basis (") < told.index("inference_mode (") < told.index("basis_fingerprint (")


@pytest.mark.parametrize("kind", [BuildOptions, CompleteOptions, Resources, UpdateOptions])
def test_options_tell_of_all_their_fields(kind):
    told = kind.__doc__.partition("Attributes:\n")[2]
    assert {field.name for field in fields(kind)} == set(re.findall(r"^        (\w+): ", told, re.MULTILINE))
    assert set(inspect.signature(kind).parameters) == {field.name for field in fields(kind)}


def test_the_rates_in_texts_are_those_that_are_warned_of():
    from subspace_peft.cards import render
    from subspace_peft.tuner.learning_rate import OF_CORES, USUAL_ALPHA

    (alpha,) = [field for field in fields(SubspaceConfig) if field.name == "alpha"]
    assert (render.RATE, render.USUAL_ALPHA) == (OF_CORES.start, USUAL_ALPHA) == (3e-3, alpha.default)
    assert render._rate() == "3e-3" and render._rate(64.0) == "1.2e-2"
    for text in (SubspaceConfig.__doc__, alpha.metadata["help"]):
        for value in (OF_CORES.least, OF_CORES.most, OF_CORES.start):
            assert f"{value:.0e}".replace("e-0", "e-") in text
