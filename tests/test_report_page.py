"""The report's page in a browser: what its controls say is what a build with that k gives."""

from __future__ import annotations

import itertools
import math
import re
import shlex
import shutil

import pytest
import torch
from safetensors import safe_open

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.builders.left_out import left_out_energy
from subspace_peft.cli import main
from subspace_peft.energy import EnergyRecord
from subspace_peft.report import curves, report_basis
from subspace_peft.report.chart import APART, Line, chart
from subspace_peft.report.choices import stored
from subspace_peft.report.commands import making_command
from subspace_peft.report.measure import measure
from subspace_peft.sources.factors import Factors

from .test_report import related
from .test_streaming import saved_fleet, shared_fleet

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MODULES = ("m.0.q", "m.0.v", "m.1.q", "m.1.v", "</script><b>.x")


def fleet(n=6, **options):
    return shared_fleet(**{"n": n, "out": 40, "inner": 30, "ranks": (4,), "shared": 6, **options})


# -- curves


def factors(states):
    return [Factors(state["a.q.lora_B.weight"], state["a.q.lora_A.weight"]) for state in states]


def test_curves_are_what_builds_of_every_k_keep(monkeypatch):
    states = related(n=5, noise=1.0)
    updates, counts, folds = factors(states), [1.0, 1.0, 0.5, 0.5, 1.0], [0, 1, 2, 2, 3]
    found = measure(updates, counts, folds, [1.0] * 5, (3, 3), 0, alternations=10)[1]
    assert found.spans == (10, 10) and found.alternated == list(range(1, 10))
    weights = [count**0.5 / update.norm() for count, update in zip(counts, updates, strict=True)]
    for k in (1, 2, 5, 9, 10):
        left_out = left_out_energy(updates, weights, folds, (k, k), 10)
        assert found.left_out[:, k - 1].tolist() == pytest.approx(left_out, abs=1e-6)
    assert found.seen[:, -1].tolist() == pytest.approx([1.0] * 5)
    assert bool((found.seen >= found.plain - 0.2).all()) and float((found.seen - found.plain).mean()) > 1e-4
    # with less work the gains between are linear, and near
    rough = measure(updates, counts, folds, [1.0] * 5, (3, 3), 0, alternations=10, work=1)[1]
    assert rough.alternated == [1, 3] and torch.allclose(rough.seen[:, 2], found.seen[:, 2])
    off, off_without = ((each - found.seen).mean(0).abs() for each in (rough.seen, found.plain))
    assert float(off.mean()) < float(off_without.mean()) / 2 and float(off.max()) < 0.05
    # without alternations there are none to add
    plain = measure(updates, counts, folds, [1.0] * 5, (3, 3), 0)[1]
    assert plain.alternated == [] and torch.equal(plain.seen, plain.plain)
    monkeypatch.setattr(curves, "MOST", 4)
    assert measure(updates, counts, folds, [1.0] * 5, (3, 3), 0)[1].seen.shape == (5, 4)


@pytest.mark.parametrize("last", [2, 3, 9, 17, 33, 64, 100, 128])
def test_labels_under_a_chart_do_not_run_into_one_another(last):
    for log in (True, False):
        xs = range(1, last + 1)
        made = chart("t", "k", "kept", xs, [Line("a", "fleet", [1 / x for x in xs])], log_x=log, log_y=not log)
        places = [place for place, _ in made.x_ticks]
        assert all(after - before >= APART for before, after in itertools.pairwise(places))
        assert made.x_ticks[0][1] == "1" and made.x_ticks[-1][1] == str(last)
        numbers = [float(number) for point in made.lines[0]["points"].split() for number in point.split(",")]
        assert all(0 <= number <= made.width for number in numbers)


def test_the_command_that_makes_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = saved_fleet(tmp_path / "loras", fleet(3))
    absolute = making_command(tmp_path / "my basis", folders, {"sample": 9, "allow_bin": True})
    assert absolute == "subspace-peft report 'my basis' --fleet loras/* --sample 9 --allow-bin"
    assert making_command("org/basis", None, {}) == "subspace-peft report org/basis"
    two = making_command("b", folders[:2], {})
    assert two == "subspace-peft report b --fleet loras/lora-0 loras/lora-1"
    assert making_command("b", [{}], {"seed": 3}) == "report_basis('b', sources, seed=3)"
    # a place elsewhere is named by its last part
    assert "/" not in making_command("/somewhere/else/basis", None, {}).removeprefix("subspace-peft report ")


# -- controls


class Page:
    """The page of a report in a browser, and what it says."""

    def __init__(self, browser, file, width):
        self.requests, self.errors = [], []
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(file.as_uri())

    def said(self, name):
        return self.page.text_content(f"#{name}").strip()

    def number(self, name):
        return int(re.sub(r"\D", "", self.said(name)))

    def k(self):
        return int(self.said("k-said"))

    def in_row(self, module, label=None):
        names = self.page.evaluate(
            "[...document.querySelectorAll('#modules tbody tr')].map(row => row.dataset.module)"
        )
        row = self.page.locator("#modules tbody tr").nth(names.index(module))
        return row if label is None else row.locator(f'td[data-label="{label}"]').text_content().strip()

    def agrees_with(self, basis, folder, loras):
        """Hold what is said against a basis that was built."""
        record, shapes = EnergyRecord.of(basis.info), basis.shapes()
        said = {"seen": record.kept, "left": record.left_out, "null": record.null, "random": record.random}
        for name, share in said.items():
            assert float(self.said(f"sum-{name}").removesuffix(" %")) == pytest.approx(100 * share, abs=0.0501), name
        for module, shares in record.per_module.items():
            for label, key in (("kept", "kept"), ("left out", "left_out"), ("noise", "null")):
                said = float(self.in_row(module, label).removesuffix(" %"))
                assert said == pytest.approx(100 * shares[key], abs=0.0511), (module, key)
        with safe_open(folder / "basis.safetensors", "pt") as file:
            sizes = {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118 - it is no mapping
        assert self.number("sum-stored") == sum(sizes.values())
        task = sum(shape["k_out"] * shape["k_in"] for shape in shapes.values())
        assert self.number("sum-parameters") == task
        alone = sum(size for key, size in sizes.items() if not key.endswith(".cores"))
        saved = loras / len(record.sources) - 4 * task
        even = f"from {math.ceil(alone / saved):,} adapters on" if saved > 0 else "never"
        assert self.said("sum-even") == even


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with LoRAs, a basis and its report."""
    root = tmp_path_factory.mktemp("page")
    saved_fleet(root / "loras", fleet(), modules=MODULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        loras = [f"loras/lora-{i}" for i in range(6)]
        assert main(["build", *loras, "--out", "basis", "-k", "4", "--quiet"]) == 0
        assert main(["report", "basis", "--out", "report.html", "--quiet"]) == 0
    return root


@pytest.fixture
def reported(made, monkeypatch):
    monkeypatch.chdir(made)
    return made / "report.html"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra `dev` is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_what_the_controls_say_is_what_a_build_gives(browser, reported, capsys, width):
    root = reported.parent
    shown = Page(browser, reported, width)
    page = shown.page
    loras = shown.number("sum-loras")
    assert loras == sum(2 * 4 * (40 + 30) for _ in range(6 * len(MODULES)))
    shown.agrees_with(SubspaceBasis.from_pretrained(root / "basis"), root / "basis", loras)

    def build():
        """Run the command that is shown."""
        verb, *arguments = shlex.split(shown.said("command"))
        assert verb == "subspace-peft" and main([*arguments, "--quiet", "--force"]) == 0
        capsys.readouterr()
        folder = root / arguments[arguments.index("--out") + 1]
        basis = SubspaceBasis.from_pretrained(folder)
        shown.agrees_with(basis, folder, loras)
        return basis

    # by keyboard
    page.focus("#k")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert shown.k() == 7 and build().describe_k() == "k=7"
    # by pointer
    box = page.locator("#k").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 6.2 / 23, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    assert 11 <= shown.k() <= 14
    chosen = shown.k()
    # one module by itself, and both that end alike
    for module, presses in (("m.0.q", 2), ("m.1.q", 2), ("</script><b>.x", 1)):
        shown.in_row(module).locator("input").focus()
        for _ in range(presses):
            page.keyboard.press("ArrowLeft")
    assert shown.said("overridden") == "3 with a k of their own"
    assert f"-k {chosen} --k-pattern '</script><b>.x={chosen - 1}' q={chosen - 2} " in shown.said("command")
    made = build()
    assert made["m.0.q"].k_out == made["m.1.q"].k_out == chosen - 2 and made["m.0.v"].k_out == chosen
    shown.in_row("m.0.q").locator("button").click()
    assert shown.said("overridden") == "2 with a k of their own" and f"m.1.q={chosen - 2}" in shown.said("command")
    page.click("#reset")
    assert shown.said("overridden") == "" and "--k-pattern" not in shown.said("command")
    # a share of energy
    page.check('input[name="by"][value="share"]')
    page.focus("#share")
    page.keyboard.press("Home")
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    assert shown.said("share-said") == "70.0 %" and " -k 0.7 " in shown.said("command")
    build()
    page.click("#as-built")
    assert shown.k() == 4 and page.is_hidden("#share")
    # nothing was fetched, nothing failed, nothing sticks out
    assert shown.requests == [reported.as_uri()] and shown.errors == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_terms_tables_and_the_copy_button(browser, reported):
    shown = Page(browser, reported, 1280)
    page = shown.page
    # an explanation by keyboard
    note = page.locator(".sums .term").first
    assert page.locator(".sums .note").first.is_hidden()
    note.focus()
    page.keyboard.press("Enter")
    assert "squared Frobenius norm" in page.locator(".sums .note").first.inner_text()
    page.keyboard.press("Escape")
    assert page.locator(".sums .note").first.is_hidden()
    # tables in the order that is asked for, and back
    order = "[...document.querySelectorAll('#adapters tbody tr')].map(row => row.cells[0].textContent)"
    as_given = page.evaluate(order)
    page.select_option('select[data-sorts="adapters"]', "kept")
    kept = "[...document.querySelectorAll('#adapters td[data-label=kept]')].map(cell => Number(cell.dataset.value))"
    values = page.evaluate(kept)
    assert values == sorted(values) and sorted(as_given) == sorted(page.evaluate(order))
    page.select_option('select[data-sorts="adapters"]', "order")
    assert page.evaluate(order) == as_given
    page.click("#copy")
    page.wait_for_function("document.getElementById('copy').textContent === 'Copied'", timeout=2000)
    assert page.title() == "Basis report: basis" and "`" not in page.inner_text("body").replace("`x`", "")


def test_a_basis_that_was_built_otherwise_is_shown_as_it_is_first(browser, reported):
    build = ["build", "--builder", "random", "--like", "basis", "--out", "random", "--quiet", "--force"]
    assert main(build) == 0
    loras = [f"loras/lora-{i}" for i in range(6)]
    assert main(["report", "random", "--fleet", *loras, "--out", "random.html", "--quiet", "--force"]) == 0
    shown = Page(browser, reported.parent / "random.html", 1280)
    first = float(shown.in_row("m.0.q", "kept").removesuffix(" %"))
    assert first < 10 and "built otherwise" in shown.page.inner_text("body")
    assert shown.said("command").startswith("subspace-peft build loras/* -k 4 ")
    shown.page.focus("#k")
    shown.page.keyboard.press("ArrowRight")
    assert float(shown.in_row("m.0.q", "kept").removesuffix(" %")) > 50
    shown.page.click("#as-built")
    assert float(shown.in_row("m.0.q", "kept").removesuffix(" %")) == first and shown.errors == []


def test_python_adds_up_the_same_bytes(reported, tmp_path):
    folders = [f"loras/lora-{i}" for i in range(3)]
    basis = build_basis(folders, k=5, k_pattern={"q": 3}, progress=False).to_precision("int8")
    basis.save_pretrained(tmp_path / "basis")
    choices = report_basis(basis, folders, modules=1, progress=False).choices
    with safe_open(tmp_path / "basis" / "basis.safetensors", "pt") as file:
        keys = [key for key in file.keys() if not key.endswith(".cores")]  # noqa: SIM118 - it is no mapping
        size = sum(file.get_tensor(key).nbytes for key in keys)
    alone, task = stored(choices, {name: tuple(each["size"]) for name, each in choices["modules"].items()})
    assert (alone, task) == (size, 4 * sum(m.k_out * m.k_in for m in basis.values()))
    assert choices["begin"] == "subspace-peft build loras/lora-0 loras/lora-1 loras/lora-2 --precision int8"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_page_of_hundreds_of_modules_is_small_and_near(browser, tmp_path, monkeypatch):
    """Where alternations are run at few k, the shares in between are near those of a build."""
    monkeypatch.chdir(tmp_path)
    modules = [f"layers.{layer}.{part}" for layer in range(32) for part in "qkvoudg"]
    folders = saved_fleet(tmp_path / "loras", fleet(8, out=72, inner=70, ranks=(8,), shared=12), modules=modules)
    basis = build_basis(folders, k=16, progress=False)
    file = report_basis(basis, folders, progress=False).save(tmp_path / "report.html")
    assert file.stat().st_size < 2e6
    shown = Page(browser, file, 390)
    names = shown.page.locator("#modules tbody tr").evaluate_all("rows => rows.map(row => row.dataset.module)")
    assert names == [f"layers.{layer}.{part}" for layer in range(32) for part in sorted("qkvoudg")]
    for k in (3,):
        shown.page.locator("#k").evaluate(
            "(slider, k) => { slider.value = k; slider.dispatchEvent(new Event('input')); }", k
        )
        truth = EnergyRecord.of(build_basis(folders, k=k, progress=False).info)
        for name, share in (("seen", truth.kept), ("left", truth.left_out), ("null", truth.null)):
            assert float(shown.said(f"sum-{name}").removesuffix(" %")) == pytest.approx(100 * share, abs=4), (k, name)
    assert shown.errors == [] and shown.page.evaluate("document.documentElement.scrollWidth") <= 390
