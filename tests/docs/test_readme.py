"""README: its size, its figures, its picture, and its script on the real model, adapters and texts."""

from __future__ import annotations

import json
import re
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = ROOT / "docs" / "figures" / "overview.py"
# real packages are fetched once for all runs of the tests
REAL_CACHE = ROOT / ".cache" / "subspace_peft"


def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_it_is_short():
    assert README.stat().st_size <= 8192


def test_its_links_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'src="([^"]+)"', text)
    assert len(links) > 10
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def gains() -> dict[str, tuple[str, str]]:
    """What each row of the table starts with → its two columns, from the committed results."""
    loading, mixed = results("load_many")["results"], results("mixed_batch")["results"]["query, value, 1000 tasks"]
    rows = ("LoRA r=8, load_adapter", "core, load_adapter", "core, bank.add(folder)")
    lora, task, bank = (loading[name] for name in rows)
    decoding = mixed["64 rows × 1"]
    per_row, ours = decoding["LoRA adapter_names"], decoding["core bank"]
    step = results("train_step")["results"]["encoder, all linear"]
    projections = results("energy_and_function")["projections"]
    answers = {}
    for basis in (("fleet", 32), ("others", 56)):  # of an adapter's own basis, and all that the seven others span
        kept = [row["same_answers"] for row in projections if (row["basis"], row["k"]) == basis]
        assert len(kept) == 8
        answers[basis[0]] = 100 * sum(kept) / len(kept)
    modules, width, rank, k = 6, 384, 8, 32  # of the demo's adapters and of that basis, in float32
    hundredth = [each["points"]["100"]["seconds"] * 1000 for each in (lora, task, bank)]
    return {
        "**Size**": (f"{lora['file_bytes']:,} bytes", f"**{task['file_bytes']:,} bytes**"),
        "1,000 tasks": (f"{per_row['task_bytes'] / 2**20:.1f} MiB", f"**{ours['task_bytes'] / 2**20:.1f} MiB**"),
        "**Compression**": (
            f"{4 * modules * rank * 2 * width:,} bytes",
            f"**{4 * modules * k * k:,} bytes**, {answers['fleet']:.1f} % of its answers ({answers['others']:.1f} % if"
            f" the basis is built of the others alone); the basis {4 * modules * k * 2 * width:,}, once",
        ),
        "**Training step**": (f"{step['LoRA r=8']['cpu_ratio']:.2f}", f"**{step['core']['cpu_ratio']:.2f}**"),
        "memory that": tuple(
            f"{mark}{(step[name]['saved_bytes'] - step['frozen base']['saved_bytes']) / 2**20:.0f} MiB{mark}"
            for name, mark in (("LoRA r=8", ""), ("core", "**"))
        ),
        "**Mixed batch**": (f"{per_row['cpu_ratio']:.2f}", f"**{ours['cpu_ratio']:.2f}**"),
        "**Loading**": (
            f"{hundredth[0]:.0f} ms",
            f"{hundredth[1]:.0f} ms; into a bank of tasks **{hundredth[2]:.1f} ms**",
        ),
    }


def test_the_table_says_what_was_measured():
    expected = gains()
    rows = [line.strip("| ").split(" | ") for line in README.read_text(encoding="utf-8").splitlines() if "| " in line]
    found = {start: tuple(row[1:]) for start in expected for row in rows if row[0].startswith(start)}
    assert found == expected


def test_the_picture_is_what_its_script_draws():
    script = runpy.run_path(str(FIGURE))
    drawn = script["draw"]()
    assert drawn == FIGURE.with_suffix(".svg").read_text(encoding="utf-8"), "run python docs/figures/overview.py"
    words = [element.text for element in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    found = script["figures"]()
    for key in ("one", "each", "ours"):
        assert found[key] in words
    assert [f"{found['lora']} each", f"{found['basis']}, once", f"{found['task']} each"] == [
        word for word in words if "B each" in word or ", once" in word
    ]


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_picture_can_be_read(scheme: str) -> None:
    """Text has a contrast of 4.5 to its ground and what the shapes are told by one of 3, as WCAG asks."""
    light, dark = runpy.run_path(str(FIGURE))["STYLE"].split("@media (prefers-color-scheme: dark)")
    colours: dict[str, str] = {}
    for rules in (light,) if scheme == "light" else (light, dark):
        for names, style in re.findall(r"^ *([.\w, ]+) {([^}]*)}", rules, flags=re.MULTILINE):
            for name in names.split(", "):
                found = re.findall(r"(?:^|[ ;])(fill|stroke): (#\w{6})", style)
                colours |= {f"{name} {part}": colour for part, colour in found}
    ground = colours[".page fill"]
    least = {"text fill": 4.5, ".small fill": 4.5, ".lora stroke": 3, ".arrow stroke": 3, ".head fill": 3}
    least |= {f"{name} fill": 3 for name in (".basis", ".task", ".bar", ".ours")}
    for name, wanted in least.items():
        lighter, darker = sorted((luminance(colours[name]), luminance(ground)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= wanted, (name, colours[name], ground)


def test_the_picture_is_described_in_the_same_figures():
    (described,) = re.findall(r'<img src="docs/figures/overview.svg"[^>]* alt="([^"]*)"', README.read_text())
    found = runpy.run_path(str(FIGURE))["figures"]()
    for key in ("lora", "basis", "task", "each", "ours"):
        assert found[key] in described


@pytest.mark.slow
def test_the_script_learns_on_the_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The accuracies are within 4 points of those printed, two standard errors of 600 answers; sizes are equal."""
    from subspace_peft.recipes import load_recipe

    from .blocks import Page

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUBSPACE_PEFT_CACHE", str(REAL_CACHE))
    load_recipe("demo").run_demo("demo-output", stage="sources", progress=False)
    sizes = [file.stat().st_size for file in Path("demo-output/loras").glob("*/adapter_model.safetensors")]
    assert len(sizes) == 8
    assert min(sizes) > 150_000  # as it says
    page = Page(README)
    examples = [each for each in page.document.examples() if each.region.lexemes["language"] in ("python", "text")]
    script, output = examples[:2]
    script.evaluate()
    assert page.printed is not None
    printed, shown = (numbers(text) for text in (page.printed[1], str(output.parsed)))
    assert printed.keys() == shown.keys() == {"before training", "after training", "saved", "reloaded"}
    assert printed["saved"] == shown["saved"]
    assert printed["reloaded"] == printed["after training"]
    assert printed["after training"] > printed["before training"] + 10
    for name in ("before training", "after training"):
        assert abs(printed[name] - shown[name]) <= 4, (printed, shown)


def numbers(text: str) -> dict[str, float]:
    """Return what the lines of an output say: ``after training: 81.2% right`` → 81.2."""
    found = re.findall(r"^([a-z ]+): ([\d,.]+)", text, re.MULTILINE)
    return {name: float(value.replace(",", "")) for name, value in found}
