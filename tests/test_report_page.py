"""The report's page in a browser: what its controls say is what a build with that k gives."""

from __future__ import annotations

import math
import re
import shlex
import shutil

import pytest
from safetensors import safe_open

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.cli import main
from subspace_peft.energy import EnergyRecord
from subspace_peft.report import measure_fleet, report_basis
from subspace_peft.report.choices import stored

from .test_streaming import saved_fleet, shared_fleet

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MODULES = ("m.0.q", "m.0.v", "m.1.q", "m.1.v", "</script><b>.x")


def fleet(n=6, **options):
    return shared_fleet(**{"n": n, "out": 40, "inner": 30, "ranks": (4,), "shared": 6, **options})


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


def test_the_page_without_scripts_and_on_paper(browser, reported):
    context = browser.new_context(java_script_enabled=False, viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.goto(reported.as_uri())
    text = page.inner_text("body")
    assert "with JavaScript on" in text and "Compressing these adapters" in text and "How this was measured" in text
    for control in ("#choose", "select", "input", ".own button"):
        assert page.locator(control).first.is_hidden(), control
    assert page.locator("#modules .own output").first.inner_text() == "4"
    context.close()
    shown = Page(browser, reported, 1280)
    assert "with JavaScript on" not in shown.page.inner_text("body")
    shown.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert "Energy is no score" in shown.page.inner_text("#verdict")
    shown.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert shown.page.evaluate("document.getElementById('verdict').open") is False


def test_shares_between_measured_sizes_are_marked(browser, reported, monkeypatch):
    monkeypatch.setattr(measure_fleet, "WORK", 1)
    loras = [f"loras/lora-{i}" for i in range(6)]
    found = report_basis("basis", loras, progress=False)
    assert {tuple(curve["alternated"]) for curve in found.curves.values()} == {(1, 4)}
    shown = Page(browser, found.save(reported.parent / "rough.html", overwrite=True), 390)
    assert shown.said("near") == "" and "≈" not in shown.page.inner_text("body")
    shown.page.focus("#k")
    shown.page.keyboard.press("ArrowRight")
    assert shown.k() == 5 and "of 5 of 5 modules lie between sizes" in shown.said("near")
    for part in ("seen", "left", "null"):
        assert shown.said(f"sum-{part}").startswith("≈ ")
    assert shown.in_row("m.0.q", "kept").startswith("≈ ") and "≈" not in shown.said("sum-random")
    for key in ("End", "Home"):  # all that is spanned, and one direction: both are known
        shown.page.keyboard.press(key)
        assert shown.said("near") == "" and "≈" not in shown.said("sum-seen")
    assert shown.errors == [] and shown.page.evaluate("document.documentElement.scrollWidth") <= 390


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
            said = shown.said(f"sum-{name}")
            assert said.startswith("≈ ") and shown.said("near").startswith("≈ At this k the energies of 224 of 224 ")
            assert float(said.strip("≈ %")) == pytest.approx(100 * share, abs=4), (k, name)
    assert shown.errors == [] and shown.page.evaluate("document.documentElement.scrollWidth") <= 390
