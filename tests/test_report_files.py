"""What a report is written as: one page that fetches nothing, and files where they are asked for."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from subspace_peft import build_basis
from subspace_peft.cli import main
from subspace_peft.errors import OccupiedError, SubspaceError
from subspace_peft.report import report_basis

from .test_report import related
from .test_streaming import saved_fleet, shared_fleet


class Links(HTMLParser):
    """Everything that a page would fetch, what runs in it, and handlers in its attributes."""

    def __init__(self):
        super().__init__()
        self.found, self.tags, self.handlers = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.handlers += [key for key, _ in attrs if key.startswith("on")]
        self.found += [value for key, value in attrs if key in ("src", "href") and not value.startswith("data:")]


ODD = "x<script>document.title=1<"  # a name that would break a careless page


@pytest.fixture
def reported(tmp_path, capsys, monkeypatch):
    """A report by the command line, with its files, of adapters and modules with odd names."""
    folders = saved_fleet(tmp_path / "loras", shared_fleet(n=6), modules=("m.q", "m.<b>&'\"`x`"))
    shutil.move(folders[0], tmp_path / "loras" / ODD)
    monkeypatch.chdir(tmp_path)
    listed = [f"loras/{Path(folder).name}" for folder in (ODD, *folders[1:])]
    assert main(["build", *listed, "--out", "basis", "-k", "4", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["report", "basis", "--fleet", *listed, "--out", "report", "--files", "--quiet"]) == 0
    return tmp_path / "report", capsys.readouterr().out


def test_the_command_writes_page_numbers_and_figures(reported, tmp_path, capsys):
    folder, said = reported
    assert said.rstrip().endswith("report.html") and "The basis keeps" in said and "Energy is no score" in said
    loose = ["adapters.csv", "adapters.png", "energy.png", "modules.csv", "modules.png", "report.json", "spectrum.png"]
    assert sorted(file.name for file in folder.iterdir()) == sorted(["report.html", *loose])
    page = (folder / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert links.found == [] and links.handlers == [] and links.tags.count("script") == 2
    assert not {"img", "b", "link"} & set(links.tags) and links.tags.count("figure") == 3
    assert "x&lt;script&gt;" in page and "m.&lt;b&gt;" in page
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert [each["name"] for each in data["modules"]] == ["m.<b>&'\"`x`", "m.q"]
    for said_there in ("subspace-peft report basis --fleet ", "UTC · subspace-peft ", "Content-Security-Policy"):
        assert said_there in page
    facts = json.loads((folder / "report.json").read_text())
    assert facts["numbers"]["kept"] == pytest.approx(float(re.search(r"keeps ([\d.]+) %", said)[1]) / 100, rel=0.01)
    assert facts["made"]["command"].startswith("subspace-peft report basis --fleet ")
    rows = list(csv.DictReader((folder / "modules.csv").open()))
    assert [row["module"] for row in rows] == list(facts["modules"]) and float(rows[0]["kept"]) > 0
    # again: the same but for the time and the command
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    again = ["report", "basis", "--out", "report", "--files", "--quiet", "--json"]
    assert main(again) == 0
    assert json.loads(capsys.readouterr().out)["numbers"] == facts["numbers"]
    changed = {file.name for file in folder.iterdir() if file.read_bytes() != before[file.name]}
    assert changed <= {"report.html", "report.json"}
    assert {**json.loads((folder / "report.json").read_text()), "made": None} == {**facts, "made": None}


def test_one_file_is_written_unless_more_are_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    states = related(n=3)
    basis = build_basis(states, k=2, progress=False)
    found = report_basis(basis, states, progress=False)
    assert found.made["command"] == "report_basis(basis, sources)"
    assert found.save(tmp_path / "folder") == tmp_path / "folder" / "report.html"
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["report.html"]
    # written again, and to a file of its own
    found.save(tmp_path / "folder")
    assert found.save(tmp_path / "page.html") == tmp_path / "page.html"
    found.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == (tmp_path / "folder" / "report.html").read_text()
    with pytest.raises(SubspaceError, match="Give the name of a folder"):
        found.save(tmp_path / "page.html", files=True)
    with pytest.raises(ImportError, match=r"subspace-peft\[report\]"):
        found.save(tmp_path / "folder", files=True)
    # a report on another basis, and files of another kind, are not replaced by the way
    other = report_basis(build_basis(states, k=1, progress=False), states, progress=False)
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    for place in ("folder", "page.html", "mine.html"):
        with pytest.raises(OccupiedError, match="overwrite=True"):
            other.save(tmp_path / place)
    other.save(tmp_path / "page.html", overwrite=True)
    # earlier files that are not written any more are named
    (tmp_path / "folder" / "report.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"report.json there is of an earlier report.*files=True \(--files\)"):
        found.save(tmp_path / "folder")


def test_without_matplotlib_the_remedy_is_said_first(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["report", str(tmp_path / "nothing"), "--files"]) == 1
    assert "pip install subspace-peft[report]" in capsys.readouterr().err
