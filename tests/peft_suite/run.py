"""PEFT's own test suite, with rows for this method beside LoRA's: ``python -m tests.peft_suite.run``.

The suite comes out of PEFT's source distribution, of the version that is installed and by its sha256; the rows are put
in by the structure of its files (`patch`); the models that it would download are made here (`models`) and served on
loopback.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import peft
import transformers

from subspace_peft.recipes import load_recipe

from ..hub import Hub
from .models import save_all
from .patch import Edit, after, again, beside, patched, within

packages = load_recipe("offline.packages")
SUITES = {
    "0.21.2": packages.Package(
        "peft",
        "0.21.2",
        "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e",
        wheel=False,
        members=("*/tests/*.py",),
    )
}
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class File:
    """A file of PEFT's tests: what to put in, and which tests to run, in pytest's -k."""

    edits: list[Edit]
    select: str = "Subspace or LoraConfig"


def all_rows(task: str, name: str = "ALL_CONFIGS") -> Edit:
    """LoRA's rows and ours, instead of those of all methods."""
    return after(name, f"{name} = [row for row in {name} if row[0] is LoraConfig] + rows({task!r})")


TWINS = "Lora_LoKr or Lora_AdaLora or LoKr_AdaLora or Lora_x2 or LoKr_x2"
FILES = {
    "test_config.py": File(
        [after("ALL_CONFIG_CLASSES", "ALL_CONFIG_CLASSES = ((LoraConfig, {}), (SubspaceConfig, {}))")],
    ),
    "test_custom_models.py": File(
        [
            after(
                "TEST_CASES", "TEST_CASES = [row for row in TEST_CASES if row[2] is LoraConfig][:3] + custom_rows()"
            ),
            after("ALL_PEFT_CONFIG_CLASSES", "ALL_PEFT_CONFIG_CLASSES = [LoraConfig, SubspaceRandomConfig]"),
            after(
                "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES",
                "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:2] +"
                " several_active_rows()",
            ),
            after(
                "MIXED_ADAPTER_TEST_CASES", "MIXED_ADAPTER_TEST_CASES = MIXED_ADAPTER_TEST_CASES[:1] + batch_rows()"
            ),
        ],
    ),
    "test_decoder_models.py": File(
        [
            all_rows("CAUSAL_LM"),
            within(
                "TestDecoderModels",
                {r'!= LoraConfig:(\s+pytest.skip\("Mixed adapter)': r"not in (LoraConfig, SubspaceConfig):\1"},
            ),
        ]
    ),
    "test_encoder_decoder_models.py": File([all_rows("SEQ_2_SEQ_LM")]),
    "test_feature_extraction_models.py": File([all_rows("FEATURE_EXTRACTION")]),
    "test_seq_classifier.py": File([all_rows("SEQ_CLS")]),
    "test_token_classification_qa.py": File(
        [all_rows("TOKEN_CLS", "TOKEN_CLS_CONFIGS"), all_rows("QUESTION_ANS", "QA_CONFIGS")]
    ),
    "test_low_level_api.py": File(
        [
            again("TestPeftStateDict", {"LoraConfig": "subspace_config", "lora": "subspace"}),
            again("TestGetBaseModelStateDict", {"LoraConfig": "subspace_config"}),
            within(
                "TestInjectAdapterFromStateDict", {r"RandLoraConfig\(\)": "subspace_config()", "RandLoRA": "Subspace"}
            ),
        ],
        "TestPeftStateDict or TestGetBaseModelStateDict or (same_layers and (LoRA or Subspace))",
    ),
    "test_lora_conversion.py": File(
        [again("TestLoraConversion", {"LoKrConfig": "subspace_config", r"\.lokr": ".subspace_U"})],
        "TestLoraConversion",
    ),
    "test_mixed.py": File(
        [again("TestMixedAdapterTypes", {"LoHaConfig": "subspace_config"})],
        f"TestMixedAdapterTypes and not (TestMixedAdapterTypesSubspace and ({TWINS}))",
    ),
}
# they say by tuples of configurations which methods can do what is tested
SHARED: dict[str, list[Edit]] = {"testing_common.py": [beside("LoraConfig", "SubspaceConfig")]}

# what fails because of how a test is written, not because of the method: pattern of its id → why
KNOWN: dict[str, str] = {
    "TestMixedAdapterTypes::test_decoder_model": (
        "how far outputs must differ was chosen for the weights of the original model"
    )
}

CONFTEST = """
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    # some of these tests draw numbers without a seed, and LoRA's fail now and then too
    torch.manual_seed(0)
"""
INI = (
    "[pytest]\nmarkers =\n    single_gpu_tests: GPU\n    multi_gpu_tests: GPUs\n    regression: numbers\n   "
    " bitsandbytes: GPU\n"
)


@dataclass
class Outcome:
    """What became of a file's tests: ours, or those of the method beside."""

    passed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    known: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, case: ElementTree.Element) -> None:
        """Count a test case of pytest's report."""
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        trouble = next((part for part in case if part.tag in ("failure", "error")), None)
        skip = case.find("skipped")
        if trouble is not None:
            reason = next((why for pattern, why in KNOWN.items() if re.search(pattern, name)), None)
            found = self.failed if reason is None else self.known
            found[name] = reason or " ".join((trouble.get("message") or "").split())[:200]
        elif skip is not None:
            self.skipped[re.sub(r"<class '.*?'>", "it", skip.get("message") or "")] += 1
        else:
            self.passed += 1

    def take(self, other: Outcome) -> None:
        """Add the numbers of `other`."""
        self.passed += other.passed
        self.skipped += other.skipped
        self.known |= other.known
        self.failed |= other.failed

    @property
    def ran(self) -> int:
        """All but those skipped."""
        return self.passed + len(self.known) + len(self.failed)


def prepare(folder: Path) -> None:
    """PEFT's tests with our rows, below `folder`.

    Raises:
        SystemExit: PEFT is installed in a version whose suite we do not know.
        LayoutError: the suite is laid out otherwise.
        PackageError, BadFileError: see `offline.packages.fetch`.
    """
    if peft.__version__ not in SUITES:
        raise SystemExit(
            f"PEFT {peft.__version__} is installed, and the suites known here are {', '.join(SUITES)}. Install one of"
            " them, or add the sha256 of this version's source distribution to SUITES in tests/peft_suite/run.py."
        )
    source = next(packages.fetch(SUITES[peft.__version__]).rglob("testing_common.py")).parent
    target = folder / "peft_tests"
    target.mkdir(parents=True)
    (target / "__init__.py").touch()
    shutil.copy(source / "testing_utils.py", target)
    for name, edits in {**SHARED, **{name: file.edits for name, file in FILES.items()}}.items():
        text = (source / name).read_text(encoding="utf-8")
        (target / name).write_text(patched(name, text, edits), encoding="utf-8")
    (folder / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    (folder / "pytest.ini").write_text(INI, encoding="utf-8")


def run_file(name: str, folder: Path, endpoint: str, extra: list[str]) -> tuple[Outcome, Outcome]:
    """Run one file's tests in a process of their own: (ours, those beside)."""
    report = folder / f"{name}.xml"
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "SUBSPACE_PEFT_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("HF_HUB_OFFLINE", None)
    command = [
        *(
            sys.executable,
            "-m",
            "pytest",
            f"peft_tests/{name}",
            "-c",
            "pytest.ini",
            "-p",
            "no:cacheprovider",
            "-q",
            "--tb=short",
        ),
        *("-k", FILES[name].select, f"--junitxml={report}", *extra),
    ]
    with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
        code = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code not in (0, 1):
        said = (folder / f"{name}.log").read_text(encoding="utf-8").splitlines()[-30:]
        raise SystemExit(f"{name}: pytest ended with code {code}:\n" + "\n".join(said))
    ours, others = Outcome(), Outcome()
    for case in ElementTree.parse(report).iter("testcase"):
        own = "Subspace" in f"{case.get('classname')}{case.get('name')}"
        (ours if own else others).add(case)
    if not ours.ran:
        raise SystemExit(
            f"{name}: no test of ours ran: its rows are not where FILES in tests/peft_suite/run.py puts them."
        )
    return ours, others


def main(arguments: list[str] | None = None) -> int:
    """Run the suite and print what became of each file; 1 where a test of ours fails that is not known to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="file", help=f"some of: {', '.join(FILES)} (all)")
    parser.add_argument("--work", type=Path, help="keep the suite, the models and pytest's reports in this folder")
    parser.add_argument("--pytest", default="", help="further arguments of pytest, as one string")
    options = parser.parse_args(arguments)
    if unknown := set(options.files) - set(FILES):
        parser.error(f"no such file: {', '.join(sorted(unknown))}; choose from {', '.join(FILES)}")
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as scratch:
        folder = (options.work or Path(scratch)).resolve()
        for stale in ("peft_tests", "models"):
            shutil.rmtree(folder / stale, ignore_errors=True)
        prepare(folder)
        total = Outcome()
        transformers.utils.logging.disable_progress_bar()
        with Hub(save_all(folder / "models")) as hub:
            for name in options.files or FILES:
                ours, others = run_file(name, folder, hub.url, options.pytest.split())
                show(name, "SUBSPACE", ours)
                show(name, "beside it", others)
                for why, count in ours.skipped.most_common():
                    print(f"    skipped {count:4}: {why}")
                total.take(ours)
        show("all", "SUBSPACE", total)
    return int(bool(total.failed))


def show(name: str, who: str, outcome: Outcome) -> None:
    """Print one line of numbers, and one for each test that failed."""
    print(
        f"{name:36} {who:9} ran {outcome.ran:4}  passed {outcome.passed:4}  known {len(outcome.known):3}  "
        f"failed {len(outcome.failed):3}  skipped {outcome.skipped.total():4}",
        flush=True,
    )
    for test, why in (*outcome.failed.items(), *outcome.known.items()):
        print(f"    {'known' if test in outcome.known else 'FAILED'} {test}: {why}")


if __name__ == "__main__":
    sys.exit(main())
