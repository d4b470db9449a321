"""Files that tell people how to join: they can be read, what they name exists, and versions agree."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

from subspace_peft import __version__
from subspace_peft.builders.options import BUILDERS
from subspace_peft.tuner.coefficients import KINDS, Coefficients
from subspace_peft.tuner.merging import TYPES

ROOT = Path(__file__).parent.parent
PROSE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", ".github/pull_request_template.md")
SECTIONS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
FORMS = ("bug", "feature")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def load(name: str) -> Any:
    return yaml.safe_load(read(name))


def is_file_like(text: str) -> bool:
    """Whether a word in code names a file of this repository: a path, or a name that ends as ours do."""
    return bool(re.fullmatch(r"\.?[\w-]+(/[\w.-]+)*/?", text)) and (
        "/" in text or text.endswith((".py", ".md", ".txt", ".yml", ".cff"))
    )


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE))


@pytest.mark.parametrize("name", PROSE)
def test_files_that_are_named_exist(name):
    text = re.sub(r"^```.*?^```", "", read(name), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"[a-z]+:", link)]
    words = [word for word in re.findall(r"`([^`]+)`", text) if is_file_like(word)]
    # files may be named as seen from the package, where a sentence is about it; `org/name` is one of the Hub
    places = (
        ROOT,
        ROOT / "subspace_peft",
        ROOT / "subspace_peft/sources",
        ROOT / "subspace_peft/builders",
        ROOT / "recipes",
    )
    made = {".venv/", "common/", "offline/", "results/"} | {"fleet.yaml", "adapter_model.bin"}
    # what a run writes is not in the repository
    named = {word for word in {*links, *words} - made if not word.startswith("demo-output/")}
    missing = [word for word in named if not any((place / word).exists() for place in places)]
    assert not missing
    assert links or name in ("CODE_OF_CONDUCT.md", ".github/pull_request_template.md") or words


@pytest.mark.parametrize("name", PROSE)
def test_make_targets_that_are_named_exist(name):
    for command in re.findall(r"`?make ([a-z][a-z -]*[a-z])", " ".join(re.findall(r"`[^`]+`", read(name)))):
        assert set(command.split()) <= targets(), command


# The changelog


def versions() -> list[tuple[str, str]]:
    return re.findall(r"^## \[([^\]]+)\](?: - (\S+))?$", read("CHANGELOG.md"), flags=re.MULTILINE)


def test_the_changelog_begins_with_what_is_unreleased_and_then_the_version():
    names = [name for name, _ in versions()]
    assert names[0] == "Unreleased" and len(names) == len(set(names))
    assert names[1] == Version(__version__).base_version
    released = [Version(name) for name in names[1:]]
    assert released == sorted(released, reverse=True)
    dates = [datetime.date.fromisoformat(date) for _, date in versions()[1:]]
    assert dates == sorted(dates, reverse=True)


def test_the_changelog_s_sections_are_those_of_its_form_and_hold_lists():
    parts = re.split(r"^## .*$", read("CHANGELOG.md"), flags=re.MULTILINE)[1:]
    assert len(parts) == len(versions())
    for part in parts:
        sections = re.split(r"^### (.*)$", part, flags=re.MULTILINE)
        names, texts = sections[1::2], sections[2::2]
        assert names and set(names) <= SECTIONS and len(names) == len(set(names))
        assert all(re.search(r"^- \S", text, flags=re.MULTILINE) for text in texts)


def test_flags_and_names_of_the_changelog_are_there():
    """What is unreleased can be tried: flags are of the command line, verbs are verbs."""
    from subspace_peft.cli.main import parser

    text = read("CHANGELOG.md").partition("## [0.1.0]")[0]
    import argparse

    flags, verbs, todo = set[str](), set[str](), [parser()]
    for one in todo:  # grows while it is read
        for action in one._actions:
            flags |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                verbs |= set(action.choices)
                todo += action.choices.values()
    assert set(re.findall(r"`(-{1,2}[a-z][a-z-]*)`", text)) <= flags
    assert {"build", "record-base", "validate"} <= verbs
    for command in re.findall(r"`subspace-peft ([a-z-]+)", text):
        assert command in verbs


# How to add …


def test_what_has_to_be_extended_is_named_and_there():
    text = read("CONTRIBUTING.md")
    for name, place in {
        "KINDS": "subspace_peft/tuner/coefficients.py",
        "make_coefficients": "subspace_peft/tuner/coefficients.py",
        "TaskSizes": "subspace_peft/tuner/task_sizes.py",
        "same_kind": "subspace_peft/convert/same_kind.py",
        "_from_files": "subspace_peft/sources/open.py",
        "_from_state_dict": "subspace_peft/sources/open.py",
        "ForeignKeys": "subspace_peft/sources/diffusers_kohya.py",
        "BUILDERS": "subspace_peft/builders/options.py",
        "_build_module": "subspace_peft/builders/build.py",
        "TYPES": "subspace_peft/tuner/merging.py",
        "EXACT": "subspace_peft/tuner/merging.py",
        "PRUNED": "subspace_peft/tuner/merging.py",
        "_combined": "subspace_peft/tuner/merging.py",
        "add_weighted_adapter": "subspace_peft/tuner/model.py",
        "test_only_coefficients_train_and_the_gradient_is_the_projected_one": "tests/test_tuner_identities.py",
    }.items():
        assert re.search(rf"^ *(class {name}\b|def {name}\(|{name}\b.*=)", read(place), flags=re.MULTILINE), name
        assert f"`{name}" in text or f"`{name}." in text, name
    for table in ("test_migrate", "test_hotswap", "test_bank", "bundle/conftest"):
        assert re.search(r"^KINDS = \[", read(f"tests/{table}.py"), flags=re.MULTILINE)


def test_each_kind_builder_and_merge_has_a_row_in_the_tests_that_are_named():
    """So the tables name where a new one goes: what is there today is in them."""
    migrate, weighted, rows = (
        read(f"tests/{name}.py") for name in ("test_migrate", "test_weighted", "peft_suite/rows")
    )
    for kind in KINDS:
        assert f'"{kind}"' in migrate and (kind in ("core", "none") or f'"{kind}"' in rows), kind
    for kind in TYPES:
        assert f'"{kind.removesuffix("_svd")}"' in weighted, kind
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    assert all(f'"{builder}"' in tests for builder in BUILDERS)
    assert {each.__name__ for each in Coefficients.__subclasses__()} >= {"Core", "Factor", "Diagonal", "Directions"}


def test_a_kind_that_nothing_is_known_of_moves_to_no_other_basis_as_itself():
    """A kind without a rule of its own in `same_kind` is never taken for the last one there."""
    from subspace_peft.convert import same_kind

    source = Path(same_kind.__file__).read_text(encoding="utf-8")
    body = source.partition("def same_kind(")[2].partition("\ndef ")[0]
    named = re.findall(r'config\.coefficients [!=]= "(\w+)"', body)
    assert sorted(named) == sorted(KINDS) and re.search(r'!= "directions"[^\n]*:\n        return None', body)


# Citation, templates, workflow


def test_the_citation_is_of_this_version_and_whole():
    facts = load("CITATION.cff")
    assert facts["cff-version"] == "1.2.0" and facts["message"] and facts["title"] and facts["type"] == "software"
    assert facts["license"] == "Apache-2.0" and facts["version"] == __version__
    assert facts["authors"] and all("name" in each or "family-names" in each for each in facts["authors"])
    known = {"cff-version", "message", "title", "abstract", "type", "authors", "version", "license", "keywords"}
    assert set(facts) <= known | {"date-released", "repository-code", "url", "doi"}
    assert all(isinstance(word, str) for word in facts["keywords"])


@pytest.mark.parametrize("form", FORMS)
def test_forms_ask_for_what_is_needed(form):
    facts = load(f".github/ISSUE_TEMPLATE/{form}.yml")
    assert facts["name"] and facts["description"]
    fields = [each for each in facts["body"] if each["type"] != "markdown"]
    ids = [each["id"] for each in fields]
    assert len(ids) == len(set(ids)) and any(each.get("validations", {}).get("required") for each in fields)
    assert all(each["type"] in ("textarea", "input", "dropdown", "checkboxes") for each in fields)
    assert all(each["attributes"]["label"] for each in fields)


def test_a_bug_s_form_asks_for_the_environment_by_verbs_that_there_are():
    from subspace_peft.cli.language import verbs_of
    from subspace_peft.cli.main import parser

    text = read(".github/ISSUE_TEMPLATE/bug.yml")
    asked = re.findall(r"subspace-peft ([a-z-]+)", text)
    assert "env" in asked
    assert set(asked) <= set(verbs_of(parser()))


def test_the_workflow_runs_what_every_machine_runs():
    facts = load(".github/workflows/ci.yml")
    (job,) = facts["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111 and facts["permissions"] == {"contents": "read"}
    assert isinstance(load(".github/ISSUE_TEMPLATE/config.yml")["blank_issues_enabled"], bool)
