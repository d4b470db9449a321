"""Every code block of README and docs: executed where it can be, else compiled and its names resolved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.fixture
def folder(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a copy of the stand-ins."""
    monkeypatch.chdir(shutil.copytree(stand_ins, tmp_path / "page"))
    return Path.cwd()


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_blocks_of_a_page_do_as_they_are_printed(file: Path, folder: Path) -> None:
    assert faults(file, folder) == []


def faults(file: Path, folder: Path) -> list[str]:
    """Evaluate a page, and return what is wrong with it, each with its line; say what was done with its blocks."""
    from .blocks import Page
    from .stand_ins import Folder

    page, found = Page(file, Folder(folder)), []
    for example in page.document.examples():
        try:
            example.evaluate()
        except Exception as error:
            found.append(f"{file.name}:{example.line}: {type(error).__name__}: {error}")
    found += page.inline()
    print(f"{file.name}: {dict(sorted(page.counts.items()))}")
    return found


GOOD = """
```python
from subspace_peft import SubspaceBasis

print(len(SubspaceBasis.from_pretrained("my-basis")), "modules")
```

```text
4 modules
```

```bash
subspace-peft inspect my-basis && make demo
pip install ".[demo]"
python recipes/demo.py --quick
vllm serve base-model
subspace-peft build loras/* -k 4 --out my-basis   # in place of the stand-in
subspace-peft inspect my-task                     # which was made of the new one
```

<!-- no-run: needs a GPU -->
```python
import torch
import not_installed_here

torch.cuda.current_device()
SubspaceBasis.from_pretrained("my-basis", token="x")
not_installed_here.anything()
```

```yaml
k: 16
```

The command `subspace-peft build --dry-run` and `subspace-peft bundle create|add`, `subspace-peft inspect my-basis`.
"""


def test_a_good_page_has_no_faults_and_all_is_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "page.md").write_text(GOOD)
    assert faults(folder / "page.md", folder) == []
    said = capsys.readouterr().out
    for count in ("'Python executed': 1", "'Python resolved': 1", "'outputs compared': 1", "'commands run': 3"):
        assert count in said
    for count in (
        "'other commands checked': 3",
        "'other programs': 1",
        "'data parsed': 1",
        "'commands in sentences': 3",
    ):
        assert count in said


@pytest.mark.parametrize(
    ("block", "fault"),
    [
        ("```python\nfrom subspace_peft import build_bases\n```", "cannot import name 'build_bases'"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```", "the page shows"),
        ("```python\nprint(1)\n```\n<!-- varies: x -->\n```text\n2 parameters\n```", "the page shows"),
        ("<!-- no-run: x -->\n```python\nfrom subspace_peft import build_bases\n```", "has no build_bases"),
        ("<!-- no-run: x -->\n```python\nimport subspace_peft.nothing\n```", "no module subspace_peft.nothing"),
        ("<!-- no-run: x -->\n```python\nimport torch\ntorch.kuda\n```", "torch has no kuda"),
        (
            "<!-- no-run: x -->\n```python\nfrom subspace_peft import build_basis\nbuild_basis([], q=3)\n```",
            "build_basis takes no q=",
        ),
        ("<!-- no-run: x -->\n```python\nmodel = undefined(3)\n```", "nothing is called undefined"),
        ("<!-- no-run: x; given unet, pipe -->\n```python\nunet.load(lambda x: x + pipe)\n```", None),
        ("<!-- no-run: x -->\n```python\nf(\n```", "SyntaxError"),
        ("<!-- norun: x -->\n```python\n1\n```", "no such mark"),
        ("<!-- varies: x -->\n```text\n1\n```", "no block that printed"),
        ("```bash\nsubspace-peft build loras/* --oot b\n```", "there is no option --oot. Did you mean --out?"),
        ("```bash\nsubspace-peft inspekt my-basis\n```", "inspekt"),
        ("```bash\nsubspace-peft build loras/* --out b -k 4000\n```", "ends with 1"),
        ("```bash\nsubspace-peft inspect tests-page.md\n```", None),  # what it reads is not there: only parsed
        ("```console\n$ subspace-peft inspect my-basis\n```", "'console' is not checked"),
        ('```python title="x"\nf(\n```', "is not checked"),
        ("```{.python}\nf(\n```", "is not checked"),
        ("``` python\nf(\n```", "SyntaxError"),
        ("~~~python\nf(\n~~~", "SyntaxError"),
        ("- a\n\n    ```python\n    f(\n    ```", "SyntaxError"),
        ("As here:\n\n    subspace-peft inspekt my-basis\n", "code without a fence"),
        ("```python\nprint(1)\n```\n\nIt prints.", "the page does not show what it prints: 1"),
        (
            "```bash\npip install . && subspace-peft inspect my-basis\n```\n\n```text\nall\n```",
            "nothing can be compared",
        ),
        ("<!-- no-run: x -->\n```python\nprint(1)\n```\n\n```text\n2\n```", "nothing can be compared"),
        (
            "```python\nfrom peft import PeftModel\n\ndef load(base):\n"
            '    return PeftModel.from_pretrained(base, "my-task")\n```',
            "PeftModel.from_pretrained before subspace_peft is imported",
        ),
        ("<!-- given: x -->\n```python\n1\n```", "nothing is made for page"),
        ("```bash\nmake damo\n```", "make has no target damo"),
        ('```bash\npip install ".[damo]"\n```', "no extra damo"),
        ("```bash\npip install -c constraint.txt .\n```", "no file constraint.txt"),
        ("```bash\npython recipes/dema.py\n```", "no script recipes/dema.py"),
        ("```bash\npython recipes/demo.py --quik\n```", "has no --quik"),
        ("```yaml\na: [\n```", "ParserError"),
        ("```ruby\n1\n```", "is not checked"),
        ("`subspace-peft inspekt my-basis`", "no verb inspekt"),
        ("`make damo`", "make has no target damo"),
        ("`subspace-peft build loras/* --oot b`", "no --oot"),
        ("`subspace-peft export-lora my-task`", "--out"),
    ],
)
def test_what_is_wrong_is_found(block: str, fault: str | None, folder: Path) -> None:
    (folder / "page.md").write_text(f"# Page\n\n{block}\n")
    found = faults(folder / "page.md", folder)
    assert (found == []) if fault is None else (len(found) == 1 and fault in found[0]), found
