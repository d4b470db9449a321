"""One meaning per number: what a basis keeps is one figure wherever it is said, and its word comes from one place."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace_peft import SubspaceBasis, build_basis, compress_fleet, energy, project_lora
from subspace_peft.bundle import open_bundle
from subspace_peft.cli import main
from subspace_peft.energy import EnergyRecord, percent
from subspace_peft.report import analyze_fleet, report_basis, validate_basis, verdict_of
from subspace_peft.report.inspect import inspect_path
from subspace_peft.report.verdict import verdict

from .uneven import others, saved, states

PACKAGE = Path(energy.__file__).parent

# what is built: arguments of the fleet, of the build, and the precision
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "adapters": ({}, {}, "float32"),
    "eigenlora": ({}, {"builder": "eigenlora"}, "float32"),
    "weights": ({}, {"weights": {"lora-0": 5.0, "lora-3": 0.2}}, "float32"),
    "norm": ({}, {"weights": "norm"}, "float32"),
    "partial": ({"partial": True}, {"partial": True}, "float32"),
    "rslora": ({"use_rslora": True}, {}, "float32"),
    "kinds": ({"kinds": True}, {}, "float32"),
    "no cores": ({}, {"keep_cores": False}, "float32"),
    "int8": ({}, {}, "int8"),
    "bfloat16": ({}, {}, "bfloat16"),
    "int8, no cores": ({}, {"keep_cores": False}, "int8"),
}

PRINTED = ("adapters", "weights", "int8")  # cases that the slower commands are called for


class Built:
    """A fleet, its basis on disk, and what every door says of it."""

    def __init__(self, root: Path, case: str) -> None:
        fleet, build, precision = CASES[case]
        fleet = dict(fleet)
        self.root, self.precision, self.case = root, precision, case
        made = states(partial=fleet.pop("partial", False))
        if fleet.pop("kinds", False):
            made = [{**state, **others(i)} for i, state in enumerate(made)]
        self.loras = saved(root / "loras", made, **fleet)
        self.basis = build_basis(self.loras, k=4, progress=False, **build).to_precision(precision)
        self.basis.save_pretrained(root / "basis")


@pytest.fixture(scope="module", params=CASES)
def built(request, tmp_path_factory) -> Built:
    return Built(tmp_path_factory.mktemp("one"), request.param)


def exactly(built: Built) -> dict[str, float]:
    """What the basis keeps of every source, from matrices of size out × in."""
    found = {}
    for lora in built.loras:
        projection = project_lora(lora, built.basis)
        kept = total = 0.0
        for name in projection.source.keys:
            update, module = projection.source.factors(name), built.basis[name]
            delta = (update.B @ update.A).double()
            kept += float((module.U.double().T @ delta @ module.V.double().T).square().sum())
            total += float(delta.square().sum())
        found[Path(lora).name] = kept / total
    return found


def run(capsys, *words: str) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_every_door_says_the_same(built, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = built.root / "basis"
    truth = exactly(built)
    mean = sum(truth.values()) / len(truth)
    # rounded directions leave their span by little, which what is on record leaves out: 1e-5 in 384 dimensions
    near = 1e-5 if built.precision == "float32" else 1e-3
    facts = inspect_path(folder)
    recorded = {entry["name"]: entry["energy_kept"] for entry in facts["sources"]}
    assert recorded == pytest.approx(truth, abs=near) and facts["energy_kept"] == pytest.approx(mean, abs=near)
    # objects
    whole, each = facts["energy_kept"], recorded
    record = EnergyRecord.of(SubspaceBasis.from_pretrained(folder).info)
    assert (record.kept, record.over_modules, record.at_least) == (whole, (), False)
    report = report_basis(folder, built.loras, progress=False)
    assert report.numbers["kept"] == pytest.approx(whole, abs=1e-12)
    assert {entry["name"]: entry["kept"] for entry in report.sources} == each
    for name, findings in report.modules.items():
        assert energy.mean(findings.kept) == pytest.approx(record.per_module[name]["kept"], abs=near)
    assert report.numbers["random"] == pytest.approx(facts["energy_random"], abs=1e-9)
    # what was left out, and noise, too
    if record.left_out is not None:
        assert report.numbers["unseen"] == record.left_out and report.numbers["null_kept"] == record.null
        for name, findings in report.modules.items():
            assert energy.mean(findings.left_out_here) == pytest.approx(record.per_module[name]["left_out"], abs=1e-6)
            assert energy.mean(findings.null_here) == pytest.approx(record.per_module[name]["null"], abs=1e-6)
        assert energy.mean(entry["unseen"] for entry in report.sources) == pytest.approx(record.left_out)
    assert energy.mean(entry["kept"] for entry in report.sources) == pytest.approx(whole)
    projected = {Path(lora).name: project_lora(lora, folder) for lora in built.loras}
    assert {name: found.energy_kept for name, found in projected.items()} == pytest.approx(each, abs=near)
    found = analyze_fleet(built.loras, basis=folder, progress=False)
    assert {entry["name"]: entry["energy_kept"] for entry in found.sources} == pytest.approx(each, abs=near)
    assert energy.mean(entry["energy_random"] for entry in found.sources) == pytest.approx(record.random, abs=1e-9)
    bundle = compress_fleet(built.loras, folder, tmp_path / "bundle", min_energy=0, progress=False)
    assert {one.name: one.total.kept for one in bundle.adapters} == pytest.approx(each, abs=near)
    opened = open_bundle(tmp_path / "bundle")
    assert {name: opened[name].energy_kept for name in opened} == pytest.approx(each, abs=near)
    # words
    for one in bundle.adapters:
        assert one.verdict == projected[one.name].verdict == energy.word(one.total.kept)
    # text, JSON, cards, page
    text = run(capsys, "inspect", folder)
    assert re.search(r"^energy kept ([\d.]+ %)", text, re.M)[1] == percent(whole)
    assert dict(re.findall(r"^  (lora-\d): .* energy kept ([\d.]+ %),", text, re.M)) == in_percent(each)
    assert json.loads(run(capsys, "inspect", folder, "--json"))["energy_kept"] == whole
    card = (folder / "README.md").read_text()
    assert f"| this basis | {percent(whole)} |" in card
    for name, share in each.items():
        assert re.search(rf"^\| {name} \|.*\| {percent(share)} \|", card, re.M)
    for name, shares in record.per_module.items():
        assert re.search(rf"^\| `{name}` \| {percent(shares['kept'])} \|", card, re.M)
    found = validate_basis(folder)
    assert found["problems"] == [] and found["energy_kept"] == whole
    assert run(capsys, "validate", folder).rstrip().endswith(f"energy kept {percent(whole)}")
    if built.case not in PRINTED:
        return
    said = run(capsys, "report", folder, "--fleet", *built.loras, "--out", tmp_path / "report", "--files", "--quiet")
    assert f"keeps {percent(whole)} of its adapters' energy" in said and f": {energy.word(whole)}." in said
    page = (tmp_path / "report" / "report.html").read_text()
    assert f'<td>energy the basis keeps of adapters it was built from</td><td class="n">{percent(whole)}</td>' in page
    for name, share in each.items():
        row = page[page.index(f"<tr><td>{name.replace('-', '-<wbr>')}</td>") :]
        assert f"<span>{percent(share)}</span>" in row[: row.index("</td>", row.index('data-label="kept"'))]
    assert json.loads((tmp_path / "report" / "report.json").read_text())["numbers"]["kept"] == pytest.approx(whole)
    card = (tmp_path / "bundle" / "README.md").read_text()
    for one in bundle.adapters:
        assert re.search(rf"^\| `{one.name}` \|.*\| {percent(one.total.kept)} \|", card, re.M)
    listed = run(capsys, "bundle", "ls", tmp_path / "bundle")
    assert dict(re.findall(r"^  (lora-\d): .*energy kept ([\d.]+ %)", listed, re.M)) == {
        one.name: percent(one.total.kept) for one in bundle.adapters
    }
    said = run(capsys, "project", built.loras[0], "--basis", folder)
    own = projected["lora-0"]
    assert f"energy kept {percent(own.energy_kept)} " in said and said.rstrip().endswith(f": {own.verdict}")
    said = run(capsys, "analyze", *built.loras, "--basis", folder, "--quiet")
    assert dict(re.findall(r"^  (lora-\d): .*energy kept ([\d.]+ %)", said, re.M)) == {
        name: percent(found.energy_kept) for name, found in projected.items()
    }


def test_of_a_control_the_same_is_said_too(tmp_path, capsys):
    loras = saved(tmp_path / "loras", states(4))
    like = build_basis(loras, k=4, progress=False)
    build_basis(builder="random", like=like, progress=False).save_pretrained(tmp_path / "random")
    kept = [project_lora(lora, tmp_path / "random") for lora in loras]
    report = report_basis(tmp_path / "random", loras, progress=False)
    assert report.numbers["kept"] is None
    assert report.numbers["kept_of_new"] == pytest.approx(energy.mean(each.energy_kept for each in kept), abs=1e-6)
    assert report.numbers["random"] == pytest.approx(energy.mean(each.energy_random for each in kept), abs=1e-9)
    said = run(capsys, "project", loras[0], "--basis", tmp_path / "random")
    assert f"energy kept {percent(kept[0].energy_kept)} (random directions {percent(kept[0].energy_random)})" in said


def in_percent(shares: dict[str, float]) -> dict[str, str]:
    return {name: percent(share) for name, share in shares.items()}


def test_a_build_ends_with_the_verdict_and_the_next_step(tmp_path, capsys):
    loras = saved(tmp_path / "loras", states())
    said = run(capsys, "build", *loras, "-k", "4", "--out", tmp_path / "basis", "--quiet").splitlines()
    basis = SubspaceBasis.from_pretrained(tmp_path / "basis")
    record = EnergyRecord.of(basis.info)
    assert said[-3] == (
        f"The basis keeps {percent(record.kept)} of its adapters' energy, beside {percent(record.null)} that one of"
        f" its size keeps of noise of the same strength and {percent(record.random)} that random directions keep of"
        f" anything: {energy.word(record.kept)}."
    )
    assert said[-2] == (
        f"Of an adapter left out, a basis of the others keeps {percent(record.left_out)}; random directions keep"
        f" {percent(record.random)}."
    )
    assert said[-1].startswith("Next: ") and "; for new tasks, " in said[-1]
    # from Python the same, with what energy is
    explained = said[-3].replace("energy,", f"energy ({energy.EXPLAINED}),")
    assert verdict_of(basis) == verdict_of(tmp_path / "basis") == [explained, *said[-2:]]
    # a control says nothing of any adapter
    like = ("--builder", "random", "--like", tmp_path / "basis")
    said = run(capsys, "build", *like, "--out", tmp_path / "random", "--quiet").splitlines()
    assert said[-3].startswith("The basis is of no adapters: it has random directions, the control")
    assert said[-1].startswith("Next: ") and "use LoRA" in said[-1]
    # JSON stays JSON, and has the lines
    made = json.loads(run(capsys, "build", *loras, "-k", "4", "--out", tmp_path / "basis", "--quiet", "--json"))
    assert made["verdict"][0].startswith(f"The basis keeps {percent(record.kept)}")
    # the report begins with what the build ended with
    numbers = report_basis(basis, progress=False).numbers
    assert verdict(numbers)[0].startswith(made["verdict"][0]) and verdict(numbers)[1].startswith(made["verdict"][1])
    assert verdict(numbers)[2] == made["verdict"][2]


@pytest.mark.parametrize(
    ("count", "arguments", "second", "third"),
    [
        (1, ("-k", "2"), "nothing can be said: no other one is left", "for new tasks, use LoRA: one adapter tells"),
        (9, ("-k", "4"), "was not measured with this one", "for new tasks, see `subspace-peft report "),
        (4, ("-k", "4", "--no-leave-one-out"), "was not measured with this one", "for new tasks, see `subspace-peft"),
        (4, ("-k", "4", "--builder", "eigenlora"), "was not measured with this one", "for new tasks, see"),
        (4, ("-k", "4", "--precision", "int8", "--no-keep-cores"), "a basis of the others keeps", "for new tasks, "),
    ],
)
def test_a_build_says_what_it_did_not_measure(count, arguments, second, third, tmp_path, capsys, monkeypatch):
    saved(tmp_path / "loras", states(count))
    monkeypatch.chdir(tmp_path)
    loras = [f"loras/lora-{i}" for i in range(count)]
    said = run(capsys, "build", *loras, *arguments, "--out", "basis", "--quiet").splitlines()[-3:]
    assert said[0].startswith("The basis keeps ") and second in said[1]
    assert said[2].startswith("Next: ") and third in said[2]
    assert "report" not in said[2] or "`subspace-peft report basis`" in said[2]


def test_updates_completions_and_clusters_end_with_the_verdict(tmp_path, capsys):
    loras = saved(tmp_path / "loras", states(5))
    run(capsys, "build", *loras[:4], "-k", "4", "--out", tmp_path / "basis", "--quiet")
    said = run(capsys, "update", tmp_path / "basis", loras[4], "--out", tmp_path / "v2", "--quiet").splitlines()
    assert said[-3].startswith("The basis keeps at least ") and "not measured" in said[-2] and "Next: " in said[-1]
    said = run(capsys, "complete", tmp_path / "basis", "-k", "6", "--out", tmp_path / "full", "--quiet").splitlines()
    assert said[-3].startswith("The basis keeps at least ") and said[-1].startswith("Next: ")
    for asked in ("2", "auto"):
        more = ("--clusters", asked, "-k", "3", "--out", tmp_path / f"clusters-{asked}", "--quiet")
        said = run(capsys, "build", *loras, *more).splitlines()
        assert re.match(r"The (one|\d) (basis keeps|bases keep) [\d.]+ % of their adapters' energy, beside ", said[-3])
        assert said[-2].startswith("Of an adapter left out, ") or "not measured" in said[-2]
        assert said[-1].startswith("Next: ")


def test_unrelated_adapters_are_not_praised(tmp_path, capsys):
    draw = torch.Generator().manual_seed(0)
    noise = [
        {"q.lora_B.weight": torch.randn(60, 3, generator=draw), "q.lora_A.weight": torch.randn(3, 50, generator=draw)}
        for _ in range(3)
    ]
    said = run(capsys, "build", *saved(tmp_path / "l", noise), "-k", "9", "--out", tmp_path / "b", "--quiet")
    assert "keeps 100.0 % of its adapters' energy, beside 100.0 % that one of its size keeps of noise" in said
    assert "because they are few" in said and "for new tasks, use LoRA" in said


# -- one place


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.74, "74.0 %"), (0.99961, "100.0 %"), (1.0, "100.0 %"), (0.0, "0.0 %"), (1e-5, "< 0.1 %"), (None, "–")],
)
def test_shares_have_one_form(share, said):
    assert percent(share) == said


def test_words_go_up_with_the_share():
    shares = [i / 1000 for i in range(1001)]
    assert list(dict.fromkeys(map(energy.word, shares))) == ["poor", "partial", "faithful"]
    assert [energy.word(edge) for edge in (energy.PARTIAL, energy.FAITHFUL)] == ["partial", "faithful"]
    found = [energy.outlook(share, 0.001) for share in shares]
    assert list(dict.fromkeys(found)) == ["unrelated", "little", "part", "mostly"]
    assert energy.outlook(0.01, None) == "little"
    assert energy.like_noise(0.74, 0.707) and not energy.like_noise(0.74, 0.3) and not energy.like_noise(0.7, None)


def test_no_other_place_decides_the_words_or_prints_shares_otherwise():
    """Outside `energy.py` the words are keys of sentences, and no share of energy is formatted by itself."""
    thresholds = {energy.FAITHFUL, energy.PARTIAL, energy.LITTLE, energy.MUCH}
    for file in PACKAGE.rglob("*.py"):
        if file.name == "energy.py":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.IfExp):
                words = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
                assert not words & {"faithful", "partial", "poor", "unrelated", "mostly"}, (file, node.lineno)
            if isinstance(node, ast.Compare):
                said = ast.unparse(node)
                about = re.search(r"\b(kept|left_out|energy_kept|null)\b", said)
                values = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
                assert not (about and values & thresholds), (file, node.lineno, said)
            if isinstance(node, ast.FormattedValue) and node.format_spec is not None:
                said = ast.unparse(node.value)
                if re.search(r"energy_(kept|random|left_out)|\.kept\b|kept_before|\['kept'\]", said):
                    assert "percent" in said, (file, node.lineno, said)
    for file in PACKAGE.rglob("*.j2"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if "energy_" in line and "number(" in line:
                assert "energy_lost" in line, (file, line)
